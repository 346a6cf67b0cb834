"""The jobs of a comparison, what each of them waits for, and the rows of the report that they lead to."""

import hashlib
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, Optional

import megatron.dmc
from megatron.dmc.flags import one_line

ROOT = Path(megatron.dmc.__file__).resolve().parents[2]


@dataclass(frozen=True)
class Job:
    """One or more commands that run one after the other: a training, a conversion or a measurement."""

    name: str
    """Path of its results under the comparison's output."""
    commands: tuple[tuple[str, ...], ...]
    after: tuple[str, ...] = ()
    """Names of the jobs that must be done before it starts."""
    cost: float = 0.0
    """Tokens through the model, forward and backward. The remaining time is estimated from it."""
    iters: int = 0
    """Optimizer steps of a training; 0 for other jobs."""
    init: Optional[str] = None
    """Name of the job whose weights it starts from."""
    inputs: tuple[str, ...] = ()
    """Settings in files that the job reads, and hashes of such files: results depend on them as on the commands."""


@dataclass(frozen=True)
class Row:
    """One model under one cache policy: a row of the table for each seed."""

    method: str
    ratio: float
    """Requested compression, relative to the original's cache."""
    seed: int
    run: str
    """Name of the training job that makes the checkpoint."""
    baseline: Optional[str]
    """Name of the control's training job; None for a control itself. The control has seen as many tokens as the row
    (rows of the compound table have seen more)."""
    policy: Optional[str] = None
    """Eviction policy, one of :data:`EVICTION`; None: the cache that the model was trained for."""
    policy_ratio: float = 1.0
    heads_ratio: int = 1
    """KV heads of the original per KV head of this model."""
    table: str = "main"
    """Table of the report: main, compound or economy."""

    @property
    def key(self) -> str:
        """Path of the row's results under the comparison's output."""
        return f"{self.run}@{self.policy}-{self.policy_ratio:g}x" if self.policy else self.run


@dataclass
class JobGraph:
    """Jobs by name, each behind those that it waits for, and the rows of the report."""

    jobs: dict[str, Job] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)

    def add(self, job: Job) -> str:
        """Append a job whose dependencies are there already; returns its name."""
        assert job.name not in self.jobs and all(name in self.jobs for name in job.after), job.name
        self.jobs[job.name] = job
        return job.name

    def lineage(self, name: str) -> list[str]:
        """Jobs whose weights went into ``name``, from the first one to ``name`` itself."""
        init = self.jobs[name].init
        return [*(self.lineage(init) if init else ()), name]

    def after_original(self, name: str) -> list[str]:
        """The part of :meth:`lineage` that follows the original."""
        runs = self.lineage(name)
        return runs[next(i for i, run in enumerate(runs) if run.endswith("/original")) + 1 :]

    def steps(self, name: str) -> int:
        """Optimizer steps from the original to ``name``."""
        return sum(self.jobs[run].iters for run in self.after_original(name))

    def digest(self, name: str) -> str:
        """Hash of a job's commands and inputs, and of the digests of all that it waits for: its results depend on
        nothing else.
        """
        job = self.jobs[name]
        content = json.dumps([job.commands, [self.digest(other) for other in job.after], *job.inputs])
        return hashlib.sha256(content.encode()).hexdigest()[:16]


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a job's result: a file that is never seen half-written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content) + "\n")
    os.replace(temporary, path)


def run(job: Callable[..., None]) -> NoReturn:
    """Run a job with the arguments of the command line, and exit. A ``ValueError``, and what the system says of a file,
    is printed; the status is 2 then.
    """
    try:
        job(*sys.argv[1:])
    except (ValueError, OSError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        sys.exit(2)
    sys.exit(0)
