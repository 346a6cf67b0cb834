"""Signals: SIGTERM and SIGUSR1 mean "save and leave"."""

from __future__ import annotations

import signal

import torch
from torch import distributed


class StopSignal:
    """Notes SIGTERM and SIGUSR1; every rank learns of it at the end of a step, so that all leave together."""

    def __init__(self) -> None:
        self.received = 0
        self._old = {s: signal.signal(s, self._handle) for s in (signal.SIGTERM, signal.SIGUSR1)}

    def _handle(self, number: int, frame) -> None:
        self.received = number

    def agreed(self, device: torch.device) -> int:
        """The signal that any rank has received, or 0. Collective."""
        flag = torch.tensor([self.received], device=device)
        distributed.all_reduce(flag, op=distributed.ReduceOp.MAX)
        return int(flag)

    def restore(self) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)
