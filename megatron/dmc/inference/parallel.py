"""Tensor parallelism: the part of a tensor that a rank holds, and the collectives that the model needs."""

import os
from dataclasses import dataclass
from typing import Any, Optional

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.dmc.config import ModelConfig


@dataclass(frozen=True)
class TensorParallel:
    """One rank of a tensor-parallel group. All ranks run the same engine on the same requests; only tensors differ."""

    rank: int = 0
    size: int = 1
    group: Optional[Any] = None
    """Process group of torch.distributed; None is the default one."""

    def check(self, model: ModelConfig) -> None:
        """Raise ``ValueError`` when the group's size does not divide the model's heads and MLP."""
        for name, value in (
            ("num_key_value_heads", model.kv_heads),
            ("num_attention_heads", model.num_attention_heads),
            ("intermediate_size", model.ffn_hidden_size),
        ):
            if value % self.size:
                raise ValueError(f"tensor parallelism {self.size} does not divide {name} {value}; use a divisor of it")

    def part(self, total: int) -> tuple[int, int]:
        """Range [start, stop) of this rank's rows of ``total``; the last ranks may hold fewer."""
        each = -(-total // self.size)
        return min(self.rank * each, total), min((self.rank + 1) * each, total)

    def sum(self, x: Tensor) -> Tensor:
        """Sum over ranks, in place."""
        if self.size > 1:
            dist.all_reduce(x, group=self.group)
        return x

    def gather(self, x: Tensor) -> Tensor:
        """Gather a tensor of every rank: [...] -> [size, ...]."""
        if self.size == 1:
            return x[None]
        parts = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(parts, x.contiguous(), group=self.group)
        return torch.stack(parts)

    def columns(self, x: Tensor, total: int) -> Tensor:
        """Gather columns of every rank: [n, part] -> [n, total]."""
        if self.size == 1:
            return x
        # [size, n, part] -> [n, size, part] -> [n, size * part]
        return self.gather(x).transpose(0, 1).reshape(x.size(0), self.size * x.size(1))[:, :total]

    def from_first(self, x: Tensor) -> Tensor:
        """Broadcast rank 0's values in place: sampled tokens must not differ by a rounding."""
        if self.size > 1:
            dist.broadcast(x, src=dist.get_global_rank(self.group, 0) if self.group else 0, group=self.group)
        return x


def initialize(size: int, device: torch.device, group: Optional[Any] = None) -> TensorParallel:
    """Rank of this process in a group of ``size``; starts the default group from torchrun's environment if needed.

    Raises:
        ValueError: the group has another size.
    """
    if size == 1:
        return TensorParallel()
    if not dist.is_initialized():
        if "RANK" not in os.environ:
            raise ValueError(
                f"tensor_parallel_size is {size}, and this process is no rank of a group; start it with torchrun "
                f"--nproc-per-node {size}"
            )
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    world = dist.get_world_size(group)
    if world != size:
        raise ValueError(
            f"tensor_parallel_size is {size}, but there are {world} processes; start one for each rank (torchrun "
            f"--nproc-per-node {size})"
        )
    return TensorParallel(dist.get_rank(group), size, group)
