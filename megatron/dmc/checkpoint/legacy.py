"""Megatron's single-file format: what ``Megatron-LM`` saves without distributed checkpointing, and what NVIDIA released
DMC in.

    DIR/latest_checkpointed_iteration.txt                       "release", or a number
    DIR/iter_0000100/mp_rank_TT[_PPP]/model_optim_rng.pt        tensor rank TT, pipeline rank PPP when there are several

A file is a pickled dict: ``args`` (the ``argparse.Namespace`` of the run), ``checkpoint_version``, ``iteration``,
``model`` (or ``model0``, ``model1``, ... for the chunks of an interleaved pipeline), optimizer and random states. Only
the arguments and the model are looked at; nothing in the file is run, and no class that it names is imported.

Sources: ``megatron/training/checkpointing.py`` (get_checkpoint_name, generate_state_dict, load_args_from_checkpoint)
    and, for the
authors' arguments and the place of their decision neuron, ``megatron/contrib/dmc/{arguments,dmc}.py`` and
``pretrain_gpt_with_dmc.py`` of github.com/NVIDIA/Megatron-LM, branch dmc, commit d36bf8d (2024).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

import torch

from megatron.dmc.checkpoint import convert, hf, mapping, views
from megatron.dmc.checkpoint.convert import Progress, Say
from megatron.dmc.checkpoint.legacy_file import RankFile, int_arg, read_rank_file, wrong
from megatron.dmc.checkpoint.manifest import LATEST, Manifest
from megatron.dmc.checkpoint.mapping import TensorRule
from megatron.dmc.checkpoint.staging import staged
from megatron.dmc.checkpoint.tensors import Columns, Concat, Lazy, Rows, Zeros, equal
from megatron.dmc.config import DMCConfig, ModelConfig, RunConfig
from megatron.dmc.environment import versions

FILE = "model_optim_rng.pt"
_RANK = re.compile(r"mp_rank_(\d{2,})(?:_(\d{3,}))?")
_ITERATION = re.compile(r"release|iter_\d{7,}")
Key = tuple[str, Optional[int]]
"""(name in a ``torch_dist`` checkpoint, layer)."""

# Megatron's local layer spec has its norms on their own; Transformer Engine's, in the layer behind them.
_SAME = {
    "decoder.layers.input_layernorm.weight": "decoder.layers.self_attention.linear_qkv.layer_norm_weight",
    "decoder.layers.pre_mlp_layernorm.weight": "decoder.layers.mlp.linear_fc1.layer_norm_weight",
}
_EMBEDDING: Key = ("embedding.word_embeddings.weight", None)
_OUTPUT: Key = ("output_layer.weight", None)

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
    "rotary_interleaved",
    "rotary_seq_len_interpolation_factor",
    "apply_layernorm_1p",
    "num_experts",
    "multi_latent_attention",
    "openai_gelu",
    "squared_relu",
    "quick_geglu",
    "apply_residual_connection_post_layernorm",
    "retro_add_retriever",
    "window_size",
    "window_attn_skip_freq",
    "no_rope_freq",
    "qk_l2_norm",
    "attention_output_gate",
    "mtp_num_layers",
    "hybrid_override_pattern",
    "heterogeneous_layers_config_path",
    "mrope_section",
    "softmax_scale",
    "use_legacy_models",
    "experimental_attention_variant",
    "glu_linear_offset",
    "activation_func_clamp_value",
)
_SIZES = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "max_position_embeddings")
_OPTIONAL = (
    "rotary_base",
    "norm_epsilon",
    "make_vocab_size_divisible_by",
    "add_qkv_bias",
    "qk_layernorm",
    "init_method_std",
    "kv_channels",
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
_DMC_ARGS = {
    "dmc_init_val",
    "dmc_window_size",
    "dmc_temp",
    "dmc_cr",
    "dmc_finetune",
    "dmc_is_stage_one",
    "dmc_paged_cache_size",
    "dmc_paged_block_size",
}


@dataclass
class LegacyCheckpoint:
    """Every rank's file of one checkpoint. Nothing of the tensors is read yet. Made by :func:`open_legacy`."""

    directory: Path
    files: dict[tuple[int, int], RankFile]
    """(tensor rank, pipeline rank) -> file."""
    shares: dict[Key, list[Lazy]] = field(default_factory=dict)
    """The share of every tensor rank."""
    homes: dict[tuple[int, Optional[int]], Path] = field(default_factory=dict)
    """(tensor rank, layer) -> the file that it lies in."""

    @property
    def first(self) -> RankFile:
        return self.files[0, 0]

    @property
    def tp(self) -> int:
        return self.first.layout[0]

    @property
    def rows(self) -> int:
        """Of the embedding, with its padding."""
        return sum(share.shape[0] for share in self.shares[_EMBEDDING])

    @property
    def dtype(self) -> torch.dtype:
        return self.shares[_EMBEDDING][0].dtype


def _has_ranks(path: Path) -> bool:
    return any(_RANK.fullmatch(p.name) for p in path.glob("mp_rank_*"))


def _iterations(source: Path) -> list[Path]:
    return sorted(p for p in source.iterdir() if _ITERATION.fullmatch(p.name) and _has_ranks(p))


def is_legacy(path: Path) -> bool:
    """Whether there are ``mp_rank_*`` directories in ``path``, or in an iteration's directory in it."""
    return path.is_dir() and (_has_ranks(path) or bool(_iterations(path)))


def find_directory(source: Path) -> Path:
    """The directory that holds ``mp_rank_*``: ``source``, or the iteration in it that is current.

    Raises:
        ValueError: there is none, or it cannot be told which one.
    """
    if not source.is_dir():
        raise ValueError(f"{source} is not a directory; name a Megatron checkpoint directory")
    latest, iterations = source / LATEST, _iterations(source)
    if _has_ranks(source):
        return source
    if latest.is_file():
        text = latest.read_text(errors="replace").strip()
        if text != "release" and not text.isdigit():
            raise wrong(latest, f"holds {text[:40]!r}", "release, or the number of an iteration")
        found = source / (text if text == "release" else f"iter_{int(text):07d}")
        if _has_ranks(found):
            return found
        if not (found / ".metadata").is_file():
            raise wrong(found / "mp_rank_00" / FILE, "is missing", f"it because {LATEST} says {text}")
        source = found
    elif len(iterations) == 1:
        return iterations[0]
    elif iterations:
        raise wrong(
            source, f"holds {', '.join(p.name for p in iterations[:5])} and no {LATEST}", "one of them to be named"
        )
    if (source / ".metadata").is_file():
        raise ValueError(
            f"{source} is a torch_dist checkpoint, which needs no import: export it, or give it to --init-from"
        )
    raise wrong(source, "is no Megatron checkpoint", f"mp_rank_00/{FILE} in it, in release/, or in what {LATEST} names")


def open_legacy(source: str | Path) -> LegacyCheckpoint:
    """Open every rank's file and put names and layer numbers in order.

    Args:
        source: what --save was, one of its iteration directories, or any directory with ``mp_rank_*`` in it.

    Raises:
        ValueError: a file is missing, damaged, would run code, or does not belong to the others; naming it.
    """
    directory = find_directory(Path(source))
    found: dict[tuple[int, int], Path] = {}
    for path in sorted(directory.glob("mp_rank_*")):
        match = _RANK.fullmatch(path.name)
        if match is None:
            raise wrong(
                path, "is of another layout", "mp_rank_TT or mp_rank_TT_PPP (expert parallelism is not supported)"
            )
        rank = int(match[1]), int(match[2] or 0)
        if rank in found:
            raise wrong(path, f"is the same rank as {found[rank].name}", "one of them")
        found[rank] = path
    start = min(found)
    first = read_rank_file(found[start] / FILE)
    tp, pp, _ = first.layout
    expected = {(t, p) for t in range(tp) for p in range(pp)}
    sizes = f"tensor x pipeline parallel size {tp} x {pp}, which the args in {first.path} say"
    if missing := sorted(expected - set(found)):
        name = f"mp_rank_{missing[0][0]:02d}" + (f"_{missing[0][1]:03d}" if pp > 1 else "")
        raise wrong(
            directory / name / FILE,
            f"is missing ({len(missing)} of {len(expected)} files are)",
            f"{sizes}; there are only {', '.join(p.name for p in found.values())}",
        )
    if extra := sorted(set(found) - expected):
        raise wrong(found[extra[0]], "is one too many", sizes)
    files = {rank: first if rank == start else read_rank_file(found[rank] / FILE) for rank in sorted(expected)}
    for file in files.values():
        if (file.layout, file.iteration) != (first.layout, first.iteration):
            raise wrong(
                file.path,
                f"is of iteration {file.iteration}, tensor x pipeline x virtual size {file.layout}",
                f"iteration {first.iteration}, {first.layout} as in {first.path}",
            )
    checkpoint = LegacyCheckpoint(directory, files)
    for t in range(tp):
        _gather(checkpoint, t)
    if (found_in := len(checkpoint.shares.get(_EMBEDDING, []))) != tp:
        raise wrong(directory, f"has {_EMBEDDING[0]} in {found_in} tensor ranks", f"it in {tp}")
    return checkpoint


def _gather(checkpoint: LegacyCheckpoint, t: int) -> None:
    """Add the tensors of rank ``t``. Layers are numbered anew in every chunk of a file; here they get their own
    numbers.
    """
    mine: set[Key] = set()
    offset, counts = 0, []
    # An interleaved pipeline has the first chunk of every stage before the second one of any.
    for chunk in range(len(checkpoint.first.chunks)):
        for file in (checkpoint.files[t, p] for p in range(checkpoint.first.layout[1])):
            numbers = set()
            for name, layer, tensor in _named(file.chunks[chunk]):
                key = (name, None if layer is None else offset + layer)
                if key in mine:
                    raise wrong(tensor.name, "stands there a second time", "one in all pipeline stages")
                mine.add(key)
                checkpoint.shares.setdefault(key, []).append(tensor)
                checkpoint.homes[t, key[1]] = file.path
                numbers |= {layer} - {None}
            if numbers != set(range(len(numbers))):
                raise wrong(
                    f"{file.path} (model chunk {chunk})", f"has the layers {sorted(numbers)}", "no gap, from 0 on"
                )
            offset += len(numbers)
            counts.append(f"{len(numbers)} in {file.path.parent.name}")
    if offset != checkpoint.first.args.get("num_layers"):
        raise wrong(
            checkpoint.directory,
            f"has {offset} layers in tensor rank {t} ({', '.join(counts)})",
            f"{checkpoint.first.args.get('num_layers')} (args.num_layers)",
        )


def _named(chunk: dict[str, Lazy]) -> Iterator[tuple[str, Optional[int], Lazy]]:
    """(name in a ``torch_dist`` checkpoint, number of the layer in the chunk, tensor)."""
    for name, tensor in chunk.items():
        match = re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", name)
        plain = f"decoder.layers.{match[2]}" if match else name
        yield _SAME.get(plain, plain), int(match[1]) if match else None, tensor


def model_config(checkpoint: LegacyCheckpoint, vocab_size: Optional[int] = None, say: Say = print) -> ModelConfig:
    """Our configuration from the arguments in the checkpoint.

    Args:
        vocab_size: rows of the vocabulary without padding, when the caller knows better.

    Raises:
        ValueError: an argument that is missing, or that gives a model which ours is not, by its name.
    """
    args, where = dict(checkpoint.first.args), f"{checkpoint.first.path}: args."
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
    values["num_query_groups"] = args.get(
        "num_query_groups" if args.get("group_query_attention") else "num_attention_heads"
    )
    values["untie_embeddings_and_output_weights"] = bool(args.get("untie_embeddings_and_output_weights"))
    values["vocab_size"] = _vocabulary(checkpoint, vocab_size, say)
    try:
        if args.get("use_rope_scaling"):
            values["rope_scaling"] = {**_ROPE_SCALING, "factor": float(args.get("rope_scaling_factor") or 8.0)}
        model = RunConfig.from_dict({"model": values}).model
        model.check()
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where[:-1]}: {error}") from None
    return model


def _vocabulary(checkpoint: LegacyCheckpoint, known: Optional[int], say: Say) -> int:
    """Rows without padding. What the caller says, else the run's arguments, else what its tokenizer is known to have,
    else all.
    """
    args, rows, why = checkpoint.first.args, checkpoint.rows, "as given"
    if known is None and int_arg(args, "vocab_size", 0) > 0:
        # Megatron's NullTokenizer adds an end of document.
        known, why = args["vocab_size"] + (args.get("tokenizer_type") == "NullTokenizer"), "args.vocab_size"
    if known is None:
        size, multiple = (
            _VOCABULARIES.get(str(args.get("tokenizer_type")), 0),
            int_arg(args, "make_vocab_size_divisible_by", 128),
        )
        # --tokenizer-type names a class, not a vocabulary; that it pads to what is there is the second witness.
        if size and rows in (size, -(-size // (multiple * checkpoint.tp)) * multiple * checkpoint.tp):
            known, why = size, f"{args['tokenizer_type']}, padded to {rows}"
    if known is None:
        say(
            f"vocab_size: {rows}, padding included: the args do not say how much of it is padding; give --vocab-size "
            "if you know"
        )
        return rows
    if not 0 < known <= rows:
        raise wrong(
            checkpoint.shares[_EMBEDDING][0].name,
            f"and its other shares have {rows} rows",
            f"at least the vocabulary's {known} ({why}) and 1",
        )
    if known < rows:
        say(f"vocab_size: {known} ({why}); {rows - known} rows of padding are left out")
    return known


def read_training(checkpoint: LegacyCheckpoint, target_cr: Optional[float], say: Say) -> tuple[Manifest, DMCConfig]:
    """What was trained: stage, compression ratio and DMC settings from the authors' arguments (their branch's
    ``dmc_*``).

    Args:
        target_cr: overrides the arguments. A plain model's have none: the ratio says that it is a DMC model
            nevertheless.

    Raises:
        ValueError: a DMC model of unknown compression ratio, or values that do not fit together.
    """
    args, where, iteration = checkpoint.first.args, checkpoint.first.path, checkpoint.first.iteration
    theirs = {name: value for name, value in args.items() if "dmc" in name.lower()}
    if odd := sorted(set(theirs) - _DMC_ARGS):
        say("warning: not understood in args: " + ", ".join(f"{name} = {theirs[name]!r}" for name in odd))
    if not theirs and target_cr is None:
        stage, ratio = "import", 1.0
        if "dmc" in checkpoint.directory.absolute().as_posix().lower():
            say(
                "warning: the directory's name says DMC and the args do not; if this is a DMC model, give --target-cr, "
                "or its answers will be nonsense"
            )
    elif theirs.get("dmc_is_stage_one"):
        stage, ratio = "zero_out", 1.0
        if target_cr is not None:
            raise ValueError(
                f"{where} is of the authors' stage one, which does not compress; remove the ratio {target_cr:g}"
            )
    else:
        stage = "retrofit" if theirs.get("dmc_finetune") is False else "finetune"
        ratio = theirs.get("dmc_cr") if target_cr is None else target_cr
        if not isinstance(ratio, (int, float)) or not 1 <= ratio < float("inf"):
            raise wrong(
                f"{where}: args.dmc_cr" if target_cr is None else "target_cr",
                f"is {ratio!r}",
                "the compression ratio that the model was trained to, at least 1; give --target-cr",
            )
    # When it is saved, an unfinished run has more iterations before it, an imported model none, and stage one's final
    # checkpoint is numbered 1.
    planned = iteration if stage == "import" else max(int_arg(args, "train_iters", 0), iteration)
    if stage == "retrofit" and target_cr is None and planned:
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
        source=checkpoint.directory.name,
        versions=versions(),
        has_optimizer=False,
    )
    if stage == "import":
        say("stage: import (a plain model: no dmc_* in its args)")
        return manifest, DMCConfig()
    dmc = DMCConfig()
    try:
        dmc.decision_bias = float(theirs.get("dmc_init_val", dmc.decision_bias))
        dmc.temperature = float(theirs.get("dmc_temp", dmc.temperature))
        dmc.window = int(theirs.get("dmc_window_size", dmc.window) or 0) or None  # their 0: the whole segment
        # They add the epsilon of the dtype that they train in: 2^-7 in bf16.
        dmc.importance_epsilon = torch.finfo(checkpoint.dtype).eps
        dmc.check()
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where}: args: {error}") from None
    missing = sorted({"dmc_init_val", "dmc_window_size"} - set(theirs))
    say(
        f"stage: {stage} ({'from args' if theirs else 'since a compression ratio was given'}), compression ratio "
        f"{ratio:g}, decision bias {dmc.decision_bias:g}, window {dmc.window or 'unbounded'}"
        + (f" ({', '.join(missing)} not in args: as in the published models)" if missing else "")
    )
    return manifest, dmc


def parameters(checkpoint: LegacyCheckpoint, family: mapping.Family, model: ModelConfig) -> dict[Key, Lazy]:
    """The parameters of a ``torch_dist`` checkpoint, composed over tensor ranks, in the order of a forward pass.

    Raises:
        ValueError: a tensor is missing, one too many, or of the wrong shape or type, or a rank's copy differs; naming
            it.
    """
    shares, tp = dict(checkpoint.shares), checkpoint.tp
    if not model.untie_embeddings_and_output_weights:
        # The last of several pipeline stages has a copy of the embeddings.
        for output, embedding in zip(shares.pop(_OUTPUT, []), shares[_EMBEDDING], strict=False):
            if not equal(output, embedding):
                raise wrong(
                    output.name,
                    f"differs from {embedding.name}",
                    "a copy: untie_embeddings_and_output_weights is False",
                )
    wanted = {(rule.megatron, layer): rule for rule, layer in mapping.in_order(family, model)}
    for name, layer in wanted:
        if len(found := shares.get((name, layer), [])) != tp:
            others = [path for (_, number), path in checkpoint.homes.items() if number == layer is not None]
            home = [path for path in others if not any(tensor.name.endswith(f" in {path}") for tensor in found)]
            raise wrong(
                f"{home[0]}: layer {layer}" if home else checkpoint.directory,
                f"lacks {name.replace('layers.', 'layers.N.')}",
                f"it in {tp - len(found)} more tensor ranks",
            )
    if extra := [tensors[0] for key, tensors in shares.items() if key not in wanted]:
        raise wrong(extra[0].name, f"is not known to a model of its args ({len(extra)} such tensors)", "none")
    for tensor in (tensor for tensors in shares.values() for tensor in tensors):
        if tensor.dtype != checkpoint.dtype or tensor.dtype not in hf.DTYPES.values():
            raise wrong(
                tensor.name,
                f"is of type {tensor.dtype}",
                f"that of {_EMBEDDING[0]}, {checkpoint.dtype}, and one of {', '.join(map(str, hf.DTYPES.values()))}",
            )
    return {key: _compose(rule, key, checkpoint, model) for key, rule in wanted.items()}


def _compose(rule: TensorRule, key: Key, checkpoint: LegacyCheckpoint, model: ModelConfig) -> Lazy:
    shares, tp = checkpoint.shares[key], checkpoint.tp
    shape = list(views.megatron_shape(rule, model))
    if rule.transform == "vocabulary":
        shape[0] = checkpoint.rows
    if rule.split is not None:
        # A KV head is not cut, nor a gate from its up.
        units = {"qkv": model.kv_heads, "gate_up": model.ffn_hidden_size}.get(rule.transform, shape[rule.split])
        if units % tp:
            raise wrong(shares[0].name, f"is one of {tp} parts", f"a divisor of {units}, of what it is cut into")
        shape[rule.split] //= tp
    for share in shares:
        if list(share.shape) != shape:
            raise wrong(
                share.name, f"has shape {list(share.shape)}", f"{shape} by its args (tensor parallel size {tp})"
            )
    name = f"{key[0]}{'' if key[1] is None else f' of layer {key[1]}'} in {checkpoint.directory}"
    whole = shares[0]
    if rule.split is None:
        for share in shares[1:]:
            if not equal(share, whole):
                raise wrong(share.name, f"differs from {whole.name}", "the same values in every tensor rank")
    elif rule.split == 1 and tp > 1:
        whole = Columns(shares, name)
    elif rule.transform == "gate_up" and tp > 1:
        # Every rank has its gates above its ups: tp x [2 * F / tp, h] -> [2 * F, h]
        half = shape[0] // 2
        whole = Concat([Rows(share, i * half, (i + 1) * half) for i in (0, 1) for share in shares], name)
    elif tp > 1:
        whole = Concat(shares, name)
    if rule.transform != "vocabulary":
        return whole
    # [padded for their layout, h] -> [padded for any layout, h]
    rows, padding = Rows(whole, 0, model.vocab_size), model.padded_vocab_size - model.vocab_size
    return Concat([rows, Zeros((padding, *whole.shape[1:]), whole.dtype)], rows.name) if padding else rows


def _check_zeroed(found: dict[Key, Lazy], model: ModelConfig) -> None:
    """Stage one ends with the decision neuron's rows of the QKV projection at zero, in a checkpoint of its own."""
    d, heads = model.head_dim, model.num_attention_heads // model.kv_heads + 2
    # [ng, (g + 2) * D]: the last row of every query head and of the key head
    rows = [(group * heads + head + 1) * d - 1 for group in range(model.kv_heads) for head in range(heads - 1)]
    for name, layer in found:
        for row in rows if name.endswith(("linear_qkv.weight", "linear_qkv.bias")) else ():
            if found[name, layer].read(row, row + 1).any():
                raise wrong(
                    f"{found[name, layer].name}: row {row}, a decision neuron (layer {layer}),",
                    "is not zero",
                    "the checkpoint that stage one writes at its end, in final_output/",
                )


def _open(
    source: str | Path, vocab_size: Optional[int], say: Say
) -> tuple[LegacyCheckpoint, ModelConfig, mapping.Family]:
    checkpoint = open_legacy(source)
    model = model_config(checkpoint, vocab_size, say)
    kind = mapping.to_hf_config(model, str(checkpoint.dtype).removeprefix("torch."))["model_type"]
    return checkpoint, model, mapping.FAMILIES[kind]


def import_legacy(
    source: str | Path,
    save: str | Path,
    *,
    overwrite: bool = False,
    progress: Optional[Progress] = None,
    vocab_size: Optional[int] = None,
    target_cr: Optional[float] = None,
) -> Path:
    """A ``mp_rank_*`` checkpoint of any tensor and pipeline parallel size as a ``torch_dist`` one that every layout
    loads.

    Args:
        source: see :func:`open_legacy`.
        save: the checkpoint's directory, for ``--init-from`` and export.
        vocab_size: rows of the vocabulary without padding. None: args.vocab_size, or what the tokenizer named in args
            has.
        target_cr: of a DMC model whose arguments do not say; see :func:`read_training`.

    Raises:
        ValueError: anything in the source that is missing, damaged, unsafe or not understood, by name.
    """
    save, progress = Path(save), progress or Progress()
    checkpoint, model, family = _open(source, vocab_size, progress.say)
    manifest, dmc = read_training(checkpoint, target_cr, progress.say)
    found = parameters(checkpoint, family, model)
    if manifest.stage == "zero_out":
        _check_zeroed(found, model)
    tensors = {f"{name}.{layer}": tensor for (name, layer), tensor in found.items()}
    convert.plan(f"import {checkpoint.directory} ({_kind(checkpoint, family)}) -> {save}", tensors, save, progress)
    run = convert.imported_run(model, dmc, manifest)
    with convert.writing(save), staged(save, overwrite) as temporary:
        convert.write_checkpoint(temporary, lambda rule, layer: found[rule.megatron, layer], family, model, progress)
        convert.finish_checkpoint(temporary, run, manifest, {})
    progress.warn()
    return save


def _kind(checkpoint: LegacyCheckpoint, family: mapping.Family) -> str:
    tp, pp, virtual = checkpoint.first.layout
    layout = f"TP {tp} x PP {pp}" + (f" x VPP {virtual}" if virtual > 1 else "")
    return f"{family.model_type}, {layout}, iteration {checkpoint.first.iteration}"


def describe(path: Path) -> str:
    """A few lines on a checkpoint of this format. Raises what :func:`import_legacy` raises."""
    from megatron.dmc.checkpoint.describe import model_rows, weight_rows

    said: list[str] = []
    checkpoint, model, family = _open(path, None, said.append)
    read_training(checkpoint, None, said.append)
    found = parameters(checkpoint, family, model)
    rows = [
        ("format", f"Megatron's older {FILE} files; needs `import --legacy`"),
        ("directory", str(checkpoint.directory)),
        ("layout", _kind(checkpoint, family)),
        *model_rows(model),
        *weight_rows({f"{name}.{layer}": tensor for (name, layer), tensor in found.items()}),
    ]
    return "\n".join([*(f"{name:<10} {value}" for name, value in rows if value), *said])
