"""``dmc compare``: compressed KV caches against other ways to the same memory, on models that it trains or on a given
one.
"""

import argparse
from pathlib import Path
from typing import Any

from megatron.dmc import flags


def build_parser() -> flags.Parser:
    parser = flags.Parser(
        prog="dmc compare",
        description="Train what is missing, evaluate everything, and write one report: OUTPUT/report/report.md. "
        "A configuration that names a model trains nothing: it compares adapters of DMS with methods that need no "
        "training.\n\n"
        "Stopped at any time, the same command goes on.",
        examples="""
            dmc compare examples/dmc/evidence/small.yaml --jobs 2
            dmc compare examples/dmc/evidence/small.yaml --dry-run
            dmc compare examples/dmc/evidence/small.yaml --report
            dmc compare examples/dmc/evidence/smollm2.yaml
            """,
    )
    parser.set_defaults(run=_run)
    parser.add_argument(
        "config",
        metavar="CONFIG",
        help="YAML or JSON file; its keys are explained in megatron/dmc/evaluation/compare/config.py, and those of a "
        "file with the key model in megatron/dmc/evaluation/released/config.py.",
    )
    parser.add_argument("--output", metavar="DIR", help="Directory to write. Default: the configuration's output.")
    parser.add_argument(
        "--jobs", type=int, metavar="N", help="Number of processes at a time. Default: the configuration's jobs."
    )
    parser.add_argument(
        "--report", action="store_true", help="Write the report of what has been measured so far, and run no job."
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="Print the jobs and whether they are done, and run none."
    )
    return parser


main = flags.entry(build_parser, unwinds=True)


def _run(args: argparse.Namespace) -> int:
    from megatron.dmc.config import load_file

    config: Any
    settings = load_file(args.config)
    if not settings:
        raise ValueError(f"configuration file {args.config} is empty; examples/dmc/evidence has some to begin with")
    if "model" in settings:
        from megatron.dmc.evaluation.released import run as released
        from megatron.dmc.evaluation.released.config import ReleasedConfig

        config, compare = ReleasedConfig.load(args.config), released.compare
    else:
        from megatron.dmc.evaluation.compare import run as trained
        from megatron.dmc.evaluation.compare.config import CompareConfig

        config, compare = CompareConfig.load(args.config), trained.compare
    config.output = str(Path(args.output or config.output).absolute())
    if args.jobs is not None:
        config.jobs = args.jobs
    return compare(config, dry_run=args.dry_run, report_only=args.report)
