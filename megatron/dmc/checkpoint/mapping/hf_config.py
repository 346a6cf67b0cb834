"""``config.json`` of Hugging Face to our configuration and back, the ``dmc`` block included."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Optional

from megatron.dmc.checkpoint.manifest import Manifest
from megatron.dmc.checkpoint.mapping.families import FAMILIES, Family
from megatron.dmc.checkpoint.mapping.rope import yarn_context_length, yarn_scaling
from megatron.dmc.config import DMCConfig, ModelConfig, RunConfig, build

DMC_FORMAT_VERSION = 1
DMC_MODEL_TYPE = "dmc"
_DMC_KEYS = ("base_model_type", "decision_bias", "window", "importance_epsilon", "stage")
DMC_ARCHITECTURE = "DMCForCausalLM"
DMC_AUTO_MAP = {"AutoConfig": "configuration_dmc.DMCConfig", "AutoModelForCausalLM": "modeling_dmc.DMCForCausalLM"}
COMPRESSED_STAGES = ("retrofit", "finetune")
"""Stages whose models merge tokens; what is exported from others reads like a plain model's cache."""

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
_OPTIONAL = ("num_key_value_heads", "head_dim", "initializer_range")
"""Keys that transformers derives, or that do not compute."""
_READ = set(
    "model_type architectures tie_word_embeddings rope_theta rope_scaling rope_parameters sliding_window "
    "use_sliding_window max_window_layers layer_types attention_dropout dmc auto_map".split()
)
"""Keys that are read below."""
_INERT = set(
    "bos_token_id eos_token_id pad_token_id unk_token_id sep_token_id decoder_start_token_id torch_dtype dtype "
    "transformers_version use_cache _name_or_path name_or_path output_attentions output_hidden_states return_dict "
    "return_dict_in_generate torchscript chunk_size_feed_forward id2label label2id problem_type _attn_implementation "
    "_attn_implementation_autoset attn_implementation is_encoder_decoder is_decoder max_sequence_length "
    "model_max_length tokenizer_class task_specific_params unsloth_version unsloth_fixed keys_to_ignore_at_inference "
    "max_length do_sample temperature top_p top_k".split()
)
"""Keys that say nothing about what a model computes at evaluation."""


def base_config(config: dict) -> dict:
    """The plain family's ``config.json`` inside an exported DMC one; a plain one as it is."""
    if "dmc" not in config:
        return config
    plain = {k: v for k, v in config.items() if k not in ("dmc", "auto_map")}
    family = _dmc_block(config).get("base_model_type")
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


def _rope(config: dict, defaults: Mapping[str, Any], longest: int) -> tuple[float, Optional[dict]]:
    """(base, scaling) from transformers 4's rope_theta + rope_scaling, or transformers 5's rope_parameters.

    Args:
        longest: max_position_embeddings.
    """
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
    if kind == "yarn":
        return float(base), yarn_scaling(rope, longest)
    if kind != "llama3":
        raise ValueError(f"config.json: rope_type {kind!r} is not supported; default, llama3 and yarn are")
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
    _check_keys(config, family)
    values = {**family.switches, **_read_sizes(config, family)}
    longest = values["max_position_embeddings"]
    values["rotary_base"], values["rope_scaling"] = _rope(config, family.defaults, longest)
    if values["rope_scaling"] and values["rope_scaling"]["rope_type"] == "yarn":
        values["max_position_embeddings"] = yarn_context_length(values["rope_scaling"], longest)
    tied = config.get("tie_word_embeddings", family.defaults["tie_word_embeddings"])
    model = ModelConfig(**values, untie_embeddings_and_output_weights=not tied)
    _check_window(config, family, model.max_position_embeddings)
    try:
        model.check()
    except ValueError as error:
        raise ValueError(f"config.json: {error}") from None
    return model


def _check_keys(config: dict, family: Family) -> None:
    """Raise ``ValueError`` for a key that no table knows, or a value that the family does not support."""
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


def _read_sizes(config: dict, family: Family) -> dict[str, Any]:
    """Fields of ``ModelConfig`` that stand in ``config.json`` as numbers."""
    sizes: dict[str, Any] = {}
    for key, name in _SIZES.items():
        value = config.get(key, family.defaults.get(key))
        if value is None and key not in _OPTIONAL:
            raise ValueError(f"config.json: {key} is missing")
        if value is not None:
            if not isinstance(value, (int, float)) or isinstance(value, bool):
                raise ValueError(f"config.json: {key} is {value!r}; it must be a number")
            sizes[name] = value
    return sizes


def dmc_from_hf_config(config: dict) -> Optional[DMCConfig]:
    """The ``dmc`` block of an exported model; None for a plain one. Raises ``ValueError`` for a newer format or a
    damaged block.
    """
    if "dmc" not in config:
        return None
    block = _dmc_block(config)
    if block.get("format_version") != DMC_FORMAT_VERSION:
        raise ValueError(
            f"config.json: dmc.format_version is {block.get('format_version')!r}; this version reads "
            f"{DMC_FORMAT_VERSION}"
        )
    missing = [key for key in _DMC_KEYS if key not in block]
    if missing:
        raise ValueError(f"config.json: dmc.{missing[0]} is missing; the block needs {', '.join(_DMC_KEYS)}")
    names = ("method", "decision_bias", "window", "importance_epsilon")
    dmc = build(DMCConfig, {name: block[name] for name in names if name in block}, "config.json: dmc.")
    dmc.check()
    return dmc


def _dmc_block(config: dict) -> dict:
    block = config["dmc"]
    if not isinstance(block, dict):
        raise ValueError(f"config.json: dmc is {block!r}; it must be an object; export the model again")
    return block


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
    same = dict(make_vocab_size_divisible_by=model.make_vocab_size_divisible_by)
    assert dataclasses.replace(from_hf_config(config), **same) == _comparable(model, model)
    return config


def changed_config(original: dict, model: ModelConfig, dtype: str) -> dict:
    """The plain ``config.json`` that a lineage began with, with what training has changed (a longer context, say).

    Raises:
        ValueError: a change that ``config.json`` cannot express, by name.
    """
    config = dict(base_config(original))
    if "dtype" in config or "torch_dtype" in config:
        config["dtype" if "dtype" in config else "torch_dtype"] = dtype
    before = from_hf_config(config)
    changed = {key: name for key, name in _SIZES.items() if getattr(before, name) != getattr(model, name)}
    config |= {key: getattr(model, name) for key, name in changed.items()}
    now, wanted = _comparable(from_hf_config(config), model), _comparable(model, model)
    if now != wanted:
        odd = [f.name for f in dataclasses.fields(model) if getattr(now, f.name) != getattr(wanted, f.name)]
        raise ValueError(
            f"{', '.join(odd)}: the run changed what config.json of the original model says; this cannot be exported"
        )
    return config


def _comparable(config: ModelConfig, model: ModelConfig) -> ModelConfig:
    """``config`` with ``model``'s values where ``config.json`` may leave them out or does not hold them."""
    return dataclasses.replace(
        config,
        make_vocab_size_divisible_by=model.make_vocab_size_divisible_by,
        num_query_groups=model.kv_heads,
        kv_channels=model.head_dim,
    )


def dmc_config(config: dict, run: RunConfig, manifest: Manifest) -> dict:
    """``config.json`` of a retrofitted model: its own names, so that a plain loader refuses it, and the ``dmc`` block.

    Args:
        config: of the plain family.
    """
    block = {
        "format_version": DMC_FORMAT_VERSION,
        "base_model_type": config["model_type"],
        "decision_bias": run.dmc.decision_bias,
        "window": run.dmc.window,
        "importance_epsilon": run.dmc.importance_epsilon,
        "add_qkv_bias": run.model.add_qkv_bias,
        "qk_layernorm": run.model.qk_layernorm,
        "stage": manifest.stage,
        "step": manifest.iteration,
        "target_cr": manifest.target_cr,
        "measured_cr": manifest.measured_cr,
    }
    if run.dmc.method != "dmc":
        block["method"] = run.dmc.method
    own = {"architectures": [DMC_ARCHITECTURE], "model_type": DMC_MODEL_TYPE, "auto_map": DMC_AUTO_MAP}
    return {**config, **own, "dmc": block}
