"""The Megatron side in one process, fp32: against stock megatron-core, Hugging Face's Llama, and the slow oracle."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from helpers.in_process import VOCAB, build, device, megatron_in_process, run_config
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from torch import Tensor

from megatron.dmc.config import DMCConfig, RunConfig
from megatron.dmc.model import DMCGPTModel, DMCStep, get_dmc_layer_spec, have_transformer_engine
from megatron.dmc.model.carry import read_count, write_count
from megatron.dmc.ops import OracleCache, attention_factor, rotary_frequencies
from megatron.dmc.training.model import transformer_config

EXACT = 1e-5
LLAMA3 = dict(
    rope_type="llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32
)

YARN = dict(rope_type="yarn", factor=8.0, original_max_position_embeddings=32, mscale=1.0, mscale_all_dim=0.1)


@pytest.fixture(scope="module", autouse=True)
def megatron():
    """Megatron in this process, and no trace of it (nor of the CPU layer's patches) for the files after this one."""
    with megatron_in_process(run_config()):
        yield


def build_stock(run: RunConfig, state: dict) -> GPTModel:
    m = run.model
    stock = GPTModel(
        dataclasses.replace(transformer_config(run), use_te_activation_func=False),
        get_gpt_layer_local_spec(qk_layernorm=m.qk_layernorm, normalization="RMSNorm"),
        vocab_size=m.padded_vocab_size,
        max_sequence_length=m.max_position_embeddings,
        share_embeddings_and_output_weights=not m.untie_embeddings_and_output_weights,
        position_embedding_type="rope",
        rotary_base=m.rotary_base,
    )
    stock.load_state_dict(state)
    return stock.to(device()).eval()


def tokens(length: int, batch: int = 2, seed: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(VOCAB, (batch, length), generator=generator).to(device())
    return ids, torch.arange(length, device=device()).expand(batch, -1)


def difference(a: Tensor, b: Tensor) -> float:
    """Largest difference, relative to the largest value."""
    return ((a - b).abs().max() / b.abs().max()).item()


# The plain model


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("qk_layernorm", [False, True])
@pytest.mark.parametrize("add_qkv_bias", [False, True])
@torch.no_grad()
def test_plain_is_stock_megatron(groups, qk_layernorm, add_qkv_bias):
    run = run_config(num_query_groups=4 // groups, qk_layernorm=qk_layernorm, add_qkv_bias=add_qkv_bias)
    model = build(run)
    stock = build_stock(run, model.state_dict())
    ids, positions = tokens(50)
    ours = model(ids, positions, step=DMCStep(compress=False))
    theirs = stock(ids, positions, attention_mask=None)
    assert theirs.std() > 0.1
    assert difference(ours, theirs) <= EXACT


@pytest.mark.parametrize("scaling", [None, LLAMA3, YARN])
@torch.no_grad()
def test_plain_is_hugging_face_llama(scaling):
    transformers = pytest.importorskip("transformers")
    run = run_config(rope_scaling=scaling, rotary_base=1000.0)
    m = run.model
    model = build(run)
    llama = (
        transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                hidden_size=m.hidden_size,
                intermediate_size=m.ffn_hidden_size,
                num_hidden_layers=m.num_layers,
                num_attention_heads=m.num_attention_heads,
                num_key_value_heads=m.kv_heads,
                vocab_size=m.padded_vocab_size,
                max_position_embeddings=256,
                rms_norm_eps=m.norm_epsilon,
                tie_word_embeddings=False,
                rope_parameters={"rope_type": "default", **(scaling or {}), "rope_theta": m.rotary_base},
            )
        )
        .to(device())
        .eval()
    )
    state = {
        "model.embed_tokens.weight": model.embedding.word_embeddings.weight,
        "model.norm.weight": model.decoder.final_layernorm.weight,
        "lm_head.weight": model.output_layer.weight,
    }
    g, d = m.num_attention_heads // m.kv_heads, m.head_dim
    for i, layer in enumerate(model.decoder.layers):
        qkv = layer.self_attention.linear_qkv.weight.view(m.kv_heads, g + 2, d, -1)
        gate, up = layer.mlp.linear_fc1.weight.chunk(2)
        for name, value in {
            "input_layernorm": layer.input_layernorm.weight,
            "post_attention_layernorm": layer.pre_mlp_layernorm.weight,
            "self_attn.q_proj": qkv[:, :g].reshape(-1, m.hidden_size),
            "self_attn.k_proj": qkv[:, g].reshape(-1, m.hidden_size),
            "self_attn.v_proj": qkv[:, g + 1].reshape(-1, m.hidden_size),
            "self_attn.o_proj": layer.self_attention.linear_proj.weight,
            "mlp.gate_proj": gate,
            "mlp.up_proj": up,
            "mlp.down_proj": layer.mlp.linear_fc2.weight,
        }.items():
            state[f"model.layers.{i}.{name}.weight"] = value
    llama.load_state_dict(state)
    ids, positions = tokens(120)
    ours = model(ids, positions, step=DMCStep(compress=False))
    assert difference(ours, llama(ids).logits) <= EXACT
    if scaling:
        unscaled = build(run_config(rotary_base=1000.0))(ids, positions, step=DMCStep(compress=False))
        assert difference(ours, unscaled) > 1e-3


# The neuron zeroed, no merges


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("switch", [{}, dict(add_qkv_bias=True), dict(qk_layernorm=True)])
@torch.no_grad()
def test_no_merges_is_plain(groups, switch):
    run = run_config(num_query_groups=4 // groups, **switch)
    model = build(run, carry=True)
    plain = build(run)
    model.zero_decision_neurons()
    plain.load_state_dict(model.state_dict())
    ids, positions = tokens(50)
    logits, kept = model(ids, positions)
    # Every slot is kept: the logit of a zeroed neuron is 0 - 5.
    assert kept.tolist() == [run.model.num_layers * run.model.kv_heads * 50] * 2
    # After RoPE channel D-1 is zero: the end of zero_out.
    assert difference(logits, plain(ids, positions, step=DMCStep(compress=False, neuron_scale=0.0))) <= EXACT


@torch.no_grad()
def test_no_merges_is_stock_megatron():
    """Also of a model that knows nothing of the neuron, where RoPE does not turn it: its pair's angle is about 0."""
    run = run_config(rotary_base=1e9)
    model = build(run, carry=True)
    model.zero_decision_neurons()
    ids, positions = tokens(50)
    logits, _ = model(ids, positions)
    stock = build_stock(run, model.state_dict())(ids, positions, attention_mask=None)
    assert difference(logits, stock) <= EXACT


@pytest.mark.parametrize("switch", [{}, dict(add_qkv_bias=True), dict(qk_layernorm=True)])
@torch.no_grad()
def test_zero_out_ends_without_a_jump(switch):
    """Zero weights are the end of the fading, also where norms of q and k see the neuron, here an outlier channel."""
    model = build(run_config(**switch))
    for layer in model.decoder.layers:
        layer.self_attention.linear_qkv.weight.view(2, 4, 16, -1)[:, :3, 15] *= 10  # [ng, q q k v, D, h]
    ids, positions = tokens(50)
    plain, nearly, before = (
        model(ids, positions, step=DMCStep(compress=False, neuron_scale=scale)) for scale in (1.0, 1e-3, 0.0)
    )
    model.zero_decision_neurons()
    assert difference(model(ids, positions, step=DMCStep(compress=False, neuron_scale=0.0)), before) <= EXACT
    assert difference(nearly, before) <= 1e-3  # continuous
    assert difference(plain, before) > 1e-2  # the channel had a say


def test_zero_decision_neurons_takes_the_right_rows():
    model = build(run_config(add_qkv_bias=True))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    model.zero_decision_neurons()
    for name, parameter in model.named_parameters():
        if "linear_qkv" not in name:
            assert torch.equal(parameter, before[name])
            continue
        new, old = (x.view(2, 4, 16, -1) for x in (parameter, before[name]))  # [ng, q q k v, D, ...]
        assert (new[:, :3, 15] == 0).all() and (old[:, :3, 15] != 0).all()
        assert (new[:, :, :15] == old[:, :, :15]).all() and (new[:, 3] == old[:, 3]).all()


# Hard decisions: the whole model against one token at a time


def mix_decisions(model: DMCGPTModel) -> None:
    """Key neurons around the threshold, each head at a rate of its own, some merging nearly always; query neurons where
    the sigmoid of the importance is steep."""
    m = model.config
    ng, g = m.num_query_groups, m.num_attention_heads // m.num_query_groups
    with torch.no_grad():
        for i, layer in enumerate(model.decoder.layers):
            bias = layer.self_attention.linear_qkv.bias.view(ng, g + 2, -1)
            # The neuron's standard deviation is about 0.15 * 8 = 1.2.
            for head in range(ng):
                bias[head, g, -1] = 5.0 + (2.5, -0.4, 0.6, -2.0)[(head + i) % 4]
            bias[:, :g, -1] -= 5.0


@torch.no_grad()
def one_token_at_a_time(model: DMCGPTModel, run: RunConfig, ids: Tensor) -> tuple[Tensor, Tensor, int]:
    """Logits [b, s, vocab], slots [b], longest segment: a Llama decoder over compressed caches, written out."""
    m, dmc = run.model, run.dmc
    b, s = ids.shape
    ng, d = m.kv_heads, m.head_dim
    g = m.num_attention_heads // ng
    inv_freq = rotary_frequencies(d, m.rotary_base, m.rope_scaling)
    caches = [
        OracleCache(
            b,
            ng,
            inv_freq,
            decision_bias=dmc.decision_bias,
            epsilon=dmc.importance_epsilon,
            window=dmc.window,
            factor=attention_factor(m.rope_scaling),
        )
        for _ in range(m.num_layers)
    ]

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + m.norm_epsilon) * weight

    logits, longest = [], 0
    for t in range(s):
        x = model.embedding.word_embeddings.weight[ids[:, t]]
        for layer, cache in zip(model.decoder.layers, caches):
            attention, mlp = layer.self_attention, layer.mlp
            h = norm(x, layer.input_layernorm.weight)
            qkv = F.linear(h, attention.linear_qkv.weight, attention.linear_qkv.bias).view(b, ng, g + 2, d)
            q, k = qkv[:, :, :g].reshape(b, ng * g, d), qkv[:, :, g]
            if m.qk_layernorm:
                q, k = norm(q, attention.q_layernorm.weight), norm(k, attention.k_layernorm.weight)
            out = cache.step(q, k, qkv[:, :, g + 1])
            x = x + F.linear(out.reshape(b, -1), attention.linear_proj.weight)
            gate, up = F.linear(norm(x, layer.pre_mlp_layernorm.weight), mlp.linear_fc1.weight).chunk(2, dim=-1)
            x = x + F.linear(F.silu(gate) * up, mlp.linear_fc2.weight)
            longest = max([longest, *(len(head.segment) for row in cache.heads for head in row)])
        logits.append(F.linear(norm(x, model.decoder.final_layernorm.weight), model.output_layer.weight))
    return torch.stack(logits, dim=1), sum(cache.lengths() for cache in caches).sum(dim=1), longest


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("window", [12, None])
@pytest.mark.parametrize("length", [1, 2, 13, 200])
@torch.no_grad()
def test_hard_decisions_are_inference(groups, window, length):
    run = run_config(dict(window=window), num_query_groups=4 // groups, add_qkv_bias=True)
    model = build(run, carry=True)
    mix_decisions(model)
    ids, positions = tokens(length, batch=2 if length < 200 else 1)
    step = DMCStep()
    logits, kept = model(ids, positions, step=step)
    expected, slots, longest = one_token_at_a_time(model, run, ids)
    assert difference(logits, expected) <= 1e-4
    assert kept.tolist() == slots.tolist()
    assert sum(step.kept.values()).sum(dim=1).tolist() == slots.tolist()
    if length == 200:
        cr = run.model.num_layers * run.model.kv_heads * length / slots.sum().item()
        assert longest > 12 and 1.3 < cr < 20
        # No merging, or another window, is another function: the comparison is not empty.
        run.dmc.window = 3
        model = build(run, carry=True)
        mix_decisions(model)
        assert difference(model(ids, positions)[0], expected) > 1e-3


@torch.no_grad()
def test_hard_decisions_are_inference_with_yarn():
    run = run_config(num_query_groups=2, add_qkv_bias=True, rope_scaling=YARN, rotary_base=1000.0)
    model = build(run, carry=True)
    mix_decisions(model)
    ids, positions = tokens(60)
    logits, kept = model(ids, positions)
    expected, slots, _ = one_token_at_a_time(model, run, ids)
    assert difference(logits, expected) <= 1e-4 and kept.tolist() == slots.tolist()
    assert kept.sum().item() < 0.8 * 2 * 2 * 2 * 60


@torch.no_grad()
def test_the_end_of_zero_out_is_inference():
    """With norms of q and k: as the engine runs what is exported, that is, over caches that never merge."""
    run = run_config(dict(decision_bias=1e9), qk_layernorm=True)
    model = build(run)
    ids, positions = tokens(20)
    faded = model(ids, positions, step=DMCStep(compress=False, neuron_scale=0.0))
    model.zero_decision_neurons()
    expected, slots, _ = one_token_at_a_time(model, run, ids)
    assert difference(faded, expected) <= EXACT
    assert slots.tolist() == [2 * 2 * 20] * 2


@torch.no_grad()
def test_rows_of_a_batch_do_not_mix():
    run = run_config(add_qkv_bias=True)
    model = build(run, carry=True)
    mix_decisions(model)
    ids, positions = tokens(70, batch=3)
    logits, kept = model(ids, positions)
    for i in range(3):
        alone, count = model(ids[i : i + 1], positions[:1])
        assert difference(logits[i : i + 1], alone) <= EXACT and count.item() == kept[i].item()


# The carried count


@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=5), st.sampled_from([torch.bfloat16, torch.float32]))
@settings(deadline=None, max_examples=60)
def test_carry_holds_counts_exactly(counts, dtype):
    count = torch.tensor(counts, dtype=torch.float64)
    row = write_count(count, 16, dtype)
    assert row.shape == (1, len(counts), 16) and row.dtype == dtype
    assert read_count(row).tolist() == counts


def test_carry_adds_up_past_2_24():
    count = torch.tensor([2.0**24 - 1], dtype=torch.float64)
    for i in range(1, 4):
        count = read_count(write_count(count, 8, torch.bfloat16)) + 1.0
        assert count.item() == 2**24 - 1 + i


@given(st.floats(2.0**-80, 2.0**80, width=32), st.booleans(), st.sampled_from([torch.bfloat16, torch.float32]))
@settings(deadline=None, max_examples=60)
def test_carry_holds_gradients_exactly(value, negative, dtype):
    gradient = torch.tensor([-value if negative else value], dtype=torch.float64)
    count = torch.tensor([300.0], dtype=torch.float64, requires_grad=True)
    out = count
    for _ in range(3):
        out = read_count(write_count(out, 8, dtype)) + 5.0
    out.backward(gradient)
    assert count.grad.item() == gradient.item()


# As a layer spec in somebody else's model


@pytest.mark.parametrize(
    "recompute", [{}, dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)]
)
def test_layer_spec_in_a_plain_gpt_model(recompute):
    run = run_config(dict(decision_bias=0.3))
    config = dataclasses.replace(transformer_config(run), **recompute)
    model = GPTModel(
        config,
        get_dmc_layer_spec(config, run.dmc, "local"),
        vocab_size=VOCAB,
        max_sequence_length=256,
        position_embedding_type="rope",
    ).to(device())
    ids, positions = tokens(40)
    step = DMCStep(sample_ids=torch.arange(2, device=device()), seed=3, step=4)
    model.train()
    losses = model(ids, positions, attention_mask=None, labels=ids, extra_block_kwargs={"attention_bias": step})
    kept = sum(layer.self_attention.kept_count for layer in model.decoder.layers)
    losses.mean().backward()
    assert losses.shape == (2, 40)
    assert sorted(step.kept) == [1, 2] and all(count.shape == (2, 2) for count in step.kept.values())
    assert sum(step.kept.values()).sum(dim=1).tolist() == kept.tolist()
    assert 0 < kept.sum() < 2 * 2 * 2 * 40
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
    if not recompute:
        weight = model.decoder.layers[0].self_attention.linear_qkv.weight
        model.zero_grad(set_to_none=True)
        model(ids, positions, attention_mask=None, labels=ids, extra_block_kwargs={"attention_bias": step})
        model.decoder.layers[0].self_attention.kept_count.sum().backward()
        rows = weight.grad.view(2, 4, 16, -1).abs().sum(dim=-1) > 0  # [ng, q q k v, D]
        assert rows[:, 2, 15].all() and rows.sum() == 2  # the key neurons, and nothing else


def test_the_noise_is_the_steps():
    run = run_config(dict(decision_bias=0.3))
    model = build(run, carry=True).train()
    ids, positions = tokens(40)

    def loss(**changes) -> Tensor:
        step = DMCStep(**{**dict(sample_ids=torch.arange(2, device=device()), seed=3, step=4), **changes})
        return model(ids, positions, labels=ids, step=step)[0].sum().item()

    assert loss() == loss()
    assert (
        len(
            {
                loss(),
                loss(step=5),
                loss(seed=4),
                loss(sample_ids=torch.tensor([2, 3], device=device())),
                loss(sample_ids=None),
            }
        )
        == 5
    )


# Refusals


def test_training_needs_a_step():
    model = build(run_config(), carry=True)
    ids, positions = tokens(8)
    model(ids, positions)
    model.train()
    with pytest.raises(ValueError, match="DMCStep.*extra_block_kwargs"):
        model(ids, positions, labels=ids)


@pytest.mark.skipif(have_transformer_engine(), reason="Transformer Engine is here")
def test_transformer_engine_in_vain():
    config = transformer_config(run_config())
    with pytest.raises(ValueError, match=r"Transformer Engine is not installed.*install.md.*local"):
        get_dmc_layer_spec(config, DMCConfig(), "transformer_engine")
    with pytest.raises(ValueError, match="'te' is unknown"):
        get_dmc_layer_spec(config, DMCConfig(), "te")
