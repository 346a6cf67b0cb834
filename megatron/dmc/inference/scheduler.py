"""Who runs in the next step, and how many tokens of each: continuous batching with chunked prefill, page by page.

A step takes at most ``max_tokens`` tokens: one of every decoding sequence first, then chunks of prompts, then new
sequences. Pages are promised at worst: every token opens a slot in every head. So a step that was planned can never run
out. When a decoding sequence (or the oldest one) cannot be promised its pages, the youngest sequence gives its pages
back and waits; it will read its tokens again. The oldest sequence thus always goes on, and everything ends.

Snapshots of the prefix cache are nowhere in the way: their pages count as free, and are freed when a plan needs them.
"""

from __future__ import annotations

import bisect
import time
from dataclasses import dataclass, field
from typing import Optional

import numpy as np

from megatron.dmc.inference.cache import PagedCache
from megatron.dmc.inference.prefix import Node, PrefixCache
from megatron.dmc.inference.request import Sequence

_MOST_PASSED = 256  # sequences that wait for a snapshot: bounds the work of a plan


@dataclass
class Plan:
    """One step: how many tokens each sequence reads."""

    counts: dict[Sequence, int] = field(default_factory=dict)
    snapshots: set[Sequence] = field(default_factory=set)
    """Those of ``counts`` that reach a place where the prefix cache wants a snapshot."""
    ready: list[Sequence] = field(default_factory=list)
    """They have nothing to read: their logits were in the prefix cache."""
    stuck: list[Sequence] = field(default_factory=list)
    """Alone in the cache, and still without room for one token."""
    preempted: list[Sequence] = field(default_factory=list)


class Scheduler:
    """Waiting and running sequences, both in order of arrival."""

    def __init__(
        self, cache: PagedCache, prefix: PrefixCache, max_seqs: int, max_tokens: int, expected_cr: float
    ) -> None:
        self.cache, self.prefix, self.max_seqs, self.max_tokens, self.expected_cr = (
            cache,
            prefix,
            max_seqs,
            max_tokens,
            expected_cr,
        )
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.preemptions = 0

    def add(self, sequence: Sequence) -> None:
        self.prefix.enter(sequence)
        self._queue(sequence)

    def _queue(self, sequence: Sequence) -> None:
        bisect.insort(self.waiting, sequence, key=lambda s: s.ticket)

    def remove(self, sequence: Sequence, sound: bool = True) -> None:
        """It has ended: its row and pages are the prefix cache's, or free when the state is not ``sound``."""
        if sequence.row is None:
            self.waiting.remove(sequence)
        else:
            self.running.remove(sequence)
            self.prefix.end(sequence, sound)
        self.prefix.leave(sequence)

    def plan(self) -> Plan:
        """The next step. Gives rows and pages back, and hands rows out."""
        step = _Step(self)
        step.decode([s for s in self.running if s.remaining == 1])
        step.prefill([s for s in self.running if s.remaining > 1])
        if not step.plan.preempted and not step.plan.stuck:
            step.admit()
        self.prefix.reclaim(step.promised_pages())
        return step.plan

    def preempt(self, sequence: Sequence) -> None:
        """Its pages are needed, so they are freed; snapshots of its prompt may outlive it."""
        self.running.remove(sequence)
        self.prefix.end(sequence, sound=False)
        sequence.computed, sequence.logits = 0, None
        sequence.preemptions += 1
        self.preemptions += 1
        self._queue(sequence)

    def cr(self) -> float:
        """Tokens per slot to expect of a new sequence:
        what the model promises, or less where running ones show less.
        """
        rows = [s.row for s in self.running]
        slots = int(self.cache.lengths[rows].sum()) if rows else 0
        if slots == 0 or self.expected_cr == 1:
            return self.expected_cr
        heads = self.cache.lengths[0].size
        return max(1.0, min(self.expected_cr, float(self.cache.tokens[rows].sum()) * heads / slots))


class _Step:
    """A plan in the making: tokens and pages that are left."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler, self.cache, self.prefix, self.plan = scheduler, scheduler.cache, scheduler.prefix, Plan()
        self.budget = scheduler.max_tokens
        self.free = self.cache.available_pages()  # [ranks]
        self.promised: dict[Sequence, np.ndarray] = {}

    def promised_pages(self) -> np.ndarray:
        """[ranks]"""
        return sum(self.promised.values(), np.zeros_like(self.free))

    def _take(self, sequence: Sequence, count: int, pages: np.ndarray) -> None:
        self.plan.counts[sequence] = count
        if count == self.prefix.next_stop(sequence):
            self.plan.snapshots.add(sequence)
        self.promised[sequence] = pages
        self.budget -= count
        self.free = self.free - pages

    def _preempt(self, sequence: Sequence) -> None:
        self.budget += self.plan.counts.pop(sequence, 0)
        self.promised.pop(sequence, None)
        self.scheduler.preempt(sequence)
        self.free = self.cache.available_pages() - self.promised_pages()
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
        """Pre-empt from the youngest on until ``needed`` pages are free; False when ``sequence`` is the youngest
        itself.
        """
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
        wanted = min(sequence.remaining, self.budget, self.prefix.next_stop(sequence) or self.budget)
        count = self.cache.most_tokens(sequence.row, self.free, wanted)
        if count and sequence.row is not None:
            self._take(sequence, count, self.cache.growth([sequence.row], [count])[0])

    def admit(self) -> None:
        """New sequences, as long as their prompts are expected to fit beside those that are being read.

        One whose prefix is being read by another waits for the snapshot, the answers of one request for the first of
        them; they let those behind them pass.
        """
        scheduler = self.scheduler
        if not scheduler.waiting:
            return
        cr = scheduler.cr()
        owed = sum(self._owed(s, cr) for s in scheduler.running if s.remaining > 1)
        coming = {node for s in scheduler.running for node in self.prefix.stops(s)}
        asked = {s.request_id for s in scheduler.running if s.computed < s.prompt_length}
        one, passed = self.cache.pages_at(1), 0
        for sequence in list(scheduler.waiting):
            if len(scheduler.running) == scheduler.max_seqs or not self.budget or passed > _MOST_PASSED:
                return
            if self.prefix.awaits(sequence, coming) or (self.prefix.enabled and sequence.request_id in asked):
                passed += 1
                continue
            hit, expected = self._expected(sequence, cr)
            if scheduler.running and (expected + owed + one > self.free).any():
                return
            self._start(sequence, hit)
            owed += self._owed(sequence, cr)
            if sequence.computed < sequence.prompt_length:
                coming.update(self.prefix.stops(sequence))
                asked.add(sequence.request_id)

    def _expected(self, sequence: Sequence, cr: float) -> tuple[Optional[Node], np.ndarray]:
        """The snapshot to go on from, and the pages that the prompt is expected to take: never more than without a
        snapshot.
        """
        whole = np.full_like(self.free, self.cache.pages_at(len(sequence.tokens) / cr))
        for node in self.prefix.found(sequence):
            cost = self.cache.cost(node.row)
            if (cost <= self.free).all():
                rest = np.maximum(0, whole - self.cache.pages_for(self.cache.lengths[node.row]))
                return node, np.minimum(whole, cost + rest)
        return None, whole

    def _start(self, sequence: Sequence, hit: Optional[Node]) -> None:
        scheduler = self.scheduler
        scheduler.waiting.remove(sequence)
        self.prefix.start(sequence, hit, self.promised_pages())
        if sequence.started is None:
            sequence.started = time.monotonic()
        bisect.insort(scheduler.running, sequence, key=lambda s: s.ticket)
        if hit is not None:
            self.free = self.cache.available_pages() - self.promised_pages()
        if sequence.remaining:
            self._chunk(sequence)
        else:
            self.plan.ready.append(sequence)

    def _owed(self, sequence: Sequence, cr: float) -> int:
        """Pages that the rest of a prompt is expected to take after this step."""
        held = self.cache.pages_for(self.cache.lengths[sequence.row]) + self.promised.get(sequence, 0)
        return max(0, self.cache.pages_at(len(sequence.tokens) / cr) - int(held.max()))
