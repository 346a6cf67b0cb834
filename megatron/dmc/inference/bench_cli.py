"""``dmc bench throughput`` and ``dmc bench latency``: models side by side in the same cache memory.

    dmc bench throughput Llama-2-7B Llama-2-7B-DMC-4x --input-len 512,2048 --kv-cache-memory-bytes 8000000000
    dmc bench latency llama-7b-config/ --load-format dummy --compression-ratio 1,4,8 --batch-size 1,16

Flags and JSON keys have vLLM's names where a concept is the same.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Optional

from megatron.dmc.environment import machine
from megatron.dmc.inference.cli import ENGINE_OPTIONS, Command, add_options, take_options
from megatron.dmc.inference.config import EngineConfig


def _numbers(kind: type, least: float) -> Callable[[str], list]:
    def parse(text: str) -> list:
        try:
            values = [kind(part) for part in text.split(",")]
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers such as 1,4") from None
        if any(value < least for value in values):
            raise argparse.ArgumentTypeError(f"{text!r} has a number below {least:g}")
        return values

    return parse


def _count(least: int) -> Callable[[str], int]:
    return lambda text: _numbers(int, least)(text)[0] if "," not in text else int(text)


def _add_common(parser: argparse.ArgumentParser, warmup: int, iterations: int) -> None:
    parser.add_argument(
        "models", nargs="+", metavar="MODEL", help="Hugging Face directories; ratios are against the first"
    )
    parser.add_argument(
        "--compression-ratio",
        type=_numbers(float, 1),
        metavar="CR,...",
        help="with --load-format dummy: each model once for each of these (1: plain)",
    )
    parser.add_argument("--tokenizer", metavar="DIR", help="default: each model's own")
    parser.add_argument("--n", type=_count(1), default=1, help="answers per prompt (default: 1)")
    parser.add_argument("--temperature", type=float, default=1.0, help="0: greedy (default: 1.0)")
    parser.add_argument("--seed", type=int, default=0, help="of the random prompts and of sampling (default: 0)")
    parser.add_argument(
        "--num-iters-warmup",
        type=_count(0),
        default=warmup,
        help=f"iterations that are not timed; in the last of them is looked where the time goes (default: {warmup})",
    )
    parser.add_argument(
        "--num-iters", type=_count(1), default=iterations, help=f"timed iterations (default: {iterations})"
    )
    parser.add_argument("--disable-detokenize", action="store_true", help="make no text of the answers")
    parser.add_argument("--output-json", type=Path, metavar="FILE", help="write the figures")
    # Iterations repeat their prompts.
    add_options(parser.add_argument_group("engine"), EngineConfig, ENGINE_OPTIONS, enable_prefix_caching=False)  # type: ignore[arg-type]


def _add_throughput(parser: argparse.ArgumentParser) -> None:
    _add_common(parser, warmup=1, iterations=3)
    parser.add_argument(
        "--dataset-name",
        choices=("random", "custom"),
        default="random",
        help="random token ids, or custom: the prompts of --dataset-path (default: random)",
    )
    parser.add_argument("--dataset-path", metavar="FILE", help='JSONL, {"prompt": text or token ids} in each line')
    parser.add_argument(
        "--input-len",
        type=_numbers(int, 1),
        metavar="N,...",
        help="tokens of a prompt; longer ones of a dataset are cut (default: 1024; a dataset's own)",
    )
    parser.add_argument("--output-len", type=_count(1), default=128, help="tokens of an answer (default: 128)")
    parser.add_argument("--num-prompts", type=_count(1), default=1000, help="requests (default: 1000)")
    parser.add_argument(
        "--random-range-ratio",
        type=float,
        default=0.0,
        metavar="R",
        help="random lengths in N (1 - R) to N (1 + R) (default: 0)",
    )


def _add_latency(parser: argparse.ArgumentParser) -> None:
    _add_common(parser, warmup=10, iterations=30)
    parser.add_argument("--input-len", type=_numbers(int, 1), default=[32], metavar="N,...", help="(default: 32)")
    parser.add_argument("--output-len", type=_count(1), default=128, help="(default: 128)")
    parser.add_argument(
        "--batch-size", type=_numbers(int, 1), default=[8], metavar="N,...", help="prompts at a time (default: 8)"
    )


# ----------------------------------------------------------------------------------------------------------------
# engines


@dataclasses.dataclass(frozen=True)
class Subject:
    """What is measured: a model as it lies there, or with random weights at a compression ratio."""

    path: str
    ratio: Optional[float]

    @property
    def name(self) -> str:
        return Path(self.path).resolve().name + ("" if self.ratio is None else f" CR {self.ratio:g}")


def subjects_of(args: argparse.Namespace) -> list[Subject]:
    if args.compression_ratio is None:
        return [Subject(model, None) for model in args.models]
    if args.load_format != "dummy":
        raise ValueError("--compression-ratio goes with --load-format dummy: a trained model has the ratio that it has")
    return [Subject(model, ratio) for model in args.models for ratio in args.compression_ratio]


def _load(subject: Subject, args: argparse.Namespace, memory: Optional[int], rows: Optional[int]) -> Any:
    from megatron.dmc.inference import dummy
    from megatron.dmc.inference.engine import Engine
    from megatron.dmc.inference.text import load_tokenizer

    settings = take_options(args, ENGINE_OPTIONS)
    settings["kv_cache_memory_bytes"] = settings["kv_cache_memory_bytes"] or memory
    settings["max_num_seqs"] = settings["max_num_seqs"] or rows
    path: Any = subject.path if subject.ratio is None else dummy.open_directory(subject.path, subject.ratio)
    needed = not args.disable_detokenize or getattr(args, "dataset_path", None)
    tokenizer = load_tokenizer(args.tokenizer or subject.path) if needed else None
    return Engine(path, EngineConfig(**settings, seed=args.seed), tokenizer)


def _groups(subjects: Sequence[Subject], args: argparse.Namespace, rows: Optional[int] = None) -> Iterator[list[Any]]:
    """Engines that take turns. On a CPU all of them, iteration by iteration: what slows the machine down slows all. On
    a GPU, whose speed is steady and whose memory is short, one after the other. Each has the cache memory of the first.
    """
    from megatron.dmc.inference.bench import cache_bytes

    memory, together = None, EngineConfig(device=args.device).torch_device().type == "cpu"
    engines: list[Any] = []
    for subject in subjects:
        engine = _load(subject, args, memory, rows)
        memory = memory or cache_bytes(engine)
        engines.append(engine)
        if not together:
            yield engines
            engines.clear()
            del engine
            _forget()
    if together:
        yield engines


def _forget() -> None:
    import torch

    gc.collect()
    torch.cuda.empty_cache()


def _measure(engines: Sequence[Any], works: Sequence[Any], args: argparse.Namespace) -> list[tuple[list[Any], Any]]:
    """(timed iterations, watch or None) of each engine, in turns."""
    from tqdm import tqdm

    from megatron.dmc.inference.bench import Watch, iterate

    watches: list[Any] = [None] * len(engines)
    timed: list[list[Any]] = [[] for _ in engines]
    with tqdm(
        total=(args.num_iters_warmup + args.num_iters) * len(engines), unit="iteration", disable=None, leave=False
    ) as bar:
        for i in range(args.num_iters_warmup):
            for at, (engine, work) in enumerate(zip(engines, works)):
                watches[at] = Watch(work) if i == args.num_iters_warmup - 1 else None
                iterate(engine, work, watches[at])
                bar.update()
        for _ in range(args.num_iters):
            for found, engine, work in zip(timed, engines, works):
                found.append(iterate(engine, work))
                bar.update()
    return list(zip(timed, watches))


def _row(subject: Subject, engine: Any, case: dict[str, Any], figures: dict[str, Any], watch: Any) -> dict[str, Any]:
    looked = watch is not None and watch.parts is not None
    parts = {name: 1e3 * seconds for name, seconds in watch.parts.items()} if looked else None
    return {
        **figures,
        "model": subject.path,
        "name": subject.name,
        "case": case,
        "step_parts_ms": parts,
        "peak_pages": watch.peak_pages if watch is not None else None,
        "weights_bytes": engine.model.nbytes(),
        "dtype": str(engine.model.dtype).removeprefix("torch."),
    }


def _run(
    args: argparse.Namespace,
    cases: Sequence[dict[str, Any]],
    rows: Optional[int],
    work_of: Callable[..., Any],
    figures_of: Callable[..., dict[str, Any]],
) -> list[dict[str, Any]]:
    """Figures of every subject in every case, case by case. Empty on all ranks but the first."""
    found: list[dict[str, Any]] = []
    subjects, rank = iter(subjects_of(args)), 0
    for engines in _groups(subjects_of(args), args, rows):
        named, rank = [next(subjects) for _ in engines], engines[0].parallel.rank
        for case in cases:
            works = [work_of(engine, **case) for engine in engines]
            for engine, work in zip(engines, works):
                if work.longest > engine.sizes.max_model_len:
                    raise ValueError(
                        f"prompt and answer have up to {work.longest} tokens; max_model_len is "
                        f"{engine.sizes.max_model_len}"
                    )
            for subject, engine, work, (timed, watch) in zip(named, engines, works, _measure(engines, works, args)):
                found.append(_row(subject, engine, case, figures_of(engine, work, timed), watch))
    return [] if rank else sorted(found, key=lambda row: cases.index(row["case"]))


# ----------------------------------------------------------------------------------------------------------------
# figures

PARTS = ("schedule", "append", "attention", "linear", "other", "communication", "sampling", "host")


def _against_first(rows: Sequence[dict[str, Any]], series: Callable[[dict[str, Any]], Sequence[float]]) -> None:
    """``speedup`` of every row against the first one of its case: of each round, and of the batch that fits."""
    from megatron.dmc.inference.bench import spread

    first: dict[str, dict[str, Any]] = {}
    for row in rows:
        base = first.setdefault(repr(row["case"]), row)
        row["speedup"] = spread([theirs / ours for theirs, ours in zip(series(base), series(row))])
        row["max_batch_size_ratio"] = row["max_batch_size"] / max(1, base["max_batch_size"])


def _table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    cells = [list(columns), *([f"{x:.2f}" if isinstance(x, float) else str(x) for x in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = [
        "  ".join(x.ljust(w) if i == 0 else x.rjust(w) for i, (x, w) in enumerate(zip(row, widths))) for row in cells
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def _ranged(found: dict[str, float], digits: int = 1) -> str:
    return f"{found['median']:.{digits}f} [{found['q1']:.{digits}f}, {found['q3']:.{digits}f}]"


def _tables(rows: Sequence[dict[str, Any]], columns: dict[str, Callable[[dict[str, Any]], object]]) -> str:
    """What was measured, then where the time of a step went."""
    shown = {
        "model": lambda r: r["name"],
        **{name.replace("_", " "): lambda r, name=name: r["case"][name] for name in rows[0]["case"]},
        "CR": lambda r: r["compression_ratio"],
        "fits": lambda r: r["max_batch_size"],
        "batch": lambda r: r["peak_batch_size"],
        "limit": lambda r: r["batch_limited_by"],
        "empty": lambda r: f"{r['page_waste']:.1%}",
        "pre-empted": lambda r: f"{r['num_preemptions']:g}",
        **columns,
        "x first": lambda r: _ranged(r["speedup"], 2),
    }
    text = _table(list(shown), [[value(row) for value in shown.values()] for row in rows])
    looked = [row for row in rows if row["step_parts_ms"]]
    if looked:
        parts = [part for part in PARTS if any(row["step_parts_ms"].get(part) for row in looked)]
        cells = [
            [
                row["name"],
                *row["case"].values(),
                row["step_ms"]["median"],
                *(_share(row["step_parts_ms"], part) for part in parts),
            ]
            for row in looked
        ]
        names = [name.replace("_", " ") for name in rows[0]["case"]]
        text += "\n\nwhere the time of a step goes (seen by a profiler in the warm-up)\n"
        text += _table(["model", *names, "ms/step", *parts], cells)
    return text


def _share(parts: dict[str, float], part: str) -> str:
    return f"{parts[part] / max(1e-12, sum(parts.values())):.1%}" if part in parts else "-"


def environment(device: str) -> dict[str, Any]:
    """Hardware and versions, for the JSON."""
    from megatron.dmc.kernels import active_backend

    found = machine()
    return {
        "device": found["gpu"] if device == "cuda" else found["cpu"],
        "threads": found["threads"],
        "kernels": active_backend(device),
        "megatron_dmc": found["megatron-dmc"],
        "torch": found["torch"],
        "python": found["python"],
    }


def _finish(
    args: argparse.Namespace, rows: list[dict[str, Any]], columns: dict[str, Callable[[dict[str, Any]], object]]
) -> None:
    where = environment(EngineConfig(device=args.device).torch_device().type)
    print(_tables(rows, columns))
    print(
        f"\nCR measured; cache {rows[0]['kv_cache_memory_bytes'] / 2**20:.0f} MiB; {rows[0]['dtype']}; median "
        f"[quartiles] of {args.num_iters}; " + ", ".join(f"{key} {value}" for key, value in where.items())
    )
    if args.output_json is not None:
        args.output_json.parent.mkdir(parents=True, exist_ok=True)
        # vLLM's keys at the top are those of the first row.
        args.output_json.write_text(json.dumps({**rows[0], "results": rows, "environment": where}, indent=2) + "\n")


# ------------------------------------------------------------------------------------------------------------ the
# commands


def _throughput(args: argparse.Namespace) -> int:
    import numpy as np

    from megatron.dmc.inference import bench

    if args.dataset_name == "custom" and args.dataset_path is None:
        raise ValueError("--dataset-name custom needs --dataset-path FILE")
    given = bench.read_prompts(args.dataset_path, args.num_prompts) if args.dataset_path is not None else None

    def work(engine: Any, input_len: Optional[int], output_len: int) -> bench.Work:
        generator = np.random.default_rng(args.seed)
        if given is None:
            lens = bench.random_lens(input_len, args.random_range_ratio, args.num_prompts, generator)
            ids = bench.random_prompts(lens, engine.info.model.vocab_size, generator)
        else:
            ids = [engine.tokenize(prompt)[:input_len] for prompt in given]
        new = bench.random_lens(output_len, args.random_range_ratio, args.num_prompts, generator)
        return bench.Work(ids, new, args.n, args.temperature)

    lengths = args.input_len or [1024 if given is None else None]
    cases = [{"input_len": length, "output_len": args.output_len} for length in lengths]
    rows = _run(args, cases, None, work, bench.throughput_figures)
    if not rows:
        return 0
    _against_first(rows, lambda row: row["elapsed_times"])
    if len(rows) == 1:
        row = rows[0]
        print(
            f"Throughput: {row['requests_per_second']:.2f} requests/s, {row['tokens_per_second']:.2f} total tokens/s, "
            f"{row['output_tokens_per_second']:.2f} output tokens/s\n"
            f"Total num prompt tokens:  {row['total_prompt_tokens']}\n"
            f"Total num output tokens:  {row['total_output_tokens']}\n"
        )
    columns: dict[str, Callable[[dict[str, Any]], object]] = {
        "req/s": lambda r: r["requests_per_second"],
        "tok/s": lambda r: f"{r['tokens_per_second']:.1f}",
        "output tok/s": lambda r: _ranged(r["output_tokens_per_second_spread"]),
    }
    _finish(args, rows, columns)
    return 0


def _latency(args: argparse.Namespace) -> int:
    import numpy as np

    from megatron.dmc.inference import bench

    def work(engine: Any, input_len: int, output_len: int, batch_size: int) -> bench.Work:
        ids = bench.random_prompts(
            [input_len] * batch_size, engine.info.model.vocab_size, np.random.default_rng(args.seed)
        )
        return bench.Work(ids, [output_len] * batch_size, args.n, args.temperature)

    cases = [
        {"input_len": length, "output_len": args.output_len, "batch_size": batch}
        for length in args.input_len
        for batch in args.batch_size
    ]
    rows = _run(args, cases, max(args.batch_size) * args.n, work, bench.latency_figures)
    if not rows:
        return 0
    _against_first(rows, lambda row: row["latencies"])
    if len(rows) == 1:
        print(f"Avg latency: {rows[0]['avg_latency']} seconds\nStd latency: {rows[0]['std_latency']} seconds")
        for percentage, value in rows[0]["percentiles"].items():
            print(f"{percentage}% percentile latency: {value} seconds")
        print()
    columns: dict[str, Callable[[dict[str, Any]], object]] = {
        "latency s": lambda r: _ranged(bench.spread(r["latencies"]), 3),
        "first token s": lambda r: _ranged(r["first_token"], 3),
        "ms/token": lambda r: 1e3 * (r["percentiles"]["50"] - r["first_token"]["median"]) / max(1, args.output_len - 1),
    }
    _finish(args, rows, columns)
    return 0


BENCHES = (
    Command("throughput", "tokens per second of many requests at once", _add_throughput, _throughput),
    Command("latency", "seconds of one batch of requests", _add_latency, _latency),
)
