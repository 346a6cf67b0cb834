"""Answers a file of requests, each line once: what ``dmc batch`` runs. ``batch_run.py`` starts it.

Lines are OpenAI's batch lines (``custom_id``, ``method``, ``url``, ``body``), or just the body (``{"prompt": ...}`` or
``{"messages": ...}``, with a ``custom_id`` or without). A line that is wrong gets a line with its error; nothing stops
the others.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Optional, Union

import torch

from megatron.dmc.inference import Completion, Engine, RequestOutput, SamplingParams, StepOutput
from megatron.dmc.serving.answers import UsageCount, chat_body, completion_body, usage_of
from megatron.dmc.serving.batch_files import DUPLICATE, MAX_LINE, Input, Output
from megatron.dmc.serving.errors import APIError, invalid, not_answered, of_value_error
from megatron.dmc.serving.prompts import Prompts
from megatron.dmc.serving.protocol import ChatCompletionRequest, CompletionRequest, parse

AnswerRequest = Union[CompletionRequest, ChatCompletionRequest]
URLS: dict[str, type[AnswerRequest]] = {
    "/v1/completions": CompletionRequest,
    "/v1/chat/completions": ChatCompletionRequest,
}
RUN, DRAIN, LEAVE = range(3)
"""Take lines; only finish what runs; leave it to the next run."""


@dataclass(frozen=True)
class Options:
    """What holds for all lines."""

    model: str
    """Name in the answers."""
    names: frozenset[str]
    """That a line may ask for."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Parameters of lines that do not say."""
    seed: int = 0
    """Of lines without one, together with their ``custom_id``: the same line draws the same tokens in every run."""
    shard: tuple[int, int] = (0, 1)


@dataclass
class Summary:
    """What a run did."""

    skipped: int = 0
    """Lines that earlier runs have answered."""
    answered: int = 0
    errors: int = 0
    unfinished: int = 0
    """Lines that were begun and left to the next run."""
    complete: bool = False
    """Every line of the input has its line in the output."""
    strangers: int = 0
    """Lines of the output that answer no line of the input; known when complete."""
    seconds: float = 0.0
    peak_pages: int = 0
    usage: UsageCount = field(default_factory=UsageCount)


@dataclass
class _Pending:
    """A line that is being answered."""

    number: int
    custom_id: str
    request: AnswerRequest
    results: list[RequestOutput]


# ------------------------------------------------------------------------------------------------------ from line to
# request


def read_line(raw: Optional[bytes]) -> Any:
    """The JSON of a line. Raises :class:`APIError`."""
    if raw is None:
        raise invalid(f"the line is longer than {MAX_LINE >> 20} MiB")
    try:
        entry = json.loads(raw)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise invalid(f"the line is not JSON: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(entry, dict):
        raise invalid(f"the line must hold a JSON object, not {type(entry).__name__}")
    return entry


def id_of(entry: dict[str, Any], number: int) -> str:
    """Its ``custom_id``, or one that it has in every run. Raises :class:`APIError`."""
    custom_id = entry.get("custom_id")
    if custom_id is None:
        return f"line-{number}"
    if not isinstance(custom_id, str) or not custom_id:
        raise invalid(f"custom_id is {json.dumps(custom_id)[:100]}; it must be a text that is not empty", "custom_id")
    return custom_id


def request_of(entry: dict[str, Any], options: Options) -> AnswerRequest:
    """Raises :class:`APIError` for anything that the HTTP server would not take either."""
    if entry.keys() & {"body", "url", "method"}:
        kind, body = URLS.get(str(entry.get("url"))), entry.get("body")
        if kind is None:
            raise invalid(f"url is {json.dumps(entry.get('url'))[:100]}; use {' or '.join(URLS)}", "url")
        if entry.get("method", "POST") != "POST":
            raise invalid(f"method is {json.dumps(entry['method'])[:100]}; use POST", "method")
    else:
        body = {key: value for key, value in entry.items() if key != "custom_id"}
        kind = ChatCompletionRequest if "messages" in body else CompletionRequest
    if not isinstance(body, dict):
        raise invalid("body must be a JSON object", "body")
    request = parse(kind, {**_defaults(options.defaults, body), **body})
    if request.stream:
        raise invalid("stream is of no use in a batch; leave it out", "stream")
    if request.model is not None and request.model not in options.names:
        raise APIError(
            404,
            f"the model {request.model[:200]!r} does not exist; this batch has {options.model!r}",
            param="model",
            code="model_not_found",
        )
    return request


def _defaults(defaults: Mapping[str, Any], body: dict[str, Any]) -> dict[str, Any]:
    longest = {"max_tokens"} if "max_completion_tokens" in body else set()  # the other name of the same
    return {name: value for name, value in defaults.items() if name not in longest}


def seeded(params: SamplingParams, custom_id: str, seed: int) -> SamplingParams:
    """With a seed of its own where it has none, so that a line's answer does not depend on the run that it is in."""
    if params.seed is not None or params.greedy:
        return params
    digest = hashlib.blake2b(f"{seed}\0{custom_id}".encode(errors="surrogatepass"), digest_size=8).digest()
    return dataclasses.replace(params, seed=int.from_bytes(digest, "little") >> 1)


# ------------------------------------------------------------------------------------------------------------------ the
# run


class Batch:
    """Drives an engine over the lines of an input that the output does not have yet.

    ``phase`` is asked before every step: ``RUN``, ``DRAIN`` or ``LEAVE``. Tensor-parallel ranks do the same, and the
    first one's phase counts.
    """

    def __init__(
        self, engine: Engine, prompts: Prompts, output: Output, options: Options, phase: Callable[[], int] = lambda: RUN
    ) -> None:
        self.engine, self.prompts, self.output, self.options, self.phase = engine, prompts, output, options, phase
        self.summary = Summary()
        self.ahead = 2 * engine.sizes.max_num_seqs
        """Answers that are asked for at a time: enough for a full cache at every step, however long the input."""
        self._pending: dict[str, _Pending] = {}
        self._left = 0
        self._seen: set[str] = set()
        self._damage: Optional[ValueError] = None

    def run(self, source: Input, progress: Callable[[Summary], None] = lambda summary: None) -> Summary:
        """Answer what is left. Raises what the engine raises, and ``ValueError`` for a damaged input when all before
        the damage is answered; what is written stays written.
        """
        began, lines = time.monotonic(), source.lines(self.options.shard)
        summary, more = self.summary, True
        try:
            while True:
                phase = self._agreed()
                while more and phase == RUN and self._left < self.ahead:
                    more = self._take(lines)
                if phase == LEAVE or not self.engine.has_unfinished():
                    break
                for output in self.engine.step():
                    self._answer(output)
                cache = self.engine.cache  # what the prefix cache alone holds is to be had
                used = cache.num_pages * self.engine.parallel.size - int(cache.available_pages().sum())
                summary.peak_pages = max(summary.peak_pages, used)
                progress(summary)
        finally:
            summary.unfinished, summary.seconds = len(self._pending), time.monotonic() - began
            for name in list(self._pending):
                self._abort(self._pending[name])
        if self._damage is not None:
            raise self._damage
        summary.complete = not more and not summary.unfinished
        if summary.complete:
            summary.strangers = len(self.output.done.ids - self._seen)
        return summary

    def _agreed(self) -> int:
        phase, parallel = self.phase(), self.engine.parallel
        return phase if parallel.size == 1 else int(parallel.from_first(torch.tensor(phase, device=self.engine.device)))

    def _take(self, lines: Iterator[tuple[int, Optional[bytes]]]) -> bool:
        """Queue the next line, or write why it cannot be; False at the end of the input."""
        try:
            number, raw = next(lines, (0, None))
        except ValueError as error:
            self._damage = error
            return False
        if not number:
            return False
        custom_id = f"line-{number}"
        try:
            entry = read_line(raw)
            custom_id = id_of(entry, number)
        except APIError as error:
            self._start(number, custom_id, error)
        else:
            self._start(number, custom_id, entry)
        return True

    def _start(self, number: int, custom_id: str, entry: Union[dict[str, Any], APIError]) -> None:
        done = self.output.done
        if custom_id in self._seen:
            if (number, custom_id) in done.duplicates:
                self.summary.skipped += 1
            else:
                self._fail(
                    number,
                    custom_id,
                    invalid(f"custom_id {custom_id[:200]!r} is that of an earlier line", "custom_id", DUPLICATE),
                )
            return
        self._seen.add(custom_id)
        if custom_id in done.ids:
            self.summary.skipped += 1
            return
        try:
            if isinstance(entry, APIError):
                raise entry
            self._ask(number, custom_id, request_of(entry, self.options))
        except APIError as error:
            self._fail(number, custom_id, error)

    def _ask(self, number: int, custom_id: str, request: AnswerRequest) -> None:
        """Hand all prompts of a line to the engine, or none. Raises :class:`APIError`."""
        params = seeded(request.sampling_params(), custom_id, self.options.seed)
        try:
            chat = isinstance(request, ChatCompletionRequest)
            prompts = [self.prompts.of_chat(request)] if chat else self.prompts.of_completion(request)
        except APIError:
            raise
        except Exception as error:  # a tokenizer's own
            raise invalid(f"the prompt cannot be tokenized: {' '.join(str(error).split())[:200]}", "prompt") from None
        for ids in prompts:
            self.prompts.check_context(ids, params)
            try:
                self.engine.check(ids, params)
            except ValueError as error:
                raise of_value_error(error) from None
        results = []
        for i, ids in enumerate(prompts):
            name = f"{number}-{i}"
            self.engine.add_request(name, ids, params)
            answers = [Completion(n, logprobs=None if params.logprobs is None else []) for n in range(params.n)]
            results.append(RequestOutput(name, None, ids, answers, None if params.prompt_logprobs is None else []))
        self._pending[str(number)] = _Pending(number, custom_id, request, results)
        self._left += params.n * len(prompts)

    def _answer(self, output: StepOutput) -> None:
        line, _, prompt = output.request_id.partition("-")
        pending = self._pending.get(line)
        if pending is None:  # another answer of its line has failed
            return
        pending.results[int(prompt)].add(output)
        if output.error is not None:
            self._abort(pending)
            self._fail(pending.number, pending.custom_id, not_answered(output.error))
        elif all(result.finished for result in pending.results):
            self._forget(pending)
            self._write(pending)

    def _write(self, pending: _Pending) -> None:
        request, results, model = pending.request, pending.results, self.options.model
        name = hashlib.blake2b(pending.custom_id.encode(errors="surrogatepass"), digest_size=12).hexdigest()
        if isinstance(request, ChatCompletionRequest):
            body = chat_body(request, results[0], model, self.prompts, f"chatcmpl-{name}")
        else:
            body = completion_body(request, results, model, self.prompts, f"cmpl-{name}")
        self.output.write(pending.number, pending.custom_id, 200, body)
        self.summary.answered += 1
        more, usage = usage_of(results), self.summary.usage
        for item in dataclasses.fields(UsageCount):
            setattr(usage, item.name, getattr(usage, item.name) + getattr(more, item.name))

    def _fail(self, number: int, custom_id: str, error: APIError) -> None:
        told = {"code": error.code or error.type, "message": error.message}
        self.output.write(number, custom_id, error.status, error.body(), told)
        self.summary.errors += 1

    def _abort(self, pending: _Pending) -> None:
        self._forget(pending)
        for result in pending.results:
            self.engine.abort(result.request_id)

    def _forget(self, pending: _Pending) -> None:
        del self._pending[str(pending.number)]
        self._left -= sum(len(result.outputs) for result in pending.results)
