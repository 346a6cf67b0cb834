"""What a compressed cache turns into at the shapes of real models, with random weights: throughput, latency, prefill.

No weights are needed: the decision bias is set so that the compression ratio (CR) asked for comes out
(inference/dummy.py). Engines of one shape run one after the other in the same memory: ``--memory-gib`` for weights,
cache and ``--reserve-gib`` of the rest. Everything is greedy and without an end of text.

1. Two ceilings: the bytes per second of a copy (reads and writes both count), and of a square product in bf16.
2. throughput: as many requests as the cache holds at their full length, --input-len tokens read and --output-lens
   written, at every CR of --compression-ratios; answer tokens per second of the whole run, reading included. Of the
   steps in which all sequences
   decode: milliseconds, and what they would take if reading the weights and the slots in use at the speed of the copy
       were all.
3. protocol: the DMC authors' measure (arXiv 2403.09636): batch 16, 512 tokens read, 2,048 written, CR 1 and 4; the mean
   of the last 32 steps.
4. prefill: seconds until the first token of one prompt of --prefill-lens tokens, CR 4 against CR 1.

Targets (--check):
  throughput  CR 4 at least 3.7 times CR 1 (the paper's figure on an H100), CR 8 at least 7 times
  floor       decode steps at most 1 / 0.8 of what the ceilings allow
  prefill     CR 4 takes no longer than CR 1
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from _common import ROOT, add_device, arguments, finish, interleave, resolve_device, spread, table

sys.path.insert(0, str(ROOT))
from megatron.dmc.config import DMCConfig  # noqa: E402
from megatron.dmc.inference import Engine, EngineConfig, StepOutput, dummy  # noqa: E402
from megatron.dmc.inference.bench import Iteration, Workload, iterate, random_prompts  # noqa: E402
from megatron.dmc.inference.cache import page_bytes, row_bytes  # noqa: E402
from megatron.dmc.kernels import active_backend  # noqa: E402

SHAPES = {  # layers, hidden, feed-forward, query heads, KV heads, vocabulary
    "llama2-7b": (32, 4096, 11008, 32, 32, 32000),
    "llama2-13b": (40, 5120, 13824, 40, 40, 32000),
    "llama3.1-8b": (32, 4096, 14336, 32, 8, 128256),
    "tiny": (2, 256, 512, 4, 4, 512),
}
TARGETS, FLOOR_TARGET, PREFILL_TARGET = {4: 3.7, 8: 7.0}, 0.80, 1.0
LAST = 32  # steps of the authors' protocol
PAGE, HELD = 16, 0.98  # slots of a page; the share of the pages that is counted on: heads do not merge equally often


def ceilings(device: torch.device) -> dict:
    """GB/s of a copy and TFLOP/s of a product."""
    on_gpu = device.type == "cuda"
    source = torch.zeros(2**28 if on_gpu else 2**25, device=device)
    target, n = torch.empty_like(source), 8192 if on_gpu else 1024
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    times = interleave({"copy": lambda: target.copy_(source), "product": lambda: a @ b}, device, seconds=2)
    return {
        "copy_gb_per_s": 8e-6 * source.numel() / spread(times["copy"])["median"],
        "bf16_tflop_per_s": 2e-9 * n**3 / spread(times["product"])["median"],
    }


def engine(
    shape: str, ratio: float, longest: int, rows: int | None, args: argparse.Namespace, device: torch.device
) -> Engine:
    """With random weights. ``rows`` None: as many as the cache holds sequences of ``longest`` tokens."""
    layers, hidden, ffn, heads, kv_heads, vocabulary = SHAPES[shape]
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 65536,
        "vocab_size": vocabulary,
        "tie_word_embeddings": False,
        "torch_dtype": args.dtype or ("bfloat16" if device.type == "cuda" else "float32"),
    }
    dtype = getattr(torch, config["torch_dtype"])
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "config.json").write_text(json.dumps(config))
        directory = dummy.open_directory(name, ratio)
    weights, all_heads = dtype.itemsize * sum(math.prod(x.shape) for x in directory.tensors.values()), layers * kv_heads
    memory = int((args.memory_gib - args.reserve_gib) * 2**30) - weights
    if memory <= 0:
        raise SystemExit(
            f"error: {args.memory_gib} GiB do not hold the {weights / 2**30:.1f} GiB of weights of {shape}"
        )
    if rows is None:
        # Half of a head's last page is empty on average.
        each = all_heads * (longest / ratio / PAGE + 0.5) * page_bytes(PAGE, hidden // heads, dtype)
        ring = DMCConfig().window if ratio > 1 else 0
        tables = row_bytes(all_heads, hidden // heads, longest, PAGE, ring, dtype)
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
    """What :func:`iterate` calls for a step: seconds of each, and of those in which all sequences decode the slots in
    use.
    """

    def __init__(self, count: int) -> None:
        self.count, self.seconds, self.decoding, self.first = count, [], [], None

    def step(self, engine: Engine) -> list[StepOutput]:
        running = list(engine.scheduler.running)
        all_decode = len(running) == self.count and all(sequence.remaining == 1 for sequence in running)
        began = time.perf_counter()
        outputs = engine.step()
        self.seconds.append(time.perf_counter() - began)
        if self.first is None and outputs:
            self.first = sum(self.seconds)
        if all_decode and len(outputs) == self.count and engine.has_unfinished():
            self.decoding.append((self.seconds[-1], engine.stats().slots_used))
        return outputs


def run(engine: Engine, input_len: int, output_len: int, count: int) -> tuple[Iteration, Steps]:
    """All requests at once, to their end."""
    prompts = random_prompts([input_len] * count, engine.info.model.vocab_size, np.random.default_rng(0))
    steps = Steps(count)
    return iterate(engine, Workload(prompts, [output_len] * count, temperature=0), steps), steps


def throughput(
    shape: str, ratio: float, output_len: int, copy: float, args: argparse.Namespace, device: torch.device
) -> dict:
    e = engine(shape, ratio, args.input_len + output_len, None, args, device)
    batch = min(e.sizes.max_num_seqs, args.max_requests or e.sizes.max_num_seqs)
    run(e, min(64, args.input_len), 4, min(2, batch))  # warm
    done, steps = run(e, args.input_len, output_len, batch)
    slots, seconds = sum(use.total_slots for use in done.uses), sum(steps.seconds)
    # Of the embedding a step reads a row per token, unless it is the output layer too.
    weights = e.model.nbytes() - (e.model.embedding.nbytes if e.model.head is not e.model.embedding else 0)
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
    show(figures)
    finish(args, "throughput", figures, missed_targets(figures), start)


def show(figures: dict) -> None:
    base: dict = {}
    rows = []
    for f in figures["throughput"]:
        first = base.setdefault((f["shape"], f["output_len"]), f)
        rows.append(
            [
                f["shape"],
                f["input_len"] + f["output_len"],
                f["compression_ratio"],
                f["batch"],
                f"{f['page_waste']:.1%}",
                f["preemptions"],
                f["tokens_per_second"],
                f["tokens_per_second"] / first["tokens_per_second"],
                f["decode_step_ms"]["median"],
                f["of_floor"]["median"],
                f"{f['of_floor']['q1']:.2f}-{f['of_floor']['q3']:.2f}",
            ]
        )
    if rows:
        columns = (
            "shape",
            "tokens",
            "CR",
            "batch",
            "empty",
            "pre-empted",
            "tokens/s",
            "x first",
            "ms/step",
            "of floor",
            "quartiles",
        )
        print(table(columns, rows), end="\n\n")
    rows = [
        [f["shape"], f"{f['asked']:g}", f["batch"], f["mean_ms"], f"{f['last_ms']['q1']:.2f}-{f['last_ms']['q3']:.2f}"]
        for f in figures["protocol"]
    ]
    if rows:
        print(table(("shape", "CR", "batch", "last steps, mean ms", "quartiles"), rows), end="\n\n")
    rows = [
        [
            f["shape"],
            f"{f['asked']:g}",
            f["tokens"],
            f"{f['seconds']['median']:.3f}",
            f"{f['seconds']['q1']:.3f}-{f['seconds']['q3']:.3f}",
        ]
        for f in figures["prefill"]
    ]
    if rows:
        print(table(("shape", "CR", "prompt", "first token s", "quartiles"), rows), end="\n\n")


if __name__ == "__main__":
    main()
