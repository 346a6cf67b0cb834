"""Scheduler: which sequences run in the next step and how many tokens of each: continuous batching, chunked prefill.

A step computes at most ``max_num_batched_tokens`` tokens: one for every decoding sequence first, then chunks of
prompts, then new sequences. Pages are promised at worst, as if every token opened a slot in every head, so a scheduled
step can never run out of them. When a decoding sequence (or the oldest one) cannot be promised its pages, the youngest
sequence is preempted: it gives its pages back, waits, and will be computed again. The oldest sequence thus always goes
on, and everything ends.

Snapshots of prefixes are never in the way: their pages count as available, and are freed when a step needs them.

A step may be scheduled ahead, while the one before is in flight: with one token more for every sequence of which it is
not known that it ends, whatever that token will be, and with the most pages that the step in flight may take. Nobody is
preempted then, since the bound may be wrong: without the pages for all, the step waits for the results.
"""

import bisect
import time
from dataclasses import dataclass, field
from typing import Optional

import numpy as np
from torch import Tensor

from megatron.dmc.inference.cache import PagedCache
from megatron.dmc.inference.kv_cache_manager import KVCacheManager
from megatron.dmc.inference.radix_tree import Node
from megatron.dmc.inference.request import Sequence

_MOST_PASSED = 256  # waiting sequences that one step may look at and pass over: bounds its work


@dataclass(eq=False, slots=True)
class ScheduledSequence:
    """One sequence's part of a step: the tokens to compute, and what is wanted after them."""

    sequence: Sequence
    num_tokens: int
    """Tokens to compute; 0 when cached logits give the next token."""
    samples: bool
    """Whether the next token is sampled: all tokens are computed then."""
    takes_snapshot: bool = False
    """Whether the prefix cache wants the state after these tokens."""
    start: int = field(init=False)
    """Position of the first of these tokens."""

    def __post_init__(self) -> None:
        self.start = self.sequence.num_computed_tokens

    @property
    def num_logits(self) -> int:
        """Number of the last tokens whose logits are needed."""
        if self.num_tokens and self.sequence.needs_prompt_logprobs:
            return self.num_tokens
        return int(self.num_tokens > 0 and (self.samples or self.takes_snapshot))


@dataclass
class SchedulerOutput:
    """One step."""

    scheduled: list[ScheduledSequence] = field(default_factory=list)
    """Sequences to run: decoding ones, and others with one token, come first; those with cached logits last."""
    admitted: list[Sequence] = field(default_factory=list)
    """Sequences scheduled for the first time, or again after preemption."""
    unschedulable: list[Sequence] = field(default_factory=list)
    """Sequences that are alone in the cache and have no room for one token."""
    preempted: list[Sequence] = field(default_factory=list)


class Scheduler:
    """Waiting and running sequences, both in order of arrival."""

    def __init__(
        self,
        cache: PagedCache,
        kv_cache_manager: KVCacheManager,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        expected_cr: float,
    ) -> None:
        """``expected_cr``: compression ratio that the model promises, for the pages that prompts will take."""
        self.cache, self.kv_cache_manager = cache, kv_cache_manager
        self.max_num_seqs, self.max_num_batched_tokens = max_num_seqs, max_num_batched_tokens
        self.expected_cr = expected_cr
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.ending: list[tuple[Sequence, bool]] = []
        """Sequences that have ended while a step in flight computes their rows, and whether their states are kept."""
        self.num_preemptions = 0

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence."""
        self.kv_cache_manager.add_sequence(sequence)
        _insert(self.waiting, sequence)

    def remove(self, sequence: Sequence, keep: bool = True) -> None:
        """Remove a sequence that has ended. Its state may be kept as a snapshot, unless ``keep`` is false."""
        sequence.ended = True
        if sequence.row is None:
            self.waiting.remove(sequence)
        else:
            self.running.remove(sequence)
            self.ending.append((sequence, keep))
            self.release_ended()
        self.kv_cache_manager.remove_sequence(sequence)

    def release_ended(self) -> None:
        """Take back the rows of ended sequences that no step in flight computes any more."""
        ending, self.ending = self.ending, []
        for sequence, keep in ending:
            if self.cache.in_flight(sequence.row):
                self.ending.append((sequence, keep))
            else:
                self.kv_cache_manager.release_row(sequence, keep)

    def launched(self, scheduled: list[ScheduledSequence]) -> None:
        """Count a step as in flight."""
        self.cache.begin_step(*_computed(scheduled))
        for part in scheduled:
            part.sequence.num_computed_tokens += part.num_tokens
        if self.cache.async_scheduling:
            for part in scheduled:
                part.sequence.num_output_placeholders += part.samples
                part.sequence.snapshot_in_flight = part.takes_snapshot

    def landed(self, scheduled: list[ScheduledSequence], lengths: Optional[Tensor]) -> None:
        """Count the oldest step in flight as ended.

        Args:
            lengths: of its rows, see :meth:`PagedCache.end_step`; None where it computed no token.
        """
        if lengths is not None:
            self.cache.end_step(*_computed(scheduled), lengths)
        if self.cache.async_scheduling:
            for part in scheduled:
                part.sequence.num_output_placeholders -= part.samples
                if part.takes_snapshot:
                    part.sequence.snapshot_in_flight = False
        self.release_ended()

    def reset(self) -> None:
        """Preempt all sequences, after steps in flight that have failed."""
        for sequence, _ in self.ending:
            self.kv_cache_manager.release_row(sequence, keep=False)
        self.ending = []
        for sequence in list(self.running):
            self.preempt(sequence)

    def preempt(self, sequence: Sequence) -> None:
        """Free a running sequence's row and pages, and queue it again. Snapshots of its prompt may outlive it."""
        self.running.remove(sequence)
        self.kv_cache_manager.release_row(sequence, keep=False)
        sequence.num_computed_tokens = sequence.num_output_placeholders = 0
        sequence.snapshot_in_flight, sequence.cached_logits = False, None
        sequence.num_preemptions += 1
        self.num_preemptions += 1
        _insert(self.waiting, sequence)

    def schedule(self) -> SchedulerOutput:
        """Decide on the next step: preempts sequences, admits waiting ones, and frees the pages that it promised."""
        step = _Step(self)
        step.decode([s for s in self.running if s.num_uncomputed_tokens == 1])
        step.prefill([s for s in self.running if s.num_uncomputed_tokens > 1])
        if not step.output.preempted and not step.output.unschedulable:
            step.admit()
        self.kv_cache_manager.reserve_pages(step.promised)
        return step.finish()

    def schedule_ahead(self, in_flight: list[ScheduledSequence]) -> SchedulerOutput:
        """Decide on the step after one that is in flight: admits waiting sequences, preempts none.

        A sequence whose state is to be kept as a snapshot after the step in flight sits out. Nothing is scheduled where
        the step needs what the host will only know from the one in flight.
        """
        step = _Step(self, ahead=True)
        if any(part.samples and part.sequence.needs_sampled_ids for part in in_flight) or any(
            part.sequence.needs_prompt_logprobs for part in in_flight
        ):
            return step.finish()
        going_on = [s for s in self.running if not (s.ends_in_flight or s.snapshot_in_flight)]
        step.decode([s for s in going_on if s.num_uncomputed_tokens == 1])
        step.prefill([s for s in going_on if s.num_uncomputed_tokens > 1])
        if step.short:
            return SchedulerOutput()
        step.admit()
        self.kv_cache_manager.reserve_pages(step.promised)
        return step.finish()

    def observed_cr(self) -> float:
        """Tokens per slot to expect of a new sequence: what the model promises, or less when running ones have less."""
        observed = self.cache.compression_ratio([s.row for s in self.running]) if self.expected_cr > 1 else None
        return self.expected_cr if observed is None else max(1.0, min(self.expected_cr, observed))


class _Step:
    """A step that is being scheduled: what is scheduled so far, and the tokens and pages that are left."""

    def __init__(self, scheduler: Scheduler, ahead: bool = False) -> None:
        """``ahead``: of a step in flight, so that nobody may be preempted."""
        self.ahead, self.short = ahead, False
        """``short``: pages that a sequence must have were not there."""
        self.scheduler, self.cache, self.manager = scheduler, scheduler.cache, scheduler.kv_cache_manager
        self.output = SchedulerOutput()
        self.single: list[ScheduledSequence] = []
        self.chunks: list[ScheduledSequence] = []
        self.ready: list[ScheduledSequence] = []
        self.budget = scheduler.max_num_batched_tokens
        self.free = self.cache.available_pages()
        """Pages that may still be promised: [ranks]."""
        self.promised = np.zeros_like(self.free)
        """Pages that the scheduled tokens take at worst: [ranks]."""

    def finish(self) -> SchedulerOutput:
        self.output.scheduled = [*self.single, *self.chunks, *self.ready]
        return self.output

    def decode(self, sequences: list[Sequence]) -> None:
        """Schedule one token of each; the youngest sequences make room."""
        if not sequences:
            return
        pages = self.cache.growth([s.row for s in sequences], [1] * len(sequences))
        total = pages.sum(0)
        if (total <= self.free).all() and all(s.num_computed_tokens >= s.prompt_length for s in sequences):
            self.single = [ScheduledSequence(s, 1, True) for s in sequences]  # nearly always
            self.budget -= len(sequences)
            self._promise(total)
            return
        for sequence, needed in zip(sequences, pages):
            if sequence.row is not None and self._make_room(sequence, needed):
                self._schedule(sequence, 1, needed)

    def prefill(self, sequences: list[Sequence]) -> None:
        """Schedule chunks of prompts with the tokens left. One without pages waits, unless it is the oldest of all."""
        for sequence in sequences:
            if sequence.row is None or self.budget == 0:
                continue
            if sequence is self.scheduler.running[0]:
                self._make_room(sequence, self.cache.growth([sequence.row], [1])[0])
            self._schedule_chunk(sequence)

    def admit(self) -> None:
        """Start waiting sequences, as long as their prompts are expected to fit beside those in prefill.

        A sequence waits while another computes a prefix of its prompt, and all completions of a request but the first
        wait for the first one's prompt; sequences behind them pass.
        """
        scheduler, manager = self.scheduler, self.manager
        if not scheduler.waiting:
            return
        cr = scheduler.observed_cr()
        owed = sum(self._owed_pages(s, cr) for s in scheduler.running if s.num_uncomputed_tokens > 1)
        coming = {node for s in scheduler.running for node in manager.snapshot_points(s)}
        in_prefill = {s.request.request_id for s in scheduler.running if s.in_prefill}
        reserve, passed = self.cache.pages_at(1), 0
        for sequence in list(scheduler.waiting):
            rows = len(scheduler.running) + len(scheduler.ending)
            if rows == scheduler.max_num_seqs or not self.budget or passed > _MOST_PASSED:
                return
            sibling = manager.enabled and sequence.request.request_id in in_prefill
            if manager.should_wait(sequence, coming) or sibling:
                passed += 1
                continue
            prefix, expected = self._expected_pages(sequence, cr)
            if (scheduler.running or self.ahead) and (expected + owed + reserve > self.free).any():
                return
            self._start(sequence, prefix)
            owed += self._owed_pages(sequence, cr)
            if sequence.in_prefill:
                coming.update(manager.snapshot_points(sequence))
                in_prefill.add(sequence.request.request_id)

    def _start(self, sequence: Sequence, prefix: Optional[Node]) -> None:
        """Give a waiting sequence a row, and schedule its first chunk."""
        self.scheduler.waiting.remove(sequence)
        self.manager.allocate_row(sequence, prefix, self.promised)
        if sequence.first_scheduled_time is None:
            sequence.first_scheduled_time = time.monotonic()
        _insert(self.scheduler.running, sequence)
        self.output.admitted.append(sequence)
        if prefix is not None:
            self.free = self.cache.available_pages() - self.promised
        if sequence.num_uncomputed_tokens:
            self._schedule_chunk(sequence)
        else:
            self.ready.append(ScheduledSequence(sequence, 0, True))

    def _schedule_chunk(self, sequence: Sequence) -> None:
        """Schedule as many tokens as there are wanted and allowed, up to the next snapshot."""
        assert sequence.row is not None
        to_snapshot = self.manager.tokens_to_snapshot(sequence)
        wanted = min(sequence.num_uncomputed_tokens, self.budget, to_snapshot or self.budget)
        count = self.cache.most_tokens(sequence.row, self.free, wanted)
        if count:
            self._schedule(sequence, count, self.cache.growth([sequence.row], [count])[0])

    def _schedule(self, sequence: Sequence, count: int, pages: np.ndarray) -> None:
        samples = count == sequence.num_uncomputed_tokens
        snapshot = count == self.manager.tokens_to_snapshot(sequence)
        part = ScheduledSequence(sequence, count, samples, snapshot)
        (self.single if count == 1 else self.chunks).append(part)
        self.budget -= count
        self._promise(pages)

    def _promise(self, pages: np.ndarray) -> None:
        self.promised = self.promised + pages
        self.free = self.free - pages

    def _make_room(self, sequence: Sequence, needed: np.ndarray) -> bool:
        """Preempt the youngest sequences until ``needed`` pages are free; False when ``sequence`` was one of them, or
        nobody may be preempted.
        """
        running = self.scheduler.running
        while (needed > self.free).any():
            if self.ahead:
                self.short = True
                return False
            if len(running) == 1:
                self.output.unschedulable.append(sequence)
                return False
            youngest = running[-1]
            self._preempt(youngest)
            if youngest is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        part = next((p for p in (*self.single, *self.chunks) if p.sequence is sequence), None)
        if part is not None:
            (self.single if part.num_tokens == 1 else self.chunks).remove(part)
            self.budget += part.num_tokens
            self.promised = self.promised - self.cache.growth([sequence.row], [part.num_tokens])[0]
        self.scheduler.preempt(sequence)
        self.free = self.cache.available_pages() - self.promised
        self.output.preempted.append(sequence)

    def _expected_pages(self, sequence: Sequence, cr: float) -> tuple[Optional[Node], np.ndarray]:
        """The snapshot to continue from, and the pages that the prompt is expected to take: never more than without."""
        whole = np.full_like(self.free, self.cache.pages_at(len(sequence.token_ids), cr))
        for node in self.manager.match_prefix(sequence):
            cost = self.cache.cost(node.row)
            if (cost <= self.free).all():
                rest = np.maximum(0, whole - self.cache.held_pages(node.row))
                return node, np.minimum(whole, cost + rest)
        return None, whole

    def _owed_pages(self, sequence: Sequence, cr: float) -> int:
        """Pages that the rest of a prompt is expected to take after this step."""
        held = self.cache.held_pages(sequence.row)
        part = next((p for p in (*self.chunks, *self.single) if p.sequence is sequence), None)
        if part is not None:
            held = held + self.cache.growth([sequence.row], [part.num_tokens])[0]
        return max(0, self.cache.pages_at(len(sequence.token_ids), cr) - int(held.max()))


def _computed(scheduled: list[ScheduledSequence]) -> tuple[list[int], list[int]]:
    """Rows of the cache that get tokens in a step, and how many each."""
    parts = [part for part in scheduled if part.num_tokens]
    return [part.sequence.row for part in parts], [part.num_tokens for part in parts]


def _insert(sequences: list[Sequence], sequence: Sequence) -> None:
    """Insert in order of arrival."""
    bisect.insort(sequences, sequence, key=lambda s: s.arrival_order)
