"""Recent pages of a model that evicts, on the host: what its rows hold, share and will take of them.

They follow from the number of tokens alone, alike for all layers and heads, so the host counts them in groups: the
pages of all layers and heads of a rank that hold the same tokens. A model that does not evict has none.
"""

from collections import deque
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Window:
    """Arithmetic of an eviction window. Counts of tokens are integers or arrays of them."""

    size: int
    """w, or 0 for a model that does not evict."""
    page_size: int

    def beyond(self, tokens: Any) -> Any:
        """Tokens of a sequence that are older than its window: all, for a model that does not evict."""
        if not self.size:
            return tokens
        older = tokens - 1 - self.size
        return max(older, 0) if isinstance(older, int) else np.maximum(older, 0)

    def inside(self, tokens: Any) -> Any:
        """Tokens of a sequence in its window: the latest w + 1; none for a model that does not evict."""
        return tokens - self.beyond(tokens)

    def begin(self, tokens: Any) -> Any:
        """First recent page of a sequence, by its own count."""
        return self.beyond(tokens) // self.page_size if self.size else self.end(tokens)

    def end(self, tokens: Any) -> Any:
        """Page after a sequence's last recent one."""
        return -(-tokens // self.page_size)

    def held(self, tokens: Any) -> Any:
        """Groups that a sequence holds between two steps."""
        return self.end(tokens) - self.begin(tokens)

    def taken(self, tokens: Any, more: Any) -> Any:
        """Groups that a sequence takes in a step of so many tokens more. None is given back before its end."""
        after = tokens + more
        return self.end(after) - np.maximum(self.end(tokens), self.begin(after))

    def most_pages(self, tokens: int) -> int:
        """Most pages that one head may hold while a sequence grows to ``tokens``, one by one."""
        if not self.size or tokens <= self.size + 1:
            return self.end(tokens)
        return self.end(self.beyond(tokens)) + self.end(self.size) + 2


@dataclass(eq=False, slots=True)
class _Group:
    """A page of every layer and head with the same tokens."""

    index: int
    """Page of the sequence."""
    rows: set[int] = field(default_factory=set)
    """Rows that hold it."""
    live: int = 0
    """Those of them that hold a sequence."""


class RecentPages:
    """Groups of recent pages of all rows."""

    def __init__(self, rows: int, window: Window) -> None:
        self.window = window
        self.total = self.live = 0
        """Groups that rows hold, and those that a live row holds."""
        self._held: list[deque[_Group]] = [deque() for _ in range(rows)]
        self._common: set[_Group] = set()  # of several rows

    def advance(self, row: int, live: bool, tokens: int) -> None:
        """Give back and take what a row does in a step that ends with ``tokens``."""
        held, begin = self._held[row], int(self.window.begin(tokens))
        while held and held[0].index < begin:
            self._let_go(held.popleft(), row, live)
        for index in range(max(begin, held[-1].index + 1) if held else begin, int(self.window.end(tokens))):
            self._hold(_Group(index), row, live)

    def fork(self, source: int, target: int, tokens: int) -> None:
        """Let an empty row, which is not live, hold what a row of so many tokens does: the last group in a copy, unless
        it is full.
        """
        for group in self._held[source]:
            full = (group.index + 1) * self.window.page_size <= tokens
            self._hold(group if full else _Group(group.index), target, False)

    def release(self, row: int) -> None:
        """Let go of all that a row, which is not live, holds."""
        while self._held[row]:
            self._let_go(self._held[row].pop(), row, False)

    def set_live(self, row: int, live: bool) -> None:
        """Count a row as live from now on, or no longer."""
        for group in self._held[row]:
            self._count_live(group, 1 if live else -1)

    def dormant(self, row: int) -> int:
        """Groups of a row that no live row holds."""
        return sum(group.live == 0 for group in self._held[row])

    def repeated_tokens(self, tokens: np.ndarray, live: np.ndarray) -> int:
        """Tokens of live rows' windows that others of them hold in the same place. tokens, live: of all rows."""
        total = 0
        for group in self._common:
            stop = (group.index + 1) * self.window.page_size
            counts = [
                min(self.window.page_size, stop - self.window.beyond(int(tokens[r]))) for r in group.rows if live[r]
            ]
            total += sum(counts) - max(counts, default=0)
        return total

    def _hold(self, group: _Group, row: int, live: bool) -> None:
        self.total += not group.rows
        group.rows.add(row)
        self._held[row].append(group)
        if len(group.rows) > 1:
            self._common.add(group)
        if live:
            self._count_live(group, 1)

    def _let_go(self, group: _Group, row: int, live: bool) -> None:
        group.rows.remove(row)
        self.total -= not group.rows
        if len(group.rows) < 2:
            self._common.discard(group)
        if live:
            self._count_live(group, -1)

    def _count_live(self, group: _Group, change: int) -> None:
        before, group.live = group.live, group.live + change
        self.live += (group.live > 0) - (before > 0)
