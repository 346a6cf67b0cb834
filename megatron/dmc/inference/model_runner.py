"""Model runner: the device's part of a step. Builds the input, runs the model (by CUDA graph or not), samples."""

import itertools
from collections.abc import Iterable
from concurrent.futures import wait
from dataclasses import dataclass
from typing import Optional

import torch
from torch import Tensor

from megatron.dmc.inference.cache import PagedCache
from megatron.dmc.inference.grammar import MaskFiller, TokenMasks
from megatron.dmc.inference.graphs import DecodeGraphs
from megatron.dmc.inference.model import InputBatch, Model
from megatron.dmc.inference.request import Sequence
from megatron.dmc.inference.sampler import Logprobs, Sampler, logprobs
from megatron.dmc.inference.scheduler import ScheduledSequence


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


class ModelRunner:
    """Runs scheduled sequences. Sequences are read, and get the log-probabilities of their prompts."""

    def __init__(self, model: Model, cache: PagedCache, sampler: Sampler, max_num_seqs: int, use_graphs: bool) -> None:
        """``use_graphs``: capture decode steps of up to ``max_num_seqs`` sequences as CUDA graphs."""
        self.model, self.cache, self.sampler = model, cache, sampler
        self.device, self.parallel = model.device, model.parallel
        self.mask_filler = MaskFiller(model.info.model.vocab_size)
        self.graphs = DecodeGraphs(self.forward, max_num_seqs, self.device) if use_graphs else None

    def run(self, scheduled: list[ScheduledSequence]) -> ModelRunnerOutput:
        """Compute the scheduled tokens into the cache, and sample where all tokens of a sequence are computed."""
        computing = [part for part in scheduled if part.num_tokens]
        sampling = [part.sequence for part in scheduled if part.samples]
        filling = self.mask_filler.start([sequence.grammar for sequence in sampling])
        try:
            logits, num_logits = self._logits(computing)
        finally:
            if filling is not None:
                wait([filling])
        last = list(itertools.accumulate(num_logits))  # row i + 1 of ``logits`` follows part i's last one
        rows = [end - 1 for part, end in zip(computing, last) if part.samples]
        masks = None if filling is None else filling.result()
        sampled = self.sample(self._rows_to_sample(logits, rows, sampling), sampling, masks)
        if any(part.sequence.needs_prompt_logprobs for part in computing):
            for part, begin, end in zip(computing, [0, *last], last):
                _append_prompt_logprobs(part, logits[begin:end])
        invalid = {item.sequence for item in sampled if item.token_id is None}
        snapshots = [
            (part.sequence, logits[end - 1])
            for part, end in zip(computing, last)
            if part.takes_snapshot and part.sequence not in invalid
        ]
        return ModelRunnerOutput(sampled, snapshots)

    def forward(self, batch: InputBatch) -> Tensor:
        """Logits of the tokens that need them: fp32 [m, vocabulary]."""
        return self.model.forward(batch, self.cache.state)

    def sample(
        self, logits: Tensor, sequences: list[Sequence], masks: Optional[TokenMasks] = None
    ) -> list[SampledToken]:
        """Next token of each sequence.

        Args:
            logits: fp32 [n, vocabulary], one row per sequence.
            masks: of the rows with a grammar.
        """
        if not sequences:
            return []
        # A NaN is both the largest and the smallest value. Two reductions: aminmax is ten times slower on CPUs.
        finite = torch.isfinite(logits.amax(dim=-1)) & torch.isfinite(logits.amin(dim=-1))
        if masks is not None:
            logits, stuck = masks.apply(logits)
            if stuck:
                finite[stuck] = False
        # Rows with NaN or Inf are sampled too, and their tokens thrown away: only the host knows what to do then.
        tokens = self.sampler(logits, [sequence.sampler_state for sequence in sequences])
        tokens = self.parallel.from_first(torch.where(finite, tokens, -1))
        entries = self._logprobs(logits, tokens, sequences)
        return [
            SampledToken(sequence, token if token >= 0 else None, entries.get(row))
            for row, (sequence, token) in enumerate(zip(sequences, tokens.tolist()))
        ]

    @staticmethod
    def _logprobs(logits: Tensor, tokens: Tensor, sequences: list[Sequence]) -> dict[int, Logprobs]:
        """Log-probabilities of the rows that asked for them, by row."""
        counts = {row: n for row, s in enumerate(sequences) if (n := s.request.sampling_params.logprobs) is not None}
        if not counts:
            return {}
        rows = torch.tensor(list(counts), device=logits.device)
        return dict(zip(counts, logprobs(logits[rows], tokens[rows].clamp_min(0), list(counts.values()))))

    def _logits(self, computing: list[ScheduledSequence]) -> tuple[Tensor, list[int]]:
        """Logits of all sequences, one below the other, fp32 [m, vocabulary]; and the number of rows of each."""
        if not computing:
            return torch.empty(0, self.model.info.model.vocab_size, device=self.device), []
        num_logits = [part.num_logits for part in computing]
        if self.graphs is not None and computing[-1].num_tokens == 1:  # those with one token come first
            logits = self.graphs(
                [part.sequence.token_ids[part.sequence.num_computed_tokens] for part in computing],
                [part.sequence.num_computed_tokens for part in computing],
                [part.sequence.row for part in computing],
            )
            if logits is not None:
                if all(num_logits):
                    return logits, num_logits
                wanted = torch.tensor([i for i, n in enumerate(num_logits) if n], dtype=torch.long)
                return logits[wanted.to(self.device, non_blocking=True)], num_logits
        return self.forward(build_input(computing, num_logits, self.device)), num_logits

    def _rows_to_sample(self, logits: Tensor, rows: list[int], sampling: list[Sequence]) -> Tensor:
        """Logits of the sequences that sample, those whose logits were cached last: fp32 [n, vocabulary]."""
        whole = len(rows) == logits.size(0)  # as in every decode step
        taken = logits if whole else logits[torch.tensor(rows, dtype=torch.long).to(self.device)]
        cached = [sequence.cached_logits for sequence in sampling[len(rows) :]]
        return torch.cat([taken, torch.stack(cached)]) if cached else taken


def build_input(computing: list[ScheduledSequence], num_logits: Iterable[int], device: torch.device) -> InputBatch:
    """The model's input for sequences of which those with one token come first."""
    counts = [part.num_tokens for part in computing]
    starts = [part.sequence.num_computed_tokens for part in computing]
    decoding = next((i for i, count in enumerate(counts) if count > 1), len(counts))
    tokens = [part.sequence.token_ids[start] for part, start in zip(computing[:decoding], starts)]
    positions = starts[:decoding]
    for part, start, count in zip(computing[decoding:], starts[decoding:], counts[decoding:]):
        assert count > 1
        tokens += part.sequence.token_ids[start : start + count]
        positions += range(start, start + count)
    ends = list(itertools.accumulate(counts))
    wanted: list[int] = []
    for end, n in zip(ends, num_logits):
        wanted += range(end - n, end)

    def tensor(values: list[int], dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype).to(device, non_blocking=True)

    return InputBatch(
        tokens=tensor(tokens, torch.long),
        positions=tensor(positions, torch.int32),
        cu_seqlens=tensor([0, *ends], torch.int32),
        rows=tensor([part.sequence.row for part in computing], torch.int32),
        decoding=decoding,
        logits_at=tensor(wanted, torch.long),
    )


def _append_prompt_logprobs(part: ScheduledSequence, logits: Tensor) -> None:
    """Log-probabilities of the prompt tokens that follow the scheduled ones: position t predicts token t + 1.

    Args:
        logits: of all scheduled tokens of the sequence: fp32 [num_tokens, vocabulary].
    """
    sequence = part.sequence
    if not sequence.needs_prompt_logprobs:
        return
    count, have = sequence.request.sampling_params.prompt_logprobs, len(sequence.prompt_logprobs)
    start = sequence.num_computed_tokens
    # Some of them were computed before a preemption.
    targets = sequence.token_ids[have + 1 : min(start + part.num_tokens, sequence.prompt_length - 1) + 1]
    if targets:
        rows = logits[have - start :][: len(targets)]
        ids = torch.tensor(targets, device=rows.device)
        sequence.prompt_logprobs += logprobs(rows, ids, [count] * len(targets))
