"""Process of ``dmc serve``: a bound port, an engine, uvicorn, and a shutdown in which every request gets a response."""

import asyncio
import contextlib
import copy
import functools
import gc
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import Future
from typing import Any, Optional, TypeVar

import uvicorn
from uvicorn.loops.auto import auto_loop_factory

from megatron.dmc.checkpoint.mapping import COMPRESSED_STAGES
from megatron.dmc.inference import Engine, EngineConfig, InvalidRequest, SamplingParams
from megatron.dmc.inference.text import load_tokenizer
from megatron.dmc.inference.weights import ModelInfo
from megatron.dmc.serving import template_process
from megatron.dmc.serving.app import Service, create_app
from megatron.dmc.serving.async_engine import AsyncEngine, Limits
from megatron.dmc.serving.bodies import BodyLimits, default_max_body_bytes
from megatron.dmc.serving.config import ServerConfig
from megatron.dmc.serving.connection import Connection, ConnectionLimits
from megatron.dmc.serving.errors import shutting_down
from megatron.dmc.serving.http_config import HTTPConfig
from megatron.dmc.serving.metrics import Metrics
from megatron.dmc.serving.middleware import Gate, Keys
from megatron.dmc.serving.prompts import Prompts, PromptSettings
from megatron.dmc.serving.protocol import Compression
from megatron.dmc.serving.ranks import Followers, LeadingEngine, check_size, follow

T = TypeVar("T")
EngineT = TypeVar("EngineT", bound=Engine)
log = logging.getLogger(__name__)
LINGER = 0.25  # seconds in which requests that are on their way are still answered 503
BACKLOG = 512  # connections that the kernel holds until they are accepted
TOKENIZER_PATHS = frozenset({"/tokenize", "/detokenize"})
SWITCH = 5e-4  # seconds; Python's default of 5 ms would let the tokens of a busy server arrive in bursts
CLOSE = 5  # seconds for the last bytes of responses
HANGS = 20  # seconds after these in which threads and other ranks must end


class Server(uvicorn.Server):
    """uvicorn server that finishes running requests on SIGTERM or SIGINT, and gives them up on a second signal.

    Args:
        timeout: seconds for running requests to finish.
        on_hang: called on a thread of its own when the process should have ended, but has not.
    """

    def __init__(
        self, config: uvicorn.Config, service: Service, timeout: float, on_hang: Optional[Callable[[], None]] = None
    ) -> None:
        super().__init__(config)
        self.service, self.timeout, self.on_hang = service, timeout, on_hang
        self._draining: asyncio.Task[None] | None = None
        self._give_up = False

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle signals without raising them again at the end, as uvicorn does, so that the process exits with 0."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                asyncio.get_running_loop().add_signal_handler(number, self.stop)
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start uvicorn and log the addresses."""
        await super().startup(sockets)
        scheme = "https" if self.config.is_ssl else "http"
        for sock in sockets or ():
            host, port = sock.getsockname()[:2]
            host = f"[{host}]" if ":" in host else host
            log.info("serving %s on %s://%s:%d", self.service.model_name, scheme, host, port)

    def stop(self) -> None:
        """Begin the shutdown, or end it when it has begun."""
        if self.on_hang is not None:
            seconds = CLOSE + HANGS + (self.timeout if self._draining is None else 0)
            timer = threading.Timer(seconds, self.on_hang)
            timer.daemon = True
            timer.start()
        if self._draining is None:
            self._draining = asyncio.get_running_loop().create_task(self._drain())
        else:
            self._give_up = True

    async def _drain(self) -> None:
        gate, runner = self.service.gate, self.service.runner
        log.info("shutting down: up to %g s to finish %d requests", self.timeout, gate.in_flight)
        gate.draining = True
        for server in getattr(self, "servers", ()):
            server.close()
        began, passed = time.monotonic(), 0.0
        while (gate.in_flight or passed < LINGER) and not self._give_up and passed < self.timeout:
            await asyncio.sleep(0.02)
            passed = time.monotonic() - began
        if gate.in_flight:
            log.warning("%d requests are not finished after %.1f s; they are answered 503", gate.in_flight, passed)
            runner.fail(shutting_down())
        self.should_exit = True


def listen(host: str, port: int) -> socket.socket:
    """Socket that listens on a port, before the model is loaded, so that a second server on it fails at once.

    Connections made while the model is loaded wait in the backlog. Raises ``ValueError``.
    """
    if not 0 <= port < 65536:
        raise ValueError(f"--port is {port}; it must be 0 to 65535")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio sets TCP_NODELAY only on sockets whose protocol is IPPROTO_TCP; accepted ones take it from this one.
    made = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        made.bind((host, port))
        made.listen(BACKLOG)
    except OSError as error:
        made.close()
        raise ValueError(f"cannot listen on {host} port {port}: {error.strerror or error}") from None
    return made


def make_service(
    engine: Engine,
    *,
    model_name: str,
    aliases: Sequence[str] = (),
    prompt_settings: Optional[PromptSettings] = None,
    open_tokenizer: bool = False,
    keys: Sequence[str] = (),
    limits: Limits = Limits(),
    max_body_bytes: Optional[int] = None,
    metrics_prefix: str = "dmc",
    timeout_body: float = 20.0,
    log_requests: bool = False,
) -> Service:
    """Service around an engine, with everything that the application needs. Call it on the event loop.

    Args:
        aliases: further names of the model.
        open_tokenizer: answer the tokenizer's endpoints without an API key.
    """
    max_model_len = engine.sizes.max_model_len
    metrics = Metrics(metrics_prefix, model_name, max_model_len)
    runner = AsyncEngine(engine, limits, metrics.observe)
    metrics.watch(runner)
    most = default_max_body_bytes(max_model_len) if max_body_bytes is None else max_body_bytes
    # The engine's thread detokenizes with the original.
    tokenizer = template_process.bounded(copy.deepcopy(engine.tokenizer), 2 * most)
    prompts = Prompts(engine.input_processor.with_tokenizer(tokenizer), prompt_settings)
    _prepare_grammars(engine)
    gate = Gate(Keys(keys), BodyLimits(most, timeout_body, memory=max(64 << 20, 4 * most)), log_requests=log_requests)
    gate.open_paths = TOKENIZER_PATHS if open_tokenizer else frozenset()
    root, compression = str(engine.info.path), compression_of(engine.info)
    quantization = engine.quantization
    return Service(runner, prompts, model_name, root, gate, metrics, tuple(aliases), compression, quantization)


def compression_of(info: ModelInfo) -> Optional[Compression]:
    """Description of a model's compression for its clients; None for one that keeps a slot for every token."""
    dmc = info.dmc
    if dmc is None or info.stage not in COMPRESSED_STAGES:
        return None
    names = ("method", "window", "decision_source", "decision_about", "decision_per")
    return Compression(**{name: getattr(dmc, name) for name in names}, expected_ratio=info.expected_cr)


def _prepare_grammars(engine: Engine) -> None:
    """Read the vocabulary for structured outputs now: later it would hold all other threads up for a second."""
    try:
        engine.input_processor.grammars.load()
    except InvalidRequest as error:
        log.info("%s", error)


def make_server(
    service: Service, timeout: float, http: HTTPConfig = HTTPConfig(), on_hang: Optional[Callable[[], None]] = None
) -> Server:
    """Server of a service, with the settings of its connections. For the others see :class:`Server`."""
    limits = ConnectionLimits(http.raise_file_limit(), http.timeout_header)
    config = uvicorn.Config(
        create_app(service, http),
        http=functools.partial(Connection, limits=limits, refused=service.metrics.refused),  # type: ignore[arg-type]
        ws="none",
        log_config=None,
        access_log=False,  # the gate writes it, with the request's id
        lifespan="off",
        timeout_graceful_shutdown=CLOSE,
        timeout_keep_alive=http.timeout_keep_alive,  # type: ignore[arg-type]
        backlog=BACKLOG,
        server_header=False,
        proxy_headers=bool(http.forwarded_allow_ips),
        forwarded_allow_ips=http.forwarded_allow_ips,
        root_path=http.root_path,
        ssl_keyfile=http.ssl_keyfile,
        ssl_certfile=http.ssl_certfile,
        ssl_ca_certs=None if http.ssl_ca_certs is None else str(http.ssl_ca_certs),
        ssl_cert_reqs=http.ssl_cert_reqs,
    )
    return Server(config, service, timeout, on_hang)


async def serve(
    engine: Engine,
    settings: ServerConfig,
    http: HTTPConfig,
    prompt_settings: PromptSettings,
    sock: socket.socket,
    followers: Optional[Followers] = None,
) -> int:
    """Serve until a signal comes. Returns the exit status: 0, or 1 when the engine has failed."""
    keys, names = settings.keys(), settings.served_model_name or [settings.model]
    service = make_service(
        engine,
        model_name=names[0],
        aliases=names[1:],
        prompt_settings=prompt_settings,
        open_tokenizer=settings.open_tokenizer,
        keys=keys,
        limits=Limits(settings.max_num_queued_requests, settings.max_num_queued_tokens),
        max_body_bytes=settings.max_body_bytes,
        metrics_prefix=settings.metrics_prefix,
        timeout_body=http.timeout_body,
        log_requests=not settings.disable_access_log,
    )
    server = make_server(service, settings.shutdown_timeout, http, lambda: _end_by_force(followers))
    log.info("%d keys, %s, event loop of %s", len(keys), _pool(engine), type(service.runner.loop).__module__)
    log.info("%s weights, %s", str(engine.model.dtype).removeprefix("torch."), engine.model.forms())
    if getattr(engine.tokenizer, "chat_template", None):
        threading.Thread(target=template_process.shared().start, daemon=True).start()
    watching = asyncio.create_task(_watch(followers, service.runner)) if followers is not None else None
    # What is loaded now stays: a full collection would look at all of it, for a tenth of a second, during requests.
    gc.collect()
    gc.freeze()
    # Every write to a socket gives up the interpreter's lock, and waits this long for it while the engine runs Python.
    sys.setswitchinterval(SWITCH)
    try:
        await server.serve([sock])
    finally:
        if watching is not None:
            watching.cancel()
        await service.runner.stop()
        service.close()
        template_process.shared().close()
    log.info("stopped")
    return int(service.runner.failure is not None)


def _end_by_force(followers: Optional[Followers]) -> None:
    """End the process, which hangs: a rank that does not answer, a step or a library that does not return."""
    log.critical("the shutdown hangs; the process is ended by force")
    if followers is not None:
        followers.kill()
    os._exit(1)


def load(make: Callable[[], EngineT]) -> EngineT:
    """Make an engine and warm it up, on a thread that ends with that. Raises what ``make`` raises.

    OpenMP keeps workers for every thread that has computed, until that thread ends. With those of the engine's own
    thread there would be more of them than cores; libgomp's then no longer wait for the next product but sleep after
    each one, some hundred times in a step, and may wake up on one core.
    """
    made: Future[EngineT] = Future()

    def run() -> None:
        try:
            engine = make()
            warm_up(engine)
            made.set_result(engine)
        except BaseException as error:
            made.set_exception(error)

    thread = threading.Thread(target=run, name="dmc-load", daemon=True)  # Ctrl+C does not wait for it
    thread.start()
    engine = made.result()
    thread.join()
    return engine


def warm_up(engine: Engine) -> None:
    """Run one prefill and one decode step, so that kernels are built and loaded before the first request."""
    prompt = [0] * min(3, engine.sizes.max_model_len - 2)
    engine.add_request("warm-up", prompt, SamplingParams(temperature=0, max_tokens=2, ignore_eos=True))
    while engine.has_unfinished():
        for output in engine.step():
            if output.error is not None:
                raise ValueError(f"the model cannot generate: {output.error}")


async def _watch(followers: Followers, runner: AsyncEngine) -> None:
    """Fail the engine when a rank ends, since its step would wait for that rank for ever."""
    while not followers.ended():
        await asyncio.sleep(1)
    runner.broken(RuntimeError("a tensor-parallel rank has ended"))


def _pool(engine: Engine) -> str:
    sizes, cache = engine.sizes, engine.cache
    stored = str(cache.state.k_pages.dtype).removeprefix("torch.")
    token = cache.slot_bytes * cache.heads * engine.parallel.size
    return (
        f"{sizes.max_num_seqs} sequences at a time, context length {sizes.max_model_len}, {sizes.num_pages} pages of "
        f"{sizes.page_bytes} bytes ({stored}, {token} bytes per uncompressed token), expected compression ratio "
        f"{engine.info.expected_cr:g}"
    )


def run(settings: ServerConfig, http: HTTPConfig, config: EngineConfig) -> int:
    """Run ``dmc serve``. Returns the exit status; raises ``ValueError`` for a wrong setting or model."""
    logging.basicConfig(level=settings.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    source = settings.tokenizer or settings.model
    if int(os.environ.get("RANK", 0)) > 0:  # torchrun's
        follow(settings.model, config, source)
        return 0
    prompt_settings = PromptSettings.read(
        settings.model,
        settings.chat_template,
        settings.generation_config,
        settings.override_generation_config,
        settings.trust_request_chat_template,
        settings.auto_tool_call_parser(),
    )
    with contextlib.closing(listen(settings.host, settings.port)) as sock:
        tokenizer = load_tokenizer(source)
        if config.tensor_parallel_size == 1:
            engine = load(lambda: Engine(settings.model, config, tokenizer))
            return run_on_loop(serve(engine, settings, http, prompt_settings, sock))
        return _run_ranks(settings, http, prompt_settings, sock, config, tokenizer)


def run_on_loop(main: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine to its end on uvloop, or on asyncio's own event loop where that is not installed.

    uvloop takes less CPU time for a token, and keeps the interpreter's lock while it writes to a socket. asyncio gives
    it up, which wakes the engine's thread for every token.
    """
    with asyncio.Runner(loop_factory=auto_loop_factory()) as runner:
        return runner.run(main)


def _run_ranks(
    settings: ServerConfig,
    http: HTTPConfig,
    prompt_settings: PromptSettings,
    sock: socket.socket,
    config: EngineConfig,
    tokenizer: Any,
) -> int:
    check_size(settings.model, config)  # before others wait for this rank
    followers = Followers(settings.model, config, settings.tokenizer or settings.model)
    try:
        engine = load(lambda: LeadingEngine(settings.model, config, tokenizer))
        status = run_on_loop(serve(engine, settings, http, prompt_settings, sock, followers))
        if status == 0:
            engine.release()
        return status
    except BaseException:
        status = 1
        raise
    finally:
        followers.stop(10 if status == 0 else 0)
