"""Train what is missing, evaluate everything, write one report.

    python -m megatron.dmc.evaluation.compare examples/dmc/evidence/small.yaml

Stopped at any time, the same command goes on. Trainings, conversions and measurements are jobs; what is done stays done
as long as its settings do. The report is output/report: report.md, report.json and the plots.
"""

from __future__ import annotations

import argparse
import signal
import sys
import warnings
from pathlib import Path
from typing import Optional

import yaml

from megatron.dmc.environment import machine
from megatron.dmc.evaluation.compare.config import CompareConfig
from megatron.dmc.evaluation.compare.plan import ROOT, Plan, Planner
from megatron.dmc.evaluation.compare.pool import Pool


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="megatron.dmc.evaluation.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", metavar="CONFIG", help="YAML or JSON, see megatron/dmc/evaluation/compare/config.py")
    parser.add_argument("--output", metavar="DIR", help="instead of the configuration's")
    parser.add_argument("--jobs", type=int, metavar="N", help="processes at once, instead of the configuration's")
    parser.add_argument(
        "--report", action="store_true", help="write the report of what has been measured so far, and end"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the jobs and whether they are done")
    return parser


def write_run_configs(config: CompareConfig) -> None:
    """What the trainings name with --config; kept as it is where it says the same, so that nothing looks changed."""
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


def report(config: CompareConfig, plan: Plan) -> Path:
    """Write the report from the measurements. Returns its directory."""
    import json

    from megatron.dmc.evaluation.compare import plots, summary

    output = Path(config.output)
    measured, directory = summary.read(plan, output), output / "report"
    if not any(m.row.method == "control" for m in measured):
        raise ValueError(f"no control has been measured yet under {output}; what is reported is given over it")
    directory.mkdir(parents=True, exist_ok=True)
    m, seeds = config.run.model, len(config.seeds)
    parts = [
        "# DMC against the alternatives",
        f"{m.num_layers} layers of {m.hidden_size}, {m.num_attention_heads} query and {m.kv_heads} KV heads of "
        f"{m.head_dim}; "
        f"means over {seeds} seed{'s' * (seeds > 1)} ± half of their range. Recall: share of the answers' tokens.",
        summary.table(config, measured, "main"),
    ]
    if len(measured) < len(plan.rows):
        parts.insert(2, f"**Unfinished:** {len(measured)} of {len(plan.rows)} rows have been measured.")
    pictures = [
        ("quality.png", "quality against compression"),
        ("cr_by_head.png", "CR by layer and head"),
        ("cr_by_position.png", "CR by position"),
        ("curves.png", "learning curves"),
    ]
    plots.quality(config, measured, directory / "quality.png")
    plots.by_head(measured, directory / "cr_by_head.png")
    plots.by_position(measured, directory / "cr_by_position.png")
    plots.curves(config, plan, measured, directory / "curves.png")
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


def main(argv: Optional[list[str]] = None) -> int:
    """Exit status 2 on wrong input, 1 when a job fails."""
    args = build_parser().parse_args(argv)
    warnings.filterwarnings("ignore")  # megatron-core's, of packages that are not needed here
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # unwind, so that the jobs end
    try:
        config = CompareConfig.load(args.config)
        config.output = str(Path(args.output or config.output).absolute())
        if args.jobs is not None:
            config.jobs = args.jobs
        config.check()
        if not (ROOT / "tools/convert_checkpoint.py").is_file():
            raise ValueError(
                f"{ROOT} is not a checkout of the repository, whose tools the comparison runs; run it from one"
            )
        plan = Planner(config).build()
        pool = Pool(plan, Path(config.output), config.jobs)
        if args.dry_run:
            for name, job in plan.jobs.items():
                print(
                    f"{'done' if pool.is_done(name) else '    '} {name}" + (f", {job.iters} steps" if job.iters else "")
                )
            return 0
        if args.report:
            print(f"written to {report(config, plan)}")
            return 0
        pool.check()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    write_run_configs(config)
    try:
        pool.run()
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        return 130
    print(f"written to {report(config, plan)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
