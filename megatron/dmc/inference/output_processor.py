"""Output processor: appends sampled tokens to their sequences, checks whether these end, and says what is new."""

import time
from collections.abc import Iterable
from typing import Any, Optional

from megatron.dmc.inference.cache import PagedCache
from megatron.dmc.inference.model_runner import SampledToken
from megatron.dmc.inference.request import FinishReason, Sequence, StepOutput
from megatron.dmc.inference.scheduler import Scheduler


class OutputProcessor:
    """Keeper of the unfinished sequences by request, and maker of all step outputs."""

    def __init__(self, scheduler: Scheduler, cache: PagedCache, eos_token_ids: frozenset[int]) -> None:
        self.scheduler, self.cache, self.eos_token_ids = scheduler, cache, eos_token_ids
        self.unfinished: dict[str, list[Sequence]] = {}
        self.num_generated_tokens = 0

    def add(self, request_id: str, sequences: Iterable[Sequence]) -> None:
        """Follow the sequences of a new request until they end."""
        self.unfinished[request_id] = list(sequences)

    def process(self, sampled: Iterable[SampledToken]) -> list[StepOutput]:
        """Outputs of the sequences that got a token in this step."""
        now = time.monotonic()
        return [self._append(item, now) for item in sampled]

    def scheduled(self, sequences: Iterable[Sequence], outputs: Iterable[StepOutput]) -> list[StepOutput]:
        """Empty outputs of sequences that were scheduled for the first time and have none among ``outputs``."""
        told = {(output.request_id, output.index) for output in outputs}
        return [
            StepOutput(*s.id, num_cached_tokens=s.num_cached_tokens or 0)
            for s in sequences
            if not s.num_preemptions and not s.ended and s.id not in told
        ]

    def finish(self, sequence: Sequence, reason: FinishReason, **news: Any) -> StepOutput:
        """End a sequence: frees what it holds, and returns its last output."""
        usage = self.cache.usage(sequence.row) if sequence.row is not None else None
        self.scheduler.remove(sequence, keep=reason != "error")
        request_id = sequence.request.request_id
        siblings = self.unfinished[request_id]
        siblings.remove(sequence)
        if not siblings:
            del self.unfinished[request_id]
        text = ""
        if sequence.detokenizer is not None:
            sequence.detokenizer.flush()
            text = sequence.detokenizer.take()
        return StepOutput(
            request_id,
            sequence.index,
            text=text,
            num_cached_tokens=sequence.num_cached_tokens or 0,
            finish_reason=reason,
            cache=usage,
            timing=sequence.timing,
            **news,
        )

    def _append(self, sampled: SampledToken, now: float) -> StepOutput:
        """Append one token, and end the sequence if it is the last one."""
        sequence, token = sampled.sequence, sampled.token_id
        if token is None:
            error = sequence.grammar.error if sequence.grammar is not None else None
            error = error or f"the model's logits after {len(sequence.token_ids)} tokens hold NaN or Inf"
            return self.finish(sequence, "error", error=error)
        if sequence.max_length == sequence.prompt_length:  # max_tokens is 0
            return self.finish(sequence, "length", prompt_logprobs=tuple(sequence.prompt_logprobs))
        sequence.token_ids.append(token)
        if sequence.grammar is not None:
            sequence.grammar.accept(token)
        self.num_generated_tokens += 1
        if sequence.sampler_state.constrained:
            sequence.sampler_state.record(token)
        prompt_logprobs = ()
        if sequence.first_token_time is None:
            sequence.first_token_time = now
            sequence.cached_logits, prompt_logprobs = None, tuple(sequence.prompt_logprobs)
        logprobs = (sampled.logprobs,) if sampled.logprobs else ()
        reason, cause = self._stops(sequence, token)
        if reason is not None:
            return self.finish(
                sequence, reason, stop_reason=cause, tokens=(token,), logprobs=logprobs, prompt_logprobs=prompt_logprobs
            )
        request = sequence.request
        return StepOutput(
            request.request_id,
            sequence.index,
            (token,),
            sequence.detokenizer.take() if sequence.detokenizer is not None else "",
            logprobs,
            prompt_logprobs,
            sequence.num_cached_tokens or 0,
            cache=self.cache.usage(sequence.row) if request.report_cache else None,
        )

    def _stops(self, sequence: Sequence, token: int) -> tuple[Optional[FinishReason], int | str | None]:
        """Finish reason and stop reason after ``token``, which goes into the text unless it ends the completion."""
        params = sequence.request.sampling_params
        enough = params.min_tokens == 0 or sequence.num_generated_tokens >= params.min_tokens
        # A grammar allows an end-of-sequence token only where it ends, and before min_tokens only where it must end.
        ends = token in self.eos_token_ids and params.structured_outputs is not None
        if ends or (enough and token in sequence.stop_token_ids):
            is_eos = token in self.eos_token_ids and token not in params.stop_token_ids
            return "stop", None if is_eos else token
        detokenizer = sequence.detokenizer
        if detokenizer is not None:
            detokenizer.push(token, check_stop=enough)
            if detokenizer.stopped is not None:
                return "stop", detokenizer.stopped
        return ("length", None) if len(sequence.token_ids) >= sequence.max_length else (None, None)
