"""Plots of a comparison."""

import statistics
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from megatron.dmc.evaluation.compare.config import CompareConfig
from megatron.dmc.evaluation.compare.jobs import JobGraph
from megatron.dmc.evaluation.compare.summary import Column, Measured, columns, groups, relative
from megatron.dmc.evaluation.report import plot_heads, read_curves

# Every method looks the same in all plots: solid lines for trained ones, dashed lines for eviction.
STYLES: dict[str, tuple[str, str]] = {
    "control": ("black", "-"),
    "DMC": ("tab:blue", "o-"),
    "DMC + distillation": ("tab:cyan", "o-"),
    "DMS": ("tab:purple", "s-"),
    "DMS + distillation": ("tab:pink", "s-"),
    "DMS query": ("tab:brown", "P-"),
    "DMS query + distillation": ("tab:olive", "P-"),
    "DMS adapter": ("darkviolet", "*-"),
    "GQA": ("tab:green", "D-"),
    "H2O": ("tab:orange", "^--"),
    "TOVA": ("tab:red", "v--"),
    "StreamingLLM": ("tab:gray", "x--"),
}


def _bars(axis: Any, points: list[tuple[float, list[float]]], style: tuple[str, str], label: str) -> None:
    """Draw means over seeds, with bars from the least to the greatest value."""
    points = sorted((x, values) for x, values in points if values)
    if not points:
        return
    xs, means = [x for x, _ in points], [statistics.fmean(values) for _, values in points]
    ends = [[m - min(v) for m, (_, v) in zip(means, points)], [max(v) - m for m, (_, v) in zip(means, points)]]
    axis.errorbar(
        xs, means, yerr=ends, color=style[0], fmt=style[1], label=label, capsize=2, markersize=5, linewidth=1.3
    )


def _relative(measured: list[Measured], title: str) -> Column:
    return Column(title, lambda m: relative(measured, m) or 1.0, 3)


def _first_seed(measured: list[Measured]) -> list[Measured]:
    """Main table of the first seed."""
    return [m for m in measured if m.row.table == "main" and m.row.seed == measured[0].row.seed]


def _greatest_ratio(measured: list[Measured]) -> list[Measured]:
    """Compressed models of the first seed's main table at the greatest ratio."""
    most = max(m.row.ratio for m in measured if m.row.table == "main")
    return [m for m in _first_seed(measured) if m.row.ratio == most and m.row.baseline]


def quality(config: CompareConfig, measured: list[Measured], path: Path) -> None:
    """Plot every task against the measured compression: one line per method, and the control's level."""
    shown = [_relative(measured, "perplexity / control's"), *columns(config, measured)[1:7]]
    figure = Figure(figsize=(17, 7.5), layout="constrained")
    axes = figure.subplots(2, 4)
    methods = dict.fromkeys(m.row.method for m in measured if m.row.table == "main" and m.row.baseline)
    widest = max(m.ratio for m in measured if m.row.table == "main")
    for axis, column in zip(axes.flat, shown):
        for method in methods:
            found = [rows for (name, _, _), rows in groups(measured, "main").items() if name == method]
            points = [(statistics.fmean(m.ratio for m in rows), [column.value(m) for m in rows]) for rows in found]
            _bars(axis, points, STYLES[method], method)
        controls = {id(m): m for m in measured if m.row.method == "control"}.values()
        level = statistics.fmean(column.value(m) for m in controls)
        axis.axhline(level, color="black", linewidth=1, linestyle=":", label="control, full cache")
        axis.set_title(column.title)
        axis.set_xlabel("tokens / slots, at the end")
        axis.set_xscale("log", base=2)
        axis.set_xlim(0.9, 1.3 * widest)
        axis.set_xticks([1.0, *config.ratios], ["1", *(f"{ratio:g}" for ratio in config.ratios)])
        axis.grid(alpha=0.3)
    handles, labels = axes.flat[0].get_legend_handles_labels()
    axes.flat[-1].axis("off")
    axes.flat[-1].legend(handles, labels, loc="center")
    figure.savefig(path, dpi=110)


def by_head(measured: list[Measured], path: Path) -> None:
    """Plot CR by layer and head for the trained methods of the first seed."""
    shown = []
    for m in _first_seed(measured):
        if m.row.method.startswith(("DMC", "DMS")):
            heads = m.compression["by_head"]
            name = f"{m.row.method} {m.row.ratio:g}x"
            shown.append(dict(name=name, target_cr=m.row.ratio, cr=m.ratio, cr_by_head=heads))
    if shown:
        plot_heads(shown, path)


def by_position(measured: list[Measured], path: Path) -> None:
    """Plot CR after every token of a sequence, for the first seed and the greatest ratio."""
    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    axis = figure.subplots()
    for m in _greatest_ratio(measured):
        values = [m.row.heads_ratio * value for value in m.compression["by_position"]]
        color, style = STYLES[m.row.method]
        axis.plot(range(1, len(values) + 1), values, style.lstrip("osD^vx"), color=color, label=m.row.method)
    axis.set_xlabel("tokens")
    axis.set_ylabel("tokens / slots")
    most = max(m.row.ratio for m in measured if m.row.table == "main")
    axis.set_title(f"compression by position, {most:g}x asked")
    axis.legend()
    axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def curves(config: CompareConfig, graph: JobGraph, measured: list[Measured], path: Path) -> None:
    """Plot training loss and CR over the steps after the original, for the first seed and the greatest ratio."""
    figure = Figure(figsize=(9, 7.5), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True)
    controls = [m for m in _first_seed(measured) if m.row.method == "control"][-1:]
    trained = [m for m in _greatest_ratio(measured) if m.row.policy is None]
    for m in [*controls, *trained]:
        runs = [run for run in graph.after_original(m.row.run) if graph.jobs[run].iters]
        found = read_curves([str(Path(config.output) / run / "tensorboard") for run in runs])
        color, window = STYLES[m.row.method][0], 10
        loss = found.get("lm-loss", [])
        smooth = [
            (loss[i][0], statistics.fmean(v for _, v in loss[max(0, i - window + 1) : i + 1])) for i in range(len(loss))
        ]
        top.plot(*zip(*smooth, strict=True), color=color, label=m.row.method, linewidth=1.2)
        if "CR" in found:
            bottom.plot(*zip(*found["CR"], strict=True), color=color, label=m.row.method, linewidth=1.2)
    top.set_ylabel("LM loss of training (text and recall documents)")
    bottom.set_ylabel("tokens / slots, hard decisions")
    bottom.set_xlabel("steps after the original")
    for axis in (top, bottom):
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(path, dpi=110)


def economy(config: CompareConfig, measured: list[Measured], path: Path) -> None:
    """Plot quality at one ratio against the steps of the retrofit, one line per method."""
    assert config.economy is not None
    ratio, methods = config.economy.ratio, config.economy.methods
    found = [m for m in measured if m.row.method in methods and m.row.table != "compound"]
    rows = [m for m in found if m.row.ratio == ratio]
    if not rows:
        return  # a report before any of them
    steps = sorted({m.steps for m in rows})
    first = _relative(measured, "perplexity / control's at the full schedule")
    reached = Column("times that the cache is smaller", lambda m: m.ratio, 2)
    shown = [first, reached, *columns(config, measured)[3:7]]
    figure = Figure(figsize=(14, 7.5), layout="constrained")
    axes = figure.subplots(2, 3)
    for axis, column in zip(axes.flat, shown):
        for method in methods:
            points: dict[int, list[float]] = {}
            for m in rows:
                if m.row.method == method:
                    points.setdefault(m.steps, []).append(column.value(m))
            _bars(axis, [*points.items()], STYLES[method], method)
        axis.set_title(column.title)
        axis.set_xlabel("optimizer steps")
        axis.set_xscale("log")
        axis.set_xlim(0.8 * steps[0], 1.2 * steps[-1])
        axis.set_xticks(steps, [str(n) for n in steps])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes.flat[1].legend(loc="lower right")
    figure.suptitle(f"{ratio:g}x: quality by training")
    figure.savefig(path, dpi=110)
