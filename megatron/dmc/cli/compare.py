"""``dmc compare``: DMC against other ways to shrink the KV cache, on models that it trains."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Optional

from megatron.dmc import flags


def build_parser() -> flags.Parser:
    parser = flags.Parser(
        prog="dmc compare",
        description="Train what is missing, evaluate everything, and write one report: OUTPUT/report/report.md.\n\n"
        "Stopped at any time, the same command goes on.",
        examples="""
            dmc compare examples/dmc/evidence/small.yaml --jobs 2
            dmc compare examples/dmc/evidence/small.yaml --dry-run
            dmc compare examples/dmc/evidence/small.yaml --report
            """,
    )
    parser.set_defaults(run=_run)
    parser.add_argument(
        "config", metavar="CONFIG", help="YAML or JSON file, see megatron/dmc/evaluation/compare/config.py."
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


def main(argv: Optional[Sequence[str]] = None) -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # unwind, so that the jobs end
    return flags.run(build_parser(), argv)


def _run(args: argparse.Namespace) -> int:
    from megatron.dmc.evaluation.compare import run
    from megatron.dmc.evaluation.compare.config import CompareConfig

    config = CompareConfig.load(args.config)
    config.output = str(Path(args.output or config.output).absolute())
    if args.jobs is not None:
        config.jobs = args.jobs
    return run.compare(config, dry_run=args.dry_run, report_only=args.report)
