"""What the layer spec takes of megatron-core's options in somebody else's model, and what it refuses by name."""

from __future__ import annotations

import copy
import dataclasses
import inspect

import pytest
import torch
from helpers.in_process import VOCAB, device, megatron_in_process, run_config
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

from megatron.dmc.config import DMCConfig
from megatron.dmc.model import DMCStep, get_dmc_layer_spec
from megatron.dmc.model import supported as table
from megatron.dmc.training.model import transformer_config


@pytest.fixture(scope="module", autouse=True)
def megatron():
    with megatron_in_process(run_config()):
        yield


def gpt_model(config, spec, **arguments) -> GPTModel:
    torch.manual_seed(1)
    arguments = {"position_embedding_type": "rope", **arguments}
    model = GPTModel(config, spec, vocab_size=VOCAB, max_sequence_length=64, **arguments)
    return model.to(device()).eval()


def dmc_model(config=None, **arguments) -> GPTModel:
    config = config or transformer_config(run_config())
    return gpt_model(config, get_dmc_layer_spec(config, DMCConfig(), "local"), **arguments)


def tokens(length: int, batch: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(5)).to(device())
    return ids, torch.arange(length, device=device()).expand(batch, -1)


def test_every_field_of_megatron_core_is_sorted_once():
    names = {field.name for field in dataclasses.fields(TransformerConfig)}
    unsorted = names - table.HONOURED - table.IRRELEVANT - set(table.REFUSED)
    assert not unsorted, f"say in megatron/dmc/model/supported.py what becomes of {sorted(unsorted)}"
    lists = [*table.HONOURED, *table.IRRELEVANT, *table.REFUSED]
    assert len(lists) == len(set(lists))


def test_every_argument_of_gpt_model_is_sorted():
    names = {*inspect.signature(GPTModel.__init__).parameters, *inspect.signature(GPTModel.forward).parameters}
    assert not names - {"self"} - set(table.GPT_MODEL_ARGUMENTS)


WRONG = dict(
    multi_latent_attention=True,
    num_moe_experts=4,
    normalization="LayerNorm",
    qk_l2_norm=True,
    attention_output_gate=True,
    attention_dropout=0.1,
    softmax_scale=0.5,
    softmax_type="off-by-one",
    window_size=(4, 0),
    rotary_interleaved=True,
    no_rope_freq=[1, 0],
    mrope_section=[2, 3, 3],
    mtp_num_layers=1,
    fp8="hybrid",
    quant_recipe=object(),
    context_parallel_size=2,
    tensor_parallel_num_weight_shards=2,
    gtp_weight_remat_size=2,
    cuda_graph_impl="local",
)


@pytest.mark.parametrize("name", sorted(table.REFUSED))
def test_refused_by_name_in_the_spec(name):
    config = transformer_config(run_config())
    if not hasattr(config, name):
        pytest.skip("a field of a later megatron-core")
    setattr(config, name, WRONG.get(name, True if None in table.REFUSED[name] else 7))
    with pytest.raises(ValueError, match=f"do not support {name} .*; set it to "):
        get_dmc_layer_spec(config, DMCConfig(), "local")


def test_another_activation_than_swiglu_as_one_function_is_refused():
    config = transformer_config(run_config())
    config.use_te_activation_func, config.activation_func = True, torch.nn.functional.gelu
    with pytest.raises(ValueError, match="do not support use_te_activation_func True .* another activation"):
        get_dmc_layer_spec(config, DMCConfig(), "local")


def test_refused_late_all_the_same():
    """A configuration that is changed between the spec and the model."""
    config = transformer_config(run_config())
    spec = get_dmc_layer_spec(config, DMCConfig(), "local")
    config.qk_l2_norm = True
    with pytest.raises(ValueError, match="do not support qk_l2_norm True"):
        gpt_model(config, spec)


def test_multi_latent_attention_is_refused_under_its_name():
    config = MLATransformerConfig(num_layers=2, hidden_size=64, num_attention_heads=4, normalization="RMSNorm")
    with pytest.raises(ValueError, match="do not support multi_latent_attention True"):
        get_dmc_layer_spec(config, DMCConfig(), "local")


def test_more_ranks_than_kv_heads():
    config = transformer_config(run_config())
    config.tensor_model_parallel_size = 4
    with pytest.raises(ValueError, match="tensor_model_parallel_size 4 above num_query_groups 2"):
        get_dmc_layer_spec(config, DMCConfig(), "local")


def test_a_field_of_a_later_version_must_have_its_default(monkeypatch):
    monkeypatch.setattr(table, "IRRELEVANT", table.IRRELEVANT - {"inference_sampling_seed"})
    config = transformer_config(run_config())
    get_dmc_layer_spec(config, DMCConfig(), "local")
    config.inference_sampling_seed = 7
    with pytest.raises(ValueError, match="do not know what inference_sampling_seed 7 does.*leave it at 42"):
        get_dmc_layer_spec(config, DMCConfig(), "local")


def test_fields_of_a_subclass_are_its_own():
    """Megatron-Bridge's providers hold the model's other arguments too."""

    @dataclasses.dataclass
    class Provider(TransformerConfig):
        vocab_size: int = 7

    config = Provider(num_layers=2, hidden_size=64, num_attention_heads=4, attention_dropout=0, normalization="RMSNorm")
    get_dmc_layer_spec(config, DMCConfig(), "local")


# What only the forward pass sees


@pytest.mark.parametrize("scaled", [dict(), dict(yarn_mscale=1.0, yarn_mscale_all_dim=0.1)])
@torch.no_grad()
def test_yarn_in_a_stock_gpt_model(scaled):
    config = transformer_config(run_config())
    yarn = dict(yarn_rotary_scaling_factor=8.0, yarn_original_max_position_embeddings=32, yarn_beta_fast=32.0)
    yarn |= dict(yarn_beta_slow=1.0, yarn_mscale=None, yarn_mscale_all_dim=None)
    for name, value in {**yarn, "yarn_correction_range_round_to_int": True, **scaled}.items():
        setattr(config, name, value)
    ours = dmc_model(config, position_embedding_type="yarn")
    config = copy.copy(config)
    config.use_te_activation_func = False  # for which the stock layers need Transformer Engine
    stock = gpt_model(config, get_gpt_layer_local_spec(normalization="RMSNorm"), position_embedding_type="yarn")
    stock.load_state_dict(ours.state_dict())
    ids, positions = tokens(50)
    bias = {"attention_bias": DMCStep(compress=False)}
    found = ours(ids, positions, attention_mask=None, extra_block_kwargs=bias)
    wanted = stock(ids, positions, attention_mask=None)
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    ours.decoder.layers[0].self_attention.rotary_factor = 1.0
    without = ours(ids, positions, attention_mask=None, extra_block_kwargs=bias)
    assert (without - wanted).abs().max() > 1e-3 * wanted.abs().max()


@torch.no_grad()
def test_a_mask_is_causal_or_refused():
    model, (ids, positions) = dmc_model(), tokens(12)
    causal = torch.ones(1, 1, 12, 12, dtype=torch.bool, device=device()).triu(1)  # True: masked out
    wanted = model(ids, positions, attention_mask=None)
    assert torch.equal(model(ids, positions, attention_mask=causal.expand(2, -1, -1, -1)), wanted)
    documents = causal.clone()
    documents[..., 5:, :5] = True
    padding = torch.zeros(2, 1, 1, 12, dtype=torch.bool, device=device())
    for mask in (documents, padding, causal.float(), torch.zeros_like(causal)):
        with pytest.raises(ValueError, match="attention_mask of shape .* that is not the causal one"):
            model(ids, positions, attention_mask=mask)


def test_mrope_is_refused():
    attention = dmc_model().decoder.layers[0].self_attention
    hidden, angles = torch.zeros(8, 2, 64, device=device()), torch.zeros(8, 2, 1, 16, device=device())
    with pytest.raises(ValueError, match=r"rotary_pos_emb has angles of its own for each of 2 sequences \(mrope\)"):
        attention(hidden, None, rotary_pos_emb=angles)


@pytest.mark.parametrize(
    "embedding",
    [dict(position_embedding_type="learned_absolute"), dict(position_embedding_type="rope", rotary_percent=0.5)],
)
def test_positions_must_be_rotary(embedding):
    with pytest.raises(ValueError, match="rotary embeddings of all 16 channels"):
        dmc_model(**embedding)(*tokens(8), attention_mask=None)


def test_no_inference_no_packing_and_no_other_bias():
    attention = dmc_model().decoder.layers[0].self_attention
    hidden = torch.zeros(8, 1, 64, device=device())
    for name in ("inference_context", "packed_seq_params", "key_value_states", "rotary_pos_cos"):
        with pytest.raises(ValueError, match=f"{name}: it trains and evaluates whole sequences"):
            attention(hidden, None, **{name: object()})
    with pytest.raises(ValueError, match="attention_bias is a Tensor; DMC attention takes a DMCStep"):
        attention(hidden, None, attention_bias=hidden)
