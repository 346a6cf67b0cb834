"""Tables of a comparison on a released model, from the cells that its methods have left."""

import json
import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Optional, Self

from megatron.dmc.evaluation.released.config import ORIGINAL, THEIRS, ReleasedConfig
from megatron.dmc.evaluation.released.measure import Layout
from megatron.dmc.evaluation.released.samples import Task
from megatron.dmc.evaluation.report import markdown

RECALLS = ("needle", "multi-key")


class Mean(NamedTuple):
    """Mean over samples, with its standard error (NaN of one sample)."""

    value: float
    error: float

    @classmethod
    def of(cls, values: list[float]) -> Self:
        error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
        return cls(statistics.fmean(values), error)

    def text(self, digits: int, scale: float = 1.0) -> str:
        value = f"{scale * self.value:.{digits}f}"
        return value if math.isnan(self.error) else f"{value} ± {scale * self.error:.{digits}f}"


@dataclass(frozen=True)
class Cell:
    """One method on one task."""

    method: str
    task: Task
    samples: dict[str, list[float]]
    compression: dict[str, Any]

    @property
    def ratio(self) -> float:
        return self.compression["ratio"]

    def mean(self, figure: str) -> Mean:
        return Mean.of(self.samples[figure])

    @property
    def perplexity(self) -> float:
        return math.exp(self.mean("loss").value)


@dataclass(frozen=True)
class Results:
    """Cells by (method, task), and the methods and tasks in the order of the tables."""

    methods: list[str]
    tasks: dict[str, Task]
    cells: dict[tuple[str, str], Cell]

    def of(self, *, protocol: str, kinds: Iterable[str]) -> list[Task]:
        """Tasks of a protocol and these kinds of text."""
        wanted = tuple(kinds)
        return [task for task in self.tasks.values() if task.protocol == protocol and task.kind.startswith(wanted)]

    def on(self, task: Task) -> list[Cell]:
        """Cells of a task, by method."""
        return [self.cells[m, task.name] for m in self.methods if (m, task.name) in self.cells]

    def original(self, cell: Cell) -> Optional[Cell]:
        """The full cache, computed by the same code as ``cell``."""
        name = THEIRS + ORIGINAL if cell.method.startswith(THEIRS) else ORIGINAL
        return self.cells.get((name, cell.task.name))

    def relative(self, cell: Cell) -> Optional[Mean]:
        """Perplexity divided by the original's, from the losses of the same samples; None without the original."""
        if (original := self.original(cell)) is None:
            return None
        paired = Mean.of([a - b for a, b in zip(cell.samples["loss"], original.samples["loss"])])
        ratio = math.exp(paired.value)
        return Mean(ratio, ratio * paired.error)


def read(output: Path, methods: list[str]) -> Results:
    """Cells that have been measured.

    Raises:
        ValueError: the original has not been measured.
    """
    layout, tasks, cells = Layout(output), {}, {}
    for source in layout.tasks():
        task = Task.load(source)
        tasks[task.name] = task
        for method in methods:
            path = layout.cell(method, task.name)
            if path.is_file():
                content = json.loads(path.read_text())
                cells[method, task.name] = Cell(method, task, content["samples"], content["compression"])
    if not any(method == ORIGINAL for method, _ in cells):
        raise ValueError(f"the original has not been measured yet under {output}; figures are relative to it")
    return Results(methods, tasks, cells)


def fidelity_table(results: Results, tasks: list[Task]) -> str:
    """Perplexity, and distance to the original's predictions: a row for each task and method."""
    head = ["text", "method", "cache measured", "perplexity", "/ original's", "KLD, nats", "same argmax, %"]
    rows = []
    for task in tasks:
        for cell in results.on(task):
            relative, plain = results.relative(cell), cell.method.endswith(ORIGINAL)
            cache = f"1/{cell.ratio:.2f}"
            if "reads" in cell.compression:
                cache += f", 1/{cell.compression['reads']:.2f}"
            row = [f"{task.kind}, {task.length:,}", cell.method, "1" if plain else cache, f"{cell.perplexity:.2f}"]
            if plain or relative is None:
                row += ["", "", ""]
            else:
                row += [relative.text(3), cell.mean("kld").text(4), cell.mean("agreement").text(1, 100)]
            rows.append(row)
    return markdown(head, rows)


def tasks_table(results: Results, tasks: list[Task]) -> str:
    """Recall and HumanEval: a row per method, a column per task."""
    head = ["method", "cache measured"]
    head += [f"{task.kind}, {task.length:,}" for task in tasks if task.kind.startswith(RECALLS)]
    humaneval = [task for task in tasks if task.kind == "HumanEval"]
    for task in humaneval:
        head += [f"HumanEval after {task.length:,}: perplexity / original's", "tokens right, %"]
    rows = []
    for method in results.methods:
        cells = [results.cells.get((method, task.name)) for task in tasks]
        ratios = [cell.ratio for cell in cells if cell is not None]
        if not ratios:
            continue
        span = f"1/{min(ratios):.2f}" + (f" to 1/{max(ratios):.2f}" if max(ratios) - min(ratios) >= 0.01 else "")
        row = [method, "1" if method.endswith(ORIGINAL) else span]
        for cell in cells:
            if cell is not None and cell.task.kind == "HumanEval":
                relative = results.relative(cell)
                row += ["" if relative is None else relative.text(3), cell.mean("accuracy").text(1, 100)]
            else:
                row.append("" if cell is None else cell.mean("exact").text(0, 100))
        rows.append(row)
    return markdown(head, rows)


def exceptions(results: Results, follow: Optional[str]) -> list[str]:
    """Tasks on which a method without training is at least as near to the original as the adapter that it follows:
    by perplexity, or by the share of answers that are right.
    """
    found = []
    for task in results.tasks.values():
        ours = results.cells.get((follow or "", task.name))
        if ours is None:
            continue
        for cell in results.on(task):
            if cell.method == follow or cell.method.endswith(ORIGINAL):
                continue
            if task.kind.startswith(RECALLS):
                if cell.mean("exact").value > ours.mean("exact").value:
                    found.append(f"{task.kind}, {task.length:,} tokens: {cell.method}")
            else:
                theirs, mine = results.relative(cell), results.relative(ours)
                if theirs is not None and mine is not None and theirs.value <= mine.value:
                    protocol = "whole text" if task.protocol == "whole" else "after a context"
                    found.append(f"{task.kind}, {task.length:,} tokens, {protocol}: {cell.method}")
    return found


def disagreement(results: Results) -> Optional[float]:
    """Largest difference of a sample's loss under the full cache, by this package and by kvpress' transformers, in
    nats; None when only one of them has been measured.
    """
    found = []
    for task in results.tasks.values():
        one, two = (results.cells.get((name, task.name)) for name in (ORIGINAL, THEIRS + ORIGINAL))
        if one and two:
            found += [abs(a - b) for a, b in zip(one.samples["loss"], two.samples["loss"])]
    return max(found, default=None)


_READING = (
    "Values are means over samples ± their standard error. Perplexities are divided by those of the original on "
    "the same samples; that error is of the paired differences. KLD is KL(original || method), the mean per "
    "token: lower is better. Same argmax is the share of tokens for which both find the same one most likely: "
    "higher is better."
)
_WHOLE = (
    "Every token is predicted from a cache that is compressed as it grows, as in decoding. Cache measured: at "
    "the end of the text, and in slots read over all of it."
)
_CONTEXT = (
    "The protocol of kvpress' authors: a context is compressed without knowing what will be asked, then what "
    "follows it is scored. Presses attend to the whole context while they read it, compress it once at its end, "
    "and keep every token after it. H2O, TOVA and StreamingLLM of this package decide token by token, within "
    "their final budget from the first token on, and keep every token after the context. Adapters of DMS run as "
    "they are served: they evict while they read the context, and go on evicting after it. Cache measured: at "
    "the end of the context."
)
_TASKS = (
    "Recall: share of questions, in %, whose answer greedy decoding gives in full. A text holds one fact "
    "(needle) or several (multi-key), and is compressed before the question comes. HumanEval: solved problems "
    "and the problem at hand are compressed, then the reference solution is scored; no program is run."
)


def comparison(results: Results, follow: Optional[str]) -> str:
    """What the methods without training were given, and where one of them does better than the adapter."""
    if follow is None:
        return "Methods without training have the ratio of the configuration."
    found = exceptions(results, follow)
    better = (
        f"**Where one of them does better:** {'; '.join(found)}." if found else "None of them does better on any task."
    )
    return (
        f"Methods without training have the compression that {follow} was measured at: on whole texts at every "
        f"position, after a context at its end. {better}"
    )


def page(results: Results, config: ReleasedConfig) -> str:
    """The report in Markdown, without its pictures."""
    kinds, scored = list(config.text.files), sum(task.tokens for task in results.tasks.values())
    whole, after = (results.of(protocol=protocol, kinds=kinds) for protocol in ("whole", "context"))
    parts = [
        f"# {Path(config.model).name}: compressed caches against the full one",
        f"{len(results.tasks)} tasks, {scored:,} tokens together. {_READING}",
        comparison(results, config.follow),
    ]
    # kvpress measures no whole texts.
    wanted = len(results.methods) * len(results.tasks) - len(whole) * sum(m.startswith(THEIRS) for m in results.methods)
    if len(results.cells) < wanted:
        parts.insert(1, f"**Unfinished:** {len(results.cells)} of {wanted} cells have been measured.")
    if whole:
        parts += ["## Whole texts, compressed all along", _WHOLE, fidelity_table(results, whole)]
    parts += ["## What follows a compressed context", _CONTEXT]
    if (difference := disagreement(results)) is not None:
        parts.append(
            "kvpress runs in transformers. Its rows are over the full cache there, whose loss differs from that of "
            f"this package by at most {difference:.1e} nats in any sample."
        )
    if after:
        parts.append(fidelity_table(results, after))
    if tasks := results.of(protocol="context", kinds=(*RECALLS, "HumanEval")):
        parts += ["## Recall and HumanEval", _TASKS, tasks_table(results, tasks)]
    return "\n\n".join(parts) + "\n"


def to_json(results: Results, config: ReleasedConfig, machine: dict[str, Any]) -> dict[str, Any]:
    """All measurements, ready for JSON; paths of this machine are left out."""
    paths = ("output", "model", "adapters", "kvpress_python", "prepare")
    settings = {name: value for name, value in config.to_dict().items() if name not in paths}
    settings["text"].pop("files")
    rows = []
    for cell in results.cells.values():
        task, relative = cell.task, results.relative(cell)
        row: dict[str, Any] = dict(method=cell.method, protocol=task.protocol, kind=task.kind, length=task.length)
        row |= {"samples": len(task.samples), "perplexity": cell.perplexity, "compression": cell.compression}
        row["perplexity_ratio"] = relative and list(relative)
        row["figures"] = {name: list(cell.mean(name)) for name in cell.samples}
        rows.append(row)
    return {"machine": machine, "config": settings, "cells": rows}
