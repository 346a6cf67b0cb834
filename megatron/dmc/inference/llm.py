"""``LLM(path).generate(prompts, SamplingParams(...))``: the engine for a batch of prompts."""

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron.dmc.inference.config import EngineConfig
from megatron.dmc.inference.engine import Engine
from megatron.dmc.inference.errors import InvalidRequest
from megatron.dmc.inference.request import RequestOutput, StepOutput
from megatron.dmc.inference.sampling_params import SamplingParams
from megatron.dmc.inference.text import load_tokenizer

Prompt = str | Sequence[int]


class LLM:
    """A model directory, ready to generate."""

    def __init__(self, model: str | Path, *, tokenizer: str | Path | Any | None = None, **settings: Any) -> None:
        """Load weights and tokenizer.

        Args:
            model: a Hugging Face directory, plain, quantized or exported with a ``dmc`` block; or a GGUF file.
            tokenizer: a directory, or an object like transformers' tokenizers; None: the model's own, if it has one.
            settings: fields of :class:`EngineConfig`.

        Raises:
            ValueError: a directory or setting that is wrong, by name.
        """
        source = model if tokenizer is None else tokenizer
        loaded = load_tokenizer(source) if isinstance(source, (str, Path)) else source
        self.engine = Engine(model, EngineConfig(**settings), loaded)
        self._ids = itertools.count()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] = SamplingParams(),
    ) -> list[RequestOutput]:
        """Generate completions of all prompts, returned in the prompts' order.

        A prompt that the engine cannot take has the reason in ``error`` and no outputs; the others are not affected.

        Args:
            prompts: texts or lists of token ids, one or many.
            sampling_params: one for all prompts, or one for each.

        Raises:
            ValueError: not as many ``sampling_params`` as prompts.
        """
        requests = _as_list(prompts)
        one = isinstance(sampling_params, SamplingParams)
        each = [sampling_params] * len(requests) if one else list(sampling_params)
        if len(each) != len(requests):
            raise ValueError(
                f"{len(requests)} prompts and {len(each)} sampling parameters; give one for all, or one for each"
            )
        found: dict[str, RequestOutput] = {}
        try:
            for prompt, params in zip(requests, each):
                output = self._add(prompt, params)
                found[output.request_id] = output
            while self.engine.has_unfinished():
                for step in self.engine.step():
                    found[step.request_id].add(step)
        finally:  # interrupted: nobody waits for the rest
            for request_id in found:
                self.engine.abort(request_id)
        return list(found.values())

    def stream(self, prompt: Prompt, sampling_params: SamplingParams = SamplingParams()) -> Iterator[StepOutput]:
        """Outputs of one prompt as they come. Raises :class:`InvalidRequest` for a prompt that the engine
        cannot take.
        """
        request = self.engine.add_request(str(next(self._ids)), prompt, sampling_params)
        try:
            while self.engine.has_unfinished():
                yield from (output for output in self.engine.step() if output.request_id == request.request_id)
        finally:
            self.engine.abort(request.request_id)

    def _add(self, prompt: Prompt, params: SamplingParams) -> RequestOutput:
        """Queue one prompt; returns its output so far: none, or the error."""
        request_id = str(next(self._ids))
        try:
            return RequestOutput.start(self.engine.add_request(request_id, prompt, params))
        except InvalidRequest as error:
            text, ids = (prompt, []) if isinstance(prompt, str) else (None, list(prompt))
            return RequestOutput(request_id, text, ids, [], error=str(error))


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """Prompts as a list; a list of ints is one prompt."""
    if isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int)):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]
