"""Tables of a comparison in the paper's form, and the data of its plots, from the measured rows."""

import json
import math
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

from megatron.dmc.evaluation.compare.config import CompareConfig
from megatron.dmc.evaluation.compare.jobs import JobGraph, Row
from megatron.dmc.evaluation.report import markdown


@dataclass(frozen=True)
class Measured:
    """A row with its measurements."""

    row: Row
    steps: int
    """Optimizer steps after the original."""
    figures: dict[tuple[str, str], float]
    """Measured values by (task, where)."""
    compression: dict[str, Any]

    def figure(self, task: str, where: str) -> float:
        return self.figures.get((task, where), math.nan)

    @property
    def perplexity(self) -> float:
        return math.exp(self.figure("loss", "all"))

    @property
    def reads(self) -> float:
        """Factor by which decoding the whole sequence reads fewer slots than with the original's cache."""
        return self.row.heads_ratio * self.compression["reads"]

    @property
    def ratio(self) -> float:
        """Factor by which the cache is smaller than the original's at the end of a sequence."""
        return self.row.heads_ratio * self.compression["at_end"]


def read(graph: JobGraph, output: Path) -> list[Measured]:
    """Rows that have been measured, with their measurements."""
    found = []
    for row in graph.rows:
        path = output / f"{row.key}/measured.json"
        if not path.is_file():
            continue
        content = json.loads(path.read_text())
        figures = {(f["task"], f["where"]): f["value"] for f in content["figures"]}
        found.append(Measured(row, graph.steps(row.run), figures, content["compression"]))
    return found


@dataclass(frozen=True)
class Column:
    """Column of a table: a task."""

    title: str
    value: Callable[[Measured], float]
    digits: int


def columns(config: CompareConfig, measured: Iterable[Measured]) -> list[Column]:
    """Columns of the tables: perplexity, loss of the second half, identifiers, longest recall tasks, lm-eval."""
    s, longest = config.run.data.seq_length, max(config.measure.recall_lengths)

    def of(title: str, task: str, where: str, digits: int = 2) -> Column:
        return Column(title, lambda m: m.figure(task, where), digits)

    found = [
        Column("perplexity", lambda m: m.perplexity, 2),
        of(f"loss at {s // 2}-{s - 1}", "loss", f"{s // 2}-{s - 1}", 3),
        of("identifiers, gap >= 128", "identifiers", "gap >= 128"),
    ]
    for task in ("needle", "multi-key", "variable tracking", "copying"):
        found.append(of(f"{task}, {longest}", f"{task}, tokens", f"{longest} tokens"))
    extra = dict.fromkeys(key for m in measured for key in m.figures if key[0].startswith("lm-eval "))
    return found + [of(f"{task.removeprefix('lm-eval ')} {metric}", task, metric) for task, metric in extra]


def groups(measured: list[Measured], table: str) -> dict[tuple[str, float, int], list[Measured]]:
    """Rows of a table by (method, ratio, steps), the seeds together, in the order of the jobs."""
    found: dict[tuple[str, float, int], list[Measured]] = {}
    for m in measured:
        if m.row.table == table:
            found.setdefault((m.row.method, m.row.ratio, m.steps), []).append(m)
    return found


def spread(values: list[float], digits: int) -> str:
    """Mean over seeds as text, with half of the range where there are several."""
    text = f"{statistics.fmean(values):.{digits}f}"
    return text if len(values) < 2 else f"{text} ± {(max(values) - min(values)) / 2:.{digits}f}"


def relative(measured: list[Measured], m: Measured) -> Optional[float]:
    """Perplexity divided by that of the row's control, of the same seed; None for a control."""
    for other in measured:
        if m.row.baseline is not None and other.row.key == m.row.baseline:
            return m.perplexity / other.perplexity
    return None


def table(config: CompareConfig, measured: list[Measured], name: str) -> str:
    """Markdown table with a row for every method and ratio, means over seeds."""
    shown = columns(config, measured)
    head = ["method", "cache asked", "cache measured: end, reads", "steps", "perplexity / control's"]
    head += [column.title for column in shown]
    lines = []
    for (method, ratio, steps), rows in groups(measured, name).items():
        relatives = [r for r in (relative(measured, m) for m in rows) if r is not None]
        cells = [
            method,
            f"1/{ratio:g}" if method not in ("full cache", "control") else "1",
            f"1/{spread([m.ratio for m in rows], 2)}, 1/{statistics.fmean(m.reads for m in rows):.2f}",
            str(steps),
            spread(relatives, 3) if relatives else "",
            *(spread([c.value(m) for m in rows], c.digits) for c in shown),
        ]
        lines.append(cells)
    return markdown(head, lines)


def to_json(config: CompareConfig, measured: list[Measured], machine: dict[str, Any]) -> dict[str, Any]:
    """All measurements, ready for JSON."""
    settings = {name: value for name, value in config.to_dict().items() if name != "output"}  # a path of this machine
    rows = []
    for m in measured:
        names = ("method", "ratio", "seed", "run", "baseline", "table", "heads_ratio")
        row = {name: getattr(m.row, name) for name in names}
        row |= {"steps": m.steps, "perplexity": m.perplexity, "perplexity_ratio": relative(measured, m)}
        row |= {"cache_ratio": m.ratio, "compression": m.compression}
        row["figures"] = [dict(task=task, where=where, value=value) for (task, where), value in m.figures.items()]
        rows.append(row)
    return {"machine": machine, "config": settings, "rows": rows}
