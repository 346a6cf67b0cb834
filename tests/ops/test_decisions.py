"""Decisions, importance, noise and rotation; pooling and attention are in test_attention.py."""

from __future__ import annotations

import math

import pytest
import torch

from megatron.dmc.ops import (
    attention_factor,
    decision_logits,
    hard_decisions,
    importance,
    kept_slots,
    logistic_noise,
    make_decisions,
    rotary_frequencies,
    rotate,
    rotate_and_split_neuron,
)
from megatron.dmc.ops import noise as noise_module
from megatron.dmc.ops.attention import mask_channel, mask_unit
from megatron.dmc.ops.decisions import LOG_ZERO
from megatron.dmc.ops.rotary import cos_sin


def test_a_logit_of_zero_appends() -> None:
    neuron = torch.tensor([5.0, 5.0, math.nextafter(5.0, 6.0), 5.0000005, 4.9999995, 6.0]).view(1, 1, -1)
    logits = decision_logits(neuron, 5.0)
    assert logits.dtype == torch.float32
    assert hard_decisions(logits).flatten().tolist() == [False, False, False, True, False, True]
    # bf16 keys are widened before the bias is taken off.
    assert hard_decisions(decision_logits(torch.tensor([[[0.0, 5.0, 5.03125]]]).bfloat16(), 5.0)).tolist() == [
        [[False, False, True]]
    ]


def test_the_first_token_appends() -> None:
    logits = torch.full((2, 3, 4), 9.0)
    assert hard_decisions(logits)[..., 0].any().item() is False and hard_decisions(logits)[..., 1:].all()
    assert hard_decisions(logits, first=False).all()
    for noise in (None, torch.full_like(logits, 50.0)):
        decisions = make_decisions(logits, 0.1, noise)
        assert (decisions.alpha[..., 0] == 0).all() and (decisions.log_keep[..., -1] == 0).all()
        assert kept_slots(decisions).tolist() == [[1.0] * 3] * 2


def test_hard_and_relaxed_decisions() -> None:
    logits = torch.tensor([[[3.0, -1.0, 0.0, 2.0, 0.05]]])
    hard = make_decisions(logits, 0.1)
    assert hard.alpha.tolist() == [[[0, 0, 0, 1, 1]]]
    assert hard.log_keep.tolist() == [[[0, 0, LOG_ZERO, LOG_ZERO, 0]]] and math.exp(LOG_ZERO) == 0.0
    noise = torch.tensor([[[0.0, 0.5, -0.02, 100.0, 1e6]]])
    soft = make_decisions(logits, 0.1, noise)
    z = (logits.double() + noise.double()) / 0.1
    assert torch.allclose(soft.alpha[..., 1:].double(), z.sigmoid()[..., 1:], rtol=1e-6)
    assert torch.allclose(soft.log_keep[..., :3].double(), torch.nn.functional.logsigmoid(-z)[..., 1:4], rtol=1e-6)
    assert torch.isfinite(soft.log_keep).all() and soft.log_keep.min() == LOG_ZERO
    assert torch.equal(soft.merge, hard.merge)


def test_kept_slots_counts_hard_and_differentiates_relaxed() -> None:
    logits = torch.randn(2, 3, 5000, requires_grad=True)
    noise = torch.randn(2, 3, 5000)
    decisions = make_decisions(logits, 0.3, noise)
    kept = kept_slots(decisions)
    assert torch.equal(kept, (~hard_decisions(logits)).sum(-1).float())  # integers, exactly
    weight = torch.randn(2, 3)
    (grad,) = torch.autograd.grad((kept * weight).sum(), logits)
    alpha = torch.sigmoid((logits.detach() + noise) / 0.3)
    want = -weight[..., None] * alpha * (1 - alpha) / 0.3
    want[..., 0] = 0
    assert torch.allclose(grad, want, atol=1e-6)


def test_importance() -> None:
    neuron = torch.randn(2, 6, 9)
    got = importance(neuron.bfloat16(), 3, 5.0, 2**-7)
    mean = neuron.bfloat16().float().view(2, 3, 2, 9).mean(2)
    assert got.dtype == torch.float32 and torch.allclose(got, torch.sigmoid(mean + 5.0) + 2**-7)
    assert importance(torch.full((1, 2, 1), -1e4), 1, 5.0, 2**-7).item() == 2**-7


@pytest.mark.parametrize("dim", [8, 16, 32, 64, 80, 96, 128, 256])
def test_mask_channel_times_mask_unit_is_the_scale(dim) -> None:
    assert mask_channel(dim) * mask_unit(dim) / math.sqrt(dim) == pytest.approx(1.0, rel=1e-12)
    assert math.log2(mask_channel(dim)).is_integer()
    assert abs(LOG_ZERO * mask_unit(dim)) < 65504  # fp16's largest


# Noise

KEY = {"seed": 1234, "step": 7, "layer": 3}


def test_noise_is_logistic() -> None:
    x = logistic_noise(torch.arange(8), range(16), 4096, **KEY)
    assert x.dtype == torch.float32
    x = x.double()
    n = x.numel()
    variance = math.pi**2 / 3
    assert abs(x.mean()) < 4 * math.sqrt(variance / n)
    assert abs(x.var() - variance) < 4 * math.sqrt((21 / 5 - 1) * variance**2 / n)  # kurtosis of the logistic is 21/5
    # Kolmogorov-Smirnov distance from the logistic law, 0.1% level.
    u = x.flatten().sort().values.sigmoid()
    distance = (u - (torch.arange(n) + 0.5) / n).abs().max()
    assert distance < 1.95 / math.sqrt(n)
    for axis in range(3):  # neighbours are uncorrelated
        a, b = x.narrow(axis, 1, x.size(axis) - 1), x.narrow(axis, 0, x.size(axis) - 1)
        assert abs((a * b).mean() / variance) < 4 / math.sqrt(a.numel())


def test_noise_does_not_depend_on_the_layout() -> None:
    ids = torch.tensor([11, 4, 1 << 40, 0])
    x = logistic_noise(ids, range(8), 65, **KEY)
    assert torch.equal(logistic_noise(ids, range(2, 5), 65, **KEY), x[:, 2:5])  # tensor parallelism
    order = torch.tensor([2, 0, 3, 1])
    assert torch.equal(logistic_noise(ids[order], range(8), 65, **KEY), x[order])  # data parallelism, micro-batches
    assert torch.equal(logistic_noise(ids[1:2], range(7, 8), 65, **KEY), x[1:2, 7:8])
    assert torch.equal(logistic_noise(ids, range(8), 20, **KEY), x[..., :20])


@pytest.mark.gpu
def test_noise_on_cuda() -> None:
    ids = torch.arange(4)
    a, b = (logistic_noise(ids.to(device), range(8), 300, **KEY).cpu() for device in ("cpu", "cuda"))
    assert (a - b).abs().max() < 1e-5


@pytest.mark.parametrize("change", [{"seed": 1235}, {"step": 8}, {"layer": 4}, {"step": 3, "layer": 7}])
def test_noise_depends_on_every_key(change) -> None:
    ids = torch.arange(4)
    a = logistic_noise(ids, range(4), 1000, **KEY).flatten()
    b = logistic_noise(ids, range(4), 1000, **{**KEY, **change}).flatten()
    assert abs((a * b).mean() / (math.pi**2 / 3)) < 4 / math.sqrt(a.numel())
    assert (a == b).float().mean() < 1e-3


def test_noise_is_finite_for_all_bits() -> None:
    for bits in (0, -1, 1, 1 << 62, -(1 << 63), (1 << 63) - 1):
        x = noise_module._logistic(torch.tensor([bits]))
        assert x.dtype == torch.float32 and torch.isfinite(x).all() and 0 < abs(x.item()) < 40
    # Symmetric: the bits' complement gives the negative.
    bits = torch.randint(-(1 << 63), (1 << 63) - 1, (1000,))
    assert torch.allclose(noise_module._logistic(~bits), -noise_module._logistic(bits), rtol=1e-6, atol=1e-6)


# Rotation, against Hugging Face's Llama

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
SCALINGS = {
    "none": (10000.0, None),
    "llama3": (500000.0, LLAMA3),
    "yarn": (1000000.0, YARN),
    "yarn, short context": (10000.0, {**YARN, "factor": 40.0, "original_max_position_embeddings": 64}),
    "yarn, DeepSeek": (10000.0, {**YARN, "factor": 40.0, "mscale": 1.0, "mscale_all_dim": 0.707}),
    "yarn, one mscale": (10000.0, {**YARN, "mscale": 0.5}),
    "yarn, every key": (
        150000.0,
        {**YARN, "factor": 32, "attention_factor": 1.5, "beta_fast": 16.0, "beta_slow": 2.0, "truncate": False},
    ),
    "yarn, factor 1": (10000.0, {**YARN, "factor": 1.0}),
}


@pytest.mark.parametrize(("base", "scaling"), SCALINGS.values(), ids=SCALINGS)
@pytest.mark.parametrize("dim", [32, 128])
def test_rotation_is_llamas(dim, base, scaling) -> None:
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    config = llama.LlamaConfig(
        hidden_size=4 * dim,
        num_attention_heads=4,
        max_position_embeddings=131072,
        rope_parameters={"rope_theta": base, **(scaling or {"rope_type": "default"})},
    )
    theirs = llama.LlamaRotaryEmbedding(config)
    inv_freq = rotary_frequencies(dim, base, scaling)
    assert torch.allclose(inv_freq, theirs.inv_freq, rtol=1e-6, atol=0)
    assert attention_factor(scaling) == pytest.approx(theirs.attention_scaling, rel=1e-12)
    positions = torch.tensor([0, 1, 5, 1000, 8191])
    cos, sin = cos_sin(theirs.inv_freq, positions, attention_factor(scaling))
    q, k = torch.randn(2, 4, 5, dim), torch.randn(2, 2, 5, dim)
    want_q, want_k = llama.apply_rotary_pos_emb(q, k, *theirs(q, positions[None]))
    assert torch.allclose(rotate(q, cos, sin), want_q, atol=1e-5)
    assert torch.allclose(rotate(k, cos, sin), want_k, atol=1e-5)
    # With the neuron out: Llama's rotation of the same heads with a zero there, and that channel replaced.
    got, neuron = rotate_and_split_neuron(q, cos, sin, 3.0)
    zeroed = q.clone()
    zeroed[..., -1] = 0
    want, _ = llama.apply_rotary_pos_emb(zeroed, k, *theirs(q, positions[None]))
    assert torch.allclose(got[..., :-1], want[..., :-1], atol=1e-5)
    assert (got[..., -1] == 3.0).all() and torch.equal(neuron, q[..., -1])


def test_rotation_takes_any_strides_and_leaves_its_input() -> None:
    cos, sin = cos_sin(rotary_frequencies(16, 1e4), torch.arange(6))
    x = torch.randn(6, 2, 3, 16).permute(1, 2, 0, 3)
    last = torch.randn(2, 3, 6)
    before = x.clone()
    got, neuron = rotate_and_split_neuron(x, cos, sin, last)
    want, _ = rotate_and_split_neuron(x.contiguous(), cos, sin, last)
    assert torch.equal(got, want) and torch.equal(x, before) and torch.equal(neuron, x[..., -1])
    assert torch.equal(got[..., -1], last) and got.is_contiguous()
