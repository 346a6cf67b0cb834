"""DMS in training: attention whose marked columns fade a window later, against a dense implementation; slots as in the
cache.
"""

from __future__ import annotations

import math

import pytest
import torch
from test_attention import DEVICES, inputs, noise_for
from test_dense import reference_tables
from torch import Tensor

from megatron.dmc.evaluation.policies import DMS, Projections
from megatron.dmc.ops import (
    decision_logits,
    evicting_attention,
    held_slots,
    make_decisions,
    rotary_frequencies,
    rotate_and_split_neuron,
)
from megatron.dmc.ops.attention import mask_channel, mask_unit


def layer(q: Tensor, k: Tensor, v: Tensor, *, bias: float, window: int, noise=None) -> Tensor:
    """Inputs as the model builds them."""
    d = q.size(-1)
    cos, sin = reference_tables(d, q.size(2), torch.float64 if q.dtype == torch.float64 else torch.float32, q.device)
    decisions = make_decisions(decision_logits(k[..., -1], bias), 0.5, noise)
    q, _ = rotate_and_split_neuron(q, cos, sin, mask_channel(d))
    k, _ = rotate_and_split_neuron(k, cos, sin, decisions.log_keep.to(k.dtype) * mask_unit(d))
    return evicting_attention(q, k, v, window)


def dense(q: Tensor, k: Tensor, v: Tensor, *, bias: float, window: int, noise=None) -> Tensor:
    """Section 3 of arXiv 2506.05345 with an S x S mask, every step written out."""
    d, g, s = q.size(-1), q.size(1) // k.size(1), q.size(2)
    cos, sin = reference_tables(d, s, torch.float64 if q.dtype == torch.float64 else torch.float32, q.device)
    logits = k[..., -1] - bias
    z = logits if noise is None else logits + noise
    mark = (z > 0).to(q.dtype) if noise is None else torch.sigmoid(z / 0.5)
    q, k = (rotate_and_split_neuron(x, cos, sin, 0.0)[0].repeat_interleave(n, dim=1) for x, n in ((q, 1), (k, g)))
    scores = q @ k.transpose(-1, -2) / math.sqrt(d)
    for t in range(s):
        for j in range(t + 1):
            if t - j > window:  # the decision that token j + 1 has made about token j
                keep = 1 - mark[..., j + 1]
                scores[..., t, j] = scores[..., t, j] + keep.clamp_min(1e-30).log().repeat_interleave(g, dim=1)
    age = torch.arange(s, device=q.device)[:, None] - torch.arange(s, device=q.device)
    return scores.masked_fill(age < 0, -math.inf).softmax(dim=-1) @ v.repeat_interleave(g, dim=1)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("relaxed", [True, False], ids=["relaxed", "hard"])
@pytest.mark.parametrize("g, window", [(1, 1), (2, 5), (4, 16), (2, 70)])
def test_evicting_attention_matches_dense(g, window, relaxed, device) -> None:
    wide = torch.float64 if device == "cpu" else torch.float32  # no kernel takes fp64 on CUDA
    for s in (1, 2, window + 1, window + 2, 66):
        q, k, v = inputs(s, g, dtype=wide, device=device, shift=0.5)
        noise = noise_for(q).to(wide) if relaxed else None
        found = []
        for function in (layer, dense):
            out = function(q, k, v, bias=0.3, window=window, noise=noise)
            weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(5)).to(out)
            found.append((out, *torch.autograd.grad((out * weight).sum(), (q, k, v))))
        for got, want in zip(*found):
            error = (got - want).abs().max() / want.abs().max().clamp_min(0.1)
            assert error <= (1e-9 if device == "cpu" else 3e-5), f"s {s}: {float(error):.1e}"


@pytest.mark.parametrize("window", [1, 4, 16, 100])
def test_hard_decisions_are_the_cache(window) -> None:
    """Attention and number of slots equal those of the policy, which is tested against the step-by-step cache."""
    q, k, v = (x.detach() for x in inputs(60, 2, dtype=torch.float64))
    logits = decision_logits(k[..., -1], 0.3)
    x = Projections(q, k, v, rotary_frequencies(16, 1e4), neuron="all", logits=logits)
    attended = DMS(window).attend(x)
    assert torch.allclose(layer(q, k, v, bias=0.3, window=window), attended.out, atol=2e-6)
    decisions = make_decisions(logits, 0.5)
    assert torch.equal(held_slots(decisions, window).long(), attended.slots[..., -1])
    assert window >= 60 or float(attended.slots[..., -1].double().mean()) < 60


def test_slots_have_the_gradient_of_the_relaxed_decisions() -> None:
    logits = torch.randn(1, 2, 20).requires_grad_()
    noise = torch.randn(1, 2, 20)
    decisions = make_decisions(logits, 0.5, noise)
    (grad,) = torch.autograd.grad(held_slots(decisions, 4).sum(), logits)
    alpha = decisions.alpha.detach()
    want = -alpha * (1 - alpha) / 0.5
    want[..., 0], want[..., 16:] = 0, 0  # the first token decides nothing; the last five tokens are held in any case
    assert torch.allclose(grad, want, atol=1e-6)
