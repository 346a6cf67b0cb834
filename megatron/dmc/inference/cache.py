"""Host side of the compressed cache: rows and pages, what a step may need at worst, and what is in use.

The device allocates pages inside the step. The host only has to know that there will be enough: it keeps a copy of all
lengths, refreshed once per step together with the new tokens, and counts every token of a step whose lengths it does
not know yet as a slot of its own in every head. Tensor-parallel ranks hold different heads, which merge differently;
the copy has those of all ranks, and what is asked for must fit on each.

Rows hold sequences or snapshots. Those that were forked from one another share pages; the host counts every shared page
once. The recent pages of a model that evicts are counted apart (``recent_pages.py``): what follows about slots and
pages without more words is about the kept ones, which are all that other models have.
"""

from dataclasses import dataclass
from typing import Optional

import numpy as np
import torch
from torch import Tensor

from megatron.dmc import kernels
from megatron.dmc.inference.device_queue import DeviceQueue, to_device, to_host
from megatron.dmc.inference.parallel import TensorParallel
from megatron.dmc.inference.recent_pages import RecentPages, Window
from megatron.dmc.kernels.state import REFUSED, CacheState


@dataclass(frozen=True)
class CacheUse:
    """Cache usage of one sequence."""

    tokens: int
    """Tokens whose keys and values are in the cache."""
    slots: tuple[tuple[int, ...], ...]
    """KV slots by layer and KV head, over all ranks."""
    pages: int
    """Pages over all ranks."""
    page_size: int
    """Slots per page."""
    slot_bytes: int
    """Bytes of a slot: key, value, and their scales where the cache is quantized."""

    @property
    def heads(self) -> int:
        return sum(len(layer) for layer in self.slots)

    @property
    def total_slots(self) -> int:
        return sum(map(sum, self.slots))

    @property
    def compression_ratio(self) -> float:
        """Tokens per slot over all layers and heads."""
        return self.tokens * self.heads / max(1, self.total_slots)

    @property
    def bytes_per_token(self) -> float:
        """Bytes of all layers' slots per token."""
        return self.total_slots * self.slot_bytes / max(1, self.tokens)

    @property
    def waste(self) -> float:
        """Empty share of the pages' slots."""
        return 1 - self.total_slots / max(1, self.pages * self.page_size)


@dataclass(eq=False)
class _Shared:
    """Pages that several rows hold: of each head those after the pages of ``parent``, as many as are final."""

    parent: Optional["_Shared"]
    pages: np.ndarray
    """[ranks]"""
    holders: int = 0
    """Rows, and other shared pages behind these."""
    live: int = 0
    """Holders that a sequence needs."""


class PagedCache:
    """Owner of the :class:`CacheState`. Page counts are int64 [ranks], one for each rank.

    A row is free, *live* (it holds a sequence) or *parked* (a snapshot, whose pages are anybody's who needs them).

    Between :meth:`begin_step` and :meth:`end_step` a step is in flight. Of its rows the lengths are those before it,
    and page counts are upper bounds: those after it, had every token taken a slot in every head.
    """

    def __init__(
        self,
        state: CacheState,
        parallel: TensorParallel,
        queue: Optional[DeviceQueue] = None,
        async_scheduling: bool = False,
    ) -> None:
        """Args:
        queue: of the device's work. Default: what is submitted runs at once.
        async_scheduling: pages are asked for while a step is in flight.
        """
        self.state, self.parallel, self.queue = state, parallel, queue or DeviceQueue()
        self.async_scheduling = async_scheduling
        self.rows, layers, heads = state.lengths.shape
        self.page_size, self.num_pages = state.page_size, state.num_pages
        self.shape = (layers, heads)
        self.slot_bytes = state.slot_bytes
        self.window = Window(state.evict_window, self.page_size)
        self._recent = RecentPages(self.rows, self.window)
        self._shift = self.page_size.bit_length() - 1  # pages have a power of two of slots
        self.lengths = np.zeros((self.rows, parallel.size, layers * heads), dtype=np.int32)
        """Host copy of the slots of each head: int32 [rows, ranks, layers * heads]."""
        self.tokens = np.zeros(self.rows, dtype=np.int64)
        """Tokens of each row whose slots are in ``lengths``: int64 [rows]."""
        self.tokens_launched = np.zeros(self.rows, dtype=np.int64)
        """Tokens of each row, those that a step in flight computes included: int64 [rows]."""
        self.live = np.zeros(self.rows, dtype=bool)
        self._free_rows = list(range(self.rows - 1, -1, -1))
        self._pages = np.zeros((self.rows, parallel.size), dtype=np.int64)
        # Heads whose next slot takes a page.
        self._full = np.full((self.rows, parallel.size), layers * heads, dtype=np.int64)
        # Of the pages of a row, those in the chain of _Shared that ends at its base; per head, and their sums.
        self._shared = np.zeros_like(self.lengths)
        self._shared_pages = np.zeros_like(self._pages)
        self._base: list[Optional[_Shared]] = [None] * self.rows
        # Of all _Shared, and of those that a sequence needs.
        self._all_shared, self._live_shared = (np.zeros(parallel.size, dtype=np.int64) for _ in range(2))

    @property
    def heads(self) -> int:
        """Heads of one rank, over all layers."""
        return self.shape[0] * self.shape[1]

    @property
    def free_rows(self) -> int:
        return len(self._free_rows)

    def pages_for(self, slots: np.ndarray) -> np.ndarray:
        """Pages of heads with so many slots: int32 [..., heads] -> int32 [...]."""
        # In 32 bits: numpy's sum would convert to 64 first, which takes as long again.
        return np.add.reduce((slots + (self.page_size - 1)) >> self._shift, axis=-1, dtype=np.int32)

    def pages_at(self, tokens: int, compression_ratio: float = 1.0) -> int:
        """Pages of both kinds on one rank of a new sequence of ``tokens`` tokens.

        Args:
            compression_ratio: tokens per slot, of those beyond an eviction window.
        """
        kept = -(-self.window.beyond(tokens) / compression_ratio // self.page_size)
        return (int(kept) + int(self.window.held(tokens))) * self.heads

    def held_pages(self, row: int) -> np.ndarray:
        """Pages of both kinds of a row, shared ones included: [ranks]."""
        return self._pages[row] + self.heads * self.window.held(self.tokens_launched[row])

    def free_pages(self) -> np.ndarray:
        """Pages that no row holds: [ranks]."""
        kept = (self._pages - self._shared_pages).sum(0) + self._all_shared
        return self.num_pages - kept - self.heads * self._recent.total

    def available_pages(self) -> np.ndarray:
        """Pages that no sequence holds, free ones and those of snapshots alone: [ranks]."""
        kept = (self._pages - self._shared_pages)[self.live].sum(0) + self._live_shared
        return self.num_pages - kept - self.heads * self._recent.live

    def growth(self, rows: list[int], tokens: list[int]) -> np.ndarray:
        """Pages of both kinds that each row takes at worst for so many tokens more: [n, ranks]."""
        before, more, window = self.tokens_launched[rows], np.asarray(tokens), self.window
        if tokens and min(tokens) == max(tokens) == 1:  # of a decode step: nothing is to be looked at head by head
            kept = self._full[rows]
            if not window.size:
                return kept
            kept = kept * (before > window.size)[:, None]
        else:
            kept = self.pages_for(self._most_slots(rows, before + more)) - self._pages[rows]
        return kept + self.heads * window.taken(before, more)[:, None]

    def _most_slots(self, rows: list[int], tokens: np.ndarray) -> np.ndarray:
        """Slots of each head at worst when rows have grown to so many tokens: int32 [n, ranks, heads]."""
        more = self.window.beyond(tokens) - self.window.beyond(self.tokens[rows])
        return self.lengths[rows] + more.astype(np.int32)[:, None, None]

    def most_tokens(self, row: int, pages: np.ndarray, wanted: int) -> int:
        """Largest number of tokens, up to ``wanted``, that takes at most ``pages`` ([ranks]) more of
        ``row`` at worst.
        """
        low, high = 0, wanted
        while low < high:
            middle = (low + high + 1) // 2
            fits = bool((self.growth([row], [middle])[0] <= pages).all())
            low, high = (middle, high) if fits else (low, middle - 1)
        return low

    def take_row(self) -> int:
        """Take an empty row for a sequence."""
        row = self._free_rows.pop()
        self.live[row] = True
        return row

    def release(self, rows: list[int]) -> None:
        """Free rows, and their pages that no other row holds."""
        if not rows:
            return
        freed = to_device(rows, torch.int32, self.state.lengths.device)
        self.queue.order(lambda: kernels.free(self.state, freed))
        for row in rows:
            self.park(row)
            shared = self._base[row]
            while shared is not None:
                shared.holders -= 1
                if shared.holders:
                    break
                self._all_shared -= shared.pages
                shared = shared.parent
            self._base[row] = None
            self._recent.release(row)
        for x in (self.lengths, self.tokens, self.tokens_launched, self._pages, self._shared, self._shared_pages):
            x[rows] = 0
        self._full[rows] = self.lengths[0, 0].size
        self._free_rows += rows

    # ------------------------------------------------------------------------------------------------ rows that share

    def _final(self, row: int) -> np.ndarray:
        """Pages of each head that are final, [ranks, heads]; see :func:`megatron.dmc.kernels.fork`."""
        lengths = self.lengths[row]
        return np.maximum(lengths - 1, 0) // self.page_size if self.state.compresses else lengths // self.page_size

    def copies(self, row: int) -> np.ndarray:
        """Pages of both kinds that a copy of a row takes: [ranks]."""
        recent = bool(self.window.size and self.tokens[row] % self.page_size)
        return self._pages[row] - self._final(row).sum(-1) + self.heads * recent

    def fork(self, source: int, live: bool) -> int:
        """Copy a row that no step in flight computes: returns a new one in the same state. There must be a free row,
        and pages for the copies.
        """
        assert not self.in_flight(source)
        row = self._free_rows.pop()
        pair = to_device([source, row], torch.int32, self.state.lengths.device).view(2, 1)
        self.queue.order(lambda: kernels.fork(self.state, *pair))
        final = self._final(source)
        if (final > self._shared[source]).any():
            pages = (final - self._shared[source]).sum(-1)
            # It stands between the source and what the source shared before, whose holders thus stay as many.
            self._base[source] = _Shared(self._base[source], pages, holders=1, live=int(self.live[source]))
            self._all_shared += pages
            self._live_shared += pages * self.live[source]
            self._shared[source], self._shared_pages[source] = final, final.sum(-1)
        for x in (
            self.lengths,
            self.tokens,
            self.tokens_launched,
            self._pages,
            self._full,
            self._shared,
            self._shared_pages,
        ):
            x[row] = x[source]
        shared = self._base[row] = self._base[source]
        if shared is not None:
            shared.holders += 1
        self._recent.fork(source, row, int(self.tokens[row]))
        if live:
            self.resume(row)
        return row

    def park(self, row: int) -> None:
        """Turn a sequence's row into a snapshot."""
        shared = self._base[row] if self.live[row] else None
        if self.live[row]:
            self._recent.set_live(row, False)
        self.live[row] = False
        while shared is not None:
            shared.live -= 1
            if shared.live:
                return
            self._live_shared -= shared.pages
            shared = shared.parent

    def resume(self, row: int) -> None:
        """Turn a snapshot's row into a sequence's."""
        self.live[row], shared = True, self._base[row]
        self._recent.set_live(row, True)
        while shared is not None:
            shared.live += 1
            if shared.live > 1:
                return
            self._live_shared += shared.pages
            shared = shared.parent

    def cost(self, row: int) -> np.ndarray:
        """Pages by which :meth:`available_pages` falls when a sequence continues from a snapshot, copied or not:
        [ranks].
        """
        pages, shared = self._pages[row] - self._shared_pages[row], self._base[row]
        while shared is not None and not shared.live:
            pages, shared = pages + shared.pages, shared.parent
        return pages + self.heads * self._recent.dormant(row)

    # ----------------------------------------------------------------------------------------------------------- steps

    def begin_step(self, rows: list[int], counts: list[int]) -> None:
        """Count a step that computes ``counts`` tokens of ``rows`` as in flight."""
        if not rows:
            return
        before = self.tokens_launched[rows]
        after = self.tokens_launched[rows] = before + counts
        if self.window.size:
            moved = self.window.begin(after) != self.window.begin(before)
            for i in np.flatnonzero(moved | (self.window.end(after) != self.window.end(before))).tolist():
                self._recent.advance(rows[i], bool(self.live[rows[i]]), int(after[i]))
        if self.async_scheduling:
            self._count_pages(rows, self._most_slots(rows, after))

    def in_flight(self, row: int) -> bool:
        """Whether a step in flight computes tokens of a row."""
        return bool(self.tokens_launched[row] != self.tokens[row])

    def read_lengths(self, rows: Tensor) -> Tensor:
        """Slots of each head of some rows as they are on the device when this is its turn, for :meth:`end_step`.

        Args:
            rows: int [n], on the device.

        Returns:
            int32 [n + 1, ranks, layers * heads] on the CPU, once the device has been waited for.
        """
        lengths = self.state.lengths.index_select(0, rows).flatten(1)
        # One row more, so that it costs no wait of its own: heads that a GPU had to refuse.
        refused = self.state.counters[REFUSED].to(lengths.dtype).expand(1, lengths.size(1))
        # [n + 1, L H] of each rank -> [ranks, n + 1, L H] -> [n + 1, ranks, L H]
        return to_host(self.parallel.gather(torch.cat((lengths, refused))).transpose(0, 1))

    def end_step(self, rows: list[int], counts: list[int], lengths: Tensor) -> None:
        """Take over the lengths after the oldest step in flight, which :meth:`read_lengths` has read.

        Raises:
            RuntimeError: the device ran out of pages.
        """
        known = lengths.numpy()
        if known[-1].any():
            raise RuntimeError(
                f"{known[-1].max()} heads found no page: the host's bound was wrong, and their caches are"
            )
        self.tokens[rows] += counts
        self.lengths[rows] = known = known[:-1]
        self._count_pages(rows, self._most_slots(rows, self.tokens_launched[rows]) if self.async_scheduling else known)

    def _count_pages(self, rows: list[int], slots: np.ndarray) -> None:
        """Count the pages of rows whose heads have so many slots: int32 [n, ranks, heads]."""
        self._pages[rows] = self.pages_for(slots)
        full = (slots & (self.page_size - 1)) == 0
        self._full[rows] = np.add.reduce(full.view(np.uint8), axis=-1, dtype=np.int32)

    def usage(self, row: int) -> CacheUse:
        """Cache usage of a row after the last step that has ended."""
        layers, heads = self.shape
        # [ranks, L H] -> [L, ranks H]: rank r holds the heads r H ... (r + 1) H - 1
        slots = self.slots([row])[0].reshape(-1, layers, heads).transpose(1, 0, 2).reshape(layers, -1)
        recent = self.heads * self.parallel.size * int(self.window.held(self.tokens[row]))
        pages = int(self.pages_for(self.lengths[row]).sum()) + recent
        return CacheUse(
            int(self.tokens[row]), tuple(map(tuple, slots.tolist())), pages, self.page_size, self.slot_bytes
        )

    def slots(self, rows: list[int] | np.ndarray) -> np.ndarray:
        """Slots of each head in pages of both kinds: int [n, ranks, layers * heads]."""
        return self.lengths[rows] + self.window.inside(self.tokens[rows])[:, None, None]

    def compression_ratio(self, rows: list[int]) -> Optional[float]:
        """Tokens per slot of some rows, of those beyond an eviction window; None where there are none."""
        slots, tokens = int(self.lengths[rows].sum()), int(self.window.beyond(self.tokens[rows]).sum())
        return tokens * self.lengths[0].size / slots if slots else None

    def live_slots(self) -> int:
        """Number of slots that sequences hold on all ranks; shared ones count once."""
        own = self.lengths - self._shared * self.page_size
        kept = int(own[self.live].sum() + self._live_shared.sum() * self.page_size)
        recent = int(self.window.inside(self.tokens[self.live]).sum())
        recent -= self._recent.repeated_tokens(self.tokens, self.live)
        return kept + recent * self.lengths[0].size

    def check_integrity(self) -> None:
        """Raise ``RuntimeError`` when a page is lost or counted wrongly, or the host's copy is not the device's: with a
        step in flight, when it is not between what there was before and the most that there may be after. Waits for the
        device.
        """
        self.queue.synchronize()
        self.state.check_integrity()
        rank, seen = self.parallel.rank, self.tokens_launched
        device = self.state.lengths.flatten(1).cpu().numpy()
        most = self._most_slots(list(range(self.rows)), seen)[:, rank]
        if (device < self.lengths[:, rank]).any() or (device > most).any():
            raise RuntimeError("the host's copy of the lengths differs from the device's")
        if self.window.size:
            counted_there = self.state.segment.flatten(1).cpu().numpy()
            if (counted_there != seen[:, None]).any():
                raise RuntimeError("the host's count of tokens differs from the device's")
        held = self.state.held_pages(torch.from_numpy(np.flatnonzero(self.live)))
        needed = held.ids[held.used].unique().numel()
        unknown = bool((seen != self.tokens).any())
        for what, there, counts in (
            ("free", self.state.free_count(), self.free_pages()),
            ("available", self.num_pages - needed, self.available_pages()),
        ):
            counted = int(counts[rank])
            if there < counted or (there > counted and not unknown):
                raise RuntimeError(f"{there} pages are {what}, the host counts {counted}")
        if self.live[self._free_rows].any() or self.lengths[self._free_rows].any():
            raise RuntimeError("a free row holds something")


def page_bytes(page_size: int, head_dim: int, dtype: torch.dtype, kv_dtype: Optional[torch.dtype] = None) -> int:
    """Size in bytes of one page, keys and values, with their scales where ``kv_dtype`` says that it is quantized."""
    slot = head_dim * dtype.itemsize if kv_dtype is None else head_dim * kv_dtype.itemsize + torch.bfloat16.itemsize
    return 2 * page_size * slot


def row_bytes(heads: int, max_slots: int, page_size: int, own: int = 0) -> int:
    """Size in bytes of one row without its pages, for ``heads`` heads over all layers: page table, lengths, and what a
    compression method keeps besides.

    Args:
        own: bytes of a head by :func:`ring_bytes` or :func:`window_bytes`.
    """
    return heads * (4 * -(-max_slots // page_size) + 8 + own)


def ring_bytes(places: int, head_dim: int, dtype: torch.dtype) -> int:
    """Size in bytes of one head's ring of tokens of the open slot."""
    return places * (2 * head_dim * dtype.itemsize + 4)


def window_bytes(window: int, page_size: int) -> int:
    """Size in bytes of one head's table of recent pages, and of its marks."""
    return 4 * (-(-window // page_size) + 2) + window + 2
