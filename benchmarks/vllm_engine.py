"""Decoding inside vLLM: compressed caches against vLLM's own in the same cache memory, and against the engine of this
package. It runs in an environment that has vLLM and this package (docs/vllm.md):

    ENVIRONMENT/bin/python benchmarks/vllm_engine.py --dtype bfloat16

The model is that of engine.py, and so is the way to begin: all take in as many sequences of ``--context`` tokens as
their cache holds, with a stand-in for the model, and then decode with the model itself. Each server is a process of its
own:

vllm plain            the plain model inside vLLM, with the plugin installed
vllm plain, no plugin the same with the plugin switched off. Before, both answer some prompts; at the end, the calls of
                      some steps are counted: of Python's functions, built-in ones and operators
vllm dmc, vllm dms    the compressed models inside vLLM
engine dmc, ...       the compressed models in the engine of this package

A process keeps a pace of its own for as long as it runs, by where its memory lies, and two of the same code differ by
some per cent. So all servers are started ``--starts`` times, every other time in the opposite order. Those of one start
decode in turns; its ratio is the median of those within its rounds, and the figures are over the starts.

vLLM's speed on CPUs wants its OpenMP library and allocator in LD_PRELOAD, as its documentation says; all processes
inherit it. Their threads wait 5 ms for more work, as in vLLM's own workers: that library's default of 200 ms would take
a core from whoever's turn is next. ``--compile`` gives vLLM torch.compile, which takes minutes.

``--methods`` without a name measures the plain models alone.

Targets (--check) of DMC at CR 4 and 8,192 tokens or more: 3.5 times the sequences of the plain model in vLLM and 3
times its tokens per second, and 0.95 of the engine's. Of plain models: with and without the plugin the same tokens, the
same calls, and tokens per second within 3%, which few starts cannot tell.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import math
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections import Counter
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from _common import add_device, arguments, finish, interleave, ratio, resolve_device, run_script, spread, table
from engine import ROUNDS, STEPS, StandIn, filled, prompts, room, write_model

PLAIN, WITHOUT = "vllm plain", "vllm plain, no plugin"
SEQUENCES_TARGET, TOKENS_TARGET, ENGINE_TARGET, PLAIN_TARGET = 3.5, 3.0, 0.95, 0.03
LONG = 8192  # tokens from which on targets hold
BLOCK = 128  # tokens of vLLM's blocks on CPUs


class InVLLM:
    """A model inside vLLM, in this process."""

    def __init__(self, job: dict[str, Any]) -> None:
        from vllm import LLM

        self.job = job
        self.llm = LLM(
            str(job["model"]),
            skip_tokenizer_init=True,
            dtype=job["dtype"],
            enforce_eager=not job["compile"],
            kv_cache_memory_bytes=job["memory"],
            max_num_seqs=job["rows"],
            max_num_batched_tokens=job["step"],
            max_model_len=job["context"] + job["new"],
            enable_prefix_caching=False,
            disable_log_stats=True,
            async_scheduling=False,
        )
        self.engine = self.llm.llm_engine
        self.scheduler = self.engine.engine_core.engine_core.scheduler
        self.preemptions = 0
        preempt = self.scheduler._preempt_request

        def counted(*args: Any, **named: Any) -> Any:
            self.preemptions += 1
            return preempt(*args, **named)

        self.scheduler._preempt_request = counted

    def answers(self) -> list[list[int]]:
        """Greedy tokens of some short prompts."""
        from vllm import SamplingParams

        params = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True, detokenize=False)
        texts = [{"prompt_token_ids": prompt} for prompt in prompts(4, 50, seed=3)]
        return [list(one.outputs[0].token_ids) for one in self.llm.generate(texts, params, use_tqdm=False)]

    def fill(self) -> None:
        """Take in sequences until no more fit, and let those that wait go."""
        from vllm import SamplingParams

        self.engine.apply_model(self._replace)
        params = SamplingParams(temperature=0, max_tokens=self.job["new"], ignore_eos=True, detokenize=False)
        for i, prompt in enumerate(prompts(self.job["rows"], self.job["context"])):
            self.engine.add_request(str(i), {"prompt_token_ids": prompt}, params)
        while True:
            before = list(self.scheduler.running)
            all_decode = bool(before) and all(r.num_tokens - r.num_computed_tokens == 1 for r in before)
            self.engine.step()
            if all_decode and list(self.scheduler.running) == before:
                break
        self.engine.abort_request([request.request_id for request in self.scheduler.waiting], internal=True)
        # A block of each kind for every sequence, or else the youngest would be preempted while we measure. The memory
        # is what the plain model's sequences take at their ends.
        kinds = {"plain": 0, "dmc": 1, "dms": 2}[self.job["method"]]
        while self.scheduler.kv_cache_manager.block_pool.get_num_free_blocks() < kinds * len(self.scheduler.running):
            self.engine.abort_request([self.scheduler.running[-1].request_id], internal=True)
            self.engine.step()
        self.engine.apply_model(lambda model: delattr(model, "forward"))

    def _replace(self, model: Any) -> None:
        """Put a stand-in into the model: a plain model's cache may hold anything."""
        from vllm.forward_context import get_forward_context

        info = self.engine.model_config.hf_config
        hidden, device = info.hidden_size, next(model.parameters()).device
        dtype, stand_in = self.engine.model_config.dtype, None

        def forward(input_ids: torch.Tensor, positions: torch.Tensor, *args: Any, **named: Any) -> torch.Tensor:
            nonlocal stand_in
            context = get_forward_context()
            if self.job["method"] != "plain" and context.attn_metadata is not None:
                from megatron.dmc.vllm.model import POOL

                step, pool = context.attn_metadata[POOL], context.no_compile_layers[POOL]
                if stand_in is None:
                    stand_in = StandIn(pool.attention, pool.info, pool.heads, self.job["step"], device, dtype)
                step.rows = pool.rows.row_of_block[step.blocks]
                stand_in.append(pool.rows.state, step, step.count)
            return torch.zeros(positions.numel(), hidden, device=device, dtype=dtype)

        model.forward = forward

    def run(self) -> None:
        for _ in range(STEPS):
            self.engine.step()

    def state(self) -> tuple[int, int]:
        """Running sequences, and preemptions until here."""
        return len(self.scheduler.running), self.preemptions

    def calls(self) -> Counter[str]:
        """Calls of some steps: Python's functions by file and name, built-in functions and operators by name."""
        found: Counter[str] = Counter()

        def count(frame: Any, event: str, function: Any) -> None:
            if event == "call":
                found[f"{frame.f_code.co_filename}:{frame.f_code.co_qualname}"] += 1
            elif event == "c_call":
                found[f"{function.__module__}.{function.__qualname__}"] += 1

        sys.setprofile(count)
        self.run()
        sys.setprofile(None)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            self.run()
        return found + Counter({event.key: event.count for event in profile.key_averages()})


class InEngine:
    """A model in the engine of this package, without vLLM, to be measured."""

    def __init__(self, job: dict[str, Any]) -> None:
        self.job = job

    def fill(self) -> None:
        job = self.job
        sizes = job["context"], job["rows"], job["new"], job["memory"]
        # In steps as vLLM's: they decide which pages of a head lie side by side.
        self.engine = filled(job["model"], *sizes, torch.device(job["device"]), step=job["step"]).engine

    def run(self) -> None:
        for _ in range(STEPS):
            self.engine.step()

    def state(self) -> tuple[int, int]:
        """Running sequences, and preemptions until here."""
        stats = self.engine.stats()
        return stats.running, stats.preemptions


def work(job: dict[str, Any], pipe: Connection) -> None:
    """Process of a server: calls the method that it is told to, and answers with its result."""
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    if not job["plugin"]:
        os.environ["VLLM_PLUGINS"] = "none"
    torch.set_num_threads(job["threads"])
    server = (InVLLM if job["server"] == "vllm" else InEngine)(job)
    torch.set_num_threads(job["threads"])  # vLLM's worker sets its own
    while (name := pipe.recv()) is not None:
        pipe.send(getattr(server, name)())


class Server:
    """A process with one of the two, see :func:`work`."""

    def __init__(self, job: dict[str, Any]) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=work, args=(job, theirs), daemon=True)
        self.process.start()
        theirs.close()

    def call(self, name: str) -> Any:
        """Result of a method. Raises ``EOFError`` when the process has ended, which printed why."""
        self.pipe.send(name)
        return self.pipe.recv()

    def close(self) -> None:
        with contextlib.suppress(BrokenPipeError):  # it has ended by itself
            self.pipe.send(None)
        self.process.join(60)


def make_jobs(args: argparse.Namespace, folder: Path, dtype: torch.dtype) -> dict[str, dict[str, Any]]:
    """Settings of the processes that measure, by the processes' names."""
    args.contexts = [args.context]
    count = max(1, args.cache_tokens // args.context)
    most = math.ceil(args.compression_ratio * count) + 1
    new = room(args.context, most, args.step_tokens) + (args.rounds - ROUNDS + 2) * STEPS  # calls are counted too
    # Whole blocks of vLLM's for the plain model, and its null block.
    blocks = count * math.ceil((args.context + new) / BLOCK) + 1
    common = dict(
        context=args.context,
        new=new,
        memory=blocks * BLOCK * 2 * args.layers * args.heads * args.head_dim * dtype.itemsize,
        step=args.step_tokens,
        dtype=str(dtype).removeprefix("torch."),
        device=args.device,
        threads=args.threads,
        compile=args.compile,
        plugin=True,
    )
    jobs = {}
    args.method = "dmc"
    plain = dict(common, server="vllm", method="plain", model=write_model(folder, args, dtype, 1.0), rows=count)
    for name in (PLAIN, WITHOUT):
        jobs[name] = dict(plain, plugin=name == PLAIN)
    for method in args.methods:
        args.method, place = method, folder / method
        place.mkdir()
        model = write_model(place, args, dtype, args.compression_ratio)
        for server in ("vllm", "engine"):
            jobs[f"{server} {method}"] = dict(common, server=server, method=method, model=model, rows=most)
    return jobs


@dataclasses.dataclass
class Start:
    """Figures and answers of all servers that were started together, by the names of the servers."""

    times: dict[str, list[float]]
    """Milliseconds of a sequence's token, in each round."""
    sequences: dict[str, int]
    answers: dict[str, list[list[int]]]
    """Greedy token ids of the plain models alone: [prompts][tokens]."""
    calls: dict[str, Counter[str]]

    def faster(self, name: str, than: str) -> float:
        """Times the tokens per second: the median of the rounds."""
        return ratio(self.times[than], self.times[name])["median"]


def measure(args: argparse.Namespace, jobs: dict[str, dict[str, Any]], names: list[str]) -> Start:
    """Start servers in the order of ``names``, and let them decode in turns."""
    servers, answers, plain = {}, {}, [name for name in names if jobs[name]["method"] == "plain"]
    try:
        for name in names:  # one after the other: each of them takes all threads
            servers[name] = Server(jobs[name])
            if name in plain:
                answers[name] = servers[name].call("answers")
            servers[name].call("fill")
        before = {name: server.call("state") for name, server in servers.items()}

        def turn(server: Server) -> Any:
            return lambda: server.call("run")

        turns = {name: turn(server) for name, server in servers.items()}
        times = interleave(turns, torch.device("cpu"), seconds=args.seconds, rounds=(args.rounds, args.rounds))
        calls = {name: servers[name].call("calls") for name in plain}
        after = {name: server.call("state") for name, server in servers.items()}
    finally:
        for server in servers.values():
            server.close()
    if before != after:
        raise RuntimeError(f"sequences and preemptions changed while they decoded: {before} became {after}")
    sequences = {name: count for name, (count, _) in before.items()}
    return Start({name: [t / sequences[name] for t in times[name]] for name in names}, sequences, answers, calls)


def compare(args: argparse.Namespace, jobs: dict[str, dict[str, Any]]) -> tuple[dict[str, Any], list[str]]:
    """Figures and missed targets."""
    names = list(jobs)
    starts = [measure(args, jobs, names[:: 1 if n % 2 == 0 else -1]) for n in range(args.starts)]
    first, figures = starts[0], {}
    if any(start.sequences != first.sequences for start in starts):
        raise RuntimeError(f"not every start had the same sequences: {[start.sequences for start in starts]}")
    for name in names:
        tokens = [1e3 * STEPS / statistics.median(start.times[name]) for start in starts]
        figures[name] = {
            "sequences": first.sequences[name],
            "step_ms": spread([1e3 * first.sequences[name] / rate for rate in tokens]),
            "tokens_per_second": spread(tokens),
            "sequences_ratio": first.sequences[name] / first.sequences[PLAIN],
            "tokens_ratio": spread([start.faster(name, PLAIN) for start in starts]),
        }
    for method in args.methods:
        of_engine = [start.faster(f"vllm {method}", f"engine {method}") for start in starts]
        figures[f"vllm {method}"] |= {"of_engine": spread(of_engine), "of_engine_by_start": of_engine}
    all_calls = [calls for start in starts for calls in start.calls.values()]
    figures |= {
        "plain_same_tokens": all(x == first.answers[PLAIN] for start in starts for x in start.answers.values()),
        "plain_same_calls": all(calls == all_calls[0] for calls in all_calls),
        "plain_calls": all_calls[0].total(),
        "cache_bytes": jobs[PLAIN]["memory"],
    }
    return figures, missed_targets(args, figures)


def missed_targets(args: argparse.Namespace, figures: dict[str, Any]) -> list[str]:
    same = {"gives the same tokens": "plain_same_tokens", "makes the same calls": "plain_same_calls"}
    missed = [f"not every start of a plain model {what}" for what, name in same.items() if not figures[name]]
    plain = figures[WITHOUT]["tokens_ratio"]["median"]
    if abs(plain - 1) > PLAIN_TARGET:
        missed.append(f"without the plugin a plain model has {plain:.3f} of the tokens per second")
    if "dmc" not in args.methods or args.context < LONG or args.compression_ratio != 4:
        return missed
    found = figures["vllm dmc"]
    for what, value, wanted in (
        ("times the sequences", found["sequences_ratio"], SEQUENCES_TARGET),
        ("times the tokens per second", found["tokens_ratio"]["median"], TOKENS_TARGET),
        ("of the engine's tokens per second", found["of_engine"]["median"], ENGINE_TARGET),
    ):
        if value < wanted:
            missed.append(f"vllm dmc: {value:.2f} {what}, not {wanted}")
    return missed


def show(figures: dict[str, Any], names: list[str]) -> None:
    rows = []
    for name in names:
        x = figures[name]
        faster, engine = x["tokens_ratio"], x.get("of_engine")
        row = [name, x["sequences"], x["step_ms"]["median"], x["tokens_per_second"]["median"], x["sequences_ratio"]]
        row += [faster["median"], f"{faster['q1']:.2f}-{faster['q3']:.2f}"]
        rows.append([*row, f"{engine['median']:.2f} ({engine['q1']:.2f}-{engine['q3']:.2f})" if engine else ""])
    columns = ("", "sequences", "ms/step", "tokens/s", "x sequences", "x tokens/s", "quartiles", "of the engine's")
    print(table(columns, rows), end="\n\n")


def main() -> None:
    parser = arguments(__doc__)
    add_device(parser)
    for name, value, text in (
        ("layers", 4, ""),
        ("hidden", 512, ""),
        ("heads", 32, "query and KV heads"),
        ("head-dim", 64, "one that vLLM's attention takes"),
        ("context", 8192, "tokens of a sequence before it decodes"),
        ("cache-tokens", 32768, "that the cache holds at CR 1"),
        ("step-tokens", 512, "of a step inside vLLM, while sequences are taken in"),
    ):
        parser.add_argument(f"--{name}", type=int, default=value, help=text)
    parser.add_argument(
        "--methods", nargs="*", choices=("dmc", "dms"), default=["dmc", "dms"], help="compression methods"
    )
    parser.add_argument("--window", type=int, default=256, help="tokens from a mark to the eviction, of dms")
    parser.add_argument("--compression-ratio", type=float, default=4.0, metavar="CR", help="of the compressed models")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="turns of each server")
    parser.add_argument("--starts", type=int, default=4, help="how often all servers are started")
    parser.add_argument("--compile", action="store_true", help="let vLLM compile the models")
    parser.add_argument("--seconds", type=float, default=60, help="of the turns of a start")
    args = parser.parse_args()
    began = time.perf_counter()
    os.environ |= {"KMP_BLOCKTIME": "5", "KMP_TPAUSE": "0"}  # for the processes to come
    _, dtype = resolve_device(args)
    print(f"{args.layers} layers of {args.hidden}, {args.heads} heads of {args.head_dim}, {dtype}\n")
    with tempfile.TemporaryDirectory() as name:
        jobs = make_jobs(args, Path(name), dtype)
        figures, missed = compare(args, jobs)
    show(figures, [name for name in jobs if name in figures])
    finish(args, "vllm_engine", figures, missed, began)


if __name__ == "__main__":
    run_script(main)
