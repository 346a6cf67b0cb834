"""CUDA kernels of models that evict, beyond tests/kernels/test_evicting.py: refusals without a wait, pages that many
heads give back at once, and attention of several blocks. The kernels' own code runs on a CPU here, by
tests/cuda_emulator, and on a GPU where there is one.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence as Some

import pytest
import torch
from evicting import Run, Sequence, held_tokens, sequence
from test_cuda import on_cuda_kernels, same
from test_evicting import poisoned
from test_kernels import backend_named, ints
from torch import Tensor

from megatron.dmc.kernels import (
    Appended,
    CacheState,
    EvictParams,
    append_evicting,
    decode_attention,
    fork,
    free,
    prefill_attention,
    use_backend,
)
from megatron.dmc.kernels.params import NEURON_ALL, NEURON_NONE, NEURON_QUERY
from megatron.dmc.kernels.state import REFUSED
from megatron.dmc.ops import rotary_frequencies

PAGES = ("page_table", "recent_table", "lengths", "segment", "marks", "free_pages", "refcounts", "counters")
# Of results against the reference, which rounds weights and sums in other places: [dtype].
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


@pytest.fixture(autouse=True)
def _backend(request):
    name = request.node.callspec.params.get("backend") if hasattr(request.node, "callspec") else None
    with backend_named(name or "reference"):
        yield


def step_params(
    tokens: Some[Sequence],
    starts: Some[int],
    rows: Some[int],
    device: str,
    *,
    about_self: bool = False,
    neuron=NEURON_NONE,
) -> EvictParams:
    """A step of the given tokens, behind ``starts`` earlier ones of each sequence."""
    counts = [len(x) for x in tokens]
    positions = [p for start, n in zip(starts, counts) for p in range(start, start + n)]
    q, k, v, logits = (torch.cat([getattr(x, name) for x in tokens]).to(device) for name in ("q", "k", "v", "logits"))
    cu = ints([0, *torch.tensor(counts).cumsum(0).tolist()], device)
    inv_freq = rotary_frequencies(q.size(-1), 1e4, device=device)
    return EvictParams(q, k, v, logits, cu, ints(rows, device), ints(positions, device), inv_freq, about_self, neuron)


def by_reference(state: CacheState, params: EvictParams, layer: int = 1) -> tuple[Appended, Tensor]:
    """Append and prefill attention in PyTorch."""
    with use_backend("reference"):
        done = append_evicting(state, layer, params)
        return done, prefill_attention(state, layer, done, params.cu_seqlens, params.rows, params.q.size(-1) ** -0.5)


def check_pages(state: CacheState, want: CacheState) -> None:
    state.check_integrity()
    for name in PAGES:
        assert torch.equal(getattr(state, name), getattr(want, name)), name


def close(got: Tensor, want: Tensor, bound: float | None = None) -> None:
    error = float((got.float() - want.float()).abs().max() / want.float().abs().max())
    assert error <= (bound or BOUNDS[got.dtype]), f"{error:.1e}"


# --------------------------------------------------------------------------------------------------------- refusals


@on_cuda_kernels
@pytest.mark.parametrize("decode", [True, False])
def test_heads_without_a_page_are_left_as_they_were(backend, device, decode) -> None:
    """The fourth of six heads finds the pool empty: it and those behind it keep everything, the others go on, and a
    flag stays. Tokens of refused heads see themselves only.
    """
    state = poisoned(20, device, num_pages=9)
    tokens = [sequence(40, 1, 2, 16, seed=i) for i in range(3)]
    run = Run(tokens, [2, 0, 1], state, about_self=False, neuron=NEURON_NONE, device=device)
    run.step([16, 16, 16])
    before, added = copy.deepcopy(state), 1 if decode else 2
    params = step_params([x[16 : 16 + added] for x in tokens], [16] * 3, [2, 0, 1], device)._replace(partial=not decode)
    done = append_evicting(state, 1, params)
    assert state.counters.tolist() == [9, 0, 3, 0]
    assert state.segment[[2, 0, 1], 1].tolist() == [[16 + added] * 2, [16 + added, 16], [16, 16]]
    for row, head in ((0, 1), (1, 0), (1, 1)):
        for name in ("recent_table", "page_table", "marks", "lengths"):
            assert same((getattr(state, name)[row, 1, head],), (getattr(before, name)[row, 1, head],)), name
        assert same(held_tokens(state, row, 1, head), held_tokens(before, row, 1, head))
    if decode:
        assert torch.isfinite(decode_attention(state, 1, done.q_rot, params.rows, 0.25)).all()
    else:
        assert done.slot_index.tolist() == [[0, 0], [0, 0], [0, -1], [0, -1], [-1, -1], [-1, -1]]
        out = prefill_attention(state, 1, done, params.cu_seqlens, params.rows, 0.25)
        assert torch.isfinite(out).all()
        for t, head in ((2, 1), (3, 1), (4, 0), (5, 1)):
            assert torch.allclose(out[t, head], params.v[t, head], atol=1e-6)
    with use_backend("reference"):
        free(state, ints([2], device))
    append_evicting(state, 1, step_params([tokens[2][16:17]], [16], [1], device))
    assert state.counters[REFUSED] == 3 and state.segment[1, 1].tolist() == [17, 17]


@on_cuda_kernels
def test_a_head_beyond_its_row_of_the_table_is_refused(backend, device) -> None:
    """It takes no page that another head could have."""
    state = poisoned(1, device, num_pages=7, num_kv_heads=1, max_slots=32)
    tokens = [sequence(60, 1, 1, 16, marked=0.0, seed=i) for i in range(2)]
    run = Run(tokens, [0, 1], state, about_self=True, neuron=NEURON_ALL, device=device)
    run.step([30, 1])
    taken = state.num_pages - state.free_count()
    append_evicting(state, 1, step_params([tokens[0][30:50], tokens[1][1:18]], [30, 1], [0, 1], device))
    state.check_integrity()
    assert state.lengths[:2, 1].tolist() == [[28], [16]] and state.counters[REFUSED] == 1
    assert state.num_pages - state.free_count() == taken + 2 - 1  # row 1: a kept page, a recent one, and one given back


@on_cuda_kernels
def test_unaligned_parts_are_refused(backend, device) -> None:
    state = poisoned(4, device, head_dim=8)
    params = step_params([sequence(9, 1, 2, 8)], [0], [0], device)
    done = append_evicting(state, 1, params)
    moved = torch.empty(done.k_part.numel() + 1, device=device)[1:].view_as(done.k_part)
    with pytest.raises(ValueError, match="aligned to 16 bytes"):
        prefill_attention(state, 1, done._replace(k_part=moved), params.cu_seqlens, params.rows, 1.0)


# ---------------------------------------------------------------------------------------- pages that are given back


@on_cuda_kernels
def test_more_heads_than_threads_give_pages_back(backend, device) -> None:
    """In one step each of 72 x 32 heads lets go of a page, the rows in pairs of the same one: several rounds of the
    scans, and the pages go back in the order of the last rows that held them.
    """
    rows, heads = 72, 32
    shape = {"max_seqs": rows, "num_layers": 1, "num_kv_heads": heads, "head_dim": 8, "max_slots": 32}
    state = poisoned(1, device, num_pages=4 * rows * heads, **shape)
    tokens, order = [sequence(18, 1, heads, 8, seed=i) for i in range(rows)], torch.randperm(rows).tolist()
    half = rows // 2
    with use_backend("reference"):
        append_evicting(state, 0, step_params([x[:16] for x in tokens[:half]], [0] * half, range(half), device))
        fork(state, ints(range(half), device), ints(range(half, rows), device))
        append_evicting(state, 0, step_params([x[16:17] for x in tokens], [16] * rows, range(rows), device))
    twin, given = copy.deepcopy(state), int(state.counters[1])
    params = step_params([tokens[row][17:] for row in order], [17] * rows, order, device)
    append_evicting(state, 0, params)
    by_reference(twin, params, layer=0)
    check_pages(state, twin)
    assert state.counters[1] - given == half * heads


@on_cuda_kernels
def test_forked_rows_in_lockstep_hand_out_pages_in_order(backend, device) -> None:
    """Ragged steps over rows that share pages, chunks longer than the window and padding among them."""
    state = poisoned(20, device, num_pages=160)
    twin, common = copy.deepcopy(state), sequence(37, 1, 2, 16)
    seen = {0: 0, 3: 0, 4: 0}
    for n, counts in enumerate(([37, 0, 0], [1, 1, 1], [15, 30, 1], [1, 1, 45], [1, 1, 1])):
        tokens = [common if n == 0 and i == 0 else sequence(c, 1, 2, 16, seed=10 * n + i) for i, c in enumerate(counts)]
        params = step_params(
            [*tokens[:2], sequence(2, 1, 2, 16), tokens[2]],
            [*list(seen.values())[:2], 0, seen[4]],
            [0, 3, -1, 4],
            device,
        )
        append_evicting(state, 1, params)
        by_reference(twin, params)
        check_pages(state, twin)
        seen = {row: s + c for (row, s), c in zip(seen.items(), counts)}
        if n == 0:
            for name, of in ((backend, state), ("reference", twin)):
                with backend_named(name):
                    fork(of, ints([0, 0], device), ints([3, 4], device))
            seen = dict.fromkeys(seen, 37)
            check_pages(state, twin)
    for name, of in ((backend, state), ("reference", twin)):
        with backend_named(name):
            free(of, ints([4, -1, 0], device))
    check_pages(state, twin)


# ------------------------------------------------------------------------------------------------------- attention


CASES = [  # window, page size, head dimension, group, dtype
    (100, 16, 64, 1, torch.bfloat16),
    (15, 16, 80, 4, torch.float16),
    (17, 64, 96, 8, torch.bfloat16),
    (100, 32, 128, 3, torch.bfloat16),
    (16, 16, 256, 2, torch.float16),
    (1, 16, 40, 2, torch.bfloat16),
    (130, 32, 48, 4, torch.float32),
    (40, 16, 64, 12, torch.bfloat16),
]


@on_cuda_kernels
@pytest.mark.parametrize(("window", "page_size", "d", "g", "dtype"), CASES)
def test_decode_of_long_heads(backend, device, window, page_size, d, g, dtype) -> None:
    """Kept slots and recent tokens in several chunks of a head, with ends anywhere in a page, beside short heads."""
    shape = {"num_pages": 200, "head_dim": d, "page_size": page_size, "max_slots": 600, "dtype": dtype}
    state, counts = poisoned(window, device, **shape), [700, window + 3, 5]
    tokens = [sequence(n, g, 2, d, marked, i, dtype) for i, (n, marked) in enumerate(zip(counts, (0.5, 0.9, 0.9)))]
    done, _ = by_reference(state, step_params(tokens, [0] * 3, [4, 0, 2], device))
    q, rows = done.q_rot[[699, -1, -6]], ints([4, 2, 0], device)
    padded = torch.cat((q, q[:1])), torch.cat((rows, ints([-1], device)))
    out = decode_attention(state, 1, *padded, d**-0.5)
    with use_backend("reference"):
        want = decode_attention(state, 1, q, rows, d**-0.5)
    close(out[:3], want)
    assert not out[3].any()


@on_cuda_kernels
@pytest.mark.parametrize(("window", "page_size", "d", "g", "dtype"), [CASES[i] for i in (0, 3, 4, 6)])
def test_prefill_of_several_blocks_of_rows(backend, device, window, page_size, d, g, dtype) -> None:
    """Chunks longer and shorter than the window behind kept slots and a window, lone tokens and padding."""
    shape = {"num_pages": 200, "head_dim": d, "page_size": page_size, "max_slots": 600, "dtype": dtype}
    state, starts, counts = poisoned(window, device, **shape), [300, 40, 0, 0], [130 // g + 3, 1, 2, 7]
    with use_backend("reference"):
        earlier = [sequence(n, g, 2, d, 0.5, i, dtype) for i, n in enumerate(starts[:2])]
        append_evicting(state, 1, step_params(earlier, [0, 0], [2, 0], device))
    twin = copy.deepcopy(state)
    tokens = [sequence(n, g, 2, d, 0.5, 5 + i, dtype) for i, n in enumerate(counts)]
    params = step_params(tokens, starts, [2, 0, -1, 4], device, neuron=NEURON_QUERY)
    done = append_evicting(state, 1, params)
    want, wanted_out = by_reference(twin, params)
    check_pages(state, twin)
    assert torch.equal(done.slot_index, want.slot_index)
    close(done.k_part, want.k_part), close(done.q_rot, want.q_rot)
    assert torch.equal(done.recent_before[[0, 1, 3]], want.recent_before[[0, 1, 3]])
    out = prefill_attention(state, 1, done, params.cu_seqlens, params.rows, d**-0.5)
    close(out, wanted_out)
    assert not out[sum(counts[:2]) : sum(counts[:3])].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_order_of_threads_changes_a_bit(monkeypatch, dtype) -> None:
    """Warps and lanes in another order between barriers, as races would need."""
    tokens, results = [sequence(n, 2, 2, 64, seed=n, dtype=dtype) for n in (50, 34)], []
    for seed in range(3):
        monkeypatch.setenv("DMC_EMULATOR_SEED", str(seed))
        with backend_named("emulated"):
            state = poisoned(20, head_dim=64, dtype=dtype)
            run = Run(tokens, [1, 3], state, about_self=False, neuron=NEURON_ALL, bound=1e-1)
            for counts in ([16, 0], [33, 33]):
                run.step(counts)
            params = step_params([x[-1:] for x in tokens], [49, 33], [1, 3], "cpu")
            outs = decode_attention(state, 1, params.q, params.rows, 0.125), *append_evicting(state, 1, params)
            results.append((*outs, *state.tensors()))
    assert all(same(results[0], other) for other in results[1:])


# --------------------------------------------------------------------------------------------------------- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cuda_graph_replays_a_step(dtype) -> None:
    """One capture, many steps: tokens and positions change in place, pages are taken and given back on the device."""
    steps, shape = 200, {"num_pages": 400, "num_layers": 2, "num_kv_heads": 4, "head_dim": 64, "max_slots": 200}
    tokens = [sequence(steps, 2, 4, 64, seed=i, dtype=dtype) for i in range(4)]
    states = [poisoned(40, "cuda", dtype=dtype, **shape) for _ in range(2)]
    rows = [2, 0, 3, -1]
    now = step_params([x[:1] for x in tokens], [0] * 4, rows, "cuda", neuron=NEURON_QUERY)._replace(partial=False)

    def step(state: CacheState) -> Tensor:
        return decode_attention(state, 1, append_evicting(state, 1, now).q_rot, now.rows, 0.125)

    with use_backend("cuda"):
        scratch, side = copy.deepcopy(states[0]), torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            step(scratch)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step(states[0])
        for t in range(steps):
            new = step_params([x[t : t + 1] for x in tokens], [t] * 4, rows, "cuda")
            for x, y in zip(now[:7], new[:7]):
                x.copy_(y)
            graph.replay()
            assert torch.equal(captured, step(states[1])), t
    for state in states:
        state.check_integrity()
    assert same(states[0].tensors(), states[1].tensors())
