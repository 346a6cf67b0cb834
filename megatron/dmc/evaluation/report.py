"""Report on trained checkpoints: a table of perplexity and compression, and two plots. ``dmc eval report`` runs it."""

import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Optional

from megatron.dmc.config.checks import writable
from megatron.dmc.flags import number


@dataclass(frozen=True)
class ReportConfig:
    """Settings of a report on checkpoints."""

    tokenizer: str = field(metadata={"metavar": "PATH"})
    """Sentencepiece model or Hugging Face directory that made the data."""
    data: str = field(metadata={"metavar": "PREFIX"})
    """Prefix of the validation dataset."""
    output: str = field(metadata={"metavar": "DIR"})
    """Directory for report.md, report.json and the plots."""
    row: list[str] = field(metadata={"action": "append", "metavar": "NAME=CHECKPOINT[:BASELINE]"})
    """Checkpoint to measure, with its name in the table; may be given several times. The ratio of perplexities is
    against the row that BASELINE names."""
    curves: list[str] = field(default_factory=list, metadata={"metavar": "DIR"})
    """TensorBoard directories of the stages, in their order, to plot compression and losses over training."""
    sequences: int = field(default=200, metadata={"type": number(int, 1), "metavar": "N"})
    """Number of validation sequences to measure on."""


def _parse_rows(rows: list[str]) -> list[tuple[str, str, Optional[str]]]:
    parsed: list[tuple[str, str, Optional[str]]] = []
    for row in rows:
        name, separator, rest = row.partition("=")
        path, _, baseline = rest.partition(":")
        if not separator or not path:
            raise ValueError(f"row {row!r} is not NAME=CHECKPOINT or NAME=CHECKPOINT:BASELINE")
        if baseline and baseline not in [n for n, _, _ in parsed]:
            raise ValueError(f"row {row!r} compares with {baseline!r}, which no row before it is named")
        parsed.append((name, path, baseline or None))
    return parsed


def evaluate_rows(config: ReportConfig) -> list[dict]:
    """Measure every row. Returns one dict per row, JSON-ready."""
    from megatron.dmc.evaluation.load import load_checkpoint
    from megatron.dmc.evaluation.quality import measure
    from megatron.dmc.planning.estimates import kv_bytes_per_token
    from megatron.dmc.training.tokenizer import load_tokenizer

    tokenizer, results = load_tokenizer(config.tokenizer), []
    for name, path, baseline in _parse_rows(config.row):
        loaded = load_checkpoint(path)
        quality = measure(loaded, tokenizer, config.data, config.sequences)
        manifest = loaded.manifest
        reference = next((r["perplexity"] for r in results if r["name"] == baseline), None)
        results.append(
            {
                "name": name,
                "checkpoint": str(loaded.path),
                "stage": manifest.stage,
                "baseline": baseline,
                "target_cr": manifest.target_cr,
                "cr": quality.cr,
                "perplexity": quality.perplexity,
                "perplexity_ratio": quality.perplexity / reference if reference else None,
                "lm_loss": quality.lm_loss,
                "validation_tokens": quality.tokens,
                "kv_bytes_per_token": kv_bytes_per_token(loaded.config.model, quality.cr),
                "cr_by_head": quality.cr_by_head.tolist(),
                "warnings": quality.warnings,
            }
        )
        print(f"  measured {name}", file=sys.stderr, flush=True)
    return results


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Markdown table."""
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


def table(results: list[dict]) -> str:
    """Rows as a Markdown table, and warnings below it."""
    head, rows = ["model", "perplexity", "vs", "ratio", "CR measured (target)", "KV bytes/token (bf16)"], []
    for r in results:
        cr = f"{r['cr']:.2f} ({r['target_cr']:.2f})" if r["target_cr"] > 1 else "1"
        ratio = f"{r['perplexity_ratio']:.3f}" if r["perplexity_ratio"] else ""
        row = [r["name"], f"{r['perplexity']:.2f}", r["baseline"] or "", ratio, cr, f"{r['kv_bytes_per_token']:.0f}"]
        rows.append(row)
    warnings = dict.fromkeys(warning for r in results for warning in r["warnings"])
    return "\n".join([markdown(head, rows), *(f"\nWARNING: {warning}" for warning in warnings)])


def read_curves(directories: list[str]) -> dict[str, list[tuple[int, float]]]:
    """Read the TensorBoard scalars of consecutive stages, on one axis of iterations."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    curves: dict[str, list[tuple[int, float]]] = {}
    offset = 0
    for directory in directories:
        accumulator = EventAccumulator(directory, size_guidance={"scalars": 0})
        accumulator.Reload()
        last = 0
        for tag in accumulator.Tags()["scalars"]:
            for event in accumulator.Scalars(tag):
                curves.setdefault(tag, []).append((offset + event.step, event.value))
                last = max(last, event.step)
        offset += last
        curves.setdefault("stage end", []).append((offset, 0.0))
    return curves


def plot_heads(results: list[dict], path: Path) -> None:
    """Plot a heat map of CR by layer (across) and KV head (down) for each compressed row, one below the other.

    Args:
        results: dicts with name, cr, target_cr and cr_by_head [layers][KV heads].
    """
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    shown = [r for r in results if r["target_cr"] > 1]
    if not shown:
        return
    layers, heads = (max(f(r["cr_by_head"]) for r in shown) for f in (len, lambda rows: len(rows[0])))
    size = max(4.5, min(14, 1.6 + 0.34 * layers)), len(shown) * max(2.2, min(8, 1.2 + 0.34 * heads))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(len(shown), 1, squeeze=False)
    for axis, r in zip(axes[:, 0], shown, strict=True):
        values = list(zip(*r["cr_by_head"]))  # [KV heads][layers]
        # Rates span orders of magnitude: some heads keep everything, others a handful of slots.
        top = max(2.0, *(max(row) for row in values))
        image = axis.imshow(values, cmap="viridis", norm=LogNorm(vmin=1.0, vmax=top), aspect="auto")
        for i, row in enumerate(values):
            for j, value in enumerate(row):
                if len(row) <= 36 and len(values) <= 16:
                    color = "black" if value > top**0.6 else "white"
                    axis.text(j, i, f"{value:.1f}", ha="center", va="center", color=color, fontsize=7)
        axis.set_title(f"{r['name']}: CR {r['cr']:.2f}")
        axis.set_xlabel("layer")
        axis.set_ylabel("KV head")
        axis.set_xticks(range(len(values[0])), [str(j + 1) for j in range(len(values[0]))], fontsize=7)
        axis.set_yticks(range(len(values)))
        figure.colorbar(image, ax=axis, label="tokens / slots")
    figure.savefig(path, dpi=130)


def plot_curves(curves: dict[str, list[tuple[int, float]]], path: Path) -> None:
    """Plot the compression ratio beside its target, and the losses, over all stages."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True)
    for tag, label, style in (("CR", "CR (hard decisions, training batches)", "-"), ("target-CR", "target", "--")):
        if tag in curves:
            top.plot(*zip(*curves[tag], strict=True), style, label=label)
    top.set_ylabel("tokens / slots")
    for tag, label, style in (("lm-loss", "training", "-"), ("validation-lm-loss", "validation", "o--")):
        if tag in curves:
            bottom.plot(*zip(*curves[tag], strict=True), style, label=label)
    bottom.set_ylabel("LM loss")
    bottom.set_xlabel("iteration, all stages")
    for axis in (top, bottom):
        for x, _ in curves.get("stage end", [])[:-1]:
            axis.axvline(x, color="gray", linewidth=0.6, linestyle=":")
        axis.legend()
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=130)


def report(config: ReportConfig) -> int:
    """Measure, write and print a report. Returns the exit status."""
    from megatron.dmc.training import initialize

    writable("output", config.output)
    try:
        results = evaluate_rows(config)
    finally:
        initialize.shutdown()
    output = Path(config.output)
    output.mkdir(parents=True, exist_ok=True)
    text = table(results)
    (output / "report.md").write_text(text + "\n")
    (output / "report.json").write_text(json.dumps(results, indent=2) + "\n")
    plot_heads(results, output / "cr_by_head.png")
    if config.curves:
        plot_curves(read_curves(config.curves), output / "curves.png")
    print(text)
    print(f"\nwritten to {output}: " + ", ".join(sorted(p.name for p in output.iterdir())))
    return 0


if __name__ == "__main__":
    from megatron.dmc.cli.eval import main

    sys.exit(main(["report", *sys.argv[1:]]))
