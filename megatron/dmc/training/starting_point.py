"""The checkpoint that a run starts from: found, and refused when it does not fit, before memory is taken. No torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Optional

from megatron.dmc.checkpoint.frozen_base import base_hash, find_base
from megatron.dmc.checkpoint.manifest import Manifest, newest_checkpoint, read_manifest, resolve_checkpoint
from megatron.dmc.config import RunConfig, predecessors
from megatron.dmc.config.checks import writable


@dataclass(frozen=True)
class StartingPoint:
    """Checkpoint that a run continues, or that it takes its weights from."""

    path: Path
    manifest: Manifest
    resumes: bool
    """It lies under --save: the run continues it, optimizer included. Else it was named with --init-from."""


def find_starting_point(save: Optional[str], init_from: Optional[str]) -> Optional[StartingPoint]:
    """Find the newest checkpoint under ``save``, or without one the checkpoint ``init_from``.

    Raises:
        ValueError: ``save`` cannot be written or is a model itself, or a checkpoint is missing, incomplete or damaged.
    """
    if save:
        writable("save", save)
        if (path := newest_checkpoint(save)) is not None:
            # --init-from is not looked at again: what a stage started from may be gone by now.
            return StartingPoint(path, read_manifest(path), resumes=True)
        # Who names that directory later would get the newest checkpoint in it, and not the one that it is.
        for name, what in (("manifest.json", "a checkpoint"), ("config.json", "a Hugging Face directory")):
            if (Path(save) / name).is_file():
                raise ValueError(f"save {save} is {what} itself; name another place for checkpoints")
    if init_from:
        path = resolve_checkpoint(init_from)
        return StartingPoint(path, read_manifest(path), resumes=False)
    return None


def check_stage_order(config: RunConfig, start: Optional[StartingPoint], saved: Optional[dict] = None) -> None:
    """Refuse a stage that does not follow from its checkpoint, and fill in the compression ratios that follow.

    saved: the configuration of the checkpoint ``start``.

    Raises:
        ValueError: naming the stages, and what to do.
    """
    stage = config.stage
    allowed = predecessors(stage.stage, config.dmc.decision_source == "adapter")
    before = [name for name in allowed if name != "none"]
    if start is None:
        if "none" not in allowed:
            raise ValueError(f"stage {stage.stage} needs --init-from, a checkpoint of stage {' or '.join(before)}")
        return
    path, manifest = start.path, start.manifest
    if start.resumes:
        if manifest.stage != stage.stage:
            raise ValueError(
                f"--save {config.training.save} holds stage {manifest.stage} ({path.name}), not "
                f"{stage.stage}; give each stage a directory of its own"
            )
        return
    if manifest.stage not in before:
        raise ValueError(
            f"stage {stage.stage} cannot start from {path}, which is of stage {manifest.stage}; it needs "
            f"{' or '.join(before)}"
        )
    if manifest.stage == "zero_out" and saved is not None:
        freed = RunConfig.from_dict(saved).dmc
        if freed.neuron != config.dmc.neuron:
            raise ValueError(
                f"{path} has freed the channels of decision_source {freed.decision_source}, and this run decides by "
                f"{config.dmc.decision_source}; run zero_out with decision_source {config.dmc.decision_source}"
            )
    # Any checkpoint of retrofit is usable at the ratio that it has reached; the others are not done before the end.
    if not manifest.finished and manifest.stage != "retrofit":
        raise ValueError(
            f"{path} is unfinished: {manifest.stage} stands at iteration {manifest.iteration} of "
            f"{manifest.train_iters}; let it finish (the same command resumes it)"
        )
    if stage.stage == "retrofit" and stage.start_cr is None:
        stage.start_cr = manifest.target_cr
    if stage.stage == "finetune" and stage.target_cr is None:
        stage.target_cr = manifest.target_cr


def frozen_base(config: RunConfig, start: Optional[StartingPoint]) -> tuple[Optional[str], Optional[str]]:
    """Checkpoint with the weights that the run leaves frozen, as an absolute path, and its hash; Nones for none.

    Raises:
        ValueError: the base of ``start`` is gone or was changed, or a base has no checksums to know it by.
    """
    base = None if start is None else find_base(start.path, start.manifest)
    if base is None or not config.training.freeze_base:
        return None, None
    found = base_hash(read_manifest(base))
    if found is None:
        raise ValueError(
            f"{base} has no checksums, by which the checkpoints of freeze_base know their frozen weights; convert it "
            "anew with dmc convert import"
        )
    return str(base.resolve()), found


def check_resume(config: RunConfig, saved: dict, path: Path) -> None:
    """Refuse to resume with settings that would change what the run computes.

    Raises:
        ValueError: naming the setting and both values.
    """
    # Older checkpoints lack settings that have come since, and had what is their default.
    now, saved = config.to_dict(), RunConfig.from_dict(saved).to_dict()
    distill = ("distill_from", "freeze_base")
    if now["training"]["distill_from"] or now["training"]["freeze_base"]:  # without a teacher they mean nothing
        distill += ("distill_weight", "distill_temperature")
    for section, keys in (
        ("stage", None),
        ("optimizer", None),
        ("dmc", None),
        ("training", ("global_batch_size", "bf16", "seed", *distill)),
        ("data", ("seq_length",)),
        # Megatron keeps its two optimizers' states in different formats.
        ("parallel", ("use_distributed_optimizer",)),
    ):
        for key in keys or saved[section]:
            value = saved[section][key]
            if now[section][key] != value:
                raise ValueError(
                    f"{section}.{key} is {now[section][key]!r}, but {path} was written with {value!r}; resume "
                    "with the same settings, or start a new --save directory"
                )
