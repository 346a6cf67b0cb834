"""Shared parts of the benchmark scripts: options, interleaved timing, peak memory, tables, and the JSON record.

A script's targets stand in its own docstring. It calls :func:`arguments`, measures, and ends with :func:`finish`.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch

from megatron.dmc import environment, flags

ROOT = Path(__file__).resolve().parent.parent
table = partial(flags.table, left=0)
"""Text table with columns aligned to the right and a rule under the head; floats have two decimals."""
PACKAGES = ("torch", "megatron-core", "transformer-engine", "flash-attn", "flashinfer-python", "numpy")


def arguments(doc: str | None) -> argparse.ArgumentParser:
    """Parser with the script's docstring as its help and the options that every benchmark has."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--json", metavar="FILE", type=flags.new_file, help="file for the figures, hardware, versions and commit"
    )
    parser.add_argument("--check", action="store_true", help="exit 1 when a target of the text above is missed")
    return parser


def run_script(main: Callable[[], None]) -> None:
    """Call a script's ``main``. What it refuses, and what the system says of a file, is one line and status 2."""
    try:
        main()
    except (ValueError, OSError) as error:
        print(f"error: {flags.one_line(error)}", file=sys.stderr)
        raise SystemExit(2) from None


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add --device, --dtype and --threads."""
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default, help="device (default: %(default)s)")
    dtype = "data type (default: float32 on CPU, bfloat16 on CUDA)"
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help=dtype)
    threads = "threads of torch on the CPU (default: %(default)s)"
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help=threads)


def resolve_device(args: argparse.Namespace) -> tuple[torch.device, torch.dtype]:
    """Device and data type of --device and --dtype, with torch set to --threads. Exits 2 when CUDA is not there."""
    if args.device == "cuda" and not torch.cuda.is_available():
        print("error: --device cuda, but torch.cuda.is_available() is False; use --device cpu", file=sys.stderr)
        raise SystemExit(2)
    torch.set_num_threads(args.threads)
    default = "float32" if args.device == "cpu" else "bfloat16"
    return torch.device(args.device), getattr(torch, args.dtype or default)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def interleave(
    functions: Mapping[str, Callable[[], object]],
    device: torch.device,
    *,
    seconds: float = 8.0,
    rounds: tuple[int, int] = (5, 30),
) -> dict[str, list[float]]:
    """Milliseconds of each function, in rounds of one call each: what slows the machine down slows all of them.

    Two calls warm up (more than one: caches, allocator, autotuning). Then rounds go on for ``seconds``, but no fewer
    and no more than ``rounds``.
    """
    for _ in range(2):
        for function in functions.values():
            function()
    times: dict[str, list[float]] = {name: [] for name in functions}
    began = time.perf_counter()
    while len(next(iter(times.values()))) < rounds[1]:
        for name, function in functions.items():
            synchronize(device)
            start = time.perf_counter()
            function()
            synchronize(device)
            times[name].append(1e3 * (time.perf_counter() - start))
        if time.perf_counter() - began > seconds and len(times[name]) >= rounds[0]:
            break
    return times


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, quartiles, least and greatest of measured values, and their number."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return {"median": median, "q1": low, "q3": high, "min": min(values), "max": max(values), "n": len(values)}


def quartiles(found: Mapping[str, float], form: str = ".2f") -> str:
    """Quartiles of a :func:`spread` as text."""
    return f"{found['q1']:{form}}-{found['q3']:{form}}"


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> dict[str, float]:
    """Spread of the ratios within each round."""
    return spread([a / b for a, b in zip(numerator, denominator, strict=True)])


def peak_bytes(function: Callable[[], object], device: torch.device) -> int:
    """Largest number of tensor bytes alive at once during a call, above what was alive before it.

    On CUDA it is the allocator's own peak. On CPU it is the running sum of torch's allocations and frees, which is
    exact and the same in every run, unlike the process's resident memory. Call ``function`` once before: the first
    call allocates more.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        function()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    assert events, "torch's profiler has recorded no allocation"
    alive = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return peak


def machine() -> dict[str, object]:
    """Hardware, versions and commit, as every JSON record has them."""
    return {
        **dict.fromkeys(PACKAGES),
        **environment.machine(PACKAGES),
        "load_average": round(os.getloadavg()[0], 2),
        "commit": _git("rev-parse", "HEAD") or None,
        "uncommitted_changes": bool(_git("status", "--porcelain")),
    }


def _git(*command: str) -> str:
    try:
        return subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def record_table(rows: Sequence[Mapping[str, object]]) -> str:
    """Text table of records that all have the same keys, which are its columns."""
    return table(list(rows[0]), [list(row.values()) for row in rows])


def finish(args: argparse.Namespace, name: str, figures: object, missed: Sequence[str], start: float) -> None:
    """Write the JSON record and print the missed targets; exit 1 when there is one and --check is given. Of the paths
    among the options the record has the names, not where this machine keeps them.

    Args:
        start: time.perf_counter() at the start of the script.
    """
    name_of = lambda value: value.name if isinstance(value, Path) else value
    options = {k: [name_of(v) for v in o] if isinstance(o, list) else name_of(o) for k, o in vars(args).items()}
    seconds = round(time.perf_counter() - start, 1)
    if args.json is not None:
        record = {"benchmark": name, "options": options, "seconds": seconds, "missed": list(missed)}
        args.json.write_text(json.dumps({**record, "machine": machine(), "figures": figures}, indent=2) + "\n")
    info = machine()
    where = info["gpu"] if getattr(args, "device", "cpu") == "cuda" else f"{info['cpu']}, {info['threads']} threads"
    print(f"{where}; torch {info['torch']}; commit {str(info['commit'])[:9]}; {seconds:.0f} s")
    for target in missed:
        print(f"missed: {target}")
    print("all targets met" if not missed else f"{len(missed)} missed")
    if args.check and missed:
        raise SystemExit(1)
