"""The jobs of a comparison: commands, what each waits for, and the rows of the report that they lead to.

Every training is a command line of ``megatron.dmc.training.retrofit``, every conversion one of ``tools/``: what a user
would type.
"""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

import megatron.dmc
from megatron.dmc.evaluation.compare.config import EVICTION, CompareConfig

ROOT = Path(megatron.dmc.__file__).resolve().parents[2]


@dataclass(frozen=True)
class Job:
    """One or more commands in a row. Done when its mark is there and says the same of commands and dependencies."""

    name: str
    commands: tuple[tuple[str, ...], ...]
    after: tuple[str, ...] = ()
    cost: float = 0.0
    """Tokens through the model, forward and backward, by which progress is judged."""
    iters: int = 0
    """Of a training."""
    init: Optional[str] = None
    """The job whose weights it starts from."""


@dataclass(frozen=True)
class Row:
    """One model under one cache policy: a row of the table for each seed."""

    method: str
    ratio: float
    """Compression that was asked for, against the original's cache."""
    seed: int
    run: str
    """Job that makes the checkpoint."""
    baseline: Optional[str]
    """Job of the control: with as many tokens, but for compound, which has more than any. None for a control itself."""
    policy: Optional[str] = None
    """Of :data:`EVICTION`; None: what the model was trained for."""
    policy_ratio: float = 1.0
    heads_ratio: int = 1
    """KV heads of the original per KV head."""
    table: str = "main"
    """main, compound or economy."""

    @property
    def key(self) -> str:
        return f"{self.run}@{self.policy}-{self.policy_ratio:g}x" if self.policy else self.run


@dataclass
class Plan:
    """Jobs in an order that respects what they wait for, and rows."""

    jobs: dict[str, Job] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)

    def lineage(self, name: str) -> list[str]:
        """Jobs whose weights went into ``name``, the original first, itself last."""
        init = self.jobs[name].init
        return [*(self.lineage(init) if init else ()), name]

    def after_original(self, name: str) -> list[str]:
        """Of :meth:`lineage`, what comes after the original."""
        runs = self.lineage(name)
        return runs[next(i for i, run in enumerate(runs) if run.endswith("/original")) + 1 :]

    def steps(self, name: str) -> int:
        """Optimizer steps after the original."""
        return sum(self.jobs[run].iters for run in self.after_original(name))

    def digest(self, name: str) -> str:
        """Of a job's commands and of all that it waits for: what its results depend on."""
        job = self.jobs[name]
        content = json.dumps([job.commands, [self.digest(other) for other in job.after]])
        return hashlib.sha256(content.encode()).hexdigest()[:16]


def _steps(method: str, ratio: float) -> str:
    return f"{method.lower().replace(' + ', '-')}/{ratio:g}x"


class Planner:
    """Builds the :class:`Plan` of a configuration."""

    def __init__(self, config: CompareConfig) -> None:
        self.config, self.output, self.plan = config, Path(config.output), Plan()
        corpus = config.corpus
        self.data = self.output / "data"
        self.train, self.valid, self.tokenizer = (
            (corpus.train, corpus.valid, corpus.tokenizer)
            if corpus.train and corpus.valid and corpus.tokenizer
            else tuple(str(self.data / name) for name in ("train.jsonl", "valid.jsonl", "tokenizer.model"))
        )

    def build(self) -> Plan:
        self._corpus()
        # The main table's jobs first, for all seeds: so a report of what is there says the most.
        controls = {seed: self._seed(seed) for seed in self.config.seeds}
        for seed in self.config.seeds if self.config.compound is not None else ():
            self._compound(controls[seed], seed)
        for seed in self.config.seeds if self.config.economy is not None else ():
            self._economy(f"seed{seed}/original", controls[seed], seed)
        return self.plan

    # Jobs

    def _add(self, job: Job) -> str:
        assert job.name not in self.plan.jobs and all(name in self.plan.jobs for name in job.after), job.name
        self.plan.jobs[job.name] = job
        return job.name

    def _tool(self, name: str, *args: Any) -> tuple[str, ...]:
        return (sys.executable, str(ROOT / name), *map(str, args))

    def _corpus(self) -> None:
        corpus, commands = self.config.corpus, []
        if corpus.train is None:
            commands.append(
                self._tool("examples/dmc/build_corpus.py", "--output", self.data, "--vocab-size", corpus.vocab_size)
            )
        commands.append(
            self._tool(
                "tools/preprocess_data.py",
                "--input",
                self.train,
                "--tokenizer",
                self.tokenizer,
                "--output-prefix",
                self.data / "train",
                "--overwrite",
            )
        )
        if corpus.recall_share:
            commands.append(
                (
                    sys.executable,
                    "-m",
                    "megatron.dmc.evaluation.recall_data",
                    "--tokenizer",
                    self.tokenizer,
                    "--corpus",
                    self.train,
                    "--tokens",
                    str(corpus.recall_tokens),
                    "--longest",
                    str(self.config.run.data.seq_length),
                    "--output-prefix",
                    str(self.data / "recall"),
                )
            )
        self._add(Job("corpus", tuple(commands)))

    def _training(
        self,
        name: str,
        stage: str,
        iters: int,
        init: Optional[str],
        *args: Any,
        seed: int,
        batch: Optional[int] = None,
        teacher: Optional[str] = None,
    ) -> str:
        config, corpus = self.config, self.config.corpus
        data = [self.data / "train"]
        if corpus.recall_share:
            data = [f"{1 - corpus.recall_share:g}", *data, f"{corpus.recall_share:g}", self.data / "recall"]
        batch = batch or config.run.training.global_batch_size
        # The model's section is for the first run of all: the others take it from their checkpoints.
        command = [
            sys.executable,
            "-m",
            "megatron.dmc.training.retrofit",
            "--config",
            self.output / ("original.yaml" if init is None else "run.yaml"),
            "--stage",
            stage,
            "--train-iters",
            iters,
            "--seed",
            seed,
            "--global-batch-size",
            batch,
            "--data-path",
            *data,
            "--tokenizer",
            self.tokenizer,
            "--save",
            self.output / name,
            "--tensorboard-dir",
            self.output / name / "tensorboard",
            *args,
        ]
        if init is not None:
            command += ["--init-from", self.output / init]
        if teacher is not None:
            command += ["--distill-from", self.output / teacher]
        cost = iters * batch * config.run.data.seq_length * (4 / 3 if teacher else 1.0)
        waits = dict.fromkeys(("corpus", *filter(None, (init, teacher))))
        return self._add(Job(name, (tuple(map(str, command)),), tuple(waits), cost, iters, init))

    def _constant(self) -> list[str]:
        return ["--lr", f"{self.config.recipe.lr:g}", "--lr-decay-style", "constant"]

    def _decay(self) -> list[str]:
        recipe = self.config.recipe
        return ["--lr", f"{recipe.lr:g}", "--lr-decay-style", "cosine", "--min-lr", f"{recipe.min_lr:g}"]

    def _export(self, run: str) -> str:
        """The Hugging Face directory of a run, once."""
        name = f"{run}/hf"
        if name not in self.plan.jobs:
            command = self._tool(
                "tools/convert_checkpoint.py",
                "export",
                "--load",
                self.output / run,
                "--save",
                self.output / name,
                "--overwrite",
                "--tokenizer",
                self.tokenizer,
            )
            self._add(Job(name, (command,), (run,)))
        return name

    def _measure(self, row: Row) -> None:
        hf = self._export(row.run)
        name, measure = f"{row.key}/measured", self.config.measure
        if name in self.plan.jobs:
            return
        spec = json.dumps(
            dict(
                model=str(self.output / hf),
                policy=row.policy,
                ratio=row.policy_ratio,
                valid=self.valid,
                tokenizer=self.tokenizer,
                length=self.config.run.data.seq_length,
                seed=row.seed,
                tasks={name: value for name, value in measure.__dict__.items() if value is not None},
            )
        )
        command = (
            sys.executable,
            "-m",
            "megatron.dmc.evaluation.compare.measure",
            spec,
            str(self.output / f"{name}.json"),
        )
        sequences = len(measure.recall_depths) * measure.recall_samples * 4
        tokens = 2 * measure.windows * self.config.run.data.seq_length + sequences * sum(measure.recall_lengths)
        # Policies that go token by token: 4 times the time of a training step's tokens, as seen on a CPU.
        self._add(Job(name, (command,), (hf,), tokens * (4.0 if row.policy in ("H2O", "TOVA") else 0.5)))

    # One seed's runs and rows

    def _seed(self, seed: int) -> dict[float, str]:
        """The main table's. Returns the controls."""
        config, original = self.config, f"seed{seed}/original"
        o = config.original
        if o.hf is None:
            at = self._start(seed) if o.induction else None
            self._training(
                original,
                "pretrain",
                o.iters,
                at,
                "--lr",
                f"{o.lr:g}",
                "--min-lr",
                f"{o.min_lr:g}",
                "--lr-decay-style",
                "cosine",
                "--lr-warmup-iters",
                o.warmup_iters,
                "--micro-batch-size",
                o.global_batch_size,
                seed=seed,
                batch=o.global_batch_size,
            )
        else:
            self._add(
                Job(
                    original,
                    (
                        self._tool(
                            "tools/convert_checkpoint.py",
                            "import",
                            "--hf",
                            o.hf,
                            "--save",
                            self.output / original,
                            "--overwrite",
                        ),
                    ),
                    ("corpus",),
                )
            )
        self._row("full cache", 1.0, seed, original, None)
        controls = self._controls(original, seed)
        self._train_methods(original, controls, seed)
        return controls

    def _start(self, seed: int) -> str:
        """Weights that look back, as a checkpoint."""
        name, hf = f"seed{seed}/start", self.output / f"seed{seed}/start-hf"
        make = (
            sys.executable,
            "-m",
            "megatron.dmc.evaluation.induction",
            "--config",
            str(self.output / "original.yaml"),
            "--seed",
            str(seed),
            "--save",
            str(hf),
        )
        take = self._tool(
            "tools/convert_checkpoint.py", "import", "--hf", hf, "--save", self.output / name, "--overwrite"
        )
        return self._add(Job(name, (make, take), ("corpus",)))

    def _row(self, method: str, ratio: float, seed: int, run: str, baseline: Optional[str], **rest: Any) -> None:
        self.plan.rows.append(Row(method, ratio, seed, run, baseline, **rest))
        self._measure(self.plan.rows[-1])  # as soon as it is trained: a report can be written at any time

    def _ramp(self, ratio: float) -> int:
        return round((ratio - 1) * self.config.recipe.iters_per_cr)

    def _controls(self, original: str, seed: int) -> dict[float, str]:
        """Training on without compression, for as many steps as DMC takes to each ratio: constant, then a decay to
        each.
        """
        recipe, done, runs, at, stem = self.config.recipe, 0, {}, original, f"seed{seed}/control"
        for ratio in self.config.ratios:
            iters = recipe.zero_out_iters + self._ramp(ratio) - done
            at = self._training(
                f"{stem}/{ratio:g}x-constant", "pretrain", iters, at, *self._constant(), seed=100 * seed + done
            )
            done += iters
            runs[ratio] = self._training(
                f"{stem}/{ratio:g}x", "pretrain", recipe.finetune_iters, at, *self._decay(), seed=100 * seed + 99
            )
            self._row("control", ratio, seed, runs[ratio], None)
        return runs

    def _zero_out(self, init: str, name: str, seed: int) -> str:
        iters = self.config.recipe.zero_out_iters
        return self._training(name, "zero_out", iters, init, *self._constant(), seed=100 * seed)

    def _compress(
        self,
        zeroed: str,
        stem: str,
        method: str,
        ratio: float,
        start: float,
        init: str,
        seed: int,
        teacher: Optional[str],
        share: float = 1.0,
    ) -> tuple[str, str]:
        """Retrofit from ``start`` to ``ratio`` and a finetune there. Returns both runs."""
        recipe, dmc = self.config.recipe, self.config.run.dmc
        settings: list[Any] = []
        if init == zeroed:  # later runs have it from their checkpoints
            evicts = method.startswith("DMS")
            window = recipe.dms_window if evicts else "none" if dmc.window is None else dmc.window
            settings = [
                "--method",
                "dms" if evicts else "dmc",
                "--window",
                window,
                "--decision-bias",
                f"{dmc.decision_bias:g}",
                "--temperature",
                f"{dmc.temperature:g}",
            ]
        iters = max(1, round(share * (self._ramp(ratio) - self._ramp(start))))
        ramp = self._training(
            f"{stem}/{ratio:g}x-retrofit",
            "retrofit",
            iters,
            init,
            *self._constant(),
            "--target-cr",
            f"{ratio:g}",
            "--loss-weight",
            f"{recipe.loss_weight:g}",
            *settings,
            seed=100 * seed + int(10 * start),
            teacher=teacher,
        )
        iters = max(1, round(share * recipe.finetune_iters))
        end = self._training(
            f"{stem}/{ratio:g}x",
            "finetune",
            iters,
            ramp,
            *self._decay(),
            "--loss-weight",
            f"{recipe.finetune_loss_weight:g}",
            seed=100 * seed + 99,
            teacher=teacher,
        )
        return ramp, end

    def _train_methods(self, original: str, controls: dict[float, str], seed: int) -> None:
        config = self.config
        zeroed = self._zero_out(original, f"seed{seed}/zero_out", seed)
        for method in config.methods:
            at, start = zeroed, 1.0
            for ratio in config.ratios:
                control = controls[ratio]
                if method in EVICTION:
                    self._row(method, ratio, seed, control, control, policy=method, policy_ratio=ratio)
                elif method == "GQA":
                    run = self._gqa(original, int(ratio), seed)
                    self._row(method, ratio, seed, run, control, heads_ratio=int(ratio))
                else:
                    teacher = original if "distillation" in method else None
                    stem = f"seed{seed}/{_steps(method, 0).split('/')[0]}"
                    at, run = self._compress(zeroed, stem, method, ratio, start, at, seed, teacher)
                    start = ratio
                    self._row(method, ratio, seed, run, control)

    def _gqa(self, original: str, ratio: int, seed: int) -> str:
        """Mean-pooled heads, then as many tokens as DMC takes to the same ratio (Ainslie et al. 2023)."""
        name, heads = f"seed{seed}/gqa/{ratio}x", self.config.run.model.kv_heads // ratio
        hf = self.output / self._export(original)
        merged, start = self.output / f"{name}-merged-hf", f"{name}-merged"
        convert = "tools/convert_checkpoint.py"
        self._add(
            Job(
                start,
                (
                    self._tool(
                        convert, "merge-heads", "--hf", hf, "--save", merged, "--kv-heads", heads, "--overwrite"
                    ),
                    self._tool(convert, "import", "--hf", merged, "--save", self.output / start, "--overwrite"),
                ),
                (f"{original}/hf",),
                init=original,
            )
        )
        recipe = self.config.recipe
        constant = recipe.zero_out_iters + self._ramp(ratio)
        ramp = self._training(f"{name}-constant", "pretrain", constant, start, *self._constant(), seed=100 * seed)
        return self._training(name, "pretrain", recipe.finetune_iters, ramp, *self._decay(), seed=100 * seed + 99)

    def _compound(self, controls: dict[float, str], seed: int) -> None:
        compound = self.config.compound
        assert compound is not None
        gqa = f"seed{seed}/gqa/{compound.gqa_ratio}x"
        stem = f"seed{seed}/gqa-{compound.gqa_ratio}x-dmc"
        zeroed = at = self._zero_out(gqa, f"{stem}/zero_out", seed)
        start = 1.0
        for ratio in compound.ratios:
            at, run = self._compress(zeroed, stem, "DMC", ratio, start, at, seed, None)
            start = ratio
            self._row(
                f"GQA {compound.gqa_ratio}x + DMC {ratio:g}x",
                compound.gqa_ratio * ratio,
                seed,
                run,
                controls[max(controls)],
                heads_ratio=compound.gqa_ratio,
                table="compound",
            )

    def _economy(self, original: str, controls: dict[float, str], seed: int) -> None:
        economy = self.config.economy
        assert economy is not None
        for method in economy.methods:
            for share in economy.shares:
                stem = f"seed{seed}/economy/{_steps(method, 0).split('/')[0]}-{share:g}"
                teacher = original if "distillation" in method else None
                zeroed = f"seed{seed}/zero_out"
                _, run = self._compress(zeroed, stem, method, economy.ratio, 1.0, zeroed, seed, teacher, share)
                self._row(method, economy.ratio, seed, run, controls[economy.ratio], table="economy")
