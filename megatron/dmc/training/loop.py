"""The training loop of every stage."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Optional

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron.dmc import schedule
from megatron.dmc.checkpoint.manifest import Manifest, read_hf_files
from megatron.dmc.config import RunConfig
from megatron.dmc.environment import versions
from megatron.dmc.model import DMCStep, compression_loss
from megatron.dmc.training import arguments, checkpointing, initialize
from megatron.dmc.training.data import batch_iterator, build_datasets
from megatron.dmc.training.distill import attach_teachers
from megatron.dmc.training.metrics import Logger, StepTotals, kept_by_head
from megatron.dmc.training.model import build_model, build_optimizer, set_learning_rate, unwrap
from megatron.dmc.training.preemption import Starts, StopSignal
from megatron.dmc.training.tokenizer import Tokenizer


@dataclasses.dataclass
class Evaluation:
    """Validation with hard decisions, over all ranks."""

    lm_loss: float
    cr: float
    kept: Tensor
    """fp64 [layers, KV heads], slots kept; all ``tokens`` when the stage does not compress."""
    tokens: int


class Trainer:
    """One stage of one run: model, optimizer, data, and the step that all stages share.

    Args:
        config: resolved; the process group must exist (:func:`initialize.initialize`).
        tokenizer: that the data was made with.
        resume: checkpoint under --save to continue from, with optimizer state.
        init_from: checkpoint to take weights from when there is nothing to resume.
    """

    def __init__(
        self,
        config: RunConfig,
        tokenizer: Tokenizer,
        *,
        resume: Optional[tuple[Path, Manifest]] = None,
        init_from: Optional[tuple[Path, Manifest]] = None,
    ) -> None:
        self.config = config
        self.device = initialize.device()
        self.total_iters = schedule.train_iters(config.stage)
        self.dp_rank = parallel_state.get_data_parallel_rank()
        self.dp_size = parallel_state.get_data_parallel_world_size()
        t, p = config.training, config.parallel
        self.micro_batches = t.global_batch_size // (t.micro_batch_size * self.dp_size)
        m = config.model
        self.slots_per_sequence = m.num_layers * m.kv_heads * config.data.seq_length
        self.compresses = schedule.compresses(config.stage)
        # The carried row; under sequence parallelism every rank has one.
        rows = (p.tensor_model_parallel_size if p.sequence_parallel else 1) if self.compresses else 0
        self.schedule_length = config.data.seq_length + rows

        self.chunks = build_model(config)
        self.optimizer = build_optimizer(config, self.chunks)
        self.models = [unwrap(chunk) for chunk in self.chunks]
        self.distills = t.distill_from is not None
        if self.distills:
            attach_teachers(config, self.models)
        self.iteration = 0
        self.source = self.lineage = None
        self.measured_cr: Optional[float] = None
        self.family: Optional[str] = None
        self.hf_files: dict[str, bytes] = {}
        if source := resume or init_from:
            self.family, self.hf_files = source[1].family, read_hf_files(source[0])
        if resume is not None:
            path, manifest = resume
            checkpointing.load(path, self.models, self.optimizer, verify=t.verify_checkpoints)
            self.iteration, self.source, self.lineage = manifest.iteration, manifest.source, manifest.lineage
            self.measured_cr = manifest.measured_cr
        elif init_from is not None:
            path, manifest = init_from
            checkpointing.load(path, self.models, verify=t.verify_checkpoints)
            # The optimizer's fp32 main parameters were copied from the random weights.
            self.optimizer.reload_model_params()
            self.source, self.lineage = str(path), [*manifest.lineage, manifest.stage]

        self.checkpoints: Optional[checkpointing.CheckpointWriter] = None
        if t.save:
            self.checkpoints = checkpointing.CheckpointWriter(
                Path(t.save),
                self.models,
                self.optimizer,
                arguments.dump(config),
                hf_files=self.hf_files,
                keep=t.keep_checkpoints,
                retain=t.save_retain_interval,
                background=t.async_save,
            )
        valid_samples = t.eval_iters * t.global_batch_size if config.data.valid_data_path else 0
        self.train_data, self.valid_data = build_datasets(
            config, tokenizer, self.total_iters * t.global_batch_size, valid_samples
        )
        self.logger = Logger(config, self.total_iters, self.iteration)

    # Data and the step's state

    def _iterators(self, data: Any, start: int) -> list[Iterator[dict]]:
        """One per model chunk; stages between the first and the last need only the sequences' ids."""
        t = self.config.training
        vp = self.config.parallel.virtual_pipeline_model_parallel_size
        iterators = []
        for chunk in range(len(self.chunks)):
            stage = dict(ignore_virtual=False, vp_stage=chunk if vp else None)
            ends = parallel_state.is_pipeline_first_stage(**stage) or parallel_state.is_pipeline_last_stage(**stage)
            iterators.append(
                batch_iterator(
                    data if ends else None,
                    consumed_samples=start,
                    micro_batch_size=t.micro_batch_size,
                    global_batch_size=t.global_batch_size,
                    dp_rank=self.dp_rank,
                    dp_size=self.dp_size,
                    num_workers=self.config.data.num_workers,
                    device=self.device,
                )
            )
        return iterators

    def _dmc_step(self, sample_ids: Tensor, kept: list, training: bool) -> DMCStep:
        stage = self.config.stage
        state = DMCStep(
            compress=self.compresses,
            neuron_scale=schedule.neuron_scale(stage, self.iteration),
            sample_ids=sample_ids if training else None,
            seed=self.config.training.seed,
            step=self.iteration,
        )
        if self.compresses:
            kept.append(state.kept)
        return state

    def _forward_step(self, kept: list, training: bool, target_cr: float, iterator: Iterator, chunk: torch.nn.Module):
        """Megatron's forward_step_func; the first three arguments are bound per step."""
        batch = next(iterator)
        step = self._dmc_step(batch["sample_ids"], kept, training)
        output = chunk(batch.get("tokens"), batch.get("position_ids"), labels=batch.get("labels"), step=step)
        return output, partial(self._loss, batch.get("loss_mask"), target_cr)

    def _loss(self, loss_mask: Tensor, target_cr: float, output: Any) -> tuple[Tensor, Tensor, dict]:
        """Sums over the micro-batch; Megatron divides gradients by the tokens of the global batch at the end."""
        losses, kept = output if self.compresses else (output, None)
        with_teacher = losses.dim() == 3
        losses, ce, kl = losses if with_teacher else (losses, losses, torch.zeros_like(losses))
        loss, lm = (losses.float() * loss_mask).sum(), (ce.float() * loss_mask).sum()
        tokens, zero = loss_mask.sum(), torch.zeros((), dtype=torch.float64, device=lm.device)
        dmc = slots = zero
        if kept is not None:
            dmc = compression_loss(kept, self.slots_per_sequence, target_cr).sum()
            slots = kept.detach().sum()
            # The division will be by tokens, the mean is to be over sequences: each counts as all its tokens.
            loss = loss + self.config.dmc.loss_weight * self.config.data.seq_length * dmc.float()
        distill = (kl.double() * loss_mask).sum()
        parts = (lm.double(), tokens.double(), dmc, zero + losses.size(0), slots, distill)
        return loss, tokens.to(torch.int), {"totals": torch.stack([part.detach() for part in parts])}

    def _run(self, iterators: list[Iterator], training: bool) -> tuple[Tensor, list]:
        """Forward (and backward) over one global batch. Returns this rank's sums, fp64 [6], and the layers' counts."""
        kept: list = []
        target = schedule.target_cr(self.config.stage, self.iteration if training else self.total_iters)
        t = self.config.training
        data = get_forward_backward_func()(
            forward_step_func=partial(self._forward_step, kept, training, target),
            data_iterator=iterators if len(iterators) > 1 else iterators[0],
            model=self.chunks if len(self.chunks) > 1 else self.chunks[0],
            num_microbatches=self.micro_batches,
            # The teacher's rows go through the pipeline below the student's.
            seq_length=self.schedule_length + (self.config.data.seq_length if training and self.distills else 0),
            micro_batch_size=t.micro_batch_size,
            forward_only=not training,
        )
        return StepTotals.from_micro_batches(data, self.device), kept

    def train_step(self, iterators: list[Iterator]) -> tuple[Tensor, list, float]:
        """One optimizer step. Returns this rank's sums, the layers' counts, and the gradient norm before clipping."""
        config = self.config
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        totals, kept = self._run(iterators, training=True)
        set_learning_rate(
            self.optimizer,
            schedule.learning_rate(config.stage, config.optimizer, self.iteration),
            config.optimizer.weight_decay,
        )
        ok, grad_norm, _ = self.optimizer.step()
        if not ok:
            raise RuntimeError(f"iteration {self.iteration + 1}: the gradients hold inf or nan; nothing was updated")
        self.iteration += 1
        return totals, kept, float(grad_norm)

    @torch.no_grad()
    def evaluate(self, stop: Optional[StopSignal] = None) -> Optional[Evaluation]:
        """Validation loss over ``eval_iters`` global batches, always the same ones, with hard decisions.

        None when ``stop``, which is asked after each of them, says to leave.
        """
        for chunk in self.chunks:
            chunk.eval()
        iterators = self._iterators(self.valid_data, 0)
        totals, steps, left = torch.zeros(6, dtype=torch.float64, device=self.device), [], False
        for _ in range(self.config.training.eval_iters):
            part, kept = self._run(iterators, training=False)
            totals, steps = totals + part, steps + kept
            if left := stop is not None and bool(stop.agreed(self.device)):
                break
        for chunk in self.chunks:
            chunk.train()
        if left:
            return None
        result = StepTotals.reduce(totals)
        tokens = int(result.sequences) * self.config.data.seq_length
        if self.compresses:
            by_head = kept_by_head(steps, self.config.model, self.device)
        else:
            by_head = torch.full((self.config.model.num_layers, self.config.model.kv_heads), float(tokens))
        return Evaluation(result.lm_loss / result.tokens, result.cr(self.slots_per_sequence), by_head.cpu(), tokens)

    def save(self) -> None:
        """Checkpoint of this iteration under --save. At the end of zero_out the neuron's weights become exactly 0.

        With async_save it is complete after :meth:`finish_saving`, and only one is written at a time.
        """
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
        manifest = Manifest(
            stage=config.stage.stage,
            iteration=self.iteration,
            train_iters=self.total_iters,
            consumed_samples=samples,
            consumed_tokens=samples * config.data.seq_length,
            target_cr=schedule.target_cr(config.stage, max(0, self.iteration - 1)),
            measured_cr=self.measured_cr,
            source=self.source,
            lineage=self.lineage or [],
            versions={**versions(), "world_size": os.environ.get("WORLD_SIZE", "1")},
            family=self.family,
        )
        assert self.checkpoints is not None
        self.checkpoints.save(manifest)
        if not self.checkpoints.background:
            self.finish_saving(wait=True)
        self.logger.restart_clock()

    def finish_saving(self, wait: bool) -> None:
        """Give the checkpoint that is being written in the background its name, if it is done (or ``wait`` for it)."""
        if self.checkpoints is not None and (path := self.checkpoints.finish(wait)) is not None:
            self.logger.print(f"saved {path}")
            self.logger.restart_clock()

    def log_evaluation(self, result: Optional[Evaluation]) -> None:
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

    def train(self, stop: StopSignal, starts: Starts) -> bool:
        """Train to the end of the stage, or until ``stop`` says to leave. Returns whether the stage is finished."""
        t = self.config.training
        iterators = self._iterators(self.train_data, self.iteration * t.global_batch_size)
        totals, steps, logged = torch.zeros(6, dtype=torch.float64, device=self.device), [], 0
        saved = self.iteration
        self.logger.restart_clock()
        while self.iteration < self.total_iters:
            begun = time.monotonic()
            part, kept, grad_norm = self.train_step(iterators)
            totals, steps, logged = totals + part, steps + kept, logged + 1
            last = self.iteration == self.total_iters
            self.finish_saving(wait=False)
            why = stop.agreed(self.device)
            stop.took("step", time.monotonic() - begun)
            starts.done()
            if t.exit_interval is not None and self.iteration % t.exit_interval == 0:
                why = why or f"exit_interval {t.exit_interval}"
            due = last or (t.save_interval and self.iteration % t.save_interval == 0)
            # A line before every checkpoint: a run that is resumed from it then logs the same lines as one that was not
            # stopped.
            if self.iteration % t.log_interval == 0 or last or (t.save and (due or why)):
                self._log(StepTotals.reduce(totals), steps, logged, grad_norm)
                totals, steps, logged = torch.zeros_like(totals), [], 0
            if (
                self.valid_data is not None
                and t.eval_interval
                and self.iteration % t.eval_interval == 0
                and not (last or why)
            ):
                self.log_evaluation(self.evaluate(stop))
                why = stop.agreed(self.device)
                if why and t.save and not due and logged:
                    self._log(StepTotals.reduce(totals), steps, logged, grad_norm)
            if t.save and (due or why):
                begun, saved = time.monotonic(), self.iteration
                self.save()
                if why or last:
                    self.finish_saving(wait=True)
                stop.took("checkpoint", time.monotonic() - begun)
            if why and not last:
                state = f"saved at iteration {saved}" if t.save else "nothing saved (no --save)"
                self.logger.print(f"leaving at iteration {self.iteration} of {self.total_iters}: {why}; {state}")
                return False
        if self.valid_data is not None:
            self.log_evaluation(self.evaluate(stop))
        return True

    def _log(self, result: StepTotals, steps: list, iterations: int, grad_norm: float) -> None:
        config = self.config
        values = {
            "learning rate": schedule.learning_rate(config.stage, config.optimizer, self.iteration - 1),
            "lm loss": result.lm_loss / result.tokens,
            "grad norm": grad_norm,
        }
        if self.distills:
            values["distill loss"] = result.distill_loss / result.tokens
        by_head = None
        if self.compresses:
            values["dmc loss"] = result.dmc_loss / result.sequences
            values["CR"] = self.measured_cr = result.cr(self.slots_per_sequence)
            by_head = kept_by_head(steps, config.model, self.device)
        consumed = self.iteration * config.training.global_batch_size * config.data.seq_length
        target = schedule.target_cr(config.stage, self.iteration - 1)
        self.logger.line(self.iteration, consumed, iterations, values, by_head, target)

    def close(self) -> None:
        self.logger.close()
