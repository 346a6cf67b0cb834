"""Counting, logging: losses reduced over all ranks, Megatron's log line, TensorBoard."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Optional

import torch
from megatron.core import parallel_state
from torch import Tensor, distributed

from megatron.dmc.config import ModelConfig, RunConfig

# Dense bf16 peak of a GPU, FLOP/s (NVIDIA's data sheets), by a part of its name.
_PEAK = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "B200": 2250e12, "L40S": 362e12}


def flops_per_token(model: ModelConfig, seq_length: int) -> float:
    """Forward and backward FLOPs per token, as Megatron counts them: 6 per weight, and the causal attention's half."""
    m, d = model, model.head_dim
    qkv = m.hidden_size * (m.num_attention_heads + 2 * m.kv_heads) * d + m.num_attention_heads * d * m.hidden_size
    mlp = 3 * m.hidden_size * m.ffn_hidden_size
    weights = m.num_layers * (qkv + mlp) + m.hidden_size * m.padded_vocab_size
    attention = m.num_layers * m.num_attention_heads * d * seq_length  # q.k and p.v, half of them masked
    return 6.0 * (weights + attention)


def peak_flops() -> Optional[float]:
    """Of this rank's GPU in bf16; None when it is not known (or there is none): MFU is then N/A."""
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    return next((value for key, value in _PEAK.items() if key in name), None)


def memory_gib() -> float:
    """Peak memory of this rank: of the allocator on a GPU, of the process without."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


@dataclass
class StepTotals:
    """Sums over the sequences of one or several global batches; exact counts, so any layout gives the same."""

    lm_loss: float = 0.0
    tokens: float = 0.0
    dmc_loss: float = 0.0
    sequences: float = 0.0
    kept: float = 0.0
    """Slots kept by the whole model; 0 when the stage does not compress."""
    distill_loss: float = 0.0
    """Divergence from the teacher; 0 without one."""

    @staticmethod
    def from_micro_batches(data: list[dict[str, Tensor]], device: torch.device) -> Tensor:
        """Sum what the loss function returned on the last stage. fp64 [6]; zeros on other stages."""
        total = torch.zeros(6, dtype=torch.float64, device=device)
        for entry in data:
            total += entry["totals"]
        return total

    @classmethod
    def reduce(cls, total: Tensor) -> StepTotals:
        """Over the data-parallel ranks of the last stage, known to every rank afterwards."""
        total = total / parallel_state.get_tensor_model_parallel_world_size()
        distributed.all_reduce(total)
        return cls(*total.tolist())

    def cr(self, slots_per_sequence: int) -> float:
        """Tokens / slots over all sequences, layers and heads: one ratio of two sums."""
        return self.sequences * slots_per_sequence / self.kept if self.kept else 1.0


def kept_by_head(steps: list[dict[int, Tensor]], model: ModelConfig, device: torch.device) -> Tensor:
    """Slots kept per layer and KV head over all ranks: fp64 [layers, heads]. Collective."""
    total = torch.zeros(model.num_layers, model.kv_heads, dtype=torch.float64, device=device)
    rank = parallel_state.get_tensor_model_parallel_rank()
    for kept in steps:
        for layer, count in kept.items():
            n = count.size(1)
            total[layer - 1, rank * n : (rank + 1) * n] += count.sum(dim=0)
    distributed.all_reduce(total)
    return total


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
            print(text, flush=True)

    def restart_clock(self) -> None:
        """Leave evaluation and checkpointing out of the time per iteration."""
        self.last = time.monotonic()

    def line(
        self,
        iteration: int,
        consumed_tokens: int,
        iterations: int,
        values: dict[str, float],
        by_head: Optional[Tensor] = None,
        target_cr: float = 1.0,
    ) -> None:
        """One log line for the ``iterations`` steps up to ``iteration``. Field names are Megatron's, ours follow."""
        now = time.monotonic()
        seconds, self.last = (now - self.last) / iterations, now
        if not self.active:
            return
        tokens = self.config.training.global_batch_size * self.config.data.seq_length
        rate = tokens / seconds / distributed.get_world_size()
        peak = peak_flops()
        left = int(seconds * (self.train_iters - iteration))
        fields = [
            f"iteration {iteration:8d}/{self.train_iters:8d}",
            f"consumed tokens: {consumed_tokens:12d}",
            f"elapsed time per iteration (ms): {seconds * 1e3:.1f}",
            f"tokens/s/GPU: {rate:.1f}",
            f"TFLOP/s/GPU: {rate * self.flops / 1e12:.3f}",
            f"MFU: {rate * self.flops / peak * 100:.1f}%" if peak else "MFU: N/A",
            f"learning rate: {values['learning rate']:.6E}",
            f"global batch size: {self.config.training.global_batch_size:5d}",
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
        print(" [" + time.strftime("%Y-%m-%d %H:%M:%S") + "] " + " | ".join(fields) + " |", flush=True)
        scalars = {**values, "tokens/s/GPU": rate, "target CR": target_cr}
        if by_head is not None:
            all_tokens = iterations * tokens
            for layer, kept in enumerate(by_head.sum(dim=1).tolist(), start=1):
                scalars[f"CR by layer/{layer:03d}"] = all_tokens * by_head.size(1) / max(kept, 1.0)
        self.scalars(iteration, scalars)

    def scalars(self, iteration: int, values: dict[str, float]) -> None:
        """To TensorBoard and Weights & Biases."""
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
