"""Throughput and latency of models side by side, in the same cache memory: what ``dmc bench throughput | latency`` run.

Settings and JSON keys have vLLM's names where a concept is the same.
"""

import gc
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Optional

import numpy as np
import torch
from tqdm import tqdm

from megatron.dmc.environment import machine
from megatron.dmc.flags import new_file, number, numbers, table
from megatron.dmc.inference import bench, dummy
from megatron.dmc.inference.config import EngineConfig
from megatron.dmc.inference.engine import Engine
from megatron.dmc.inference.text import load_tokenizer
from megatron.dmc.kernels import active_backend

PARTS = ("schedule", "append", "attention", "linear", "other", "communication", "sampling", "host")
Figures = dict[str, Any]
"""Measurements of one model in one case, by the keys of the JSON."""


# ------------------------------------------------------------------------------------------------------------ settings


@dataclass(frozen=True)
class BenchConfig:
    """Models and iterations of a benchmark."""

    models: list[str] = field(metadata={"flags": ("models",), "nargs": "+", "metavar": "MODEL"})
    """Hugging Face directories; ratios are against the first."""
    compression_ratio: Optional[list[float]] = field(
        default=None, metadata={"nargs": None, "type": numbers(float, 1), "metavar": "CR,..."}
    )
    """Compression ratios of random weights, with --load-format dummy: each model is measured at each (1: plain)."""
    method: Optional[Literal["dmc", "dms"]] = None
    """Compression method of random weights, with --compression-ratio: dmc, or dms with adapters and a window of 256.
    Default: that of the model's config.json, or dmc."""
    tokenizer: Optional[str] = field(default=None, metadata={"metavar": "DIR"})
    """Directory of the tokenizer. Default: each model's own."""
    n: int = field(default=1, metadata={"type": number(int, 1)})
    """Completions per prompt."""
    temperature: float = 1.0
    """Sampling temperature; 0 means greedy decoding."""
    seed: int = 0
    """Seed of the random prompts and of sampling."""
    num_iters_warmup: int = field(default=1, metadata={"type": number(int, 0)})
    """Iterations that are not timed; the last of them is profiled by part of a step."""
    num_iters: int = field(default=3, metadata={"type": number(int, 1)})
    """Number of timed iterations."""
    disable_detokenize: bool = field(default=False, metadata={"action": "store_true"})
    """Leave the sampled tokens as ids, without text."""
    output_json: Optional[Path] = field(default=None, metadata={"metavar": "FILE", "type": new_file})
    """JSON file to write the measurements to."""

    def subjects(self, engine: EngineConfig) -> list["Subject"]:
        """Models to measure. Raises ``ValueError`` for a compression ratio of trained weights."""
        if self.compression_ratio is None:
            if self.method is not None:
                raise ValueError(f"--method is {self.method}; it goes with --compression-ratio, of random weights")
            return [Subject(model, None) for model in self.models]
        if engine.load_format != "dummy":
            raise ValueError(
                "--compression-ratio goes with --load-format dummy: a trained model has the ratio that it has"
            )
        return [Subject(model, ratio) for model in self.models for ratio in self.compression_ratio]


@dataclass(frozen=True)
class ThroughputConfig(BenchConfig):
    """Settings of ``dmc bench throughput``: many requests at once."""

    dataset_name: Literal["random", "custom"] = "random"
    """Source of the prompts: random token ids, or custom: the prompts of --dataset-path."""
    dataset_path: Optional[str] = field(default=None, metadata={"metavar": "FILE"})
    """JSONL file of prompts, {"prompt": text or token ids} in each line."""
    input_len: Optional[list[int]] = field(
        default=None, metadata={"nargs": None, "type": numbers(int, 1), "metavar": "N,..."}
    )
    """Tokens per prompt, one case for each number; longer prompts of a dataset are cut. Default: 1024 random tokens, or
    the dataset's own lengths."""
    output_len: int = field(default=128, metadata={"type": number(int, 1)})
    """Tokens per completion."""
    num_prompts: int = field(default=1000, metadata={"type": number(int, 1)})
    """Number of requests."""
    random_range_ratio: float = field(default=0.0, metadata={"metavar": "R"})
    """Spread of random lengths, which lie in N (1 - R) to N (1 + R)."""


@dataclass(frozen=True)
class LatencyConfig(BenchConfig):
    """Settings of ``dmc bench latency``: one batch of requests."""

    num_iters_warmup: int = field(default=10, metadata={"type": number(int, 0)})
    """Iterations that are not timed; the last of them is profiled by part of a step."""
    num_iters: int = field(default=30, metadata={"type": number(int, 1)})
    """Number of timed iterations."""
    input_len: list[int] = field(
        default_factory=lambda: [32], metadata={"nargs": None, "type": numbers(int, 1), "metavar": "N,..."}
    )
    """Tokens per prompt, one case for each number. Default: 32."""
    output_len: int = field(default=128, metadata={"type": number(int, 1)})
    """Tokens per completion."""
    batch_size: list[int] = field(
        default_factory=lambda: [8], metadata={"nargs": None, "type": numbers(int, 1), "metavar": "N,..."}
    )
    """Prompts per batch, one case for each number. Default: 8."""


@dataclass(frozen=True)
class Subject:
    """A model to measure: a directory as it is, or its shapes with random weights at a compression ratio."""

    path: str
    ratio: Optional[float]

    @property
    def name(self) -> str:
        return Path(self.path).resolve().name + ("" if self.ratio is None else f" CR {self.ratio:g}")


# ----------------------------------------------------------------------------------------------------------- measuring


Group = list[tuple[Subject, Engine]]
MakeWorkload = Callable[..., bench.Workload]
MakeFigures = Callable[[Engine, bench.Workload, list[bench.Iteration]], Figures]


class SideBySide:
    """Measures every subject in every case, each with the cache memory of the first subject."""

    def __init__(self, config: BenchConfig, engine: EngineConfig) -> None:
        self.config, self.engine = config, engine
        self.subjects = config.subjects(engine)
        self.device = engine.torch_device().type

    def run(
        self,
        cases: Sequence[dict[str, Any]],
        workload: MakeWorkload,
        figures: MakeFigures,
        max_num_seqs: Optional[int] = None,
    ) -> list[Figures]:
        """Measure, case by case. Returns nothing on all ranks but the first.

        Args:
            cases: keywords of ``workload``.
            workload: makes the requests of a case for an engine.
            figures: makes figures of timed iterations.
            max_num_seqs: rows of the cache when the engine's settings leave the number open.
        """
        found: list[Figures] = []
        rank = 0
        for group in self._engines(max_num_seqs):
            rank = group[0][1].parallel.rank
            for case in cases:
                found += self._run_case(group, case, workload, figures)
        return [] if rank else sorted(found, key=lambda row: cases.index(row["case"]))

    def _run_case(
        self, group: Group, case: dict[str, Any], workload: MakeWorkload, figures: MakeFigures
    ) -> list[Figures]:
        engines = [engine for _, engine in group]
        works = [workload(engine, **case) for engine in engines]
        for work, engine in zip(works, engines):
            _check_length(work, engine)
        return [
            figures(engine, work, timed) | _described(subject, engine, case, profiler)
            for (subject, engine), work, (timed, profiler) in zip(group, works, self._measure(engines, works))
        ]

    def _engines(self, max_num_seqs: Optional[int]) -> Iterator[Group]:
        """Groups of engines that take turns.

        On a CPU all of them, iteration by iteration: what slows the machine down slows all. On a GPU, whose speed is
        steady and whose memory is short, one after the other.
        """
        memory: Optional[int] = None
        group: Group = []
        for subject in self.subjects:
            group.append((subject, self._load(subject, memory, max_num_seqs)))
            memory = memory or bench.cache_bytes(group[-1][1])
            if self.device != "cpu":
                yield group
                group.clear()
                gc.collect()
                torch.cuda.empty_cache()
        if self.device == "cpu":
            yield group

    def _load(self, subject: Subject, memory: Optional[int], max_num_seqs: Optional[int]) -> Engine:
        config = replace(
            self.engine,
            kv_cache_memory_bytes=self.engine.kv_cache_memory_bytes or memory,
            max_num_seqs=self.engine.max_num_seqs or max_num_seqs,
            seed=self.config.seed,
        )
        path: Any = subject.path
        if subject.ratio is not None:
            path = dummy.open_directory(subject.path, subject.ratio, self.config.method)
        needed = not self.config.disable_detokenize or getattr(self.config, "dataset_path", None)
        return Engine(path, config, load_tokenizer(self.config.tokenizer or subject.path) if needed else None)

    def _measure(
        self, engines: Sequence[Engine], works: Sequence[bench.Workload]
    ) -> list[tuple[list[bench.Iteration], Optional[bench.StepProfiler]]]:
        """Timed iterations of each engine, in turns, and the profile of its last warm-up."""
        profilers: list[Optional[bench.StepProfiler]] = [None] * len(engines)
        timed: list[list[bench.Iteration]] = [[] for _ in engines]
        warmup, count = self.config.num_iters_warmup, self.config.num_iters
        with tqdm(total=(warmup + count) * len(engines), unit="iteration", disable=None, leave=False) as bar:
            for i in range(warmup):
                for at, (engine, work) in enumerate(zip(engines, works)):
                    profilers[at] = bench.StepProfiler(work) if i == warmup - 1 else None
                    bench.iterate(engine, work, profilers[at])
                    bar.update()
            for _ in range(count):
                for found, engine, work in zip(timed, engines, works):
                    found.append(bench.iterate(engine, work))
                    bar.update()
        return list(zip(timed, profilers))


def _check_length(work: bench.Workload, engine: Engine) -> None:
    if work.longest > engine.sizes.max_model_len:
        raise ValueError(
            f"prompt and completion have up to {work.longest} tokens; max_model_len is {engine.sizes.max_model_len}"
        )


def _described(
    subject: Subject, engine: Engine, case: dict[str, Any], profiler: Optional[bench.StepProfiler]
) -> Figures:
    seconds = profiler.parts if profiler is not None else None
    return {
        "model": subject.path,
        "name": subject.name,
        "case": case,
        "step_parts_ms": {name: 1e3 * s for name, s in seconds.items()} if seconds is not None else None,
        "peak_pages": profiler.peak_pages if profiler is not None else None,
        "weights_bytes": engine.model.nbytes(),
        "dtype": str(engine.model.dtype).removeprefix("torch."),
    }


# -------------------------------------------------------------------------------------------------------------- tables

Columns = dict[str, Callable[[Figures], object]]


def _against_first(rows: Sequence[Figures], series: str) -> None:
    """Add ``speedup`` against the first row of the same case, round by round, and the ratio of the largest batches."""
    first: dict[str, Figures] = {}
    for row in rows:
        base = first.setdefault(repr(row["case"]), row)
        row["speedup"] = bench.spread([theirs / ours for theirs, ours in zip(base[series], row[series])])
        row["max_batch_size_ratio"] = row["max_batch_size"] / max(1, base["max_batch_size"])


def _ranged(found: dict[str, float], digits: int = 1) -> str:
    return f"{found['median']:.{digits}f} [{found['q1']:.{digits}f}, {found['q3']:.{digits}f}]"


def _tables(rows: Sequence[Figures], columns: Columns) -> str:
    """Table of the measurements, and table of the parts of a step where there is a profile."""
    cases: Columns = {name.replace("_", " "): lambda r, name=name: r["case"][name] for name in rows[0]["case"]}
    shown: Columns = {
        "model": lambda r: r["name"],
        **cases,
        "CR": lambda r: r["compression_ratio"],
        "fits": lambda r: r["max_batch_size"],
        "batch": lambda r: r["peak_batch_size"],
        "limit": lambda r: r["batch_limited_by"],
        "empty": lambda r: f"{r['page_waste']:.1%}",
        "preempted": lambda r: f"{r['num_preemptions']:g}",
        **columns,
        "x first": lambda r: _ranged(r["speedup"], 2),
    }
    text = table(list(shown), [[value(row) for value in shown.values()] for row in rows])
    profiled = [row for row in rows if row["step_parts_ms"]]
    if profiled:
        parts = [part for part in PARTS if any(row["step_parts_ms"].get(part) for row in profiled)]
        cells = [
            [
                row["name"],
                *row["case"].values(),
                row["step_ms"]["median"],
                *(_share(row["step_parts_ms"], part) for part in parts),
            ]
            for row in profiled
        ]
        text += "\n\nwhere the time of a step goes (profiled in the warm-up)\n"
        text += table(["model", *cases, "ms/step", *parts], cells)
    return text


def _share(parts: dict[str, float], part: str) -> str:
    return f"{parts[part] / max(1e-12, sum(parts.values())):.1%}" if part in parts else "-"


def _environment(device: str) -> dict[str, Any]:
    """Hardware and versions, for the JSON."""
    found = machine()
    return {
        "device": found["gpu"] if device == "cuda" else found["cpu"],
        "threads": found["threads"],
        "kernels": active_backend(device),
        "megatron_dmc": found["megatron-dmc"],
        "torch": found["torch"],
        "python": found["python"],
    }


def _finish(config: BenchConfig, device: str, rows: list[Figures], columns: Columns) -> None:
    environment = _environment(device)
    print(_tables(rows, columns))
    print(
        f"\nCR measured; cache {rows[0]['kv_cache_memory_bytes'] / 2**20:.0f} MiB; {rows[0]['dtype']}; median "
        f"[quartiles] of {config.num_iters}; " + ", ".join(f"{key} {value}" for key, value in environment.items())
    )
    if config.output_json is not None:
        # vLLM's keys at the top are those of the first row.
        everything = {**rows[0], "results": rows, "environment": environment}
        config.output_json.write_text(json.dumps(everything, indent=2) + "\n")


# ---------------------------------------------------------------------------------------------------------- benchmarks


def throughput(config: ThroughputConfig, engine_config: EngineConfig) -> int:
    """Measure tokens per second of many requests at once, and print them. Returns the exit status."""
    if config.dataset_name == "custom" and config.dataset_path is None:
        raise ValueError("--dataset-name custom needs --dataset-path FILE")
    given = bench.read_prompts(config.dataset_path, config.num_prompts) if config.dataset_path is not None else None

    def workload(engine: Engine, input_len: Optional[int], output_len: int) -> bench.Workload:
        generator = np.random.default_rng(config.seed)
        if given is None:
            lens = bench.random_lens(input_len, config.random_range_ratio, config.num_prompts, generator)
            ids = bench.random_prompts(lens, engine.info.model.vocab_size, generator)
        else:
            ids = [engine.tokenize(prompt)[:input_len] for prompt in given]
        new = bench.random_lens(output_len, config.random_range_ratio, config.num_prompts, generator)
        return bench.Workload(ids, new, config.n, config.temperature)

    lengths = config.input_len or [1024 if given is None else None]
    cases = [{"input_len": length, "output_len": config.output_len} for length in lengths]
    runs = SideBySide(config, engine_config)
    rows = runs.run(cases, workload, bench.throughput_figures)
    if not rows:
        return 0
    _against_first(rows, "elapsed_times")
    if len(rows) == 1:
        row = rows[0]
        print(
            f"Throughput: {row['requests_per_second']:.2f} requests/s, {row['tokens_per_second']:.2f} total tokens/s, "
            f"{row['output_tokens_per_second']:.2f} output tokens/s\n"
            f"Total num prompt tokens:  {row['total_prompt_tokens']}\n"
            f"Total num output tokens:  {row['total_output_tokens']}\n"
        )
    columns: Columns = {
        "req/s": lambda r: r["requests_per_second"],
        "tok/s": lambda r: f"{r['tokens_per_second']:.1f}",
        "output tok/s": lambda r: _ranged(r["output_tokens_per_second_spread"]),
    }
    _finish(config, runs.device, rows, columns)
    return 0


def latency(config: LatencyConfig, engine_config: EngineConfig) -> int:
    """Measure seconds of one batch of requests, and print them. Returns the exit status."""

    def workload(engine: Engine, input_len: int, output_len: int, batch_size: int) -> bench.Workload:
        generator = np.random.default_rng(config.seed)
        ids = bench.random_prompts([input_len] * batch_size, engine.info.model.vocab_size, generator)
        return bench.Workload(ids, [output_len] * batch_size, config.n, config.temperature)

    cases = [
        {"input_len": length, "output_len": config.output_len, "batch_size": batch}
        for length in config.input_len
        for batch in config.batch_size
    ]
    runs = SideBySide(config, engine_config)
    rows = runs.run(cases, workload, bench.latency_figures, max(config.batch_size) * config.n)
    if not rows:
        return 0
    _against_first(rows, "latencies")
    if len(rows) == 1:
        print(f"Avg latency: {rows[0]['avg_latency']} seconds\nStd latency: {rows[0]['std_latency']} seconds")
        for percentage, value in rows[0]["percentiles"].items():
            print(f"{percentage}% percentile latency: {value} seconds")
        print()
    tokens = max(1, config.output_len - 1)
    columns: Columns = {
        "latency s": lambda r: _ranged(bench.spread(r["latencies"]), 3),
        "first token s": lambda r: _ranged(r["first_token"], 3),
        "ms/token": lambda r: 1e3 * (r["percentiles"]["50"] - r["first_token"]["median"]) / tokens,
    }
    _finish(config, runs.device, rows, columns)
    return 0
