"""The benchmarks of the engine, the server and a training step run, at sizes that say nothing of speed."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from helpers.forked import run
from helpers.processes import ROOT

MODEL = "--layers 1 --hidden 64 --heads 2 --head-dim 16"
COMMANDS = {
    "engine": f"{MODEL} --cache-tokens 512 --contexts 64 --prompt 8 --new-tokens 4 --seconds 0.2 --method dms "
    "--window 16 --compression-ratios 4 8",
    "prefix_caching": f"{MODEL} --prefix 64 --question 40 --requests 2 --new-tokens 2 --step-tokens 64 --seconds 0.2",
    "serving": f"{MODEL} --mode latency --clients 2 --per-client 1 --prompt 8 --new-tokens 4 --starts 1",
    "frozen_base": "--layers 1 --hidden 64 --groups 1 --vocabulary 512 --seq-length 64 --batch 1 --seconds 0.2",
    "peers": "--layers 1 --peers transformers --prefill 2x16 --decode 1x8 --new-tokens 4 --rounds 1",
    "train_step": "--layers 1 --hidden 64 --seq-length 64 --batch 1 --seconds 0.2",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_a_benchmark_runs(name: str, tmp_path: Path) -> None:
    out = tmp_path / "figures.json"
    script = ROOT / "benchmarks" / f"{name}.py"
    run([sys.executable, script, *COMMANDS[name].split(), "--threads", "1", "--json", out], tmp_path / "log")
    record = json.loads(out.read_text())
    assert record["benchmark"] == name and record["figures"] and record["machine"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("--model {tmp}/none --adapter {tmp} --data t.txt", "none is not a directory; name a Hugging Face model"),
        ("--model {tmp} --adapter {tmp} --data t.txt", "config.json cannot be read: No such file"),
        ("--model {tmp} --adapter {tmp} --data t.txt --contexts 0", "--contexts: 0 is not a number of at least 2"),
        ("--model {tmp} --adapter {tmp} --data t.txt --json {tmp}", "cannot be written: Is a directory"),
    ],
)
def test_what_a_benchmark_is_given_wrong_is_named(options: str, says: str, tmp_path: Path) -> None:
    """Before anything is measured: no traceback, and status 2."""
    command = [sys.executable, ROOT / "benchmarks" / "adapter.py", *options.format(tmp=tmp_path).split()]
    said = run(command, tmp_path / "log", status=2)
    assert says in said and "Traceback" not in said
