#!/usr/bin/env python3
"""Two checkouts side by side: do they compute the same, bit for bit? Not among the other tests; some minutes.

    tests/same_results/run.py BEFORE AFTER [--keep DIRECTORY] [CASE ...]

Each side runs the same commands (cases.py) on the same inputs with its own code, in the interpreter that runs this
script. One line per case: equal, or the first difference. Exit status 1 when there is one.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent

import compare  # noqa: E402
from cases import CASES  # noqa: E402


def start(script: str, checkout: Path, *args: object, directory: Path) -> subprocess.Popen:
    """A script of this folder in ``directory``, with ``checkout`` as its ``megatron.dmc``."""
    directory.mkdir(parents=True)
    environment = dict(
        os.environ,
        PYTHONPATH=os.pathsep.join(map(str, (checkout, ROOT / "tests"))),
        PYTHONWARNINGS="ignore",
        OMP_NUM_THREADS="1",
        HF_MODULES_CACHE=str(directory / "modules"),
        CUDA_VISIBLE_DEVICES="",
        TOKENIZERS_PARALLELISM="false",
    )
    command = [sys.executable, str(HERE / script), *map(str, args)]
    return subprocess.Popen(command, cwd=directory, env=environment)


def failed(directory: Path) -> str | None:
    """Why a side's case did not end well, or None."""
    status = directory / "status.json"
    statuses = json.loads(status.read_text()) if status.is_file() else [["it did not run"]]
    if not any(map(any, statuses)):
        return None
    log = sorted(directory.glob("command*.log"))[-1:]
    tail = log[0].read_text(errors="replace").splitlines()[-1:] if log else []
    return f"exit status {statuses[-1]}: {' '.join(tail)}"


def judge(before: Path, after: Path) -> str:
    """``equal``, or what is wrong with the case."""
    wrong = {name: failed(side) for name, side in (("before", before), ("after", after))}
    if any(wrong.values()):
        return "; ".join(f"{name}: {why}" for name, why in wrong.items() if why)
    return next(compare.differences(before, after), "equal")


def run(before: Path, after: Path, work: Path, wanted: list[str]) -> int:
    """The exit status."""
    began = time.monotonic()
    if start("inputs.py", ROOT, work / "inputs", directory=work / "making-inputs").wait():
        raise SystemExit("the inputs could not be made")
    sides = {
        name: start("worker.py", checkout, checkout, work / "inputs", *wanted, directory=work / name)
        for name, checkout in (("before", before), ("after", after))
    }
    try:
        for name, process in sides.items():
            if process.wait():
                print(f"the worker of {name} ended with status {process.returncode}", file=sys.stderr)
    finally:
        for process in sides.values():
            process.kill()
    names = [case.name for case in CASES if not wanted or case.name in wanted]
    found = {name: judge(work / "before" / name, work / "after" / name) for name in names}
    print(f"\n| case | {before} against {after} |\n|---|---|")
    for name, result in found.items():
        print(f"| {name} | {result} |")
    odd = sum(result != "equal" for result in found.values())
    print(f"\n{len(found) - odd} of {len(found)} cases are equal, {time.monotonic() - began:.0f} s")
    return int(odd > 0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, metavar="BEFORE", help="checkout of the repository")
    parser.add_argument("after", type=Path, metavar="AFTER", help="checkout of the repository")
    parser.add_argument("--keep", type=Path, metavar="DIRECTORY", help="keep all files there; it must not exist")
    parser.add_argument("cases", nargs="*", metavar="CASE", help="default: all; earlier cases that it reads included")
    args = parser.parse_intermixed_args()
    unknown = set(args.cases) - {case.name for case in CASES}
    if unknown:
        parser.error(f"no case {', '.join(sorted(unknown))}; there are {', '.join(case.name for case in CASES)}")
    with tempfile.TemporaryDirectory() as temporary:
        work = (args.keep or Path(temporary) / "work").absolute()
        work.mkdir(parents=True)
        return run(args.before.resolve(), args.after.resolve(), work, args.cases)


if __name__ == "__main__":
    sys.exit(main())
