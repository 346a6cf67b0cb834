"""Sources of DMS's decisions in the training model: against a dense layer in fp64, and how each begins."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.in_process import VOCAB, build, megatron_in_process, run_config
from torch import Tensor

from megatron.dmc.config import RunConfig
from megatron.dmc.model import DMCGPTModel, DMCStep, is_adapter
from megatron.dmc.ops import logistic_noise

S, B, WINDOW, D = 40, 2, 3, 16


@pytest.fixture(scope="module", autouse=True)
def megatron():
    with megatron_in_process(run_config()):
        yield


def model_of(source: str, about: str = "previous", per: str = "head", carry: bool = False, **model) -> DMCGPTModel:
    dmc = dict(
        method="dms",
        window=WINDOW,
        decision_source=source,
        decision_about=about,
        decision_per=per,
        decision_scale=2.0,
        decision_bias=0.3,
        temperature=0.5,
    )
    return build(run_config(dmc=dmc, **model), carry=carry)


def randomize_adapters(model: DMCGPTModel) -> None:
    for name, parameter in model.named_parameters():
        if is_adapter(name):
            torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(parameter.dim()))


def rotated(x: Tensor, angles: Tensor) -> Tensor:
    """[b, heads, s, D], with cosines and sines in fp32 as the model has them."""
    turned = torch.complex(x[..., : D // 2], x[..., D // 2 :]) * torch.complex(
        angles.cos().double(), angles.sin().double()
    )
    return torch.cat((turned.real, turned.imag), dim=-1)


def dense(attention, hidden: Tensor, layer_input: Tensor, angles: Tensor, noise: Tensor) -> Tensor:
    """The layer's attention, every step written out: hidden, layer_input [s, b, h] -> [s, b, h]."""
    dmc, groups = attention.dmc, 2
    mixed = (hidden @ attention.linear_qkv.weight.t()).view(S, B, groups, 4, D).permute(1, 2, 3, 0, 4)
    q, k, v = mixed[:, :, :2], mixed[:, :, 2:3], mixed[:, :, 3:]  # [b, ng, heads of the group, s, D]
    if dmc.decision_source == "query":
        q = attention.q_layernorm(q) if attention.q_layernorm is not None else q
        k = attention.k_layernorm(k) if attention.k_layernorm is not None else k
        x = q[:, :, 0, :, -1]
    else:
        norm = layer_input * torch.rsqrt(
            layer_input.square().mean(dim=-1, keepdim=True) + attention.dms_proj_alpha_norm.eps
        )
        x = (norm * attention.dms_proj_alpha_norm.weight) @ attention.dms_proj_alpha.weight.t()
        x = x.permute(1, 2, 0).expand(B, groups, S)
    kept = 1 - torch.sigmoid((x * dmc.decision_scale - dmc.decision_bias + noise) / dmc.temperature)
    if dmc.decision_about == "previous":
        kept = torch.cat((kept[..., 1:], torch.ones(B, groups, 1).double()), dim=-1)
    neuron = torch.ones(2, D).double()
    if dmc.decision_source == "query":
        neuron[0, -1] = 0
    q = rotated(q * neuron[:, None], angles) * neuron[:, None]
    scores = q @ rotated(k, angles).transpose(-1, -2) / math.sqrt(D)
    age = torch.arange(S)[:, None] - torch.arange(S)
    scores = scores + (age > WINDOW) * kept.log()[:, :, None, None]
    out = scores.masked_fill(age < 0, -math.inf).softmax(dim=-1) @ v
    return out.permute(3, 0, 1, 2, 4).reshape(S, B, -1) @ attention.linear_proj.weight.t()


@pytest.mark.parametrize(
    "source, about, per",
    [
        ("query", "previous", "head"),
        ("query", "self", "head"),
        ("adapter", "previous", "head"),
        ("adapter", "self", "head"),
        ("adapter", "previous", "layer"),
    ],
)
def test_attention_is_the_dense_one(source, about, per):
    """Outputs and the gradients of the inputs and of every weight, with noise."""
    model = model_of(source, about, per, qk_layernorm=source == "query")
    randomize_adapters(model)
    attention = model.double().decoder.layers[1].self_attention
    frequencies = model.rotary_pos_emb(S)
    random = torch.Generator().manual_seed(3)
    hidden, layer_input = (torch.randn(S, B, 64, generator=random).double().requires_grad_() for _ in range(2))
    step = DMCStep(sample_ids=torch.arange(B), seed=5, step=6, layer_input=layer_input)
    out, _ = attention(hidden, rotary_pos_emb=frequencies, attention_bias=step)
    heads = range(1) if per == "layer" else range(2)
    noise = logistic_noise(torch.arange(B), heads, S, seed=5, step=6, layer=2).double()
    want = dense(attention, hidden, layer_input, frequencies[:S, 0, 0, : D // 2], noise)
    weight = torch.randn(out.shape, generator=random).double()
    leaves = {"hidden": hidden, **dict(attention.named_parameters())}
    if source == "adapter":
        leaves["layer_input"] = layer_input
    found = [dict(zip(leaves, torch.autograd.grad((x * weight).sum(), leaves.values()))) for x in (out, want)]
    assert torch.allclose(out, want, atol=1e-10)
    for name, gradient in found[0].items():
        assert gradient.abs().max() > 1e-3 and torch.allclose(gradient, found[1][name], atol=1e-8), name


@pytest.mark.parametrize("per", ["head", "layer"])
@torch.no_grad()
def test_adapters_begin_with_the_plain_model(per):
    """Zero weights mark nothing, and the logits are those of the model without compression."""
    model = model_of("adapter", per=per, carry=True)
    ids = torch.randint(VOCAB, (B, S), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(S).expand(B, -1)
    plain, _ = model(ids, positions, step=DMCStep(compress=False))
    logits, kept = model(ids, positions, step=DMCStep())
    assert torch.allclose(logits, plain, atol=1e-4) and kept.tolist() == [2 * 2 * S] * B
    randomize_adapters(model)
    logits, kept = model(ids, positions, step=DMCStep())
    assert (kept < 2 * 2 * S).all() and (logits - plain).abs().max() > 0.01
    plain_again, _ = model(ids, positions, step=DMCStep(compress=False))  # the teacher of a frozen base
    assert torch.equal(plain_again, plain)


def test_a_frozen_base_has_no_gradients():
    model = model_of("adapter", carry=True)
    model.freeze_base()
    ids = torch.randint(VOCAB, (1, S))
    losses, kept = model(ids, torch.arange(S)[None], ids, step=DMCStep(sample_ids=torch.arange(1)))
    (losses.mean() + kept.sum()).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == is_adapter(name), name
        assert not name.endswith("dms_proj_alpha.weight") or parameter.grad.abs().max() > 0


@torch.no_grad()
def test_zero_out_frees_the_first_query_head_of_each_group():
    """At its end the channel's weights are zeros, which changes nothing any more, and no token is marked."""
    model = model_of("query", qk_layernorm=True)
    ids = torch.randint(VOCAB, (B, S), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(S).expand(B, -1)
    faded = model(ids, positions, step=DMCStep(compress=False, neuron_scale=0.0))
    assert (faded - model(ids, positions, step=DMCStep(compress=False))).abs().max() > 0.01
    model.zero_decision_neurons()
    rows = model.decoder.layers[0].self_attention.linear_qkv.weight.view(2, 4, D, -1)[:, :, -1]
    assert (rows == 0).all(dim=-1).tolist() == [[True, False, False, False]] * 2
    step = DMCStep()
    assert torch.allclose(model(ids, positions, step=step), faded, atol=1e-4)
    assert all((kept == S).all() for kept in step.kept.values())


@pytest.mark.parametrize(
    "sections, message",
    [
        (dict(stage=dict(stage="zero_out")), "stage zero_out has nothing to do with decision_source adapter"),
        (dict(dmc=dict(method="dms", decision_source="query")), "decision_source is query"),
        (dict(training=dict(freeze_base=True, distill_from="x")), "leave distill_from out"),
    ],
)
def test_what_does_not_go_together_is_refused(sections, message):
    values = dict(
        dmc=dict(method="dms", decision_source="adapter"),
        stage=dict(stage="retrofit", target_cr=4.0),
        training=dict(freeze_base=True),
    )
    with pytest.raises(ValueError, match=message):
        RunConfig.from_dict(values | sections).check()
