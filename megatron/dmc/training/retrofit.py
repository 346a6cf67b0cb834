"""Entry point: one stage of a retrofit, or pre-training.

    python -m torch.distributed.run --nproc-per-node 8 ... -m megatron.dmc.training.retrofit --config FILE --stage
        retrofit --target-cr 4 --init-from ZERO_OUT_DIR --save DIR --data-path PREFIX --tokenizer MODEL

``--init-from`` starts a stage from another checkpoint's weights. ``--save`` is where the stage writes and, when it
already holds a complete checkpoint, where it resumes. Wrong input ends with one message and status 2 before anything
is written; SIGTERM, SIGUSR1 and SIGINT save and end with status 0, or 75 where nothing can be saved.
"""

from __future__ import annotations

import importlib.util
import sys
import time
import warnings
from typing import TYPE_CHECKING, Optional

from megatron.dmc import flags, schedule
from megatron.dmc.config import RunConfig
from megatron.dmc.training.disk import DiskError
from megatron.dmc.training.save_lock import SaveLock
from megatron.dmc.training.starting_point import (
    StartingPoint,
    check_resume,
    check_stage_order,
    find_starting_point,
    frozen_base,
)

if TYPE_CHECKING:  # they import torch
    from megatron.dmc.training.preemption import RestartGuard, StopSignal
    from megatron.dmc.training.tokenizer import Tokenizer

LOST = 75
"""Exit status (EX_TEMPFAIL of sysexits.h) of a run that was asked to leave and saved nothing: run it again."""


def main(argv: Optional[list[str]] = None) -> int:
    """Run one stage. Returns the exit status: 0 done or saved on a signal, 1 the disk failed, 2 wrong input, 75
    left with nothing saved, 130 interrupted before training began.
    """
    try:
        return _main(argv)
    except KeyboardInterrupt:
        return 130
    except DiskError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1


def _main(argv: Optional[list[str]]) -> int:
    warnings.filterwarnings("ignore", module=r"megatron\.core")
    warnings.filterwarnings("ignore", message=".*[Aa]pex.*")
    warnings.filterwarnings("ignore", message=".*full scope is deprecated.*")
    warnings.filterwarnings("ignore", message="Please use DTensor instead")  # torch's, of megatron-core's checkpoints
    from megatron.dmc.training import initialize
    from megatron.dmc.training.preemption import RestartGuard

    try:
        config, start = prepare(argv)
        from megatron.dmc.training.data import check_datasets
        from megatron.dmc.training.tokenizer import load_tokenizer

        tokenizer = load_tokenizer(config.data.tokenizer)
        warned = check_datasets(config, tokenizer)
        save = config.training.save
        lock = SaveLock(save if initialize.is_rank_0() else None)
        restarts = RestartGuard(lock.save)
        lock.acquire(start.path if start is not None and start.resumes else None)
        if lock.warning:
            warned.append(lock.warning)
    except DiskError:
        raise
    except (ValueError, OSError) as error:
        return _refuse(error)
    try:
        return _run(config, tokenizer, start, restarts, warned)
    finally:
        lock.release()


def _run(
    config: RunConfig, tokenizer: Tokenizer, start: Optional[StartingPoint], restarts: RestartGuard, warned: list[str]
) -> int:
    """Train with the lock on --save. Returns the exit status."""
    from megatron.dmc.training import initialize
    from megatron.dmc.training.host_monitor import HostMonitor, remove_lost_host_file
    from megatron.dmc.training.preemption import StopSignal

    save = config.training.save
    try:
        restarts.count_start(config.training.max_starts_without_step)
    except ValueError as error:
        return _refuse(error)
    stop = StopSignal(config.training.exit_duration_in_mins)
    if initialize.is_rank_0():
        remove_lost_host_file(save)
    initialize.initialize(config)
    try:
        with HostMonitor(config.parallel.lost_host_seconds, save) as monitor:
            return _train(config, tokenizer, start, stop, restarts, str(monitor), warned)
    finally:
        stop.restore()
        initialize.shutdown()


def prepare(argv: Optional[list[str]] = None) -> tuple[RunConfig, Optional[StartingPoint]]:
    """Resolve the configuration and find the checkpoint to start from. Takes no memory and writes nothing.

    Raises:
        ValueError: for whatever in the configuration, the checkpoints or the installed packages keeps the run from
            starting. Data and tokenizer are not looked at yet.
    """
    from megatron.dmc.training import arguments, initialize

    start: Optional[StartingPoint] = None
    saved: Optional[dict] = None

    def saved_config(asked: dict) -> Optional[dict]:
        nonlocal start, saved
        training = asked.get("training", {})
        start = find_starting_point(training.get("save"), training.get("init_from"))
        saved = None if start is None else arguments.read_saved_config(start.path)
        return saved

    config = arguments.resolve(argv, saved_config)
    resumes = start is not None and start.resumes
    if resumes:
        if not start.manifest.has_optimizer and start.manifest.stage != "calibrate":
            raise ValueError(f"{start.path} holds weights only; name it with --init-from, and another --save directory")
        # What was derived from the first --init-from need not be said again.
        for key in ("start_cr", "target_cr"):
            if getattr(config.stage, key) is None:
                setattr(config.stage, key, saved["stage"][key])
    check_stage_order(config, start, saved)
    config.check(initialize.world_size())
    frozen_base(config, start)
    if config.training.distill_from is not None:
        from megatron.dmc.training.distillation import find_teacher

        # The very checkpoint, not the newest of its directory: a resumed run must have the same teacher.
        config.training.distill_from = str(find_teacher(config)[0])
    if resumes:
        check_resume(config, saved, start.path)
    if config.data.tokenizer is None:
        raise ValueError(
            "tokenizer is not set; name the sentencepiece model or Hugging Face directory that made the data"
        )
    _check_packages(config)
    return config, start


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


def _refuse(error: ValueError | OSError) -> int:
    """Print one message for all ranks. The others wait: a launcher ends rank 0 as soon as another rank has ended."""
    from megatron.dmc.training import initialize

    if initialize.is_rank_0():
        print(f"error: {flags.one_line(error)}", file=sys.stderr, flush=True)
    else:
        time.sleep(3)
    return 2


def _train(
    config: RunConfig,
    tokenizer: Tokenizer,
    start: Optional[StartingPoint],
    stop: StopSignal,
    restarts: RestartGuard,
    monitored: str,
    warned: list[str],
) -> int:
    """Load what the run starts from and train, now that the process group is there. Returns the exit status."""
    from megatron.dmc.training import initialize
    from megatron.dmc.training.loop import Trainer
    from megatron.dmc.training.metrics import say

    if initialize.is_rank_0():
        say(banner(config))
    try:
        trainer = Trainer(config, tokenizer, start)
    except ValueError as error:
        restarts.clear()
        return _refuse(error)
    status = 0
    for line in [*(f"WARNING: {line}" for line in warned), *describe_start(config, start)]:
        trainer.logger.print(line)
    if trainer.iteration >= trainer.total_iters:
        trainer.logger.print(f"stage {config.stage.stage} is finished; nothing to do")
        restarts.clear()
    else:
        trainer.logger.print(f"{stop}\n{monitored}")
        if not (trainer.calibrate if trainer.calibrates else trainer.train)(stop, restarts):
            status = LOST
    trainer.close()
    return status


def describe_start(config: RunConfig, start: Optional[StartingPoint]) -> list[str]:
    """Lines for the log: the checkpoint that was loaded, and whether its checksums were compared."""
    if start is None:
        return []
    path, manifest, lines = start.path, start.manifest, []
    if not (config.training.verify_checkpoints and manifest.crc32):
        why = "verify_checkpoints is off" if manifest.crc32 else "it has none (an older conversion)"
        lines.append(f"WARNING: {path} was loaded without a look at its checksums: {why}")
    if start.resumes:
        lines.append(f"resumed {path} at iteration {manifest.iteration}")
    else:
        lines.append(f"initialised from {path} (stage {manifest.stage}, iteration {manifest.iteration})")
    return lines


def banner(config: RunConfig) -> str:
    """Text for the start of the log: which devices, layers, kernels, optimizer and layout are active."""
    import torch

    from megatron.dmc.model.layer_specs import resolve_transformer_impl
    from megatron.dmc.ops import attention_backend
    from megatron.dmc.ops.packages import trouble_with, troubles

    t, p, stage = config.training, config.parallel, config.stage
    cuda = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"
    layers = resolve_transformer_impl(t.transformer_impl)
    kernel = attention_backend("cuda" if cuda else "cpu", torch.bfloat16 if t.bf16 else torch.float32).name
    window = "unbounded" if config.dmc.window is None else config.dmc.window
    # As megatron-core chooses.
    adam = next((name for name in ("transformer_engine", "apex") if trouble_with(name) is None), "torch")
    goal = f", CR {schedule.target_cr(stage, 0):.2f} -> {stage.target_cr:g}" if schedule.compresses(stage) else ""
    return "".join(f"WARNING: {text}\n" for text in troubles()) + (
        f"megatron.dmc: {stage.stage}{goal}, {schedule.train_iters(stage)} iterations\n"
        f"  device: {device} | layers: {layers} | attention: {kernel} | "
        f"pooling: banded matmul, window {window} | optimizer: {adam} Adam | "
        f"{'bf16, fp32 main parameters' if t.bf16 else 'fp32'}\n"
        f"  tensor {p.tensor_model_parallel_size} x pipeline {p.pipeline_model_parallel_size} x data, "
        f"virtual stages {p.virtual_pipeline_model_parallel_size or 1}, sequence parallel {p.sequence_parallel}, "
        f"distributed optimizer {p.use_distributed_optimizer}, recompute {p.recompute_granularity}"
    )


if __name__ == "__main__":
    sys.exit(main())
