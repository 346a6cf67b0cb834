"""Prometheus metrics of the server: vLLM's, so that its dashboards can read them, and those of the compressed KV cache.

The prefix of every name is ``dmc:``, or ``vllm:`` with ``--metrics-prefix vllm``. Every metric has the labels
``model_name`` and ``engine``, which is 0. Metrics of HTTP and of the process have their usual names and no such labels.
"""

import math
import time
from bisect import bisect_left
from collections.abc import Iterator, MutableMapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.utils import floatToGoString

from megatron.dmc.inference import StepOutput
from megatron.dmc.serving.async_engine import AsyncEngine, Stream

HELP = {
    # Histograms of time.
    "time_to_first_token_seconds": "Time from the arrival of a request to the first token of a completion, in seconds.",
    "inter_token_latency_seconds": "Time between two tokens of a completion, in seconds.",
    "time_per_output_token_seconds": "Time between two tokens of a completion, in seconds (older name).",
    "request_time_per_output_token_seconds": "Mean time per token of a completion after its first, in seconds.",
    "e2e_request_latency_seconds": "Time from the arrival of a request to the end of a completion, in seconds.",
    "request_queue_time_seconds": "Time from the arrival of a request to its first scheduling, in seconds.",
    "request_prefill_time_seconds": "Time from the first scheduling of a completion to its first token, in seconds.",
    "request_decode_time_seconds": "Time from the first to the last token of a completion, in seconds.",
    "request_inference_time_seconds": "Time from the first scheduling of a completion to its end, in seconds.",
    # Histograms of length.
    "request_prompt_tokens": "Number of prompt tokens per completion.",
    "request_generation_tokens": "Number of generated tokens per completion.",
    "request_max_num_generation_tokens": "Number of generated tokens per completion (older name).",
    "request_num_preemptions": "Number of times the sequence of a completion was preempted.",
    "request_params_n": "Parameter n of the request, in completions per prompt.",
    "request_params_max_tokens": "Parameter max_tokens of the request, in tokens.",
    # Counters of requests.
    "prompt_tokens": "Number of prompt tokens prefilled.",
    "generation_tokens": "Number of tokens generated.",
    "request_success": "Number of completions that have ended, by finish reason.",
    "requests_refused": "Number of requests answered with an error, by HTTP status.",
    "cache_token_states": "Number of token states (tokens times KV heads) of ended completions, by layer.",
    "cache_slots": "Number of KV slots taken by the token states of ended completions, by layer.",
    "http_requests": "Number of HTTP requests answered, by path of the endpoint, method and kind of status.",
    "http_request_duration_seconds": "Time from the headers of a request to the end of its response, in seconds.",
    # Gauges of the scheduler and the cache.
    "num_requests_running": "Number of sequences that are running, which hold a row of the KV cache.",
    "num_requests_waiting": "Number of sequences that wait to be scheduled.",
    "num_requests_swapped": "Number of sequences swapped out; always 0, as preempted ones are recomputed.",
    "kv_cache_usage_perc": "Fraction of KV cache pages held by running sequences, from 0 to 1.",
    "gpu_cache_usage_perc": "Fraction of KV cache pages held by running sequences, from 0 to 1 (older name).",
    "cache_config_info": "State of the KV cache's settings, in labels; the value is 1.",
    "model_config_info": "State of the model's weights, in labels: data type and quantization; the value is 1.",
    "num_pages": "Number of pages of the KV cache; a page has slots of one KV head.",
    "num_pages_free": "Number of KV cache pages that sequences can take; num_pages_cached counts among them.",
    "num_pages_cached": "Number of KV cache pages held by the prefix cache alone.",
    "page_waste_perc": "Fraction of the KV slots in allocated pages that are empty, from 0 to 1.",
    "cache_slots_used": "Number of KV slots held by running sequences; shared slots count once.",
    "cache_slot_bytes": "Number of bytes of a KV slot: key, value and, in a cache of 8 bits, their scales.",
    "cache_tokens": "Number of tokens, prompt and generated, that running sequences have in the KV cache.",
    "compression_ratio": "Compression ratio of running sequences, token states per KV slot, by layer; absent if idle.",
    "engine_up": "State of the engine: 1 while it runs, 0 after it has failed.",
    # Counters of the engine.
    "num_preemptions": "Number of times a sequence was preempted to free pages.",
    "engine_steps": "Number of steps that the engine has run.",
    "prefix_cache_queries": "Number of prompt tokens looked up in the prefix cache.",
    "prefix_cache_hits": "Number of prompt tokens found in the prefix cache.",
}
"""Help text of every metric by its name, without prefix and without the ``_total`` of counters."""

# Bucket bounds of vLLM's histograms, in seconds.
FIRST_TOKEN = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)
TOKEN = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
REQUEST = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920)
TIMES = {
    "time_to_first_token_seconds": FIRST_TOKEN,
    "inter_token_latency_seconds": TOKEN,
    "time_per_output_token_seconds": TOKEN,
    "request_time_per_output_token_seconds": TOKEN,
    "e2e_request_latency_seconds": REQUEST,
    "request_queue_time_seconds": REQUEST,
    "request_prefill_time_seconds": REQUEST,
    "request_decode_time_seconds": REQUEST,
    "request_inference_time_seconds": REQUEST,
}
LENGTHS = (
    "request_prompt_tokens",
    "request_generation_tokens",
    "request_max_num_generation_tokens",
    "request_params_n",
    "request_params_max_tokens",
)


METHODS = frozenset({"DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT"})
DURATIONS = (0.01, 0.1, 0.5, 1, 5, 10, 60, 600)


LABELS = ("model_name", "engine")
PREEMPTIONS = (1, 2, 3, 4, 5, 10, 20)


def length_bounds(max_model_len: int) -> list[int]:
    """Bucket bounds of the length histograms: 1, 2, 5, 10, ... up to the context length."""
    steps = [m * 10**e for e in range(12) for m in (1, 2, 5)]
    return [step for step in steps if step < max_model_len] + [max_model_len]


class _Histogram:
    """Collector of a histogram that is observed and collected by one thread.

    prometheus_client's own takes two locks and a loop over the buckets for every observation; there is one for every
    token, and a dozen for every completion.
    """

    def __init__(self, name: str, labels: tuple[str, str], bounds: Sequence[float]) -> None:
        self.name, self.labels, self.bounds = name, labels, bounds
        self.counts, self.sum = [0] * (len(bounds) + 1), 0.0

    def observe(self, value: float) -> None:
        """Count a value in its bucket, whose upper bound belongs to it."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def collect(self) -> list[Metric]:
        """The metric with its buckets, which are cumulative."""
        bounds = map(floatToGoString, (*self.bounds, math.inf))
        family = HistogramMetricFamily(self.name, HELP[self.name.partition(":")[2]], labels=LABELS)
        family.add_metric(self.labels, list(zip(bounds, accumulate(self.counts))), self.sum)
        return [family]


@dataclass(slots=True)
class _Progress:
    """Progress of a completion that has not ended; times of the monotonic clock."""

    arrived: float
    last: float
    tokens: int = 0


class Metrics:
    """Registry that follows the engine's outputs on the event loop and reads the engine's state when it is scraped."""

    def __init__(self, prefix: str, model_name: str, max_model_len: int) -> None:
        self.prefix, self.labels = f"{prefix}:", (model_name, "0")
        self.registry = CollectorRegistry()
        self._running: dict[tuple[str, int], _Progress] = {}
        bounds = length_bounds(max_model_len)
        self._times = {name: self._histogram(name, seconds) for name, seconds in TIMES.items()}
        self._lengths = {name: self._histogram(name, bounds) for name in LENGTHS}
        self._preemptions = self._histogram("request_num_preemptions", PREEMPTIONS)
        self._prompt_tokens = self._counter("prompt_tokens").labels(*self.labels)
        self._generation_tokens = self._counter("generation_tokens").labels(*self.labels)
        ended = self._counter("request_success", "finished_reason")
        self._ended = {reason: ended.labels(*self.labels, reason) for reason in ("stop", "length", "abort", "error")}
        self._states = self._counter("cache_token_states", "layer")
        self._slots = self._counter("cache_slots", "layer")
        self._layers: list[tuple[Counter, Counter]] = []
        """States and slots of each layer, once a completion has ended."""
        self._refused = self._counter("requests_refused", "status")
        # Names and labels of prometheus-fastapi-instrumentator, which vLLM's server exports.
        self._requests = Counter(
            "http_requests_total", HELP["http_requests"], ("handler", "method", "status"), registry=self.registry
        )
        self._durations = Histogram(
            "http_request_duration_seconds",
            HELP["http_request_duration_seconds"],
            ("handler", "method"),
            buckets=DURATIONS,
            registry=self.registry,
        )
        ProcessCollector(registry=self.registry)
        self._refused.labels(*self.labels, "503")  # exported from the start, so that its first increase is a rate

    def _counter(self, name: str, *labels: str) -> Counter:
        return Counter(self.prefix + name, HELP[name], (*LABELS, *labels), registry=self.registry)

    def _histogram(self, name: str, bounds: Sequence[float]) -> _Histogram:
        made = _Histogram(self.prefix + name, self.labels, bounds)
        self.registry.register(made)
        return made

    def watch(self, engine: AsyncEngine) -> None:
        """Export the state of this engine from now on."""
        self.registry.register(_EngineState(self.prefix, self.labels, engine))

    def refused(self, status: int) -> None:
        """Count a request that was answered with an error."""
        self._refused.labels(*self.labels, str(status)).inc()

    def answered(self, scope: MutableMapping[str, Any], status: int, seconds: float) -> None:
        """Count a request at the end of its response, by the endpoint's path, the method and the kind of status."""
        route = scope.get("route")
        handler = "none" if route is None else route.path
        method = scope["method"] if scope["method"] in METHODS else "other"
        self._requests.labels(handler, method, f"{status // 100}xx").inc()
        self._durations.labels(handler, method).observe(seconds)

    def observe(self, outputs: Sequence[tuple[Stream, StepOutput]]) -> None:
        """Count outputs of the engine that came together. Those of a completion must come in order."""
        now = time.monotonic()
        for stream, output in outputs:
            self._observe(stream, output, now)
        self._generation_tokens.inc(sum(len(output.tokens) for _, output in outputs))

    def _observe(self, stream: Stream, output: StepOutput, now: float) -> None:
        key = (output.request_id, output.index)
        progress = self._running.get(key)
        if progress is None:
            progress = self._running[key] = _Progress(stream.arrived, stream.arrived)
        first = progress.tokens == 0
        if output.tokens:
            if first:
                self._times["time_to_first_token_seconds"].observe(now - progress.arrived)
            else:
                self._times["inter_token_latency_seconds"].observe(now - progress.last)
                self._times["time_per_output_token_seconds"].observe(now - progress.last)
            progress.tokens += len(output.tokens)
            progress.last = now
        prefilled = output.tokens or output.finish_reason == "length"  # no token comes when max_tokens is 0
        if first and prefilled and output.index == 0:
            self._prompt_tokens.inc(len(stream.request(output.request_id).prompt_token_ids))
        if output.finish_reason is not None:
            del self._running[key]
            self._finished(stream, output, progress, now)

    def _finished(self, stream: Stream, output: StepOutput, progress: _Progress, now: float) -> None:
        assert output.finish_reason is not None
        self._ended[output.finish_reason].inc()
        if output.cache is not None:
            for layer in range(len(self._layers), len(output.cache.slots)):
                labels = (*self.labels, str(layer))
                self._layers.append((self._states.labels(*labels), self._slots.labels(*labels)))
            for (states, taken), slots in zip(self._layers, output.cache.slots):
                states.inc(output.cache.tokens * len(slots))
                taken.inc(sum(slots))
        if output.finish_reason == "abort":
            return
        request = stream.request(output.request_id)
        self._lengths["request_prompt_tokens"].observe(len(request.prompt_token_ids))
        self._lengths["request_generation_tokens"].observe(progress.tokens)
        self._lengths["request_max_num_generation_tokens"].observe(progress.tokens)
        self._lengths["request_params_n"].observe(request.sampling_params.n)
        if request.sampling_params.max_tokens is not None:
            self._lengths["request_params_max_tokens"].observe(request.sampling_params.max_tokens)
        self._times["e2e_request_latency_seconds"].observe(now - progress.arrived)
        timing = output.timing
        if timing is None or timing.queued is None:
            return
        self._preemptions.observe(timing.preemptions)
        self._times["request_queue_time_seconds"].observe(timing.queued)
        self._times["request_inference_time_seconds"].observe(timing.total - timing.queued)
        if timing.first_token is not None:
            self._times["request_prefill_time_seconds"].observe(timing.first_token - timing.queued)
            self._times["request_decode_time_seconds"].observe(timing.total - timing.first_token)
            if progress.tokens > 1:
                mean = (timing.total - timing.first_token) / (progress.tokens - 1)
                self._times["request_time_per_output_token_seconds"].observe(mean)

    def text(self) -> bytes:
        """Metrics in Prometheus' text format."""
        return generate_latest(self.registry)


class _EngineState:
    """Collector of the engine's latest statistics, which may be a tenth of a second old."""

    def __init__(self, prefix: str, labels: tuple[str, str], engine: AsyncEngine) -> None:
        self.prefix, self.labels, self.engine = prefix, labels, engine

    def collect(self) -> Iterator[Metric]:
        stats = self.engine.stats
        usage = stats.pages_used / stats.pages
        gauges = {
            "num_requests_running": stats.running,
            "num_requests_waiting": max(stats.waiting, self.engine.queued_completions),
            "num_requests_swapped": 0,
            "kv_cache_usage_perc": usage,
            "gpu_cache_usage_perc": usage,
            "num_pages": stats.pages,
            "num_pages_free": stats.pages - stats.pages_used,
            "num_pages_cached": stats.pages_cached,
            "page_waste_perc": stats.waste,
            "cache_slots_used": stats.slots_used,
            "cache_slot_bytes": self.engine.engine.cache.slot_bytes,
            "cache_tokens": stats.tokens_held,
            "engine_up": int(self.engine.failure is None),
        }
        for name, value in gauges.items():
            yield self._family(GaugeMetricFamily, name, value)
        ratios = GaugeMetricFamily(
            self.prefix + "compression_ratio", HELP["compression_ratio"], labels=(*LABELS, "layer")
        )
        # An empty cache has no ratio; a sample of 1 would say that nothing is compressed.
        for layer, ratio in enumerate(stats.layer_compression_ratios if stats.slots_used else ()):
            ratios.add_metric((*self.labels, str(layer)), ratio)
        yield ratios
        yield self._cache_config()
        yield self._model_config()
        counters = {
            "num_preemptions": stats.preemptions,
            "engine_steps": stats.steps,
            "prefix_cache_queries": stats.prefix_cache_queries,
            "prefix_cache_hits": stats.prefix_cache_hits,
        }
        for name, value in counters.items():
            yield self._family(CounterMetricFamily, name, value)

    def _cache_config(self) -> Metric:
        """Settings of the cache as labels of a sample of 1, as vLLM exports its own."""
        sizes, config = self.engine.engine.sizes, self.engine.engine.config
        info = {
            "block_size": config.block_size,
            "cache_dtype": config.kv_cache_dtype,
            "num_gpu_blocks": sizes.num_pages,
            "max_model_len": sizes.max_model_len,
            "max_num_seqs": sizes.max_num_seqs,
            "enable_prefix_caching": config.enable_prefix_caching,
        }
        return self._info("cache_config_info", info)

    def _model_config(self) -> Metric:
        """Settings of the weights as labels of a sample of 1."""
        engine = self.engine.engine
        dtype = str(engine.model.dtype).removeprefix("torch.")
        return self._info("model_config_info", {"dtype": dtype, "quantization": engine.quantization})

    def _info(self, name: str, info: dict[str, Any]) -> Metric:
        family = GaugeMetricFamily(self.prefix + name, HELP[name], labels=(*LABELS, *info))
        family.add_metric((*self.labels, *map(str, info.values())), 1)
        return family

    def _family(self, kind: type, name: str, value: float) -> Metric:
        family = kind(self.prefix + name, HELP[name], labels=LABELS)
        family.add_metric(self.labels, value)
        return family
