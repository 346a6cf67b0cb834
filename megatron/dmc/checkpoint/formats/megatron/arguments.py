"""Arguments of a Megatron-LM run, as its checkpoints record them: to our configuration, and to what was trained."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

import torch

from megatron.dmc.checkpoint import mapping
from megatron.dmc.checkpoint.formats import hf
from megatron.dmc.checkpoint.formats.base import Given, Row, Source, imported_run, model_rows, weight_row
from megatron.dmc.checkpoint.manifest import LATEST, Manifest
from megatron.dmc.checkpoint.mapping import views
from megatron.dmc.checkpoint.mapping.views import Key
from megatron.dmc.checkpoint.tensors import Concat, Lazy, Rows, Zeros
from megatron.dmc.config import DMCConfig, ModelConfig, RunConfig
from megatron.dmc.environment import versions

# What Megatron's files hold beside tensors and plain containers: arguments and the enums in them, Transformer Engine's
# extra state (a BytesIO before its version 1.14), numpy's random state.
_MEGATRON_PACKAGES = ("megatron.", "transformer_engine.")
_MEGATRON_OTHERS = set(
    "argparse.Namespace types.SimpleNamespace _io.BytesIO builtins.bytes builtins.frozenset signal.Signals "
    "builtins.getattr "  # members of enums, as Python 3.11 pickles them
    "pathlib.Path pathlib.PosixPath pathlib.PurePath pathlib.PurePosixPath datetime.timedelta numpy.ndarray "
    "numpy.dtype numpy.core.multiarray._reconstruct numpy.core.multiarray.scalar numpy._core.multiarray._reconstruct "
    "numpy._core.multiarray.scalar".split()
)


def megatron_objects(name: str) -> bool:
    """``allow`` of :func:`load_lazily` for what Megatron-LM saves."""
    return name in _MEGATRON_OTHERS or name.startswith(_MEGATRON_PACKAGES)


LOCAL_NAMES = {
    "decoder.layers.input_layernorm.weight": "decoder.layers.self_attention.linear_qkv.layer_norm_weight",
    "decoder.layers.pre_mlp_layernorm.weight": "decoder.layers.mlp.linear_fc1.layer_norm_weight",
}
"""Name in Megatron's local layer spec, where norms stand alone -> in Transformer Engine's, within the layer behind."""


def wrong(what: object, found: str, expected: str) -> ValueError:
    """An error that says what is where and what should be."""
    return ValueError(f"{what} {found}; expected {expected}")


def int_arg(args: dict[str, Any], name: str, default: int) -> int:
    """``args[name]`` when it is a whole number, else ``default``."""
    value = args.get(name)
    return value if isinstance(value, int) and not isinstance(value, bool) else default


@dataclass(frozen=True)
class Recorded:
    """What a checkpoint of Megatron's says of itself, beside its tensors."""

    args: Mapping[str, Any]
    """The run's arguments by Megatron-LM's names."""
    where: str
    """The file of the arguments, for messages."""
    directory: Path
    iteration: int
    rows: int
    """Rows of the embedding, padding included."""
    embedding: str
    """The embedding, as a message names it."""
    tensor_parallel_size: int
    dtype: torch.dtype
    """Type of the weights."""
    notes: list[str] = field(default_factory=list)
    """Remarks for the user: what was assumed."""


def current_iteration(directory: Path) -> Optional[Path]:
    """The iteration that ``latest_checkpointed_iteration.txt`` in a --save directory names; None without that file."""
    latest = directory / LATEST
    if not latest.is_file():
        return None
    text = latest.read_text(errors="replace").strip()
    if text != "release" and not text.isdecimal():
        raise wrong(latest, f"holds {text[:40]!r}", "release, or the number of an iteration")
    return directory / (text if text == "release" else f"iter_{int(text):07d}")


def padded(tensor: Lazy, model: ModelConfig) -> Lazy:
    """A vocabulary of any padding with that of any layout of ours: [padded, h] -> [padded, h]."""
    rows, padding = Rows(tensor, 0, model.vocab_size), model.padded_vocab_size - model.vocab_size
    return Concat([rows, Zeros((padding, *tensor.shape[1:]), tensor.dtype)], rows.name) if padding else rows


def source_of(
    recorded: Recorded, given: Given, parameters: Callable[[mapping.Family, ModelConfig], dict[Key, Lazy]], layout: str
) -> Source:
    """The model of a checkpoint.

    Args:
        parameters: gives the parameters of a model with these settings, from the checkpoint's tensors.
        layout: of the run that wrote it, for messages.
    """
    model = model_config(recorded, given)
    config = mapping.to_hf_config(model, str(recorded.dtype).removeprefix("torch."))
    family = mapping.family_of(config)
    manifest, dmc = read_training(recorded, given)
    run = imported_run(model, dmc, manifest)
    found = parameters(family, model)
    tensors = views.to_hf(family, model, found)
    return Source(
        path=recorded.directory,
        kind=f"{family.model_type}, {layout}, iteration {recorded.iteration}",
        family=family,
        config=config if manifest.stage == "import" else mapping.dmc_config(config, run, manifest),
        run=run,
        manifest=manifest,
        tensors=tensors,
        parameters=found,
        weight_map=hf.shard_layout(tensors),
        notes=recorded.notes,
    )


def describe_source(source: Source, what: str) -> list[Row]:
    """Layout and sizes of a checkpoint of format ``what``, and what an import would assume."""
    return [
        ("format", what),
        ("directory", str(source.path)),
        ("layout", source.kind),
        *model_rows(source.run.model),
        weight_row(source.parameters.values()),
        *(("", note) for note in source.notes),
    ]


# Arguments that give another model than ours: what they must be, and what Megatron takes where one is missing.
_REQUIRED: dict[str, tuple[Any, Any]] = {
    "normalization": ("RMSNorm", "LayerNorm"),
    "swiglu": (True, False),
    "position_embedding_type": ("rope", "learned_absolute"),
    "rotary_percent": (1.0, 1.0),
    "add_bias_linear": (False, True),
    "softmax_type": ("vanilla", "vanilla"),
}
_OFF = (
    "rotary_interleaved rotary_seq_len_interpolation_factor apply_layernorm_1p num_experts multi_latent_attention "
    "openai_gelu squared_relu quick_geglu apply_residual_connection_post_layernorm retro_add_retriever window_size "
    "window_attn_skip_freq no_rope_freq qk_l2_norm attention_output_gate mtp_num_layers hybrid_override_pattern "
    "heterogeneous_layers_config_path heterogeneous_layers_config_encoded_json mrope_section softmax_scale "
    "use_legacy_models experimental_attention_variant glu_linear_offset activation_func_clamp_value "
    "hybrid_layer_pattern is_hybrid_model linear_attention_freq enable_mhc_connections use_mup "
    "heterogeneous_block_specs".split()
)
_SIZES = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "max_position_embeddings")
_OPTIONAL = (
    "rotary_base norm_epsilon make_vocab_size_divisible_by add_qkv_bias qk_layernorm init_method_std "
    "kv_channels".split()
)
# --use-rope-scaling stands for these numbers; the factor alone became an argument later.
_ROPE_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_VOCABULARIES = {"Llama2Tokenizer": 32000}
_DMC_ARGS = set(
    "dmc_init_val dmc_window_size dmc_temp dmc_cr dmc_finetune dmc_is_stage_one dmc_paged_cache_size "
    "dmc_paged_block_size dmc_importance_epsilon".split()
)


def model_config(recorded: Recorded, given: Given) -> ModelConfig:
    """Our configuration from the arguments in the recorded.

    Raises:
        ValueError: an argument that is missing, or that gives a model which ours is not, by its name.
    """
    args, where = dict(recorded.args), f"{recorded.where}: args."
    if "disable_bias_linear" in args:  # what it was called before
        args.setdefault("add_bias_linear", not args["disable_bias_linear"])
    if args.get("use_rotary_position_embeddings"):
        args["position_embedding_type"] = "rope"
    for name, (wanted, default) in _REQUIRED.items():
        if (value := args.get(name, default)) != wanted:
            raise wrong(where + name, f"is {value!r}{'' if name in args else ' (by default)'}", repr(wanted))
    for name in _OFF:
        if args.get(name):
            raise wrong(where + name, f"is {args[name]!r}, which is not supported", "it to be off")
    for name in _SIZES:
        if args.get(name) is None:
            raise wrong(where + name, "is missing", "a number")
    values = {name: args[name] for name in (*_SIZES, *_OPTIONAL) if args.get(name) is not None}
    # Without --group-query-attention the number of groups means nothing (it is 1 then, by default).
    groups = "num_query_groups" if args.get("group_query_attention") else "num_attention_heads"
    values["num_query_groups"] = args.get(groups)
    values["untie_embeddings_and_output_weights"] = bool(args.get("untie_embeddings_and_output_weights"))
    values["vocab_size"] = _vocabulary(recorded, given.vocab_size)
    try:
        if args.get("use_rope_scaling"):
            values["rope_scaling"] = {**_ROPE_SCALING, "factor": float(args.get("rope_scaling_factor") or 8.0)}
        model = RunConfig.from_dict({"model": values}).model
        model.check()
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where[:-1]}: {error}") from None
    return model


def _vocabulary(recorded: Recorded, known: Optional[int]) -> int:
    """Rows of the vocabulary without padding: ``known``, else from the arguments, else what the tokenizer that they
    name is known to have, else all rows.
    """
    args, rows, why = recorded.args, recorded.rows, "as given"
    if known is None and int_arg(args, "vocab_size", 0) > 0:
        # Megatron's NullTokenizer adds an end of document.
        known, why = args["vocab_size"] + (args.get("tokenizer_type") == "NullTokenizer"), "args.vocab_size"
    if known is None:
        size = _VOCABULARIES.get(str(args.get("tokenizer_type")), 0)
        multiple = int_arg(args, "make_vocab_size_divisible_by", 128) * recorded.tensor_parallel_size
        # --tokenizer-type names a class, not a vocabulary; that it pads to what is there is the second witness.
        if size and rows in (size, -(-size // multiple) * multiple):
            known, why = size, f"{args['tokenizer_type']}, padded to {rows}"
    if known is None:
        recorded.notes.append(
            f"vocab_size: {rows}, padding included: the args do not say how much of it is padding; give --vocab-size "
            "if you know"
        )
        return rows
    if not 0 < known <= rows:
        raise wrong(recorded.embedding, f"has {rows} rows in all", f"at least the vocabulary's {known} ({why}) and 1")
    if known < rows:
        recorded.notes.append(f"vocab_size: {known} ({why}); {rows - known} rows of padding are left out")
    return known


def read_training(recorded: Recorded, given: Given) -> tuple[Manifest, DMCConfig]:
    """Stage, compression ratio and DMC settings, from the ``dmc_*`` arguments of the authors' branch.

    ``given.target_cr`` overrides the arguments. A plain model's have none: the ratio says that it is a DMC model
    nevertheless.

    Raises:
        ValueError: a DMC model of unknown compression ratio, or values that do not fit together.
    """
    args, iteration = recorded.args, recorded.iteration
    if evicting := sorted(name for name, value in args.items() if "dms" in name.lower() and value):
        said = f"is {args[evicting[0]]!r}: a model of method dms, for which Megatron's arguments have no names"
        raise wrong(f"{recorded.where}: args.{evicting[0]}", said, "a Hugging Face directory of it, for --hf")
    theirs = {name: value for name, value in args.items() if "dmc" in name.lower()}
    if odd := sorted(set(theirs) - _DMC_ARGS):
        said = ", ".join(f"{name} = {theirs[name]!r}" for name in odd)
        recorded.notes.append(f"warning: not understood in args: {said}")
    stage, ratio = _stage_and_ratio(recorded, theirs, given.target_cr)
    # When it is saved, an unfinished run has more iterations before it, an imported model none, and stage one's final
    # checkpoint is numbered 1.
    planned = iteration if stage == "import" else max(int_arg(args, "train_iters", 0), iteration)
    if stage == "retrofit" and given.target_cr is None and planned:
        # Their ratio rises with the number of steps before the current one.
        ratio = 1 + (ratio - 1) * min(1.0, int_arg(args, "curr_iteration", max(iteration - 1, 0)) / planned)
    samples = int_arg(args, "consumed_train_samples", 0) if stage != "import" else 0
    manifest = Manifest(
        stage=stage,
        iteration=planned if stage == "zero_out" else iteration,
        train_iters=planned,
        consumed_samples=samples,
        consumed_tokens=samples * int_arg(args, "seq_length", 0),
        target_cr=float(ratio),
        source=recorded.directory.name,
        versions=versions(),
        has_optimizer=False,
    )
    if stage == "import":
        recorded.notes.append("stage: import (a plain model: no dmc_* in its args)")
        return manifest, DMCConfig()
    dmc = _dmc_config(recorded, theirs)
    missing = sorted({"dmc_init_val", "dmc_window_size"} - set(theirs))
    recorded.notes.append(
        f"stage: {stage} ({'from args' if theirs else 'since a compression ratio was given'}), compression ratio "
        f"{ratio:g}, decision bias {dmc.decision_bias:g}, window {dmc.window or 'unbounded'}"
        + (f" ({', '.join(missing)} not in args: as in the published models)" if missing else "")
    )
    return manifest, dmc


def _stage_and_ratio(recorded: Recorded, theirs: dict[str, Any], target_cr: Optional[float]) -> tuple[str, float]:
    """Stage, and the compression ratio that it was trained to."""
    where = recorded.where
    if not theirs and target_cr is None:
        if "dmc" in recorded.directory.absolute().as_posix().lower():
            recorded.notes.append(
                "warning: the directory's name says DMC and the args do not; if this is a DMC model, give --target-cr, "
                "or its output will be nonsense"
            )
        return "import", 1.0
    if theirs.get("dmc_is_stage_one"):
        if target_cr is not None:
            raise ValueError(
                f"{where} is of the authors' stage one, which does not compress; remove the ratio {target_cr:g}"
            )
        return "zero_out", 1.0
    ratio = theirs.get("dmc_cr") if target_cr is None else target_cr
    if not isinstance(ratio, (int, float)) or not 1 <= ratio < float("inf"):
        raise wrong(
            f"{where}: args.dmc_cr" if target_cr is None else "target_cr",
            f"is {ratio!r}",
            "the compression ratio that the model was trained to, at least 1; give --target-cr",
        )
    return "retrofit" if theirs.get("dmc_finetune") is False else "finetune", ratio


def _dmc_config(recorded: Recorded, theirs: dict[str, Any]) -> DMCConfig:
    dmc = DMCConfig()
    try:
        dmc.decision_bias = float(theirs.get("dmc_init_val", dmc.decision_bias))
        dmc.temperature = float(theirs.get("dmc_temp", dmc.temperature))
        dmc.window = int(theirs.get("dmc_window_size", dmc.window) or 0) or None  # their 0: the whole segment
        # They add the epsilon of the dtype that they train in: 2^-7 in bf16.
        dmc.importance_epsilon = float(theirs.get("dmc_importance_epsilon", torch.finfo(recorded.dtype).eps))
        dmc.check()
    except (ValueError, TypeError) as error:
        raise ValueError(f"{recorded.where}: args: {error}") from None
    return dmc


# The decision neuron in Megatron's weights: channel D-1 of every query and key head.

PROJECTIONS = ("linear_qkv.weight", "linear_qkv.bias")
"""Endings of the parameters that have its rows."""


def neuron_rows(model: ModelConfig, first_query_only: bool = False) -> list[int]:
    """Rows of the QKV projection, [ng, g + 2, D] of them: the last of every query head and of the key head, or of the
    first query head of each group.
    """
    d, heads = model.head_dim, model.num_attention_heads // model.kv_heads + 2
    chosen = range(1 if first_query_only else heads - 1)
    return [(group * heads + head + 1) * d - 1 for group in range(model.kv_heads) for head in chosen]


def check_zeroed(parameters: Mapping[Key, Lazy], model: ModelConfig) -> None:
    """Raise ``ValueError`` unless the rows are zero, as zero_out leaves them at its end."""
    rows = neuron_rows(model)
    for (name, layer), tensor in parameters.items():
        for row in rows if name.endswith(PROJECTIONS) else ():
            if tensor.read(row, row + 1).any():
                raise wrong(
                    f"{tensor.name}: row {row}, a decision neuron (layer {layer}),",
                    "is not zero",
                    "the checkpoint that stage one writes at its end, in final_output/",
                )
