#!/usr/bin/env python
"""Cost of the HTTP server, and its behaviour under overload.

Modes (``--mode``):

overhead
    The same greedy requests (token ids, all of one length) in three ways that take turns: the engine offline
    (``LLM.generate``), ``--clients`` closed-loop HTTP clients with whole responses, and as many with streams. Engine,
    server and client share the cores; the client speaks plain HTTP/1.0 and takes little CPU time.
    Target: the throughput through HTTP, whole and streamed, is at least 0.90 of the offline engine's (median of the
    ratios within a round).

latency
    The same streams from 1, 4 and ``--clients`` closed-loop clients, timed at the client, outside of the server's
    process, and as many on the engine itself: the server's own, in its process and on its thread, while no client
    speaks to it, and that of another process without a server. Two processes with the same code differ by some per
    cent, for the places of their memory, so what HTTP adds is the difference to the server's own engine, and the other
    one tells whether the server slows its engine down. One round each of ``--starts`` starts of both processes; medians
    over the starts. Targets: with ``--clients``, at least 0.95 of the engine's tokens per second; with one client, a
    TTFT of at most 3 ms above the engine's; no gap of two tokens more than 10 ms above the engine's longest, in the
    start where that is least. The CPU time per token of the engine and of the whole server tells the cost of HTTP on a
    machine that has other work, too.

vllm
    ``vllm serve`` and ``dmc serve`` with the same plain model, in turns: streams of one and of ``--clients``
    closed-loop clients, timed at the client. Both servers run all the time on the same cores, without prefix caching;
    vLLM has its defaults but for the sizes. ``--vllm`` is the Python of an environment with vLLM, which
    ``tests/vllm/run.py --environment DIR`` makes, and ``--vllm-preload`` its OpenMP library and allocator, as its
    documentation wants them. Not one of ``all``. Targets: at least vLLM's tokens per second, and at most its TTFT
    (medians of the ratios within a round).

load
    ``--requests`` random requests of 64 clients, streamed and not, a quarter of them structured, 15% of which
    disconnect, with a KV cache that is far too small and a bounded queue. Targets: every request gets the tokens of a
    lone run, or one of the structure's choices, or a 503, or is left by its client; sequences are preempted; all pages
    are free at the end; the server's resident memory at the end is at most 3% above that at a third of the load;
    SIGTERM ends the server with status 0.
"""

import argparse
import asyncio
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import psutil
import torch
from _common import ROOT, arguments, finish, ratio, run_script, spread, table
from _http import load, post, tokens_of
from _streams import Times, http
from _vllm_server import vllm_served
from engine import prompts, write_model

from megatron.dmc.inference import LLM, SamplingParams
from megatron.dmc.serving.server import run_on_loop

OVERHEAD_TARGET, MEMORY_TARGET = 0.90, 1.03
RATE_TARGET, TTFT_TARGET, GAP_TARGET = 0.95, 3.0, 10.0  # of offline; ms; ms
LEAST_REQUESTS = 12
"""Requests of a start with few clients, for medians."""
ENGINE_PROCESS = Path(__file__).with_name("_engine_process.py")
SERVED = (ENGINE_PROCESS, "served")


def add_tokenizer(directory: Path) -> None:
    """Write a tokenizer of 1,024 tokens: bytes, pairs of letters, and the end of a sequence."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    letters = [c for c in alphabet if c.isascii() and c.isalnum()]
    pairs = [(a, b) for a in letters for b in letters][: 1023 - len(alphabet)]
    vocabulary = {token: i for i, token in enumerate([*alphabet, *(a + b for a, b in pairs)])}
    made = Tokenizer(models.BPE(vocabulary, pairs))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.add_special_tokens(["</s>"])
    made.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))


@contextmanager
def served(threads: int, *options: object, own: Sequence[object] = ("-m", "megatron.dmc.cli", "serve")):
    """Process and port of a ``dmc serve``, which gets SIGTERM at the end and must exit with status 0.

    Args:
        options: arguments of ``dmc serve``, the model first.
        own: what Python runs.
    """
    process = python(threads, *own, *options, "--port", "0", "--disable-access-log", stderr=subprocess.PIPE)
    lines: list[str] = []
    try:
        for line in process.stderr:
            lines.append(line)
            if found := re.search(r"on http://[\d.]+:(\d+)", line):
                break
        else:
            raise SystemExit("".join(lines))
        threading.Thread(target=lambda: lines.extend(process.stderr), daemon=True).start()
        yield process, int(found[1])
        process.send_signal(signal.SIGTERM)
        if process.wait(60):
            raise SystemExit(f"the server ended with {process.returncode}\n" + "".join(lines[-20:]))
    finally:
        process.kill()
        process.wait()


def python(threads: int, *command: object, **pipes: int) -> subprocess.Popen:
    """Start Python with this package, speaking lines by stdin and stdout."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(threads)}
    pipes |= {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    return subprocess.Popen([sys.executable, *map(str, command)], text=True, env=env, **pipes)


@contextmanager
def engine_alone(threads: int, *options: object):
    """Process with an engine and no server, which ends when its stdin does."""
    process = python(threads, ENGINE_PROCESS, "alone", *options)
    try:
        yield process
        process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()


def on_engine(process: subprocess.Popen, asked: list[list[int]], clients: int, new_tokens: int) -> Times:
    """Times of requests on the engine of a process itself, without HTTP."""
    process.stdin.write(json.dumps({"asked": asked, "clients": clients, "new_tokens": new_tokens}) + "\n")
    process.stdin.flush()
    if not (line := process.stdout.readline()):
        raise SystemExit("the engine's process has ended")
    return Times(**json.loads(line))


# ---------------------------------------------------------------------------------------------------------- overhead


async def closed_loop(
    port: int, asked: list[list[int]], clients: int, new_tokens: int, stream: bool
) -> list[list[int]]:
    """Send all requests from so many clients, each one after the other. Returns the responses."""
    left, found = iter(range(len(asked))), [[] for _ in asked]

    async def client() -> None:
        for n in left:
            body = {"prompt": asked[n], "max_tokens": new_tokens, "stream": stream}
            body |= {"temperature": 0, "ignore_eos": True, "return_token_ids": True}
            status, text = await post(port, body)
            if status != 200:
                raise SystemExit(f"HTTP {status}: {text[:300]!r}")
            found[n] = text

    await asyncio.gather(*(client() for _ in range(clients)))
    return found


def overhead(args: argparse.Namespace, path: Path) -> tuple[dict, list[str]]:
    asked = prompts(args.clients * args.per_client, args.prompt, seed=3)
    params = SamplingParams(temperature=0, max_tokens=args.new_tokens, ignore_eos=True)
    sizes = dict(max_num_seqs=args.clients, max_model_len=args.prompt + args.new_tokens)
    llm = LLM(path, device="cpu", **sizes)
    total, seconds, own = len(asked) * args.new_tokens, {"offline": [], "whole": [], "stream": []}, 0.0
    llm.generate(asked[: args.clients], SamplingParams(temperature=0, max_tokens=2, ignore_eos=True))
    options = [x for key, value in sizes.items() for x in ("--" + key.replace("_", "-"), value)]
    with served(args.threads, path, "--device", "cpu", *options) as (_, port):
        asyncio.run(closed_loop(port, asked[: args.clients], args.clients, 2, True))
        for _ in range(args.rounds):
            began = time.perf_counter()
            wanted = [result.outputs[0].token_ids for result in llm.generate(asked, params)]
            seconds["offline"].append(time.perf_counter() - began)
            for name, stream in (("whole", False), ("stream", True)):
                began, used = time.perf_counter(), time.process_time()
                found = asyncio.run(closed_loop(port, asked, args.clients, args.new_tokens, stream))
                seconds[name].append(time.perf_counter() - began)
                own = max(own, (time.process_time() - used) / seconds[name][-1])
                if [tokens_of(text, stream) for text in found] != wanted:
                    raise SystemExit(f"{name}: the tokens through HTTP are not those of the engine")
    speed = {name: spread([total / t for t in series]) for name, series in seconds.items()}
    ratios = {name: ratio(seconds["offline"], seconds[name]) for name in ("whole", "stream")}
    rows = [
        (name, s["median"], s["q1"], s["q3"], ratios[name]["median"] if name in ratios else 1.0)
        for name, s in speed.items()
    ]
    print(
        f"{len(asked)} requests of {args.prompt} + {args.new_tokens} tokens, {args.clients} at a time; "
        f"the client takes up to {own:.1%} of a core"
    )
    print(table(("", "tokens/s", "q1", "q3", "of offline"), rows))
    missed = [
        f"{name}: {r['median']:.3f} of the engine's offline throughput, not {OVERHEAD_TARGET}"
        for name, r in ratios.items()
        if r["median"] < OVERHEAD_TARGET
    ]
    return {"tokens_per_second": speed, "of_offline": ratios, "client_cpu_share": own}, missed


# ----------------------------------------------------------------------------------------------------------- latency


def latency(args: argparse.Namespace, path: Path) -> tuple[dict, list[str]]:
    sizes = dict(max_num_seqs=args.clients, max_model_len=args.prompt + args.new_tokens)
    options = [x for key, value in sizes.items() for x in ("--" + key.replace("_", "-"), value)]
    options = [path, "--device", "cpu", "--no-enable-prefix-caching", *options]
    starts = [one_start(args, options) for _ in range(args.starts)]
    figures, missed = {}, []
    for clients in starts[0]:
        found = {name: [start[clients][name] for start in starts] for name in starts[0][clients]}
        figures[clients], told = compare(clients, found, clients == args.clients)
        missed += told
    return figures, missed


def one_start(args: argparse.Namespace, options: Sequence[object]) -> dict[int, dict[str, tuple[float, ...]]]:
    """Start the processes. Returns the row of each way to run the same requests, by the number of clients."""
    found: dict[int, dict[str, tuple[float, ...]]] = {}
    with engine_alone(args.threads, *options) as alone, served(args.threads, *options, own=SERVED) as (server, port):
        ways = {
            "alone": (alone, partial(on_engine, alone)),
            "engine": (server, partial(on_engine, server)),
            "client": (server, lambda *job: run_on_loop(http(port, *job))),
        }
        for clients in sorted({1, min(4, args.clients), args.clients}):
            asked = prompts(max(clients * args.per_client, LEAST_REQUESTS), args.prompt, seed=clients)
            found[clients] = {}
            for name, (process, run) in ways.items():
                run(asked[:clients], clients, min(args.new_tokens, 8))  # warm-up
                clock = cpu_clock(psutil.Process(process.pid))
                result = run(asked, clients, args.new_tokens)
                found[clients][name] = (*result.row(), 1e3 * clock() / result.tokens)
    return found


def cpu_clock(process: psutil.Process) -> Callable[[], float]:
    """Function that returns the seconds of CPU time which a process has taken since now."""
    began = sum(process.cpu_times()[:2])
    return lambda: sum(process.cpu_times()[:2]) - began


def compare(clients: int, found: dict[str, list[tuple]], busiest: bool) -> tuple[dict, list[str]]:
    """Print the medians over the starts. Returns the figures and the targets that are missed."""
    heads = ("tokens/s", "TTFT", "gap p50", "gap p99", "gap max", "CPU/token")
    rows = [(name, *(statistics.median(column) for column in zip(*starts))) for name, starts in found.items()]
    print(f"\n{clients} at a time; ms but for tokens/s\n" + table(("", *heads), rows))
    alone, engine, client = found.values()
    column = lambda rows, n: [row[n] for row in rows]
    rate, ttft = ratio(column(client, 0), column(engine, 0)), spread([a[1] - b[1] for a, b in zip(client, engine)])
    within, gap = ratio(column(engine, 0), column(alone, 0)), min(a[4] - b[4] for a, b in zip(client, engine))
    print(
        f"client / engine: {rate['median']:.3f} ({rate['min']:.3f} to {rate['max']:.3f}) of the rate, TTFT "
        f"{ttft['median']:+.2f} ms ({ttft['min']:+.2f} to {ttft['max']:+.2f}); engine / alone: {within['median']:.3f} "
        f"({within['min']:.3f} to {within['max']:.3f}) of the rate"
    )
    missed = []
    if busiest and rate["median"] < RATE_TARGET:
        missed.append(f"{clients} at a time: {rate['median']:.3f} of the engine's tokens/s, not {RATE_TARGET}")
    if clients == 1 and ttft["median"] > TTFT_TARGET:
        missed.append(f"the TTFT is {ttft['median']:.1f} ms above the engine's, not {TTFT_TARGET:g}")
    if gap > GAP_TARGET:
        missed.append(f"{clients} at a time: a gap is {gap:.1f} ms above the engine's longest, not {GAP_TARGET:g}")
    return {"starts": found, "rate": rate, "ttft_ms": ttft, "gap_ms": gap, "rate_of_alone": within}, missed


# -------------------------------------------------------------------------------------------------------------- vllm


def against_vllm(args: argparse.Namespace, path: Path) -> tuple[dict, list[str]]:
    common = ("--dtype", args.dtype, "--max-num-seqs", args.clients, "--no-enable-prefix-caching")
    common += ("--max-model-len", args.prompt + args.new_tokens, "--kv-cache-memory-bytes", 1 << 30)
    figures, missed = {}, []
    with (
        vllm_served(args.vllm, path, args.vllm_preload, *common) as theirs,
        served(args.threads, path, "--device", "cpu", *common) as (_, ours),
    ):
        ports = {"dmc": ours, "vllm": theirs}
        print(f"{same_tokens(ports, args):.0%} of greedy tokens are at the same place in both")
        for clients in sorted({1, args.clients}):
            asked = prompts(clients * args.per_client, args.prompt, seed=clients)
            found: dict[str, list[Times]] = {name: [] for name in ports}
            for n in range(args.rounds + 1):
                for name, port in ports.items():
                    times = run_on_loop(http(port, asked, clients, args.new_tokens, joined=name == "vllm"))
                    if n:  # the first one warms up
                        found[name].append(times)
            figures[clients], told = compare_servers(clients, found)
            missed += told
    return figures, missed


def compare_servers(clients: int, found: dict[str, list[Times]]) -> tuple[dict, list[str]]:
    """Print the medians of the rounds of both servers. Returns the figures and the targets that are missed."""
    rows = {name: [times.row() for times in rounds] for name, rounds in found.items()}
    medians = [(name, *map(statistics.median, zip(*rounds))) for name, rounds in rows.items()]
    heads = ("", "tokens/s", "TTFT", "gap p50", "gap p99", "gap max")
    print(f"\n{clients} at a time; ms but for tokens/s\n" + table(heads, medians))
    figures, missed = {"rounds": rows}, []
    for name, column in (("tokens/s", 0), ("TTFT", 1)):
        figures[name] = r = ratio(*([row[column] for row in rows[server]] for server in ("dmc", "vllm")))
        text = f"{clients} at a time: {r['median']:.3f} ({r['min']:.3f} to {r['max']:.3f}) of vLLM's {name}"
        print(text)
        if r["median"] > 1 if name == "TTFT" else r["median"] < 1:
            missed.append(text)
    return figures, missed


def same_tokens(ports: dict[str, int], args: argparse.Namespace) -> float:
    """Share of the tokens of greedy completions that both servers have at the same place."""
    body = {"temperature": 0, "ignore_eos": True, "return_token_ids": True, "max_tokens": args.new_tokens}
    same = total = 0
    for prompt in prompts(4, args.prompt, seed=9):
        found = []
        for port in ports.values():
            status, text = asyncio.run(post(port, body | {"prompt": prompt}))
            if status != 200:
                raise SystemExit(f"HTTP {status}: {text[:300]!r}")
            found.append(tokens_of(text, stream=False))
        same += sum(a == b for a, b in zip(*found))
        total += args.new_tokens
    return same / total


# -------------------------------------------------------------------------------------------------------------- load


def scrape(port: int) -> dict[str, float]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
        lines = (line.rsplit(" ", 1) for line in answer.read().decode().splitlines() if line.startswith("dmc:"))
        return {name.split("{")[0]: float(value) for name, value in lines}


def bad_load(args: argparse.Namespace, path: Path) -> tuple[dict, list[str]]:
    asked = [prompt[: 8 + 11 * n] for n, prompt in enumerate(prompts(12, 160, seed=5))]
    llm = LLM(path, device="cpu", max_model_len=256)
    params = SamplingParams(temperature=0, max_tokens=90, ignore_eos=True)
    lone = [llm.generate(prompt, params)[0].outputs[0].token_ids for prompt in asked]
    heads, rows, sizes = args.layers * args.heads, 16, llm.engine.sizes
    pages = heads * 15  # one of the longest sequences, if it were not compressed; about five that are
    settings = {
        "--device": "cpu",
        "--max-model-len": 256,
        "--max-num-seqs": rows,
        "--max-num-batched-tokens": 128,
        "--kv-cache-memory-bytes": pages * (sizes.page_bytes + 4) + rows * sizes.row_bytes,
        "--max-num-queued-requests": 52,
    }
    options = [part for setting in settings.items() for part in setting]
    memory: list[tuple[float, float]] = []
    with served(args.threads, path, *options) as (process, port):
        info, began, done = psutil.Process(process.pid), time.perf_counter(), threading.Event()

        def watch() -> None:
            while not done.wait(0.25):
                memory.append((round(time.perf_counter() - began, 2), info.memory_info().rss / 2**20))

        threading.Thread(target=watch, daemon=True).start()
        outcome = asyncio.run(load(port, asked, lone, requests=args.requests, seed=1, choices=("yes", "no", "maybe")))
        seconds = time.perf_counter() - began
        time.sleep(1.0)
        done.set()
        state = scrape(port)
    free, pages, preempted = state["dmc:num_pages_free"], state["dmc:num_pages"], state["dmc:num_preemptions_total"]
    third = len(memory) // 3
    early = statistics.median(m for _, m in memory[third : third + max(1, third // 3)])
    late = statistics.median(m for _, m in memory[-max(1, third // 3) :])
    counts = dict(outcome.counts)
    print(
        f"{args.requests} requests in {seconds:.1f} s: {counts}, wrong {len(outcome.wrong)}; {preempted:.0f} "
        f"preemptions; {free:.0f} of {pages:.0f} pages free"
    )
    points = [memory[min(len(memory) - 1, i * len(memory) // 8)] for i in range(9)]
    print(table(("s", "MiB resident"), points))
    missed = [f"request went wrong: {text}" for text in outcome.wrong[:3]]
    if sum(counts.values()) + len(outcome.wrong) != args.requests:
        missed.append(f"{sum(counts.values())} of {args.requests} requests have an outcome")
    if free != pages:
        missed.append(f"{pages - free:.0f} pages are not free")
    if preempted == 0 or not counts.get("left") or not counts.get("refused"):
        missed.append(f"the load was not bad: {counts}, {preempted:.0f} preemptions")
    if late > MEMORY_TARGET * early:
        missed.append(f"memory went from {early:.1f} to {late:.1f} MiB, more than {MEMORY_TARGET}")
    return {
        "counts": counts,
        "wrong": len(outcome.wrong),
        "seconds": seconds,
        "preemptions": preempted,
        "pages": pages,
        "rss_mib": memory[:: max(1, len(memory) // 100)],
        "rss_early": early,
        "rss_late": late,
    }, missed


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--mode", choices=("overhead", "latency", "vllm", "load", "all"), default="all")
    for name, value, text in (
        ("layers", 8, ""),
        ("hidden", 1024, ""),
        ("heads", 16, "query and KV heads"),
        ("head-dim", 64, ""),
        ("clients", 32, ""),
        ("per-client", 2, "requests of a client in a round or start"),
        ("prompt", 64, "tokens"),
        ("new-tokens", 48, "of an answer"),
        ("rounds", 3, "of --mode overhead and vllm"),
        ("starts", 5, "of the processes of --mode latency"),
        ("requests", 2000, "of the bad load"),
        ("threads", os.cpu_count() or 1, "of torch, in either process"),
    ):
        parser.add_argument(f"--{name}", type=int, default=value, help=text)
    parser.add_argument("--vllm", type=Path, help="interpreter of an environment with vLLM, for --mode vllm")
    parser.add_argument("--vllm-preload", default="", metavar="PATHS", help="LD_PRELOAD of vLLM")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of --mode vllm")
    args = parser.parse_args()
    if args.mode == "vllm" and args.vllm is None:
        parser.error(
            "--mode vllm needs --vllm PYTHON, of an environment that tests/vllm/run.py --environment DIR makes"
        )
    args.contexts, args.method = [0], "dmc"  # of write_model: 4,096 positions
    began = time.perf_counter()
    torch.set_num_threads(args.threads)
    figures, missed = {}, []
    with tempfile.TemporaryDirectory() as name:
        if args.mode == "vllm":
            path = write_model(Path(name), args, getattr(torch, args.dtype), 1)
            add_tokenizer(path)
            print(f"{args.layers} layers of {args.hidden}, {args.heads} heads of {args.head_dim}, {args.dtype}\n")
            figures["vllm"], missed = against_vllm(args, path)
        if args.mode in ("overhead", "latency", "all"):
            (large := Path(name, "large")).mkdir()
            path = write_model(large, args, torch.float32, 4)
            add_tokenizer(path)
            print(f"{args.layers} layers of {args.hidden}, {args.heads} heads of {args.head_dim}, CR 4, float32\n")
            for mode, measure in (("overhead", overhead), ("latency", latency)):
                if args.mode in (mode, "all"):
                    figures[mode], found = measure(args, path)
                    missed += found
        if args.mode in ("load", "all"):
            args.layers, args.hidden, args.heads, args.head_dim = 2, 128, 4, 32
            (small := Path(name, "small")).mkdir()
            path = write_model(small, args, torch.float32, 4)
            add_tokenizer(path)
            print("\n2 layers of 128, 4 heads of 32, CR 4, float32, under a bad load\n")
            figures["load"], found = bad_load(args, path)
            missed += found
    finish(args, "serving", figures, missed, began)


if __name__ == "__main__":
    run_script(main)
