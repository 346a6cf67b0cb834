"""The training loop of every stage."""

import os
import time
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Optional

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor
from torch.utils.data import Dataset

from megatron.dmc import schedule
from megatron.dmc.checkpoint.manifest import Manifest, read_hf_files
from megatron.dmc.config import RunConfig
from megatron.dmc.environment import versions
from megatron.dmc.model import DMCStep, compression_loss
from megatron.dmc.training import arguments, checkpointing, initialize
from megatron.dmc.training.calibration import COUNTING, Calibration
from megatron.dmc.training.data import batch_iterator, build_datasets
from megatron.dmc.training.distillation import load_teachers, shared_tokens
from megatron.dmc.training.metrics import Logger, StepMetrics, StepSums
from megatron.dmc.training.model import build_model, build_optimizer, set_learning_rate, unwrap
from megatron.dmc.training.preemption import RestartGuard, StopSignal
from megatron.dmc.training.starting_point import StartingPoint, frozen_base
from megatron.dmc.training.tokenizer import Tokenizer


class Trainer:
    """One stage of one run: model, optimizer, data, and the step that all stages share.

    Args:
        config: resolved; the process group must exist (:func:`initialize.initialize`).
        tokenizer: the one that the data was made with.
        start: checkpoint to continue from or to take weights from; None starts from random weights.
    """

    def __init__(self, config: RunConfig, tokenizer: Tokenizer, start: Optional[StartingPoint] = None) -> None:
        self.config = config
        self.device = initialize.device()
        self.total_iters = schedule.train_iters(config.stage)
        self.compresses = schedule.compresses(config.stage)
        self.calibrates = config.stage.stage == "calibrate"  # nothing is optimized
        self.chunks = build_model(config)
        self.models = [unwrap(chunk) for chunk in self.chunks]
        self.optimizer = build_optimizer(config, self.chunks)
        teachers = load_teachers(config, self.models)
        self.teachers = dict(zip(self.chunks, teachers))

        self.iteration = 0
        self.measured_cr: Optional[float] = None
        self.source: Optional[str] = None
        self.lineage: list[str] = []
        self.family: Optional[str] = None
        self.hf_files: Mapping[str, bytes] = {}
        self.base, self.base_hash = frozen_base(config, start)
        if start is not None:
            self._load(start)
        self.checkpoints = self._checkpoint_writer()
        self.train_data, self.valid_data = self._datasets(tokenizer)
        self.logger = Logger(config, self.total_iters, self.iteration)

    def _load(self, start: StartingPoint) -> None:
        manifest, verify = start.manifest, self.config.training.verify_checkpoints
        self.family, self.hf_files = manifest.family, read_hf_files(start.path)
        if start.resumes:
            checkpointing.load(start.path, self.models, None if self.calibrates else self.optimizer, verify=verify)
            self.iteration, self.measured_cr = manifest.iteration, manifest.measured_cr
            self.source, self.lineage = manifest.source, manifest.lineage
        else:
            checkpointing.load(start.path, self.models, verify=verify)
            # The optimizer's fp32 main parameters were copied from the random weights.
            self.optimizer.reload_model_params()
            self.source, self.lineage = str(start.path), [*manifest.lineage, manifest.stage]

    def _checkpoint_writer(self) -> Optional[checkpointing.CheckpointWriter]:
        t = self.config.training
        if not t.save:
            return None
        return checkpointing.CheckpointWriter(
            Path(t.save),
            self.models,
            None if self.calibrates else self.optimizer,
            arguments.dump(self.config),
            hf_files=self.hf_files,
            keep=t.keep_checkpoints,
            retain=t.save_retain_interval,
            background=t.async_save,
        )

    def _datasets(self, tokenizer: Tokenizer) -> tuple[Optional[Dataset], Optional[Dataset]]:
        t = self.config.training
        valid_samples = t.eval_iters * t.global_batch_size if self.config.data.valid_data_path else 0
        return build_datasets(self.config, tokenizer, self.total_iters * t.global_batch_size, valid_samples)

    # One global batch

    def iterators(self, data: Optional[Dataset], consumed_samples: int) -> list[Iterator[dict]]:
        """One iterator over micro-batches per model chunk, from ``consumed_samples`` on.

        Stages between the first and the last need no tokens, only the sequences' ids.
        """
        t, iterators = self.config.training, []
        for model in self.models:
            iterators.append(
                batch_iterator(
                    data if model.pre_process or model.post_process else None,
                    consumed_samples=consumed_samples,
                    micro_batch_size=t.micro_batch_size,
                    global_batch_size=t.global_batch_size,
                    dp_rank=parallel_state.get_data_parallel_rank(),
                    dp_size=parallel_state.get_data_parallel_world_size(),
                    num_workers=self.config.data.num_workers,
                    device=self.device,
                )
            )
        return iterators

    def train_step(self, iterators: list[Iterator[dict]]) -> tuple[StepSums, float]:
        """Take one optimizer step. Returns this rank's sums, and the gradient norm before clipping."""
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        sums = self._forward_backward(iterators, training=True)
        stage, optimizer = self.config.stage, self.config.optimizer
        lr = schedule.learning_rate(stage, optimizer, self.iteration)
        set_learning_rate(self.optimizer, lr, optimizer.weight_decay)
        updated, grad_norm, _ = self.optimizer.step()
        if not updated:
            raise RuntimeError(f"iteration {self.iteration + 1}: the gradients hold inf or nan; nothing was updated")
        self.iteration += 1
        return sums, float(grad_norm)

    def _forward_backward(
        self, iterators: list[Iterator[dict]], training: bool, calibration: Optional[Calibration] = None
    ) -> StepSums:
        """Run one global batch forward and, in training, backward. Returns this rank's sums."""
        t, p, seq_length = self.config.training, self.config.parallel, self.config.data.seq_length
        sums = StepSums.zeros(self.config, self.device)
        sums.steps = 1
        rows = seq_length
        if self.compresses:  # the carried row; under sequence parallelism every rank has one
            rows += p.tensor_model_parallel_size if p.sequence_parallel else 1
        if training and self.teachers:  # of which a frozen model has a carried row as the student does, which it is
            rows += rows - shared_tokens(self.config) if t.freeze_base else seq_length
        get_forward_backward_func()(
            forward_step_func=partial(self._forward_step, sums, training, calibration),
            data_iterator=iterators if len(iterators) > 1 else iterators[0],
            model=self.chunks if len(self.chunks) > 1 else self.chunks[0],
            num_microbatches=t.global_batch_size
            // (t.micro_batch_size * parallel_state.get_data_parallel_world_size()),
            seq_length=rows,
            micro_batch_size=t.micro_batch_size,
            forward_only=not training,
        )
        return sums

    def _forward_step(
        self,
        sums: StepSums,
        training: bool,
        calibration: Optional[Calibration],
        iterator: Iterator[dict],
        chunk: torch.nn.Module,
    ):
        """Run one micro-batch through one chunk: Megatron's ``forward_step_func``, once the first three are bound."""
        stage, batch = self.config.stage, next(iterator)
        step = DMCStep(
            compress=self.compresses,
            neuron_scale=schedule.neuron_scale(stage, self.iteration),
            sample_ids=batch["sample_ids"] if training else None,
            seed=self.config.training.seed,
            step=self.iteration,
            calibration=calibration,
        )
        if training and self.teachers:
            output = self.teachers[chunk].forward_beside(chunk, batch, step)
        else:
            more = {}
            if calibration is not None:
                more["head"] = partial(calibration.loss, unwrap(chunk), batch["sample_ids"], batch.get("labels"))
            output = chunk(
                batch.get("tokens"), batch.get("position_ids"), labels=batch.get("labels"), step=step, **more
            )
        sums.add_kept(step.kept)
        target_cr = schedule.target_cr(stage, self.iteration if training else self.total_iters)
        return output, partial(self._loss, sums, batch.get("loss_mask"), target_cr)

    def _loss(self, sums: StepSums, loss_mask: Tensor, target_cr: float, output: Any) -> tuple[Tensor, Tensor, dict]:
        """Sum the losses of a micro-batch; Megatron divides gradients by the tokens of the global batch at the end."""
        losses, kept = output if self.compresses else (output, None)
        ce = losses
        if losses.dim() == 3:  # beside a teacher: the loss and its two parts
            losses, ce, kl = losses
            sums.add(distill_loss=(kl.double() * loss_mask).sum())
        loss, tokens = (losses.float() * loss_mask).sum(), loss_mask.sum()
        sums.add(lm_loss=(ce.float() * loss_mask).sum(), tokens=tokens, sequences=losses.size(0))
        if kept is not None:
            m, seq_length = self.config.model, self.config.data.seq_length
            dmc = compression_loss(kept, m.num_layers * m.kv_heads * seq_length, target_cr).sum()
            sums.add(dmc_loss=dmc, kept_slots=kept.sum())
            # The division will be by tokens, the mean is to be over sequences: each counts as all its tokens.
            loss = loss + self.config.dmc.loss_weight * seq_length * dmc.float()
        return loss, tokens.to(torch.int), {}

    # The loop

    def train(self, stop: StopSignal, restarts: RestartGuard) -> bool:
        """Train to the end of the stage, or until ``stop`` or exit_interval says to leave.

        Returns:
            False when ``stop`` has ended a run that has no --save, whose work is lost.
        """
        t = self.config.training
        iterators = self.iterators(self.train_data, self.iteration * t.global_batch_size)
        unlogged = StepSums.zeros(self.config, self.device)
        self.logger.restart_clock()
        while self.iteration < self.total_iters:
            begun = time.monotonic()
            sums, grad_norm = self.train_step(iterators)
            unlogged += sums
            self.finish_saving(wait=False)
            reason = lost = stop.reason(self.device)
            stop.record("step", time.monotonic() - begun)
            restarts.clear()

            last = self.iteration == self.total_iters
            if self._is_due(t.exit_interval):
                reason = reason or f"exit_interval {t.exit_interval}"
            save_is_due = last or self._is_due(t.save_interval)
            # A line before every checkpoint: a run that is resumed from it then logs the same lines as one that was
            # not stopped.
            if self._is_due(t.log_interval) or last or (t.save and (save_is_due or reason)):
                unlogged = self._log(unlogged, grad_norm)
            if self.valid_data is not None and self._is_due(t.eval_interval) and not (last or reason):
                self.log_evaluation(self.evaluate(stop))
                reason = lost = stop.reason(self.device)
                if reason and t.save and not save_is_due and unlogged.steps:
                    unlogged = self._log(unlogged, grad_norm)
            if t.save and (save_is_due or reason):
                begun = time.monotonic()
                self.save()
                if reason or last:
                    self.finish_saving(wait=True)
                stop.record("checkpoint", time.monotonic() - begun)
            if reason and not last:
                state = f"saved at iteration {self.iteration}" if t.save else "nothing saved (no --save)"
                self.logger.print(f"leaving at iteration {self.iteration} of {self.total_iters}: {reason}; {state}")
                return bool(t.save or not lost)
        if self.valid_data is not None:
            self.log_evaluation(self.evaluate(stop))
        if warning := self._lack_of_compression():
            self.logger.print(warning)
        return True

    def _lack_of_compression(self) -> str:
        """Warning for a stage that ends far from its target compression ratio, with the likely cause; else ""."""
        target, cr = self.config.stage.target_cr, self.measured_cr
        if not self.compresses or cr is None or target is None or cr - 1 >= (target - 1) / 2:
            return ""
        cause = "use more --train-iters, or a larger --loss-weight"
        if cr < 1.05:
            dmc, lr = self.config.dmc, self.config.optimizer.lr
            cause = (
                f"no token {'is evicted' if dmc.evicts else 'merges'} before a decision logit has climbed from "
                f"{-dmc.decision_bias:g} to 0 (dead time), for which this stage was too short"
            )
            if dmc.decision_source == "key":
                cause += (
                    f"; at --lr {lr:g} that takes some {dmc.decision_bias / (150 * lr):.0f} steps, of which the "
                    "retrofit must have several times as many"
                )
            cause += ": use more --train-iters, or a higher --lr"
        return f"WARNING: the stage ends at CR {cr:.2f}, its target is {target:g}: {cause}"

    def _is_due(self, interval: Optional[int]) -> bool:
        return bool(interval) and self.iteration % interval == 0

    def _log(self, sums: StepSums, grad_norm: float) -> StepSums:
        """Log the steps since the last line. Returns the sums of the next one."""
        stage, metrics = self.config.stage, sums.reduce(self.config)
        values = {
            "learning rate": schedule.learning_rate(stage, self.config.optimizer, self.iteration - 1),
            "lm loss": metrics.lm_loss,
            "grad norm": grad_norm,
        }
        if self.teachers:
            values["distill loss"] = metrics.distill_loss
        if self.compresses:
            values["dmc loss"] = metrics.dmc_loss
            values["CR"] = self.measured_cr = metrics.cr
        target_cr = schedule.target_cr(stage, self.iteration - 1)
        self.logger.line(self.iteration, sums.steps, values, metrics.kept_by_head, target_cr)
        return StepSums.zeros(self.config, self.device)

    @torch.no_grad()
    def evaluate(self, stop: Optional[StopSignal] = None) -> Optional[StepMetrics]:
        """Measure the validation loss over ``eval_iters`` global batches, always the same ones, with hard decisions.

        None when ``stop``, which is asked after each of them, says to leave.
        """
        for chunk in self.chunks:
            chunk.eval()
        iterators = self.iterators(self.valid_data, 0)
        sums, leaves = StepSums.zeros(self.config, self.device), False
        for _ in range(self.config.training.eval_iters):
            sums += self._forward_backward(iterators, training=False)
            if leaves := stop is not None and bool(stop.reason(self.device)):
                break
        for chunk in self.chunks:
            chunk.train()
        return None if leaves else sums.reduce(self.config)

    def log_evaluation(self, result: Optional[StepMetrics]) -> None:
        """Log what :meth:`evaluate` returned."""
        if result is None:
            self.logger.print(f" validation at iteration {self.iteration} was left before its end")
            return
        cr = f" | validation CR: {result.cr:.3f}" if self.compresses else ""
        self.logger.print(
            f" validation at iteration {self.iteration} | lm loss: {result.lm_loss:.6E} | "
            f"ppl: {torch.tensor(result.lm_loss).exp():.4f}{cr} | tokens: {result.tokens} |"
        )
        self.logger.scalars(self.iteration, {"validation lm loss": result.lm_loss, "validation CR": result.cr})
        self.logger.restart_clock()

    # Calibration

    def calibrate(self, stop: StopSignal, restarts: RestartGuard) -> bool:
        """Run the stage ``calibrate``: read batches, fit the adapters, save.

        Returns:
            False when ``stop`` has ended it before. Nothing is saved then, and the next run starts anew: it takes
            minutes.
        """
        calibration, total = Calibration(self.config, self.device), self.total_iters
        fitting = total - max(1, total // COUNTING)
        iterators = self.iterators(self.train_data, 0)
        for i in range(total):
            if i == fitting:
                calibration.solve()
            for chunk in self.chunks:
                chunk.zero_grad_buffer()
            sums = self._forward_backward(iterators, training=not calibration.fitted, calibration=calibration)
            restarts.clear()
            if i + 1 < total and (reason := stop.reason(self.device)):
                self.logger.print(f"leaving at batch {i + 1} of {total}: {reason}; nothing saved")
                return False
            if (i + 1) % self.config.training.log_interval == 0 or i + 1 == total:
                what, loss = "threshold" if calibration.fitted else "fit", sums.reduce(self.config).lm_loss
                self.logger.print(f" calibration batch {i + 1:8d}/{total:8d} | {what} | lm loss: {loss:.6E} |")
        self._take_calibration(calibration)
        if self.config.training.save:
            self.save()
            self.finish_saving(wait=True)
        if self.valid_data is not None:
            self.log_evaluation(self.evaluate(stop))
        return True

    def _take_calibration(self, calibration: Calibration) -> None:
        """Write the adapters' weights."""
        threshold, ratio = calibration.threshold()
        self.logger.print(f" tokens whose log cost is above {threshold:.2f} are kept | CR: {ratio:.3f} |")
        with torch.no_grad():
            for layer in (layer for model in self.models for layer in model.attention_layers()):
                layer.dms_proj_alpha.weight.copy_(calibration.weights(layer.layer_number, threshold))
        self.iteration, self.measured_cr = self.total_iters, ratio

    # Checkpoints

    def save(self) -> None:
        """Write a checkpoint under --save. At the end of zero_out the decision neuron's weights become exactly 0.

        With async_save it is complete after :meth:`finish_saving`.
        """
        assert self.checkpoints is not None
        self.finish_saving(wait=True)
        config = self.config
        if config.parallel.overlap_param_gather:
            # The other ranks' part of the last update would only arrive with the next forward pass.
            for chunk in self.chunks:
                chunk.disable_forward_pre_hook(param_sync=True)
                chunk.enable_forward_pre_hook()
        if config.stage.stage == "zero_out" and self.iteration >= self.total_iters:
            for model in self.models:
                model.zero_decision_neurons()
        samples = self.iteration * config.training.global_batch_size
        self.checkpoints.save(
            Manifest(
                stage=config.stage.stage,
                iteration=self.iteration,
                train_iters=self.total_iters,
                consumed_samples=samples,
                consumed_tokens=samples * config.data.seq_length,
                target_cr=schedule.target_cr(config.stage, max(0, self.iteration - 1)),
                measured_cr=self.measured_cr,
                source=self.source,
                lineage=self.lineage,
                versions={**versions(), "world_size": os.environ.get("WORLD_SIZE", "1")},
                family=self.family,
                base=self.base,
                base_hash=self.base_hash,
            )
        )
        if not self.checkpoints.background:
            self.finish_saving(wait=True)
        self.logger.restart_clock()

    def finish_saving(self, wait: bool) -> None:
        """Complete the checkpoint that is written in the background if all of it is there, or ``wait`` for it."""
        if self.checkpoints is not None and (path := self.checkpoints.finish(wait)) is not None:
            self.logger.print(f"saved {path}")
            self.logger.restart_clock()

    def close(self) -> None:
        """Close the log."""
        self.logger.close()
