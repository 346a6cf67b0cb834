"""Paged decode attention: bytes of cache read per second against the machine's copy bandwidth, compiled against PyTorch.

Measured, in turn within one process, on caches of random slots whose pages lie in random order:
  copy       torch's copy_ of a buffer as large as the cache; reads and writes both count
  kernel     the compiled decode attention (C++ on the CPU); bytes are those of the slots' keys and values
  reference  the same op in plain PyTorch
One row per query heads / KV heads, dtype and slots per head; "ragged" heads hold between a half and one and a half of these.

Targets (--check):
  bandwidth  kernel at least 0.60 of copy at 4,096 slots and more, fp32 and bf16, equal and ragged heads
  speed      kernel at least 5 times as fast as the reference, everywhere
"""

from __future__ import annotations

import time

import torch
from _common import add_device, arguments, finish, interleave, ratio, resolve_device, spread, table

from megatron.dmc.kernels import CacheState, active_backend, decode_attention, make_state, use_backend

SHAPES = ((8, 8, 128), (32, 8, 128), (16, 2, 64))  # query heads, KV heads, head dimension
BANDWIDTH_TARGET, BANDWIDTH_FROM, SPEED_TARGET = 0.60, 4096, 5.0


def cache(rows: int, heads: int, d: int, slots: int, ragged: bool, page_size: int, dtype, device) -> CacheState:
    generator = torch.Generator().manual_seed(0)
    spreading = torch.rand(rows, 1, heads, generator=generator) - 0.5 if ragged else torch.zeros(rows, 1, heads)
    lengths = (slots * (1 + spreading)).long()
    pages = -(-lengths // page_size)
    total = int(pages.sum())
    state = make_state(
        num_pages=total,
        max_seqs=rows,
        num_layers=1,
        num_kv_heads=heads,
        head_dim=d,
        max_slots=int(lengths.max()),
        page_size=page_size,
        dtype=dtype,
        device=device,
    )
    state.k_pages.normal_()
    state.v_pages.normal_()
    used = torch.arange(state.page_table.size(3)) < pages[..., None]
    state.page_table[used.to(device)] = torch.randperm(total, generator=generator).int().to(device)
    state.lengths.copy_(lengths)
    state.counters[0] = total
    state.refcounts.fill_(1)
    state.check_integrity()
    return state


def measure(shape, slots: int, ragged: bool, dtype, args, device) -> dict:
    query_heads, heads, d = shape
    state = cache(args.batch, heads, d, slots, ragged, args.page_size, dtype, device)
    q = torch.randn(args.batch, query_heads, d, dtype=dtype, device=device)
    rows = torch.arange(args.batch, dtype=torch.int32, device=device)
    bytes_read = int(state.lengths.sum()) * 2 * d * state.k_pages.element_size()
    source = torch.zeros(bytes_read // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)

    def reference():
        with use_backend("reference"):
            decode_attention(state, 0, q, rows, d**-0.5)

    functions = {
        "copy": lambda: target.copy_(source),
        "kernel": lambda: decode_attention(state, 0, q, rows, d**-0.5),
        "reference": reference,
    }
    times = interleave(functions, device, seconds=args.seconds)
    rate = {name: bytes_read * (2 if name == "copy" else 1) / 1e6 for name in times}  # / ms = GB/s
    return {
        "query_heads": query_heads,
        "heads": heads,
        "head_dim": d,
        "slots": slots,
        "ragged": ragged,
        "dtype": str(dtype).removeprefix("torch."),
        "batch": args.batch,
        "page_size": args.page_size,
        "bytes": bytes_read,
        "ms": {name: spread(values) for name, values in times.items()},
        "gb_per_s": {name: rate[name] / spread(values)["median"] for name, values in times.items()},
        # copy moves twice the bytes
        "of_copy": ratio([t / 2 for t in times["copy"]], times["kernel"]),
        "speed_up": ratio(times["reference"], times["kernel"]),
    }


def missed_targets(figures: list[dict]) -> list[str]:
    missed = []
    for f in figures:
        name = f"{f['query_heads']}/{f['heads']} heads of {f['head_dim']}, {f['dtype']}, {f['slots']} slots"
        share, speed = f["of_copy"]["median"], f["speed_up"]["median"]
        if f["slots"] >= BANDWIDTH_FROM and share < BANDWIDTH_TARGET:
            missed.append(f"bandwidth: {share:.2f} of copy at {name}; the target is {BANDWIDTH_TARGET:.2f}")
        if speed < SPEED_TARGET:
            missed.append(f"speed: {speed:.1f} x the reference at {name}; the target is {SPEED_TARGET:.0f}")
    return missed


def main() -> None:
    start = time.perf_counter()
    parser = arguments(__doc__)
    add_device(parser)
    parser.add_argument("--slots", type=int, nargs="+", default=[512, 4096, 16384], metavar="N", help="per head")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--page-size", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=2.0, help="of measuring per row")
    args = parser.parse_args()
    device, dtype = resolve_device(args)
    dtypes = [dtype] if args.dtype else [torch.float32, torch.bfloat16]
    print(f"kernel: {active_backend(device.type)}, batch {args.batch}, pages of {args.page_size}")
    figures, rows = [], []
    for shape in SHAPES:
        for of in dtypes:
            for slots in sorted(args.slots):
                f = measure(shape, slots, slots != min(args.slots), of, args, device)
                figures.append(f)
                rate, share, speed = f["gb_per_s"], f["of_copy"], f["speed_up"]
                rows.append([
                    f"{shape[0]}/{shape[1]}", shape[2], f["dtype"], f"{slots}{' ragged' if f['ragged'] else ''}",
                    f["bytes"] / 2**20, f["ms"]["kernel"]["median"], rate["copy"], rate["kernel"], share["median"],
                    f"{share['q1']:.2f}-{share['q3']:.2f}", speed["median"], f"{speed['q1']:.1f}-{speed['q3']:.1f}",
                ])  # fmt: skip
    columns = ["heads", "D", "dtype", "slots", "MiB", "kernel ms", "copy GB/s", "kernel GB/s", "of copy", "quartiles",
               "x reference", "quartiles"]  # fmt: skip
    print(table(columns, rows))
    finish(args, "decode_attention", figures, missed_targets(figures), start)


if __name__ == "__main__":
    main()
