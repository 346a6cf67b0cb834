"""A cache of 8 bits: against the oracles' caches that round in Python, against dense attention over what the codes
stand for, and through copies of rows.
"""

from __future__ import annotations

import pytest
import torch
from evicting import Run as EvictingRun
from evicting import sequence
from helpers import emulated
from helpers.quantized import KV_DTYPES, nearly, poison, rounding, values
from test_kernels import BIAS, EPSILON, MIXTURE, SHIFTS, Run, attend, ints, tokens

from megatron.dmc.kernels import AppendParams, append, decode_attention, fork, free, make_state, use_backend
from megatron.dmc.kernels.params import NEURON_ALL
from megatron.dmc.kernels.state import CacheState
from megatron.dmc.ops import EvictingOracleCache, OracleCache, rotary_frequencies

on_backends = pytest.mark.parametrize("backend", ["cpp", "reference"])
on_dtypes = pytest.mark.parametrize("kv_dtype", KV_DTYPES.values(), ids=KV_DTYPES)


@pytest.fixture(autouse=True)
def _backend(request):
    with use_backend(request.getfixturevalue("backend") if "backend" in request.fixturenames else "reference"):
        yield


def slots_of(state: CacheState, row: int, head: int, layer: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    n = torch.arange(int(state.lengths[row, layer, head]))
    return values(state, state.page_table[row, layer, head, n // state.page_size].long(), n % state.page_size)


@on_backends
@on_dtypes
@pytest.mark.parametrize(("window", "plain"), [(12, False), (None, False), (None, True)], ids=["12", "all", "plain"])
def test_mixed_steps_equal_the_oracle(backend: str, kv_dtype: torch.dtype, window, plain: bool) -> None:
    """A slot that is written again is rounded from its tokens each time, so errors do not add up."""
    q, k, v = tokens((3, 70), 2, 2, 32, SHIFTS["none" if plain else "most"])
    if plain:
        q[..., -1], k[..., -1] = 0, 0  # of the neuron, which the oracle takes out of attention
    shape = {"num_layers": 1, "num_kv_heads": 2, "head_dim": 32, "max_slots": 80}
    state = poison(make_state(num_pages=64, max_seqs=5, window=window, compress=not plain, kv_dtype=kv_dtype, **shape))
    run = Run(q, k, v, [3, 0, 4], state, window=window, layer=0, plain=plain)
    if plain:
        run.inv_freq[-1] = 0  # the rotation would fill the neuron's channel again
    for counts in MIXTURE:
        run.step(counts)
    rule = {"decision_bias": 1e9 if plain else BIAS, "epsilon": EPSILON, "window": window}
    cache = OracleCache(3, 2, run.inv_freq, stored=rounding(kv_dtype), **rule)
    want = torch.stack([cache.step(q[:, t], k[:, t], v[:, t]) for t in range(70)], dim=1)
    for i, row in enumerate(run.rows):
        for head in range(2):
            held = cache.heads[i][head]
            for got, slots in zip(slots_of(state, row, head), (held.keys, held.values)):
                nearly(got, torch.stack(slots), most=0.07)  # one code of fp8 is a sixteenth
    nearly(run.out, want)
    free(state, ints(run.rows))
    state.check_integrity()
    assert state.free_count() == 64


@on_backends
@on_dtypes
def test_eviction_equals_the_oracle(backend: str, kv_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Codes move with their scales from recent to kept pages."""
    import evicting

    monkeypatch.setattr(evicting, "close", lambda got, want, bound: nearly(got, want))
    sequences = [sequence(70, 2, 2, 32, seed=i) for i in range(3)]
    shape = {"num_layers": 1, "num_kv_heads": 2, "head_dim": 32, "max_slots": 80}
    state = poison(make_state(num_pages=64, max_seqs=5, evict_window=20, kv_dtype=kv_dtype, **shape))
    run = EvictingRun(sequences, [3, 0, 4], state, about_self=False, neuron=NEURON_ALL, layer=0)
    for i, slow in enumerate(run.slow):
        run.slow[i] = EvictingOracleCache(1, 2, run.inv_freq, window=slow.window, stored=rounding(kv_dtype))
    for counts in MIXTURE:
        run.step(counts)
    for row, slow in zip(run.rows, run.slow):
        for head, held in enumerate(slow.held[0]):
            kept = [token for token in held if slow.position - 1 - token.position > slow.window]
            for got, name in zip(slots_of(state, row, head), ("key", "value")):
                nearly(got, torch.stack([getattr(token, name) for token in kept]), most=0.07)
    free(state, ints(run.rows))
    state.check_integrity()


@on_dtypes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("backend", "g", "d"), [("cpp", 1, 8), ("cpp", 3, 64), ("cpp", 8, 120), ("reference", 2, 24)])
def test_attention_over_what_codes_stand_for(backend: str, kv_dtype: torch.dtype, dtype, g: int, d: int) -> None:
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
        )
    )
    total, rows = sum(lengths), ints(range(len(lengths)))
    generator = torch.Generator().manual_seed(d)
    q, k, v = (torch.randn(total, heads, d, generator=generator).to(dtype) for heads in (g, 1, 1))
    where = ints([0, *torch.tensor(lengths).cumsum(0)]), rows, ints([t for n in lengths for t in range(n)])
    append(state, 0, AppendParams(q, k, v, *where, rotary_frequencies(d, 1e4), 0.0, 0.0, None, False, False))
    query = torch.randn(len(lengths), g, d, generator=generator).to(dtype)
    out = decode_attention(state, 0, query, rows, d**-0.5)
    for row in range(len(lengths)):
        want = attend(query[row].double(), *(x.double() for x in slots_of(state, row, 0)))
        bound = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
        assert float((out[row] - want).abs().max()) <= bound * float(want.abs().max())


@on_backends
@on_dtypes
def test_a_copy_is_written_on_its_own(backend: str, kv_dtype: torch.dtype) -> None:
    q, k, v = tokens((2, 60), 1, 1, 16, SHIFTS["some"])
    state = poison(
        make_state(num_pages=32, max_seqs=2, num_layers=1, num_kv_heads=1, head_dim=16, max_slots=60, kv_dtype=kv_dtype)
    )
    run = Run(
        torch.cat((q[:1], q[:1])),
        torch.cat((k[:1], k[:1])),
        v[:1].repeat(2, 1, 1, 1),
        [0, 1],
        state,
        window=12,
        layer=0,
    )
    run.step([45, 0])
    fork(state, ints([0]), ints([1]))
    for got, want in zip(slots_of(state, 1, 0), slots_of(state, 0, 0)):
        assert torch.equal(got, want) and want.isfinite().all()
    run.position[1] = 45
    run.q, run.k, run.v = run.q.clone(), run.k.clone(), run.v.clone()
    run.q[1, 45:], run.k[1, 45:], run.v[1, 45:] = q[1, 45:], k[1, 45:], v[1, 45:]
    before = slots_of(state, 0, 0)
    run.step([0, 15])
    for got, want in zip(slots_of(state, 0, 0), before):
        assert torch.equal(got, want)
    assert state.lengths[1, 0, 0] > state.lengths[0, 0, 0]


@on_backends
@on_dtypes
def test_extreme_numbers(backend: str, kv_dtype: torch.dtype) -> None:
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
    )
    x = torch.randn(16, generator=torch.Generator().manual_seed(0)).repeat(n, 1, 1)
    k = x * torch.tensor(sizes)[:, None, None]
    where = ints(range(n + 1)), ints(range(n)), ints([0] * n)
    append(state, 0, AppendParams(x, k, k, *where, rotary_frequencies(16, 1e4), 0.0, 0.0, None, False, False))
    got = torch.stack([slots_of(state, row, 0)[1][0] for row in range(n)])
    assert not got[:2].any() and got[5].isnan().any() and not got[6].isfinite().all()
    for row in (2, 3, 4):
        assert float((got[row] - k[row]).abs().max()) <= 0.04 * float(k[row].abs().max())


def test_refused_by_name() -> None:
    shape = {"num_pages": 4, "max_seqs": 1, "num_layers": 1, "num_kv_heads": 1, "head_dim": 16, "max_slots": 16}
    with pytest.raises(ValueError, match="pages of torch.int16 are not possible"):
        make_state(kv_dtype=torch.int16, **shape)
    with use_backend(emulated.kernels()), pytest.raises(ValueError, match="take no pages of 8 bits"):
        free(make_state(kv_dtype=torch.int8, **shape), ints([0]))
