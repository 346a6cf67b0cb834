"""Rule of one Megatron parameter: its name, the Hugging Face tensors that it is made of, and how."""

from dataclasses import dataclass
from typing import Optional

from megatron.dmc.checkpoint.mapping.transforms import Direct, Piece, Transform
from megatron.dmc.config import ModelConfig


@dataclass(frozen=True)
class TensorRule:
    """One Megatron parameter and the Hugging Face tensors that it is made of."""

    megatron: str
    """Name in a ``torch_dist`` checkpoint, where the layers of a parameter are stacked."""
    hf: tuple[str, ...]
    """Names of the tensors; ``{layer}`` stands for the layer's number."""
    transform: Transform = Direct()
    shapes: tuple[str, ...] = ("h",)
    """Shape of each tensor in symbols. V: vocabulary, h: hidden size, F: feed-forward size, D: head dimension, H: KV
    heads, q and k: query and KV heads times head dimension."""
    split: Optional[int] = None
    """Dimension that tensor parallelism cuts; None: every rank has the whole parameter."""
    when: Optional[str] = None
    """Switch of ``ModelConfig`` without which a model does not have the parameter."""

    @property
    def per_layer(self) -> bool:
        return "{layer}" in self.hf[0]

    def names(self, layer: Optional[int]) -> list[str]:
        """Names of the Hugging Face tensors of one layer."""
        return [name.format(layer=layer) for name in self.hf]

    def hf_shapes(self, model: ModelConfig) -> list[tuple[int, ...]]:
        """Shape of each Hugging Face tensor."""
        d = model.head_dim
        sizes = {
            "V": model.vocab_size,
            "h": model.hidden_size,
            "F": model.ffn_hidden_size,
            "D": d,
            "H": model.kv_heads,
            "1": 1,
            "q": model.num_attention_heads * d,
            "k": model.kv_heads * d,
        }
        return [tuple(sizes[symbol] for symbol in symbols.split()) for symbols in self.shapes]

    def pieces(self, model: ModelConfig) -> list[Piece]:
        """Rows of the parameter, from the first to the last."""
        return self.transform.pieces(model, [shape[0] for shape in self.hf_shapes(model)])

    def megatron_shape(self, model: ModelConfig) -> tuple[int, ...]:
        """Shape of the parameter in one layer."""
        rows = sum(piece.stop - piece.start for piece in self.pieces(model))
        return (rows, *self.hf_shapes(model)[0][1:])
