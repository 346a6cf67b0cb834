"""Leaving before the end of a stage (signals, the job's time), and refusing to start in a loop of crashes."""

import os
import signal
import time
from pathlib import Path
from typing import Optional

import psutil
import torch
from torch import distributed

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_SLACK = 60.0  # seconds kept free before the job's end: clocks differ, groups are taken down, a shell has to requeue


class StopSignal:
    """Request to save and leave: SIGTERM, SIGUSR1 or SIGINT (Ctrl-C) to any rank, or the end of the job's time.

    A second SIGINT ends the process at once.

    Ranks agree on it at the end of every step, and of every batch of an evaluation, so that all leave together.

    Args:
        minutes: leave so long after the job's start, which is SLURM_JOB_START_TIME or, without it, the process's.

    Where SLURM_JOB_END_TIME says when the job ends (SLURM 23.02 and later; examples/dmc/slurm asks for it in older
    ones), ranks leave in time before that: a minute, and twice what the longest step and the longest checkpoint have
    taken.
    """

    def __init__(self, minutes: Optional[float] = None) -> None:
        self.received = 0
        self._slowest: dict[str, float] = {}
        self._old = {s: signal.signal(s, self._handle) for s in _SIGNALS}
        started, now = _seconds("SLURM_JOB_START_TIME") or psutil.Process().create_time(), time.time()
        self._leave_at = None if minutes is None else started + 60 * minutes
        self._end = _seconds("SLURM_JOB_END_TIME")
        self._stale = self._end is not None and self._end <= now

    def _handle(self, number: int, frame) -> None:
        if number == signal.SIGINT == self.received:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.received = number

    def record(self, what: str, seconds: float) -> None:
        """Record how long a "step" or a "checkpoint" took."""
        self._slowest[what] = max(seconds, self._slowest.get(what, 0.0))

    def _time_is_up(self) -> bool:
        now = time.time()
        if self._leave_at is not None and now >= self._leave_at:
            return True
        return self._end is not None and not self._stale and now >= self._end - _SLACK - 2 * sum(self._slowest.values())

    def reason(self, device: torch.device) -> str:
        """Reason for all ranks to leave, or "". Collective. Signals count from any rank, the time is rank 0's."""
        up = distributed.get_rank() == 0 and self._time_is_up()
        flags = torch.tensor([self.received, int(up)], device=device)
        distributed.all_reduce(flags, op=distributed.ReduceOp.MAX)
        received, up = flags.tolist()
        return f"signal {received}" if received else "the job's time is up" if up else ""

    def __str__(self) -> str:
        """Describe what is armed, for the log."""
        *names, last = (s.name for s in _SIGNALS)
        parts = [f"{', '.join(names)} and {last} save and leave after the running step"]
        if self._leave_at is not None:
            parts.append(f"so does the clock at {_clock(self._leave_at)} (exit_duration_in_mins)")
        if self._stale:
            parts.append(f"SLURM_JOB_END_TIME is {_clock(self._end)}, in the past: not watched")
        elif self._end is not None:
            parts.append(f"the job ends at {_clock(self._end)}: leaving in time before that")
        return "armed: " + "; ".join(parts)

    def restore(self) -> None:
        """Put the signal handlers back."""
        for number, handler in self._old.items():
            signal.signal(number, handler)


def _seconds(variable: str) -> Optional[float]:
    text = os.environ.get(variable, "")
    return float(text) if text.isdigit() else None


def _clock(seconds: Optional[float]) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


class RestartGuard:
    """Stops a job that is requeued again and again for a fault of its own.

    Counts the starts under a --save directory that ended before their first step was complete. A submission by a
    person (SLURM's first start of a job) counts from anew.

    Args:
        save: the --save directory; None counts nothing (pass it on ranks other than 0).
    """

    FILE = "starts_without_a_step"

    def __init__(self, save: Optional[str]) -> None:
        self.file = None if save is None else Path(save) / self.FILE

    def count_start(self, limit: int) -> None:
        """Count this start. Raises ``ValueError`` after ``limit`` starts without a complete step."""
        if self.file is None:
            return
        text = self.file.read_text(errors="replace").strip() if self.file.is_file() else ""
        count = int(text) if text.isascii() and text.isdigit() else 0
        restarts = [os.environ.get(name, "0") for name in ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT")]
        if "SLURM_JOB_ID" in os.environ and restarts == ["0", "0"]:
            count = 0
        if count >= limit:
            raise ValueError(
                f"the last {count} starts of this stage ended before their first step was complete; look for the "
                f"cause in their logs, then remove {self.file}"
            )
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.file.write_text(f"{count + 1}\n")

    def clear(self) -> None:
        """Forget the starts: a step is complete, or there is none to do."""
        if self.file is not None:
            self.file.unlink(missing_ok=True)
            self.file = None
