"""Paged decode attention: bytes of cache read per second against the machine's copy bandwidth, compiled against
PyTorch.

Measured, in turn within one process, on caches of random slots whose pages lie in random order:
  copy       torch's copy_ of a buffer as large as the cache; reads and writes both count
  kernel     the compiled decode attention (C++ or CUDA); bytes are those of the slots' keys and values
  reference  the same op in plain PyTorch (on a GPU only where the heads are shortest: it takes many times the memory)
  append     decide, pool, rotate and write one token per sequence before it, one head in four taking a slot
  evicting   the same op, and append_evicting, for a model that evicts (DMS) whose heads hold as many slots, the latest
             257 tokens among them; one token in four is kept when it leaves the window (on a GPU where all heads are
             equally long, and without a target)
  int8, fp8_e4m3  the same op on caches of as many slots whose pages hold 8 bits, without a target
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
  evicting   the op takes at most 1.05 times as long for a model that evicts as for one that merges, and its append no
             longer than append
On a GPU of 64 sequences and more:
  bandwidth  kernel at least 0.85 of copy at 512 slots and more, 0.60 at 128
  append     with the pages it takes, less than a tenth of append and kernel, at 512 slots and more
  flashinfer kernel at least as fast
"""

import time
from collections.abc import Callable
from functools import partial

import _flashinfer
import torch
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
from megatron.dmc.inference.config import KV_CACHE_DTYPES
from megatron.dmc.kernels.params import NEURON_ALL
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
EVICT_WINDOW, EVICTING_TARGET, EVICTING_APPEND_TARGET = 256, 1.05, 1.0
REPEATS, ROUNDS = 10, (5, 30)  # calls of a CUDA graph, and of append; rounds of a measurement
GROWTH = REPEATS * (ROUNDS[1] + 3)  # slots that a head gains at most while append is measured


def cache(
    rows: int,
    heads: int,
    d: int,
    slots: int,
    uneven: bool,
    page_size: int,
    dtype,
    device,
    evict_window: int = 0,
    kv_dtype: torch.dtype | None = None,
) -> kernels.CacheState:
    """Cache of random slots, as many in every head or as many in the mean, whose pages lie in random order. With an
    ``evict_window`` those of a model that evicts, its recent tokens among them; with a ``kv_dtype`` in 8 bits.
    """
    generator = torch.Generator().manual_seed(0)
    share = torch.rand(rows, 1, heads, generator=generator)
    if not uneven:
        share = torch.ones_like(share)
    else:
        share = share + 0.5 if device.type == "cpu" else (-share.log()).clamp(1 / 16, 4)
    lengths = (slots * share).long()
    recent = evict_window + 1 if evict_window else 0
    kept = lengths - recent
    growth = -(-GROWTH // page_size)
    state = kernels.make_state(
        num_pages=int((-(-lengths // page_size) + 2).sum()) + rows * heads * growth,
        max_seqs=rows,
        num_layers=1,
        num_kv_heads=heads,
        head_dim=d,
        max_slots=int(lengths.max()) + GROWTH,
        page_size=page_size,
        evict_window=evict_window or None,
        dtype=dtype,
        kv_dtype=kv_dtype,
        device=device,
    )
    for x in (state.ring_k, state.ring_v, *(() if kv_dtype else (state.k_pages, state.v_pages))):
        x.normal_()
    for codes, scales in ((state.k_pages, state.k_scales), (state.v_pages, state.v_scales)):
        if kv_dtype:
            codes.view(torch.int8).random_(-100, 100)
            scales.fill_(0.01)
    state.ring_w.fill_(1.0)
    state.lengths.copy_(kept)
    # A model that merges has seen 12 tokens of the open slot, one that evicts four times what it kept.
    state.segment.copy_(4 * kept.amax(2, keepdim=True) + recent if evict_window else torch.full_like(kept, 12))
    state.marks.copy_(torch.rand(state.marks.shape, generator=generator) < 0.75)
    held = state.held_pages(torch.arange(rows))
    total = int(held.used.sum())
    state.free_pages.copy_(torch.randperm(state.num_pages, generator=generator))
    taken = state.free_pages[:total]
    tables = torch.cat((state.page_table, state.recent_table), dim=3)
    tables.scatter_(3, held.column, torch.zeros_like(held.ids).masked_scatter_(held.used, taken.long()).int())
    state.page_table.copy_(tables[..., : state.page_table.size(3)])
    state.recent_table.copy_(tables[..., state.page_table.size(3) :])
    state.refcounts[taken.long()] = 1
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
    """Function that appends one token to every row :data:`REPEATS` times on a CPU, once in a CUDA graph of as many; a
    random quarter of the heads keeps one more slot each time.
    """
    rows, heads, d, device = state.lengths.size(0), state.lengths.size(2), state.head_dim, state.k_pages.device
    fused = torch.randn(rows, query_heads + 2 * heads, d, device=device).to(state.k_pages.dtype)
    q, k, v = fused.split((query_heads, heads, heads), dim=1)
    k[..., -1] = torch.where(torch.rand(rows, heads, device=device) < 0.25, -20.0, 20.0)
    ends = torch.arange(rows + 1, dtype=torch.int32, device=device)
    positions, inv_freq = torch.full_like(ends[1:], 4000), rotary_frequencies(d, 1e4, device=device)
    tokens = (ends, ends[:-1], positions, inv_freq)
    if state.evicts:
        logits = k[..., -1].float().contiguous()
        rule = {"about_self": False, "neuron": NEURON_ALL, "partial": False}
        evict = kernels.EvictParams(q, k, v, logits, *tokens, **rule)
        once = partial(kernels.append_evicting, state, 0, evict)
    else:
        options = {"bias": 5.0, "epsilon": 2.0**-7, "window": 12, "partial": False}
        merge = kernels.AppendParams(q, k, v, *tokens, **options)
        once = partial(kernels.append, state, 0, merge)
    if device.type == "cuda":
        return graphed(once, device)
    return lambda: [once() for _ in range(REPEATS)]


def measure(shape, slots: int, uneven: bool, dtype, args, device) -> dict:
    query_heads, heads, d = shape
    batch = args.batch
    if device.type == "cpu" and slots >= BANDWIDTH_TARGETS["cpu"][0][0]:
        batch = max(batch, -(-MEMORY_BYTES // (2 * slots * heads * d * dtype.itemsize)))
    shape = (batch, heads, d, slots, uneven, args.page_size, dtype, device)
    state = cache(*shape)
    # Where a GPU's heads are skewed the shortest hold fewer slots than a window.
    has_window = device.type == "cpu" or not uneven
    evicting = cache(*shape, min(EVICT_WINDOW, slots // 4)) if has_window else None
    quantized = {name: cache(*shape, kv_dtype=of) for name, of in KV_CACHE_DTYPES.items() if of is not None}
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
    if evicting is not None:
        functions["evicting"] = graphed(lambda: kernels.decode_attention(evicting, 0, q, rows, d**-0.5), device)
    for name, other in quantized.items():
        functions[name] = graphed(partial(kernels.decode_attention, other, 0, q, rows, d**-0.5), device)
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
    # The last: it changes the lengths.
    states = {"append": state} | ({"evicting append": evicting} if evicting is not None else {})
    functions = {name: appending(state, query_heads) for name, state in states.items()}
    again = interleave(functions, device, seconds=args.seconds / 4, rounds=ROUNDS)
    times |= {name: [t / REPEATS for t in values] for name, values in again.items()}
    for state in states.values():
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
        "over_unquantized": {name: ratio(times[name], times["kernel"]) for name in quantized},
        "append_share": ms["append"]["median"] / (ms["append"]["median"] + ms["kernel"]["median"]),
        "evicting_over_merging": {
            "attention": ratio(times["evicting"], times["kernel"]),
            "append": ratio(times["evicting append"], times["append"]),
        }
        if evicting is not None
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
        if device.type == "cpu":
            for part, most in (("attention", EVICTING_TARGET), ("append", EVICTING_APPEND_TARGET)):
                if (found := f["evicting_over_merging"][part]["median"]) > most:
                    missed.append(f"evicting: {found:.2f} of the time of {part} at {name}; the target is {most:.2f}")
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
    for name, of in f["over_unquantized"].items():
        found[f"{name} time"], found[f"{name} quartiles"] = of["median"], quartiles(of)
    for part in ("attention", "append"):
        found[f"DMS/DMC {part}"] = f["evicting_over_merging"][part]["median"] if f["evicting_over_merging"] else ""
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
    run_script(main)
