"""Megatron's single-file format: what Megatron-LM saves without distributed checkpointing, and NVIDIA's DMC releases.

    DIR/latest_checkpointed_iteration.txt                       "release", or a number
    DIR/iter_0000100/mp_rank_TT[_PPP]/model_optim_rng.pt        tensor rank TT, pipeline rank PPP when there are several

A file is a pickled dict: ``args`` (the ``argparse.Namespace`` of the run), ``checkpoint_version``, ``iteration``,
``model`` (or ``model0``, ``model1``, ... for the chunks of an interleaved pipeline), optimizer and random states. Only
the arguments and the model are looked at; nothing in the file is run, and no class that it names is imported.

Sources: ``megatron/training/checkpointing.py`` (get_checkpoint_name, generate_state_dict, load_args_from_checkpoint)
and, for the authors' arguments and the place of their decision neuron, ``megatron/contrib/dmc/{arguments,dmc}.py`` and
``pretrain_gpt_with_dmc.py`` of github.com/NVIDIA/Megatron-LM, branch dmc, commit d36bf8d (2024).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from megatron.dmc.checkpoint import mapping
from megatron.dmc.checkpoint.formats import hf
from megatron.dmc.checkpoint.formats.base import Given, Row, Source, imported_run, model_rows, weight_row
from megatron.dmc.checkpoint.formats.legacy.rank_file import FILE
from megatron.dmc.checkpoint.formats.legacy.ranks import (
    LegacyCheckpoint,
    find_directory,
    is_legacy,
    open_legacy,
    parameters,
)
from megatron.dmc.checkpoint.formats.megatron.arguments import model_config, read_training, wrong
from megatron.dmc.checkpoint.mapping import views
from megatron.dmc.checkpoint.mapping.views import Key
from megatron.dmc.checkpoint.tensors import Lazy
from megatron.dmc.config import ModelConfig

__all__ = ["FILE", "describe", "find_directory", "is_legacy", "matches", "open_model"]

matches = is_legacy


def open_model(path: Path, given: Given = Given()) -> Source:
    """The model in a checkpoint of any tensor and pipeline parallel size.

    Args:
        path: what --save was, one of its iteration directories, or any directory with ``mp_rank_*`` in it.
    """
    source = _open(path, given)
    if source.manifest.stage == "zero_out":
        _check_zeroed(source.parameters, source.run.model)
    return source


def _open(path: Path, given: Given) -> Source:
    checkpoint = open_legacy(path)
    recorded = checkpoint.recorded()
    model = model_config(recorded, given)
    config = mapping.to_hf_config(model, str(checkpoint.dtype).removeprefix("torch."))
    family = mapping.family_of(config)
    manifest, dmc = read_training(recorded, given)
    run = imported_run(model, dmc, manifest)
    found = parameters(checkpoint, family, model)
    tensors = views.to_hf(family, model, found)
    return Source(
        path=checkpoint.directory,
        kind=_kind(checkpoint, family),
        family=family,
        config=config if manifest.stage == "import" else mapping.dmc_config(config, run, manifest),
        run=run,
        manifest=manifest,
        tensors=tensors,
        parameters=found,
        weight_map=hf.shard_layout(tensors),
        notes=checkpoint.notes,
    )


def _kind(checkpoint: LegacyCheckpoint, family: mapping.Family) -> str:
    tp, pp, virtual = checkpoint.first.layout
    layout = f"TP {tp} x PP {pp}" + (f" x VPP {virtual}" if virtual > 1 else "")
    return f"{family.model_type}, {layout}, iteration {checkpoint.first.iteration}"


def _check_zeroed(found: Mapping[Key, Lazy], model: ModelConfig) -> None:
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


def describe(path: Path) -> list[Row]:
    """Layout and sizes, and what an import would assume."""
    source = _open(path, Given())
    return [
        ("format", f"Megatron's older {FILE} files; needs `import --legacy`"),
        ("directory", str(source.path)),
        ("layout", source.kind),
        *model_rows(source.run.model),
        weight_row(source.parameters.values()),
        *(("", note) for note in source.notes),
    ]
