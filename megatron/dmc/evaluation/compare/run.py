"""Run a comparison: train what is missing, measure every model, write one report.

Trainings, conversions and measurements are jobs. A job that is done is not run again as long as its settings stay the
same. The report is written to report/ under the output: report.md, report.json and the plots.
"""

from pathlib import Path

import yaml

from megatron.dmc.environment import machine
from megatron.dmc.evaluation.compare.config import CompareConfig
from megatron.dmc.evaluation.compare.jobs import ROOT, JobGraph
from megatron.dmc.evaluation.compare.methods import build_graph
from megatron.dmc.evaluation.compare.runner import JobRunner, print_jobs, run_jobs


def write_run_configs(config: CompareConfig) -> None:
    """Write the files that the trainings name with --config, and the resolved configuration beside them."""
    run = config.run.to_dict()
    sections = {name: run[name] for name in ("parallel", "optimizer", "data", "training")}
    output = Path(config.output)
    output.mkdir(parents=True, exist_ok=True)
    for name, content in (
        ("run.yaml", sections),
        ("original.yaml", {"model": run["model"], "dmc": run["dmc"], **sections}),
    ):
        (output / name).write_text(yaml.safe_dump(content, sort_keys=False))
    (output / "compare.yaml").write_text(yaml.safe_dump(config.to_dict(), sort_keys=False))


def report(config: CompareConfig, graph: JobGraph) -> Path:
    """Write the report of what has been measured; returns its directory.

    Raises:
        ValueError: no control has been measured yet.
    """
    import json

    from megatron.dmc.evaluation.compare import plots, summary

    output = Path(config.output)
    measured, directory = summary.read(graph, output), output / "report"
    if not any(m.row.method == "control" for m in measured):
        raise ValueError(f"no control has been measured yet under {output}; figures are reported relative to it")
    directory.mkdir(parents=True, exist_ok=True)
    m, seeds = config.run.model, len(config.seeds)
    parts = [
        "# DMC against the alternatives",
        f"{m.num_layers} layers of {m.hidden_size}, {m.num_attention_heads} query and {m.kv_heads} KV heads of "
        f"{m.head_dim}; means over {seeds} seed{'s' * (seeds > 1)} ± half of their range. "
        "Recall: share of the answers' tokens.",
        summary.table(config, measured, "main"),
    ]
    if len(measured) < len(graph.rows):
        parts.insert(2, f"**Unfinished:** {len(measured)} of {len(graph.rows)} rows have been measured.")
    pictures = [
        ("quality.png", "quality against compression"),
        ("cr_by_head.png", "CR by layer and head"),
        ("cr_by_position.png", "CR by position"),
        ("curves.png", "learning curves"),
    ]
    plots.quality(config, measured, directory / "quality.png")
    plots.by_head(measured, directory / "cr_by_head.png")
    plots.by_position(measured, directory / "cr_by_position.png")
    plots.curves(config, graph, measured, directory / "curves.png")
    if config.compound is not None:
        parts += ["## DMC on top of GQA", summary.table(config, measured, "compound")]
    if config.economy is not None:
        parts += ["## Training", summary.table(config, measured, "economy")]
        plots.economy(config, measured, directory / "economy.png")
        pictures.append(("economy.png", "quality by training"))
    parts += [f"![{title}]({name})" for name, title in pictures if (directory / name).is_file()]
    (directory / "report.md").write_text("\n\n".join(parts) + "\n")
    (directory / "report.json").write_text(json.dumps(summary.to_json(config, measured, machine()), indent=1) + "\n")
    return directory


def compare(config: CompareConfig, *, dry_run: bool = False, report_only: bool = False) -> int:
    """Run a comparison. Returns the exit status: 1 when a job fails, 130 when interrupted.

    Args:
        dry_run: print the jobs and whether they are done, and run none.
        report_only: write the report of what has been measured so far, and run no job.

    Raises:
        ValueError: a wrong configuration, or results of other settings in its output.
    """
    config.check()
    if not (ROOT / "tools/convert_checkpoint.py").is_file():
        raise ValueError(
            f"{ROOT} is not a checkout of the repository, whose tools the comparison runs; run it from one"
        )
    graph = build_graph(config)
    runner = JobRunner(graph, Path(config.output), config.jobs)
    if dry_run:
        print_jobs(runner)
        return 0
    if not report_only:
        runner.check()
        write_run_configs(config)
        if status := run_jobs(runner):
            return status
    print(f"written to {report(config, graph)}")
    return 0
