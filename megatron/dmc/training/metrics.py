"""Sums of training steps, their means over all ranks, and the log: Megatron's line, TensorBoard, Weights & Biases."""

import errno
import os
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Optional, Self

import torch
from megatron.core import parallel_state
from torch import Tensor, distributed

from megatron.dmc import schedule
from megatron.dmc.config import ModelConfig, RunConfig

# Dense bf16 peak of a GPU, FLOP/s (NVIDIA's data sheets), by a part of its name.
_PEAK = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "B200": 2250e12, "L40S": 362e12}


def flops_per_token(model: ModelConfig, seq_length: int) -> float:
    """FLOPs of a training step per token, as Megatron counts them: 6 per weight, and the causal attention's half."""
    m, d = model, model.head_dim
    qkv = m.hidden_size * (m.num_attention_heads + 2 * m.kv_heads) * d + m.num_attention_heads * d * m.hidden_size
    mlp = 3 * m.hidden_size * m.ffn_hidden_size
    weights = m.num_layers * (qkv + mlp) + m.hidden_size * m.padded_vocab_size
    attention = m.num_layers * m.num_attention_heads * d * seq_length  # q.k and p.v, half of them masked
    return 6.0 * (weights + attention)


def peak_flops() -> Optional[float]:
    """Peak FLOP/s of this rank's GPU in bf16; None when it is unknown or there is no GPU, and MFU is N/A."""
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    return next((value for key, value in _PEAK.items() if key in name), None)


def memory_gib() -> float:
    """Peak memory of this rank in GiB, as the GPU's allocator counts it; without a GPU, of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


@dataclass
class StepSums:
    """Sums over sequences on this rank, of one step or of several. Losses and their counts are on the device in fp64.

    They are 0 but on the last pipeline stage; ``kept_by_head`` has the layers of this rank's stages.
    """

    lm_loss: Tensor
    distill_loss: Tensor
    """Divergence from the teacher; 0 without one."""
    dmc_loss: Tensor
    tokens: Tensor
    sequences: Tensor
    kept_slots: Tensor
    """Slots kept by the whole model, as the carried row has counted them; 0 when the stage does not compress."""
    kept_by_head: Tensor
    """fp64 [layers, KV heads of this rank], slots kept, as the layers have counted them."""
    steps: int = 0

    @classmethod
    def zeros(cls, config: RunConfig, device: torch.device) -> Self:
        """Sums of nothing."""
        heads = config.model.kv_heads // config.parallel.tensor_model_parallel_size
        shapes = [()] * 6 + [(config.model.num_layers, heads)]
        return cls(*(torch.zeros(shape, dtype=torch.float64, device=device) for shape in shapes))

    def add(self, **sums: Tensor | int) -> None:
        """Add a micro-batch's losses and counts, by their names."""
        for name, value in sums.items():
            getattr(self, name).add_(value.detach() if isinstance(value, Tensor) else value)

    def add_kept(self, kept: dict[int, Tensor]) -> None:
        """Add the counts of one micro-batch, ``DMCStep.kept`` of one chunk's layers, which follow one another."""
        if kept:
            first = min(kept) - 1  # layers count from 1
            # [layers of the chunk, b, heads] -> [layers of the chunk, heads]
            self.kept_by_head[first : first + len(kept)] += torch.stack([kept[i] for i in sorted(kept)]).sum(dim=1)

    def __iadd__(self, other: Self) -> Self:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)
        return self

    def reduce(self, config: RunConfig) -> "StepMetrics":
        """Means over the sequences of all ranks. Collective; any layout gives the same, since counts are exact."""
        # Every tensor-parallel rank of the last stage has the same sums.
        packed = torch.stack(
            (self.lm_loss, self.tokens, self.dmc_loss, self.sequences, self.kept_slots, self.distill_loss)
        )
        packed /= parallel_state.get_tensor_model_parallel_world_size()
        distributed.all_reduce(packed)
        lm_loss, tokens, dmc_loss, sequences, kept, distill_loss = packed.tolist()
        by_head = None
        if schedule.compresses(config.stage):
            by_head = self._gather_kept_by_head(config.model.kv_heads)
        slots = sequences * config.model.num_layers * config.model.kv_heads * config.data.seq_length
        return StepMetrics(
            lm_loss=lm_loss / tokens,
            distill_loss=distill_loss / tokens,
            dmc_loss=dmc_loss / sequences,
            cr=slots / kept if kept else 1.0,
            tokens=int(sequences) * config.data.seq_length,
            kept_slots=int(kept),
            kept_by_head=by_head,
        )

    def _gather_kept_by_head(self, heads: int) -> Tensor:
        layers, here = self.kept_by_head.shape
        first = parallel_state.get_tensor_model_parallel_rank() * here
        total = self.kept_by_head.new_zeros(layers, heads)
        total[:, first : first + here] = self.kept_by_head
        distributed.all_reduce(total)
        return total.cpu()


@dataclass(frozen=True)
class StepMetrics:
    """Means over the sequences of one or several global batches, over all ranks."""

    lm_loss: float
    """Cross-entropy per token."""
    distill_loss: float
    """Divergence from the teacher per token; 0 without one."""
    dmc_loss: float
    """Compression loss per sequence."""
    cr: float
    """Tokens / slots, one ratio of sums over sequences, layers and heads; 1 when the stage does not compress."""
    tokens: int
    kept_slots: int
    kept_by_head: Optional[Tensor]
    """fp64 [layers, KV heads] on the CPU, slots kept; None when the stage does not compress."""


def say(text: str) -> None:
    """Print a line of the log. Training goes on where nobody reads it: what stdout does not take any more (a closed
    pipe) goes to stderr, and where that is closed too, nowhere; a line that a full disk does not take is lost.
    """
    try:
        print(text, flush=True)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return
        for target in (lambda: os.dup(2), lambda: os.open(os.devnull, os.O_WRONLY)):
            descriptor = target()
            os.dup2(descriptor, 1)
            os.close(descriptor)
            with suppress(OSError):
                print(f"WARNING: stdout cannot be written ({error.strerror}); the log goes on here", flush=True)
                return


class Logger:
    """Rank 0's log lines, TensorBoard and (only when asked for) Weights & Biases."""

    def __init__(self, config: RunConfig, train_iters: int, iteration: int = 0) -> None:
        self.train_iters, self.config = train_iters, config
        self.flops = flops_per_token(config.model, config.data.seq_length)
        self.active = distributed.get_rank() == 0
        self.board = self.wandb = None
        t = config.training
        if self.active and t.tensorboard_dir:
            from torch.utils.tensorboard import SummaryWriter

            # What a killed run logged after its last checkpoint will be logged again.
            self.board = SummaryWriter(t.tensorboard_dir, purge_step=iteration + 1 if iteration else None)
        if self.active and t.wandb_project:
            import wandb

            self.wandb = wandb.init(project=t.wandb_project, config=config.to_dict())
        self.last = time.monotonic()

    def print(self, text: str) -> None:
        if self.active:
            say(text)

    def restart_clock(self) -> None:
        """Start the time per iteration anew: evaluation and checkpointing do not count."""
        self.last = time.monotonic()

    def line(
        self,
        iteration: int,
        steps: int,
        values: dict[str, float],
        kept_by_head: Optional[Tensor] = None,
        target_cr: float = 1.0,
    ) -> None:
        """Print one line for the ``steps`` steps up to ``iteration``. Field names are Megatron's, ours follow."""
        now = time.monotonic()
        seconds, self.last = (now - self.last) / steps, now
        if not self.active:
            return
        batch = self.config.training.global_batch_size
        tokens = batch * self.config.data.seq_length
        rate = tokens / seconds / distributed.get_world_size()
        peak = peak_flops()
        left = int(seconds * (self.train_iters - iteration))
        fields = [
            f"iteration {iteration:8d}/{self.train_iters:8d}",
            f"consumed tokens: {iteration * tokens:12d}",
            f"elapsed time per iteration (ms): {seconds * 1e3:.1f}",
            f"tokens/s/GPU: {rate:.1f}",
            f"TFLOP/s/GPU: {rate * self.flops / 1e12:.3f}",
            f"MFU: {rate * self.flops / peak * 100:.1f}%" if peak else "MFU: N/A",
            f"learning rate: {values['learning rate']:.6E}",
            f"global batch size: {batch:5d}",
            f"lm loss: {values['lm loss']:.6E}",
        ]
        if "distill loss" in values:
            fields.append(f"distill loss: {values['distill loss']:.6E}")
        if "CR" in values:
            fields += [f"dmc loss: {values['dmc loss']:.6E}", f"CR: {values['CR']:.3f} (target {target_cr:.3f})"]
        fields += [
            f"grad norm: {values['grad norm']:.3f}",
            f"mem: {memory_gib():.2f} GiB",
            f"eta: {left // 3600:d}:{left // 60 % 60:02d}:{left % 60:02d}",
        ]
        say(" [" + time.strftime("%Y-%m-%d %H:%M:%S") + "] " + " | ".join(fields) + " |")
        scalars = {**values, "tokens/s/GPU": rate, "target CR": target_cr}
        if kept_by_head is not None:
            for layer, kept in enumerate(kept_by_head.sum(dim=1).tolist(), start=1):
                scalars[f"CR by layer/{layer:03d}"] = steps * tokens * kept_by_head.size(1) / max(kept, 1.0)
        self.scalars(iteration, scalars)

    def scalars(self, iteration: int, values: dict[str, float]) -> None:
        """Write values to TensorBoard and Weights & Biases."""
        if self.board is not None:
            for name, value in values.items():
                self.board.add_scalar(name.replace(" ", "-"), value, iteration)
            self.board.flush()
        if self.wandb is not None:
            self.wandb.log(values, step=iteration)

    def close(self) -> None:
        if self.board is not None:
            self.board.close()
        if self.wandb is not None:
            self.wandb.finish()
