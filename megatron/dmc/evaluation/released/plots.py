"""Plots of a comparison on a released model."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from megatron.dmc.evaluation.released.config import ORIGINAL, ReleasedConfig
from megatron.dmc.evaluation.released.samples import Task
from megatron.dmc.evaluation.released.summary import RECALLS, Cell, Results
from megatron.dmc.evaluation.report import plot_heads


def all_of(results: Results, config: ReleasedConfig, directory: Path) -> list[tuple[str, str]]:
    """Write every plot for which there are measurements; returns their titles and file names."""
    kinds, made = list(config.text.files), []
    for protocol, title in (("whole", "whole texts"), ("context", "after a compressed context")):
        tasks = results.of(protocol=protocol, kinds=kinds)
        if _distance(results, tasks, kinds, f"Distance to the original: {title}", directory / f"{protocol}.png"):
            made.append((f"distance to the original, {title}", f"{protocol}.png"))
    if _recall(results, directory / "recall.png"):
        made.append(("recall", "recall.png"))
    if _heads(results, config, directory / "cr_by_head.png"):
        made.append(("CR by layer and head", "cr_by_head.png"))
    return made


def _compressed(results: Results, task: Task) -> list[Cell]:
    return [cell for cell in results.on(task) if not cell.method.endswith(ORIGINAL)]


def _style(results: Results, method: str) -> dict[str, Any]:
    """Colour and line of a method, the same in all plots: adapters bold, presses dashed."""
    shown = [name for name in results.methods if not name.endswith(ORIGINAL)]
    i, theirs = shown.index(method), method.startswith("kvpress")
    return dict(color=f"C{i % 10}", marker="os^vD*xP"[i % 8], linestyle="--" if theirs else "-")


def _distance(results: Results, tasks: list[Task], kinds: list[str], title: str, path: Path) -> bool:
    """Plot perplexity over the original's and KLD against the length, one column for each kind of text."""
    points: dict[tuple[str, str], list[tuple[int, float, float]]] = {}
    for task in tasks:
        for cell in _compressed(results, task):
            if (relative := results.relative(cell)) is not None:
                values = (task.length, relative.value, cell.mean("kld").value)
                points.setdefault((task.kind, cell.method), []).append(values)
    if not points:
        return False
    figure = Figure(figsize=(5.2 * len(kinds), 8), layout="constrained")
    axes = figure.subplots(2, len(kinds), squeeze=False)
    for (kind, method), found in points.items():
        xs, ratios, divergences = zip(*sorted(found))
        for axis, values in zip(axes[:, kinds.index(kind)], (ratios, divergences)):
            axis.plot(xs, values, label=method, markersize=5, **_style(results, method))
    lengths = sorted({task.length for task in tasks})
    for kind, column in zip(kinds, axes.T):
        column[0].set_title(kind)
        column[0].set_ylabel("perplexity / original's")
        column[1].set_ylabel("KL(original || method), nats per token")
        column[1].set_xlabel("tokens")
        for axis in column:
            axis.set_xscale("log", base=2)
            axis.set_xticks(lengths, [f"{n:,}" for n in lengths])
            axis.set_yscale("log")
            axis.yaxis.set_major_formatter("{x:g}")  # else 1.05 is written as a product with a power of ten
            axis.yaxis.set_minor_formatter("{x:g}")
            axis.grid(alpha=0.3, which="both")
    figure.legend(*axes[0, -1].get_legend_handles_labels(), fontsize=8, ncols=5, loc="outside lower center")
    figure.suptitle(title)
    figure.savefig(path, dpi=110)
    return True


def _recall(results: Results, path: Path) -> bool:
    """Plot the share of right answers, a group of bars per task."""
    tasks = results.of(protocol="context", kinds=RECALLS)
    methods = [m for m in results.methods if any((m, task.name) in results.cells for task in tasks)]
    if not methods:
        return False
    figure = Figure(figsize=(max(7.0, 2.6 * len(tasks)), 4.5), layout="constrained")
    axis = figure.subplots()
    width = 0.85 / len(methods)
    for i, method in enumerate(methods):
        found = [(x, results.cells.get((method, task.name))) for x, task in enumerate(tasks)]
        means = [(x, cell.mean("exact")) for x, cell in found if cell is not None]
        places = [x + (i - (len(methods) - 1) / 2) * width for x, _ in means]
        plain = method.endswith(ORIGINAL)
        color = "black" if method == ORIGINAL else "gray" if plain else _style(results, method)["color"]
        hatch = "//" if method.startswith("kvpress") and not plain else None
        heights, errors = ([100 * value for value in column] for column in zip(*(mean for _, mean in means)))
        axis.bar(places, heights, width, yerr=errors, color=color, hatch=hatch, label=method, capsize=2)
    axis.set_xticks(range(len(tasks)), [f"{task.kind}\n{task.length:,} tokens" for task in tasks])
    axis.set_ylabel("answers right in full, %")
    axis.set_title("Recall from a context that was compressed before the question")
    figure.legend(fontsize=8, ncols=(len(methods) + 1) // 2, loc="outside lower center")
    axis.grid(alpha=0.3, axis="y")
    figure.savefig(path, dpi=110)
    return True


def _heads(results: Results, config: ReleasedConfig, path: Path) -> bool:
    """Plot CR by layer and head of each adapter, on the longest whole text of the first kind."""
    shown = []
    for name in config.adapters:
        found = [cell for (method, _), cell in results.cells.items() if method == name]
        whole = [c for c in found if c.task.protocol == "whole" and c.task.kind == next(iter(config.text.files))]
        if whole:
            cell = max(whole, key=lambda cell: cell.task.length)
            label = f"{name}, {cell.task.length:,} tokens"
            shown.append(dict(name=label, target_cr=2.0, cr=cell.ratio, cr_by_head=cell.compression["by_head"]))
    if shown:
        plot_heads(shown, path)
    return bool(shown)
