"""Tables of the model families that are known. A new family is one more entry of :data:`FAMILIES`."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Optional

from megatron.dmc.checkpoint.mapping.rules import TensorRule
from megatron.dmc.checkpoint.mapping.transforms import QKV, GatedMLP, Vocabulary
from megatron.dmc.config import DMCConfig, ModelConfig

_ATTENTION, _MLP = "decoder.layers.self_attention.", "decoder.layers.mlp."
_HF = "model.layers.{layer}."
_HF_ATTENTION, _HF_MLP = _HF + "self_attn.", _HF + "mlp."
_QKV_WEIGHTS, _QKV_BIASES = (tuple(f"{_HF_ATTENTION}{x}_proj.{kind}" for x in "qkv") for kind in ("weight", "bias"))
_GATE_UP = (_HF_MLP + "gate_proj.weight", _HF_MLP + "up_proj.weight")
_QK_NORM, _UNTIED = "qk_layernorm", "untie_embeddings_and_output_weights"
LLAMA_TENSORS = (
    TensorRule("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), Vocabulary(), ("V h",), 0),
    TensorRule(_ATTENTION + "linear_qkv.layer_norm_weight", (_HF + "input_layernorm.weight",)),
    TensorRule(_ATTENTION + "linear_qkv.weight", _QKV_WEIGHTS, QKV(), ("q h", "k h", "k h"), 0),
    TensorRule(_ATTENTION + "linear_qkv.bias", _QKV_BIASES, QKV(), ("q", "k", "k"), 0, "add_qkv_bias"),
    TensorRule(_ATTENTION + "q_layernorm.weight", (_HF_ATTENTION + "q_norm.weight",), shapes=("D",), when=_QK_NORM),
    TensorRule(_ATTENTION + "k_layernorm.weight", (_HF_ATTENTION + "k_norm.weight",), shapes=("D",), when=_QK_NORM),
    TensorRule(_ATTENTION + "linear_proj.weight", (_HF_ATTENTION + "o_proj.weight",), shapes=("h q",), split=1),
    TensorRule(_MLP + "linear_fc1.layer_norm_weight", (_HF + "post_attention_layernorm.weight",)),
    TensorRule(_MLP + "linear_fc1.weight", _GATE_UP, GatedMLP(), ("F h", "F h"), 0),
    TensorRule(_MLP + "linear_fc2.weight", (_HF_MLP + "down_proj.weight",), shapes=("h F",), split=1),
    TensorRule("decoder.final_layernorm.weight", ("model.norm.weight",)),
    TensorRule("output_layer.weight", ("lm_head.weight",), Vocabulary(), ("V h",), 0, _UNTIED),
)

_ALPHA = "self_attn.dms_proj_alpha"
"""Beginning of the names of an adapter's tensors, as NVIDIA's Model-Optimizer writes them."""


@dataclass(frozen=True)
class Family:
    """One model family, keyed by Hugging Face's ``model_type``."""

    model_type: str
    architecture: str
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Values that transformers' config class assumes for keys that config.json leaves out."""
    switches: Mapping[str, bool] = field(default_factory=dict)
    """``ModelConfig`` fields that are fixed by the family."""
    required: Mapping[str, tuple] = field(default_factory=dict)
    """Keys that change the computation, and the values that are supported."""
    inert: tuple[str, ...] = ()
    """Keys that change nothing at evaluation."""
    tensors: tuple[TensorRule, ...] = LLAMA_TENSORS
    dropped: tuple[str, ...] = (".rotary_emb.inv_freq",)
    """Endings of tensors in old checkpoints that are computed, not learned."""


_DEFAULTS = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "rope_theta": 10000.0}
_QWEN_DEFAULTS = {**_DEFAULTS, "num_key_value_heads": 32, "use_sliding_window": False, "max_position_embeddings": 32768}
_REQUIRED = {"hidden_act": ("silu",), "attention_bias": (False,), "mlp_bias": (False,)}
_FAMILIES = (
    Family(
        "llama",
        "LlamaForCausalLM",
        defaults={**_DEFAULTS, "max_position_embeddings": 2048},
        # pretraining_tp: slices of one matrix product
        required={**_REQUIRED, "pretraining_tp": tuple(range(1, 65))},
    ),
    Family(
        "mistral",
        "MistralForCausalLM",
        defaults={**_DEFAULTS, "num_key_value_heads": 8, "sliding_window": 4096, "max_position_embeddings": 131072},
        required=_REQUIRED,
    ),
    Family("qwen2", "Qwen2ForCausalLM", defaults=_QWEN_DEFAULTS, switches={"add_qkv_bias": True}, required=_REQUIRED),
    Family(
        "qwen3",
        "Qwen3ForCausalLM",
        defaults={**_QWEN_DEFAULTS, "head_dim": 128},
        switches={"qk_layernorm": True},
        required=_REQUIRED,
    ),
)
FAMILIES: dict[str, Family] = {family.model_type: family for family in _FAMILIES}
"""``model_type`` -> family."""


def adapter_rules(dmc: DMCConfig) -> tuple[TensorRule, ...]:
    """Rules of the adapters that decide in a model of these settings; none where none does."""
    if dmc.decision_source != "adapter":
        return ()
    shape = "H h" if dmc.decision_per == "head" else "1 h"
    return (
        TensorRule(_ATTENTION + "dms_proj_alpha_norm.weight", (f"{_HF}{_ALPHA}_norm.weight",)),
        TensorRule(_ATTENTION + "dms_proj_alpha.weight", (f"{_HF}{_ALPHA}.weight",), shapes=(shape,)),
    )


def with_adapters(family: Family, dmc: DMCConfig) -> Family:
    """The family with the adapters that decide in a model of these settings; unchanged where none does."""
    return replace(family, tensors=(*family.tensors, *adapter_rules(dmc)))


def is_adapter(name: str) -> bool:
    """Whether a Hugging Face tensor belongs to a DMS adapter, by its name."""
    return _ALPHA in name


def rules(family: Family, model: ModelConfig) -> list[TensorRule]:
    """Rules of the parameters that a model with these switches has."""
    return [rule for rule in family.tensors if rule.when is None or getattr(model, rule.when)]


def in_order(family: Family, model: ModelConfig) -> Iterator[tuple[TensorRule, Optional[int]]]:
    """(rule, layer) in the order in which a forward pass meets them; layer None outside the layers."""
    found = rules(family, model)
    first = next(i for i, rule in enumerate(found) if rule.per_layer)
    yield from ((rule, None) for rule in found[:first])
    for layer in range(model.num_layers):
        yield from ((rule, layer) for rule in found if rule.per_layer)
    yield from ((rule, None) for rule in found[first:] if not rule.per_layer)


def hf_shapes(family: Family, model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every Hugging Face tensor of the model, layer by layer."""
    return {
        name: shape
        for rule, layer in in_order(family, model)
        for name, shape in zip(rule.names(layer), rule.hf_shapes(model), strict=True)
    }
