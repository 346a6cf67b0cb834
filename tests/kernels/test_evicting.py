"""Kernels of models that evict (DMS): against a cache of Python lists, and against each other."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Collection
from typing import Any

import pytest
import torch
from evicting import Run, held_tokens, sequence
from hypothesis import given, settings
from hypothesis import strategies as st
from test_kernels import HUGE, backend_named, ints

from megatron.dmc.kernels import CacheState, EvictParams, append_evicting, fork, free, make_state
from megatron.dmc.kernels.params import NEURON_ALL, NEURON_NONE, NEURON_QUERY
from megatron.dmc.ops import rotary_frequencies

EVICTING_BACKENDS = [
    pytest.param("cpp", "cpu", id="cpp"),
    pytest.param("reference", "cpu", id="reference"),
    pytest.param("emulated", "cpu", id="emulated"),
    pytest.param("reference", "cuda", id="reference-cuda", marks=pytest.mark.gpu),
    pytest.param("cuda", "cuda", id="cuda", marks=pytest.mark.gpu),
]


def on_evicting_backends(names: str, *cases: tuple, emulated: Collection[int]):
    """Parametrization by backend and ``cases``, values of ``names``. The emulator is slow: it runs those whose places
    are in ``emulated``.
    """
    backends = [(backend, range(len(cases)) if backend.id != "emulated" else emulated) for backend in EVICTING_BACKENDS]
    return pytest.mark.parametrize(
        f"backend, device, {names}",
        [
            pytest.param(
                *backend.values, *cases[n], id="-".join((backend.id, *map(_name, cases[n]))), marks=backend.marks
            )
            for backend, places in backends
            for n in places
        ],
    )


def _name(value: Any) -> str:
    return str(value).removeprefix("torch.")


# Those that look at values, and so can raise: the CUDA kernels wait for nothing.
CHECKING = [name for name in ("cpp", "reference") if name in {b.values[0] for b in EVICTING_BACKENDS}]
NEURONS = {"none": NEURON_NONE, "all": NEURON_ALL, "query": NEURON_QUERY}
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


@pytest.fixture(autouse=True)
def _backend(request):
    """Tests with the parameters ``backend`` and ``device`` run under that backend."""
    name = request.node.callspec.params.get("backend") if hasattr(request.node, "callspec") else None
    with backend_named(name or "reference"):
        yield


def poisoned(window: int, device: str = "cpu", **options) -> CacheState:
    """An empty cache with NaN where nothing may be read, absurd page ids, and the free pages in disorder."""
    shape = {"num_pages": 96, "max_seqs": 5, "num_layers": 2, "num_kv_heads": 2, "head_dim": 16, "max_slots": 80}
    state = make_state(device=device, evict_window=window, **{**shape, **options})
    for x in (state.k_pages, state.v_pages):
        x.fill_(math.nan)
    state.page_table.fill_(HUGE), state.recent_table.fill_(HUGE), state.marks.fill_(1)
    state.free_pages.copy_(torch.randperm(state.num_pages, generator=torch.Generator().manual_seed(1)))
    return state


# Steps of three sequences: chunks with decoding, lone tokens, chunks longer than the window, sequences that sit out.
MIXTURE = ([40, 1, 0], [1, 0, 5], [1, 16, 1], [17, 1, 1], [1, 1, 1], [10, 51, 62])


@on_evicting_backends("window, about_self", *itertools.product([1, 5, 16, 33], [False, True]), emulated=(2, 7))
def test_mixed_steps_equal_the_oracle(backend, device, window, about_self) -> None:
    """Outputs, what is kept and what is recent; all pages are back in the end."""
    state = poisoned(window, device)
    tokens = [sequence(70, 2, 2, 16, seed=i) for i in range(3)]
    run = Run(tokens, [3, 0, 4], state, about_self=about_self, neuron=NEURON_NONE, device=device)
    for counts in MIXTURE:
        run.step(counts)
        run.check_cache()
    free(state, ints([0, -1, 3], device))
    state.check_integrity()
    assert state.segment.sum() == state.segment[4].sum() > 0
    free(state, ints([4], device))
    state.check_integrity()
    assert state.free_count() == 96 and not state.lengths.any() and not state.segment.any()


@on_evicting_backends(
    "g, neuron, page_size, d, dtype",
    (1, "all", 16, 8, torch.float32),
    (2, "query", 32, 64, torch.bfloat16),
    (3, "query", 16, 32, torch.float32),
    (4, "none", 64, 16, torch.float16),
    (8, "all", 32, 128, torch.float32),
    emulated=range(5),
)
def test_shapes_and_neurons_equal_the_oracle(backend, device, g, neuron, page_size, d, dtype) -> None:
    state = poisoned(20, device, page_size=page_size, head_dim=d, dtype=dtype)
    tokens = [sequence(75, g, 2, d, seed=i, dtype=dtype) for i in range(2)]
    rule = {"about_self": False, "neuron": NEURONS[neuron], "bound": BOUNDS[dtype]}
    run = Run(tokens, [1, 2], state, device=device, **rule)
    for counts in ([33, 1], [1, 40], [1, 1], [30, 2]):
        run.step(counts)
    for _ in range(5):
        run.step([1, 1], decode=True)
    run.check_cache()


@on_evicting_backends("window", (1,), (15,), (16,), (17,), (64,), emulated=(3,))
def test_token_by_token_equals_the_oracle(backend, device, window) -> None:
    tokens = [sequence(90, 2, 2, 8, seed=i) for i in range(2)]
    state = poisoned(window, device, head_dim=8, max_slots=96)
    run = Run(tokens, [0, 3], state, about_self=False, neuron=NEURON_ALL, device=device)
    for _ in range(90):
        run.step([1, 1], decode=True)
    run.check_cache()


@on_evicting_backends("window", (128,), (512,), emulated=(0,))
def test_long_windows_equal_the_oracle(backend, device, window) -> None:
    """Chunks up to one that is longer than the window."""
    n = window + 60
    state = poisoned(window, device, num_kv_heads=1, head_dim=8, max_slots=n, num_pages=256)
    chunks = [10, 1, 90, 39, 1] if window == 128 else [window - 3, 1, 1, 1, 1, 50]
    run = Run([sequence(n + 10, 1, 1, 8)], [2], state, about_self=True, neuron=NEURON_NONE, device=device)
    for count in chunks:
        run.step([count])
    run.check_cache()
    whole = poisoned(window, device, num_kv_heads=1, head_dim=8, max_slots=n, num_pages=256)
    once = Run([sequence(n + 10, 1, 1, 8)], [2], whole, about_self=True, neuron=NEURON_NONE, device=device)
    once.step([sum(chunks)])
    once.check_cache()


@on_evicting_backends("marked", (0.0,), (1.0,), emulated=())
def test_nothing_and_everything_is_evicted(backend, device, marked) -> None:
    """Pages: a plain model's, up to the window and where nothing is marked; the window's where everything is."""
    window, n = 32, 100
    state = poisoned(window, device, max_slots=n)
    run = Run([sequence(n, 1, 2, 16, marked)], [0], state, about_self=False, neuron=NEURON_ALL, device=device)
    for total in range(1, n + 1):
        run.step([1])
        taken = (state.num_pages - state.free_count()) / 2
        kept = 0 if marked else max(0, total - window - 1)
        recent = (total - 1) // 16 - max(0, total - window - 1) // 16 + 1
        assert taken == -(-kept // 16) + recent
        if total <= window + 1:
            assert taken == -(-total // 16)
    run.check_cache()


@on_evicting_backends("length", (3,), (16,), (17,), (32,), (40,), (55,), emulated=(1, 4))
def test_a_copy_goes_on_by_itself(backend, device, length) -> None:
    """Forked mid-window: full pages are shared, the last of each kind is copied, and both go on as if alone."""
    window, common = 20, sequence(length, 2, 2, 16)
    rests = [sequence(40, 2, 2, 16, seed=seed) for seed in (1, 2, 3)]
    tokens = [
        type(common)(*(torch.cat(pair) for pair in zip(vars(common).values(), vars(rest).values()))) for rest in rests
    ]
    state = poisoned(window, device, num_pages=160)
    run = Run(tokens, [3, 0, 4], state, about_self=False, neuron=NEURON_ALL, device=device)
    for layer in (0, 1):
        run.layer = layer
        run.slow = [run.slow[0], *(copy.deepcopy(run.slow[0]) for _ in range(2))]
        for slow in run.slow:
            slow.position, slow.held = 0, [[[], []]]
        run.step([length, 0, 0])
    before, lengths = state.free_count(), state.lengths[3].clone()
    fork(state, ints([3, -1, 3], device), ints([0, 1, 4], device))
    state.check_integrity()
    copies = int((lengths % 16 > 0).sum()) + 4 * (length % 16 > 0)
    assert before - state.free_count() == 2 * copies
    run.slow[1:] = [copy.deepcopy(run.slow[0]) for _ in range(2)]
    run.check_cache()
    for counts in ([1, 1, 1], [0, 13, 1], [30, 1, 0], [1, 1, 37]):
        run.step(counts)
        run.check_cache()
    for row in (3, 4, 0):
        free(state, ints([row], device))
        state.check_integrity()
    assert state.free_count() == 160


@pytest.mark.parametrize("backend", CHECKING)
def test_what_does_not_fit_writes_nothing(backend) -> None:
    tokens = sequence(60, 1, 2, 16, marked=0.0)
    for options, what in (({"num_pages": 6}, "are free"), ({"max_slots": 16}, "row of the page table")):
        state = poisoned(16, **options)
        run = Run([tokens], [0], state, about_self=False, neuron=NEURON_NONE)
        run.step([20])
        before = copy.deepcopy(state)
        with pytest.raises(RuntimeError, match=what):
            run.step([40])
        for x, y in zip(state.tensors(), before.tensors(), strict=True):
            assert torch.equal(x.nan_to_num(7.0), y.nan_to_num(7.0))


@on_evicting_backends("about_self", (False,), (True,), emulated=(0, 1))
def test_a_step_of_padding_alone_changes_nothing(backend, device, about_self) -> None:
    state = poisoned(4, device)
    Run([sequence(9, 1, 2, 16)], [1], state, about_self=about_self, neuron=NEURON_NONE, device=device).step([9])
    before, x = copy.deepcopy(state), sequence(2, 1, 2, 16)
    places = (ints(at, device) for at in ([0, 0, 1, 2], [1, -1, -1], [0, 0]))
    tokens = [of.to(device) for of in (x.q, x.k, x.v, x.logits)]
    inv_freq = rotary_frequencies(16, 1e4, device=device)
    done = append_evicting(state, 1, EvictParams(*tokens, *places, inv_freq, about_self, NEURON_NONE))
    assert not done.q_rot.any() and not done.k_part.any()
    for one, other in zip(state.tensors(), before.tensors(), strict=True):
        assert torch.equal(one.nan_to_num(7.0), other.nan_to_num(7.0))


@pytest.mark.parametrize("evict_window", [0, 1025])
def test_impossible_windows_are_refused(evict_window) -> None:
    with pytest.raises(ValueError, match="eviction window"):
        poisoned(evict_window)


ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.integers(0, 3), st.integers(0, 1), st.sampled_from([1, 2, 15, 16, 33])),
        st.tuples(st.just("fork"), st.integers(0, 3), st.integers(1, 3), st.booleans()),
        st.tuples(st.just("free"), st.lists(st.integers(-1, 3), min_size=1, max_size=4)),
    ),
    min_size=4,
    max_size=20,
)


@settings(max_examples=40, deadline=None)
@given(
    actions=ACTIONS,
    window=st.sampled_from([1, 7, 16, 40]),
    about_self=st.booleans(),
    num_pages=st.sampled_from([12, 24, 80]),
)
def test_any_history_of_rows(actions: list, window: int, about_self: bool, num_pages: int) -> None:
    """Rows are filled, copied and freed at random: they hold what the rule keeps of their own tokens, all backends hand
    out the same pages, and what is refused changes nothing. Free pages are NaN all the time.
    """
    bank, inv_freq = sequence(800, 1, 2, 8), rotary_frequencies(8, 1e4)
    options = {"max_seqs": 4, "head_dim": 8, "max_slots": 700, "num_pages": num_pages}
    states = {name: poisoned(window, **options) for name in CHECKING}
    read: dict[tuple[int, int], list[int]] = {at: [] for at in itertools.product(range(4), range(2))}

    def run(op, *args) -> bool:
        """Run on all backends, which must agree and refuse before they write; False if refused."""
        done, before = [], {name: copy.deepcopy(state) for name, state in states.items()}
        for name, state in states.items():
            with backend_named(name):
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
        first, *others = states.values()
        for other in others:
            for name in ("page_table", "recent_table", "lengths", "segment", "free_pages", "refcounts", "counters"):
                assert torch.equal(getattr(first, name), getattr(other, name)), name
        assert len(set(done)) == 1
        return done[0]

    for at, (kind, *what) in enumerate(actions):
        if kind == "append":
            row, layer, count = what
            ids, start = range(40 * at, 40 * at + count), len(read[row, layer])
            x = bank[list(ids)]
            places = ints([0, count]), ints([row]), ints(range(start, start + count))
            params = EvictParams(x.q, x.k, x.v, x.logits, *places, inv_freq, about_self, NEURON_ALL)
            if run(append_evicting, layer, params):
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
        for h, state in itertools.product(range(2), states.values()):
            marks = (bank.logits[ids, h] > 0).tolist()
            if not about_self:
                marks = [*marks[1:], False]
            stays = [i for n, i in enumerate(ids) if len(ids) - 1 - n <= window or not marks[n]]
            assert int(state.lengths[row, layer, h]) == max(0, len(stays) - window - 1)
            if ids:
                assert torch.equal(held_tokens(state, row, layer, h)[1], bank.v[stays, h])
