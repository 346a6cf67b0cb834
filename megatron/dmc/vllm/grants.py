"""Memory of a compressed cache, counted in blocks that a scheduler grants to requests; nothing of vLLM.

A block is no place. It is a grant of as many single-head pages as the model has KV heads in all layers of one rank; the
pages themselves are handed out on the device, where heads merge differently. A request holds enough blocks for the
worst case: every token that a step computes is a slot of its own in every head, until the lengths after that step are
known. Then its grant shrinks to what these lengths, and the tokens scheduled meanwhile, can need. So whatever the
scheduler does, the device never runs out.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Lengths:
    """What a request held after a step, on every rank: sums over its heads (layers x KV heads of the rank)."""

    tokens: int
    """Tokens whose keys and values are in the cache."""
    slots: tuple[int, ...]
    """KV slots: [ranks]."""
    pages: tuple[int, ...]
    """Pages: [ranks]."""
    ends: tuple[tuple[int, ...], ...]
    """Heads by slots in their last page: [ranks][page_size]; entry 0 counts those whose last page is full."""

    @classmethod
    def of(cls, tokens: int, lengths: np.ndarray, page_size: int) -> Lengths:
        """Lengths of one rank. ``lengths``: int [heads], slots of each head."""
        ends = np.bincount(lengths % page_size, minlength=page_size)
        return cls(tokens, (int(lengths.sum()),), (int((-(-lengths // page_size)).sum()),), (tuple(ends.tolist()),))

    def beside(self, other: Lengths) -> Lengths:
        """The same request's lengths on more ranks."""
        return Lengths(self.tokens, self.slots + other.slots, self.pages + other.pages, self.ends + other.ends)

    def pages_after(self, tokens: int) -> int:
        """Most pages that any rank holds when ``tokens`` more are computed and none of them merges."""
        ends = np.asarray(self.ends)  # [ranks, page_size]
        page_size = ends.shape[1]
        last = np.arange(page_size)
        last[0] = page_size
        more = -(-(last + tokens) // page_size) - 1
        return int((np.asarray(self.pages) + ends @ more).max())


@dataclass(frozen=True)
class Grants:
    """Size of blocks, and how many of them tokens need."""

    heads: int
    """Pages of a block: layers x KV heads of one rank."""
    page_size: int
    expected_cr: float
    """Tokens per slot that the model is expected to reach."""
    step_tokens: int
    """Most tokens of one request whose lengths are not known yet: those of a step, or of two that overlap."""

    def worst(self, tokens: int, known: Lengths | None = None) -> int:
        """Blocks of a request of so many tokens when none merges that was not computed at ``known``."""
        if known is None:
            return max(1, -(-tokens // self.page_size))
        return max(1, -(-known.pages_after(max(0, tokens - known.tokens)) // self.heads))

    def expected(self, tokens: int) -> int:
        """Blocks in which a request of so many tokens can be computed step by step, if it merges as expected."""
        unknown = min(tokens, self.step_tokens)
        slots = unknown + (tokens - unknown) / self.expected_cr
        # The last pages of the heads, which merge differently, are half empty.
        spare = 1 if tokens > unknown and self.expected_cr > 1 else 0
        return min(self.worst(tokens), int(-(-slots // self.page_size)) + spare)


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
