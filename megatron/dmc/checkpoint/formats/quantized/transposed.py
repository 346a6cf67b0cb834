"""``gptq`` and ``awq``: matrices stored as [inputs, outputs], packed into int32.

Of a matrix X.weight [outputs, inputs] a directory has

- GPTQ: X.qweight [inputs * bits / 32, outputs], codes of consecutive inputs from the lowest bits on; AWQ (``gemm``):
  X.qweight [inputs, outputs / 8], eight outputs to a word in the order 0, 2, 4, 6, 1, 3, 5, 7;
- X.scales [groups, outputs];
- X.qzeros [groups, outputs * bits / 32], zero points packed along the outputs, for AWQ in its order;
  ``w = scale (code - zero point)``;
- GPTQ: X.g_idx [inputs], the group of each input.

``checkpoint_format`` ``gptq`` holds each zero point less one. GPTQModel takes the ones off whole words, so that a zero
point of 0 borrows from the next one; they are added to whole words here, which gives it back (GPTQModel 7.7.0,
``convert_gptq_v1_to_v2_format_module``).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from megatron.dmc.checkpoint.codes import CODE_OF_ZERO, CodedTensor, Layout, act_order, unpack
from megatron.dmc.checkpoint.fields import Fields
from megatron.dmc.checkpoint.tensors import Lazy

_ONES = {4: 0x11111111, 8: 0x01010101}
_AWQ_PLACE = [0, 4, 1, 5, 2, 6, 3, 7]
"""Place in a word of each of its eight outputs."""


class TransposedTensor(CodedTensor):
    """One matrix of GPTQ or AWQ."""

    def __init__(
        self, dtype: torch.dtype, layout: Layout, shape: tuple[int, int], parts: dict[str, Lazy], less: int, awq: bool
    ) -> None:
        """less: added to every word of zero points. awq: packed along the outputs, in AWQ's order."""
        self.name, self.dtype, self.layout, self.shape = parts["qweight"].name, dtype, layout, shape
        self._parts, self._less, self._awq = parts, less, awq
        if "g_idx" in parts:
            self.order = act_order(parts["g_idx"].read(), parts["scales"].shape[0], parts["g_idx"].name)

    def _read(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        words, bits = self._parts["qweight"].read(), self.layout.bits
        if self._awq:
            codes = self._along_outputs(words, start, stop)
        else:
            # [words, n, 32 / bits] -> [n, words, 32 / bits] -> [n, inputs]
            codes = unpack(words[:, start:stop], bits).transpose(0, 1).flatten(1)
        scales = self._parts["scales"].read()[:, start:stop].T
        zero_point = self._along_outputs(self._parts["qzeros"].read() + self._less, start, stop).to(torch.int16)
        return codes, torch.stack([scales, (self.layout.zero - zero_point).to(scales.dtype)], dim=2)

    def _along_outputs(self, words: Tensor, start: int, stop: int) -> Tensor:
        """Codes packed along the outputs: int32 [rows, words] -> uint8 [n, rows]."""
        each = 32 // self.layout.bits
        codes = unpack(words[:, start // each : -(-stop // each)], self.layout.bits)
        codes = (codes[..., _AWQ_PLACE] if self._awq else codes).flatten(1)
        return codes[:, start % each :][:, : stop - start].T.contiguous()


def gptq_tensors(fields: Fields, tensors: dict[str, Lazy], dtype: torch.dtype) -> dict[str, Lazy]:
    """Tensors with each matrix of GPTQ as one. Raises ``ValueError`` by key or tensor."""
    kind = fields.text("checkpoint_format", "gptq")
    if kind not in ("gptq", "gptq_v2"):
        fields.refuse("checkpoint_format", "gptq or gptq_v2")
    if fields.integer("bits") not in _ONES:
        fields.refuse("bits", "4 or 8")
    if fields.text("pack_dtype", "int32") != "int32":
        fields.refuse("pack_dtype", "int32")
    return _coded(tensors, lambda parts: _gptq_matrix(parts, dtype, kind == "gptq"))


def awq_tensors(fields: Fields, tensors: dict[str, Lazy], dtype: torch.dtype) -> dict[str, Lazy]:
    """Tensors with each matrix of AWQ as one. Raises ``ValueError`` by key or tensor."""
    if fields.text("version", "gemm").lower() != "gemm":
        fields.refuse("version", "gemm")
    if fields.integer("bits", fields.get("w_bit")) != 4:
        fields.refuse("bits", "4")
    return _coded(tensors, lambda parts: _awq_matrix(parts, dtype))


def _coded(tensors: dict[str, Lazy], make: Callable[[dict[str, Lazy]], TransposedTensor]) -> dict[str, Lazy]:
    """Tensors with what belongs to one matrix put together by ``make``."""
    found = dict(tensors)
    for name in tensors:
        if not name.endswith(".qweight"):
            continue
        module = name.removesuffix(".qweight")
        parts = {
            part: found.pop(f"{module}.{part}")
            for part in ("qweight", "qzeros", "scales", "g_idx")
            if f"{module}.{part}" in found
        }
        if missing := {"qweight", "qzeros", "scales"} - parts.keys():
            raise ValueError(f"{name} has no {module}.{min(missing)} beside it; copy the directory again")
        for part, tensor in parts.items():
            integers = tensor.dtype == torch.int32 if part != "scales" else tensor.dtype.is_floating_point
            if len(tensor.shape) != (1 if part == "g_idx" else 2) or not integers:
                raise ValueError(f"{tensor.name} is {tensor.dtype} {list(tensor.shape)}, which no {part} is")
        found[f"{module}.weight"] = make(parts)
    return found


def _gptq_matrix(parts: dict[str, Lazy], dtype: torch.dtype, less_one: bool) -> TransposedTensor:
    (words, outputs), (groups, _) = parts["qweight"].shape, parts["scales"].shape
    # Bits by the shapes: modules may have other ones than the model (``dynamic``).
    bits = next((b for b in _ONES if parts["qzeros"].shape == (groups, -(-outputs * b // 32))), 0)
    inputs = words * 32 // bits if bits else 0
    named = parts["g_idx"].shape[0] if "g_idx" in parts else inputs
    if not bits or inputs != named or parts["scales"].shape[1] != outputs or inputs % groups:
        raise _misfit(parts)
    layout = Layout(f"GPTQ int{bits}", bits, inputs // groups, CODE_OF_ZERO[bits], scaled=True)
    return TransposedTensor(dtype, layout, (outputs, inputs), parts, _ONES[bits] if less_one else 0, False)


def _awq_matrix(parts: dict[str, Lazy], dtype: torch.dtype) -> TransposedTensor:
    (inputs, words), (groups, outputs) = parts["qweight"].shape, parts["scales"].shape
    if words * 8 != outputs or parts["qzeros"].shape != (groups, words) or groups < 1 or inputs % groups:
        raise _misfit(parts)
    layout = Layout("AWQ int4", 4, inputs // groups, CODE_OF_ZERO[4], scaled=True)
    return TransposedTensor(dtype, layout, (outputs, inputs), parts, 0, True)


def _misfit(parts: dict[str, Lazy]) -> ValueError:
    shapes = ", ".join(f"{part} {list(tensor.shape)}" for part, tensor in parts.items())
    return ValueError(f"{parts['qweight'].name} and what lies beside it do not fit together: {shapes}")
