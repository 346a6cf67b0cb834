"""Paged decode attention: bytes of cache read per second against the machine's copy bandwidth, compiled against
PyTorch.

Measured, in turn within one process, on caches of random slots whose pages lie in random order:
  copy       torch's copy_ of a buffer as large as the cache; reads and writes both count
  kernel     the compiled decode attention (C++ or CUDA); bytes are those of the slots' keys and values
  reference  the same op in plain PyTorch (on a GPU only where the heads are shortest: it takes many times the memory)
  append     on a GPU: decide, pool, rotate and write one token per sequence before it, one head in four taking a slot
  flashinfer on a GPU, with --flashinfer: its paged decode attention on the same cache, every head a sequence of its
             own; the faster of its two kernels (ordinary and tensor cores), planned beforehand, in graphs too
One row per query heads / KV heads, dtype and slots per head. On a CPU "ragged" heads hold between a half and one and a
half of these; on a GPU "skewed" ones an exponential share, up to four times. On a GPU everything but the reference is a
CUDA graph of ten calls, so that the host's time does not count.

Targets (--check) on a CPU:
  bandwidth  kernel at least 0.60 of copy at 4,096 slots and more, fp32 and bf16, equal and ragged heads; there are so
             many sequences then that the cache is 128 MiB at least: a smaller one, and its copy, lie in the CPU's own
             caches
  speed      kernel at least 5 times as fast as the reference, everywhere
On a GPU of 64 sequences and more:
  bandwidth  kernel at least 0.85 of copy at 512 slots and more, 0.60 at 128
  append     with the pages it takes, less than a tenth of append and kernel, at 512 slots and more
  flashinfer kernel at least as fast
"""

from __future__ import annotations

import time
from collections.abc import Callable

import _flashinfer
import torch
from _common import add_device, arguments, finish, interleave, quartiles, ratio, record_table, resolve_device, spread

from megatron.dmc import kernels
from megatron.dmc.kernels.state import REFUSED
from megatron.dmc.ops import rotary_frequencies

SHAPES = {  # query heads, KV heads, head dimension
    "cpu": ((8, 8, 128), (32, 8, 128), (16, 2, 64)),
    "cuda": ((32, 32, 128), (128, 32, 128), (256, 32, 128)),
}
SLOTS = {"cpu": (512, 4096, 16384), "cuda": (128, 512, 2048)}
BATCH = {"cpu": 4, "cuda": 64}
BANDWIDTH_TARGETS = {"cpu": ((4096, 0.60),), "cuda": ((512, 0.85), (128, 0.60))}  # from so many slots on
MEMORY_BYTES = 128 * 2**20  # of a cache on a CPU, where memory's bandwidth is the measure
SPEED_TARGET, APPEND_TARGET, APPEND_FROM, FLASHINFER_TARGET = 5.0, 0.10, 512, 1.0
REPEATS, ROUNDS = 10, (5, 30)  # calls of a CUDA graph; rounds of a measurement
GROWTH = REPEATS * (ROUNDS[1] + 3)  # slots that a head gains at most while append is measured


def cache(rows: int, heads: int, d: int, slots: int, uneven: bool, page_size: int, dtype, device) -> kernels.CacheState:
    """Cache of random slots, as many in every head or as many in the mean, whose pages lie in random order."""
    generator = torch.Generator().manual_seed(0)
    share = torch.rand(rows, 1, heads, generator=generator)
    if not uneven:
        share = torch.ones_like(share)
    else:
        share = share + 0.5 if device.type == "cpu" else (-share.log()).clamp(1 / 16, 4)
    lengths = (slots * share).long()
    pages = -(-lengths // page_size)
    total = int(pages.sum())
    growth = GROWTH if device.type == "cuda" else 0
    state = kernels.make_state(
        num_pages=total + rows * heads * -(-growth // page_size),
        max_seqs=rows,
        num_layers=1,
        num_kv_heads=heads,
        head_dim=d,
        max_slots=int(lengths.max()) + growth,
        page_size=page_size,
        dtype=dtype,
        device=device,
    )
    for x in (state.k_pages, state.v_pages, state.ring_k, state.ring_v):
        x.normal_()
    state.ring_w.fill_(1.0)
    state.segment.fill_(12)
    used = torch.arange(state.page_table.size(3)) < pages[..., None]
    state.free_pages.copy_(torch.randperm(state.num_pages, generator=generator))
    taken = state.free_pages[:total]
    state.page_table[used.to(device)] = taken
    state.refcounts[taken.long()] = 1
    state.lengths.copy_(lengths)
    state.counters[0] = total
    state.check_integrity()
    return state


def graphed(function: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """Function that replays a CUDA graph of :data:`REPEATS` calls; ``function`` itself on a CPU."""
    if device.type == "cpu":
        return function
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        function()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(REPEATS):
            function()
    return graph.replay


def appending(state: kernels.CacheState, query_heads: int) -> Callable[[], object]:
    """Function that appends one token to every row; a random quarter of the heads opens a slot each time."""
    rows, heads, d, device = state.lengths.size(0), state.lengths.size(2), state.head_dim, state.k_pages.device
    fused = torch.randn(rows, query_heads + 2 * heads, d, device=device).to(state.k_pages.dtype)
    q, k, v = fused.split((query_heads, heads, heads), dim=1)
    k[..., -1] = torch.where(torch.rand(rows, heads, device=device) < 0.25, -20.0, 20.0)
    ends = torch.arange(rows + 1, dtype=torch.int32, device=device)
    positions, inv_freq = torch.full_like(ends[1:], 4000), rotary_frequencies(d, 1e4, device=device)
    options = {"bias": 5.0, "epsilon": 2.0**-7, "window": 12, "partial": False}
    params = kernels.AppendParams(q, k, v, ends, ends[:-1], positions, inv_freq, **options)
    return lambda: kernels.append(state, 0, params)


def measure(shape, slots: int, uneven: bool, dtype, args, device) -> dict:
    query_heads, heads, d = shape
    batch = args.batch
    if device.type == "cpu" and slots >= BANDWIDTH_TARGETS["cpu"][0][0]:
        batch = max(batch, -(-MEMORY_BYTES // (2 * slots * heads * d * dtype.itemsize)))
    state = cache(batch, heads, d, slots, uneven, args.page_size, dtype, device)
    q = torch.randn(batch, query_heads, d, dtype=dtype, device=device)
    rows = torch.arange(batch, dtype=torch.int32, device=device)
    bytes_read = int(state.lengths.sum()) * 2 * d * state.k_pages.element_size()
    source = torch.zeros(bytes_read // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)

    def reference():
        with kernels.use_backend("reference"):
            kernels.decode_attention(state, 0, q, rows, d**-0.5)

    functions = {
        "copy": graphed(lambda: target.copy_(source), device),
        "kernel": graphed(lambda: kernels.decode_attention(state, 0, q, rows, d**-0.5), device),
    }
    if args.flashinfer:
        ours = kernels.decode_attention(state, 0, q, rows, d**-0.5).view(batch, heads, -1, d)
        for name, function in _flashinfer.decode_functions(state, 0, q, d**-0.5).items():
            torch.testing.assert_close(function(), ours, atol=2e-2, rtol=2e-2)
            functions[name] = graphed(function, device)
    repeats = 1 if device.type == "cpu" else REPEATS
    times = interleave(functions, device, seconds=args.seconds, rounds=ROUNDS)
    times = {name: [t / repeats for t in values] for name, values in times.items()}
    if device.type == "cpu" or slots == min(args.slots):
        functions = {"reference": reference, "kernel": functions["kernel"]}
        again = interleave(functions, device, seconds=args.seconds / 2, rounds=ROUNDS)
        times["reference"] = again["reference"]
        speed_up = ratio(again["reference"], [t / repeats for t in again["kernel"]])
    else:
        speed_up = None
    if device.type == "cuda":  # the last: it changes the lengths
        functions = {"append": graphed(appending(state, query_heads), device)}
        times["append"] = [
            t / repeats for t in interleave(functions, device, seconds=args.seconds / 4, rounds=ROUNDS)["append"]
        ]
        assert int(state.counters[REFUSED]) == 0
        state.check_integrity()
    ms = {name: spread(values) for name, values in times.items()}
    theirs = min(
        (name for name in times if name.startswith("flashinfer")), key=lambda name: ms[name]["median"], default=None
    )
    moved = {"copy": 2 * bytes_read, "kernel": bytes_read, "reference": bytes_read}
    return {
        "query_heads": query_heads,
        "heads": heads,
        "head_dim": d,
        "slots": slots,
        "uneven": uneven,
        "dtype": str(dtype).removeprefix("torch."),
        "batch": batch,
        "page_size": args.page_size,
        "bytes": bytes_read,
        "ms": ms,
        # copy moves twice the bytes
        "gb_per_s": {name: moved[name] / 1e6 / x["median"] for name, x in ms.items() if name in moved},
        "of_copy": ratio([t / 2 for t in times["copy"]], times["kernel"]),
        "speed_up": speed_up,
        "over_flashinfer": ratio(times[theirs], times["kernel"]) if theirs else None,
        "append_share": ms["append"]["median"] / (ms["append"]["median"] + ms["kernel"]["median"])
        if "append" in ms
        else None,
    }


def missed_targets(figures: list[dict], device: torch.device) -> list[str]:
    missed = []
    for f in figures:
        name = f"{f['query_heads']}/{f['heads']} heads of {f['head_dim']}, {f['dtype']}, {f['slots']} slots"
        share = f["of_copy"]["median"]
        target = next((target for least, target in BANDWIDTH_TARGETS[device.type] if f["slots"] >= least), 0.0)
        if device.type == "cuda" and f["batch"] < BATCH["cuda"]:
            continue
        if share < target:
            missed.append(f"bandwidth: {share:.2f} of copy at {name}; the target is {target:.2f}")
        if device.type == "cpu" and f["speed_up"]["median"] < SPEED_TARGET:
            missed.append(
                f"speed: {f['speed_up']['median']:.1f} x the reference at {name}; the target is {SPEED_TARGET:.0f}"
            )
        if device.type == "cuda" and f["slots"] >= APPEND_FROM and f["append_share"] >= APPEND_TARGET:
            missed.append(
                f"append: {f['append_share']:.2f} of append and kernel at {name}; the target is {APPEND_TARGET:.2f}"
            )
        if f["over_flashinfer"] and f["over_flashinfer"]["median"] < FLASHINFER_TARGET:
            missed.append(f"flashinfer: {f['over_flashinfer']['median']:.2f} x its speed at {name}; the target is 1")
    return missed


def cells(f: dict, on: str) -> dict[str, object]:
    """Cells of the printed table, by column."""
    share, speed, kind = f["of_copy"], f["speed_up"], " ragged" if on == "cpu" else " skewed"
    found = {
        "heads": f"{f['query_heads']}/{f['heads']}",
        "D": f["head_dim"],
        "dtype": f["dtype"],
        "slots": f"{f['slots']}{kind if f['uneven'] else ''}",
        "batch": f["batch"],
        "MiB": f["bytes"] / 2**20,
        "kernel ms": f"{f['ms']['kernel']['median']:.3f}",
        "copy GB/s": f["gb_per_s"]["copy"],
        "kernel GB/s": f["gb_per_s"]["kernel"],
        "of copy": share["median"],
        "(quartiles)": quartiles(share),
        "x reference": speed["median"] if speed else "",
        "quartiles": quartiles(speed, ".1f") if speed else "",
    }
    if on == "cuda":
        found |= {"append ms": f"{f['ms']['append']['median']:.3f}", "share": f["append_share"]}
    if f["over_flashinfer"]:
        found["x flashinfer"] = f["over_flashinfer"]["median"]
    return found


def main() -> None:
    start = time.perf_counter()
    parser = arguments(__doc__)
    add_device(parser)
    parser.add_argument(
        "--slots", type=int, nargs="+", metavar="N", help="per head; default: 512 4096 16384, GPU: 128 512 2048"
    )
    parser.add_argument("--batch", type=int, help="sequences, on a CPU at least; default: 4, GPU: 64")
    parser.add_argument("--page-size", type=int, default=16)
    parser.add_argument(
        "--flashinfer", action="store_true", help="on a GPU, where flashinfer-python is installed: compare with it"
    )
    parser.add_argument("--seconds", type=float, default=2.0, help="of measuring per row")
    args = parser.parse_args()
    device, dtype = resolve_device(args)
    on = device.type
    if args.flashinfer and (on == "cpu" or not _flashinfer.available()):
        parser.error("--flashinfer needs a GPU and the package flashinfer-python")
    args.slots, args.batch = sorted(args.slots or SLOTS[on]), args.batch or BATCH[on]
    dtypes = [dtype] if args.dtype or on == "cuda" else [torch.float32, torch.bfloat16]
    print(f"kernel: {kernels.active_backend(on)}, pages of {args.page_size}")
    figures, rows = [], []
    for shape in SHAPES[on]:
        for of in dtypes:
            for slots in args.slots:
                for uneven in (slots != min(args.slots),) if on == "cpu" else (False, True):
                    f = measure(shape, slots, uneven, of, args, device)
                    figures.append(f)
                    rows.append(cells(f, on))
    print(record_table(rows))
    finish(args, "decode_attention", figures, missed_targets(figures, device), start)


if __name__ == "__main__":
    main()
