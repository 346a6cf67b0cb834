#!/usr/bin/env python3
"""The tests of training under another megatron-core: installs a checkout of Megatron-LM beside the pinned packages.

    tests/versions/mcore.py CHECKOUT [CHECKOUT ...] [--tests PATH ...]

CHECKOUT is a source tree of Megatron-LM at a tag (``git archive core_v0.19.0 | tar x -C FOLDER``): PyPI has no release
after 0.16.1. Each one is built, without its dependencies, into a temporary environment over the present one, and runs
the layer, layout and checkpoint tests there. Building compiles its C++ helper for data sets. Tags from 0.17 on ask for
Python 3.12; what the tests use runs on 3.11 too, so that is not checked.
Exit status 1 when a test fails under one of them.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
TESTS = (
    "tests/model/test_supported.py",
    "tests/model/test_model.py",
    "tests/model/test_layouts.py",
    "tests/training/test_resume.py",
    "tests/training/test_data.py",
)
"""Those that call megatron-core most: layers, every layout, checkpoints in the background, data sets."""


def make_environment(checkout: Path, folder: Path) -> Path:
    """Python of a new environment that has ``checkout``'s megatron-core before the present packages."""
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    python = folder / "bin" / "python"
    site = next(folder.glob("lib/python3*/site-packages"))
    (site / "below.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")) + "\n")
    install = [python, "-m", "pip", "install", "--quiet"]
    subprocess.run([*install, "--no-deps", "--ignore-requires-python", "--ignore-installed", checkout], check=True)
    if importlib.util.find_spec("triton") is None:
        # 0.20 imports it whatever runs; CUDA builds of torch bring it, the CPU build does not.
        subprocess.run([*install, "triton"], check=True)
    return python


def run_tests(python: Path, tests: list[str], arguments: list[str]) -> tuple[str, str, int]:
    """(version of megatron-core, pytest's last line, exit status)"""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    say = "import megatron.core as m; print(m.__version__, m.__file__)"
    version, where = subprocess.check_output(
        [python, "-W", "ignore", "-c", say], text=True, env=environment, cwd=ROOT
    ).split()
    expected = sysconfig.get_path("purelib", vars={"base": str(python.parent.parent)})
    assert where.startswith(expected), f"megatron-core is imported from {where}, not from {expected}"
    command = [python, "-W", "ignore", "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments, *tests]
    process = subprocess.run(command, text=True, stdout=subprocess.PIPE, cwd=ROOT, env=environment)
    lines = process.stdout.strip().splitlines()
    print("\n".join(line for line in lines if re.match(r"FAILED|ERROR|E  ", line)), flush=True)
    return version, lines[-1] if lines else "", process.returncode


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkouts", nargs="+", type=Path, metavar="CHECKOUT", help="source tree of Megatron-LM")
    parser.add_argument("--tests", nargs="+", default=list(TESTS), metavar="PATH", help="tests to run")
    parser.add_argument("-k", default=None, metavar="EXPRESSION", help="as pytest's -k")
    args = parser.parse_args()
    failed = False
    for checkout in args.checkouts:
        with tempfile.TemporaryDirectory() as folder:
            python = make_environment(checkout, Path(folder) / "environment")
            version, last, status = run_tests(python, args.tests, ["-k", args.k] if args.k else [])
        print(f"megatron-core {version}: {last}", flush=True)
        failed |= status != 0
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
