"""``LLM(path).generate(prompts, SamplingParams(...))``: the engine for a batch of prompts."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron.dmc.inference.config import EngineConfig
from megatron.dmc.inference.engine import Engine
from megatron.dmc.inference.request import Completion, RequestOutput, StepOutput
from megatron.dmc.inference.sampling_params import SamplingParams
from megatron.dmc.inference.text import load_tokenizer

Prompt = str | Sequence[int]


class LLM:
    """A model directory, ready to generate. ``settings`` are those of :class:`EngineConfig`."""

    def __init__(self, model: str | Path, *, tokenizer: str | Path | Any | None = None, **settings: Any) -> None:
        """Load weights and tokenizer.

        Args:
            model: a Hugging Face directory, plain or exported with a ``dmc`` block.
            tokenizer: a directory, or an object like transformers' tokenizers; None: the model's own, if it has one.

        Raises:
            ValueError: a directory or setting that is wrong, by name.
        """
        source = model if tokenizer is None else tokenizer
        loaded = load_tokenizer(source) if isinstance(source, (str, Path)) else source
        self.engine = Engine(model, EngineConfig(**settings), loaded)
        self._ids = itertools.count()

    def generate(
        self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] = SamplingParams()
    ) -> list[RequestOutput]:
        """Answer all prompts, in their order.

        A prompt that cannot be answered has its reason in ``error`` and no answers; the others are not touched by it.

        Args:
            prompts: texts or lists of token ids, one or many.
            params: for all, or one for each.

        Raises:
            ValueError: as many ``params`` as prompts are needed.
        """
        requests = _as_list(prompts)
        each = [params] * len(requests) if isinstance(params, SamplingParams) else list(params)
        if len(each) != len(requests):
            raise ValueError(
                f"{len(requests)} prompts and {len(each)} sampling parameters; give one for all, or one for each"
            )
        found: dict[str, RequestOutput] = {}
        try:
            for prompt, own in zip(requests, each):
                name = str(next(self._ids))
                found[name] = self._add(name, prompt, own)
            while self.engine.has_unfinished():
                for output in self.engine.step():
                    found[output.request_id].add(output)
        finally:  # interrupted: nobody waits for the rest
            for name in found:
                self.engine.abort(name)
        return list(found.values())

    def stream(self, prompt: Prompt, params: SamplingParams = SamplingParams()) -> Iterator[StepOutput]:
        """Outputs of one prompt as they come. Raises ``ValueError`` for a prompt that cannot be answered."""
        name = str(next(self._ids))
        self.engine.add_request(name, prompt, params)
        try:
            while self.engine.has_unfinished():
                yield from (output for output in self.engine.step() if output.request_id == name)
        finally:
            self.engine.abort(name)

    def _add(self, name: str, prompt: Prompt, params: SamplingParams) -> RequestOutput:
        text = prompt if isinstance(prompt, str) else None
        try:
            ids = self.engine.add_request(name, prompt, params)
        except ValueError as error:
            return RequestOutput(name, text, [] if text is not None else list(prompt), [], error=str(error))
        answers = [Completion(i, logprobs=None if params.logprobs is None else []) for i in range(params.n)]
        return RequestOutput(name, text, ids, answers, None if params.prompt_logprobs is None else [])


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt or many: a list of ints is one."""
    if isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int)):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]
