"""A small model with a tokenizer and a chat template, and what the tests of the serving side share."""

from __future__ import annotations

import asyncio
import http.client
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

from helpers.engines import Model, all_back
from helpers.processes import PATIENCE

from megatron.dmc.inference import Engine, EngineConfig
from megatron.dmc.inference.input_processor import InputProcessor
from megatron.dmc.inference.text import load_tokenizer
from megatron.dmc.serving.async_engine import Limits
from megatron.dmc.serving.http_config import HTTPConfig
from megatron.dmc.serving.middleware import GateMiddleware
from megatron.dmc.serving.prompts import Prompts, PromptSettings
from megatron.dmc.serving.server import listen, make_server, make_service, run_on_loop

if TYPE_CHECKING:
    from openai import OpenAI

EOS = 60
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
GREEDY = {"temperature": 0, "max_tokens": 12}
IGNORE = {"ignore_eos": True}
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('no role ' + m.role) }}{% endif %}{{ m.role[0] + ':' + m.content + ';' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'a:' }}{% endif %}"
)


def add_tokenizer(directory: Path, template: str | None = TEMPLATE) -> None:
    """A byte-level tokenizer of 61 tokens: letters and some signs, the two bytes of an umlaut, space, BOS 59 and EOS
    60.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    characters = [*"abcdefghijklmnopqrstuvwxyz", *"ABCDEFGHIJ", *"0123456789", *".,:;!?()-+"]
    plain = [*characters, "Ã", "¼", "Ġ"]  # 0xC3 0xBC is an umlaut
    assert len(plain) == 59
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(plain)} | {"<s>": 59, "</s>": EOS}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 59)])
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (directory / "tokenizer_config.json").write_text(
        json.dumps(config | ({"chat_template": template} if template else {}))
    )


def make_model(directory: Path, case: str = "half") -> Model:
    made = Model(directory, case)
    add_tokenizer(directory)
    return made


def make_prompts(
    tokenizer: object, vocab_size: int, max_model_len: int, settings: PromptSettings | None = None
) -> Prompts:
    """Prompts as a server with an endless cache makes them."""
    cache = SimpleNamespace(num_pages=1, pages_at=lambda tokens, compression_ratio: 1)
    return Prompts(InputProcessor(tokenizer, vocab_size, max_model_len, cache, 1.0, "the model"), settings)


def until(true: Callable[[], object], seconds: float = PATIENCE) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it has not come true"
        time.sleep(0.005)


class Running:
    """A server in a thread of this process, on a free port of the loopback; ``service`` and ``engine`` can be looked
    into.
    """

    def __init__(
        self,
        path: str,
        *,
        limits: Limits | None = None,
        keys: tuple[str, ...] = (),
        max_body_bytes: int = 1 << 20,
        metrics_prefix: str = "dmc",
        timeout: float = 20,
        aliases: tuple[str, ...] = (),
        prompt_settings: PromptSettings | None = None,
        open_tokenizer: bool = False,
        http: HTTPConfig = HTTPConfig(),
        **settings: object,
    ) -> None:
        self.engine = Engine(path, EngineConfig(**settings), load_tokenizer(path))
        self._options = dict(
            model_name="m",
            aliases=aliases,
            prompt_settings=prompt_settings,
            open_tokenizer=open_tokenizer,
            keys=keys,
            limits=limits or Limits(),
            max_body_bytes=max_body_bytes,
            metrics_prefix=metrics_prefix,
            timeout_body=http.timeout_body,
        )
        self.http, self._timeout, self._ready = http, timeout, threading.Event()
        self.sock = listen("127.0.0.1", 0)
        self.port = self.sock.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=lambda: run_on_loop(self._run()), daemon=True)

    async def _run(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.service = make_service(self.engine, **self._options)
        self.server = make_server(self.service, self._timeout, self.http)
        self._ready.set()
        try:
            await self.server.serve([self.sock])
        finally:
            await self.service.runner.stop()

    def __enter__(self) -> Running:
        self._thread.start()
        assert self._ready.wait(PATIENCE)
        deadline = time.monotonic() + PATIENCE
        while not self.server.started and time.monotonic() < deadline:
            time.sleep(0.01)
        return self

    def __exit__(self, *_: object) -> None:
        self.loop.call_soon_threadsafe(self.server.stop)
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive()

    def ask(
        self,
        path: str,
        body: object = None,
        *,
        raw: bytes | None = None,
        headers: dict | None = None,
        method: str | None = None,
    ) -> tuple[int, dict[str, str], str]:
        """(status, headers in lower case, text). ``body``: as JSON; ``raw``: as it is."""
        data = raw if raw is not None else None if body is None else json.dumps(body).encode()
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request(
                method or ("GET" if data is None else "POST"),
                path,
                data,
                {"Content-Type": "application/json", **(headers or {})},
            )
            answer = connection.getresponse()
            return answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read().decode()
        finally:
            connection.close()

    def json(self, path: str, body: object = None, status: int = 200) -> dict:
        found, _, text = self.ask(path, body)
        assert found == status, text
        return json.loads(text)

    def events(self, path: str, body: dict) -> list[dict]:
        """The chunks of a stream, which ends with [DONE]."""
        status, headers, text = self.ask(path, body | {"stream": True})
        assert status == 200 and headers["content-type"].startswith("text/event-stream"), text
        lines = text.split("\n\n")
        assert lines[-2:] == ["data: [DONE]", ""] and all(line.startswith("data: ") for line in lines[:-1])
        return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]

    def call(self, function: Callable[[Engine], object]) -> object:
        """On the engine's thread, between two steps."""
        return asyncio.run_coroutine_threadsafe(self.service.runner.call(function), self.loop).result(60)

    def app_gate(self) -> GateMiddleware:
        """The middleware that all requests pass."""
        layer = self.server.config.loaded_app
        while not isinstance(layer, GateMiddleware):
            layer = getattr(layer, "middleware_stack", None) or layer.app
        return layer

    def settle(self) -> None:
        """Wait until nothing runs; then every page and every place in the queue must be free."""
        deadline = time.monotonic() + PATIENCE
        runner = self.service.runner
        while (runner.unfinished or self.service.gate.in_flight) and time.monotonic() < deadline:
            time.sleep(0.01)
        self.call(all_back)
        assert (runner.unfinished, runner.queued_completions, runner.queued_tokens, self.service.gate.in_flight) == (
            0,
            0,
            0,
            0,
        )
        assert not runner._waiting and not self.service.metrics._running


def client(server: Running, key: str = "none") -> OpenAI:
    """OpenAI's own client of a server."""
    from openai import OpenAI

    return OpenAI(base_url=server.url + "/v1", api_key=key, max_retries=0)


def samples(text: str) -> dict[str, float]:
    """Values of Prometheus metrics by name and labels, without the label ``engine``, which is 0 everywhere."""
    from prometheus_client.parser import text_string_to_metric_families

    found = [sample for family in text_string_to_metric_families(text) for sample in family.samples]

    def labels(sample: object) -> list[tuple[str, str]]:
        return sorted(item for item in sample.labels.items() if item != ("engine", "0"))

    return {f"{sample.name}{labels(sample)}": sample.value for sample in found}
