"""Three ways to take hard decisions give one result: masked teacher forcing, compress-then-attend, step by step."""

from __future__ import annotations

import pytest
import torch
from test_attention import DEVICES, inputs, layer
from test_dense import EPSILON, reference_layer, reference_tables

from megatron.dmc.ops import (
    OracleCache,
    compress,
    decision_logits,
    kept_slots,
    make_decisions,
    prefill_attention,
    rotary_frequencies,
)

D, BIAS = 16, 0.3
# What is added to the neuron: no merge at all, some, segments far longer than a window of 12, one segment.
SHIFTS = {"none": -20.0, "some": 0.3, "most": 2.3, "all": 20.0}


def run(s, g, window, shift, device="cpu", b=1) -> None:
    q, k, v = (x.detach() for x in inputs(s, g, d=D, b=b, device=device, shift=shift))
    cos, sin = reference_tables(D, s, torch.float32, device)
    options = {"decision_bias": BIAS, "epsilon": EPSILON, "window": window}
    forced = layer(q, k, v, bias=BIAS, window=window)
    compressed = compress(q, k, v, cos, sin, **options)
    prefilled = prefill_attention(compressed)
    cache = OracleCache(b, 2, rotary_frequencies(D, 1e4, device=device), **options)
    steps = []
    decisions = make_decisions(decision_logits(k[..., -1], BIAS), 0.1)
    for t in range(s):
        steps.append(cache.step(q[:, :, t], k[:, :, t], v[:, :, t]))
        if t in (0, s // 2, s - 1):
            prefix = make_decisions(decision_logits(k[:, :, : t + 1, -1], BIAS), 0.1)
            assert torch.equal(cache.lengths(), kept_slots(prefix).long().cpu())
    stepped = torch.stack(steps, dim=2)
    scale = stepped.abs().max()
    for name, x in (("teacher forcing", forced), ("prefill", prefilled)):
        assert (x - stepped).abs().max() <= 1e-5 * scale, f"{name}: {(x - stepped).abs().max() / scale:.1e}"
    assert torch.equal(compressed.lengths.cpu(), cache.lengths())
    assert torch.equal(compressed.lengths, kept_slots(decisions).long())
    # The slots themselves, and zeros beyond them.
    for i in range(b):
        for j in range(2):
            n = int(compressed.lengths[i, j])
            for slots, want in ((compressed.k_slots, "keys"), (compressed.v_slots, "values")):
                want = torch.stack(getattr(cache.heads[i][j], want))
                assert (slots[i, j, :n] - want).abs().max() <= 1e-5 * want.abs().max()
                assert not slots[i, j, n:].any()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("g", [1, 2, 4])
@pytest.mark.parametrize("window", [12, None])
def test_teacher_forcing_prefill_and_oracle_agree(window, g, shift, device) -> None:
    for s in (1, 2, 70):
        run(s, g, window, SHIFTS[shift], device)


@pytest.mark.parametrize("window", [1, 3, 12, None])
def test_long_sequences(window) -> None:
    run(300, 2, window, SHIFTS["most"])


def test_two_sequences_with_different_lengths() -> None:
    run(40, 2, 12, SHIFTS["some"], b=2)


def test_segments_are_longer_than_the_window() -> None:
    """The cases above are what they say."""
    q, k, _ = inputs(300, 2, d=D, b=1, shift=SHIFTS["most"])
    merge = make_decisions(decision_logits(k[..., -1], BIAS), 0.1).merge
    slot = (~merge).cumsum(-1)
    assert max(int(row.bincount().max()) for row in slot.flatten(0, 1)) > 2 * 12 and slot[..., -1].min() > 1


@pytest.mark.parametrize("window", [12, None])
def test_prefill_in_bf16(window) -> None:
    q, k, v = (x.detach() for x in inputs(200, 2, d=64, dtype=torch.bfloat16, shift=1.0))
    cos, sin = reference_tables(64, 200, torch.float32)
    got = prefill_attention(compress(q, k, v, cos, sin, decision_bias=BIAS, epsilon=EPSILON, window=window))
    assert got.dtype == torch.bfloat16
    want = reference_layer(q.double(), k.double(), v.double(), bias=BIAS, window=window)
    dense = reference_layer(q, k, v, bias=BIAS, window=window, decide_in=torch.float32)
    error, allowed = ((x.double() - want).norm() for x in (got, dense))
    assert error <= 2 * allowed
