"""The compiled kernels of models that evict against the reference: shapes, windows and dtypes that the oracle is too
slow for, and what must not depend on the composition of a step.
"""

from __future__ import annotations

import copy

import pytest
import torch
from evicting import Sequence, sequence
from test_evicting import NEURONS, poisoned
from test_kernels import BACKENDS, backend_named, ints
from torch import Tensor

from megatron.dmc.kernels import (
    AppendParams,
    CacheState,
    EvictParams,
    append,
    append_evicting,
    decode_attention,
    prefill_attention,
)
from megatron.dmc.kernels.params import NEURON_NONE
from megatron.dmc.ops import rotary_frequencies

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Largest error of two results that are rounded to the dtype once, of values below 4, and of weights in bf16.
BOUNDS = {torch.float32: 2e-6, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}
ON_CPU = [b for b in BACKENDS if b.values[0] == "cpp"]


def feed(
    state: CacheState, tokens: list[Sequence], steps: list[list[int]], rule: dict, rows: list[int], partial: bool = True
) -> list[Tensor]:
    """Feed sequences through layer 1 in steps of ``counts``; returns the attention outputs of each. A step of single
    tokens, or without ``partial``, ends in decode_attention of its sequences' last tokens.
    """
    seen, out = [0] * len(tokens), []
    inv_freq, scale = rotary_frequencies(tokens[0].q.size(-1), 1e4), tokens[0].q.size(-1) ** -0.5
    for counts in steps:
        parts = [x[at : at + n] for x, at, n in zip(tokens, seen, counts)]
        cu = ints([0, *torch.tensor(counts).cumsum(0).tolist()])
        positions = ints([at + i for at, n in zip(seen, counts) for i in range(n)])
        q, k, v, logits = (torch.cat([getattr(x, name) for x in parts]) for name in ("q", "k", "v", "logits"))
        decode = not partial or set(counts) == {1}
        params = EvictParams(q, k, v, logits, cu, ints(rows), positions, inv_freq, **rule, partial=not decode)
        done = append_evicting(state, 1, params)
        if decode:
            out.append(decode_attention(state, 1, done.q_rot[(cu[1:] - 1).long()], ints(rows), scale))
        else:
            out.append(prefill_attention(state, 1, done, cu, ints(rows), scale))
        seen = [at + n for at, n in zip(seen, counts)]
    return out


# window, page size, query heads per KV head, KV heads, D, dtype
SHAPES = [
    (1, 16, 1, 2, 8, "fp32"),
    (1, 64, 8, 1, 256, "bf16"),
    (15, 16, 3, 2, 24, "bf16"),
    (16, 16, 4, 1, 128, "bf16"),
    (17, 16, 2, 2, 80, "fp16"),
    (31, 32, 8, 2, 64, "bf16"),
    (33, 32, 1, 2, 48, "fp32"),
    (63, 64, 4, 1, 96, "fp16"),
    (64, 64, 2, 1, 64, "fp32"),
    (65, 64, 8, 1, 128, "fp32"),
    (300, 32, 5, 1, 16, "bf16"),
    (1024, 16, 2, 1, 16, "fp32"),
    (1024, 64, 1, 1, 8, "bf16"),
]


@pytest.mark.parametrize(("window", "page_size", "g", "kv", "d", "dtype"), SHAPES)
@pytest.mark.parametrize(("backend", "device"), ON_CPU)
def test_shapes_equal_the_reference(backend, device, window, page_size, g, kv, d, dtype) -> None:
    """A row of padding, a sequence without tokens, chunks longer and shorter than the window, then decoding: outputs,
    tables, marks and the pages that are held.
    """
    of, kind = DTYPES[dtype], list(NEURONS)[(window + g) % 3]
    rule = {"about_self": window % 2 == 0, "neuron": NEURONS[kind]}
    n = 2 * window + 140
    steps = [[window + 70, 3, 0], [21, 2, 40], [1, 1, 1], [window - 1, 1, 5], [13, 0, 1], [1, 1, 1], [1, 1, 1]]
    tokens = [sequence(n, g, kv, d, seed=i, dtype=of) for i in range(3)]
    options = {"page_size": page_size, "num_kv_heads": kv, "head_dim": d, "dtype": of, "max_slots": n, "num_pages": 360}
    states = [poisoned(window, **options) for _ in range(2)]
    outs = []
    for name, state in zip((backend, "reference"), states):
        with backend_named(name):
            outs.append(feed(state, tokens, steps, rule, [3, -1, 0]))
    for got, want in zip(*outs, strict=True):
        torch.testing.assert_close(got.float(), want.float(), rtol=BOUNDS[of], atol=BOUNDS[of])
    one, other = states
    for name in ("lengths", "segment", "recent_table", "page_table", "marks", "free_pages", "refcounts", "counters"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name
    for name in ("k_pages", "v_pages"):
        x, y = (getattr(state, name).nan_to_num(7.0).float() for state in states)
        torch.testing.assert_close(x, y, rtol=BOUNDS[of], atol=2 * BOUNDS[of])
    one.check_integrity()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("backend", "device"), ON_CPU)
def test_threads_and_company_do_not_change_a_bit(backend, device, dtype) -> None:
    """One thread or four, and beside other sequences or alone, beyond one split of decode attention."""
    of, rule = DTYPES[dtype], {"about_self": False, "neuron": NEURON_NONE}
    tokens = [sequence(1500, 2, 2, 64, marked=0.1, seed=i, dtype=of) for i in range(3)]
    steps = [[1400, 30, 2], [40, 70, 1], [1, 1, 1]]
    options = {"head_dim": 64, "dtype": of, "max_slots": 1500, "num_pages": 800}
    threads, found = torch.get_num_threads(), []
    with backend_named(backend):
        try:
            for count in (1, 4):
                torch.set_num_threads(count)
                state = poisoned(200, device, **options)
                found.append((feed(state, tokens, steps, rule, [0, 1, 2]), state))
        finally:
            torch.set_num_threads(threads)
        alone = feed(poisoned(200, device, **options), tokens[:1], [[n[0]] for n in steps], rule, [4])
    (outs, state), (others, twin) = found
    assert all(map(torch.equal, outs, others)) and int(state.lengths[0, 1].min()) > 1024
    for x, y in zip(state.tensors(), twin.tensors(), strict=True):
        assert torch.equal(x.nan_to_num(7.0), y.nan_to_num(7.0))
    for got, want, counts in zip(alone, outs, steps):
        assert torch.equal(got, want[: counts[0]])


@pytest.mark.parametrize("window", [1, 20, 200])
@pytest.mark.parametrize(("backend", "device"), ON_CPU)
def test_chunks_without_outputs_for_prefill_write_the_same(backend, device, window) -> None:
    """``partial=False`` with chunks, whose recent pages from before the step are then known to nobody else."""
    tokens, steps = [sequence(150, 1, 2, 16, seed=i) for i in range(2)], [[90, 1], [1, 1], [50, 40], [2, 1]]
    states = []
    with backend_named(backend):
        for partial in (True, False):
            states.append(poisoned(window, device, max_slots=160))
            feed(states[-1], tokens, steps, {"about_self": True, "neuron": NEURON_NONE}, [2, 0], partial)
    for x, y in zip(states[0].tensors(), states[1].tensors(), strict=True):
        assert torch.equal(x.nan_to_num(7.0), y.nan_to_num(7.0))


@pytest.mark.parametrize(("backend", "device"), ON_CPU)
def test_wrong_arguments_are_refused_by_name(backend, device) -> None:
    x, inv_freq = sequence(4, 1, 2, 16), rotary_frequencies(16, 1e4)
    places = (ints([0, 4]), ints([0]), ints(range(4)))
    state = poisoned(4, device)
    before = copy.deepcopy(state)

    def refused(match: str, logits: Tensor = x.logits, neuron: int = 0) -> None:
        with pytest.raises(ValueError, match=match):
            append_evicting(state, 1, EvictParams(x.q, x.k, x.v, logits, *places, inv_freq, False, neuron))

    with backend_named(backend):
        refused("logits", logits=x.logits[:3].contiguous())
        refused("logits", logits=x.logits.double())
        refused("neuron is 3", neuron=3)
        with pytest.raises(ValueError, match="use append_evicting"):
            append(state, 1, AppendParams(x.q, x.k, x.v, *places, inv_freq, bias=0.0, epsilon=0.1, window=4))
        for one, other in zip(state.tensors(), before.tensors(), strict=True):
            assert torch.equal(one.nan_to_num(7.0), other.nan_to_num(7.0))
        state = poisoned(None, device)
        refused("does not evict; use append")
