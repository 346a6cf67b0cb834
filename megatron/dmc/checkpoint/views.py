"""Megatron's parameters as views of Hugging Face tensors, and the other way round. What a mapping's transforms mean."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Optional

from megatron.dmc.checkpoint.mapping import TensorRule, symbols_to_shape
from megatron.dmc.checkpoint.tensors import Concat, Lazy, Rows, Zeros
from megatron.dmc.config import ModelConfig


def to_megatron(rule: TensorRule, layer: Optional[int], hf: Mapping[str, Lazy], model: ModelConfig) -> Lazy:
    """The parameter of ``rule``, from tensors of the shapes that ``mapping.hf_shapes`` names."""
    parts = [hf[name.format(layer=layer)] for name in rule.hf]
    name = rule.megatron if layer is None else f"{rule.megatron} of layer {layer}"
    if rule.transform == "qkv":
        q, k, v = parts
        d = model.head_dim
        rows = model.num_attention_heads // model.kv_heads * d
        # [ng * g * D], [ng * D], [ng * D] -> [ng, (g + 2) * D]
        heads = [
            piece
            for i in range(model.kv_heads)
            for piece in (Rows(q, i * rows, (i + 1) * rows), Rows(k, i * d, (i + 1) * d), Rows(v, i * d, (i + 1) * d))
        ]
        return Concat(heads, name)
    if rule.transform == "gate_up":
        return Concat(parts, name)
    if rule.transform == "vocabulary" and model.padded_vocab_size > model.vocab_size:
        padding = Zeros((model.padded_vocab_size - model.vocab_size, *parts[0].shape[1:]), parts[0].dtype)
        return Concat([parts[0], padding], name)
    return parts[0]


def to_hf(rule: TensorRule, layer: Optional[int], parameter: Lazy, model: ModelConfig) -> dict[str, Lazy]:
    """The Hugging Face tensors that ``parameter`` is made of. The inverse of :func:`to_megatron`."""
    names = [name.format(layer=layer) for name in rule.hf]
    if rule.transform == "qkv":
        d = model.head_dim
        rows = model.num_attention_heads // model.kv_heads * d
        starts = [i * (rows + 2 * d) for i in range(model.kv_heads)]
        edges = ((0, rows), (rows, rows + d), (rows + d, rows + 2 * d))
        parts: list[Lazy] = [Concat([Rows(parameter, s + a, s + b) for s in starts]) for a, b in edges]
    elif rule.transform == "gate_up":
        parts = [
            Rows(parameter, 0, model.ffn_hidden_size),
            Rows(parameter, model.ffn_hidden_size, 2 * model.ffn_hidden_size),
        ]
    elif rule.transform == "vocabulary":
        parts = [Rows(parameter, 0, model.vocab_size)]
    else:
        parts = [parameter]
    for name, part in zip(names, parts, strict=True):
        part.name = f"{name} ({part.name})"
    return dict(zip(names, parts, strict=True))


def megatron_shape(rule: TensorRule, model: ModelConfig) -> tuple[int, ...]:
    """Shape of the parameter, without the stacked layers."""
    first, *others = [symbols_to_shape(symbols, model) for symbols in rule.shapes]
    rows = model.padded_vocab_size if rule.transform == "vocabulary" else first[0] + sum(shape[0] for shape in others)
    return (rows, *first[1:])
