"""Manifest of a checkpoint directory, and how checkpoints are found. No torch.

``--save DIR`` holds ``iter_0000100/`` directories and Megatron's ``latest_checkpointed_iteration.txt``. A checkpoint is
written under a temporary name and renamed when it is complete, manifest included: a directory with the final name is a
complete checkpoint, whatever killed the job.
"""

import dataclasses
import json
import re
import sys
import zlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

from megatron.dmc.checkpoint import checksums, foreign
from megatron.dmc.config import STAGES, build
from megatron.dmc.config.checks import not_negative, one_line, one_of, positive, require

FORMAT = "megatron.dmc.torch_dist"
FORMAT_VERSION = 1
LATEST = "latest_checkpointed_iteration.txt"
TEMPORARY = ".tmp_"
_ITERATION = r"iter_\d{7,}"
_OWN_CRC32 = "manifest_crc32"
_ADVICE = "restore it from a copy, or name another checkpoint"
_SMALL = 1 << 20
"""Size in bytes of files that are read for their checksums whenever a checkpoint is looked at."""
SHARDS_FILE = "shards.json"
"""Layout of the weights that a model had in Hugging Face's format; lies in ``hf/``."""
HF_FILES = "hf"
"""Directory in a checkpoint with the small files of the Hugging Face model that it came from: config.json, tokenizer,
generation_config.json, and ``shards.json``, the layout of its weights. Training hands it on from stage to stage."""


@dataclass
class Manifest:
    """``manifest.json`` of one checkpoint."""

    stage: str
    """pretrain, zero_out, calibrate, retrofit or finetune; import for a converted one."""
    iteration: int
    """Finished optimizer steps of the stage."""
    train_iters: int
    consumed_samples: int
    consumed_tokens: int
    """Tokens that this stage has consumed."""
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
    files: dict[str, int] = field(default_factory=dict)
    """Size in bytes of every other file of the checkpoint, filled in by :meth:`write`."""
    crc32: dict[str, str] = field(default_factory=dict)
    """CRC-32 of those files, 8 hexadecimal digits each; empty when they were not taken (older conversions)."""
    family: Optional[str] = None
    """``model_type`` of the Hugging Face model at the start of the lineage, whose files lie in ``hf/``."""
    base: Optional[str] = None
    """Checkpoint with the frozen weights of a run that trained adapters only, an absolute path; this one holds the
    adapters. None: this one holds all weights."""
    base_hash: Optional[str] = None
    """Hash of the frozen weights at ``base``, by which a changed base is refused (``frozen_base.base_hash``)."""

    def check(self) -> None:
        """Raise ``ValueError`` for a value that no training writes."""
        one_of(self, "stage", "import", *STAGES)
        not_negative(self, "iteration", "train_iters", "consumed_samples", "consumed_tokens", "measured_cr")
        positive(self, "target_cr")
        require((self.base is None) == (self.base_hash is None), "base and base_hash do not stand together")
        require(all(size >= 0 for size in self.files.values()), "files has a negative size")

    @property
    def finished(self) -> bool:
        return self.iteration >= self.train_iters

    def write(self, directory: Path, crc32: Optional[Mapping[str, str]] = None) -> None:
        """Write ``directory/manifest.json``. Comes last: it lists the files that are there.

        Args:
            crc32: what is known already; the files that it lacks are read for theirs. None: without checksums.
        """
        found = sorted(p for p in directory.rglob("*") if p.is_file() and p != directory / "manifest.json")
        self.files = {p.relative_to(directory).as_posix(): p.stat().st_size for p in found}
        if crc32 is not None:
            others = checksums.checksums(directory, self.files.keys() - crc32.keys())
            self.crc32 = {name: crc32.get(name) or others[name] for name in self.files}
        content = {"format": FORMAT, "format_version": FORMAT_VERSION, **dataclasses.asdict(self)}
        content[_OWN_CRC32] = _crc32_of(content)
        (directory / "manifest.json").write_text(json.dumps(content, indent=2) + "\n")


def _crc32_of(content: Mapping[str, Any]) -> str:
    """CRC-32 of a manifest's values, without its own checksum; spaces and the order of keys are free."""
    return f"{zlib.crc32(json.dumps(content, sort_keys=True).encode()):08x}"


def _parse(text: str) -> Manifest:
    """Manifest from JSON. Raises ``ValueError`` and others for what :meth:`Manifest.write` does not write."""
    content = json.loads(text)
    if (content.get("format"), content.get("format_version")) != (FORMAT, FORMAT_VERSION):
        raise ValueError("another format or version")
    # Manifests of older versions have none; their files and values are checked as far as they go.
    if (written := content.pop(_OWN_CRC32, None)) is not None and written != (found := _crc32_of(content)):
        raise ValueError(f"its values were changed after it was written (CRC-32 {found}, should be {written})")
    del content["format"], content["format_version"]
    manifest = build(Manifest, content)
    manifest.check()
    return manifest


def read_manifest(directory: Path) -> Manifest:
    """Manifest of a checkpoint directory. Looks at names and sizes of files, and at the checksums of small ones.

    Raises:
        ValueError: the directory is of another format, or the manifest or a small file was changed, or a file is
            missing or truncated, or the directory has the name of another iteration.
    """
    path = directory / "manifest.json"
    if not path.is_file() or not (directory / "metadata.json").is_file():
        raise ValueError(
            f"{directory} is not a complete checkpoint (manifest.json or metadata.json is missing); name another one"
        )
    try:
        manifest = _parse(path.read_text())
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{path} is not a version {FORMAT_VERSION} {FORMAT} manifest: {one_line(error)}; {_ADVICE}"
        ) from error
    if re.fullmatch(_ITERATION, directory.name) and int(directory.name[5:]) != manifest.iteration:
        raise ValueError(
            f"{directory} holds iteration {manifest.iteration}, as its manifest.json says; give it the name "
            f"{iteration_directory(directory.parent, manifest.iteration).name} back, or name another checkpoint"
        )
    _check_files(directory, manifest)
    return manifest


def _check_files(directory: Path, manifest: Manifest) -> None:
    """Compare names and sizes of a checkpoint's files, and contents of small ones, with its manifest."""
    for name, size in manifest.files.items():
        file = directory / name
        if not file.is_file():
            raise ValueError(
                f"{directory} is not a complete checkpoint: {name} is missing; copy it again, or name another "
                "checkpoint"
            )
        if file.stat().st_size != size:
            raise ValueError(
                f"{directory} is not a complete checkpoint: {name} has {file.stat().st_size} bytes and should "
                f"have {size}; copy it again, or name another checkpoint"
            )
    small = {n: manifest.crc32[n] for n, size in manifest.files.items() if size <= _SMALL and n in manifest.crc32}
    checksums.require_undamaged(directory, small, f"checkpoint {directory}", _ADVICE)


def check_contents(directory: Path, manifest: Manifest, names: Optional[Collection[str]] = None) -> None:
    """Compare files with the manifest's checksums, which takes as long as reading them.

    Args:
        names: files to compare; None: all.

    Raises:
        ValueError: it names what differs.
    """
    expected = {name: crc32 for name, crc32 in manifest.crc32.items() if names is None or name in names}
    checksums.require_undamaged(directory, expected, f"checkpoint {directory}", _ADVICE)


def iteration_directory(save: Path, iteration: int) -> Path:
    return save / f"iter_{iteration:07d}"


def complete_checkpoints(save: Path) -> list[Path]:
    """Checkpoints under a --save directory, oldest first."""
    found = [p for p in save.glob("iter_*") if re.fullmatch(_ITERATION, p.name) and (p / "manifest.json").is_file()]
    return sorted(found, key=lambda p: int(p.name[5:]))


def newest_checkpoint(save: str | Path) -> Optional[Path]:
    """The newest checkpoint under a --save directory, or None when there is none yet.

    Raises:
        ValueError: the newest one lacks its manifest. To go on from an older one instead is for a person to decide.
    """
    save = Path(save)
    found = complete_checkpoints(save)
    newest = int(found[-1].name[5:]) if found else -1
    broken = [p for p in save.glob("iter_*") if re.fullmatch(_ITERATION, p.name) and int(p.name[5:]) > newest]
    latest = save / LATEST
    if not broken and latest.is_file():
        text = latest.read_text(errors="replace").strip()
        noted = int(text) if re.fullmatch("[0-9]{1,18}", text) else None
        # A run that was killed between naming a checkpoint and noting it here is one checkpoint ahead of the note.
        if noted is None or noted > newest:
            broken = [latest if noted is None else iteration_directory(save, noted)]
    if broken and (what := foreign.import_command(max(broken)) or (not found and foreign.import_command(save))):
        raise ValueError(f"{save} is no place to go on from: {what}; give this run a --save of its own")
    if broken:
        path = max(broken)
        other = f" to use {found[-1].name}" if found else ""
        raise ValueError(
            f"{path} is not a complete checkpoint (manifest.json is missing); restore it, or remove it and "
            f"{latest.name}{other}"
        )
    return found[-1] if found else None


def resolve_checkpoint(path: str | Path) -> Path:
    """``path`` itself when it is a checkpoint, or the newest one under it. Raises ``ValueError`` when there is none."""
    path = Path(path)
    if not path.is_dir():
        raise ValueError(f"checkpoint {path} does not exist")
    if not complete_checkpoints(path) and (what := foreign.import_command(path)):
        raise ValueError(f"{what}: name that one")
    if (path / "manifest.json").is_file() or (path / "metadata.json").is_file():
        read_manifest(path)
        return path
    newest = newest_checkpoint(path)
    if newest is None:
        raise ValueError(
            f"{path} holds no complete checkpoint (iter_*/manifest.json); was its run stopped before the first save?"
        )
    read_manifest(newest)
    return newest


def read_hf_files(checkpoint: Path) -> dict[str, bytes]:
    """Name -> content of the Hugging Face files that a checkpoint hands on; empty when it has none."""
    directory = checkpoint / HF_FILES
    paths = sorted(path for path in directory.rglob("*") if path.is_file())
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in paths}


def write_hf_files(checkpoint: Path, files: Mapping[str, bytes]) -> None:
    """Write what :func:`read_hf_files` reads; call it before the manifest is written, which lists the files."""
    write_files(checkpoint / HF_FILES, files)


def write_files(directory: Path, files: Mapping[str, bytes]) -> None:
    """Write small files, name -> content. A name may have folders, which are made."""
    for name, content in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(content)


def main(argv: list[str]) -> int:
    """``python -m megatron.dmc.checkpoint.manifest DIR``: for scripts, how far the stage under a --save directory is.

    Returns 0 when it is finished, 1 when it is not or has no checkpoint yet, 2 for a damaged one.
    """
    if len(argv) != 1:
        print("usage: python -m megatron.dmc.checkpoint.manifest SAVE_DIRECTORY", file=sys.stderr)
        return 2
    try:
        path = newest_checkpoint(argv[0])
        if path is None:
            print(f"{argv[0]}: no checkpoint yet")
            return 1
        manifest = read_manifest(path)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{path}: {manifest.stage}, iteration {manifest.iteration} of {manifest.train_iters}")
    return 0 if manifest.finished else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
