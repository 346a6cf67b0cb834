"""``config.json`` of Hugging Face to our configuration and back, the ``dmc`` block included."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Optional

from megatron.dmc.checkpoint.fields import INT32, Fields
from megatron.dmc.checkpoint.manifest import Manifest
from megatron.dmc.checkpoint.mapping.config_keys import INERT, NEUTRAL, check_neutral, is_one_of, named
from megatron.dmc.checkpoint.mapping.families import FAMILIES, Family, with_adapters
from megatron.dmc.config import COMPRESSING, DMCConfig, ModelConfig, RunConfig
from megatron.dmc.config.checks import shown

DMC_FORMAT_VERSION = 1
DMC_MODEL_TYPE = "dmc"
_DMC_KEYS = ("base_model_type", "decision_bias", "window", "importance_epsilon", "stage")
_DECISION = {"source": "key", "about": "previous", "per": "head"}
"""Texts that describe the decision (``DMCConfig.decision_*``), and what they are in a block that leaves them out."""
ADAPTER_MODEL_TYPE = "dmc_adapter"
"""``model_type`` of a directory with the adapters of a DMS model alone; no other loader knows it."""
DMC_ARCHITECTURE = "DMCForCausalLM"
DMC_AUTO_MAP = {"AutoConfig": "configuration_dmc.DMCConfig", "AutoModelForCausalLM": "modeling_dmc.DMCForCausalLM"}
COMPRESSED_STAGES = COMPRESSING
"""Stages whose models merge tokens; what is exported from others reads like a plain model's cache."""
DTYPES = ("float32", "float16", "bfloat16")
"""Types of weights, as config.json names them."""

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
_MOST = {"num_hidden_layers": 10_000}
"""Bounds of sizes that loops run over; other sizes are bounded by the weights that must have them."""
_LONGEST_WINDOW, _LARGEST_CR = 65_536, 10_000
"""Bounds of what an exported model says of itself: tokens, and tokens / slots."""
_READ = set(
    "model_type architectures tie_word_embeddings rope_theta rope_scaling rope_parameters sliding_window "
    "use_sliding_window max_window_layers layer_types attention_dropout dmc auto_map".split()
)
"""Keys that are read below."""

_YARN_DEFAULT_IF_ZERO = ("beta_fast", "beta_slow", "mscale", "mscale_all_dim")
_YARN_INERT = ("finetuned",)
"""Said of a model by its authors (Yarn-Llama-2); transformers does not read it."""


def _fields(config: dict) -> Fields:
    return Fields(config, "config.json: ")


def base_config(config: dict) -> dict:
    """The plain family's ``config.json`` inside an exported DMC one; a plain one as it is."""
    if "dmc" not in config:
        return config
    plain = {k: v for k, v in config.items() if k not in ("dmc", "auto_map")}
    family = _block_fields(config).text("base_model_type")
    if family not in FAMILIES:
        raise ValueError(f"config.json: dmc.base_model_type is {shown(family)}; known families: {', '.join(FAMILIES)}")
    plain["model_type"], plain["architectures"] = family, [FAMILIES[family].architecture]
    return plain


def family_of(config: dict) -> Family:
    """Family of a model, with the adapters of its ``dmc`` block. Raises ``ValueError`` for a ``model_type`` that no
    table describes, and for a damaged block.
    """
    family = _plain_family(config)
    return with_adapters(family, dmc_block(config).dmc) if "dmc" in config else family  # type: ignore[union-attr]


def _plain_family(config: dict) -> Family:
    fields = _fields(base_config(config))
    kind = fields.text("model_type")
    if kind not in FAMILIES:
        raise ValueError(
            f"config.json: model_type {shown(kind)} is not supported; known families: {', '.join(FAMILIES)}"
        )
    family = FAMILIES[kind]
    architectures = fields.texts("architectures") or [family.architecture]
    if family.architecture not in architectures:
        raise ValueError(
            f"config.json: architectures is {shown(architectures)}; only {family.architecture} has the weights of a "
            "language model"
        )
    return family


def model_dtype(config: dict) -> Optional[str]:
    """Type of the weights that ``config.json`` names, one of :data:`DTYPES`; None when it names none.

    Raises:
        ValueError: another type.
    """
    fields = _fields(config)
    key = "dtype" if fields.get("dtype") is not None else "torch_dtype"
    name = fields.text(key, "auto").removeprefix("torch.")
    if name not in (*DTYPES, "auto"):
        fields.refuse(key, f"one of {', '.join(DTYPES)}")
    return None if name == "auto" else name


def _rope(fields: Fields, defaults: Mapping[str, Any], longest: int) -> tuple[float, Optional[dict]]:
    """(base, scaling) from transformers 4's rope_theta + rope_scaling, or transformers 5's rope_parameters.

    Args:
        longest: max_position_embeddings.
    """
    given = [fields.object(key) for key in ("rope_parameters", "rope_scaling")]
    rope = next((found for found in given if found is not None and found.content), Fields({}, "config.json: rope "))
    base = rope.number("rope_theta", fields.number("rope_theta", defaults["rope_theta"], above=0), above=0)
    kind = rope.text("rope_type") or rope.text("type") or "default"
    if rope.number("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError("config.json: rope partial_rotary_factor is not supported; the whole head must be rotated")
    own = ("rope_theta", "rope_type", "type", "partial_rotary_factor")
    scaling = {key: value for key, value in rope.content.items() if key not in own and value is not None}
    if kind == "linear" and scaling == {"factor": 1}:
        return base, None
    if kind == "default":
        if scaling:
            raise ValueError(
                f"config.json: rope parameters {shown(sorted(scaling))} without a rope_type; name it, or remove them"
            )
        return base, None
    if kind not in ("llama3", "yarn"):
        raise ValueError(f"config.json: rope_type {shown(kind)} is not supported; default, llama3 and yarn are")
    for key in scaling:
        if key in ("truncate", "finetuned"):
            rope.flag(key)
        else:
            rope.number(key, least=0, most=INT32)
    if kind == "yarn":
        return base, _yarn_scaling({key: value for key, value in rope.content.items() if key not in own}, longest)
    return base, {"rope_type": kind, **scaling}


def _yarn_scaling(rope: Mapping[str, Any], max_position_embeddings: int) -> dict[str, Any]:
    """``ModelConfig.rope_scaling`` of YaRN (arXiv 2309.00071) from the rope parameters without theta and the type.

    As transformers reads it (4.57.6 and 5.23.0, ``modeling_rope_utils``): what is left out, null or (some keys) 0
    has transformers' default; ``original_max_position_embeddings`` has ``max_position_embeddings``.
    """
    scaling = {key: value for key, value in rope.items() if key not in _YARN_INERT and value is not None}
    scaling = {key: value for key, value in scaling.items() if value or key not in _YARN_DEFAULT_IF_ZERO}
    if "truncate" in rope:
        scaling["truncate"] = bool(rope["truncate"])  # null is false there
    return {"rope_type": "yarn", "original_max_position_embeddings": max_position_embeddings, **scaling}


def _yarn_context_length(scaling: Mapping[str, Any], max_position_embeddings: int) -> int:
    """Context length of the model in tokens.

    ``max_position_embeddings`` is the length before the stretching in some published configurations (Qwen 2.5) and the
    one after it in others, so that factor x original length decides, as in vLLM.
    """
    factor, original = scaling.get("factor"), scaling["original_max_position_embeddings"]
    sizes = isinstance(factor, (int, float)) and isinstance(original, (int, float))
    return max(max_position_embeddings, int(factor * original)) if sizes else max_position_embeddings


def _check_window(fields: Fields, family: Family, model: ModelConfig) -> None:
    """Raise ``ValueError`` for attention over a window that some positions of the model do not fit in."""
    by_layer = "use_sliding_window" in family.defaults
    used = fields.flag("use_sliding_window", family.defaults.get("use_sliding_window", True))
    left_out = family.defaults.get("sliding_window") if "sliding_window" not in fields.content else None
    window, longest = fields.integer("sliding_window", left_out, least=1), model.max_position_embeddings
    first = fields.integer("max_window_layers", family.defaults.get("max_window_layers", 0))
    kinds = fields.texts("layer_types") or []
    if any(kind != "full_attention" for kind in kinds):
        raise ValueError(f"config.json: layer_types {shown(sorted(set(kinds)))}: only full_attention is supported")
    if kinds and len(kinds) != model.num_layers:
        fields.refuse("layer_types", f"as long as num_hidden_layers, {model.num_layers}")
    if window is None or not used or window >= longest or (by_layer and (kinds or first >= model.num_layers)):
        return
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
    fields = _fields(config)
    _check_keys(fields, family)
    values = {**family.switches, **_read_sizes(fields, family)}
    longest = values["max_position_embeddings"]
    values["rotary_base"], values["rope_scaling"] = _rope(fields, family.defaults, longest)
    if values["rope_scaling"] and values["rope_scaling"]["rope_type"] == "yarn":
        values["max_position_embeddings"] = _yarn_context_length(values["rope_scaling"], longest)
    tied = fields.flag("tie_word_embeddings", family.defaults["tie_word_embeddings"])
    model = ModelConfig(**values, untie_embeddings_and_output_weights=not tied)
    _check_window(fields, family, model)
    try:
        model.check()
    except ValueError as error:
        raise ValueError(f"config.json: {error}") from None
    return model


def _check_keys(fields: Fields, family: Family) -> None:
    """Raise ``ValueError`` for a key that no table knows, or a value that the family does not support."""
    config = fields.content
    if foreign := sorted(key for key in config if key.startswith("dms_")):
        raise ValueError(
            f"config.json: {named(dict(config), foreign)}: this is a DMS model, whose directory must be read as one; "
            "here only a plain model's config.json can be"
        )
    if config.get("quantization_config") is not None:
        raise ValueError(
            f"config.json: {named(dict(config), ['quantization_config'])}: quantized weights are read with their "
            "files alone; here only a plain model's config.json can be"
        )
    known = {*_SIZES, *_READ, *INERT, *NEUTRAL, *family.required, *family.inert}
    unknown = sorted(k for k in config if k not in known and config[k] is not None)
    if unknown:
        raise ValueError(
            f"config.json: {named(dict(config), unknown)}: not understood for model_type {family.model_type}; if it "
            "does not change what the model computes, remove it"
        )
    for key, values in family.required.items():
        value = fields.get(key, family.defaults.get(key, values[0]))
        if not is_one_of(value, values):
            raise ValueError(f"config.json: {key} is {shown(value)}; supported: {', '.join(map(repr, values))}")
    check_neutral({key: value for key, value in config.items() if key not in family.required})
    fields.number("attention_dropout", least=0)
    fields.object("auto_map")
    for key in ("dtype", "torch_dtype"):
        fields.text(key)


def _read_sizes(fields: Fields, family: Family) -> dict[str, Any]:
    """Fields of ``ModelConfig`` that stand in ``config.json`` as numbers."""
    sizes: dict[str, Any] = {}
    for key, name in _SIZES.items():
        default = None if key in fields.content else family.defaults.get(key)
        if key in ("rms_norm_eps", "initializer_range"):
            value = fields.number(key, default, least=0)
        else:
            value = fields.integer(key, default, least=1, most=_MOST.get(key, INT32))
        if value is None and key not in _OPTIONAL:
            raise ValueError(f"config.json: {key} is missing")
        if value is not None:
            sizes[name] = value
    return sizes


@dataclass(frozen=True)
class DMCBlock:
    """The ``dmc`` block of an exported model's ``config.json``."""

    base_model_type: str
    """``model_type`` of the plain family."""
    dmc: DMCConfig
    stage: str
    """zero_out, calibrate, retrofit or finetune."""
    step: int
    """Finished optimizer steps of the stage."""
    target_cr: float
    """Compression ratio that the model was trained to; 1 when the block does not say."""
    measured_cr: Optional[float]
    """Compression ratio that was measured: tokens / slots."""

    @property
    def compresses(self) -> bool:
        return self.stage in COMPRESSED_STAGES

    @property
    def expected_cr(self) -> float:
        """Tokens per slot to expect; 1 for a model that does not merge."""
        return self.measured_cr or self.target_cr if self.compresses else 1.0


def dmc_block(config: dict) -> Optional[DMCBlock]:
    """The ``dmc`` block of an exported model; None for a plain one. Raises ``ValueError`` for a newer format or a
    damaged block.
    """
    if "dmc" not in config:
        if _fields(config).text("model_type") == DMC_MODEL_TYPE:
            raise ValueError("config.json is of a DMC model and has no dmc block; export the model again")
        return None
    block = _block_fields(config)
    if block.get("format_version") != DMC_FORMAT_VERSION:
        raise ValueError(
            f"config.json: dmc.format_version is {shown(block.get('format_version'))}; this version reads "
            f"{DMC_FORMAT_VERSION}"
        )
    missing = [key for key in _DMC_KEYS if key not in block.content]
    if missing:
        raise ValueError(f"config.json: dmc.{missing[0]} is missing; the block needs {', '.join(_DMC_KEYS)}")
    dmc = DMCConfig(
        method=block.text("method", "dmc"),
        **{f"decision_{key}": block.text(f"decision_{key}", value) for key, value in _DECISION.items()},
        decision_scale=block.number("decision_scale", 1.0, above=0),
        decision_bias=block.number("decision_bias", math.nan),
        window=block.integer("window", least=1, most=_LONGEST_WINDOW),
        importance_epsilon=block.number("importance_epsilon", math.nan, above=0),
    )
    try:
        dmc.check()
    except ValueError as error:
        raise ValueError(f"config.json: dmc.{error}") from None
    stage = block.text("stage")
    wrong = "calibrate" if dmc.neuron != "none" else "zero_out"  # each has nothing to do with the other's source
    if stage == wrong or stage not in ("zero_out", *COMPRESSED_STAGES):
        *others, last = (name for name in ("zero_out", *COMPRESSED_STAGES) if name != wrong)
        block.refuse("stage", f"{', '.join(others)} or {last} with decision_source {dmc.decision_source}")
    for name in ("add_qkv_bias", "qk_layernorm"):
        value = _plain_family(config).switches.get(name, False)
        if block.flag(name, value) != value:
            block.refuse(name, f"{value} for base_model_type {block.text('base_model_type')}")
    return DMCBlock(
        base_model_type=block.text("base_model_type"),
        dmc=dmc,
        stage=stage,
        step=block.integer("step", 0),
        target_cr=block.number("target_cr", 1.0, least=1, most=_LARGEST_CR),
        measured_cr=block.number("measured_cr", least=1, most=_LARGEST_CR),
    )


def dmc_from_hf_config(config: dict) -> Optional[DMCConfig]:
    """DMC settings of an exported model; None for a plain one. Raises ``ValueError`` as :func:`dmc_block` does."""
    block = dmc_block(config)
    return None if block is None else block.dmc


def _block_fields(config: dict) -> Fields:
    if not isinstance(config["dmc"], dict):
        raise ValueError(f"config.json: dmc is {shown(config['dmc'])}; it must be an object; export the model again")
    return Fields(config["dmc"], "config.json: dmc.")


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
    crs = manifest.target_cr, manifest.measured_cr
    return with_block(config, DMCBlock(config["model_type"], run.dmc, manifest.stage, manifest.iteration, *crs))


def with_block(config: dict, block: DMCBlock) -> dict:
    """``config.json`` of the plain family with a ``dmc`` block, and the names that go with it."""
    own = {"architectures": [DMC_ARCHITECTURE], "model_type": DMC_MODEL_TYPE, "auto_map": DMC_AUTO_MAP}
    return {**config, **own, "dmc": block_fields(block)}


def block_fields(block: DMCBlock) -> dict:
    """The ``dmc`` block as JSON: what :func:`dmc_block` reads."""
    switches = FAMILIES[block.base_model_type].switches
    fields = {
        "format_version": DMC_FORMAT_VERSION,
        "base_model_type": block.base_model_type,
        "decision_bias": block.dmc.decision_bias,
        "window": block.dmc.window,
        "importance_epsilon": block.dmc.importance_epsilon,
        "add_qkv_bias": switches.get("add_qkv_bias", False),
        "qk_layernorm": switches.get("qk_layernorm", False),
        "stage": block.stage,
        "step": block.step,
        "target_cr": block.target_cr,
        "measured_cr": block.measured_cr,
    }
    if block.dmc.method != "dmc":
        fields["method"] = block.dmc.method
        fields |= {f"decision_{key}": getattr(block.dmc, f"decision_{key}") for key in (*_DECISION, "scale")}
    return fields
