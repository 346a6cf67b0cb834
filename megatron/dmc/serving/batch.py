"""Batch runner: completes a file of requests, each line once. The command is ``dmc batch``.

Lines are OpenAI's batch lines (``custom_id``, ``method``, ``url``, ``body``), or just the body (``{"prompt": ...}`` or
``{"messages": ...}``, with a ``custom_id`` or without). A line that is wrong gets a line with its error; the others
go on.
"""

import dataclasses
import hashlib
import json
import os
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional, Union

from megatron.dmc.inference import Engine, RequestOutput, SamplingParams, StepOutput
from megatron.dmc.serving import limits
from megatron.dmc.serving.batch_files import DUPLICATE, MAX_LINE, Input, Output
from megatron.dmc.serving.errors import APIError, invalid, not_answered, shown
from megatron.dmc.serving.prompts import Prompts
from megatron.dmc.serving.protocol import ChatCompletionRequest, CompletionRequest, GenerationRequest, parse
from megatron.dmc.serving.responses import UsageCount, response, usage_of

URLS: dict[str, type[GenerationRequest]] = {
    "/v1/completions": CompletionRequest,
    "/v1/chat/completions": ChatCompletionRequest,
}
LINE = {"custom_id", "method", "url", "body"}
"""Names in a line of OpenAI's batch API."""
RUN, DRAIN, LEAVE = range(3)
"""Phases of a run: take lines, only finish what runs, leave what runs to the next run."""


@dataclass(frozen=True)
class Options:
    """Settings for all lines."""

    model: str
    """Name of the model in responses."""
    names: frozenset[str]
    """Model names that a line may ask for."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Parameters of lines that do not give them."""
    seed: int = 0
    """Seed of lines without one, mixed with their ``custom_id``: the same line samples the same tokens in every run."""
    shard: tuple[int, int] = (0, 1)
    """Index and number of shards: lines i, i + n, i + 2n, ... are taken."""


@dataclass
class Summary:
    """Counts of one run."""

    skipped: int = 0
    """Lines completed by earlier runs."""
    completed: int = 0
    """Lines completed by this run."""
    errors: int = 0
    """Lines that got an error."""
    unfinished: int = 0
    """Lines that were started and left to the next run."""
    complete: bool = False
    """Whether every line of the input has its line in the output."""
    strangers: int = 0
    """Lines of the output without a line of the input; known when complete."""
    seconds: float = 0.0
    """Duration of the run."""
    peak_pages: int = 0
    """Most pages that running sequences held at a time, over all ranks."""
    usage: UsageCount = field(default_factory=UsageCount)


@dataclass(frozen=True)
class Line:
    """A line of the input."""

    number: int
    """Line number in the input file, from 1."""
    custom_id: str
    digest: str
    """CRC-32 of the request, whatever its spaces and the order of its keys, by which a changed line is known."""
    entry: Union[dict[str, Any], APIError]
    """The JSON object, or what is wrong with it."""


@dataclass
class _Pending:
    """A line that is being completed."""

    line: Line
    body: GenerationRequest
    results: list[RequestOutput]


# ------------------------------------------------------------------------------------------------------ from line to
# request


def read_line(number: int, raw: Optional[bytes]) -> Line:
    """Parse a line; one that is longer than ``MAX_LINE`` is None."""
    custom_id, digest = f"line-{number}", _digest((raw or b"").strip())
    try:
        entry = _json_object(raw)
        custom_id = id_of(entry, number)
        request = {key: value for key, value in entry.items() if key != "custom_id"}
        digest = _digest(json.dumps(request, sort_keys=True).encode())
    except RecursionError:
        return Line(number, custom_id, digest, invalid("the line is not JSON: it is nested too deep"))
    except APIError as error:
        return Line(number, custom_id, digest, error)
    return Line(number, custom_id, digest, entry)


def _digest(data: bytes) -> str:
    return f"{zlib.crc32(data):08x}"


def _json_object(raw: Optional[bytes]) -> dict[str, Any]:
    """A line's JSON object. Raises :class:`APIError`."""
    if raw is None:
        raise invalid(f"the line is longer than {MAX_LINE >> 20} MiB")
    try:
        entry = json.loads(raw)
    except ValueError as error:  # UnicodeDecodeError is one
        raise invalid(f"the line is not JSON: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(entry, dict):
        raise invalid(f"the line must hold a JSON object, not {type(entry).__name__}")
    return entry


def id_of(entry: dict[str, Any], number: int) -> str:
    """The line's ``custom_id``, or one made of its number. Raises :class:`APIError`."""
    custom_id = entry.get("custom_id")
    if custom_id is None:
        return f"line-{number}"
    if not isinstance(custom_id, str) or not custom_id:
        raise invalid(f"custom_id is {shown(custom_id)}; it must be a text that is not empty", "custom_id")
    return custom_id


def body_of(entry: dict[str, Any], options: Options, max_model_len: int) -> GenerationRequest:
    """The request body of a line. Raises :class:`APIError` for anything that the HTTP server would not take either."""
    if entry.keys() & {"body", "url", "method"}:
        if unknown := sorted(entry.keys() - LINE):
            raise invalid(f"unknown parameter: {unknown[0][:200]!r}", unknown[0][:100], "unknown_parameter")
        kind, body = URLS.get(str(entry.get("url"))), entry.get("body")
        if kind is None:
            raise invalid(f"url is {shown(entry.get('url'))}; use {' or '.join(URLS)}", "url")
        if entry.get("method", "POST") != "POST":
            raise invalid(f"method is {shown(entry['method'])}; use POST", "method")
    else:
        body = {key: value for key, value in entry.items() if key != "custom_id"}
        kind = ChatCompletionRequest if "messages" in body else CompletionRequest
    if not isinstance(body, dict):
        raise invalid("body must be a JSON object", "body")
    limits.check(body, max_model_len)
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
    """Sampling parameters with a seed made of the line's id where they have none: every run samples the same then."""
    if params.seed is not None or params.greedy:
        return params
    digest = hashlib.blake2b(f"{seed}\0{custom_id}".encode(errors="surrogatepass"), digest_size=8).digest()
    return dataclasses.replace(params, seed=int.from_bytes(digest, "little") >> 1)


def check_same_input(path: str | Path, output: Output, shard: tuple[int, int] = (0, 1)) -> None:
    """Refuse an output that another input's lines were written to.

    Reads the input up to the first line that the output has, which is most often the first line. A pipe, which can be
    read only once, is left to the run.

    Raises:
        ValueError: the output has lines, and none of them is of the input, or of this shard of it.
    """
    if not output.done.ids or not os.path.isfile(path):
        return
    source = Input(path)
    try:
        if any(read_line(number, raw).custom_id in output.done.ids for number, raw in source.lines(shard)):
            return
    finally:
        source.close()
    other, where = ("shard", f"shard {shard[0]}/{shard[1]} of {path}") if shard[1] > 1 else ("input", path)
    raise ValueError(
        f"{output.path} belongs to another {other}: of its {len(output.done.ids)} lines none has the custom_id of a "
        f"line of {where}; name another output file"
    )


# ------------------------------------------------------------------------------------------------------------------ the
# run


class BatchRunner:
    """Runs an engine over the lines of an input that the output does not have yet.

    ``phase`` is asked before every step: ``RUN``, ``DRAIN`` or ``LEAVE``. Tensor-parallel ranks do the same, and the
    first one's phase counts.
    """

    def __init__(
        self, engine: Engine, prompts: Prompts, output: Output, options: Options, phase: Callable[[], int] = lambda: RUN
    ) -> None:
        self.engine, self.prompts, self.output, self.options, self.phase = engine, prompts, output, options, phase
        self.summary = Summary()
        self.ahead = 2 * engine.sizes.max_num_seqs
        """Completions requested at a time: enough for a full cache at every step, however long the input."""
        self._pending: dict[str, _Pending] = {}
        self._unfinished = 0
        self._seen: set[str] = set()
        self._damage: Optional[ValueError] = None

    def run(self, source: Input, progress: Callable[[Summary], None] = lambda summary: None) -> Summary:
        """Complete the lines that are left; what is written stays written.

        Raises:
            ValueError: the input is damaged, or has another request where the output has the answer; all before that
                line is completed.
        """
        began, lines = time.monotonic(), source.lines(self.options.shard)
        summary, more = self.summary, True
        try:
            while True:
                phase = self.engine.broadcast(self.phase())
                while more and phase == RUN and self._unfinished < self.ahead:
                    more = self._take(lines)
                if phase == LEAVE or not self.engine.has_unfinished():
                    break
                for output in self.engine.step():
                    self._take_output(output)
                summary.peak_pages = max(summary.peak_pages, self.engine.stats().pages_used)
                progress(summary)
        finally:
            summary.unfinished, summary.seconds = len(self._pending), time.monotonic() - began
            for name in list(self._pending):
                self._abort(self._pending[name])
        if self._damage is not None:
            raise self._damage
        summary.complete = not more and not summary.unfinished
        if summary.complete:
            summary.strangers = len(self.output.done.ids.keys() - self._seen)
        return summary

    def _take(self, lines: Iterator[tuple[int, Optional[bytes]]]) -> bool:
        """Queue the next line, or write why it cannot be; False at the end of the input."""
        try:
            number, raw = next(lines, (0, None))
        except ValueError as error:
            self._damage = error
            return False
        if not number:
            return False
        line = read_line(number, raw)
        try:
            self._start(line)
        except APIError as error:
            self._fail(line, error)
        except ValueError as error:
            self._damage = error
            return False
        return True

    def _start(self, line: Line) -> None:
        """Queue a line that is not done. Raises :class:`APIError`, and ``ValueError`` for another line that is done."""
        done, custom_id = self.output.done, line.custom_id
        if custom_id in self._seen:
            if (line.number, custom_id) not in done.duplicates:
                raise invalid(f"custom_id {custom_id[:200]!r} is that of an earlier line", "custom_id", DUPLICATE)
            self.summary.skipped += 1
            return
        self._seen.add(custom_id)
        if custom_id in done.ids:
            if done.ids[custom_id] not in ("", line.digest):
                raise ValueError(
                    f"line {line.number} of the input ({custom_id[:200]!r}) is not the request that {self.output.path} "
                    "has a line for: take that line out of it, or name another output file"
                )
            self.summary.skipped += 1
            return
        if isinstance(line.entry, APIError):
            raise line.entry
        self._submit(line, body_of(line.entry, self.options, self.prompts.max_model_len))

    def _submit(self, line: Line, body: GenerationRequest) -> None:
        """Hand all prompts of a line to the engine, or none. Raises :class:`APIError`."""
        params = body.sampling_params(self.prompts.settings.default_sampling_params)
        params = seeded(params, line.custom_id, self.options.seed)
        try:
            requests = self.prompts.requests(body, params, str(line.number))
        except APIError as error:
            raise body.as_sent(error) from None
        for request in requests:
            self.engine.add(request)
        results = [RequestOutput.start(request) for request in requests]
        self._pending[str(line.number)] = _Pending(line, body, results)
        self._unfinished += params.n * len(requests)

    def _take_output(self, output: StepOutput) -> None:
        number, _, prompt = output.request_id.partition("-")
        pending = self._pending.get(number)
        if pending is None:  # another completion of its line has failed
            return
        pending.results[int(prompt)].add(output)
        if output.error is not None:
            self._abort(pending)
            self._fail(pending.line, not_answered(output.error))
        elif all(result.finished for result in pending.results):
            self._forget(pending)
            self._write(pending)

    def _write(self, pending: _Pending) -> None:
        line = pending.line
        name = hashlib.blake2b(line.custom_id.encode(errors="surrogatepass"), digest_size=12).hexdigest()
        prefix = "chatcmpl" if isinstance(pending.body, ChatCompletionRequest) else "cmpl"
        body = response(pending.body, pending.results, self.options.model, self.prompts, f"{prefix}-{name}")
        self.output.write(line.number, line.custom_id, line.digest, 200, body)
        self.summary.completed += 1
        more, usage = usage_of(pending.results), self.summary.usage
        for item in dataclasses.fields(UsageCount):
            setattr(usage, item.name, getattr(usage, item.name) + getattr(more, item.name))

    def _fail(self, line: Line, error: APIError) -> None:
        told = {"code": error.code or error.type, "message": error.message}
        self.output.write(line.number, line.custom_id, line.digest, error.status, error.body(), told)
        self.summary.errors += 1

    def _abort(self, pending: _Pending) -> None:
        self._forget(pending)
        for result in pending.results:
            self.engine.abort(result.request_id)

    def _forget(self, pending: _Pending) -> None:
        del self._pending[str(pending.line.number)]
        self._unfinished -= sum(len(result.outputs) for result in pending.results)
