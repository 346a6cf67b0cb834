"""The serving model: a Llama-family decoder in plain PyTorch over the paged compressed cache. Plain models run at CR 1.

A step is one flat run of T tokens of n sequences: decoding ones with one token each come first, chunks of prompts
follow. Shapes: h is the hidden size, Hq the query heads, H the KV heads, D the head dimension; heads are those of this
tensor-parallel rank.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.dmc import kernels
from megatron.dmc.checkpoint.codes import shared_layout
from megatron.dmc.checkpoint.formats import hf
from megatron.dmc.inference.attention import CompressedAttention
from megatron.dmc.inference.decoder import Adapter, Decoder, Layer
from megatron.dmc.inference.linear import (
    GatedLinear,
    Linear,
    PanelLinear,
    PlainLinear,
    StackedLinear,
    make_gated,
    make_linear,
    takes_panels,
)
from megatron.dmc.inference.parallel import TensorParallel
from megatron.dmc.inference.quantization import Quantization, check_quantization, coded_linear, int8_linear
from megatron.dmc.inference.weights import ModelInfo, Reader
from megatron.dmc.kernels.panels import pack_weight
from megatron.dmc.kernels.state import CacheState


@dataclass(frozen=True)
class InputBatch:
    """The input of one step, on the model's device: T tokens of n sequences, m of whose logits are wanted."""

    tokens: Tensor
    """Token ids: int64 [T]."""
    positions: Tensor
    """Position of each token in its sequence: int32 [T]."""
    cu_seqlens: Tensor
    """Index of each sequence's first token, and T: int32 [n + 1]."""
    rows: Tensor
    """Row of the cache of each sequence: int32 [n]."""
    decoding: int
    """Number of sequences with one token, which come first."""
    logits_at: Tensor
    """Index of each token whose logits are wanted: int64 [m]."""


@dataclass(frozen=True)
class _Linears:
    """Linear layers, from a rank's part of the files to the form that they run in."""

    reader: Reader
    quantization: Quantization | None

    def rows(self, name: str, parts: list[str], bias: Tensor | None = None, gated: bool = False) -> Linear:
        """Layer of this rank's outputs of each of ``parts``, one below the other.

        Args:
            name: of the layer, for messages.
            gated: of gates and what they scale.
        """
        if any(self.reader.coded(part) for part in parts):
            return self._of_codes(name, parts, bias, gated)
        weight = self.reader.rows(parts)
        if self.quantization is not None:
            return self.quantization.layer(name, weight, bias, gated)
        return make_gated(weight) if gated else make_linear(weight, bias)

    def columns(self, name: str, part: str) -> Linear:
        """Layer of this rank's inputs."""
        if (tensor := self.reader.coded(part)) is not None:
            return coded_linear(name, [(tensor, slice(0, tensor.shape[0]))], self.reader.part(part, 1))
        weight = self.reader.columns(part)
        return make_linear(weight) if self.quantization is None else self.quantization.layer(name, weight)

    def _of_codes(self, name: str, parts: list[str], bias: Tensor | None, gated: bool) -> Linear:
        tensors = [self.reader.tensors[part] for part in parts]
        if shared_layout(tensors) is not None:
            wanted = [(tensor, self.reader.part(part, 0)) for tensor, part in zip(tensors, parts, strict=True)]
            return coded_linear(name, wanted, slice(0, tensors[0].shape[1]), bias, gated)
        sizes = [rows.stop - rows.start for rows in (self.reader.part(part, 0) for part in parts)]
        biases = [None] * len(parts) if bias is None else bias.split(sizes)
        stacked = StackedLinear([self.rows(part, [part], one) for part, one in zip(parts, biases, strict=True)])
        return GatedLinear(stacked) if gated else stacked


def _read_layer(reader: Reader, n: int, bias: bool, qk_norm: bool, quantization: Quantization | None) -> Layer:
    name, linears = f"model.layers.{n}.", _Linears(reader, quantization)
    attention, mlp = name + "self_attn.", name + "mlp."
    qkv_bias = reader.rows([f"{attention}{x}_proj.bias" for x in "qkv"]) if bias else None
    return Layer(
        input_norm=reader.whole(name + "input_layernorm.weight"),
        qkv=linears.rows(f"{attention}qkv_proj", [f"{attention}{x}_proj.weight" for x in "qkv"], qkv_bias),
        q_norm=reader.whole(attention + "q_norm.weight") if qk_norm else None,
        k_norm=reader.whole(attention + "k_norm.weight") if qk_norm else None,
        adapter=_read_adapter(reader, attention + "dms_proj_alpha"),
        out=linears.columns(f"{attention}o_proj", attention + "o_proj.weight"),
        mlp_norm=reader.whole(name + "post_attention_layernorm.weight"),
        gate_up=linears.rows(f"{mlp}gate_up_proj", [f"{mlp}{x}_proj.weight" for x in ("gate", "up")], gated=True),
        down=linears.columns(f"{mlp}down_proj", mlp + "down_proj.weight"),
    )


def _read_adapter(reader: Reader, name: str) -> Adapter | None:
    """Rows of this rank's KV heads, or the one that decides for a whole layer; None where the model has no adapters."""
    weight = f"{name}.weight"
    if weight not in reader.shapes:
        return None

    rows = reader.whole(weight) if reader.shapes[weight][0] == 1 else reader.rows([weight])
    return Adapter(reader.whole(f"{name}_norm.weight"), rows)


class Model:
    """Weights and the forward pass. All state of the sequences is in the :class:`CacheState`."""

    def __init__(
        self,
        directory: hf.HFDirectory,
        info: ModelInfo,
        parallel: TensorParallel,
        dtype: torch.dtype,
        device: torch.device,
        quantization: Quantization | None = None,
    ) -> None:
        """Load this rank's weights. Raises ``ValueError`` naming the tensor that is missing, misshapen or damaged."""
        parallel.check(info.model)
        check_quantization(info, quantization, device)
        self.info, self.parallel, self.dtype, self.device = info, parallel, dtype, device
        c = info.model
        self.kv_heads, self.head_dim = c.kv_heads // parallel.size, c.head_dim
        reader = Reader(directory, info, parallel, dtype, device)
        first, stop = parallel.part(c.vocab_size)
        self.first_token, self.num_tokens = first, stop - first
        self.layers = [
            _read_layer(reader, n, c.add_qkv_bias, c.qk_layernorm, quantization) for n in range(c.num_layers)
        ]
        self.decoder = Decoder(
            self.layers,
            c.num_attention_heads // parallel.size,
            self.kv_heads,
            c.head_dim,
            c.norm_epsilon,
            parallel.sum if parallel.size > 1 else None,
        )
        self.norm = reader.whole("model.norm.weight")
        tied = not c.untie_embeddings_and_output_weights
        self.shares_embedding = tied and quantization is None
        """The output layer multiplies by the weight in which tokens are looked up."""
        embedding = self._read_embedding(reader, tied)
        if self.shares_embedding:
            self.head: Linear = embedding
        elif quantization is not None:  # in 4 bits neither: every logit depends on it alone
            assert isinstance(embedding, PlainLinear)
            self.head = int8_linear(embedding.weight if tied else reader.rows(["lm_head.weight"]))
        else:
            self.head = _Linears(reader, None).rows("lm_head", ["lm_head.weight"])
        self.embedding = embedding
        self.attention = CompressedAttention(info, device)

    def _read_embedding(self, reader: Reader, tied: bool) -> PlainLinear | PanelLinear:
        """Embedding, in a form that the output layer can share where it does."""
        name = "model.embed_tokens.weight"
        if reader.coded(name) is not None:
            linear = _Linears(reader, None).rows("embed_tokens", [name])
            assert isinstance(linear, PanelLinear), "an embedding has its inputs in order"
            return linear
        weight = reader.rows([name])
        # Rows of oneDNN's blocks cannot be looked up.
        packs = tied and self.shares_embedding and takes_panels(weight)
        return PanelLinear(pack_weight(weight)) if packs else PlainLinear(weight)

    def nbytes(self) -> int:
        """Size of this rank's weights in bytes."""
        layers = sum(layer.nbytes for layer in self.layers)
        return layers + self.embedding.nbytes + self.norm.nbytes + (0 if self.shares_embedding else self.head.nbytes)

    def forms(self) -> str:
        """Form of the weights of the linear layers, for people."""
        layers = ", ".join(dict.fromkeys(linear.form for layer in self.layers for linear in layer.linears))
        return layers if self.head.form in layers else f"{layers}, output layer {self.head.form}"

    @torch.inference_mode()
    def forward(self, batch: InputBatch, state: CacheState) -> Tensor:
        """Compute the tokens into the cache, and the logits that are wanted: fp32 [m, vocabulary]."""
        x = self._embed(batch.tokens)
        y = self.decoder.begin(x)

        def attend(q: Tensor, k: Tensor, v: Tensor, decisions: Tensor | None, layer: int) -> Tensor:
            return self.attention(state, layer, q, k, v, batch, decisions)

        for n in range(len(self.layers)):
            x, y = self.decoder.step(n, x, y, attend, batch.logits_at)
        return self._logits(kernels.add_rms_norm(x, y, self.norm, self.info.model.norm_epsilon)[1])

    def _embed(self, tokens: Tensor) -> Tensor:
        """Token embeddings: [T] -> [T, h]. A rank adds the rows that it holds."""
        if self.parallel.size == 1:
            return self.embedding.rows(tokens).to(self.dtype)
        local = tokens - self.first_token
        here = (local >= 0) & (local < self.num_tokens)
        x = self.embedding.rows(local.masked_fill(~here, 0)).to(self.dtype).masked_fill(~here[:, None], 0.0)
        return self.parallel.sum(x)

    def _logits(self, x: Tensor) -> Tensor:
        """Logits of hidden states: [m, h] -> fp32 [m, vocabulary]."""
        local, total = self.head(x).float(), self.info.model.vocab_size
        if self.parallel.size == 1:
            return local
        each = -(-total // self.parallel.size)
        return self.parallel.columns(F.pad(local, (0, each - local.size(-1))), total)
