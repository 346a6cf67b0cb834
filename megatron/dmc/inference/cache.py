"""The host's side of the compressed cache: rows and pages, what a step may need at worst, and what is in use.

The device allocates pages inside the step. The host only has to know that there will be enough: it keeps a copy of all
lengths, refreshed once per step together with the new tokens, and counts every token of the next step as a slot of its own
in every head. Tensor-parallel ranks hold different heads, which merge differently; the copy has those of all ranks, and
what is asked for must fit on each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from megatron.dmc import kernels
from megatron.dmc.inference.parallel import TensorParallel
from megatron.dmc.kernels.state import REFUSED, CacheState, make_state


@dataclass(frozen=True)
class CacheUse:
    """What one sequence has in the cache."""

    tokens: int
    """Tokens that it has read."""
    slots: tuple[tuple[int, ...], ...]
    """By layer and KV head (of all ranks)."""
    pages: int
    page_size: int

    @property
    def heads(self) -> int:
        return sum(len(layer) for layer in self.slots)

    @property
    def total_slots(self) -> int:
        return sum(map(sum, self.slots))

    @property
    def compression_ratio(self) -> float:
        """Tokens / slots over all layers and heads."""
        return self.tokens * self.heads / max(1, self.total_slots)

    @property
    def waste(self) -> float:
        """Share of the pages' slots that is empty."""
        return 1 - self.total_slots / max(1, self.pages * self.page_size)


class PagedCache:
    """Owns the :class:`CacheState`. A row holds one sequence. Page counts are int64 [ranks], one for each rank."""

    def __init__(self, state: CacheState, parallel: TensorParallel) -> None:
        self.state, self.parallel = state, parallel
        rows, layers, heads = state.lengths.shape
        self.page_size, self.num_pages = state.page_size, state.num_pages
        self.shape = (layers, heads)
        self.lengths = np.zeros((rows, parallel.size, layers * heads), dtype=np.int64)
        """Host copy: slots of each head of each row."""
        self.tokens = np.zeros(rows, dtype=np.int64)
        """That each row has read."""
        self._free_rows = list(range(rows - 1, -1, -1))
        self._pages = np.zeros((rows, parallel.size), dtype=np.int64)

    @property
    def free_rows(self) -> int:
        return len(self._free_rows)

    def pages_for(self, slots: np.ndarray) -> np.ndarray:
        """Pages of heads with so many slots: [..., heads] -> [...]."""
        return (-(-slots // self.page_size)).sum(-1)

    def pages_at(self, tokens: float) -> int:
        """Pages on a rank of a new sequence with ``tokens`` slots in every head."""
        return int(-(-tokens // self.page_size)) * self.shape[0] * self.shape[1]

    def free_pages(self) -> np.ndarray:
        """[ranks]"""
        return self.num_pages - self._pages.sum(0)

    def growth(self, rows: Sequence[int], tokens: Sequence[int]) -> np.ndarray:
        """Pages that each row takes at worst when it reads so many tokens more: [n, ranks]."""
        after = self.lengths[list(rows)] + np.asarray(tokens, dtype=np.int64)[:, None, None]
        return self.pages_for(after) - self._pages[list(rows)]

    def most_tokens(self, row: int, pages: np.ndarray, wanted: int) -> int:
        """The largest number of tokens, up to ``wanted``, that grows ``row`` by at most ``pages`` ([ranks]) at worst."""
        low, high = 0, wanted
        while low < high:
            middle = (low + high + 1) // 2
            fits = bool((self.growth([row], [middle])[0] <= pages).all())
            low, high = (middle, high) if fits else (low, middle - 1)
        return low

    def take_row(self) -> int:
        return self._free_rows.pop()

    def release(self, rows: Sequence[int]) -> None:
        """Give back the rows and all their pages."""
        if not rows:
            return
        kernels.free(self.state, torch.tensor(list(rows), dtype=torch.int32, device=self.state.lengths.device))
        self.lengths[list(rows)], self.tokens[list(rows)], self._pages[list(rows)] = 0, 0, 0
        self._free_rows += rows

    def stepped(self, rows: Sequence[int], counts: Sequence[int]) -> None:
        """Read the lengths after a step in which ``rows`` took ``counts`` tokens. The one wait for the device in a step."""
        self.tokens[list(rows)] += np.asarray(counts)
        index = torch.tensor(list(rows), device=self.state.lengths.device)
        lengths = self.state.lengths[index].flatten(1)
        # One row more, so that it costs no wait of its own: heads that a GPU had to refuse.
        refused = self.state.counters[REFUSED].to(lengths.dtype).expand(1, lengths.size(1))
        # [n + 1, L H] of each rank -> [ranks, n + 1, L H] -> [n + 1, ranks, L H]
        known = self.parallel.gather(torch.cat((lengths, refused))).transpose(0, 1).cpu().numpy()
        if known[-1].any():
            raise RuntimeError(f"{known[-1].max()} heads found no page: the host's bound was wrong, and their caches are")
        self.lengths[list(rows)] = known[:-1]
        self._pages[list(rows)] = self.pages_for(self.lengths[list(rows)])

    def use(self, row: int) -> CacheUse:
        """What ``row`` holds, after the last step."""
        layers, heads = self.shape
        # [ranks, L H] -> [L, ranks H]: rank r holds the heads r H ... (r + 1) H - 1
        slots = self.lengths[row].reshape(-1, layers, heads).transpose(1, 0, 2).reshape(layers, -1)
        return CacheUse(int(self.tokens[row]), tuple(map(tuple, slots.tolist())), int(self._pages[row].sum()), self.page_size)

    def check_integrity(self) -> None:
        """Raise ``RuntimeError`` when a page is lost or held twice, or the host's picture is not the device's."""
        self.state.check_integrity()
        rank = self.parallel.rank
        device = self.state.lengths.flatten(1).cpu().numpy()
        if not np.array_equal(device, self.lengths[:, rank]):
            raise RuntimeError("the host's copy of the lengths differs from the device's")
        if self.state.free_count() != int(self.free_pages()[rank]):
            raise RuntimeError(f"{self.state.free_count()} pages are free, the host counts {int(self.free_pages()[rank])}")


def make_cache(*, parallel: TensorParallel, **shape: object) -> PagedCache:
    """See :func:`megatron.dmc.kernels.state.make_state` for ``shape``; heads are those of one rank."""
    return PagedCache(make_state(**shape), parallel)  # type: ignore[arg-type]


def page_bytes(page_size: int, head_dim: int, dtype: torch.dtype) -> int:
    """Of one page, keys and values."""
    return 2 * page_size * head_dim * dtype.itemsize


def row_bytes(heads: int, head_dim: int, max_slots: int, page_size: int, ring: int, ring_dtype: torch.dtype) -> int:
    """Of one row besides its pages, for so many heads over all layers: page table, ring, lengths."""
    return heads * (4 * -(-max_slots // page_size) + ring * (2 * head_dim * ring_dtype.itemsize + 4) + 8)
