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
from megatron.dmc.checkpoint.formats.megatron.arguments import model_config, read_training
from megatron.dmc.checkpoint.formats.megatron.neuron import check_zeroed
from megatron.dmc.checkpoint.mapping import views

matches = is_legacy


def open_model(path: Path, given: Given = Given()) -> Source:
    """The model in a checkpoint of any tensor and pipeline parallel size.

    Args:
        path: what --save was, one of its iteration directories, or any directory with ``mp_rank_*`` in it.
    """
    source = _open(path, given)
    if source.manifest.stage == "zero_out":
        check_zeroed(source.parameters, source.run.model)
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
