"""Matrices that are stored as codes of 4 or 8 bits: what a code stands for, read as numbers like any tensor, or as the
codes that the file has.
"""

from abc import abstractmethod
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple, Optional

import torch
from torch import Tensor

from megatron.dmc.checkpoint.tensors import Lazy, has_only_finite

CODE_OF_ZERO = {4: 8, 8: 128}
"""Code of 0 of symmetric codes, by bits."""


class Layout(NamedTuple):
    """How codes stand for numbers: ``w = scale (code - zero)``, plus an offset where the group has one."""

    name: str
    """Name of the format, for people."""
    bits: int
    """4 or 8."""
    group: int
    """Consecutive inputs that share a scale; all inputs where each output has one scale."""
    zero: int
    """Code of 0, before offsets."""
    scaled: bool = False
    """Offsets are multiples of their scales: zero points."""


class CodedTensor(Lazy):
    """Matrix [outputs, inputs] of codes. Rows are read as numbers of ``dtype``, or by :meth:`read_codes`.

    Attributes:
        layout: what the codes mean.
        order: int64 [inputs], the input of each column of the codes, where groups are not of consecutive inputs; None:
            columns are inputs.
    """

    layout: Layout
    order: Optional[Tensor] = None

    @abstractmethod
    def _read(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """:meth:`read_codes`, unchecked and with columns as the file has them."""

    def read_codes(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Codes of outputs ``start`` ... ``stop - 1``, uint8 [n, inputs], and their scales [n, groups, 1], or scales
        and offsets [n, groups, 2].

        Raises:
            ValueError: a scale or an offset that is NaN or infinite, or a truncated file, by name.
        """
        codes, scales = self._read(start, stop)
        if not has_only_finite(scales):
            raise ValueError(
                f"{self.name} has scales that are NaN or infinite (outputs {start} to {stop - 1}); copy it again"
            )
        return codes if self.order is None else codes[:, self.order], scales

    def read_into(self, out: Tensor, start: int) -> None:
        codes, scales = self.read_codes(start, start + out.shape[0])
        scale, *offset = scales.float()[..., None].unbind(2)
        # [n, inputs] -> [n, groups, group]
        numbers = (codes.float() - self.layout.zero).unflatten(1, (scale.size(1), -1)) * scale
        if offset:
            numbers += offset[0] * scale if self.layout.scaled else offset[0]
        if self.order is None:
            out.copy_(numbers.flatten(1))
        else:
            out[:, self.order] = numbers.flatten(1).to(out.dtype)


def unpack(words: Tensor, bits: int) -> Tensor:
    """Codes of int32 words, the first in the lowest bits: [..., n] -> uint8 [..., n, 32 / bits]."""
    found = words.contiguous().view(torch.uint8).unflatten(-1, (-1, 4))
    return found if bits == 8 else torch.stack([found & 15, found >> 4], dim=-1).flatten(-2)


def shared_layout(tensors: Iterable[Lazy]) -> Optional[Layout]:
    """Layout that all of the tensors have, over the same order of inputs; None where they differ or are no codes."""
    first, *others = tensors
    if not isinstance(first, CodedTensor):
        return None
    for other in others:
        if not isinstance(other, CodedTensor) or other.layout != first.layout or not _same_order(first, other):
            return None
    return first.layout


def _same_order(a: CodedTensor, b: CodedTensor) -> bool:
    if a.order is None or b.order is None:
        return a.order is b.order
    return torch.equal(a.order, b.order)


def act_order(group_of: Tensor, groups: int, name: str) -> Optional[Tensor]:
    """:attr:`CodedTensor.order` from the group of each input, as files of GPTQ with ``desc_act`` have it.

    Args:
        group_of: integers [inputs].

    Raises:
        ValueError: groups of different sizes.
    """
    group = group_of.numel() // groups
    if torch.equal(group_of.long(), torch.arange(group_of.numel()) // group):
        return None
    counts = torch.bincount(group_of.long().clamp(0, groups), minlength=groups)
    if int(group_of.min()) < 0 or counts.tolist() != [group] * groups:
        raise ValueError(f"{name} puts its inputs into {groups} groups of different sizes; only equal ones are read")
    return torch.argsort(group_of, stable=True)


def form(layout: Layout, inputs: int) -> str:
    """Codes in a few words, for people."""
    return f"{layout.name} " + ("per output" if layout.group == inputs else f"in groups of {layout.group}")


def summary(tensors: Iterable[Lazy]) -> str:
    """Kinds of codes among tensors, with the number of matrices of each; empty without any."""
    kinds = Counter(form(t.layout, t.shape[1]) for t in tensors if isinstance(t, CodedTensor))
    return ", ".join(f"{count} of {kind}" for kind, count in kinds.most_common())
