"""Prometheus metrics with vLLM's names, so that its dashboards read them, and those that only a compressed cache has.

The prefix is ``dmc:``, or ``vllm:`` with ``--metrics-prefix vllm``. All have the label ``model_name``.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from megatron.dmc.inference import StepOutput
from megatron.dmc.serving.async_engine import AsyncEngine, Stream

# Bounds of vLLM's histograms, in seconds.
FIRST_TOKEN = (
    0.001,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1.0,
    2.5,
    5.0,
    7.5,
    10.0,
    20.0,
    40.0,
    80.0,
    160.0,
)
TOKEN = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0)
REQUEST = (
    0.3,
    0.5,
    0.8,
    1.0,
    1.5,
    2.0,
    2.5,
    5.0,
    10.0,
    15.0,
    20.0,
    30.0,
    40.0,
    50.0,
    60.0,
    120.0,
    240.0,
    480.0,
    960.0,
    1920.0,
)
TIMES = {
    "time_to_first_token_seconds": (FIRST_TOKEN, "from the request's arrival to its first token"),
    "inter_token_latency_seconds": (TOKEN, "between two tokens of an answer"),
    "time_per_output_token_seconds": (TOKEN, "the same, by its older name"),
    "request_time_per_output_token_seconds": (TOKEN, "mean time of an answer's tokens but the first"),
    "e2e_request_latency_seconds": (REQUEST, "from the request's arrival to the end of its answer"),
    "request_queue_time_seconds": (REQUEST, "until the answer was first given a place in the cache"),
    "request_prefill_time_seconds": (REQUEST, "from there to the first token"),
    "request_decode_time_seconds": (REQUEST, "from the first token to the last"),
    "request_inference_time_seconds": (REQUEST, "prefill and decode"),
}
LENGTHS = {
    "request_prompt_tokens": "tokens of a request's prompt",
    "request_generation_tokens": "tokens of an answer",
    "request_max_num_generation_tokens": "tokens of an answer, by its older name",
    "request_params_n": "answers that a prompt asked for",
    "request_params_max_tokens": "max_tokens of a request",
}


def length_bounds(longest: int) -> list[int]:
    """1, 2, 5, 10, ... up to the window."""
    steps = [m * 10**e for e in range(12) for m in (1, 2, 5)]
    return [step for step in steps if step < longest] + [longest]


@dataclass
class _Answer:
    """What is kept of an answer while it runs."""

    arrived: float
    last: float
    tokens: int = 0


class Metrics:
    """Follows the engine's outputs, on the event loop, and looks at its cache when it is scraped."""

    def __init__(self, prefix: str, model_name: str, max_model_len: int) -> None:
        self.prefix, self.model = f"{prefix}:", model_name
        self.registry = CollectorRegistry()
        self._answers: dict[tuple[str, int], _Answer] = {}
        self._times = {name: self._histogram(name, text, bounds) for name, (bounds, text) in TIMES.items()}
        self._lengths = {
            name: self._histogram(name, text, length_bounds(max_model_len)) for name, text in LENGTHS.items()
        }
        self._prompt_tokens = self._counter("prompt_tokens", "of prompts that were read").labels(self.model)
        self._generated = self._counter("generation_tokens", "tokens of answers").labels(self.model)
        ended = self._counter("request_success", "answers that have ended", "finished_reason")
        self._ended = {reason: ended.labels(self.model, reason) for reason in ("stop", "length", "abort", "error")}
        self._states = self._counter("cache_token_states", "token states of answers that have ended, by layer", "layer")
        self._slots = self._counter(
            "cache_slots", "slots that they took; the quotient of both is the compression ratio", "layer"
        )
        self._refused = self._counter("requests_refused", "requests that got no answer, by HTTP status", "status")
        self._refused.labels(self.model, "503")  # there from the start, so that its rate is right

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(self.prefix + name, text, ("model_name", *labels), registry=self.registry)

    def _histogram(self, name: str, text: str, bounds: tuple[float, ...] | list[int]) -> Histogram:
        made = Histogram(self.prefix + name, text, ("model_name",), buckets=bounds, registry=self.registry)
        return made.labels(self.model)

    def watch(self, engine: AsyncEngine) -> None:
        """From now on what is scraped includes the state of this engine."""
        self.registry.register(_State(self.prefix, self.model, engine))

    def refused(self, status: int) -> None:
        """A request that was answered with an error."""
        self._refused.labels(self.model, str(status)).inc()

    def observe(self, stream: Stream, output: StepOutput) -> None:
        """Every output of the engine, in order."""
        now, key = time.monotonic(), (output.request_id, output.index)
        answer = self._answers.get(key)
        if answer is None:
            answer = self._answers[key] = _Answer(stream.arrived, stream.arrived)
        if output.tokens:
            if answer.tokens == 0:
                self._times["time_to_first_token_seconds"].observe(now - answer.arrived)
            else:
                self._times["inter_token_latency_seconds"].observe(now - answer.last)
                self._times["time_per_output_token_seconds"].observe(now - answer.last)
            answer.tokens += len(output.tokens)
            answer.last = now
            self._generated.inc(len(output.tokens))
        read = output.tokens or output.finish_reason == "length"  # or max_tokens is 0
        if read and answer.tokens == len(output.tokens) and output.index == 0:
            self._prompt_tokens.inc(len(stream.request(output.request_id).prompt))
        if output.finish_reason is not None:
            del self._answers[key]
            self._finished(stream, output, answer, now)

    def _finished(self, stream: Stream, output: StepOutput, answer: _Answer, now: float) -> None:
        assert output.finish_reason is not None
        self._ended[output.finish_reason].inc()
        if output.cache is not None:
            for layer, slots in enumerate(output.cache.slots):
                self._states.labels(self.model, str(layer)).inc(output.cache.tokens * len(slots))
                self._slots.labels(self.model, str(layer)).inc(sum(slots))
        if output.finish_reason == "abort":
            return
        request = stream.request(output.request_id)
        for name, value in (
            ("request_prompt_tokens", len(request.prompt)),
            ("request_generation_tokens", answer.tokens),
            ("request_max_num_generation_tokens", answer.tokens),
            ("request_params_n", request.params.n),
            ("request_params_max_tokens", request.params.max_tokens),
        ):
            if value is not None:
                self._lengths[name].observe(value)
        self._times["e2e_request_latency_seconds"].observe(now - answer.arrived)
        timing = output.timing
        if timing is None or timing.queued is None:
            return
        self._times["request_queue_time_seconds"].observe(timing.queued)
        self._times["request_inference_time_seconds"].observe(timing.total - timing.queued)
        if timing.first_token is not None:
            self._times["request_prefill_time_seconds"].observe(timing.first_token - timing.queued)
            self._times["request_decode_time_seconds"].observe(timing.total - timing.first_token)
            if answer.tokens > 1:
                mean = (timing.total - timing.first_token) / (answer.tokens - 1)
                self._times["request_time_per_output_token_seconds"].observe(mean)

    def text(self) -> bytes:
        """In Prometheus' format."""
        return generate_latest(self.registry)


class _State:
    """Gauges that are read when somebody asks, from the engine's last look at its cache."""

    def __init__(self, prefix: str, model: str, engine: AsyncEngine) -> None:
        self.prefix, self.model, self.engine = prefix, model, engine

    def collect(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
        stats = self.engine.stats
        used = stats.pages_used / stats.pages
        for name, text, value in (
            ("num_requests_running", "answers in the cache", stats.running),
            (
                "num_requests_waiting",
                "answers that wait for a place in it",
                max(stats.waiting, self.engine.queued_answers),
            ),
            ("num_requests_swapped", "always 0: what must make room is computed again", 0),
            ("kv_cache_usage_perc", "share of the pages that is taken, 0 to 1", used),
            ("gpu_cache_usage_perc", "the same, by its older name", used),
            ("num_pages", "single-head pages of the pool", stats.pages),
            (
                "num_pages_free",
                "pages that answers can have, those of the prefix cache too",
                stats.pages - stats.pages_used,
            ),
            ("num_pages_cached", "pages that the prefix cache alone holds", stats.pages_cached),
            ("page_waste_perc", "share of the taken pages' slots that is empty, 0 to 1", stats.waste),
            ("cache_slots_used", "slots that are taken", stats.slots_used),
            ("cache_tokens", "tokens of the answers in the cache, prompts and what came after", stats.tokens_held),
            ("engine_up", "0 when the engine has failed", int(self.engine.failure is None)),
        ):
            yield self._gauge(name, text, value)
        ratios = GaugeMetricFamily(
            self.prefix + "compression_ratio",
            "token states / slots of the answers in the cache, by layer",
            labels=("model_name", "layer"),
        )
        for layer, ratio in enumerate(stats.layer_compression_ratios):
            ratios.add_metric((self.model, str(layer)), ratio)
        yield ratios
        for name, text, value in (
            ("num_preemptions", "answers that had to make room", stats.preemptions),
            ("engine_steps", "steps of the engine", stats.steps),
            (
                "prefix_cache_queries",
                "tokens of prompts that were looked up in the prefix cache",
                stats.prefix_cache_queries,
            ),
            ("prefix_cache_hits", "those that were found", stats.prefix_cache_hits),
        ):
            total = CounterMetricFamily(self.prefix + name, text, labels=("model_name",))
            total.add_metric((self.model,), value)
            yield total

    def _gauge(self, name: str, text: str, value: float) -> GaugeMetricFamily:
        made = GaugeMetricFamily(self.prefix + name, text, labels=("model_name",))
        made.add_metric((self.model,), value)
        return made
