"""Builds the job graph of a comparison: how each method is trained and measured.

Every training is a command line of ``megatron.dmc.training.retrofit``, every conversion one of ``tools/``: what a user
would type.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

from megatron.dmc.evaluation.compare.config import EVICTION, CompareConfig, decision_source
from megatron.dmc.evaluation.compare.jobs import ROOT, Job, JobGraph, Row

CONVERT = "tools/convert_checkpoint.py"
Command = tuple[str, ...]


def build_graph(config: CompareConfig) -> JobGraph:
    """Build the jobs and rows of a comparison.

    The jobs of the main table come first, for all seeds, so that an early report says the most.
    """
    graph = JobGraph()
    builders = [SeedBuilder(config, graph, seed) for seed in config.seeds]
    if config.seeds:
        builders[0].corpus()
    for builder in builders:
        builder.main()
    for builder in builders if config.compound is not None else ():
        builder.compound()
    for builder in builders if config.economy is not None else ():
        builder.economy()
    return graph


def _command(program: str, *words: object, **flags: object) -> Command:
    """A command line of a script of the repository (``*.py``) or a module.

    ``lr=5e-4`` becomes ``--lr 0.0005``, True a switch, a list several values; flags that are None are left out.
    """
    head = [str(ROOT / program)] if program.endswith(".py") else ["-m", program]
    line: list[object] = [sys.executable, *head, *words]
    for name, value in flags.items():
        flag = "--" + name.replace("_", "-")
        if value is True:
            line.append(flag)
        elif isinstance(value, list):
            line += [flag, *value]
        elif value is not None:
            line += [flag, f"{value:g}" if isinstance(value, float) else value]
    return tuple(map(str, line))


def _stem(method: str) -> str:
    return method.lower().replace(" + ", "-").replace(" ", "-")


@dataclass(frozen=True)
class Chain:
    """Retrofits of one method to ascending ratios, each from the one before, the first from a ``zero_out`` run or,
    where adapters decide, from their base.
    """

    method: str
    start: str
    """Name of the ``zero_out`` job, or of the base's."""
    stem: str
    """Beginning of the names of its jobs."""
    teacher: Optional[str] = None
    """Name of the job whose model is distilled from."""
    share: float = 1.0
    """Length of the schedule, relative to the full one."""


class SeedBuilder:
    """Adds the jobs and rows of one seed to the graph."""

    def __init__(self, config: CompareConfig, graph: JobGraph, seed: int) -> None:
        self.config, self.graph, self.seed = config, graph, seed
        self.output = Path(config.output)
        self.data = self.output / "data"
        corpus = config.corpus
        self.train_text = corpus.train or str(self.data / "train.jsonl")
        self.valid_text = corpus.valid or str(self.data / "valid.jsonl")
        self.tokenizer = corpus.tokenizer or str(self.data / "tokenizer.model")
        self.original = f"seed{seed}/original"
        self.zeroed = f"seed{seed}/zero_out"
        self.controls: dict[float, str] = {}
        """Training job of the control for each ratio, with as many tokens as the methods take to it."""

    # The tables

    def corpus(self) -> None:
        """Text, tokenizer and datasets, shared by all seeds."""
        corpus, commands = self.config.corpus, []
        if corpus.train is None:
            commands.append(_command("examples/dmc/build_corpus.py", output=self.data, vocab_size=corpus.vocab_size))
        text = dict(input=self.train_text, tokenizer=self.tokenizer, output_prefix=self.data / "train", overwrite=True)
        commands.append(_command("tools/preprocess_data.py", **text))
        if corpus.recall_share:
            recall = dict(
                tokenizer=self.tokenizer,
                corpus=self.train_text,
                tokens=corpus.recall_tokens,
                longest=self.config.run.data.seq_length,
                output_prefix=self.data / "recall",
            )
            commands.append(_command("megatron.dmc.evaluation.recall_data", **recall))
        self.graph.add(Job("corpus", tuple(commands)))

    def main(self) -> None:
        """The main table: the original, its control, and every method at every ratio."""
        self._original()
        self._row("full cache", 1.0, self.original, None)
        self._control()
        self._zero_out(self.zeroed, self.original)
        for method in self.config.methods:
            if method in EVICTION:
                for ratio, control in self.controls.items():
                    self._row(method, ratio, control, control, policy=method, policy_ratio=ratio)
            elif method == "GQA":
                for ratio, control in self.controls.items():
                    self._row(method, ratio, self._gqa(int(ratio)), control, heads_ratio=int(ratio))
            else:
                chain = self._chain(method, f"seed{self.seed}/{_stem(method)}")
                for ratio, run in self._retrofit(chain, self.config.ratios):
                    self._row(method, ratio, run, self.controls[ratio])

    def compound(self) -> None:
        """DMC on top of an up-trained GQA model."""
        compound = self.config.compound
        assert compound is not None
        gqa = compound.gqa_ratio
        stem = f"seed{self.seed}/gqa-{gqa}x-dmc"
        zeroed = self._zero_out(f"{stem}/zero_out", f"seed{self.seed}/gqa/{gqa}x")
        control = self.controls[max(self.controls)]
        for ratio, run in self._retrofit(Chain("DMC", zeroed, stem), compound.ratios):
            name = f"GQA {gqa}x + DMC {ratio:g}x"
            self._row(name, gqa * ratio, run, control, heads_ratio=gqa, table="compound")

    def economy(self) -> None:
        """One ratio after shorter schedules, each straight from ``zero_out``."""
        economy = self.config.economy
        assert economy is not None
        for method in economy.methods:
            for share in economy.shares:
                stem = f"seed{self.seed}/economy/{_stem(method)}-{share:g}"
                chain = self._chain(method, stem, share)
                for ratio, run in self._retrofit(chain, [economy.ratio]):
                    self._row(method, ratio, run, self.controls[ratio], table="economy")

    # Models

    def _original(self) -> None:
        o = self.config.original
        if o.hf is not None:
            self._import(self.original, o.hf, after="corpus")
            return
        schedule = dict(lr=o.lr, min_lr=o.min_lr, lr_decay_style="cosine", lr_warmup_iters=o.warmup_iters)
        start = self._induction() if o.induction else None
        batch = o.global_batch_size
        self._train(
            self.original, "pretrain", o.iters, start, schedule, seed=self.seed, batch=batch, micro_batch_size=batch
        )

    def _induction(self) -> str:
        """A checkpoint of initial weights that can look back."""
        name, hf = f"seed{self.seed}/start", self.output / f"seed{self.seed}/start-hf"
        config = self.output / "original.yaml"
        make = _command("megatron.dmc.evaluation.induction", config=config, seed=self.seed, save=hf)
        return self._import(name, hf, make, after="corpus")

    def _control(self) -> None:
        """Train on without compression for as many steps as DMC takes to each ratio: a constant learning rate, and a
        decay at each ratio.
        """
        recipe, done, last, stem = self.config.recipe, 0, self.original, f"seed{self.seed}/control"
        for ratio in self.config.ratios:
            iters = recipe.zero_out_iters + self._ramp(ratio) - done
            last = self._train(
                f"{stem}/{ratio:g}x-constant", "pretrain", iters, last, self._constant, seed=100 * self.seed + done
            )
            done += iters
            self.controls[ratio] = self._decayed(f"{stem}/{ratio:g}x", "pretrain", recipe.finetune_iters, last)
            self._row("control", ratio, self.controls[ratio], None)

    def _zero_out(self, name: str, init: str, **flags: Any) -> str:
        iters = self.config.recipe.zero_out_iters
        return self._train(name, "zero_out", iters, init, self._constant, seed=100 * self.seed, **flags)

    def _chain(self, method: str, stem: str, share: float = 1.0) -> Chain:
        source, start = decision_source(method), self.zeroed
        if source == "adapter":
            start = f"{self.original}-base"  # a converted checkpoint has the checksums that frozen weights are known by
            if start not in self.graph.jobs:
                export = self._export(self.original)
                self._import(start, self.output / export, after=export, init=self.original)
        elif source == "query":  # another channel is freed
            start = f"{self.zeroed}-query"
            if start not in self.graph.jobs:
                self._zero_out(start, self.original, **self._method_flags(method))
        return Chain(method, start, stem, self.original if "distillation" in method else None, share)

    def _gqa(self, ratio: int) -> str:
        """Mean-pooled heads, then as many tokens as DMC takes to the same ratio (Ainslie et al. 2023)."""
        recipe, name = self.config.recipe, f"seed{self.seed}/gqa/{ratio}x"
        export = self._export(self.original)
        merged, heads = self.output / f"{name}-merged-hf", self.config.run.model.kv_heads // ratio
        merge = _command(CONVERT, "merge-heads", hf=self.output / export, save=merged, kv_heads=heads, overwrite=True)
        start = self._import(f"{name}-merged", merged, merge, after=export, init=self.original)
        iters = recipe.zero_out_iters + self._ramp(ratio)
        ramp = self._train(f"{name}-constant", "pretrain", iters, start, self._constant, seed=100 * self.seed)
        return self._decayed(name, "pretrain", recipe.finetune_iters, ramp)

    def _retrofit(self, chain: Chain, ratios: Sequence[float]) -> Iterator[tuple[float, str]]:
        """Each ratio with its job: a retrofit from the ratio before, and a finetune there, which is the result."""
        recipe, init, before = self.config.recipe, chain.start, 1.0
        adapter = decision_source(chain.method) == "adapter"
        more: dict[str, Any] = dict(teacher=chain.teacher, freeze_base=adapter or None)
        for ratio in ratios:
            iters = max(1, round(chain.share * (self._ramp(ratio) - self._ramp(before))))
            if adapter and before == 1:  # in place of zero_out
                iters += recipe.zero_out_iters
            init = self._train(
                f"{chain.stem}/{ratio:g}x-retrofit",
                "retrofit",
                iters,
                init,
                self._constant,
                seed=100 * self.seed + int(10 * before),
                target_cr=float(ratio),
                loss_weight=float(recipe.loss_weight),
                # Later runs take the method from their checkpoints.
                **(self._method_flags(chain.method) if init == chain.start else {}),
                **more,
            )
            before = ratio
            iters = max(1, round(chain.share * recipe.finetune_iters))
            weight = float(recipe.finetune_loss_weight)
            yield ratio, self._decayed(f"{chain.stem}/{ratio:g}x", "finetune", iters, init, loss_weight=weight, **more)

    # Parts of trainings

    def _ramp(self, ratio: float) -> int:
        """Steps of a retrofit from 1 to ``ratio``."""
        return round((ratio - 1) * self.config.recipe.iters_per_cr)

    @property
    def _constant(self) -> dict[str, Any]:
        return dict(lr=float(self.config.recipe.lr), lr_decay_style="constant")

    def _decayed(self, name: str, stage: str, iters: int, init: str, **more: Any) -> str:
        """The end of a run: the learning rate falls along a cosine."""
        recipe = self.config.recipe
        schedule = dict(lr=float(recipe.lr), lr_decay_style="cosine", min_lr=float(recipe.min_lr))
        return self._train(name, stage, iters, init, schedule, seed=100 * self.seed + 99, **more)

    def _method_flags(self, method: str) -> dict[str, Any]:
        dmc, recipe, source = self.config.run.dmc, self.config.recipe, decision_source(method)
        flags = dict(decision_bias=float(dmc.decision_bias), temperature=float(dmc.temperature))
        if source is None:
            return dict(method="dmc", window="none" if dmc.window is None else dmc.window, **flags)
        if source != "key":
            flags |= dict(decision_source=source, decision_scale=float(recipe.dms_scale))
        return dict(method="dms", window=recipe.dms_window, **flags)

    # Jobs

    def _train(
        self,
        name: str,
        stage: str,
        iters: int,
        init: Optional[str],
        schedule: dict[str, Any],
        *,
        seed: int,
        batch: Optional[int] = None,
        teacher: Optional[str] = None,
        **flags: Any,
    ) -> str:
        """Add a training of one stage.

        Args:
            schedule: flags of the learning rate.
            batch: sequences of a step; None: the configuration's.
            teacher: name of the job whose model is distilled from.
            flags: of this training alone.
        """
        config, share = self.config, self.config.corpus.recall_share
        data: list[object] = [self.data / "train"]
        if share:
            data = [f"{1 - share:g}", *data, f"{share:g}", self.data / "recall"]
        batch = batch or config.run.training.global_batch_size
        command = _command(
            "megatron.dmc.training.retrofit",
            # The first training of all describes the model; the others take it from their checkpoints.
            config=self.output / ("original.yaml" if init is None else "run.yaml"),
            stage=stage,
            train_iters=iters,
            seed=seed,
            global_batch_size=batch,
            data_path=data,
            tokenizer=self.tokenizer,
            save=self.output / name,
            tensorboard_dir=self.output / name / "tensorboard",
            **schedule,
            **flags,
            init_from=init and self.output / init,
            distill_from=teacher and self.output / teacher,
        )
        cost = iters * batch * config.run.data.seq_length * (4 / 3 if teacher else 1.0)
        after = dict.fromkeys(("corpus", *filter(None, (init, teacher))))
        return self.graph.add(Job(name, (command,), tuple(after), cost, iters, init))

    def _import(self, name: str, hf: str | Path, *before: Command, after: str, init: Optional[str] = None) -> str:
        """Add the conversion of a Hugging Face directory to a checkpoint, after the commands that make it."""
        take = _command(CONVERT, "import", hf=hf, save=self.output / name, overwrite=True)
        return self.graph.add(Job(name, (*before, take), (after,), init=init))

    def _export(self, run: str) -> str:
        """Name of the job that exports a run as a Hugging Face directory; added where it is not there yet."""
        name = f"{run}/hf"
        if name not in self.graph.jobs:
            where = dict(load=self.output / run, save=self.output / name, overwrite=True, tokenizer=self.tokenizer)
            self.graph.add(Job(name, (_command(CONVERT, "export", **where),), (run,)))
        return name

    def _row(self, method: str, ratio: float, run: str, baseline: Optional[str], **rest: Any) -> None:
        """Add a row and its measurement, right behind its training: a report can be written at any time."""
        row = Row(method, ratio, self.seed, run, baseline, **rest)
        self.graph.rows.append(row)
        hf, name = self._export(run), f"{row.key}/measured"
        if name in self.graph.jobs:
            return
        measure, length = self.config.measure, self.config.run.data.seq_length
        spec = dict(
            model=str(self.output / hf),
            policy=row.policy,
            ratio=row.policy_ratio,
            valid=self.valid_text,
            tokenizer=self.tokenizer,
            length=length,
            seed=self.seed,
            tasks={name: value for name, value in measure.__dict__.items() if value is not None},
        )
        result = self.output / f"{name}.json"
        command = _command("megatron.dmc.evaluation.compare.measure", json.dumps(spec), result)
        sequences = len(measure.recall_depths) * measure.recall_samples * 4
        tokens = 2 * measure.windows * length + sequences * sum(measure.recall_lengths)
        # Policies that go token by token: 4 times the time of a training step's tokens, as seen on a CPU.
        self.graph.add(Job(name, (command,), (hf,), tokens * (4.0 if row.policy in ("H2O", "TOVA") else 0.5)))
