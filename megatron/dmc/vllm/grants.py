"""Memory of a compressed cache, counted in blocks that a scheduler grants to requests; nothing of vLLM.

A block is no place. It is a grant of as many single-head pages as the model has KV heads in all layers of one rank; the
pages themselves are handed out on the device, where heads merge differently. A request holds enough blocks for the
worst case: every token that a step computes is a slot of its own in every head, until the lengths after that step are
known. Then its grant shrinks to what these lengths, and the tokens scheduled meanwhile, can need. So whatever the
scheduler does, the device never runs out.

Slots and pages without more words are those of ``CacheState.page_table``. The recent pages of a model that evicts (DMS)
follow from the number of tokens alone, alike in all heads: each is a block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from megatron.dmc.inference.recent_pages import Window


class Lengths(NamedTuple):
    """What a request held after a step, on every rank: sums over its heads (layers x KV heads of the rank)."""

    tokens: int
    """Tokens whose keys and values are in the cache."""
    slots: tuple[int, ...]
    """KV slots: [ranks]."""
    pages: tuple[int, ...]
    """Pages: [ranks]."""
    ends: tuple[list[int], ...]
    """Heads by slots in their last page: [ranks][page_size]; entry 0 counts those whose last page is full."""

    @classmethod
    def of(cls, tokens: int, lengths: np.ndarray, page_size: int) -> Lengths:
        """Lengths of one rank. ``lengths``: int [heads], slots of each head."""
        return cls.of_all([tokens], lengths[None], page_size)[0]

    @classmethod
    def of_all(cls, tokens: Sequence[int], lengths: np.ndarray, page_size: int) -> list[Lengths]:
        """Lengths of several requests of one rank: ``lengths`` int [requests, heads]."""
        n = len(tokens)
        last = lengths & page_size - 1  # the remainder, since page_size is a power of 2
        last += page_size * np.arange(n, dtype=last.dtype)[:, None]
        ends = np.bincount(last.ravel(), minlength=n * page_size).reshape(n, page_size)
        slots = lengths.sum(1)
        empty = ends @ (-np.arange(page_size) % page_size)  # slots of last pages
        columns = slots, (slots + empty) // page_size, ends
        rows = zip(tokens, *(column.tolist() for column in columns), strict=True)
        return [cls(count, (slots,), (pages,), (last,)) for count, slots, pages, last in rows]

    def beside(self, other: Lengths) -> Lengths:
        """The same request's lengths on more ranks."""
        return Lengths(self.tokens, self.slots + other.slots, self.pages + other.pages, self.ends + other.ends)

    def pages_after(self, slots: int) -> int:
        """Most pages that any rank holds when every head gets so many slots more."""
        if not slots:
            return max(self.pages)
        size = len(self.ends[0])
        # A head takes a page for every page_size slots, and one more where the others do not fit its last page.
        whole, more = divmod(slots, size)
        pages = self.pages
        if more:
            pages = [n + ends[0] + sum(ends[size - more + 1 :]) for n, ends in zip(pages, self.ends, strict=True)]
        return max(pages) + (whole * sum(self.ends[0]) if whole else 0)


@dataclass(frozen=True)
class Grants:
    """Size of blocks, and how many of them tokens need."""

    heads: int
    """Pages of a block: layers x KV heads of one rank."""
    window: Window
    """Slots of a page, and the window of a model that evicts."""
    expected_cr: float
    """Tokens per slot that the model is expected to reach, of those beyond an eviction window."""
    step_tokens: int
    """Most tokens of one request whose lengths are not known yet: those of a step, or of two that overlap."""

    @property
    def page_size(self) -> int:
        return self.window.page_size

    def worst(self, tokens: int, known: Lengths | None = None) -> int:
        """Blocks of a request of so many tokens when none is merged or evicted that was not computed at ``known``."""
        before = known.tokens if known else 0
        after = max(tokens, before)
        slots = self.window.beyond(after) - self.window.beyond(before)
        pages = known.pages_after(slots) if known else self.heads * self.window.end(slots)
        return max(1, -(-pages // self.heads) + self._recent(before, after))

    def _recent(self, before: int, after: int) -> int:
        """Most recent pages of a head on the way from ``before`` to ``after`` tokens, in steps of any length."""
        if not self.window.size:
            return 0
        # Those between two steps and those that a step takes: either lie in a window.
        most = 2 * (self.window.end(self.window.size + 1) + 1)
        return min(self.window.end(after) - self.window.begin(before), most)

    def expected(self, tokens: int) -> int:
        """Blocks in which a request of so many tokens can be computed step by step, if it compresses as expected."""
        older = self.window.beyond(tokens)
        unknown = min(older, self.step_tokens)
        slots = unknown + (older - unknown) / self.expected_cr
        # The last pages of the heads, which compress differently, are half empty.
        spare = 1 if older > unknown and self.expected_cr > 1 else 0
        return min(self.worst(tokens), int(-(-slots // self.page_size)) + spare + self._recent(0, tokens))

    def slots(self, known: Lengths) -> int:
        """Slots of a request in pages of both kinds, over all heads and ranks."""
        return sum(known.slots) + self.window.inside(known.tokens) * self.heads * len(known.slots)


@dataclass(frozen=True)
class Layout:
    """How the memory of a cache is divided: blocks of pages, and what every row needs beside its pages."""

    block_bytes: int
    block_overhead: int
    """Bytes per block that are kept beside its pages: a list of free pages and a count for each."""
    fixed_bytes: int
    """Bytes of the rows, for all sequences: rings, page tables, lengths."""

    def usable(self, blocks: int) -> int:
        """Blocks that can be granted when the memory of ``blocks`` is there; below 1 when the rows do not fit."""
        return (blocks * self.block_bytes - self.fixed_bytes) // (self.block_bytes + self.block_overhead)

    def needed(self, usable: int) -> int:
        """Fewest blocks of memory of which so many can be granted."""
        return -(-(usable * (self.block_bytes + self.block_overhead) + self.fixed_bytes) // self.block_bytes)
