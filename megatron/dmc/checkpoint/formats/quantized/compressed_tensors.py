"""``compressed-tensors``: the formats ``pack-quantized`` and ``int-quantized`` (checked against the library's 0.20.0).

Of a matrix X.weight [outputs, inputs] a directory has

- X.weight_packed int32 [outputs, inputs * bits / 32], codes of consecutive inputs from the lowest bits on, the code of
  0 in the middle; or X.weight int8, without packing;
- X.weight_scale [outputs, groups], one group for ``channel``;
- X.weight_zero_point, asymmetric: int32 [outputs * bits / 32, groups], packed along the outputs like codes (int8
  [outputs, groups] in ``int-quantized``); ``w = scale (code - zero point)``;
- X.weight_g_idx [inputs], the group of each input, where ``actorder`` is ``group``;
- X.weight_shape, of the matrix.
"""

import re
from collections.abc import Iterator
from typing import Optional

import torch
from torch import Tensor

from megatron.dmc.checkpoint.codes import CODE_OF_ZERO, CodedTensor, Layout, act_order, unpack
from megatron.dmc.checkpoint.fields import Fields
from megatron.dmc.checkpoint.tensors import Lazy

FORMATS = ("pack-quantized", "int-quantized", "mixed-precision")
_PARTS = ("weight_packed", "weight_scale", "weight_zero_point", "weight_g_idx", "weight_shape")


class CompressedTensor(CodedTensor):
    """One matrix of ``compressed-tensors``."""

    def __init__(
        self,
        name: str,
        dtype: torch.dtype,
        layout: Layout,
        shape: tuple[int, int],
        parts: dict[str, Lazy],
        order: Optional[Tensor],
    ) -> None:
        self.name, self.dtype, self.layout, self.shape, self.order = name, dtype, layout, shape, order
        self._parts = parts

    def _read(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        if "weight_packed" in self._parts:
            words = self._parts["weight_packed"].read(start, stop)
            codes = unpack(words, self.layout.bits).flatten(1)[:, : self.shape[1]]
        else:
            codes = self._parts["weight"].read(start, stop).view(torch.uint8) ^ 128
        scale = self._parts["weight_scale"].read(start, stop)
        if "weight_zero_point" not in self._parts:
            return codes, scale[..., None]
        zero_point = self._zero_points(start, stop).to(torch.int16)
        return codes, torch.stack([scale, (self.layout.zero - zero_point).to(scale.dtype)], dim=2)

    def _zero_points(self, start: int, stop: int) -> Tensor:
        """Zero points as codes: uint8 [n, groups]."""
        stored = self._parts["weight_zero_point"]
        if stored.dtype == torch.int8:
            signed = stored.read(start, stop).to(torch.int16) + self.layout.zero
            return signed.to(torch.uint8)
        each = 32 // self.layout.bits
        words = stored.read(start // each, -(-stop // each))
        # [words, groups, each] -> [words, each, groups] -> [outputs, groups]
        codes = unpack(words, self.layout.bits).transpose(1, 2).flatten(0, 1)
        return codes[start % each :][: stop - start]


def coded_tensors(fields: Fields, tensors: dict[str, Lazy], dtype: torch.dtype) -> dict[str, Lazy]:
    """Tensors with each matrix of codes as one. Raises ``ValueError`` by key or tensor."""
    schemes = list(_schemes(fields))
    found = dict(tensors)
    for module in _modules(tensors):
        weights = _scheme_of(module, schemes)
        parts = {part: found.pop(f"{module}.{part}") for part in _PARTS if f"{module}.{part}" in found}
        if "weight_packed" not in parts:
            parts["weight"] = found.pop(f"{module}.weight")
        found[f"{module}.weight"] = _matrix(f"{module}.weight", parts, weights, dtype)
    return found


def _modules(tensors: dict[str, Lazy]) -> list[str]:
    """Names of the modules whose weights are codes."""
    packed = [name.removesuffix(".weight_packed") for name in tensors if name.endswith(".weight_packed")]
    bytes_ = [name for name, tensor in tensors.items() if tensor.dtype == torch.int8 and name.endswith(".weight")]
    return packed + [name.removesuffix(".weight") for name in bytes_]


def _schemes(fields: Fields) -> Iterator[tuple[list[str], Fields]]:
    """(targets, settings of the weights) of each group of layers.

    Raises:
        ValueError: what rounds more than weights, or weights to other than integers of 4 or 8 bits.
    """
    if fields.text("format", "") not in FORMATS:
        fields.refuse("format", f"one of {', '.join(FORMATS)}")
    for key in ("kv_cache_scheme", "sparsity_config", "transform_config"):
        if (found := fields.object(key)) is not None and found.content and found.get("format") != "dense":
            fields.refuse(key, "left out; only quantized weights are read")
    groups = fields.object("config_groups")
    for name in groups.content if groups else ():
        group = groups.object(name)
        for key in ("input_activations", "output_activations"):
            if group.object(key) is not None:
                group.refuse(key, "null; activations are not quantized here")
        weights = group.object("weights")
        if weights is None or weights.text("type", "int") != "int":
            group.refuse("weights", "an object with type int")
        if weights.integer("num_bits") not in CODE_OF_ZERO:
            weights.refuse("num_bits", "4 or 8")
        if weights.text("strategy", "") not in ("group", "channel"):
            weights.refuse("strategy", "group or channel")
        yield group.texts("targets") or [], weights


def _scheme_of(module: str, schemes: list[tuple[list[str], Fields]]) -> Fields:
    """Settings of a module's weights: of the first group that names it, or its class."""
    for targets, weights in schemes:
        for target in targets:
            pattern = target.startswith("re:") and re.match(target.removeprefix("re:"), module)
            if pattern or target in ("Linear", module):
                return weights
    raise ValueError(f"{module} holds codes, and no group of quantization_config.config_groups has it as a target")


def _matrix(name: str, parts: dict[str, Lazy], weights: Fields, dtype: torch.dtype) -> CompressedTensor:
    bits = weights.integer("num_bits")
    scale, stored = parts.get("weight_scale"), parts.get("weight_packed") or parts["weight"]
    if scale is None or len(scale.shape) != 2 or len(stored.shape) != 2:
        raise ValueError(f"{stored.name} has no weight_scale [outputs, groups] beside it; copy the directory again")
    outputs, groups = scale.shape
    inputs = stored.shape[1]
    if "weight_packed" in parts:
        if "weight_shape" not in parts:
            raise ValueError(f"{stored.name} has no weight_shape beside it; copy the directory again")
        inputs = int(parts["weight_shape"].read()[1])
        if stored.dtype != torch.int32 or stored.shape[1] * 32 != inputs * bits:
            raise ValueError(
                f"{stored.name} is {list(stored.shape)}; expected int32 for {inputs} inputs of {bits} bits"
            )
    elif bits != 8:
        raise ValueError(f"{stored.name} is of 8 bits, and config_groups says {bits}")
    if stored.shape[0] != outputs or groups < 1 or inputs % groups:
        raise ValueError(f"{scale.name} is {list(scale.shape)}, which does not fit {stored.name} {list(stored.shape)}")
    if weights.flag("symmetric", True):
        parts.pop("weight_zero_point", None)
    elif "weight_zero_point" not in parts:
        raise ValueError(f"{stored.name} has no weight_zero_point beside it, and symmetric is false")
    order = None
    if (of := parts.get("weight_g_idx")) is not None:
        order = act_order(of.read(), groups, of.name)
    zero_point = parts.get("weight_zero_point")
    packed = zero_point is not None and zero_point.dtype == torch.int32
    wanted = (-(-outputs * bits // 32) if packed else outputs, groups)
    if zero_point is not None and zero_point.shape != wanted:
        raise ValueError(f"{zero_point.name} is {list(zero_point.shape)}; expected {list(wanted)}")
    layout = Layout(f"compressed-tensors int{bits}", bits, inputs // groups, CODE_OF_ZERO[bits], scaled=True)
    return CompressedTensor(stored.name, dtype, layout, (outputs, inputs), parts, order)
