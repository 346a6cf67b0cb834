"""Copies of rows: what is final is shared, what may still be written is copied, and any history of them is sound."""

from __future__ import annotations

import copy
import math
from typing import Optional

import pytest
import torch
from helpers.examples import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from test_kernels import (
    BIAS,
    EPSILON,
    SHIFTS,
    Run,
    _backend,  # noqa: F401, the fixture
    close,
    ints,
    on_backends,
    on_checking_backends,
    oracle,
    poisoned,
    slots_of,
    tokens,
)

from megatron.dmc.kernels import AppendParams, append, decode_attention, fork, free, use_backend
from megatron.dmc.ops import rotary_frequencies

ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.integers(0, 3), st.integers(0, 1), st.sampled_from([1, 2, 15, 16, 33])),
        st.tuples(st.just("fork"), st.integers(0, 3), st.integers(1, 3), st.booleans()),
        st.tuples(st.just("free"), st.lists(st.integers(-1, 3), min_size=1, max_size=4)),
    ),
    min_size=4,
    max_size=20,
)


@settings(max_examples=examples(100), deadline=None)
@given(actions=ACTIONS, window=st.sampled_from([12, None, "plain"]), num_pages=st.sampled_from([12, 24, 80]))
def test_any_history_of_copies(actions: list, window: Optional[int | str], num_pages: int) -> None:
    """Rows are filled, copied and freed at random: they hold what the oracle makes of their own tokens, both backends
    hand out the same pages, and what is refused changes nothing. Free pages and unused slots are NaN all the time.
    """
    plain, window = window == "plain", None if window == "plain" else window
    bank = tokens((800,), 2, 2, 16, -20.0 if plain else SHIFTS["some"])
    inv_freq = rotary_frequencies(16, 1e4)
    options = {
        "max_seqs": 4,
        "num_layers": 2,
        "num_kv_heads": 2,
        "head_dim": 16,
        "max_slots": 700,
        "compress": not plain,
    }
    states = {name: poisoned(num_pages=num_pages, window=window, **options) for name in ("reference", "cpp")}
    read: dict[tuple[int, int], list[int]] = {(row, layer): [] for row in range(4) for layer in range(2)}

    def run(op, *args) -> bool:
        """Run on both backends, which must agree and refuse before they write; False if refused."""
        done, before = [], {name: copy.deepcopy(state) for name, state in states.items()}
        for name, state in states.items():
            with use_backend(name):
                try:
                    op(state, *args)
                    done.append(True)
                except RuntimeError:
                    done.append(False)
                    for x, y in zip(state.tensors(), before[name].tensors(), strict=True):
                        assert torch.equal(x.nan_to_num(7.0), y.nan_to_num(7.0))
            state.check_integrity()
            for x in (state.k_pages, state.v_pages):
                x[state.refcounts == 0] = math.nan
        for name in ("page_table", "lengths", "segment", "free_pages", "refcounts", "counters"):
            assert torch.equal(*(getattr(state, name) for state in states.values())), name
        assert done[0] == done[1]
        return done[0]

    for at, (kind, *what) in enumerate(actions):
        if kind == "append":
            row, layer, count = what
            ids = range(40 * at, 40 * at + count)
            start = len(read[row, layer])
            args = (
                *(x[list(ids)] for x in bank),
                ints([0, count]),
                ints([row]),
                ints(range(start, start + count)),
                inv_freq,
            )
            params = AppendParams(*args, bias=BIAS, epsilon=EPSILON, window=window, compress=not plain)
            if run(append, layer, params):
                read[row, layer] += ids
        elif kind == "fork":
            which, copies, gap = what
            empty = [row for row in range(4) if not read[row, 0] and not read[row, 1]]
            sources = [row for row in range(4) if row not in empty] * 2 or [-1]
            pairs = [(sources[(which + i // 2) % len(sources)], target) for i, target in enumerate(empty[:copies])]
            pairs += [(-1, 0), (0, -1)] * gap
            if run(fork, *(ints([pair[i] for pair in pairs]) for i in (0, 1))):
                for source, target in pairs:
                    for layer in range(2) if source >= 0 and target >= 0 else ():
                        read[target, layer] = list(read[source, layer])
        else:
            rows = list(dict.fromkeys(what[0]))
            assert run(free, ints(rows))
            read |= {(row, layer): [] for row in rows if row >= 0 for layer in range(2)}
    for (row, layer), ids in read.items():
        if not ids:
            continue
        cache, _ = oracle(*(x[ids][None] for x in bank), 1 if plain else window)
        for name, state in states.items():
            for head, slots in enumerate(cache.heads[0]):
                assert int(state.lengths[row, layer, head]) == len(slots.keys)
                for got, want in zip(slots_of(state, row, layer, head), (slots.keys, slots.values)):
                    # The oracle takes the neuron out of the keys, which a plain model keeps.
                    channels = 7 if plain else 16
                    close(got[:, :channels], torch.stack(want)[:, :channels])
            with use_backend(name):
                out = decode_attention(state, layer, torch.ones(1, 4, 16), ints([row]), 0.25)
            assert torch.isfinite(out).all() and out.any()
    assert run(free, ints([3, 1, 0, 2]))
    assert states["cpp"].free_count() == num_pages


@on_backends
@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("n", [15, 16, 17, 32])
def test_a_copy_shares_what_is_final(backend, device, n, plain) -> None:
    """Full pages are shared, down to the bytes; the page that may be written is copied;
    both go on as the oracle does.
    """
    shape = {"num_layers": 2, "num_kv_heads": 2, "head_dim": 32, "max_slots": 80, "compress": not plain}
    state = poisoned(device, num_pages=24, max_seqs=4, **shape)
    q, k, v = tokens((3, 60), 2, 2, 32, -20.0)
    run = Run(q, k, v, [2, 0, 3], state, window=None if plain else 12, plain=plain, device=device)
    run.step([n, 0, 0])
    fork(state, ints([2, 2, -1, 1], device), ints([0, 3, 1, -1], device))
    state.check_integrity()
    shared = n // 16 if plain else (n - 1) // 16
    copied = -(-n // 16) - shared
    assert state.num_pages - state.free_count() == 2 * shared + 3 * 2 * copied
    pages = state.page_table[[2, 0, 3], 1, :, : shared + copied]
    assert (pages[0] == pages[1]).all(-1).all() == (copied == 0) and (
        pages[0, :, :shared] == pages[1:, :, :shared]
    ).all()
    assert state.refcounts[pages[0, :, :shared].long()].eq(3).all() and state.lengths[:, 0].eq(0).all()
    for head in range(2):
        for x, y in zip(slots_of(state, 2, 1, head), slots_of(state, 3, 1, head)):
            assert torch.equal(x, y)
    # The copies read other tokens than the first, which join the open slot of all; one of them more.
    run.k[:, n:, :, -1] += 20.0 + SHIFTS["some"]
    run.k[:, n, :, -1] = 20.0
    run.q[1:, :n], run.k[1:, :n], run.v[1:, :n] = run.q[0, :n], run.k[0, :n], run.v[0, :n]
    run.position = [n, n, n]
    run.step([1, 20, 3])
    run.step([8, 1, 1])
    assert torch.isfinite(run.out[:, n : n + 4]).all()
    if not plain:
        want = oracle(*(x.cpu() for x in (run.q, run.k, run.v)), 12)[1]
        for i, end in enumerate(run.position):
            close(run.out[i, n:end], want[i, n:end])
    free(state, ints([3, 2], device))
    state.check_integrity()
    assert state.refcounts.max() == 1
    free(state, ints([0], device))
    state.check_integrity()
    assert state.free_count() == 24 and not state.refcounts.any()


@on_checking_backends
def test_copies_that_do_not_fit_or_are_wrong(backend, device) -> None:
    state = poisoned(device, num_pages=10, max_seqs=4, num_layers=2, num_kv_heads=2, head_dim=32, max_slots=64)
    run = Run(*tokens((1, 40), 2, 2, 32, -20.0), [1], state, window=12, device=device)
    run.step([40])
    before = copy.deepcopy(state)

    def refused(error, match, source, target) -> None:
        with pytest.raises(error, match=match):
            fork(state, ints(source, device), ints(target, device))
        for x, y in zip(state.tensors(), before.tensors(), strict=True):
            assert torch.equal(x.nan_to_num(7.0), y.nan_to_num(7.0))

    refused(RuntimeError, "the copies need 6 pages and 4 are free", [1, 1, 1], [0, 2, 3])
    for target in ([0, 0], [0, 1]):
        refused(ValueError, "distinct empty rows that are no sources", [1, 1], target)
    refused(ValueError, "no sources", [1, 2], [2, 0])
    fork(state, ints([1, 1], device), ints([0, 3], device))
    state.check_integrity()
    assert state.free_count() == 0
