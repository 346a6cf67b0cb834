"""The engine on a thread of its own, driven from asyncio: requests go in, streams of outputs come out.

The thread runs steps, and between two of them the commands that came in. All else, the bound on the queue too, lives on
the event loop, so the only lock is the one around the list of commands.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Optional

from megatron.dmc.inference import Engine, EngineStats, InvalidRequest, Request, RequestOutput, StepOutput
from megatron.dmc.serving.errors import (
    APIError,
    engine_down,
    engine_failed,
    not_answered,
    of_invalid_request,
    overloaded,
    shutting_down,
)

log = logging.getLogger(__name__)
LAST_STEP = 10.0  # seconds for the running step when the engine stops
HAND_OVER = 1e-3
"""Seconds for which the next step waits, at most, until the tokens of the last one have gone out, on a CPU.

A step computes on all cores, and threads that run beside it make all of them wait: longer than it takes to send the
tokens while nothing else runs.
"""
STATS_EVERY = 0.1  # seconds between two looks at the cache while steps run


class Update(NamedTuple):
    """One output of a stream."""

    prompt: int
    """Index of the request within the stream."""
    output: StepOutput


@dataclass(frozen=True)
class Limits:
    """Bounds on the queue. A request is refused when it does not fit beside what waits already. None means no bound."""

    max_num_queued_requests: Optional[int] = None
    """Most completions that wait for a row of the cache."""
    max_num_queued_tokens: Optional[int] = None
    """Most prompt tokens of waiting completions."""


@dataclass
class QueuePlace:
    """A reserved place in the queue, taken before the prompt is tokenized."""

    completions: int
    tokens: int
    """Prompt tokens, counted once for every completion."""


class Stream:
    """Outputs of some requests as they come, in batches. :meth:`close` must be called: what has not ended is aborted
    then.
    """

    def __init__(self, owner: AsyncEngine, requests: Sequence[Request], place: QueuePlace) -> None:
        self.requests, self.arrived = requests, time.monotonic()
        self._owner, self._place = owner, place
        self._index = {request.request_id: i for i, request in enumerate(requests)}
        self._unfinished = {(request.request_id, i) for request in requests for i in range(request.sampling_params.n)}
        self._left = len(self._unfinished)
        self._items: list[Update] = []
        self._error: Optional[APIError] = None
        self._waiter: Optional[asyncio.Future[None]] = None
        """Set by the one who waits for news."""
        self._wakes_for_ends_only = False

    @property
    def ended(self) -> bool:
        """Whether every choice of the request has ended, so that no further update comes."""
        return not self._left

    def __aiter__(self) -> AsyncIterator[list[Update]]:
        return self

    async def __anext__(self) -> list[Update]:
        """Updates since the last call, until every completion has ended. Raises :class:`APIError` when a request
        fails.
        """
        if self.ended:
            raise StopAsyncIteration
        if not self._items and self._error is None:
            self._waiter = self._owner.loop.create_future()
            await self._waiter
        if self._error is not None:
            raise self._error
        items, self._items = self._items, []
        self._left -= sum(update.output.finish_reason is not None for update in items)
        return items

    async def results(self) -> list[RequestOutput]:
        """The finished outputs of all requests. Raises :class:`APIError`."""
        self._wakes_for_ends_only = True
        found = [RequestOutput.start(request) for request in self.requests]
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

    def _put(self, output: StepOutput) -> None:
        if output.finished:
            self._unfinished.discard((output.request_id, output.index))
        if output.error is not None:
            self._fail(not_answered(output.error))
            return
        self._items.append(Update(self._index[output.request_id], output))
        if output.finished or not self._wakes_for_ends_only:
            self._wake()

    def _fail(self, error: APIError) -> None:
        self._error = self._error or error
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None:
            if not self._waiter.done():  # else there was news before, or the one who waited has left
                self._waiter.set_result(None)
            self._waiter = None


@dataclass
class _Delivery:
    """News of one turn of the engine's thread for the event loop."""

    outputs: list[StepOutput] = field(default_factory=list)
    refused: list[tuple[str, APIError]] = field(default_factory=list)


Observer = Callable[[Sequence[tuple[Stream, StepOutput]]], None]


class AsyncEngine:
    """Drives an engine. Make it on the event loop that uses it.

    ``observe`` is called on the event loop with the outputs of every step, soon after their streams have been woken,
    and with the ends of completions that are aborted.
    """

    def __init__(self, engine: Engine, limits: Limits = Limits(), observe: Optional[Observer] = None) -> None:
        self.engine, self.limits, self.observe = engine, limits, observe
        self.failure: Optional[BaseException] = None
        self.stats: EngineStats = engine.stats()
        """At most a moment old."""
        self.queued_completions = self.queued_tokens = 0
        self._streams: dict[str, Stream] = {}
        self._waiting: dict[tuple[str, int], QueuePlace] = {}
        self._calls: set[Future[Any]] = set()
        self.loop = asyncio.get_running_loop()
        self._commands: deque[Callable[[], None]] = deque()
        self._something = threading.Condition()
        self._stopping = False
        self._on_cpu = engine.device.type == "cpu"
        self._gone_out = threading.Event()
        # Only the thread uses these.
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

    def reserve(self, completions: int, tokens: int) -> QueuePlace:
        """Reserve a place in the queue, for :meth:`submit` or :meth:`release`.

        Args:
            completions: of all prompts.
            tokens: prompt tokens, counted once for every completion; an estimate while the prompt is text.

        Raises:
            APIError: 503 when the queue is full or the engine is down; 400 when the request alone is more than the
                queue may ever hold.
        """
        if self.failure is not None:
            raise engine_down()
        for what, asked, held, most in (
            ("requests", completions, self.queued_completions, self.limits.max_num_queued_requests),
            ("prompt tokens", tokens, self.queued_tokens, self.limits.max_num_queued_tokens),
        ):
            if most is not None and held and asked + held > most:
                raise overloaded(f"{held} {what} are waiting, and at most {most} may; try again later")
        most = self.limits.max_num_queued_requests
        if most is not None and completions > max(most, 1):
            message = f"the request asks for {completions} completions; {most} may wait at a time"
            raise APIError(400, message, param="n", code="too_many_answers")
        self.queued_completions += completions
        self.queued_tokens += tokens
        return QueuePlace(completions, tokens)

    def release(self, place: QueuePlace) -> None:
        """Give back what is left of a place in the queue."""
        self.queued_completions -= place.completions
        self.queued_tokens -= place.tokens
        place.completions = place.tokens = 0

    def submit(self, requests: Sequence[Request], place: Optional[QueuePlace] = None) -> Stream:
        """Hand requests to the engine; returns at once.

        Raises:
            APIError: the engine is down, or the queue is full.
        """
        completions = sum(request.sampling_params.n for request in requests)
        tokens = sum(len(request.prompt_token_ids) * request.sampling_params.n for request in requests)
        if place is None:
            place = self.reserve(completions, tokens)
        elif self.failure is not None:
            self.release(place)
            raise engine_down()
        self.queued_completions += completions - place.completions
        self.queued_tokens += tokens - place.tokens
        place.completions, place.tokens = completions, tokens
        stream = Stream(self, requests, place)
        for request in requests:
            self._streams[request.request_id] = stream
            for index in range(request.sampling_params.n):
                self._waiting[request.request_id, index] = QueuePlace(1, len(request.prompt_token_ids))
        self._command(lambda: self._add(requests))
        return stream

    def _leave(self, stream: Stream) -> None:
        names = [
            request.request_id for request in stream.requests if self._streams.pop(request.request_id, None) is not None
        ]
        self.release(stream._place)
        for key in stream._unfinished:
            self._waiting.pop(key, None)
        if names:
            reason = "error" if self.failure else "abort"
            self._observe([(stream, StepOutput(*key, finish_reason=reason)) for key in stream._unfinished])
        if stream._unfinished and names and self.failure is None:
            self._command(lambda: [self.engine.abort(name) for name in names])

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
        """End what runs, and the thread. A step that does not end makes the engine one that has failed."""
        self.fail(shutting_down())
        with self._something:
            self._stopping = True
            self._something.notify()
        # A step may wait for ever when another rank is gone or hangs.
        await asyncio.to_thread(self._thread.join, LAST_STEP if self.failure is None else 1.0)
        if self._thread.is_alive() and self.failure is None:
            self.failure = TimeoutError(f"a step did not end within {LAST_STEP:g} s")
            log.critical("the engine hangs: %s", self.failure)

    def _command(self, command: Callable[[], None]) -> None:
        with self._something:
            self._commands.append(command)
            self._something.notify()

    def _deliver(self, news: _Delivery) -> None:
        for name, error in news.refused:
            if name in self._streams:
                self._streams[name]._fail(error)
        given = []
        for output in news.outputs:
            stream = self._streams.get(output.request_id)
            if stream is None:
                continue  # nobody waits for it any more
            if self._waiting:
                self._leave_queue(stream, (output.request_id, output.index))
            if output.tokens or output.finished:  # else it says that the sequence was scheduled
                given.append((stream, output))
        for stream, output in given:
            stream._put(output)
        self._observe(given)
        if self._on_cpu:  # after the streams, which have been woken, and after what uvloop writes once they have run
            self.loop.call_soon(self.loop.call_soon, self._gone_out.set)

    def _observe(self, outputs: list[tuple[Stream, StepOutput]]) -> None:
        """Have outputs counted once the streams that were woken before have gone on: a client waits for these."""
        if self.observe is not None and outputs:
            self.loop.call_soon(self.observe, outputs)

    def _leave_queue(self, stream: Stream, key: tuple[str, int]) -> None:
        """Free the queue's place of a completion that has been scheduled."""
        share = self._waiting.pop(key, None)
        if share is not None:
            stream._place.completions -= share.completions
            stream._place.tokens -= share.tokens
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
            if not self._dead:
                self.engine.abort_all()

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
            self._news.outputs += self.engine.step()
        now = time.monotonic()
        if now - self._looked > STATS_EVERY or not self.engine.has_unfinished():
            self.stats, self._looked = self.engine.stats(), now
        self._hand_over()

    def _add(self, requests: Sequence[Request]) -> None:
        for request in requests:
            try:
                self.engine.add(request)
            except InvalidRequest as error:
                self._news.refused.append((request.request_id, of_invalid_request(error)))

    def _hand_over(self) -> None:
        news = self._news
        if news.outputs or news.refused:
            self._news = _Delivery()
            self._gone_out.clear()
            self._to_loop(self._deliver, news)
            if self._on_cpu:
                self._gone_out.wait(HAND_OVER)

    def _to_loop(self, function: Callable[..., None], *args: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is there
            self.loop.call_soon_threadsafe(function, *args)
