"""Runs the jobs of a comparison: as many at once as asked for, each after what it needs, and none again
that is done.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from pathlib import Path
from typing import Optional

from megatron.dmc.evaluation.compare.plan import ROOT, Job, Plan

POLL = 0.5  # seconds
TOLD = 30.0  # seconds between lines of progress
_ITERATION = re.compile(r"iteration +(\d+)/")


class Pool:
    """Args: plan; output: where marks and logs go; at_once: processes at once, which share the cores."""

    def __init__(self, plan: Plan, output: Path, at_once: int) -> None:
        self.plan, self.output, self.at_once = plan, output, at_once
        self.running: dict[str, tuple[subprocess.Popen, int]] = {}
        self.finished: set[str] = set()
        self._seconds = self._tokens = 0.0
        self._began: dict[str, tuple[float, float]] = {}
        self._told = 0.0

    def _mark(self, name: str) -> Path:
        return self.output / "jobs" / f"{name}.json"

    def log(self, name: str) -> Path:
        """What a job has printed."""
        return self.output / "jobs" / f"{name}.log"

    def is_done(self, name: str) -> bool:
        mark = self._mark(name)
        return mark.is_file() and json.loads(mark.read_text())["digest"] == self.plan.digest(name)

    def check(self) -> None:
        """Refuse to train into directories that hold something else.

        Raises:
            ValueError: naming a directory that other settings made, and what to do.
        """
        for job in self.plan.jobs.values():
            mark, directory = self._mark(job.name), self.output / job.name
            begun = mark.with_suffix(".begun")
            made = begun.read_text().strip() if begun.is_file() else None
            if job.iters and directory.is_dir() and made is not None and made != self.plan.digest(job.name):
                raise ValueError(
                    f"{directory} was trained with other settings than the configuration now says; remove it, or name "
                    "another output"
                )

    def run(self) -> None:
        """Do what is not done. Raises ``RuntimeError`` with the end of its log for a job that fails; the others are
        stopped.
        """
        self.finished = {name for name in self.plan.jobs if self.is_done(name)}
        environment = dict(
            os.environ,
            PYTHONWARNINGS="ignore",
            PYTHONPATH=os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        )
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        environment.setdefault("OMP_NUM_THREADS", str(max(1, cores // self.at_once)))
        try:
            while len(self.finished) < len(self.plan.jobs):
                self._start(environment)
                time.sleep(POLL)
                self._collect(environment)
                self._tell()
        finally:
            for process, _ in self.running.values():
                process.terminate()  # a training saves and can be resumed
            for process, _ in self.running.values():
                process.wait()

    def _start(self, environment: dict[str, str]) -> None:
        for name, job in self.plan.jobs.items():
            if len(self.running) >= self.at_once:
                return
            if name not in self.finished and name not in self.running and set(job.after) <= self.finished:
                self.log(name).parent.mkdir(parents=True, exist_ok=True)
                self._mark(name).with_suffix(".begun").write_text(self.plan.digest(name))
                self._began[name] = time.monotonic(), self._left(job)
                self._launch(name, 0, environment)

    def _launch(self, name: str, step: int, environment: dict[str, str]) -> None:
        with self.log(name).open("a") as log:
            process = subprocess.Popen(
                self.plan.jobs[name].commands[step],
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=environment,
                cwd=ROOT,
            )
        self.running[name] = process, step

    def _collect(self, environment: dict[str, str]) -> None:
        for name, (process, step) in list(self.running.items()):
            status = process.poll()
            if status is None:
                continue
            job = self.plan.jobs[name]
            del self.running[name]
            if status != 0 or job.iters and self._iteration(job) < job.iters:
                tail = "".join(self.log(name).read_text(errors="replace").splitlines(keepends=True)[-15:])
                raise RuntimeError(
                    f"{name} ended with status {status} before it was done; the end of {self.log(name)}:\n{tail}"
                )
            if step + 1 < len(job.commands):
                self._launch(name, step + 1, environment)
                continue
            began, tokens = self._began[name]
            self._seconds, self._tokens = self._seconds + time.monotonic() - began, self._tokens + tokens
            self._mark(name).write_text(json.dumps({"digest": self.plan.digest(name)}))
            self.finished.add(name)

    def _iteration(self, job: Job) -> int:
        """Of a training, by its log."""
        if not self.log(job.name).is_file():
            return 0
        found = _ITERATION.findall(self.log(job.name).read_text(errors="replace"))
        return int(found[-1]) if found else 0

    def _left(self, job: Job) -> float:
        """Tokens that a job still has to go through."""
        return job.cost * (1 - self._iteration(job) / job.iters) if job.iters else job.cost

    def time_left(self) -> Optional[float]:
        """Seconds, by the speed of what has been done since the start; None as long as nothing is known."""
        seconds, tokens = self._seconds, self._tokens
        for name in self.running:
            began, had = self._began[name]
            seconds, tokens = seconds + time.monotonic() - began, tokens + had - self._left(self.plan.jobs[name])
        left = sum(self._left(job) for name, job in self.plan.jobs.items() if name not in self.finished)
        return left * seconds / tokens / self.at_once if tokens > 0 else None

    def _tell(self) -> None:
        now = time.monotonic()
        if now - self._told < TOLD and self.running:
            return
        self._told, left = now, self.time_left()
        at = []
        for name in self.running:
            job = self.plan.jobs[name]
            at.append(f"{name} {self._iteration(job)}/{job.iters}" if job.iters else name)
        eta = "" if left is None else f", about {left / 60:.0f} min left"
        done = f"{len(self.finished)} of {len(self.plan.jobs)} jobs done{eta}"
        print(f"[{time.strftime('%H:%M:%S')}] {done} | {', '.join(at)}", flush=True)
