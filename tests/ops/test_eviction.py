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
    attention_backend,
    decision_logits,
    evicting_attention,
    kept_slots,
    make_decisions,
    rotary_frequencies,
    rotate,
    rotate_and_split_neuron,
)
from megatron.dmc.ops import eviction as module
from megatron.dmc.ops.attention import Backend, mask_channel, mask_unit

_FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
STOCK = Backend(
    "torch CPU flash",
    lambda q, k, v, scale=None: _FLASH(q, k, v, 0.0, True, scale=scale),
    lambda *tensors, scale=None: _FLASH_BACKWARD(*tensors, 0.0, True, scale=scale),
)


@pytest.fixture(params=["own", "stock"], autouse=True)
def kernel(request, monkeypatch) -> None:
    """On CPUs also as it is computed where the kernel knows a causal mask alone, with torch's."""
    if request.param == "stock":
        choose = lambda device, dtype: STOCK if device == "cpu" else attention_backend(device, dtype)
        monkeypatch.setattr(module, "attention_backend", choose)


def layer(q: Tensor, k: Tensor, v: Tensor, *, bias: float, window: int, noise=None) -> Tensor:
    """Inputs as the model builds them, the decisions read from the keys."""
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


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("about_self", [False, True], ids=["previous", "self"])
@pytest.mark.parametrize("g, window", [(1, 1), (3, 5), (2, 70)])
def test_all_channels_may_be_in_attention(g, window, about_self, device) -> None:
    """The mask has a place of its own where the decisions come from elsewhere than the keys, with its gradient."""
    wide = torch.float64 if device == "cpu" else torch.float32
    for s in (1, 2, window + 2, 66):
        q, k, v = inputs(s, g, dtype=wide, device=device)
        logits = torch.randn(k.shape[:3], generator=torch.Generator().manual_seed(3)).to(q).requires_grad_()
        noise, (cos, sin) = noise_for(q).to(wide), reference_tables(q.size(-1), s, wide, q.device)
        about = torch.arange(s) if about_self else torch.arange(s).add(1).clamp_max(s - 1)  # who decides about j
        keep = (1 - torch.sigmoid((logits + noise) / 0.5)[..., about]).log()
        scores = rotate(q, cos, sin) @ rotate(k, cos, sin).repeat_interleave(g, dim=1).transpose(-1, -2)
        age = torch.arange(s)[:, None] - torch.arange(s)
        far = (age > window).to(scores) * keep.repeat_interleave(g, dim=1).unsqueeze(-2)
        scores = (scores / math.sqrt(q.size(-1)) + far).masked_fill((age < 0).to(q.device), -math.inf)
        want = scores.softmax(dim=-1) @ v.repeat_interleave(g, dim=1)
        mask = make_decisions(logits, 0.5, noise, about_self).log_keep
        out = evicting_attention(rotate(q, cos, sin), rotate(k, cos, sin), v, window, mask)
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(5)).to(out)
        leaves = (q, k, v, *([logits] if s > window + 1 else []))
        found = [(x, *torch.autograd.grad((x * weight).sum(), leaves)) for x in (out, want)]
        for got, expected in zip(*found):
            error = (got - expected).abs().max() / expected.abs().max().clamp_min(0.1)
            assert error <= (1e-9 if device == "cpu" else 3e-5), f"s {s}: {float(error):.1e}"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("window, rows", [(5, 1), (5, 60), (70, 40), (64, 65)])
def test_the_rows_of_the_last_tokens_alone(window, rows, device) -> None:
    """As those of all tokens, of which the others have no gradient."""
    q, k, v = inputs(130, 3, dtype=torch.float64 if device == "cpu" else torch.float32, device=device)
    mask = -torch.rand(k.shape[:3], generator=torch.Generator().manual_seed(3)).to(k)
    weight = torch.randn(q[:, :, -rows:].shape, generator=torch.Generator().manual_seed(5)).to(q)
    found = []
    for part in (False, True):
        leaves = (q[:, :, -rows:], k, v, mask.requires_grad_())
        out = evicting_attention(leaves[0] if part else q, k, v, window, mask)[:, :, -rows:]
        found.append((out, *torch.autograd.grad((out * weight).sum(), (leaves[0] if part else q, *leaves[1:]))))
    for whole, part in zip(*found):
        assert (whole[:, :, -part.size(2) :] - part).abs().max() <= (1e-12 if device == "cpu" else 3e-5)


def test_a_mask_in_bf16_is_not_rounded_to_bf16() -> None:
    """It takes two channels, so a decision of 0.1% more or less is not lost."""
    q, k, v = (x.detach().bfloat16() for x in inputs(40, 2))
    mask = torch.full(k.shape[:3], -4.0)
    outputs = [evicting_attention(q, k, v, 2, mask + change)[:, :, 20:].float() for change in (0.0, -0.004)]
    assert torch.equal(mask.bfloat16(), (mask - 0.004).bfloat16())
    assert not torch.equal(*outputs)


@pytest.mark.parametrize("window", [1, 4, 16, 100])
def test_hard_decisions_are_the_cache(window) -> None:
    """Attention equals that of the policy, which is tested against the step-by-step cache."""
    q, k, v = (x.detach() for x in inputs(60, 2, dtype=torch.float64))
    logits = decision_logits(k[..., -1], 0.3)
    x = Projections(q, k, v, rotary_frequencies(16, 1e4), neuron="all", logits=logits)
    attended = DMS(window).attend(x)
    assert torch.allclose(layer(q, k, v, bias=0.3, window=window), attended.out, atol=2e-6)


def test_the_evicted_share_counts_marks_with_the_gradient_of_the_relaxed_decisions() -> None:
    logits = torch.randn(1, 2, 20).requires_grad_()
    noise = torch.randn(1, 2, 20)
    for about_self in (False, True):
        decisions = make_decisions(logits, 0.5, noise, about_self)
        kept = kept_slots(decisions)
        (grad,) = torch.autograd.grad(kept.sum(), logits)
        alpha, first = decisions.alpha.detach(), 0 if about_self else 1  # the first token decides about nobody
        assert torch.equal(kept, 20 - (logits[..., first:] > 0).sum(dim=-1).float())
        want = -alpha * (1 - alpha) / 0.5
        assert torch.allclose(grad, want, atol=1e-6) and bool((alpha[..., 0] > 0).all()) == about_self
