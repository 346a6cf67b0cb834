"""Runs the jobs of a comparison: several at once, each after what it needs, and none again that is done."""

import json
import os
import re
import subprocess
import sys
import threading
import time
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Optional

from megatron.dmc.environment import usable_cores
from megatron.dmc.evaluation.compare.jobs import ROOT, Job, JobGraph

PROGRESS_SECONDS = 30.0
_ITERATION = re.compile(r"iteration +(\d+)/")


class JobRunner:
    """Runs a job graph, ``at_once`` jobs side by side on equal shares of the cores.

    A finished job leaves ``output/jobs/NAME.json`` with its digest, and is done as long as the digest stays the same.
    Its output is in ``output/jobs/NAME.log``.
    """

    def __init__(self, graph: JobGraph, output: Path, at_once: int) -> None:
        self.graph, self.output, self.at_once = graph, output, at_once
        self.running: dict[Future[None], str] = {}
        self.finished: set[str] = set()
        self._environment, self._printed = _environment(at_once), 0.0
        self._processes: list[subprocess.Popen] = []
        self._stopped, self._lock = False, threading.Lock()
        self._began: dict[str, tuple[float, float]] = {}
        """Start time of each job, and the tokens that it then had to go through."""
        self._seconds = self._tokens = 0.0

    def _mark(self, name: str) -> Path:
        return self.output / "jobs" / f"{name}.json"

    def log(self, name: str) -> Path:
        """File with the output of a job."""
        return self.output / "jobs" / f"{name}.log"

    def is_done(self, name: str) -> bool:
        """Whether a job has been done with its present commands and dependencies."""
        mark = self._mark(name)
        return mark.is_file() and json.loads(mark.read_text())["digest"] == self.graph.digest(name)

    def check(self) -> None:
        """Refuse to train into directories that hold something else.

        Raises:
            ValueError: naming a directory that other settings made, and what to do.
        """
        for job in self.graph.jobs.values():
            directory, begun = self.output / job.name, self._mark(job.name).with_suffix(".begun")
            made = begun.read_text().strip() if begun.is_file() else None
            if job.iters and directory.is_dir() and made is not None and made != self.graph.digest(job.name):
                raise ValueError(
                    f"{directory} was trained with other settings than the configuration now says; remove it, or name "
                    "another output"
                )

    def run(self) -> None:
        """Run every job that is not done.

        Raises:
            RuntimeError: a job failed; the message has the end of its log. The other jobs are stopped.
        """
        self.finished = {name for name in self.graph.jobs if self.is_done(name)}
        with ThreadPoolExecutor(self.at_once) as threads:
            try:
                while len(self.finished) < len(self.graph.jobs):
                    self._start(threads)
                    self._print_progress()
                    done, _ = wait(self.running, PROGRESS_SECONDS, FIRST_COMPLETED)
                    for future in done:
                        self._finish(future)
            finally:
                self._stop()

    def _start(self, threads: ThreadPoolExecutor) -> None:
        """Start jobs in the graph's order as long as there is room."""
        for name, job in self.graph.jobs.items():
            if len(self.running) >= self.at_once:
                return
            if name not in self.finished and name not in self._began and set(job.after) <= self.finished:
                self.log(name).parent.mkdir(parents=True, exist_ok=True)
                self._mark(name).with_suffix(".begun").write_text(self.graph.digest(name))
                self._began[name] = time.monotonic(), self._tokens_left(job)
                self.running[threads.submit(self._run_job, job)] = name

    def _run_job(self, job: Job) -> None:
        """Run a job's commands, in a thread of its own."""
        log = self.log(job.name)
        for command in job.commands:
            process = self._launch(command, log)
            status = process.wait() if process is not None else 1
            if status != 0 or self._iteration(job) < job.iters:
                tail = "".join(log.read_text(errors="replace").splitlines(keepends=True)[-15:])
                raise RuntimeError(
                    f"{job.name} ended with status {status} before it was done; the end of {log}:\n{tail}"
                )

    def _launch(self, command: tuple[str, ...], log: Path) -> Optional[subprocess.Popen]:
        """Start a command; None when all are being stopped."""
        with self._lock, log.open("a") as output:
            if self._stopped:
                return None
            process = subprocess.Popen(
                command, stdout=output, stderr=output, stdin=subprocess.DEVNULL, env=self._environment, cwd=ROOT
            )
            self._processes.append(process)
        return process

    def _stop(self) -> None:
        """Terminate what runs: a training saves and can be resumed."""
        with self._lock:
            self._stopped = True
            for process in self._processes:
                process.terminate()

    def _finish(self, future: Future[None]) -> None:
        """Mark a job as done. Raises the ``RuntimeError`` of one that failed."""
        name = self.running.pop(future)
        future.result()
        began, tokens = self._began[name]
        self._seconds, self._tokens = self._seconds + time.monotonic() - began, self._tokens + tokens
        self._mark(name).write_text(json.dumps({"digest": self.graph.digest(name)}))
        self.finished.add(name)

    def _iteration(self, job: Job) -> int:
        """Last iteration in a training's log."""
        if not self.log(job.name).is_file():
            return 0
        found = _ITERATION.findall(self.log(job.name).read_text(errors="replace"))
        return int(found[-1]) if found else 0

    def _tokens_left(self, job: Job) -> float:
        """Tokens that a job still has to go through."""
        return job.cost * (1 - self._iteration(job) / job.iters) if job.iters else job.cost

    def time_left(self) -> Optional[float]:
        """Estimated seconds to the end, from the speed since the start; None as long as nothing has been done."""
        seconds, tokens, jobs = self._seconds, self._tokens, self.graph.jobs
        for name in self.running.values():
            began, had = self._began[name]
            seconds, tokens = seconds + time.monotonic() - began, tokens + had - self._tokens_left(jobs[name])
        left = sum(self._tokens_left(job) for name, job in jobs.items() if name not in self.finished)
        return left * seconds / tokens / self.at_once if tokens > 0 else None

    def _print_progress(self) -> None:
        """Print a line every half minute: what runs, and how much time is left."""
        now = time.monotonic()
        if now - self._printed < PROGRESS_SECONDS:
            return
        self._printed, left, jobs = now, self.time_left(), self.graph.jobs
        running = []
        for name in self.running.values():
            iters = jobs[name].iters
            running.append(f"{name} {self._iteration(jobs[name])}/{iters}" if iters else name)
        eta = "" if left is None else f", about {left / 60:.0f} min left"
        done = f"{len(self.finished)} of {len(jobs)} jobs done{eta}"
        print(f"[{time.strftime('%H:%M:%S')}] {done} | {', '.join(running)}", flush=True)


def print_jobs(runner: JobRunner) -> None:
    """Print the jobs and whether they are done."""
    for name, job in runner.graph.jobs.items():
        state = "done" if runner.is_done(name) else "    "
        print(f"{state} {name}" + (f", {job.iters} steps" if job.iters else ""))


def run_jobs(runner: JobRunner) -> int:
    """Run every job that is not done, and say what went wrong. Returns the exit status: 1 when a job failed, 130 when
    interrupted.
    """
    try:
        runner.run()
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        return 130
    return 0


def _environment(at_once: int) -> dict[str, str]:
    """Environment of the jobs: this process' own, the repository on PYTHONPATH, this interpreter's programs on PATH,
    and a share of the cores for each job.
    """
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    programs = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    threads = str(max(1, usable_cores() // at_once))
    own = {"PYTHONWARNINGS": "ignore", "PYTHONPATH": path, "PATH": programs}
    return {"OMP_NUM_THREADS": threads, **os.environ, **own}
