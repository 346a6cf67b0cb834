"""Prefill of one layer over the compressed cache against dense attention, and compiled against PyTorch.

Measured, in turn within one process, for a prompt of ``--tokens`` tokens of one sequence, on ``--threads`` threads:
  sdpa       torch's causal scaled_dot_product_attention over the prompt, keys and values given for every query head;
             nothing else
  CR 1, 4    append (decide, pool, rotate, write) and prefill_attention, in chunks of ``--chunk`` tokens; CR 1 is a
             plain model, and at CR 4 every head merges three tokens of four, each others
  DMS 4      likewise for a model that evicts (DMS): append_evicting, three tokens of four marked, a window of 256
  reference  CR 4 in plain PyTorch

Targets (--check), fp32 and bf16:
  dense      CR 4 takes at most as long as sdpa
  speed      the kernels at least 5 times as fast as the reference
"""

import time
from typing import Optional

import torch
import torch.nn.functional as F
from _common import (
    add_device,
    arguments,
    finish,
    interleave,
    quartiles,
    ratio,
    record_table,
    resolve_device,
    run_script,
    spread,
)

from megatron.dmc import kernels
from megatron.dmc.kernels.params import NEURON_ALL
from megatron.dmc.ops import rotary_frequencies

SHAPES = ((8, 2, 128), (8, 8, 64))  # query heads, KV heads, head dimension
DENSE_TARGET, SPEED_TARGET = 1.0, 5.0
EVICT_WINDOW = 256


class Prompt:
    """Raw queries, keys and values of a prompt, and a cache with room for it."""

    def __init__(
        self,
        shape: tuple[int, int, int],
        tokens: int,
        cr: int,
        dtype: torch.dtype,
        device: torch.device,
        evict_window: Optional[int] = None,
    ) -> None:
        heads, kv_heads, d = shape
        generator = torch.Generator().manual_seed(0)
        self.q, self.k, self.v = (torch.randn(tokens, h, d, generator=generator) for h in (heads, kv_heads, kv_heads))
        self.k[..., -1] = torch.where(torch.rand(tokens, kv_heads, generator=generator) < 1 / cr, -1.0, 1.0)
        self.q, self.k, self.v = (x.to(device, dtype) for x in (self.q, self.k, self.v))
        self.logits = self.k[..., -1].float().contiguous()
        self.inv_freq = rotary_frequencies(d, 1e4, device=device)
        self.row = torch.zeros(1, dtype=torch.int32, device=device)
        self.state: kernels.CacheState = kernels.make_state(
            num_pages=kv_heads * (-(-tokens // 16) + 2),
            max_seqs=1,
            num_layers=1,
            num_kv_heads=kv_heads,
            head_dim=d,
            max_slots=tokens,
            compress=cr > 1,
            evict_window=evict_window,
            dtype=dtype,
            device=device,
        )

    def prefill(self, tokens: int, chunk: int) -> None:
        """Run the kernels over the prompt, into the empty cache."""
        kernels.free(self.state, self.row)
        for start in range(0, tokens, chunk):
            stop = min(tokens, start + chunk)
            ends = torch.tensor([0, stop - start], dtype=torch.int32, device=self.q.device)
            positions = torch.arange(start, stop, dtype=torch.int32, device=self.q.device)
            q, k, v = (x[start:stop] for x in (self.q, self.k, self.v))
            where = (ends, self.row, positions, self.inv_freq)
            if self.state.evicts:
                rule = {"about_self": False, "neuron": NEURON_ALL}
                params = kernels.EvictParams(q, k, v, self.logits[start:stop], *where, **rule)
                done = kernels.append_evicting(self.state, 0, params)
            else:
                rule = {"bias": 0.0, "epsilon": 2.0**-7, "window": 12, "compress": self.state.compresses}
                done = kernels.append(self.state, 0, kernels.AppendParams(q, k, v, *where, **rule))
            kernels.prefill_attention(self.state, 0, done, ends, self.row, q.size(-1) ** -0.5)

    def dense(self) -> tuple[torch.Tensor, ...]:
        """Queries, keys and values [1, heads, tokens, D], contiguous, the latter two repeated for their queries."""
        g = self.q.size(1) // self.k.size(1)
        heads = (self.q, self.k.repeat_interleave(g, dim=1), self.v.repeat_interleave(g, dim=1))
        return tuple(x.transpose(0, 1)[None].contiguous() for x in heads)


def measure(shape: tuple[int, int, int], dtype: torch.dtype, args, device: torch.device) -> dict:
    plain, dmc = (Prompt(shape, args.tokens, cr, dtype, device) for cr in (1, 4))
    dms = Prompt(shape, args.tokens, 4, dtype, device, EVICT_WINDOW)
    dense = plain.dense()

    def reference():
        with kernels.use_backend("reference"):
            dmc.prefill(args.tokens, args.chunk)

    functions = {
        "sdpa": lambda: F.scaled_dot_product_attention(*dense, is_causal=True),
        "CR 1": lambda: plain.prefill(args.tokens, args.chunk),
        "CR 4": lambda: dmc.prefill(args.tokens, args.chunk),
        "DMS 4": lambda: dms.prefill(args.tokens, args.chunk),
        "reference": reference,
    }
    times = interleave(functions, device, seconds=args.seconds)
    slots = int(dmc.state.lengths.sum())
    return {
        "query_heads": shape[0],
        "heads": shape[1],
        "head_dim": shape[2],
        "dtype": str(dtype).removeprefix("torch."),
        "tokens": args.tokens,
        "chunk": args.chunk,
        "compression_ratio": args.tokens * shape[1] / slots,
        "ms": {name: spread(values) for name, values in times.items()},
        "of_sdpa": {name: ratio(times[name], times["sdpa"]) for name in ("CR 1", "CR 4", "DMS 4")},
        "speed_up": ratio(times["reference"], times["CR 4"]),
    }


def missed_targets(figures: list[dict]) -> list[str]:
    missed = []
    for f in figures:
        name = f"{f['query_heads']}/{f['heads']} heads of {f['head_dim']}, {f['dtype']}"
        share, speed = f["of_sdpa"]["CR 4"]["median"], f["speed_up"]["median"]
        if share > DENSE_TARGET:
            missed.append(
                f"dense: CR 4 takes {share:.2f} of the time of sdpa at {name}; the target is {DENSE_TARGET:.2f}"
            )
        if speed < SPEED_TARGET:
            missed.append(f"speed: {speed:.1f} x the reference at {name}; the target is {SPEED_TARGET:.0f}")
    return missed


def cells(f: dict) -> dict[str, object]:
    """Cells of the printed table, by column."""
    ms, share, speed = f["ms"], f["of_sdpa"], f["speed_up"]
    return {
        "heads": f"{f['query_heads']}/{f['heads']}",
        "D": f["head_dim"],
        "dtype": f["dtype"],
        **{f"{name} ms": ms[name]["median"] for name in ("sdpa", "CR 1", "CR 4", "DMS 4")},
        **{f"{name} / sdpa": share[name]["median"] for name in ("CR 1", "CR 4", "DMS 4")},
        "(quartiles)": quartiles(share["CR 4"]),
        "x reference": speed["median"],
        "quartiles": quartiles(speed, ".1f"),
    }


def main() -> None:
    start = time.perf_counter()
    parser = arguments(__doc__)
    add_device(parser)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--chunk", type=int, default=512, help="tokens of a step")
    parser.add_argument("--seconds", type=float, default=6.0, help="of measuring per row")
    args = parser.parse_args()
    device, dtype = resolve_device(args)
    dtypes = [dtype] if args.dtype else [torch.float32, torch.bfloat16]
    print(f"kernel: {kernels.active_backend(device.type)}, {args.tokens} tokens in chunks of {args.chunk}")
    figures, rows = [], []
    for shape in SHAPES:
        for of in dtypes:
            f = measure(shape, of, args, device)
            figures.append(f)
            rows.append(cells(f))
    print(record_table(rows))
    finish(args, "prefill_attention", figures, missed_targets(figures), start)


if __name__ == "__main__":
    run_script(main)
