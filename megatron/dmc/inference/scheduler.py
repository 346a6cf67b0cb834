"""Who runs in the next step, and how many tokens of each: continuous batching with chunked prefill, page by page.

A step takes at most ``max_tokens`` tokens: one of every decoding sequence first, then chunks of prompts, then new sequences.
Pages are promised at worst: every token opens a slot in every head. So a step that was planned can never run out. When a
decoding sequence (or the oldest one) cannot be promised its pages, the youngest sequence gives its pages back and waits; it
will read its tokens again. The oldest sequence thus always goes on, and everything ends.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass, field

import numpy as np

from megatron.dmc.inference.cache import PagedCache
from megatron.dmc.inference.request import Sequence


@dataclass
class Plan:
    """One step: how many tokens each sequence reads."""

    counts: dict[Sequence, int] = field(default_factory=dict)
    stuck: list[Sequence] = field(default_factory=list)
    """Alone in the cache, and still without room for one token."""
    preempted: list[Sequence] = field(default_factory=list)


class Scheduler:
    """Waiting and running sequences, both in order of arrival."""

    def __init__(self, cache: PagedCache, max_tokens: int, expected_cr: float) -> None:
        self.cache, self.max_tokens, self.expected_cr = cache, max_tokens, expected_cr
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.preemptions = 0

    def add(self, sequence: Sequence) -> None:
        bisect.insort(self.waiting, sequence, key=lambda s: s.ticket)

    def remove(self, sequence: Sequence) -> None:
        """It has ended: its row and pages are free."""
        if sequence.row is None:
            self.waiting.remove(sequence)
            return
        self.running.remove(sequence)
        self.cache.release([sequence.row])
        sequence.row = None

    def plan(self) -> Plan:
        """The next step. Gives rows and pages back, and hands rows out."""
        step = _Step(self)
        step.decode([s for s in self.running if s.remaining == 1])
        step.prefill([s for s in self.running if s.remaining > 1])
        if not step.plan.preempted and not step.plan.stuck:
            step.admit()
        return step.plan

    def preempt(self, sequence: Sequence) -> None:
        self.remove(sequence)
        sequence.computed = 0
        sequence.preemptions += 1
        self.preemptions += 1
        self.add(sequence)

    def cr(self) -> float:
        """Tokens per slot to expect of a new sequence: what the model promises, or less where running ones show less."""
        rows = [s.row for s in self.running]
        slots = int(self.cache.lengths[rows].sum()) if rows else 0
        if slots == 0 or self.expected_cr == 1:
            return self.expected_cr
        heads = self.cache.lengths[0].size
        return max(1.0, min(self.expected_cr, float(self.cache.tokens[rows].sum()) * heads / slots))


class _Step:
    """A plan in the making: tokens and pages that are left."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler, self.cache, self.plan = scheduler, scheduler.cache, Plan()
        self.budget = scheduler.max_tokens
        self.free = self.cache.free_pages()  # [ranks]
        self.promised: dict[Sequence, np.ndarray] = {}

    def _take(self, sequence: Sequence, count: int, pages: np.ndarray) -> None:
        self.plan.counts[sequence] = count
        self.promised[sequence] = pages
        self.budget -= count
        self.free = self.free - pages

    def _preempt(self, sequence: Sequence) -> None:
        self.budget += self.plan.counts.pop(sequence, 0)
        self.promised.pop(sequence, None)
        self.scheduler.preempt(sequence)
        self.free = self.cache.free_pages() - sum(self.promised.values())
        self.plan.preempted.append(sequence)

    def decode(self, sequences: list[Sequence]) -> None:
        """One token of each; the youngest make room."""
        if not sequences:
            return
        pages = self.cache.growth([s.row for s in sequences], [1] * len(sequences))
        if (pages.sum(0) <= self.free).all():  # nearly always
            for sequence, needed in zip(sequences, pages):
                self._take(sequence, 1, needed)
            return
        for sequence, needed in zip(sequences, pages):
            if sequence.row is not None and self._make_room(sequence, needed):
                self._take(sequence, 1, needed)

    def _make_room(self, sequence: Sequence, needed: np.ndarray) -> bool:
        """Pre-empt from the youngest on until ``needed`` pages are free; False when ``sequence`` is the youngest itself."""
        running = self.scheduler.running
        while (needed > self.free).any():
            if len(running) == 1:
                self.plan.stuck.append(sequence)
                return False
            youngest = running[-1]
            self._preempt(youngest)
            if youngest is sequence:
                return False
        return True

    def prefill(self, sequences: list[Sequence]) -> None:
        """Chunks for what is left of the budget. One that finds no pages waits, unless it is the oldest of all."""
        for sequence in sequences:
            if sequence.row is None or self.budget == 0:
                continue
            if sequence is self.scheduler.running[0]:
                self._make_room(sequence, self.cache.growth([sequence.row], [1])[0])
            self._chunk(sequence)

    def _chunk(self, sequence: Sequence) -> None:
        count = self.cache.most_tokens(sequence.row, self.free, min(sequence.remaining, self.budget))
        if count and sequence.row is not None:
            self._take(sequence, count, self.cache.growth([sequence.row], [count])[0])

    def admit(self) -> None:
        """New sequences, as long as their prompts are expected to fit beside those that are being read."""
        scheduler, cr = self.scheduler, self.scheduler.cr()
        owed = sum(self._owed(s, cr) for s in scheduler.running if s.remaining > 1)
        while scheduler.waiting and self.cache.free_rows and self.budget:
            sequence = scheduler.waiting[0]
            expected = self.cache.pages_at(len(sequence.tokens) / cr)
            one = self.cache.pages_at(1)
            if scheduler.running and (expected + owed + one > self.free).any():
                return
            self._start(sequence)
            owed += self._owed(sequence, cr)

    def _start(self, sequence: Sequence) -> None:
        scheduler = self.scheduler
        scheduler.waiting.remove(sequence)
        sequence.row = self.cache.take_row()
        bisect.insort(scheduler.running, sequence, key=lambda s: s.ticket)
        self._chunk(sequence)

    def _owed(self, sequence: Sequence, cr: float) -> int:
        """Pages that the rest of a prompt is expected to take after this step."""
        held = self.cache.pages_for(self.cache.lengths[sequence.row]) + self.promised.get(sequence, 0)
        return max(0, self.cache.pages_at(len(sequence.tokens) / cr) - int(held.max()))
