"""A cache of 8 bits: against the oracles' caches that round in Python, against dense attention over what the codes
stand for, in all dtypes against the reference, and through copies of rows.
"""

from __future__ import annotations

import pytest
import torch
from evicting import Run as EvictingRun
from evicting import sequence
from helpers.quantized import KV_DTYPES, nearly, poison, rounding, values
from test_kernels import (
    BACKENDS,
    BIAS,
    EPSILON,
    MIXTURE,
    SHIFTS,
    Run,
    attend,
    backend_named,
    ints,
    on_compiled_backends,
    tokens,
)

from megatron.dmc.kernels import (
    AppendParams,
    EvictParams,
    append,
    append_evicting,
    decode_attention,
    fork,
    free,
    make_state,
    prefill_attention,
)
from megatron.dmc.kernels.params import NEURON_ALL
from megatron.dmc.kernels.state import CacheState
from megatron.dmc.ops import EvictingOracleCache, OracleCache, rotary_frequencies

on_backends = pytest.mark.parametrize(("backend", "device"), BACKENDS)
on_dtypes = pytest.mark.parametrize("kv_dtype", KV_DTYPES.values(), ids=KV_DTYPES)


@pytest.fixture(autouse=True)
def _backend(request):
    with backend_named(request.getfixturevalue("backend") if "backend" in request.fixturenames else "reference"):
        yield


def slots_of(state: CacheState, row: int, head: int, layer: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    n = torch.arange(int(state.lengths[row, layer, head]))
    page = state.page_table[row, layer, head].cpu()[n // state.page_size].long()
    return tuple(x.cpu() for x in values(state, page, n % state.page_size))


@on_backends
@on_dtypes
@pytest.mark.parametrize(("window", "plain"), [(12, False), (None, False), (None, True)], ids=["12", "all", "plain"])
def test_mixed_steps_equal_the_oracle(backend: str, device: str, kv_dtype: torch.dtype, window, plain: bool) -> None:
    """A slot that is written again is rounded from its tokens each time, so errors do not add up."""
    q, k, v = tokens((3, 70), 2, 2, 32, SHIFTS["none" if plain else "most"])
    if plain:
        q[..., -1], k[..., -1] = 0, 0  # of the neuron, which the oracle takes out of attention
    shape = {"num_layers": 1, "num_kv_heads": 2, "head_dim": 32, "max_slots": 80, "device": device}
    state = poison(make_state(num_pages=64, max_seqs=5, window=window, compress=not plain, kv_dtype=kv_dtype, **shape))
    run = Run(q, k, v, [3, 0, 4], state, window=window, layer=0, plain=plain, device=device)
    if plain:
        run.inv_freq[-1] = 0  # the rotation would fill the neuron's channel again
    for counts in MIXTURE:
        run.step(counts)
    rule = {"decision_bias": 1e9 if plain else BIAS, "epsilon": EPSILON, "window": window}
    cache = OracleCache(3, 2, run.inv_freq.cpu(), stored=rounding(kv_dtype), **rule)
    want = torch.stack([cache.step(q[:, t], k[:, t], v[:, t]) for t in range(70)], dim=1)
    for i, row in enumerate(run.rows):
        for head in range(2):
            held = cache.heads[i][head]
            for got, slots in zip(slots_of(state, row, head), (held.keys, held.values)):
                nearly(got, torch.stack(slots), most=0.07)  # one code of fp8 is a sixteenth
    nearly(run.out, want)
    free(state, ints(run.rows, device))
    state.check_integrity()
    assert state.free_count() == 64


@on_backends
@on_dtypes
def test_eviction_equals_the_oracle(
    backend: str, device: str, kv_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Codes move with their scales from recent to kept pages."""
    import evicting

    monkeypatch.setattr(evicting, "close", lambda got, want, bound: nearly(got, want))
    sequences = [sequence(70, 2, 2, 32, seed=i) for i in range(3)]
    shape = {"num_layers": 1, "num_kv_heads": 2, "head_dim": 32, "max_slots": 80, "device": device}
    state = poison(make_state(num_pages=64, max_seqs=5, evict_window=20, kv_dtype=kv_dtype, **shape))
    run = EvictingRun(sequences, [3, 0, 4], state, about_self=False, neuron=NEURON_ALL, layer=0, device=device)
    for i, slow in enumerate(run.slow):
        run.slow[i] = EvictingOracleCache(1, 2, run.inv_freq, window=slow.window, stored=rounding(kv_dtype))
    for counts in MIXTURE:
        run.step(counts)
    for row, slow in zip(run.rows, run.slow):
        for head, held in enumerate(slow.held[0]):
            kept = [token for token in held if slow.position - 1 - token.position > slow.window]
            for got, name in zip(slots_of(state, row, head), ("key", "value")):
                nearly(got, torch.stack([getattr(token, name) for token in kept]), most=0.07)
    free(state, ints(run.rows, device))
    state.check_integrity()


SHAPES = {
    "cpp": [(1, 8), (3, 64), (8, 120)],
    "reference": [(2, 24)],
    "emulated": [(1, 64), (9, 80), (4, 96), (3, 128), (2, 256), (2, 24)],
}


@on_dtypes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("backend", "device", "g", "d"),
    [
        pytest.param(*b.values, g, d, id=f"{b.id}-{g}-{d}", marks=b.marks)
        for b in BACKENDS
        for g, d in SHAPES.get(b.values[0], SHAPES["emulated"])
    ],
)
def test_attention_over_what_codes_stand_for(
    backend: str, device: str, kv_dtype: torch.dtype, dtype, g: int, d: int
) -> None:
    """Around page edges and over a split of heads, with queries that do not fill a vector of the CPU."""
    lengths = [1, 15, 16, 33, 64, 65, 1030]
    state = poison(
        make_state(
            num_pages=100,
            max_seqs=len(lengths),
            num_layers=1,
            num_kv_heads=1,
            head_dim=d,
            max_slots=1030,
            compress=False,
            dtype=dtype,
            kv_dtype=kv_dtype,
            device=device,
        )
    )
    total, rows = sum(lengths), ints(range(len(lengths)), device)
    generator = torch.Generator().manual_seed(d)
    q, k, v = (torch.randn(total, heads, d, generator=generator).to(device, dtype) for heads in (g, 1, 1))
    starts, positions = [0, *torch.tensor(lengths).cumsum(0)], [t for n in lengths for t in range(n)]
    where = ints(starts, device), rows, ints(positions, device), rotary_frequencies(d, 1e4, device=device)
    append(state, 0, AppendParams(q, k, v, *where, 0.0, 0.0, None, False, False))
    query = torch.randn(len(lengths), g, d, generator=generator).to(dtype)
    for sharpness in (1, 8):  # weights that are alike, and weights of which a few count
        query = query * sharpness
        out = decode_attention(state, 0, query.to(device), rows, d**-0.5).cpu()
        for row in range(len(lengths)):
            want = attend(query[row].double(), *(x.double() for x in slots_of(state, row, 0)))
            # On a GPU weights times scales are bf16 whatever the dtype: a scale may be of any size.
            of_half = 2e-3 if backend in ("cpp", "reference") else 1e-2
            bound = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: of_half}[dtype]
            assert float((out[row] - want).abs().max()) <= bound * float(want.abs().max())


def in_chunks(state: CacheState, g: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    """What the tokens of a prompt in two chunks and a decoded one see, of two sequences: [2 * 131, Hq, D]."""
    heads, d = state.lengths.size(2), state.head_dim
    q, k, v = (x.to(device) for x in tokens((2, 131), g, heads, d, SHIFTS["some"], dtype))
    logits = torch.rand(2, 131, heads, generator=torch.Generator().manual_seed(0)).to(device) - 0.4
    inv_freq, rows, outs = rotary_frequencies(d, 1e4, device=device), ints([1, 0], device), []
    for begin, end in ((0, 90), (90, 130), (130, 131)):
        of_chunk = [x[:, begin:end].flatten(0, 1) for x in (q, k, v)]
        cu, positions = ints([0, end - begin, 2 * (end - begin)], device), ints([*range(begin, end)] * 2, device)
        where, partial = (cu, rows, positions, inv_freq), end - begin > 1
        if state.evicts:
            decisions = logits[:, begin:end].flatten(0, 1).contiguous()
            done = append_evicting(state, 0, EvictParams(*of_chunk, decisions, *where, False, NEURON_ALL, partial))
        else:
            done = append(state, 0, AppendParams(*of_chunk, *where, BIAS, EPSILON, 12, True, partial))
        if partial:
            outs.append(prefill_attention(state, 0, done, cu, rows, d**-0.5))
        else:
            outs.append(decode_attention(state, 0, done.q_rot, rows, d**-0.5))
        state.check_integrity()
    return torch.cat(outs)


def for_chunks(kv_dtype: torch.dtype, d: int, dtype: torch.dtype, evict_window: int | None, device: str) -> CacheState:
    shape = {"num_pages": 64, "max_seqs": 2, "num_layers": 1, "num_kv_heads": 2, "head_dim": d, "max_slots": 140}
    return poison(make_state(dtype=dtype, kv_dtype=kv_dtype, evict_window=evict_window, device=device, **shape))


@on_compiled_backends
@on_dtypes
@pytest.mark.parametrize("evict_window", [None, 40], ids=["merging", "evicting"])
@pytest.mark.parametrize(
    ("d", "g", "dtype"),
    [
        pytest.param(d, g, getattr(torch, name), id=f"{d}-{g}-{name}")
        for d, g, name in (
            (64, 2, "bfloat16"),
            (80, 1, "float16"),
            (96, 3, "bfloat16"),
            (128, 2, "bfloat16"),
            (256, 1, "float16"),
            (136, 1, "bfloat16"),
            (64, 1, "float32"),
        )
    ],
)
def test_prompts_in_chunks(backend, device, kv_dtype, evict_window, d, g, dtype) -> None:
    """What is stored and what is attended to is the reference's, which attends in fp32 whatever the dtype."""
    state, slow = (for_chunks(kv_dtype, d, dtype, evict_window, device) for _ in range(2))
    out = in_chunks(state, g, dtype, device)
    with backend_named("reference"):
        want = in_chunks(slow, g, dtype, device)
    for row in range(2):
        for head in range(2):
            for got, slots in zip(slots_of(state, row, head), slots_of(slow, row, head), strict=True):
                nearly(got, slots, most=0.07)
    nearly(out, want.cpu(), 1e-4 if dtype == torch.float32 else 8e-3)


@on_dtypes
@pytest.mark.parametrize("evict_window", [None, 40], ids=["merging", "evicting"])
def test_no_order_of_threads_changes_a_bit(monkeypatch, kv_dtype, evict_window) -> None:
    results = []
    for seed in range(3):
        monkeypatch.setenv("DMC_EMULATOR_SEED", str(seed))
        state = for_chunks(kv_dtype, 128, torch.bfloat16, evict_window, "cpu")
        with backend_named("emulated"):
            out = in_chunks(state, 2, torch.bfloat16, "cpu")
        results.append([x.float().nan_to_num(7.0) for x in (out, *state.tensors())])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@on_backends
@on_dtypes
def test_a_copy_is_written_on_its_own(backend: str, device: str, kv_dtype: torch.dtype) -> None:
    q, k, v = tokens((2, 60), 1, 1, 16, SHIFTS["some"])
    shape = {"num_layers": 1, "num_kv_heads": 1, "head_dim": 16, "max_slots": 60, "device": device}
    state = poison(make_state(num_pages=32, max_seqs=2, kv_dtype=kv_dtype, **shape))
    run = Run(
        torch.cat((q[:1], q[:1])),
        torch.cat((k[:1], k[:1])),
        v[:1].repeat(2, 1, 1, 1),
        [0, 1],
        state,
        window=12,
        layer=0,
        device=device,
    )
    run.step([45, 0])
    fork(state, ints([0], device), ints([1], device))
    for got, want in zip(slots_of(state, 1, 0), slots_of(state, 0, 0)):
        assert torch.equal(got, want) and want.isfinite().all()
    run.position[1] = 45
    run.q, run.k, run.v = run.q.clone(), run.k.clone(), run.v.clone()
    run.q[1, 45:], run.k[1, 45:], run.v[1, 45:] = (x[1, 45:].to(device) for x in (q, k, v))
    before = slots_of(state, 0, 0)
    run.step([0, 15])
    for got, want in zip(slots_of(state, 0, 0), before):
        assert torch.equal(got, want)
    assert state.lengths[1, 0, 0] > state.lengths[0, 0, 0]


@on_backends
@on_dtypes
def test_extreme_numbers(backend: str, device: str, kv_dtype: torch.dtype) -> None:
    """Zeros and fp32's denormal numbers are 0, the largest numbers keep their size, and NaN stays NaN."""
    sizes = [0.0, 1e-42, 1e-30, 1.0, 1e30, float("nan"), float("inf")]
    n = len(sizes)
    state = make_state(
        num_pages=n,
        max_seqs=n,
        num_layers=1,
        num_kv_heads=1,
        head_dim=16,
        max_slots=16,
        compress=False,
        kv_dtype=kv_dtype,
        device=device,
    )
    x = torch.randn(16, generator=torch.Generator().manual_seed(0)).repeat(n, 1, 1)
    k = x * torch.tensor(sizes)[:, None, None]
    where = *(ints(i, device) for i in (range(n + 1), range(n), [0] * n)), rotary_frequencies(16, 1e4, device=device)
    append(state, 0, AppendParams(*(y.to(device) for y in (x, k, k)), *where, 0.0, 0.0, None, False, False))
    got = torch.stack([slots_of(state, row, 0)[1][0] for row in range(n)])
    assert not got[:2].any() and got[5].isnan().any() and not got[6].isfinite().all()
    for row in (2, 3, 4):
        assert float((got[row] - k[row]).abs().max()) <= 0.04 * float(k[row].abs().max())


def test_refused_by_name() -> None:
    shape = {"num_pages": 4, "max_seqs": 1, "num_layers": 1, "num_kv_heads": 1, "head_dim": 16, "max_slots": 16}
    with pytest.raises(ValueError, match="pages of torch.int16 are not possible"):
        make_state(kv_dtype=torch.int16, **shape)
