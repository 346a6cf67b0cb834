"""What a checkpoint directory says of itself. No torch, no Megatron.

``--save DIR`` holds ``iter_0000100/`` directories and Megatron's ``latest_checkpointed_iteration.txt``. A checkpoint is
written under a temporary name and renamed when it is complete, manifest included: a directory with the final name is a
complete checkpoint, whatever killed the job.
"""

from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Optional

FORMAT = "megatron.dmc.torch_dist"
FORMAT_VERSION = 1
LATEST = "latest_checkpointed_iteration.txt"
TEMPORARY = ".tmp_"


@dataclass
class Manifest:
    """``manifest.json`` of one checkpoint."""

    stage: str
    """pretrain, zero_out, retrofit or finetune; import for a converted one."""
    iteration: int
    """Finished optimizer steps of the stage."""
    train_iters: int
    consumed_samples: int
    consumed_tokens: int
    """Of this stage."""
    target_cr: float
    """Compression ratio that the last step was trained to; 1 before retrofit."""
    measured_cr: Optional[float] = None
    """Tokens / slots with hard decisions over the last logged steps."""
    source: Optional[str] = None
    """Checkpoint that the stage was initialised from."""
    lineage: list[str] = field(default_factory=list)
    """Stages before this one, oldest first."""
    versions: dict[str, str] = field(default_factory=dict)
    has_optimizer: bool = True

    @property
    def finished(self) -> bool:
        return self.iteration >= self.train_iters

    def write(self, directory: Path) -> None:
        content = {"format": FORMAT, "format_version": FORMAT_VERSION, **dataclasses.asdict(self)}
        (directory / "manifest.json").write_text(json.dumps(content, indent=2) + "\n")


def read_manifest(directory: Path) -> Manifest:
    """Of a checkpoint directory. Raises ``ValueError`` when it is incomplete or of another format."""
    path = directory / "manifest.json"
    if not path.is_file() or not (directory / "metadata.json").is_file():
        raise ValueError(f"{directory} is not a complete checkpoint (manifest.json or metadata.json is missing); "
                         "name another one")  # fmt: skip
    try:
        content = json.loads(path.read_text())
        if (content.pop("format"), content.pop("format_version")) != (FORMAT, FORMAT_VERSION):
            raise ValueError("another format or version")
        return Manifest(**content)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is not a version {FORMAT_VERSION} {FORMAT} manifest: {error}") from error


def iteration_directory(save: Path, iteration: int) -> Path:
    return save / f"iter_{iteration:07d}"


def complete_checkpoints(save: Path) -> list[Path]:
    """Checkpoints under a --save directory, oldest first."""
    found = [p for p in save.glob("iter_*") if re.fullmatch(r"iter_\d{7,}", p.name) and (p / "manifest.json").is_file()]
    return sorted(found, key=lambda p: int(p.name[5:]))


def resolve_checkpoint(path: str | Path) -> Path:
    """``path`` itself when it is a checkpoint, or the newest one under it. Raises ``ValueError`` when there is none."""
    path = Path(path)
    if not path.is_dir():
        raise ValueError(f"checkpoint {path} does not exist")
    if (path / "manifest.json").is_file() or (path / "metadata.json").is_file():
        read_manifest(path)
        return path
    found = complete_checkpoints(path)
    if not found:
        raise ValueError(f"{path} holds no complete checkpoint (iter_*/manifest.json); was its run stopped before the first "
                         "save?")  # fmt: skip
    read_manifest(found[-1])
    return found[-1]
