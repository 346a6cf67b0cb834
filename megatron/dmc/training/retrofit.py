"""Entry point: one stage of a retrofit, or pre-training.

    python -m torch.distributed.run --nproc-per-node 8 ... -m megatron.dmc.training.retrofit --config FILE --stage
        retrofit --target-cr 4 --init-from ZERO_OUT_DIR --save DIR --data-path PREFIX --tokenizer MODEL

``--init-from`` starts a stage from another checkpoint's weights. ``--save`` is where the stage writes and, when it
already holds a complete checkpoint, where it resumes. Wrong input ends with one message and status 2 before anything
is written; SIGTERM and SIGUSR1 save and end with status 0.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Optional

from megatron.dmc import schedule
from megatron.dmc.checkpoint.manifest import Manifest, newest_checkpoint, read_manifest, resolve_checkpoint
from megatron.dmc.config import PREDECESSORS, RunConfig
from megatron.dmc.training.teacher import find_teacher

if TYPE_CHECKING:  # they import torch
    from megatron.dmc.training.preemption import Starts, StopSignal
    from megatron.dmc.training.tokenizer import Tokenizer
    from megatron.dmc.training.watch import Watch

Found = Optional[tuple[Path, Manifest]]


def _find(asked: dict) -> tuple[Found, Found]:
    """(checkpoint to resume from, checkpoint to initialise from) for what the user asked; at most one of them."""
    training = asked.get("training", {})
    if training.get("save"):
        _check_writable(Path(training["save"]))
        path = newest_checkpoint(training["save"])
        if path is not None:
            # --init-from is not looked at again: what a stage started from may be gone by now.
            return (path, read_manifest(path)), None
    if training.get("init_from"):
        path = resolve_checkpoint(training["init_from"])
        return None, (path, read_manifest(path))
    return None, None


def _check_writable(save: Path) -> None:
    """Refuse now what would fail at the first checkpoint, after hours."""
    there = save.absolute()
    while not (there.exists() or there.is_symlink()):
        there = there.parent
    if not there.is_dir():
        raise ValueError(f"save {save}: {there} is not a directory; name another place for checkpoints")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"save {save}: {there} cannot be written; name another place for checkpoints")


def _check_packages(config: RunConfig) -> None:
    """Refuse options whose package is not here, before the first step rather than at the first log line."""
    from megatron.dmc.model.layer_specs import resolve_transformer_impl

    for option, package in (("tensorboard_dir", "tensorboard"), ("wandb_project", "wandb")):
        value = getattr(config.training, option)
        if value and importlib.util.find_spec(package) is None:
            raise ValueError(
                f"{option} is {value}, which needs the {package} package; pip install {package}, or leave it out"
            )
    resolve_transformer_impl(config.training.transformer_impl)


def check_order(config: RunConfig, resume: Found, init: Found) -> None:
    """Refuse a stage that does not follow from its checkpoint, and fill in the compression ratios that follow.

    Raises:
        ValueError: naming the stages, and what to do.
    """
    stage = config.stage
    if resume is not None:
        path, manifest = resume
        if manifest.stage != stage.stage:
            raise ValueError(
                f"--save {config.training.save} holds stage {manifest.stage} ({path.name}), not "
                f"{stage.stage}; give each stage a directory of its own"
            )
    if init is None and resume is None:
        if "none" not in PREDECESSORS[stage.stage]:
            raise ValueError(
                f"stage {stage.stage} needs --init-from, a checkpoint of stage {' or '.join(PREDECESSORS[stage.stage])}"
            )
        return
    source = init or resume
    assert source is not None
    path, manifest = source
    if init is not None:
        if manifest.stage not in PREDECESSORS[stage.stage]:
            raise ValueError(
                f"stage {stage.stage} cannot start from {path}, which is of stage {manifest.stage}; it needs "
                f"{' or '.join(p for p in PREDECESSORS[stage.stage] if p != 'none')}"
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


def check_resume(config: RunConfig, saved: dict, path: Path) -> None:
    """Refuse to resume with settings that would change what the run computes.

    Raises:
        ValueError: naming the setting and both values.
    """
    now = config.to_dict()
    # Older checkpoints know nothing of a teacher; without one the other two settings mean nothing.
    distill = ("distill_from",)
    if now["training"]["distill_from"]:
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
            value = saved[section].get(key)
            if now[section][key] != value:
                raise ValueError(
                    f"{section}.{key} is {now[section][key]!r}, but {path} was written with {value!r}; resume "
                    "with the same settings, or start a new --save directory"
                )


def prepare(argv: Optional[list[str]] = None) -> tuple[RunConfig, Found, Found]:
    """Everything that can be refused without taking memory or writing: configuration, checkpoints, data, tokenizer."""
    from megatron.dmc.training import arguments, initialize

    found: list[tuple[Found, Found]] = []

    def saved_config(asked: dict) -> Optional[dict]:
        found.append(_find(asked))
        source = found[-1][0] or found[-1][1]
        return arguments.read_saved_config(source[0]) if source else None

    config = arguments.resolve(argv, saved_config)
    resume, init = found[-1]
    if resume is not None:
        if not resume[1].has_optimizer:
            raise ValueError(f"{resume[0]} holds weights only; name it with --init-from, and another --save directory")
        saved = arguments.read_saved_config(resume[0])
        # What was derived from the first --init-from need not be said again.
        for key in ("start_cr", "target_cr"):
            if getattr(config.stage, key) is None:
                setattr(config.stage, key, saved["stage"][key])
    check_order(config, resume, init)
    config.check(initialize.world_size())
    if config.training.distill_from is not None:
        # The very checkpoint, not the newest of its directory: a resumed run must have the same teacher.
        config.training.distill_from = str(find_teacher(config)[0])
    if resume is not None:
        check_resume(config, saved, resume[0])
    if config.data.tokenizer is None:
        raise ValueError(
            "tokenizer is not set; name the sentencepiece model or Hugging Face directory that made the data"
        )
    _check_packages(config)
    return config, resume, init


def banner(config: RunConfig) -> str:
    """Which paths are active: said once, at the start."""
    import torch

    from megatron.dmc.model.layer_specs import resolve_transformer_impl
    from megatron.dmc.ops import attention_backend

    t, p = config.training, config.parallel
    cuda = torch.cuda.is_available()
    kernel = attention_backend("cuda" if cuda else "cpu", torch.bfloat16 if t.bf16 else torch.float32).name
    where = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"
    try:
        import apex  # noqa: F401

        fused = "apex"
    except ImportError:
        fused = "torch"
    stage = config.stage
    goal = f", CR {schedule.target_cr(stage, 0):.2f} -> {stage.target_cr:g}" if schedule.compresses(stage) else ""
    window = "unbounded" if config.dmc.window is None else config.dmc.window
    return (
        f"megatron.dmc: {stage.stage}{goal}, {schedule.train_iters(stage)} iterations\n"
        f"  device: {where} | layers: {resolve_transformer_impl(t.transformer_impl)} | attention: {kernel} | "
        f"pooling: banded matmul, window {window} | optimizer: "
        f"{'transformer_engine/apex' if resolve_transformer_impl(t.transformer_impl) != 'local' else fused} Adam | "
        f"{'bf16, fp32 main parameters' if t.bf16 else 'fp32'}\n"
        f"  tensor {p.tensor_model_parallel_size} x pipeline {p.pipeline_model_parallel_size} x data, "
        f"virtual stages {p.virtual_pipeline_model_parallel_size or 1}, sequence parallel {p.sequence_parallel}, "
        f"distributed optimizer {p.use_distributed_optimizer}, recompute {p.recompute_granularity}"
    )


def main(argv: Optional[list[str]] = None) -> int:
    """Run one stage. Returns the exit status: 0 done or saved on a signal, 2 wrong input."""
    warnings.filterwarnings("ignore", module=r"megatron\.core")
    warnings.filterwarnings("ignore", message=".*[Aa]pex.*")
    warnings.filterwarnings("ignore", message=".*full scope is deprecated.*")
    from megatron.dmc.training import initialize

    try:
        config, resume, init = prepare(argv)
        from megatron.dmc.training.data import check_datasets
        from megatron.dmc.training.tokenizer import load_tokenizer

        tokenizer = load_tokenizer(config.data.tokenizer)
        check_datasets(config, tokenizer)
    except ValueError as error:
        return _refuse(error)
    from megatron.dmc.training.preemption import Starts, StopSignal
    from megatron.dmc.training.watch import Watch, clear_note

    stop = StopSignal(config.training.exit_duration_in_mins)
    save = config.training.save
    starts = Starts(save if initialize.is_rank_0() else None)
    try:
        starts.begin(config.training.max_starts_without_step)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    if initialize.is_rank_0():
        clear_note(save)
    initialize.initialize(config)
    try:
        with Watch(config.parallel.lost_host_seconds, save) as watch:
            return _train(config, tokenizer, resume, init, stop, starts, watch)
    finally:
        stop.restore()
        initialize.shutdown()


def _refuse(error: ValueError) -> int:
    """One message for all ranks. The others wait for it: a launcher ends rank 0 as soon as another rank has ended."""
    from megatron.dmc.training import initialize

    if initialize.is_rank_0():
        print(f"error: {error}", file=sys.stderr, flush=True)
    else:
        time.sleep(3)
    return 2


def _train(
    config: RunConfig, tokenizer: Tokenizer, resume: Found, init: Found, stop: StopSignal, starts: Starts, watch: Watch
) -> int:
    """What :func:`main` does once the process group is there."""
    from megatron.dmc.training import initialize
    from megatron.dmc.training.loop import Trainer

    if initialize.is_rank_0():
        print(banner(config), flush=True)
    try:
        trainer = Trainer(config, tokenizer, resume=resume, init_from=init)
    except ValueError as error:
        starts.done()
        return _refuse(error)
    source = resume or init
    if source is not None and not (config.training.verify_checkpoints and source[1].crc32):
        why = "verify_checkpoints is off" if source[1].crc32 else "it has none (conversions write none)"
        trainer.logger.print(f"WARNING: {source[0]} was loaded without a look at its checksums: {why}")
    if resume is not None:
        trainer.logger.print(f"resumed {resume[0]} at iteration {trainer.iteration}")
    elif init is not None:
        trainer.logger.print(f"initialised from {init[0]} (stage {init[1].stage}, iteration {init[1].iteration})")
    if trainer.iteration >= trainer.total_iters:
        trainer.logger.print(f"stage {config.stage.stage} is finished; nothing to do")
        starts.done()
    else:
        trainer.logger.print(f"{stop}\n{watch}")
        trainer.train(stop, starts)
    trainer.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
