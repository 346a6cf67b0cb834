"""Directories that others wrote, told by the names of their files, and the command that imports each. No torch."""

import re
from pathlib import Path
from typing import NamedTuple, Optional

METADATA = ".metadata"
"""File that ``torch.distributed.checkpoint`` writes last: what has it is a whole checkpoint."""
_ITERATION = re.compile(r"release|iter_\d{7,}")
_OWN = ("manifest.json", "config.yaml")
"""Files that every checkpoint of this package has, and none of Megatron's."""
INSIDE = ("weights", "model_weights")
"""Directories in which NeMo 2 and NeMo 1 keep the weights of a checkpoint."""


class Foreign(NamedTuple):
    """Format of a directory that training does not read."""

    kind: str
    """With its article, for messages."""
    option: str
    """Flag of ``dmc convert import``."""


def iterations(path: Path) -> list[Path]:
    """Directories of single iterations, in Megatron's names, the newest last."""
    return sorted(p for p in path.glob("*") if _ITERATION.fullmatch(p.name) and p.is_dir())


def is_megatron(path: Path) -> bool:
    """True for one ``torch_dist`` checkpoint that is not this package's."""
    return (path / METADATA).is_file() and not any((path / name).is_file() for name in _OWN)


def foreign_format(path: Path) -> Optional[Foreign]:
    """Format of a directory, or of the iterations or weights in it; None: not one that can be imported."""
    if not path.is_dir():
        return None
    if (path / "config.json").is_file() and not any((path / name).is_file() for name in _OWN):
        return Foreign("a Hugging Face directory", "--hf")
    places = [path, *iterations(path)]
    if any(any(place.glob("mp_rank_*")) for place in places):
        return Foreign("a Megatron checkpoint of mp_rank_* files", "--legacy")
    if any(is_megatron(place) for place in (*places, *(path / name for name in INSIDE))):
        return Foreign("a torch_dist checkpoint that Megatron-LM, Megatron-Bridge or NeMo wrote", "--megatron")
    return None


def import_command(path: Path) -> Optional[str]:
    """Format of a foreign directory and the command that imports it, as text; None where no import reads it."""
    found = foreign_format(path)
    if found is None:
        return None
    return f"{path} is {found.kind}; dmc convert import {found.option} {path} --save DIR makes a checkpoint of it"


def export_command(path: Path) -> Optional[str]:
    """Format of a checkpoint that is no Hugging Face directory and the commands that export it; None if unknown."""
    if any((place / "manifest.json").is_file() for place in (path, *iterations(path))):
        return (
            f"{path} is a checkpoint; dmc convert export --load {path} --save DIR makes a Hugging Face directory of it"
        )
    found = foreign_format(path)
    if found is None:
        return None
    return (
        f"{path} is {found.kind}; dmc convert import {found.option} {path} --save CHECKPOINT and dmc convert export "
        "--load CHECKPOINT --save DIR make a Hugging Face directory of it"
    )
