"""What a model family is called in Hugging Face and in Megatron: configuration keys and tensor names, as data.

A family is one :class:`Family`; adding one is adding a table to :data:`FAMILIES` (docs/extending.md). Whatever of a
``config.json`` no table knows is refused by name: an option that is dropped silently gives a model that talks nonsense.
No torch, no Megatron.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Optional

from megatron.dmc.config import DMCConfig, ModelConfig

DMC_FORMAT_VERSION = 1
DMC_MODEL_TYPE = "dmc"
_DMC_KEYS = ("base_model_type", "decision_bias", "window", "importance_epsilon", "stage")
DMC_ARCHITECTURE = "DMCForCausalLM"
DMC_AUTO_MAP = {"AutoConfig": "configuration_dmc.DMCConfig", "AutoModelForCausalLM": "modeling_dmc.DMCForCausalLM"}
COMPRESSED_STAGES = ("retrofit", "finetune")
"""Stages whose models merge tokens; what is exported from others reads like a plain model's cache."""

Transform = Literal["same", "qkv", "gate_up", "vocabulary"]
"""How Hugging Face tensors make up Megatron's.

same: one to one. qkv: q, k, v interleaved by KV head ([g queries, key, value] of each, head_dim rows apiece). gate_up:
gate above up. vocabulary: one to one, with rows of zeros up to ``padded_vocab_size``.
"""


@dataclass(frozen=True)
class TensorRule:
    """One Megatron parameter (its name in a ``torch_dist`` checkpoint, where layers are stacked) and what it is made
    of.
    """

    megatron: str
    hf: tuple[str, ...]
    """``{layer}`` stands for the layer's number."""
    transform: Transform = "same"
    shapes: tuple[str, ...] = ("h",)
    """Of every tensor in ``hf``: V vocabulary, h hidden, F feed-forward, q and k: query and KV heads x head dimension,
    D.
    """
    split: Optional[int] = None
    """The dimension that tensor parallelism cuts; None: every rank has all of it."""
    when: Optional[str] = None
    """Only in models with this ``ModelConfig`` switch."""

    @property
    def per_layer(self) -> bool:
        return "{layer}" in self.hf[0]


_ATTENTION, _MLP = "decoder.layers.self_attention.", "decoder.layers.mlp."
_HF_ATTENTION, _HF_MLP = "model.layers.{layer}.self_attn.", "model.layers.{layer}.mlp."
LLAMA_TENSORS = (
    TensorRule("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), "vocabulary", ("V h",), 0),
    TensorRule(_ATTENTION + "linear_qkv.layer_norm_weight", ("model.layers.{layer}.input_layernorm.weight",)),
    TensorRule(
        _ATTENTION + "linear_qkv.weight",
        tuple(_HF_ATTENTION + f"{x}_proj.weight" for x in "qkv"),
        "qkv",
        ("q h", "k h", "k h"),
        0,
    ),
    TensorRule(
        _ATTENTION + "linear_qkv.bias",
        tuple(_HF_ATTENTION + f"{x}_proj.bias" for x in "qkv"),
        "qkv",
        ("q", "k", "k"),
        0,
        when="add_qkv_bias",
    ),
    TensorRule(
        _ATTENTION + "q_layernorm.weight", (_HF_ATTENTION + "q_norm.weight",), shapes=("D",), when="qk_layernorm"
    ),
    TensorRule(
        _ATTENTION + "k_layernorm.weight", (_HF_ATTENTION + "k_norm.weight",), shapes=("D",), when="qk_layernorm"
    ),
    TensorRule(_ATTENTION + "linear_proj.weight", (_HF_ATTENTION + "o_proj.weight",), shapes=("h q",), split=1),
    TensorRule(_MLP + "linear_fc1.layer_norm_weight", ("model.layers.{layer}.post_attention_layernorm.weight",)),
    TensorRule(
        _MLP + "linear_fc1.weight",
        (_HF_MLP + "gate_proj.weight", _HF_MLP + "up_proj.weight"),
        "gate_up",
        ("F h", "F h"),
        0,
    ),
    TensorRule(_MLP + "linear_fc2.weight", (_HF_MLP + "down_proj.weight",), shapes=("h F",), split=1),
    TensorRule("decoder.final_layernorm.weight", ("model.norm.weight",)),
    TensorRule(
        "output_layer.weight", ("lm_head.weight",), "vocabulary", ("V h",), 0, "untie_embeddings_and_output_weights"
    ),
)


@dataclass(frozen=True)
class Family:
    """One model family, keyed by Hugging Face's ``model_type``."""

    model_type: str
    architecture: str
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """What transformers' config class assumes for keys that config.json leaves out."""
    switches: Mapping[str, bool] = field(default_factory=dict)
    """``ModelConfig`` fields that are fixed by the family."""
    required: Mapping[str, tuple] = field(default_factory=dict)
    """Keys that change the computation, and the values that are supported."""
    inert: tuple[str, ...] = ()
    """Keys that change nothing at evaluation."""
    tensors: tuple[TensorRule, ...] = LLAMA_TENSORS
    dropped: tuple[str, ...] = (".rotary_emb.inv_freq",)
    """Endings of tensors in old checkpoints that are computed, not learned."""


_LLAMA_DEFAULTS = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "rope_theta": 10000.0}
_LLAMA_REQUIRED = {"hidden_act": ("silu",), "attention_bias": (False,), "mlp_bias": (False,)}
FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family(
            "llama",
            "LlamaForCausalLM",
            {**_LLAMA_DEFAULTS, "max_position_embeddings": 2048},
            required={**_LLAMA_REQUIRED, "pretraining_tp": tuple(range(1, 65))},
        ),  # slices of one matrix product
        Family(
            "mistral",
            "MistralForCausalLM",
            {**_LLAMA_DEFAULTS, "num_key_value_heads": 8, "sliding_window": 4096, "max_position_embeddings": 131072},
            required=_LLAMA_REQUIRED,
        ),
        Family(
            "qwen2",
            "Qwen2ForCausalLM",
            {
                **_LLAMA_DEFAULTS,
                "num_key_value_heads": 32,
                "use_sliding_window": False,
                "max_position_embeddings": 32768,
            },
            switches={"add_qkv_bias": True},
            required=_LLAMA_REQUIRED,
        ),
        Family(
            "qwen3",
            "Qwen3ForCausalLM",
            {
                **_LLAMA_DEFAULTS,
                "num_key_value_heads": 32,
                "head_dim": 128,
                "use_sliding_window": False,
                "max_position_embeddings": 32768,
            },
            switches={"qk_layernorm": True},
            required=_LLAMA_REQUIRED,
        ),
    )
}

# HF key -> ModelConfig field.
_SIZES = {
    "num_hidden_layers": "num_layers",
    "hidden_size": "hidden_size",
    "intermediate_size": "ffn_hidden_size",
    "num_attention_heads": "num_attention_heads",
    "num_key_value_heads": "num_query_groups",
    "head_dim": "kv_channels",
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_position_embeddings",
    "rms_norm_eps": "norm_epsilon",
    "initializer_range": "init_method_std",
}
_OPTIONAL = (
    "num_key_value_heads",
    "head_dim",
    "initializer_range",
)  # transformers derives them, or they do not compute
# Keys that are read below, and keys that say nothing about what the model computes at evaluation.
_READ = {
    "model_type",
    "architectures",
    "tie_word_embeddings",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "sliding_window",
    "use_sliding_window",
    "max_window_layers",
    "layer_types",
    "attention_dropout",
    "dmc",
    "auto_map",
}
_INERT = {
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "unk_token_id",
    "sep_token_id",
    "decoder_start_token_id",
    "torch_dtype",
    "dtype",
    "transformers_version",
    "use_cache",
    "_name_or_path",
    "name_or_path",
    "output_attentions",
    "output_hidden_states",
    "return_dict",
    "return_dict_in_generate",
    "torchscript",
    "chunk_size_feed_forward",
    "id2label",
    "label2id",
    "problem_type",
    "_attn_implementation",
    "_attn_implementation_autoset",
    "attn_implementation",
    "is_encoder_decoder",
    "is_decoder",
    "max_sequence_length",
    "model_max_length",
    "tokenizer_class",
    "task_specific_params",
    "unsloth_version",
    "unsloth_fixed",
    "keys_to_ignore_at_inference",
    "max_length",
    "do_sample",
    "temperature",
    "top_p",
    "top_k",
}


def base_config(config: dict) -> dict:
    """The plain family's ``config.json`` inside an exported DMC one; a plain one as it is."""
    if "dmc" not in config:
        return config
    plain = {k: v for k, v in config.items() if k not in ("dmc", "auto_map")}
    family = config["dmc"].get("base_model_type")
    if family not in FAMILIES:
        raise ValueError(f"config.json: dmc.base_model_type is {family!r}; known families: {', '.join(FAMILIES)}")
    plain["model_type"], plain["architectures"] = family, [FAMILIES[family].architecture]
    return plain


def family_of(config: dict) -> Family:
    """Raises ``ValueError`` for a ``model_type`` that no table describes."""
    kind = base_config(config).get("model_type")
    if kind not in FAMILIES:
        raise ValueError(f"config.json: model_type {kind!r} is not supported; known families: {', '.join(FAMILIES)}")
    family = FAMILIES[kind]
    named = base_config(config).get("architectures") or [family.architecture]
    if family.architecture not in named:
        raise ValueError(
            f"config.json: architectures is {named}; only {family.architecture} has the weights of a language model"
        )
    return family


def _rope(config: dict, defaults: Mapping[str, Any]) -> tuple[float, Optional[dict]]:
    """(base, scaling) from transformers 4's rope_theta + rope_scaling, or transformers 5's rope_parameters."""
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    base = rope.pop("rope_theta", None) or config.get("rope_theta") or defaults["rope_theta"]
    kind = rope.pop("rope_type", None) or rope.pop("type", None) or "default"
    rope.pop("type", None)
    if rope.pop("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError("config.json: rope partial_rotary_factor is not supported; the whole head must be rotated")
    if kind == "default":
        if rope:
            raise ValueError(
                f"config.json: rope parameters {sorted(rope)} without a rope_type; name it, or remove them"
            )
        return float(base), None
    if kind != "llama3":
        raise ValueError(f"config.json: rope_type {kind!r} is not supported; default and llama3 are")
    return float(base), {"rope_type": kind, **rope}


def _check_window(config: dict, family: Family, longest: int) -> None:
    window = config.get("sliding_window", family.defaults.get("sliding_window"))
    if window is None or not config.get("use_sliding_window", family.defaults.get("use_sliding_window", True)):
        return
    if "use_sliding_window" in family.defaults or window < longest:
        raise ValueError(
            f"config.json: sliding_window {window} is not supported with max_position_embeddings {longest}; up to "
            f"{window} tokens the model is the same without it: set max_position_embeddings to {window}, or "
            "sliding_window to null"
        )


def from_hf_config(config: dict) -> ModelConfig:
    """Megatron's sizes and switches from a ``config.json``.

    Args:
        config: of a plain family, or of an exported DMC model.

    Raises:
        ValueError: an unknown family, a missing key, or a key or value that is not understood, by its name.
    """
    family, config = family_of(config), base_config(config)
    known = {*_SIZES, *_READ, *_INERT, *family.required, *family.inert}
    unknown = sorted(k for k in config if k not in known and config[k] is not None)
    if unknown:
        raise ValueError(
            f"config.json: {', '.join(f'{k} = {config[k]!r}' for k in unknown)}: not understood for model_type "
            f"{family.model_type}; if it does not change what the model computes, remove it"
        )
    for key, values in family.required.items():
        value = config.get(key, family.defaults.get(key, values[0]))
        if value is not None and value not in values:
            raise ValueError(f"config.json: {key} is {value!r}; supported: {', '.join(map(repr, values))}")
    if any(kind != "full_attention" for kind in config.get("layer_types") or ()):
        raise ValueError(
            f"config.json: layer_types {sorted(set(config['layer_types']))}: only full_attention is supported"
        )
    values: dict[str, Any] = dict(family.switches)
    for key, name in _SIZES.items():
        value = config.get(key, family.defaults.get(key))
        if value is None and key not in _OPTIONAL:
            raise ValueError(f"config.json: {key} is missing")
        if value is not None:
            if not isinstance(value, (int, float)) or isinstance(value, bool):
                raise ValueError(f"config.json: {key} is {value!r}; it must be a number")
            values[name] = value
    values["rotary_base"], values["rope_scaling"] = _rope(config, family.defaults)
    tied = config.get("tie_word_embeddings", family.defaults["tie_word_embeddings"])
    model = ModelConfig(**values, untie_embeddings_and_output_weights=not tied)
    _check_window(config, family, model.max_position_embeddings)
    try:
        model.check()
    except ValueError as error:
        raise ValueError(f"config.json: {error}") from None
    return model


def dmc_from_hf_config(config: dict) -> Optional[DMCConfig]:
    """The ``dmc`` block of an exported model; None for a plain one. Raises ``ValueError`` for a newer format or a
    damaged block.
    """
    if "dmc" not in config:
        return None
    block = config["dmc"]
    if not isinstance(block, dict):
        raise ValueError(f"config.json: dmc is {block!r}; it must be an object; export the model again")
    if block.get("format_version") != DMC_FORMAT_VERSION:
        raise ValueError(
            f"config.json: dmc.format_version is {block.get('format_version')!r}; this version reads "
            f"{DMC_FORMAT_VERSION}"
        )
    missing = [key for key in _DMC_KEYS if key not in block]
    if missing:
        raise ValueError(f"config.json: dmc.{missing[0]} is missing; the block needs {', '.join(_DMC_KEYS)}")
    names = ("decision_bias", "window", "importance_epsilon")
    dmc = DMCConfig(method=block.get("method", "dmc"), **{name: block[name] for name in names})
    dmc.check()
    return dmc


def to_hf_config(model: ModelConfig, dtype: str) -> dict:
    """A ``config.json`` for a model that never had one. Raises ``ValueError`` when no family has its switches.

    Args:
        dtype: of the weights, e.g. "bfloat16".
    """
    for family in FAMILIES.values():
        switches = {name: family.switches.get(name, False) for name in ("add_qkv_bias", "qk_layernorm")}
        if all(getattr(model, name) == value for name, value in switches.items()):
            break
    else:
        raise ValueError(f"no model family has add_qkv_bias {model.add_qkv_bias} and qk_layernorm {model.qk_layernorm}")
    config: dict[str, Any] = {"architectures": [family.architecture], "model_type": family.model_type}
    config |= {key: getattr(model, name) for key, name in _SIZES.items()}
    config |= {
        "head_dim": model.head_dim,
        "num_key_value_heads": model.kv_heads,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "rope_theta": model.rotary_base,
        "tie_word_embeddings": not model.untie_embeddings_and_output_weights,
        "torch_dtype": dtype,
        "use_cache": True,
    }
    if model.rope_scaling:
        config["rope_scaling"] = dict(model.rope_scaling)
    if family.model_type == "llama":
        config |= {"attention_bias": False, "mlp_bias": False}
    # The assumption of every later reader: nothing of the model is lost in its config.json.
    explicit = dict(num_query_groups=model.kv_heads, kv_channels=model.head_dim)
    same = dict(make_vocab_size_divisible_by=model.make_vocab_size_divisible_by)
    assert dataclasses.replace(from_hf_config(config), **same) == dataclasses.replace(model, **explicit)
    return config


def changed_sizes(before: ModelConfig, now: ModelConfig) -> dict[str, Any]:
    """Keys of ``config.json`` whose values a run has changed (a longer context, say), with the new ones."""
    return {key: getattr(now, name) for key, name in _SIZES.items() if getattr(before, name) != getattr(now, name)}


def rules(family: Family, model: ModelConfig) -> list[TensorRule]:
    """The tensors that a model of these sizes and switches has."""
    return [rule for rule in family.tensors if rule.when is None or getattr(model, rule.when)]


def hf_shapes(family: Family, model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the model in Hugging Face's form, layer by layer."""
    return {
        name.format(layer=layer): symbols_to_shape(symbols, model)
        for rule, layer in in_order(family, model)
        for name, symbols in zip(rule.hf, rule.shapes, strict=True)
    }


def symbols_to_shape(symbols: str, model: ModelConfig) -> tuple[int, ...]:
    """ "q h" of :attr:`TensorRule.shapes` as numbers."""
    d = model.head_dim
    sizes = {
        "V": model.vocab_size,
        "h": model.hidden_size,
        "F": model.ffn_hidden_size,
        "D": d,
        "q": model.num_attention_heads * d,
        "k": model.kv_heads * d,
    }
    return tuple(sizes[symbol] for symbol in symbols.split())


def in_order(family: Family, model: ModelConfig) -> Iterator[tuple[TensorRule, Optional[int]]]:
    """(rule, layer) in the order in which a forward pass meets them; layer None outside the layers."""
    found = rules(family, model)
    first = next(i for i, rule in enumerate(found) if rule.per_layer)
    yield from ((rule, None) for rule in found[:first])
    for layer in range(model.num_layers):
        yield from ((rule, layer) for rule in found if rule.per_layer)
    yield from ((rule, None) for rule in found[first:] if not rule.per_layer)
