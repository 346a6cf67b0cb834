"""Offline measurement of one engine: requests in, seconds out, and the use of the cache meanwhile.

A timed iteration runs with nothing around the engine but a clock and a counter per step. The time of a step is broken
down in a warm-up iteration, so that profiling does not disturb what is timed: torch's profiler records some steps from
the middle on. ``bench_models.py`` measures several models side by side.
"""

import json
import os
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

import numpy as np
import torch

from megatron.dmc.inference.cache import CacheUse
from megatron.dmc.inference.engine import Engine
from megatron.dmc.inference.request import StepOutput
from megatron.dmc.inference.sampling_params import SamplingParams

LINEAR_OPS = frozenset(
    {
        *("aten::linear", "aten::mm", "aten::addmm", "aten::matmul", "mkldnn::_linear_pointwise"),
        *("dmc::packed_linear", "dmc::between_attention"),  # the latter with the two norms among its products
    }
)
KERNELS = {
    "append": ("cudaappend)", "cudaevict)"),
    "attention": ("::attend", "::plan("),
    "linear": ("gemm", "gemv", "cutlass", "nvjet", "cublas", "splitk", "xmma"),
    "communication": ("nccl",),
}
"""Parts of a step -> words in the names of GPU kernels (with their parameters), where no op tells the part."""


@dataclass(frozen=True)
class Workload:
    """Requests of one iteration."""

    prompts: list[list[int]]
    output_lens: list[int]
    """Tokens of each completion, exactly: the end-of-sequence token is ignored."""
    n: int = 1
    temperature: float = 1.0

    @property
    def longest(self) -> int:
        return max(len(prompt) + new for prompt, new in zip(self.prompts, self.output_lens))

    @property
    def completions(self) -> int:
        return len(self.prompts) * self.n


@dataclass
class Iteration:
    """Measurements of one run of a workload."""

    elapsed: float = 0.0
    """Seconds from the first request to the last token."""
    step_seconds: list[float] = field(default_factory=list)
    batch: list[int] = field(default_factory=list)
    """Sequences in the cache, by step."""
    finished: list[StepOutput] = field(default_factory=list)
    prompt_tokens: int = 0
    output_tokens: int = 0
    preemptions: int = 0

    @property
    def uses(self) -> list[CacheUse]:
        return [output.cache for output in self.finished if output.cache is not None]

    @property
    def first_token(self) -> float:
        """Seconds until the last completion had its first token."""
        return max(
            o.timing.first_token for o in self.finished if o.timing is not None and o.timing.first_token is not None
        )


# -------------------------------------------------------------------------------------------------------- requests


def random_lens(mean: int, spread: float, count: int, generator: np.random.Generator) -> list[int]:
    """Lengths uniform in [mean (1 - spread), mean (1 + spread)], as ``vllm bench --random-range-ratio`` has them."""
    if not 0 <= spread < 1:
        raise ValueError(f"random_range_ratio is {spread!r}; it must be at least 0 and below 1")
    low, high = max(1, int(mean * (1 - spread))), max(1, int(mean * (1 + spread)))
    return generator.integers(low, high + 1, size=count).tolist()


def random_prompts(lens: Sequence[int], vocab_size: int, generator: np.random.Generator) -> list[list[int]]:
    return [generator.integers(0, vocab_size, size=length).tolist() for length in lens]


def read_prompts(path: str | Path, count: int) -> list[str | list[int]]:
    """Prompts of the first ``count`` lines ``{"prompt": text or token ids}``, repeated when there are fewer.

    Raises:
        ValueError: a line without a prompt, by its number, or none at all.
    """
    found: list[str | list[int]] = []
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if len(found) == count:
                    break
                if line.strip():
                    found.append(_prompt(line, f"{path}, line {number}"))
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not found:
        raise ValueError(f'{path} holds no prompts; write lines of {{"prompt": "..."}}')
    return [found[i % len(found)] for i in range(count)]


def _prompt(line: str, where: str) -> str | list[int]:
    try:
        content = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where} is not JSON: {error}") from None
    prompt = content.get("prompt") if isinstance(content, dict) else None
    if not prompt or not isinstance(prompt, (str, list)):
        raise ValueError(f'{where} has no "prompt", a text or a list of token ids')
    return prompt


# --------------------------------------------------------------------------------------------------- one iteration


def iterate(engine: Engine, work: Workload, profiler: Optional["StepProfiler"] = None) -> Iteration:
    """Run a workload once, with all requests added at the start. Raises ``ValueError`` when a request fails."""
    found, at_first = Iteration(), engine.stats()
    last = began = time.perf_counter()
    for i, (prompt, new) in enumerate(zip(work.prompts, work.output_lens)):
        params = SamplingParams(n=work.n, temperature=work.temperature, max_tokens=new, ignore_eos=True)
        engine.add_request(str(i), prompt, params)
    try:
        while engine.has_unfinished():
            outputs = engine.step() if profiler is None else profiler.step(engine)
            now = time.perf_counter()
            ended = [output for output in outputs if output.finished]
            found.step_seconds.append(now - last)
            found.batch.append(len(engine.scheduler.running) + len(ended))
            found.finished += ended
            last = now
    finally:
        for i in range(len(work.prompts)):
            engine.abort(str(i))
    found.elapsed = last - began
    if failed := next((output.error for output in found.finished if output.error), None):
        raise ValueError(f"a request failed: {failed}")
    found.prompt_tokens = sum(map(len, work.prompts))
    at_last = engine.stats()
    found.output_tokens = at_last.generation_tokens - at_first.generation_tokens
    found.preemptions = at_last.preemptions - at_first.preemptions
    return found


# ------------------------------------------------------------------------------------------------- parts of a step


class StepProfiler:
    """Profile of an iteration: pages in use after every step, and the parts of ``steps`` steps of its second half."""

    def __init__(self, work: Workload, steps: int = 24) -> None:
        self.half = sum(work.output_lens) * work.n // 2
        self.steps, self.peak_pages = steps, 0
        self.parts: Optional[dict[str, float]] = None
        """Seconds per step, by part; None when the iteration was too short."""
        self._profile: Optional[Any] = None
        self._seen, self._wall = 0, 0.0
        self._start: Optional[int] = None

    def step(self, engine: Engine) -> list[StepOutput]:
        stats = engine.stats()
        self.peak_pages = max(self.peak_pages, stats.pages_used)
        if self._start is None:
            self._start = stats.generation_tokens
        if self.parts is None and self._profile is None and stats.generation_tokens - self._start >= self.half:
            self._open(engine)
        began = time.perf_counter()
        outputs = engine.step()
        if self._profile is not None:
            self._wall += time.perf_counter() - began
            self._seen += 1
            if self._seen == self.steps or not engine.has_unfinished():
                self._close(engine)
        return outputs

    def _open(self, engine: Engine) -> None:
        activities = [torch.profiler.ProfilerActivity.CPU]
        if engine.device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
            torch.cuda.synchronize(engine.device)
        self._named = [
            _Named(engine.scheduler, "schedule", "dmc.schedule"),
            _Named(engine.scheduler, "schedule_ahead", "dmc.schedule"),
            _Named(engine.model, "forward", "dmc.forward"),
            _Named(engine.runner, "sample", "dmc.sampling"),
        ]
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or it tells of its start and stop on stderr
        with torch.profiler.profile(
            activities=activities
        ):  # the first one loads what the second one is not to wait for
            torch.ones(1, device=engine.device).add_(1)
        self._profile = torch.profiler.profile(activities=activities)
        self._profile.start()

    def _close(self, engine: Engine) -> None:
        self._profile.stop()
        for named in self._named:
            named.undo()
        parts = _gpu_parts if engine.device.type == "cuda" else _cpu_parts
        found = parts(self._profile.events())
        found["host"] = max(0.0, self._wall - sum(found.values()))
        self.parts = {name: seconds / self._seen for name, seconds in found.items()}
        self._profile = None


class _Named:
    """A method of one object that the profiler sees under a name, until :meth:`undo`."""

    def __init__(self, owner: object, method: str, name: str) -> None:
        self.owner, self.method = owner, method
        inner: Callable[..., Any] = getattr(owner, method)

        def call(*args: Any, **kwargs: Any) -> Any:
            with torch.profiler.record_function(name):
                return inner(*args, **kwargs)

        setattr(owner, method, call)

    def undo(self) -> None:
        delattr(self.owner, self.method)


def _part(event: Any) -> Optional[str]:
    """Part of a step that a CPU event is by its own name; None for an event that has none."""
    name = event.name
    if name in ("dmc.schedule", "dmc.sampling", "dmc.forward"):
        return name.removeprefix("dmc.")
    if name in ("dmc::append", "dmc::append_evicting"):
        return "append"
    if name in ("dmc::decode_attention", "dmc::prefill_attention"):
        return "attention"
    if name in LINEAR_OPS:
        return "linear"
    return "communication" if name.startswith(("c10d::", "gloo:", "nccl:")) else None


def _outer(event: Any) -> Optional[str]:
    """Part of a step that an event lies in, by the events around it."""
    parent = event.cpu_parent
    while parent is not None:
        part = _part(parent)
        if part is not None:
            return part
        parent = parent.cpu_parent
    return None


def _cpu_parts(events: Iterable[Any]) -> dict[str, float]:
    """Seconds by part. An op of the forward pass counts once, by the outermost that has a part; "other" is the rest."""
    found = dict.fromkeys(("schedule", "append", "attention", "linear", "communication", "sampling"), 0.0)
    forward = 0.0
    for event in events:
        part = _part(event)
        if part is None:
            continue
        seconds = event.cpu_time_total * 1e-6
        if part == "forward":
            forward += seconds
        elif part in ("schedule", "sampling") or _outer(event) == "forward":
            found[part] += seconds
    inside = sum(found[name] for name in ("append", "attention", "linear", "communication"))
    return {**found, "other": max(0.0, forward - inside)}


def _gpu_parts(events: Iterable[Any]) -> dict[str, float]:
    """Seconds in which the GPU ran kernels, by part; in the rest of a step ("host") it waited for the CPU.

    A kernel belongs to the op that launched it. Kernels of a CUDA graph have no op: their names tell.
    """
    found = dict.fromkeys((*KERNELS, "sampling", "other"), 0.0)
    by_name: Counter[str] = Counter()
    for event in events:
        if event.device_type == torch.autograd.DeviceType.CUDA:
            if not event.name.startswith(("dmc.", "dmc::")):  # these are names on the GPU's time line, not kernels
                by_name[event.name] += event.device_time_total
            continue
        part = _part(event) or _outer(event)
        if part in found:
            for kernel in event.kernels:
                found[part] += kernel.duration * 1e-6
                by_name[kernel.name] -= kernel.duration
    for name, us in by_name.items():
        found[part_of_kernel(name)] += max(0, us) * 1e-6
    return found


def part_of_kernel(name: str) -> str:
    """Part of a step that a GPU kernel belongs to, by its demangled name."""
    lower = name.lower()
    return next((part for part, words in KERNELS.items() if any(word in lower for word in words)), "other")


# --------------------------------------------------------------------------------------------------------- figures


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, quartiles, minimum, maximum and number of measurements."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values[:1] * 3
    return {"median": median, "q1": low, "q3": high, "min": min(values), "max": max(values), "n": len(values)}


def cache_bytes(engine: Engine) -> int:
    """Bytes of the page pool with its tables and rings, on one rank."""
    sizes = engine.sizes
    return sizes.num_pages * (sizes.page_bytes + 4) + sizes.max_num_seqs * sizes.row_bytes


def cache_figures(engine: Engine, work: Workload, iterations: Sequence[Iteration]) -> dict[str, Any]:
    """Use of the cache, measured at the end of every completion, over all iterations."""
    uses = [use for iteration in iterations for use in iteration.uses]
    slots, pages = sum(use.total_slots for use in uses), sum(use.pages for use in uses)
    peak = max(max(iteration.batch) for iteration in iterations)
    rows, ranks = engine.sizes.max_num_seqs, engine.parallel.size
    limit = "num_prompts" if peak >= work.completions else "max_num_seqs" if peak >= rows else "memory"
    return {
        "compression_ratio": sum(use.tokens * use.heads for use in uses) / max(1, slots),
        "page_waste": 1 - slots / max(1, pages * engine.cache.page_size),
        "max_batch_size": int(engine.cache.num_pages * ranks // max(1.0, pages / max(1, len(uses)))),
        "peak_batch_size": peak,
        "mean_batch_size": statistics.fmean(size for iteration in iterations for size in iteration.batch),
        "batch_limited_by": limit,
        "num_preemptions": sum(iteration.preemptions for iteration in iterations) / len(iterations),
        "num_pages": engine.cache.num_pages * ranks,
        "kv_cache_memory_bytes": cache_bytes(engine),
        "max_num_seqs": rows,
        "step_ms": spread([1e3 * s for iteration in iterations for s in iteration.step_seconds]),
    }


def throughput_figures(engine: Engine, work: Workload, iterations: Sequence[Iteration]) -> dict[str, Any]:
    """Keys of ``vllm bench throughput --output-json`` (medians of the iterations), and the use of the cache."""
    elapsed = spread([iteration.elapsed for iteration in iterations])
    prompt, output = iterations[0].prompt_tokens, iterations[0].output_tokens
    return {
        "elapsed_time": elapsed["median"],
        "num_requests": len(work.prompts),
        "total_num_tokens": prompt + output,
        "requests_per_second": len(work.prompts) / elapsed["median"],
        "tokens_per_second": (prompt + output) / elapsed["median"],
        "output_tokens_per_second": output / elapsed["median"],
        "total_prompt_tokens": prompt,
        "total_output_tokens": output,
        "elapsed_times": [iteration.elapsed for iteration in iterations],
        "output_tokens_per_second_spread": spread([output / iteration.elapsed for iteration in iterations]),
        **cache_figures(engine, work, iterations),
    }


PERCENTAGES = (10, 25, 50, 75, 90, 99)


def latency_figures(engine: Engine, work: Workload, iterations: Sequence[Iteration]) -> dict[str, Any]:
    """Keys of ``vllm bench latency --output-json``, and the use of the cache."""
    latencies = np.array([iteration.elapsed for iteration in iterations])
    return {
        "avg_latency": latencies.mean().item(),
        "std_latency": latencies.std().item(),
        "latencies": latencies.tolist(),
        "percentiles": dict(zip(map(str, PERCENTAGES), np.percentile(latencies, PERCENTAGES).tolist())),
        "batch_size": work.completions,
        "first_token": spread([iteration.first_token for iteration in iterations]),
        **cache_figures(engine, work, iterations),
    }
