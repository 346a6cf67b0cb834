"""Throughput, latency and prefill with a compressed cache at the shapes of real models, with random weights.

No weights are needed: the decision bias is set so that the requested compression ratio (CR) comes out
(inference/dummy.py). Engines of one shape run one after the other in the same memory: ``--memory-gib`` for the weights,
the cache, and ``--reserve-gib`` of everything else. Decoding is greedy and ignores the end of text.

1. Ceilings: the bytes per second of a copy (reads and writes both count), and the speed of a square product in bf16.
2. throughput: as many requests as the cache holds at their full length, with --input-len prompt tokens and
   --output-lens sampled tokens, at every CR of --compression-ratios. Tokens per second are the sampled ones over the
   whole run, prefill included. For the steps in which all sequences decode: milliseconds, and how near they are to a
   floor, the time that reading the weights and the slots in use takes at the speed of the copy.
3. protocol: the DMC authors' measure (arXiv 2403.09636): batch 16, 512 prompt tokens, 2,048 sampled, CR 1 and 4; the
   mean of the last 32 steps.
4. prefill: seconds until the first token of one prompt of --prefill-lens tokens, CR 4 against CR 1.

Targets (--check):
  throughput  CR 4 at least 3.7 times CR 1 (the paper's figure on an H100), CR 8 at least 7 times
  floor       decode steps at most 1 / 0.8 of what the ceilings allow
  prefill     CR 4 takes no longer than CR 1
"""

import argparse
import gc
import json
import math
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from _common import (
    add_device,
    arguments,
    finish,
    interleave,
    quartiles,
    record_table,
    resolve_device,
    run_script,
    spread,
)

from megatron.dmc.checkpoint.mapping import to_hf_config
from megatron.dmc.config import DMCConfig, ModelConfig
from megatron.dmc.inference import Engine, EngineConfig, StepOutput, dummy
from megatron.dmc.inference.bench import Iteration, Workload, iterate, random_prompts
from megatron.dmc.inference.cache import page_bytes, ring_bytes, row_bytes
from megatron.dmc.kernels import active_backend

SIZES = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "vocab_size")
SHAPES = {
    "llama2-7b": (32, 4096, 11008, 32, 32, 32000),
    "llama2-13b": (40, 5120, 13824, 40, 40, 32000),
    "llama3.1-8b": (32, 4096, 14336, 32, 8, 128256),
    "tiny": (2, 256, 512, 4, 4, 512),
}
TARGETS, FLOOR_TARGET, PREFILL_TARGET = {4: 3.7, 8: 7.0}, 0.80, 1.0
LAST = 32  # steps of the authors' protocol
PAGE, HELD = 16, 0.98  # slots of a page; the share of the pages that is counted on: heads do not merge equally often


def ceilings(device: torch.device) -> dict:
    """Measured GB/s of a copy and TFLOP/s of a product."""
    on_gpu = device.type == "cuda"
    source = torch.zeros(2**28 if on_gpu else 2**25, device=device)
    target, n = torch.empty_like(source), 8192 if on_gpu else 256  # many CPUs have no bf16 product and take long
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    times = interleave({"copy": lambda: target.copy_(source), "product": lambda: a @ b}, device, seconds=2)
    return {
        "copy_gb_per_s": 8e-6 * source.numel() / spread(times["copy"])["median"],
        "bf16_tflop_per_s": 2e-9 * n**3 / spread(times["product"])["median"],
    }


def engine(
    shape: str, ratio: float, longest: int, rows: int | None, args: argparse.Namespace, device: torch.device
) -> Engine:
    """Engine with random weights, for ``rows`` sequences; None: as many of ``longest`` tokens as the cache holds."""
    model = ModelConfig(**dict(zip(SIZES, SHAPES[shape])), max_position_embeddings=65536)
    name = args.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    dtype = getattr(torch, name)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(to_hf_config(model, name)))
        directory = dummy.open_directory(folder, ratio)
    weights = dtype.itemsize * sum(math.prod(x.shape) for x in directory.tensors.values())
    memory = int((args.memory_gib - args.reserve_gib) * 2**30) - weights
    if memory <= 0:
        raise SystemExit(
            f"error: {args.memory_gib} GiB do not hold the {weights / 2**30:.1f} GiB of weights of {shape}"
        )
    if rows is None:
        heads, ring = model.num_layers * model.kv_heads, DMCConfig().window if ratio > 1 else 0
        # Half of a head's last page is empty on average.
        each = heads * (longest / ratio / PAGE + 0.5) * page_bytes(PAGE, model.head_dim, dtype)
        tables = row_bytes(heads, longest, PAGE, ring_bytes(ring, model.head_dim, dtype))
        rows = max(1, int(HELD * memory / (each + tables)))
    tokens = max(rows, 2048 if device.type == "cuda" else 512)
    settings = EngineConfig(
        device=device.type,
        kv_cache_memory_bytes=memory,
        max_num_seqs=rows,
        max_model_len=longest,
        max_num_batched_tokens=tokens,
        block_size=PAGE,
        enable_prefix_caching=False,
    )
    return Engine(directory, settings)


class Steps:
    """Runs the engine's steps for :func:`iterate` and times them.

    ``decoding`` has (seconds, slots in use) of the steps in which all sequences decode, ``first`` the seconds until the
    first token.
    """

    def __init__(self, count: int) -> None:
        self.count, self.seconds, self.decoding, self.first = count, [], [], None

    def step(self, engine: Engine) -> list[StepOutput]:
        running = list(engine.scheduler.running)
        all_decode = len(running) == self.count and all(sequence.num_uncomputed_tokens == 1 for sequence in running)
        began = time.perf_counter()
        outputs = engine.step()
        self.seconds.append(time.perf_counter() - began)
        if self.first is None and any(output.tokens for output in outputs):
            self.first = sum(self.seconds)
        if all_decode and len(outputs) == self.count and engine.has_unfinished():
            self.decoding.append((self.seconds[-1], engine.stats().slots_used))
        return outputs


def run(engine: Engine, input_len: int, output_len: int, count: int) -> tuple[Iteration, Steps]:
    """Run ``count`` requests at once, to their end."""
    prompts = random_prompts([input_len] * count, engine.info.model.vocab_size, np.random.default_rng(0))
    steps = Steps(count)
    return iterate(engine, Workload(prompts, [output_len] * count, temperature=0), steps), steps


def throughput(
    shape: str, ratio: float, output_len: int, copy: float, args: argparse.Namespace, device: torch.device
) -> dict:
    """Part 2 for one shape, CR and length. ``copy``: the ceiling in GB/s."""
    e = engine(shape, ratio, args.input_len + output_len, None, args, device)
    batch = min(e.sizes.max_num_seqs, args.max_requests or e.sizes.max_num_seqs)
    run(e, min(64, args.input_len), 4, min(2, batch))  # warm
    done, steps = run(e, args.input_len, output_len, batch)
    slots, seconds = sum(use.total_slots for use in done.uses), sum(steps.seconds)
    # A step reads one row of the embedding per token, or all of it where it is the output layer too.
    weights = e.model.nbytes() - (0 if e.model.shares_embedding else e.model.embedding.nbytes)
    slot = 2 * e.model.head_dim * e.model.dtype.itemsize
    floors = [1e-9 * (weights + used * slot) / copy for _, used in steps.decoding]
    return {
        "shape": shape,
        "asked": ratio,
        "input_len": args.input_len,
        "output_len": output_len,
        "batch": batch,
        "compression_ratio": sum(use.tokens * use.heads for use in done.uses) / slots,
        "page_waste": 1 - slots / (PAGE * sum(use.pages for use in done.uses)),
        "preemptions": done.preemptions,
        "weights_bytes": e.model.nbytes(),
        "seconds": seconds,
        "tokens_per_second": done.output_tokens / seconds,
        "decode_step_ms": spread([1e3 * s for s, _ in steps.decoding]),
        "decode_tokens_per_second": batch * len(steps.decoding) / sum(s for s, _ in steps.decoding),
        "of_floor": spread([floor / s for floor, (s, _) in zip(floors, steps.decoding)]),
    }


def protocol(shape: str, ratio: float, args: argparse.Namespace, device: torch.device) -> dict:
    """Part 3 for one shape and CR."""
    batch, new = args.protocol_batch, args.protocol_output_len
    e = engine(shape, ratio, args.input_len + new, batch, args, device)
    run(e, min(64, args.input_len), 4, min(2, batch))
    last = [s for s, _ in run(e, args.input_len, new, batch)[1].decoding][-LAST:]
    return {
        "shape": shape,
        "asked": ratio,
        "batch": batch,
        "last_ms": spread([1e3 * s for s in last]),
        "mean_ms": 1e3 * sum(last) / len(last),
    }


def prefill(shape: str, ratio: float, args: argparse.Namespace, device: torch.device) -> list[dict]:
    """Part 4 for one shape and CR: a record for each length."""
    e, rows = engine(shape, ratio, max(args.prefill_lens) + 1, 2, args, device), []
    for length in args.prefill_lens:
        times = [run(e, length, 1, 1)[1].first for _ in range(args.prefill_rounds + 1)][1:]
        rows.append({"shape": shape, "asked": ratio, "tokens": length, "seconds": spread(times)})
    return rows


def forget() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def missed_targets(figures: dict) -> list[str]:
    missed, base = [], {}
    for f in figures["throughput"]:
        name = f"{f['shape']}, {f['output_len']} tokens written, CR {f['asked']:g}"
        first = base.setdefault((f["shape"], f["output_len"]), f)
        if first["asked"] == 1 and (target := TARGETS.get(f["asked"])):
            faster = f["tokens_per_second"] / first["tokens_per_second"]
            if faster < target:
                missed.append(f"throughput: {faster:.2f} x CR 1 at {name}; the target is {target}")
        if f["of_floor"]["median"] < FLOOR_TARGET:
            missed.append(f"floor: {f['of_floor']['median']:.2f} at {name}; the target is {FLOOR_TARGET}")
    seconds = {(f["shape"], f["tokens"], f["asked"]): f["seconds"]["median"] for f in figures["prefill"]}
    for (shape, tokens, asked), s in seconds.items():
        share = s / seconds.get((shape, tokens, 1), s)
        if asked > 1 and share > PREFILL_TARGET:
            missed.append(f"prefill: CR {asked:g} takes {share:.2f} of CR 1's time at {shape}, {tokens} tokens")
    return missed


def main() -> None:
    start = time.perf_counter()
    parser = arguments(__doc__)
    add_device(parser)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["llama2-7b"])
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=("throughput", "protocol", "prefill"),
        default=["throughput", "protocol", "prefill"],
    )
    parser.add_argument("--compression-ratios", type=float, nargs="+", default=[1, 2, 4, 8], metavar="CR")
    parser.add_argument("--memory-gib", type=float, default=76.0, help="of weights, cache and reserve (default: 76)")
    parser.add_argument("--reserve-gib", type=float, default=4.0, help="for activations and graphs (default: 4)")
    parser.add_argument("--input-len", type=int, default=512)
    parser.add_argument("--output-lens", type=int, nargs="+", default=[1536, 3584], metavar="N")
    parser.add_argument("--max-requests", type=int, help="fewer than fit, for a try")
    parser.add_argument("--prefill-lens", type=int, nargs="+", default=[2048, 8192, 32768], metavar="N")
    parser.add_argument("--prefill-rounds", type=int, default=3)
    parser.add_argument("--protocol-batch", type=int, default=16)
    parser.add_argument("--protocol-output-len", type=int, default=2048)
    args = parser.parse_args()
    device, _ = resolve_device(args)
    limits = ceilings(device)
    print(
        f"copy {limits['copy_gb_per_s']:.0f} GB/s, bf16 products {limits['bf16_tflop_per_s']:.1f} TFLOP/s, kernels: "
        f"{active_backend(device.type)}\n"
    )
    figures: dict = {"ceilings": limits, "throughput": [], "protocol": [], "prefill": []}
    for shape in args.shapes:
        for output_len in args.output_lens if "throughput" in args.parts else ():
            for ratio in args.compression_ratios:
                figures["throughput"].append(
                    throughput(shape, ratio, output_len, limits["copy_gb_per_s"], args, device)
                )
                forget()
        for ratio in (1, 4):
            if "protocol" in args.parts:
                figures["protocol"].append(protocol(shape, ratio, args, device))
                forget()
            if "prefill" in args.parts:
                figures["prefill"] += prefill(shape, ratio, args, device)
                forget()
    for part, cells in (("throughput", throughput_cells), ("protocol", protocol_cells), ("prefill", prefill_cells)):
        if figures[part]:
            print(record_table([cells(f, figures[part]) for f in figures[part]]), end="\n\n")
    finish(args, "throughput", figures, missed_targets(figures), start)


def throughput_cells(f: dict, rows: list[dict]) -> dict[str, object]:
    """Cells of the printed table, by column; speed is relative to the first row of the same shape and length."""
    first = next(row for row in rows if (row["shape"], row["output_len"]) == (f["shape"], f["output_len"]))
    return {
        "shape": f["shape"],
        "tokens": f["input_len"] + f["output_len"],
        "CR": f["compression_ratio"],
        "batch": f["batch"],
        "empty": f"{f['page_waste']:.1%}",
        "preempted": f["preemptions"],
        "tokens/s": f["tokens_per_second"],
        "x first": f["tokens_per_second"] / first["tokens_per_second"],
        "ms/step": f["decode_step_ms"]["median"],
        "of floor": f["of_floor"]["median"],
        "quartiles": quartiles(f["of_floor"]),
    }


def protocol_cells(f: dict, rows: list[dict]) -> dict[str, object]:
    """Cells of the printed table, by column."""
    return {
        "shape": f["shape"],
        "CR": f"{f['asked']:g}",
        "batch": f["batch"],
        "last steps, mean ms": f["mean_ms"],
        "quartiles": quartiles(f["last_ms"]),
    }


def prefill_cells(f: dict, rows: list[dict]) -> dict[str, object]:
    """Cells of the printed table, by column."""
    return {
        "shape": f["shape"],
        "CR": f"{f['asked']:g}",
        "prompt": f["tokens"],
        "first token s": f"{f['seconds']['median']:.3f}",
        "quartiles": quartiles(f["seconds"], ".3f"),
    }


if __name__ == "__main__":
    run_script(main)
