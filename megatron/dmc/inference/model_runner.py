"""Model runner: the device's part of a step. Builds the input, runs the model (by CUDA graph or not), samples.

A step is launched, and its results are asked for later. All that it takes from the sequences is fixed at its launch. A
token that the step before samples is in no list of the host by then: the device looks it up where it was sampled.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterable
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import Optional

import torch
from torch import Tensor

from megatron.dmc.inference.cache import PagedCache
from megatron.dmc.inference.device_queue import Done, to_device, to_host
from megatron.dmc.inference.grammar import MaskFiller, TokenMasks
from megatron.dmc.inference.graphs import DecodeGraphs
from megatron.dmc.inference.model import InputBatch, Model
from megatron.dmc.inference.request import Sequence
from megatron.dmc.inference.sampler import Logprobs, LogprobsTensors, Sampler, SamplerState, logprobs
from megatron.dmc.inference.scheduler import ScheduledSequence

UNKNOWN = -1
"""Token id, in a step's input, of the token that the step before samples."""


@dataclass(slots=True)
class SampledToken:
    """Next token of one sequence."""

    sequence: Sequence
    token_id: Optional[int]
    """None when the logits hold NaN or Inf, or a grammar allows no token."""
    logprobs: Optional[Logprobs]
    """Log-probabilities of the token and of the most likely ones, when asked for."""


@dataclass
class ModelRunnerOutput:
    """Results of one step."""

    sampled: list[SampledToken]
    snapshots: list[tuple[Sequence, Tensor]]
    """Sequences whose state the prefix cache wants, each with the logits after its last token: [vocabulary]."""
    lengths: Optional[Tensor]
    """Slots of the sequences that computed tokens, see :meth:`PagedCache.read_lengths`; None where none did."""


@dataclass(slots=True)
class _PromptTargets:
    """Prompt tokens whose log-probabilities a step computes, of one sequence."""

    sequence: Sequence
    have: int
    """Number of the sequence's prompt log-probabilities at the launch."""
    begin: int
    """Row of the logits that predicts the first of the tokens."""
    ids: Tensor
    """The tokens, which follow one another: int64 [n], on the device."""
    count: int
    """Most likely tokens wanted at each position."""


@dataclass(slots=True)
class _Input:
    """Device's part of one step."""

    compute: Callable[[], Tensor]
    """Computes the logits of all sequences, one below the other: fp32 [m, vocabulary]."""
    rows: Optional[Tensor]
    """Cache rows of the sequences that compute tokens, on the device; None when none does."""
    sample_at: Optional[Tensor]
    """Rows of the logits to sample from; None for all."""
    cached: list[Tensor]
    """Logits that the last of the sampling sequences had in the prefix cache: [vocabulary] each."""
    states: list[SamplerState]
    """Sampling states of the n sequences that sample."""
    sampling_rows: Optional[Tensor]
    """Cache rows of the sequences that sample: int32 [n]; None unless steps overlap."""
    filling: Optional[Future[TokenMasks]]
    """Masks of the sequences with a grammar."""
    logprobs: dict[int, int]
    """Most likely tokens whose log-probabilities are wanted, by index among the sampling sequences."""
    prompts: list[_PromptTargets]
    snapshots: list[int]
    """Rows of the logits that the prefix cache wants."""


@dataclass(slots=True)
class _Results:
    """What the device has computed, on its way to the host."""

    tokens: Tensor
    """Sampled tokens, -1 where none can be: int64 [n]."""
    logprobs: Optional[LogprobsTensors]
    prompts: list[LogprobsTensors]
    snapshots: list[Tensor]
    lengths: Optional[Tensor]
    done: Optional[torch.cuda.Event]


class StepInFlight:
    """A step that was launched."""

    def __init__(self, scheduled: list[ScheduledSequence], step: _Input, results: Done | Future[_Results]) -> None:
        self.scheduled = scheduled
        self._step, self._results = step, results

    def result(self) -> ModelRunnerOutput:
        """Results of the step: waits for them, and appends the log-probabilities of prompts to their sequences. Raises
        what the step has raised.
        """
        found = self._results.result()
        if found.done is not None:
            found.done.synchronize()
        for asked, entries in zip(self._step.prompts, found.prompts):
            have = asked.sequence.prompt_logprobs  # completions of a request share it
            have += entries.entries()[len(have) - asked.have :]
        chosen = dict(zip(self._step.logprobs, found.logprobs.entries())) if found.logprobs is not None else {}
        sampling = [part.sequence for part in self.scheduled if part.samples]
        sampled = [
            SampledToken(sequence, token if token >= 0 else None, chosen.get(row))
            for row, (sequence, token) in enumerate(zip(sampling, found.tokens.tolist()))
        ]
        invalid = {item.sequence for item in sampled if item.token_id is None}
        wanted = [part.sequence for part in self.scheduled if part.takes_snapshot]
        snapshots = [(s, logits) for s, logits in zip(wanted, found.snapshots) if s not in invalid]
        return ModelRunnerOutput(sampled, snapshots, found.lengths)


class ModelRunner:
    """Runs scheduled sequences."""

    def __init__(
        self,
        model: Model,
        cache: PagedCache,
        sampler: Sampler,
        max_num_seqs: int,
        use_graphs: bool,
        overlaps: bool = False,
    ) -> None:
        """Args:
        use_graphs: capture decode steps of up to ``max_num_seqs`` sequences as CUDA graphs.
        overlaps: steps may be launched before the results of the one before are known.
        """
        self.model, self.cache, self.sampler = model, cache, sampler
        self.device, self.parallel = model.device, model.parallel
        self.mask_filler = MaskFiller(model.info.model.vocab_size)
        # Token that was sampled last, by row of the cache.
        self._last_tokens = torch.zeros(cache.rows, dtype=torch.long, device=self.device) if overlaps else None
        self.graphs = DecodeGraphs(self.forward, max_num_seqs, self.device) if use_graphs else None

    def launch(self, scheduled: list[ScheduledSequence]) -> StepInFlight:
        """Have the scheduled tokens computed into the cache, and the next token of each sequence sampled all of whose
        tokens are computed. Does not wait for the device.
        """
        step = self._input(scheduled)
        return StepInFlight(scheduled, step, self.cache.queue.submit(lambda: self._run(step)))

    def forward(self, batch: InputBatch) -> Tensor:
        """Logits of the tokens that need them: fp32 [m, vocabulary]."""
        if self._last_tokens is not None:
            tokens, d = batch.tokens, batch.decoding
            last = self._last_tokens[batch.rows[:d].long()]  # of padding: any
            first = torch.where(tokens[:d] == UNKNOWN, last, tokens[:d])
            batch = dataclasses.replace(batch, tokens=torch.cat((first, tokens[d:])))
        return self.model.forward(batch, self.cache.state)

    def sample(self, step: _Input, logits: Tensor) -> tuple[Tensor, Optional[LogprobsTensors]]:
        """Next token of each sequence of ``step.states``, and its log-probabilities where they are wanted.

        Args:
            logits: fp32 [n, vocabulary].

        Returns:
            int64 [n], -1 where the logits hold NaN or Inf, or a grammar allows no token; on the device.
        """
        # A NaN is both the largest and the smallest value. Two reductions: aminmax is ten times slower on CPUs.
        finite = torch.isfinite(logits.amax(dim=-1)) & torch.isfinite(logits.amin(dim=-1))
        if step.filling is not None:
            logits, stuck = step.filling.result().apply(logits)
            if stuck:
                finite[stuck] = False
        # Rows with NaN or Inf are sampled too, and their tokens thrown away: only the host knows what to do then.
        tokens = self.parallel.from_first(torch.where(finite, self.sampler(logits, step.states), -1))
        if not step.logprobs:
            return tokens, None
        rows = to_device(list(step.logprobs), torch.long, self.device)
        return tokens, logprobs(logits[rows], tokens[rows].clamp_min(0), list(step.logprobs.values()))

    def _input(self, scheduled: list[ScheduledSequence]) -> _Input:
        """What a step needs of its sequences as they are now."""
        computing = [part for part in scheduled if part.num_tokens]
        sampling = [part.sequence for part in scheduled if part.samples]
        num_logits = [part.num_logits for part in computing]
        last = list(itertools.accumulate(num_logits))  # row i + 1 of the logits follows part i's last one
        sample_at = [end - 1 for part, end in zip(computing, last) if part.samples]
        compute, rows = self._compute(computing, num_logits)
        return _Input(
            compute=compute,
            rows=rows,
            # All of them in every decode step.
            sample_at=None if last and len(sample_at) == last[-1] else to_device(sample_at, torch.long, self.device),
            cached=[s.cached_logits for s in sampling[len(sample_at) :]],
            states=[s.sampler_state for s in sampling],
            sampling_rows=None
            if self._last_tokens is None
            else to_device([s.row for s in sampling], torch.int32, self.device),
            filling=self.mask_filler.start([s.grammar for s in sampling]),
            logprobs={i: n for i, s in enumerate(sampling) if (n := s.params.logprobs) is not None},
            prompts=[
                targets
                for part, begin in zip(computing, [0, *last])
                if part.sequence.needs_prompt_logprobs
                and (targets := _prompt_targets(part, begin, self.device)) is not None
            ],
            snapshots=[end - 1 for part, end in zip(computing, last) if part.takes_snapshot],
        )

    def _compute(
        self, computing: list[ScheduledSequence], num_logits: list[int]
    ) -> tuple[Callable[[], Tensor], Optional[Tensor]]:
        """Fields ``compute`` and ``rows`` of the step's input."""
        if not computing:
            return lambda: torch.empty(0, self.model.info.model.vocab_size, device=self.device), None
        graphs = self.graphs
        # Those with one token come first.
        if graphs is None or computing[-1].num_tokens > 1 or len(computing) > graphs.sizes[-1]:
            batch = build_input(computing, num_logits, self.device)
            return lambda: self.forward(batch), batch.rows
        rows, starts = [part.sequence.row for part in computing], [part.start for part in computing]
        texts = [part.sequence.token_ids for part in computing]
        inputs = [ids[at] if at < len(ids) else UNKNOWN for ids, at in zip(texts, starts)], starts, rows
        wanted = [i for i, n in enumerate(num_logits) if n]
        logits_at = None if all(num_logits) else to_device(wanted, torch.long, self.device)

        def replay() -> Tensor:
            logits = graphs(*inputs)
            return logits if logits_at is None else logits[logits_at]

        return replay, to_device(rows, torch.int32, self.device)

    def _run(self, step: _Input) -> _Results:
        try:
            logits = step.compute()
        finally:
            if step.filling is not None:
                wait([step.filling])
        taken = logits if step.sample_at is None else logits[step.sample_at]
        if step.cached:
            taken = torch.cat([taken, torch.stack(step.cached)])
        tokens, chosen = torch.empty(0, dtype=torch.long), None
        if step.states:
            tokens, chosen = self.sample(step, taken)
            if self._last_tokens is not None:
                self._last_tokens[step.sampling_rows] = tokens.clamp_min(0)
        prompts = [logprobs(logits[x.begin :][: len(x.ids)], x.ids, [x.count] * len(x.ids)) for x in step.prompts]
        # Copies: a graph's next replay writes its logits to the same place.
        snapshots = [logits[row].clone() for row in step.snapshots]
        lengths = None if step.rows is None else self.cache.read_lengths(step.rows)
        done = None
        if self.device.type == "cuda":
            done = torch.cuda.Event()
            done.record()
        return _Results(to_host(tokens), chosen, prompts, snapshots, lengths, done)


def build_input(computing: list[ScheduledSequence], num_logits: Iterable[int], device: torch.device) -> InputBatch:
    """The model's input for sequences of which those with one token come first."""
    counts = [part.num_tokens for part in computing]
    decoding = next((i for i, count in enumerate(counts) if count > 1), len(counts))
    assert all(count > 1 for count in counts[decoding:])
    tokens: list[int] = []
    for part in computing:
        tokens += part.sequence.token_ids[part.start : part.start + part.num_tokens] or [UNKNOWN]
    positions = [part.start for part in computing[:decoding]]
    for part in computing[decoding:]:
        positions += range(part.start, part.start + part.num_tokens)
    ends = list(itertools.accumulate(counts))
    wanted: list[int] = []
    for end, n in zip(ends, num_logits):
        wanted += range(end - n, end)
    return InputBatch(
        tokens=to_device(tokens, torch.long, device),
        positions=to_device(positions, torch.int32, device),
        cu_seqlens=to_device([0, *ends], torch.int32, device),
        rows=to_device([part.sequence.row for part in computing], torch.int32, device),
        decoding=decoding,
        logits_at=to_device(wanted, torch.long, device),
    )


def _prompt_targets(part: ScheduledSequence, begin: int, device: torch.device) -> Optional[_PromptTargets]:
    """Prompt tokens that follow the scheduled ones, whose log-probabilities are missing: position t predicts token
    t + 1.

    Args:
        begin: row of the logits of the first scheduled token, which has one as all of them do.
    """
    sequence = part.sequence
    have = len(sequence.prompt_logprobs)
    # Some of them were computed before a preemption.
    targets = sequence.token_ids[have + 1 : min(part.start + part.num_tokens, sequence.prompt_length - 1) + 1]
    if not targets:
        return None
    count = sequence.params.prompt_logprobs
    assert count is not None
    return _PromptTargets(sequence, have, begin + have - part.start, to_device(targets, torch.long, device), count)
