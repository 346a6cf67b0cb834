"""Megatron parameters as views of Hugging Face tensors, and the other way round. Nothing is read."""

from collections.abc import Mapping
from typing import Optional

from megatron.dmc.checkpoint.mapping.families import Family, in_order
from megatron.dmc.checkpoint.mapping.rules import TensorRule
from megatron.dmc.checkpoint.tensors import Concat, Lazy, Rows, Zeros
from megatron.dmc.config import ModelConfig

Key = tuple[str, Optional[int]]
"""(name of a parameter in a ``torch_dist`` checkpoint, layer); layer None outside the layers."""


def to_megatron(family: Family, model: ModelConfig, tensors: Mapping[str, Lazy]) -> dict[Key, Lazy]:
    """Parameters in the order of a forward pass, from tensors of the shapes that ``hf_shapes`` names."""
    return {
        (rule.megatron, layer): _fuse(rule, layer, [tensors[name] for name in rule.names(layer)], model)
        for rule, layer in in_order(family, model)
    }


def _fuse(rule: TensorRule, layer: Optional[int], tensors: list[Lazy], model: ModelConfig) -> Lazy:
    pieces = rule.pieces(model)
    if len(pieces) == 1:
        return tensors[0]
    like = tensors[0]
    parts: list[Lazy] = []
    for piece in pieces:
        if piece.tensor is None:
            parts.append(Zeros((piece.stop - piece.start, *like.shape[1:]), like.dtype))
        else:
            parts.append(Rows(tensors[piece.tensor], piece.start, piece.stop))
    return Concat(parts, rule.megatron if layer is None else f"{rule.megatron} of layer {layer}")


def to_hf(family: Family, model: ModelConfig, parameters: Mapping[Key, Lazy]) -> dict[str, Lazy]:
    """Hugging Face tensors in the order of a forward pass. The inverse of :func:`to_megatron`."""
    return {
        name: tensor
        for rule, layer in in_order(family, model)
        for name, tensor in _take_apart(rule, layer, parameters[rule.megatron, layer], model).items()
    }


def _take_apart(rule: TensorRule, layer: Optional[int], parameter: Lazy, model: ModelConfig) -> dict[str, Lazy]:
    found: list[list[Lazy]] = [[] for _ in rule.hf]
    row = 0
    for piece in rule.pieces(model):
        size = piece.stop - piece.start
        if piece.tensor is not None:
            found[piece.tensor].append(Rows(parameter, row, row + size))
        row += size
    tensors = [parts[0] if len(parts) == 1 else Concat(parts) for parts in found]
    for name, tensor in zip(rule.names(layer), tensors, strict=True):
        tensor.name = f"{name} ({parameter.name})"
    return dict(zip(rule.names(layer), tensors, strict=True))
