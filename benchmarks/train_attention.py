"""Training attention of DMC against PyTorch's causal SDPA: time and peak memory, forward and backward, by length.

Measured, in turn within one process:
  SDPA       torch's scaled_dot_product_attention, causal, on given q, k, v
  rope+SDPA  the same after rotating q and k, with the fused rotation that DMC uses: what a plain model runs
  DMC        all that replaces rope+SDPA: noise, decisions, importance, pooling (W = 12), rotation, attention
  dense      DMC with the mask as a bias of one number per query and key, added to scores that are held whole: the
             direct way, and that of the method's first release; up to 4,096 tokens. Its output must be DMC's

Time: medians; the ratios are medians of the ratios within each round, with their quartiles.
Memory: the most bytes alive above the inputs (torch's allocations; on CUDA its allocator's peak).

Targets (--check), for every shape:
  time    DMC / SDPA at most 1.5 for S >= 2048
  memory  linear in S: DMC's peak at twice the longest length but one at most 2.2 times as large
"""

import time

import torch
from _common import (
    add_device,
    arguments,
    finish,
    interleave,
    peak_bytes,
    quartiles,
    ratio,
    record_table,
    resolve_device,
    run_script,
    spread,
)
from torch import Tensor

from megatron.dmc.ops import (
    attention_backend,
    decision_logits,
    dmc_attention,
    importance,
    logistic_noise,
    make_decisions,
    pool,
    rotary_frequencies,
    rotate_and_split_neuron,
)
from megatron.dmc.ops.attention import mask_channel, mask_unit
from megatron.dmc.ops.rotary import cos_sin

SHAPES = ((8, 8, 64), (8, 2, 128))  # query heads, KV heads, head dimension
BIAS, EPSILON, TEMPERATURE = 5.0, 2.0**-7, 0.1
TIME_TARGET, TIME_FROM, MEMORY_TARGET = 1.5, 2048, 2.2
DENSE_UP_TO = 4096  # tokens


def dmc(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, window: int | None, dense: bool = False) -> Tensor:
    """Attention output from un-rotated q, k, v, as a DMC layer computes it in training."""
    b, groups, s, d = k.shape
    noise = logistic_noise(torch.arange(b, device=k.device), range(groups), s, seed=1, step=0, layer=0)
    decisions = make_decisions(decision_logits(k[..., -1], BIAS), TEMPERATURE, noise)
    q, neuron = rotate_and_split_neuron(q, cos, sin, 0.0 if dense else mask_channel(d))
    k, v = pool(k, v, decisions.alpha, importance(neuron, groups, BIAS, EPSILON), window)
    if dense:
        k, _ = rotate_and_split_neuron(k, cos, sin, 0.0)
        return dense_attention(q, k, v, decisions.log_keep)
    k, _ = rotate_and_split_neuron(k, cos, sin, decisions.log_keep.to(k.dtype) * mask_unit(d))
    return dmc_attention(q, k, v)


def dense_attention(q: Tensor, k: Tensor, v: Tensor, log_keep: Tensor) -> Tensor:
    """Attention with S x S scores: q [b, np, s, D], k, v [b, ng, s, D], log_keep [b, ng, s], which later queries add to
    their scores of a key.
    """
    b, heads, s, d = q.shape
    groups = heads // k.size(1)
    k, v, log_keep = (x.repeat_interleave(groups, dim=1) for x in (k, v, log_keep))
    row = torch.arange(s, device=q.device)
    bias = (
        log_keep.to(q.dtype)[:, :, None, :]
        .masked_fill(row[:, None] == row, 0.0)
        .masked_fill(row[:, None] < row, float("-inf"))
    )
    return torch.softmax(q @ k.transpose(-1, -2) * d**-0.5 + bias, dim=-1) @ v


def measure(shape, length, batch, window, device, dtype, seconds) -> dict:
    heads, groups, d = shape
    torch.manual_seed(0)
    q, k, v = (
        torch.randn(batch, h, length, d, device=device, dtype=dtype, requires_grad=True)
        for h in (heads, groups, groups)
    )
    grad = torch.randn_like(q)
    with torch.no_grad():
        k[..., -1] += BIAS - 2.0  # logits around -2: some merges, as in a model on its way to compress
    cos, sin = cos_sin(rotary_frequencies(d, 1e4, device=device), torch.arange(length, device=device))

    def sdpa(q: Tensor, k: Tensor) -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=heads != groups)

    def rotated() -> Tensor:
        return sdpa(*(rotate_and_split_neuron(x, cos, sin, 0.0)[0] for x in (q, k)))

    def both_ways(forward):
        def step():
            torch.autograd.grad(forward(), (q, k, v), grad)

        return step

    functions = {
        "sdpa": both_ways(lambda: sdpa(q, k)),
        "rope_sdpa": both_ways(rotated),
        "dmc": both_ways(lambda: dmc(q, k, v, cos, sin, window)),
    }
    dense = length <= DENSE_UP_TO
    if dense:
        functions["dense"] = both_ways(lambda: dmc(q, k, v, cos, sin, window, dense=True))
        with torch.no_grad():
            one, other = (dmc(q, k, v, cos, sin, window, dense=way).float() for way in (False, True))
        assert (one - other).norm() <= (1e-4 if dtype == torch.float32 else 2e-2) * one.norm()
    times = interleave(functions, device, seconds=seconds)
    return {
        "heads": heads,
        "groups": groups,
        "head_dim": d,
        "length": length,
        "ms": {name: spread(values) for name, values in times.items()},
        "time_to_sdpa": ratio(times["dmc"], times["sdpa"]),
        "time_to_rope_sdpa": ratio(times["dmc"], times["rope_sdpa"]),
        "dense_time_to_dmc": ratio(times["dense"], times["dmc"]) if dense else None,
        "peak_bytes": {name: peak_bytes(function, device) for name, function in functions.items()},
    }


def missed_targets(figures: list[dict]) -> list[str]:
    missed = []
    for f in figures:
        name = f"heads {f['heads']}/{f['groups']}, D {f['head_dim']}, S {f['length']}"
        got = f["time_to_sdpa"]["median"]
        if f["length"] >= TIME_FROM and got > TIME_TARGET:
            missed.append(f"time: {got:.2f} x SDPA at {name}; the target is {TIME_TARGET}")
        shape = (f["length"], f["heads"], f["groups"], f["head_dim"])
        half = next((h for h in figures if (2 * h["length"], h["heads"], h["groups"], h["head_dim"]) == shape), None)
        if half is not None and f["length"] == max(g["length"] for g in figures):
            growth = f["peak_bytes"]["dmc"] / half["peak_bytes"]["dmc"]
            if growth > MEMORY_TARGET:
                missed.append(f"memory: {growth:.2f} x that at half the length, {name}; target {MEMORY_TARGET}")
    return missed


def cells(f: dict) -> dict[str, object]:
    """Cells of the printed table, by column."""
    ms, peak, to_sdpa, dense = f["ms"], f["peak_bytes"], f["time_to_sdpa"], f["dense_time_to_dmc"]
    return {
        "heads": f"{f['heads']}/{f['groups']}",
        "D": f["head_dim"],
        "S": f["length"],
        "SDPA ms": ms["sdpa"]["median"],
        "rope+SDPA": ms["rope_sdpa"]["median"],
        "DMC ms": ms["dmc"]["median"],
        "DMC/SDPA": to_sdpa["median"],
        "quartiles": quartiles(to_sdpa),
        "/rope+SDPA": f["time_to_rope_sdpa"]["median"],
        "SDPA MiB": peak["sdpa"] / 2**20,
        "DMC MiB": peak["dmc"] / 2**20,
        "ratio": peak["dmc"] / peak["sdpa"],
        "dense/DMC": dense["median"] if dense else "",
        "MiB": peak["dense"] / peak["dmc"] if dense else "",
        "rounds": ms["dmc"]["n"],
    }


def main() -> None:
    start = time.perf_counter()
    parser = arguments(__doc__)
    add_device(parser)
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048, 4096, 8192], metavar="S")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--window", type=int, default=12, help="0: unbounded")
    parser.add_argument("--seconds", type=float, default=6.0, help="of measuring per shape and length")
    args = parser.parse_args()
    device, dtype = resolve_device(args)
    print(f"attention path: {attention_backend(device.type, dtype).name}, {dtype}, batch {args.batch}")
    figures, rows = [], []
    for shape in SHAPES:
        for length in sorted(args.lengths):
            f = measure(shape, length, args.batch, args.window or None, device, dtype, args.seconds)
            figures.append(f)
            rows.append(cells(f))
    print(record_table(rows))
    finish(args, "train_attention", figures, missed_targets(figures), start)


if __name__ == "__main__":
    run_script(main)
