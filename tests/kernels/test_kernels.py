"""The kernels of the inference engine: against the step-by-step oracle, against plain attention, and against each
other.
"""

from __future__ import annotations

import copy
import itertools
import math
from typing import Optional

import pytest
import torch
from helpers import emulated
from torch import Tensor

from megatron.dmc.kernels import (
    AppendParams,
    CacheState,
    append,
    decode_attention,
    free,
    make_state,
    prefill_attention,
    use_backend,
)
from megatron.dmc.ops import OracleCache, compress, rotary_frequencies, rotate
from megatron.dmc.ops import prefill_attention as prefill_in_torch
from megatron.dmc.ops.rotary import cos_sin

BIAS, EPSILON = 0.3, 2.0**-7
HUGE = 2**30  # a page id that no pool has
# What is added to the neuron: no merge at all, some, segments far longer than a window of 12, one segment.
SHIFTS = {"none": -20.0, "some": 0.3, "most": 2.3, "all": 20.0}
BACKENDS = [
    pytest.param("cpp", "cpu", id="cpp"),
    pytest.param("reference", "cpu", id="reference"),
    pytest.param("emulated", "cpu", id="emulated"),
    pytest.param("reference", "cuda", id="reference-cuda", marks=pytest.mark.gpu),
    pytest.param("cuda", "cuda", id="cuda", marks=pytest.mark.gpu),
]
DTYPES = [pytest.param(getattr(torch, name), id=name) for name in ("float32", "bfloat16", "float16")]


def backend_named(name: str):
    """Context in which a backend of :data:`BACKENDS` runs, or "amx": the kernels for AMX, emulated."""
    made = {"emulated": emulated.kernels, "amx": emulated.amx_kernels}
    return use_backend(made[name]() if name in made else name)


@pytest.fixture(autouse=True)
def _backend(request):
    """Tests with the parameters ``backend`` and ``device`` run under that backend."""
    name = request.node.callspec.params.get("backend") if hasattr(request.node, "callspec") else None
    with backend_named(name or "reference"):
        yield


on_backends = pytest.mark.parametrize(("backend", "device"), BACKENDS)
# Those that look at values, and so can raise: the CUDA kernels wait for nothing.
on_checking_backends = pytest.mark.parametrize(
    ("backend", "device"), [b for b in BACKENDS if b.values[0] in ("cpp", "reference")]
)
on_compiled_backends = pytest.mark.parametrize(
    ("backend", "device"), [b for b in BACKENDS if b.values[0] != "reference"]
)


def ints(values, device="cpu") -> Tensor:
    return torch.as_tensor(values, dtype=torch.int32, device=device)


def tokens(shape: tuple[int, ...], g: int, kv: int, d: int, shift: float, dtype=torch.float32) -> tuple[Tensor, ...]:
    """Un-rotated q [*shape, g * kv, D], k, v [*shape, kv, D] as views of one fused projection; ``shift`` makes tokens
    merge.
    """
    fused = torch.randn(*shape, (g + 2) * kv, d, generator=torch.Generator().manual_seed(len(shape) + d))
    fused[..., g * kv : (g + 1) * kv, -1] += shift
    fused = fused.to(dtype)
    return fused[..., : g * kv, :], fused[..., g * kv : (g + 1) * kv, :], fused[..., (g + 1) * kv :, :]


def poisoned(device="cpu", **options) -> CacheState:
    """An empty cache with NaN where nothing may be read, absurd page ids, and the free pages in disorder."""
    state = make_state(device=device, **options)
    for x in (state.k_pages, state.v_pages, state.ring_k, state.ring_v, state.ring_w):
        x.fill_(math.nan)
    state.page_table.fill_(HUGE)
    order = torch.randperm(state.num_pages, generator=torch.Generator().manual_seed(1))
    state.free_pages.copy_(order)
    return state


def slots_of(state: CacheState, row: int, layer: int, head: int) -> tuple[Tensor, Tensor]:
    """Keys and values of one head, [n, D]."""
    n = int(state.lengths[row, layer, head])
    pages = state.page_table[row, layer, head, : -(-n // state.page_size)].long()
    return tuple(x[pages].flatten(0, 1)[:n] for x in (state.k_pages, state.v_pages))


class Run:
    """Feeds sequences through one layer of a cache, in steps of any composition."""

    def __init__(self, q, k, v, rows, state, *, window, layer=1, plain=False, device="cpu") -> None:
        """q, k, v: [sequences, length, heads, D]; sequence i lives in row ``rows[i]``."""
        self.q, self.k, self.v = (x.to(device) for x in (q, k, v))
        self.rows, self.state, self.layer, self.device = rows, state, layer, device
        self.options = {"bias": BIAS, "epsilon": EPSILON, "window": window, "compress": not plain}
        self.inv_freq = rotary_frequencies(q.size(-1), 1e4, device=device)
        self.position = [0] * len(rows)
        self.out = torch.full_like(self.q, math.nan, memory_format=torch.contiguous_format)

    def step(self, counts: list[int], decode: bool = False) -> None:
        """``counts[i]`` tokens of sequence i, sequences without tokens included;
        ``decode``: through decode_attention.
        """
        sequence = torch.tensor([i for i, n in enumerate(counts) for _ in range(n)], dtype=torch.long)
        at = torch.tensor([self.position[i] + j for i, n in enumerate(counts) for j in range(n)], dtype=torch.long)
        cu = ints([0, *torch.tensor(counts).cumsum(0).tolist()], self.device)
        rows = ints(self.rows, self.device)
        q, k, v = (x[sequence, at] for x in (self.q, self.k, self.v))
        tokens = (q, k, v, cu, rows, ints(at, self.device), self.inv_freq)
        done = append(self.state, self.layer, AppendParams(*tokens, partial=not decode, **self.options))
        scale = q.size(-1) ** -0.5
        if decode:
            assert set(counts) == {1} and done.k_part.numel() == 0
            out = decode_attention(self.state, self.layer, done.q_rot, rows, scale)
        else:
            out = prefill_attention(self.state, self.layer, done, cu, rows, scale)
        assert out.dtype == q.dtype and out.shape == q.shape
        self.out[sequence, at] = out
        self.position = [p + n for p, n in zip(self.position, counts)]
        self.state.check_integrity()


def oracle(q: Tensor, k: Tensor, v: Tensor, window: Optional[int]) -> tuple[OracleCache, Tensor]:
    cache = OracleCache(
        q.size(0), k.size(2), rotary_frequencies(q.size(-1), 1e4), decision_bias=BIAS, epsilon=EPSILON, window=window
    )
    return cache, torch.stack([cache.step(q[:, t], k[:, t], v[:, t]) for t in range(q.size(1))], dim=1)


def close(got: Tensor, want: Tensor, bound: float = 1e-5) -> None:
    error = float((got.cpu() - want).abs().max() / want.abs().max())
    assert error <= bound, f"{error:.1e}"


# Steps of three sequences, 70 tokens each: chunks with decoding, a lone token, chunks only, sequences that sit out.
MIXTURE = ([40, 1, 0], [1, 0, 5], [1, 16, 1], [17, 1, 1], [1, 1, 1], [10, 51, 62])


# ----------------------------------------------------------------------------------------------------- with the oracle


# The emulator is slow: each once, not all of all.
GROUPS_AND_SHIFTS = [
    pytest.param(*backend.values, g, shift, id=f"{backend.id}-{g}-{shift}", marks=backend.marks)
    for backend in BACKENDS
    for g, shift in itertools.product((1, 2, 4, 8), SHIFTS)
    if backend.id != "emulated" or (g, shift) in ((1, "most"), (2, "some"), (4, "none"), (8, "all"))
]


@pytest.mark.parametrize(("backend", "device", "g", "shift"), GROUPS_AND_SHIFTS)
@pytest.mark.parametrize("window", [12, None])
def test_mixed_steps_equal_the_oracle(backend, device, window, g, shift) -> None:
    """Outputs, lengths and the slots themselves; all pages are back in the end."""
    q, k, v = tokens((3, 70), g, 2, 32, SHIFTS[shift])
    state = poisoned(
        device, num_pages=64, max_seqs=5, num_layers=2, num_kv_heads=2, head_dim=32, max_slots=80, window=window
    )
    run = Run(q, k, v, [3, 0, 4], state, window=window, device=device)
    for counts in MIXTURE:
        run.step(counts)
    cache, want = oracle(q, k, v, window)
    close(run.out, want)
    assert torch.equal(state.lengths[[3, 0, 4], 1].long().cpu(), cache.lengths())
    for i, row in enumerate(run.rows):
        for head in range(2):
            for got, slots in zip(
                slots_of(state, row, 1, head), (cache.heads[i][head].keys, cache.heads[i][head].values)
            ):
                close(got, torch.stack(slots))
    free(state, ints([0, -1, 3], device))
    state.check_integrity()
    assert state.lengths.sum() == state.lengths[4].sum() > 0
    free(state, ints([4], device))
    state.check_integrity()
    assert state.free_count() == 64 and not state.lengths.any() and not state.segment.any()


@on_backends
@pytest.mark.parametrize("page_size", [16, 32, 64])
@pytest.mark.parametrize("window", [1, 3, 12, None])
def test_token_by_token_equals_the_oracle(backend, device, window, page_size) -> None:
    q, k, v = tokens((2, 90), 2, 3, 16, SHIFTS["some"])
    state = poisoned(
        device,
        num_pages=48,
        max_seqs=2,
        num_layers=2,
        num_kv_heads=3,
        head_dim=16,
        max_slots=90,
        page_size=page_size,
        window=window,
    )
    run = Run(q, k, v, [1, 0], state, window=window, device=device)
    steps = 90 if backend != "emulated" else 2 + (page_size if window == 12 else 16)
    for _ in range(steps):
        run.step([1, 1], decode=True)
    close(run.out[:, :steps], oracle(*(x[:, :steps] for x in (q, k, v)), window)[1])


@on_backends
@pytest.mark.parametrize("window", [12, None])
def test_any_chunking_gives_the_same(backend, device, window) -> None:
    """One sequence in chunks of 1 to 97 tokens, segments longer than a chunk included."""
    q, k, v = tokens((1, 97), 2, 2, 64, SHIFTS["most"])
    want = oracle(q, k, v, window)[1]
    for size in (11, 13, 96) if backend == "emulated" else (1, 2, 11, 12, 13, 31, 96, 97):
        state = poisoned(
            device, num_pages=32, max_seqs=1, num_layers=2, num_kv_heads=2, head_dim=64, max_slots=97, window=window
        )
        run = Run(q, k, v, [0], state, window=window, device=device)
        for start in range(0, 97, size):
            run.step([min(size, 97 - start)])
        close(run.out, want)


@on_backends
@pytest.mark.parametrize("g", [1, 3])
def test_plain_model_equals_causal_attention(backend, device, g) -> None:
    q, k, v = tokens((3, 70), g, 2, 48, 20.0)
    state = poisoned(
        device, num_pages=64, max_seqs=3, num_layers=2, num_kv_heads=2, head_dim=48, max_slots=70, compress=False
    )
    run = Run(q, k, v, [2, 1, 0], state, window=None, plain=True, device=device)
    for counts in MIXTURE:
        run.step(counts)
    cos, sin = cos_sin(rotary_frequencies(48, 1e4), torch.arange(70))
    qr, kr = (rotate(x.transpose(1, 2), cos, sin) for x in (q, k))
    want = torch.nn.functional.scaled_dot_product_attention(qr, kr, v.transpose(1, 2), is_causal=True, enable_gqa=True)
    close(run.out, want.transpose(1, 2))
    assert state.lengths[:, 1].eq(70).all() and not state.lengths[:, 0].any()


# ------------------------------------------------------------------------------------------------------ with dense math


def filled(lengths: list[list[int]], d: int, page_size: int, dtype, device) -> tuple[CacheState, list]:
    """A cache whose heads hold the given numbers of random slots [rows][heads], and these slots."""
    rows, heads = len(lengths), len(lengths[0])
    state = poisoned(
        device,
        num_pages=1 + sum(-(-n // page_size) for row in lengths for n in row),
        max_seqs=rows,
        num_layers=2,
        num_kv_heads=heads,
        head_dim=d,
        max_slots=max(1, max(map(max, lengths))),
        page_size=page_size,
        dtype=dtype,
    )
    generator, taken, content = torch.Generator().manual_seed(3), 0, []
    for row in range(rows):
        content.append([])
        for head in range(heads):
            n = lengths[row][head]
            pages = -(-n // page_size)
            ids = state.free_pages[taken : taken + pages]
            state.page_table[row, 1, head, :pages] = ids
            taken += pages
            state.refcounts[ids.long()] = 1
            kv = torch.randn(2, n, d, generator=generator).to(dtype)
            content[row].append(kv)
            for pool, x in zip((state.k_pages, state.v_pages), kv):
                for i, page in enumerate(ids.tolist()):
                    part = x[i * page_size : (i + 1) * page_size]
                    pool[page, : part.size(0)] = part.to(device)
            state.lengths[row, 1, head] = n
    state.counters[0] = taken
    state.check_integrity()
    return state, content


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v in the dtype of the inputs: q [g, D], k, v [n, D]."""
    return torch.softmax(q @ k.T * q.size(-1) ** -0.5, dim=-1) @ v if k.size(0) else torch.zeros_like(q)


def decode_case(lengths, g, d, page_size, dtype, device, loud: float = 1.0) -> None:
    """The error is at most twice that of the same attention in PyTorch in this dtype, both against fp64. ``loud``:
    times q.
    """
    state, content = filled(lengths, d, page_size, dtype, device)
    rows, heads = len(lengths), len(lengths[0])
    q = (loud * torch.randn(rows, heads * g, 2 * d, generator=torch.Generator().manual_seed(4))).to(dtype)[..., :d]
    order = list(reversed(range(rows)))
    out = decode_attention(state, 1, q[order].to(device), ints(order, device), d**-0.5).cpu()[order]
    # [rows, Hq, D] -> [rows, H, g, D]
    grouped = q.reshape(rows, heads, g, d)
    exact, same = (
        torch.stack(
            [
                torch.stack([attend(grouped[i, j].to(of), *content[i][j].to(of)) for j in range(heads)])
                for i in range(rows)
            ]
        )
        for of in (torch.float64, dtype)
    )
    error, allowed = ((x.view(exact.shape).double() - exact).norm() for x in (out, same))
    assert error <= max(2 * allowed, 1e-6 * exact.norm()), f"{error:.1e}, PyTorch {allowed:.1e}"
    empty = torch.tensor([[n == 0 for n in row] for row in lengths])
    assert not out.view(exact.shape)[empty].any()


@on_backends
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("page_size", [16, 32, 64])
def test_decode_around_page_edges(backend, device, page_size, dtype) -> None:
    p = page_size
    lengths = [[0, 1], [p - 1, p], [p + 1, 2 * p - 1], [2 * p, 2 * p + 1], [0, 0], [5 * p + 3, 2]]
    for g in (1, 2, 4, 8):
        decode_case(lengths, g, 64, page_size, dtype, device)


@on_backends
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [8, 24, 32, 64, 80, 96, 128, 256])
def test_decode_head_dims(backend, device, d, dtype) -> None:
    for g in (1, 3, 4, 7, 8):
        decode_case([[33, 200], [1, 16]], g, d, 16, dtype, device)


@on_backends
@pytest.mark.parametrize("dtype", DTYPES)
def test_decode_of_long_and_unequal_heads(backend, device, dtype) -> None:
    """Far beyond one split of the keys and values, beside short heads."""
    for g in (1, 4, 8):
        decode_case([[5000, 3, 2047], [1, 4097, 0]], g, 64, 32, dtype, device)


@on_backends
@pytest.mark.parametrize("loud", [3.0, 40.0])
def test_scores_whose_maximum_moves(backend, device, loud) -> None:
    """Far enough that sums are scaled to a new maximum, time and again (40), now and then (3)."""
    for dtype in (torch.float32, torch.bfloat16):
        decode_case([[700, 65]], 2, 64, 16, dtype, device, loud)
    q, k, v = tokens((1, 300), 2, 2, 64, SHIFTS["some"])
    q = q * loud
    state = poisoned(device, num_pages=64, max_seqs=1, num_layers=2, num_kv_heads=2, head_dim=64, max_slots=300)
    run = Run(q, k, v, [0], state, window=12, device=device)
    for count in (200, 99, 1):
        run.step([count])
    close(run.out, oracle(q, k, v, 12)[1], 1e-4)


@on_backends
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("d", "g"), [(64, 2), (80, 1), (128, 4), (256, 1)])
def test_prefill_precision(backend, device, d, g, dtype) -> None:
    """Append and attention, in two chunks: at most twice the error of the training side's prefill in the same dtype."""
    q, k, v = tokens((1, 220), g, 2, d, 1.0, dtype)
    state = poisoned(
        device, num_pages=64, max_seqs=1, num_layers=2, num_kv_heads=2, head_dim=d, max_slots=220, dtype=dtype
    )
    run = Run(q, k, v, [0], state, window=12, device=device)
    run.step([150])
    run.step([70])
    table = cos_sin(rotary_frequencies(d, 1e4), torch.arange(220))
    exact, same = (
        prefill_in_torch(
            compress(
                *(x.transpose(1, 2).to(of) for x in (q, k, v)), *table, decision_bias=BIAS, epsilon=EPSILON, window=12
            )
        ).transpose(1, 2)
        for of in (torch.float64, dtype)
    )
    error, allowed = ((x.cpu().double() - exact).norm() for x in (run.out, same))
    assert error <= max(2 * allowed, 2e-6 * exact.norm()), f"{error:.1e}, PyTorch {allowed:.1e}"


# ------------------------------------------------------------------------------------------------- layouts and refusals


@on_backends
def test_padding_and_sequences_without_tokens_are_left_alone(backend, device) -> None:
    q, k, v = (x.to(device) for x in tokens((7,), 2, 2, 32, 0.3))
    inv_freq = rotary_frequencies(32, 1e4, device=device)
    options = {"num_pages": 16, "max_seqs": 4, "num_layers": 2, "num_kv_heads": 2, "head_dim": 32, "max_slots": 32}
    results = []
    for keep, cu, rows in (
        (range(7), [0, 2, 2, 5, 6, 7], [1, 3, 0, -1, 2]),
        ((0, 1, 2, 3, 4, 6), [0, 2, 5, 6], [1, 0, 2]),
    ):
        state, at = poisoned(device, **options), ints(range(7), device)[list(keep)]
        args = (ints(cu, device), ints(rows, device))
        raw = [x[list(keep)] for x in (q, k, v)]
        a = append(state, 1, AppendParams(*raw, *args, at, inv_freq, bias=BIAS, epsilon=EPSILON, window=12))
        results.append((state, prefill_attention(state, 1, a, *args, 32**-0.5), a))
    (one, out, a), (two, want, _) = results
    assert torch.equal(out[[0, 1, 2, 3, 4, 6]], want)
    assert not out[5].any() and not a.q_rot[5].any()
    for x, y in zip(one.tensors(), two.tensors(), strict=True):
        assert torch.equal(x.nan_to_num(7.0), y.nan_to_num(7.0))
    rows = ints([2, -1, 0], device)
    decoded = decode_attention(one, 1, a.q_rot[[6, 5, 4]], rows, 32**-0.5)
    assert torch.equal(decode_attention(one, 1, a.q_rot[[6, 4]], rows[[0, 2]], 32**-0.5), decoded[[0, 2]])
    assert not decoded[1].any()


@on_checking_backends
@pytest.mark.parametrize(("pages", "slots", "match"), [(5, 64, "needs 2 pages and 1 are free"), (16, 32, "33 slots")])
def test_a_step_that_does_not_fit_is_refused_before_it_writes(backend, device, pages, slots, match) -> None:
    q, k, v = tokens((1, 40), 1, 2, 32, -20.0)
    state = poisoned(device, num_pages=pages, max_seqs=1, num_layers=2, num_kv_heads=2, head_dim=32, max_slots=slots)
    run = Run(q, k, v, [0], state, window=12, device=device)
    run.step([30])
    before = copy.deepcopy(state)
    with pytest.raises(RuntimeError, match=match):
        run.step([3])
    for x, y in zip(state.tensors(), before.tensors(), strict=True):
        assert torch.equal(x.nan_to_num(7.0), y.nan_to_num(7.0))
    state.check_integrity()


def test_integrity_finds_what_is_wrong() -> None:
    def broken(change) -> CacheState:
        state, _ = filled([[20, 3], [0, 40]], 8, 16, torch.float32, "cpu")
        change(state)
        return state

    def set_to(name, index, value):
        return lambda state: getattr(state, name).__setitem__(index, value)

    def shared(s: CacheState, counted: int = 1, layer: int = 1, head: int = 0) -> None:
        """The first page of row 0 is that of row 1 too."""
        page = s.page_table[0, 1, 0, 0]
        s.page_table[1, layer, head, 0], s.lengths[1, layer, head] = page, 16
        s.refcounts[int(page)] += counted

    cases = {
        "held by 2 rows, and its count is 1": lambda s: shared(s, counted=0),
        "free and used": lambda s: s.page_table[0, 1, 0].__setitem__(0, int(s.free_pages[-1])),
        "is not one of": set_to("page_table", (0, 1, 0, 0), HUGE),
        "is lost": set_to("lengths", (0, 1, 1), 0),
        "free twice": lambda s: (free(s, ints([0, 1])), s.free_pages.__setitem__(0, int(s.free_pages[1]))),
        "and its count is 2": lambda s: s.refcounts.__setitem__(int(s.page_table[0, 1, 0, 0]), 2),
        "outside": set_to("lengths", (0, 0, 0), 1000),
        "were taken": set_to("counters", 1, 100),
        "two places": lambda s: shared(s, layer=0),
        "may still be written and is shared by 2 rows": shared,
    }
    for match, change in cases.items():
        with pytest.raises(RuntimeError, match=match):
            broken(change).check_integrity()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"dtype": torch.float64}, "float64"),
        ({"page_size": 24}, "page_size 24"),
        ({"head_dim": 100}, "head_dim 100"),
        ({"window": 0}, "window of 0"),
        ({"num_pages": 0}, "num_pages is 0"),
    ],
)
def test_a_cache_that_cannot_be_is_refused(change, match) -> None:
    options = {"num_pages": 8, "max_seqs": 1, "num_layers": 1, "num_kv_heads": 1, "head_dim": 64, "max_slots": 32}
    with pytest.raises(ValueError, match=match):
        make_state(**{**options, **change})
