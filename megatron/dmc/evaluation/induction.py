"""Initial weights that can look back: an induction circuit in the first two layers, random weights everywhere else.

A transformer learns to look things up when a head that finds the token before (layer 1) meets one that finds where the
same token stood (layer 2): an induction circuit (Elhage et al. 2021, "A Mathematical Framework for Transformer
Circuits"; Olsson et al. 2022, arXiv 2209.11895). A small model on two CPU cores has no time to learn that, and a model
that does not look back cannot tell one cache policy from another (docs/experiments.md). So training starts from weights
that have the circuit; nothing is frozen.

The residual stream is divided: a code of random signs for the token, a constant, and places that the two heads write
to. Head 0 of layer 1 scores by distance alone: queries and keys read the constant, the query turned by one position, so
that the rotation makes distance 1 the best; it copies a part of that token's code. Head 0 of layer 2 compares the
token's own code with that copy, in the channels that rotary embeddings hardly turn within the window; it copies the
code of where it looks, which the output layer reads.
"""

import json
import math
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from megatron.dmc.checkpoint import mapping
from megatron.dmc.config import ModelConfig
from megatron.dmc.ops import rotary_frequencies

STILL = 0.6
"""Radians that a channel pair may turn over the whole window to count as hardly turned."""
NEAR, SAME, SURE = 6.0, 1.0, 0.35
"""Amplitude of the distance scores per channel pair; score per matching sign; logit per sign of a copied code."""
SIGN, LEVEL = 0.5, 2.0
"""Amplitude of a code's signs, and of the constant, in the residual stream."""


class _Stream(NamedTuple):
    """How the residual stream is divided, and which channels of a head compare contents."""

    coded: int
    """Channels 0..coded-1 hold the token's code."""
    copied: int
    """Channels of a code that the two heads copy."""
    still: list[int]
    """Channel pairs of a head that hardly turn."""

    @property
    def constant(self) -> int:
        return self.coded

    @property
    def previous(self) -> slice:
        """Where the head of layer 1 writes the code of the token before."""
        return slice(self.coded + 1, self.coded + 1 + self.copied)

    @property
    def following(self) -> slice:
        """Where the head of layer 2 writes the code of the token that followed the same one."""
        return slice(self.coded + 1 + self.copied, None)


class _Head(NamedTuple):
    """Head 0 of a layer: its parts of the four projections, set to zero."""

    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    norm: float
    """Factor by which the norm before it scales its input."""

    def copy_code(self, channels: int, to: slice) -> None:
        """Copy the first channels of the code of where the head looks."""
        n = torch.arange(channels)
        self.v[n, n], self.o[n + to.start, n] = 1 / (SIGN * self.norm), SIGN


def _divide(model: ModelConfig) -> _Stream:
    d = model.head_dim
    copied = min(d, model.hidden_size // 4)
    turned = rotary_frequencies(d, model.rotary_base, model.rope_scaling) * model.max_position_embeddings
    # The last pair is left out: it has the decision neuron.
    still = [i for i in range(min(d // 2 - 1, copied)) if float(turned[i]) < STILL]
    if model.num_layers < 2 or len(still) < 5 or model.add_qkv_bias or model.qk_layernorm:
        raise ValueError(
            f"no room for an induction circuit: {model.num_layers} layers, {len(still)} of {d // 2 - 1} channel pairs "
            f"that turn by less than {STILL} over {model.max_position_embeddings} tokens; it takes 2 layers, 5 such "
            "pairs (raise rotary_base), no biases and no norms of q and k"
        )
    return _Stream(model.hidden_size - 2 * copied - 1, copied, still)


def weights(model: ModelConfig, seed: int) -> dict[str, Tensor]:
    """Tensors of a Llama of these sizes: fp32, by Hugging Face's names.

    Raises:
        ValueError: the circuit does not fit into the model.
    """
    stream = _divide(model)
    generator = torch.Generator().manual_seed(seed)
    tensors = _random_weights(model, generator)
    code = torch.randint(0, 2, (model.vocab_size, stream.coded), generator=generator) * 2.0 - 1
    embedding = tensors["model.embed_tokens.weight"].zero_()
    embedding[:, : stream.coded], embedding[:, stream.constant] = SIGN * code, LEVEL
    squares = stream.coded * SIGN**2 + LEVEL**2  # of the residual stream's channels, summed
    _look_at_token_before(_head(tensors, model, 0, squares), model, stream)
    _look_behind_same_token(_head(tensors, model, 1, squares + stream.copied * SIGN**2), model, stream)
    output = tensors.get("lm_head.weight")
    if output is not None:
        output.mul_(0.25)[:, stream.following] = SURE * code[:, : stream.copied]
    return tensors


def _random_weights(model: ModelConfig, generator: torch.Generator) -> dict[str, Tensor]:
    tensors, std = {}, model.init_method_std
    for name, shape in mapping.hf_shapes(mapping.FAMILIES["llama"], model).items():
        scale = std / math.sqrt(2 * model.num_layers) if name.endswith(("o_proj.weight", "down_proj.weight")) else std
        tensors[name] = torch.ones(shape) if "norm" in name else torch.randn(shape, generator=generator) * scale
    return tensors


def _head(tensors: dict[str, Tensor], model: ModelConfig, layer: int, squares: float) -> _Head:
    """Head 0 of a layer whose input has channels with this sum of squares."""
    d = model.head_dim
    q, k, v, o = (tensors[f"model.layers.{layer}.self_attn.{x}_proj.weight"] for x in "qkvo")
    parts = [x.zero_() for x in (q[:d], k[:d], v[:d], o[:, :d])]
    return _Head(*parts, 1 / math.sqrt(squares / model.hidden_size + model.norm_epsilon))


def _look_at_token_before(head: _Head, model: ModelConfig, stream: _Stream) -> None:
    """Layer 1: a query turned by -1 position meets the key best at distance 1."""
    half = model.head_dim // 2
    angle = -rotary_frequencies(model.head_dim, model.rotary_base, model.rope_scaling)
    near = torch.full((half,), NEAR)
    near[-1] = 0  # the decision neuron's pair
    read = LEVEL * head.norm  # the constant, as the head reads it
    head.q[:half, stream.constant] = near * angle.cos() / read
    head.q[half:, stream.constant] = near * angle.sin() / read
    head.k[:half, stream.constant] = near / read
    head.copy_code(stream.copied, stream.previous)


def _look_behind_same_token(head: _Head, model: ModelConfig, stream: _Stream) -> None:
    """Layer 2: a token's own code meets the places whose token before had the same."""
    half = model.head_dim // 2
    strength = math.sqrt(SAME * math.sqrt(model.head_dim)) / (SIGN * head.norm)
    still = [*stream.still, *(pair + half for pair in stream.still)]
    for i, channel in enumerate(still[: stream.copied]):
        head.q[channel, i], head.k[channel, stream.previous.start + i] = strength, strength
    head.copy_code(stream.copied, stream.following)


def write(directory: str | Path, model: ModelConfig, seed: int) -> None:
    """Write a Hugging Face directory with :func:`weights`: import it, then train it on.

    Raises:
        ValueError: the circuit does not fit into the model (see the message), or its embeddings are tied.
    """
    if not model.untie_embeddings_and_output_weights:
        raise ValueError("the circuit's output layer reads other channels than the embedding writes; untie them")
    tensors, path = weights(model, seed), Path(directory)
    path.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text(json.dumps(mapping.to_hf_config(model, "float32"), indent=2) + "\n")


if __name__ == "__main__":
    from megatron.dmc.cli.eval import main

    sys.exit(main(["induction", *sys.argv[1:]]))
