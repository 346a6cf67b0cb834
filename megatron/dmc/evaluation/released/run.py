"""Run a comparison on a released model: measure what is missing, and write one report.

The report is written to report/ under the output: report.md, report.json and the plots.
"""

import json
from pathlib import Path

from megatron.dmc.environment import machine
from megatron.dmc.evaluation.compare.jobs import ROOT
from megatron.dmc.evaluation.compare.runner import JobRunner, print_jobs, run_jobs
from megatron.dmc.evaluation.released.config import ReleasedConfig
from megatron.dmc.evaluation.released.graph import KVPRESS, SETTINGS, absolute, build_graph, methods

DECISIVE = ("model", "adapters", "follow", "ratio", "seed", "text", "recall", "humaneval")
"""Settings that figures depend on."""


def report(config: ReleasedConfig) -> Path:
    """Write the report of what has been measured; returns its directory.

    Raises:
        ValueError: the original has not been measured yet.
    """
    from megatron.dmc.evaluation.released import plots, summary

    output = Path(config.output)
    results = summary.read(output, methods(config))
    directory = output / "report"
    directory.mkdir(parents=True, exist_ok=True)
    pictures = plots.all_of(results, config, directory)
    text = summary.page(results, config) + "".join(f"\n![{title}]({name})\n" for title, name in pictures)
    (directory / "report.md").write_text(text)
    content = summary.to_json(results, config, machine())
    (directory / "report.json").write_text(json.dumps(content, indent=1) + "\n")
    return directory


def compare(config: ReleasedConfig, *, dry_run: bool = False, report_only: bool = False) -> int:
    """Run a comparison. Returns the exit status: 1 when a job fails, 130 when interrupted.

    Args:
        dry_run: print the jobs and whether they are done, and run none.
        report_only: write the report of what has been measured so far, and run no job.

    Raises:
        ValueError: a wrong configuration, or a directory that is missing.
    """
    config.check()
    absolute(config)
    if config.presses and not (ROOT / KVPRESS).is_file():
        raise ValueError(f"{ROOT} is not a checkout of the repository, which has {KVPRESS}; run it from one")
    made = [] if config.prepare else [config.model]
    for path in [*made, *config.adapters.values()]:
        if not Path(path).is_dir():
            raise ValueError(f"{path} is not a directory; name a model and adapters that are there")
    for path in [] if config.prepare else config.text.files.values():
        if not Path(path).is_file():
            raise ValueError(f"{path} is not a file; name JSONL files with text in text.files")
    runner = JobRunner(build_graph(config), Path(config.output), config.jobs)
    if dry_run:
        print_jobs(runner)
        return 0
    settings = Path(config.output) / SETTINGS
    if report_only and settings.is_file():
        measured, asked = json.loads(settings.read_text()), config.to_dict()
        if odd := [name for name in asked if name in DECISIVE and measured.get(name) != asked[name]]:
            raise ValueError(f"{config.output} was measured with another {', '.join(odd)}; run it without --report")
    if not report_only:
        Path(config.output).mkdir(parents=True, exist_ok=True)
        settings.write_text(json.dumps(config.to_dict(), indent=1) + "\n")
        if status := run_jobs(runner):
            return status
    print(f"written to {report(config)}")
    return 0
