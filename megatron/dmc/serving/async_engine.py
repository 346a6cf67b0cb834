"""The engine on a thread of its own, and asyncio on the other side: requests go in, streams of outputs come out.

The thread does nothing but run steps and what came in between two of them. All else, the bound on the queue too, lives
on the event loop, so there is no lock but the one around the list of commands.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Optional

from megatron.dmc.inference import Completion, Engine, EngineStats, RequestOutput, SamplingParams, StepOutput
from megatron.dmc.inference.cache import CacheUse
from megatron.dmc.serving.errors import (
    APIError,
    engine_down,
    engine_failed,
    not_answered,
    of_value_error,
    overloaded,
    shutting_down,
)

log = logging.getLogger(__name__)
STATS_EVERY = 0.1  # seconds between two looks at the cache while steps run


@dataclass(frozen=True)
class Request:
    """One prompt for the engine."""

    request_id: str
    prompt: list[int]
    params: SamplingParams
    watch: bool = False
    """Whether every output carries what the answer has in the cache."""


@dataclass(frozen=True)
class Update:
    """News of one answer."""

    prompt: int
    """Which of the stream's requests."""
    output: StepOutput
    use: Optional[CacheUse] = None
    """For watched requests: slots after the step."""


@dataclass(frozen=True)
class Limits:
    """How much may wait. A request is refused when it would not fit beside what waits already. None: no bound."""

    max_num_queued_requests: Optional[int] = None
    """Answers that have been asked for, and have no row in the cache yet."""
    max_num_queued_tokens: Optional[int] = None
    """Tokens of their prompts."""


@dataclass
class Ticket:
    """A place in the queue, taken before the prompt is tokenized."""

    answers: int
    tokens: int


class Stream:
    """Outputs of some requests as they come. Leave it by :meth:`close`: what has not ended is aborted then."""

    def __init__(self, owner: AsyncEngine, requests: Sequence[Request], ticket: Ticket) -> None:
        self.requests, self.arrived = requests, time.monotonic()
        self._owner, self._ticket = owner, ticket
        self._index = {request.request_id: i for i, request in enumerate(requests)}
        self._unfinished = {(request.request_id, i) for request in requests for i in range(request.params.n)}
        self._items: deque[Update] = deque()
        self._error: Optional[APIError] = None
        self._news = asyncio.Event()

    def __aiter__(self) -> AsyncIterator[list[Update]]:
        return self._batches()

    async def _batches(self) -> AsyncIterator[list[Update]]:
        """All that is new at a time, until every answer has ended. Raises :class:`APIError` when one cannot be had."""
        left = len(self._unfinished)
        while left:
            await self._news.wait()
            self._news.clear()
            if self._error is not None:
                raise self._error
            items, self._items = list(self._items), deque()
            left -= sum(item.output.finished for item in items)
            if items:
                yield items

    async def results(self, prompts: Optional[Sequence[Optional[str]]] = None) -> list[RequestOutput]:
        """The whole answers. Raises :class:`APIError`."""
        found = []
        for i, request in enumerate(self.requests):
            params, text = request.params, prompts[i] if prompts else None
            answers = [Completion(n, logprobs=None if params.logprobs is None else []) for n in range(params.n)]
            kept = None if params.prompt_logprobs is None else []
            found.append(RequestOutput(request.request_id, text, request.prompt, answers, kept))
        async for updates in self:
            for update in updates:
                found[update.prompt].add(update.output)
        return found

    def request(self, request_id: str) -> Request:
        return self.requests[self._index[request_id]]

    def close(self) -> None:
        """May be called twice, and after the end."""
        self._owner._leave(self)

    # Called on the event loop by the engine's side.

    def _put(self, output: StepOutput, use: Optional[CacheUse]) -> None:
        if output.finished:
            self._unfinished.discard((output.request_id, output.index))
        if output.error is not None:
            self._fail(not_answered(output.error))
            return
        self._items.append(Update(self._index[output.request_id], output, use))
        self._news.set()

    def _fail(self, error: APIError) -> None:
        self._error = self._error or error
        self._news.set()


@dataclass
class _Delivery:
    """What one turn of the thread has for the event loop."""

    outputs: list[tuple[StepOutput, Optional[CacheUse]]] = field(default_factory=list)
    started: list[tuple[str, int]] = field(default_factory=list)
    refused: list[tuple[str, APIError]] = field(default_factory=list)


Observer = Callable[[Stream, StepOutput], None]


class AsyncEngine:
    """Drives an engine. Make it on the event loop that uses it.

    ``observe`` is called on the event loop with every output, before its stream sees it, and when an answer is left.
    """

    def __init__(self, engine: Engine, limits: Limits = Limits(), observe: Optional[Observer] = None) -> None:
        self.engine, self.limits, self.observe = engine, limits, observe
        self.failure: Optional[BaseException] = None
        self.stats: EngineStats = engine.stats()
        """At most a moment old."""
        self.queued_answers = self.queued_tokens = 0
        self._streams: dict[str, Stream] = {}
        self._waiting: dict[tuple[str, int], Ticket] = {}
        self._calls: set[Future[Any]] = set()
        self._loop = asyncio.get_running_loop()
        self._commands: deque[Callable[[], None]] = deque()
        self._something = threading.Condition()
        self._stopping = False
        # Only the thread uses these.
        self._watched: set[str] = set()
        self._unstarted: set[tuple[str, int]] = set()
        self._news = _Delivery()
        self._looked = 0.0
        self._dead = False
        self._thread = threading.Thread(target=self._run, name="dmc-engine", daemon=True)
        self._thread.start()

    # ------------------------------------------------------------------------------------------------ on the event loop

    @property
    def unfinished(self) -> int:
        """Requests that have not ended."""
        return len(self._streams)

    def reserve(self, answers: int, tokens: int) -> Ticket:
        """A place in the queue, to be handed to :meth:`submit` or back to :meth:`release`.

        ``tokens`` may be a guess while the prompt is text. Raises :class:`APIError` (503) when the queue is full, or
        the engine is down; 400 when the request alone is more than the queue may ever hold.
        """
        if self.failure is not None:
            raise engine_down()
        for what, asked, held, most in (
            ("requests", answers, self.queued_answers, self.limits.max_num_queued_requests),
            ("prompt tokens", tokens, self.queued_tokens, self.limits.max_num_queued_tokens),
        ):
            if most is not None and held and asked + held > most:
                raise overloaded(f"{held} {what} are waiting, and at most {most} may; try again later")
        most = self.limits.max_num_queued_requests
        if most is not None and answers > max(most, 1):
            message = f"the request asks for {answers} answers; {most} may wait at a time"
            raise APIError(400, message, param="n", code="too_many_answers")
        self.queued_answers += answers
        self.queued_tokens += tokens
        return Ticket(answers, tokens)

    def release(self, ticket: Ticket) -> None:
        """Give back what is left of a place."""
        self.queued_answers -= ticket.answers
        self.queued_tokens -= ticket.tokens
        ticket.answers = ticket.tokens = 0

    def submit(self, requests: Sequence[Request], ticket: Optional[Ticket] = None) -> Stream:
        """Hand requests to the engine; returns at once. Raises :class:`APIError` when the engine is down, or the queue
        full.
        """
        answers = sum(request.params.n for request in requests)
        tokens = sum(len(request.prompt) * request.params.n for request in requests)
        if ticket is None:
            ticket = self.reserve(answers, tokens)
        elif self.failure is not None:
            self.release(ticket)
            raise engine_down()
        self.queued_answers += answers - ticket.answers
        self.queued_tokens += tokens - ticket.tokens
        ticket.answers, ticket.tokens = answers, tokens
        stream = Stream(self, requests, ticket)
        for request in requests:
            self._streams[request.request_id] = stream
            for index in range(request.params.n):
                self._waiting[request.request_id, index] = Ticket(1, len(request.prompt))
        self._command(lambda: self._add(requests))
        return stream

    def _leave(self, stream: Stream) -> None:
        names = [
            request.request_id for request in stream.requests if self._streams.pop(request.request_id, None) is not None
        ]
        self.release(stream._ticket)
        for name, index in stream._unfinished:
            self._waiting.pop((name, index), None)
            if names and self.observe is not None:
                self.observe(stream, StepOutput(name, index, finish_reason="error" if self.failure else "abort"))
        if stream._unfinished and names and self.failure is None:
            self._command(lambda: self._abort(names))

    def fail(self, error: APIError) -> None:
        """End all requests with ``error``, for those who wait for them."""
        for stream in list(self._streams.values()):
            stream._fail(error)

    def broken(self, error: BaseException) -> None:
        """The engine cannot go on, for a reason that it does not see itself."""
        if self.failure is None:
            self.failure = error
            log.critical("the engine has failed; running requests are answered 500, /health 503", exc_info=error)
            self._failed()

    async def call(self, function: Callable[[Engine], Any]) -> Any:
        """``function(engine)`` between two steps, on the engine's thread.
        Raises what it raises, and :class:`APIError`.
        """
        if self.failure is not None:
            raise engine_down()
        future: Future[Any] = Future()

        def run() -> None:
            try:
                future.set_result(function(self.engine))
            except Exception as error:
                future.set_exception(error)

        self._calls.add(future)
        self._command(run)
        try:
            return await asyncio.wrap_future(future)
        finally:
            self._calls.discard(future)

    async def stop(self) -> None:
        """End what runs, and the thread."""
        self.fail(shutting_down())
        with self._something:
            self._stopping = True
            self._something.notify()
        # A step may wait for ever when another rank is gone.
        await asyncio.to_thread(self._thread.join, None if self.failure is None else 1.0)

    def _command(self, command: Callable[[], None]) -> None:
        with self._something:
            self._commands.append(command)
            self._something.notify()

    def _deliver(self, news: _Delivery) -> None:
        for key in news.started:
            self._started(key)
        for name, error in news.refused:
            if name in self._streams:
                self._streams[name]._fail(error)
        for output, use in news.outputs:
            stream = self._streams.get(output.request_id)
            if stream is None:
                continue  # nobody waits for it any more
            if output.finished:
                self._started((output.request_id, output.index))
            if self.observe is not None:
                self.observe(stream, output)
            stream._put(output, use)

    def _started(self, key: tuple[str, int]) -> None:
        """An answer does not wait any more: its place in the queue is free."""
        share, stream = self._waiting.pop(key, None), self._streams.get(key[0])
        if share is not None and stream is not None:
            stream._ticket.answers -= share.answers
            stream._ticket.tokens -= share.tokens
            self.release(share)

    def _failed(self) -> None:
        self.fail(engine_failed())
        for future in self._calls:
            if not future.done():
                future.set_exception(engine_down())

    # ------------------------------------------------------------------------------------------- on the engine's thread

    def _run(self) -> None:
        try:
            while self._wait():
                self._turn()
        except BaseException as error:
            self._hand_over()
            self._to_loop(self.broken, error)
            self._dead = True
        finally:
            for name in list(self.engine._requests) if not self._dead else ():
                self.engine.abort(name)

    def _wait(self) -> bool:
        """Until there is something to do; False when it is time to stop."""
        with self._something:
            while not (self._commands or self._stopping or self.engine.has_unfinished()):
                self._something.wait()
            return not self._stopping

    def _turn(self) -> None:
        with self._something:
            commands, self._commands = self._commands, deque()
        for command in commands:
            command()
        if self.engine.has_unfinished():
            outputs = self.engine.step()
            uses = self._uses()
            self._news.outputs += [(output, uses.get((output.request_id, output.index))) for output in outputs]
        now = time.monotonic()
        if now - self._looked > STATS_EVERY or not self.engine.has_unfinished():
            self.stats, self._looked = self.engine.stats(), now
        self._hand_over()

    def _uses(self) -> dict[tuple[str, int], CacheUse]:
        """Of watched answers; and notes which answers have started."""
        found = {}
        if self._unstarted or self._watched:
            for sequence in self.engine.scheduler.running:
                key = (sequence.request_id, sequence.index)
                if key in self._unstarted and sequence.started is not None:
                    self._unstarted.discard(key)
                    self._news.started.append(key)
                if sequence.request_id in self._watched and sequence.row is not None:
                    found[key] = self.engine.cache.use(sequence.row)
        return found

    def _add(self, requests: Sequence[Request]) -> None:
        for request in requests:
            try:
                self.engine.add_request(request.request_id, request.prompt, request.params)
            except ValueError as error:
                self._news.refused.append((request.request_id, of_value_error(error)))
                continue
            self._unstarted |= {(request.request_id, index) for index in range(request.params.n)}
            if request.watch:
                self._watched.add(request.request_id)

    def _abort(self, names: Sequence[str]) -> None:
        for name in names:
            self._forget(self.engine.abort(name))

    def _forget(self, outputs: Iterable[StepOutput]) -> None:
        """Those that have ended are not followed any more."""
        for output in outputs:
            if output.finished:
                self._unstarted.discard((output.request_id, output.index))
                if output.request_id not in self.engine._requests:
                    self._watched.discard(output.request_id)

    def _hand_over(self) -> None:
        news = self._news
        if not (news.outputs or news.started or news.refused):
            return
        self._news = _Delivery()
        self._forget(output for output, _ in news.outputs)
        self._to_loop(self._deliver, news)

    def _to_loop(self, function: Callable[..., None], *args: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is there
            self._loop.call_soon_threadsafe(function, *args)
