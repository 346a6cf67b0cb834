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

from functools import partial
from pathlib import Path

from megatron.dmc.checkpoint.formats.base import Given, Row, Source
from megatron.dmc.checkpoint.formats.legacy.rank_file import FILE
from megatron.dmc.checkpoint.formats.legacy.ranks import find_directory, is_legacy, open_legacy, parameters
from megatron.dmc.checkpoint.formats.megatron.arguments import check_zeroed, describe_source, source_of

__all__ = ["FILE", "describe", "find_directory", "is_legacy", "matches", "open_model"]

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
    tp, pp, virtual = checkpoint.first.layout
    layout = f"TP {tp} x PP {pp}" + (f" x VPP {virtual}" if virtual > 1 else "")
    return source_of(checkpoint.recorded(), given, partial(parameters, checkpoint), layout)


def describe(path: Path) -> list[Row]:
    """Layout and sizes, and what an import would assume."""
    return describe_source(_open(path, Given()), f"Megatron's older {FILE} files; needs `import --legacy`")
