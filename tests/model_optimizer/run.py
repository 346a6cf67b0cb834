#!/usr/bin/env python3
"""DMS models of NVIDIA's Model-Optimizer: its code and the engine of this package on the same files.

    tests/model_optimizer/run.py [--source DIR] [--environment DIR]

Takes ``experimental/dms`` of github.com/NVIDIA/Model-Optimizer at the commit below (--source: a clone that is there),
makes an environment with the transformers that it wants (--environment keeps it for the next run), and has theirs.py
beside this file save tiny random models with query channels and adapters that decide, and generate from them in fp32.
The engine reads the same directories: prompts whole and in chunks smaller than the window, greedy. Exit status 1 when a
token differs, or a log-probability by more than 1e-5, or when decisions about the other token gave the same.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from megatron.dmc.inference import LLM, SamplingParams  # noqa: E402

REPOSITORY, COMMIT = "https://github.com/NVIDIA/Model-Optimizer", "a2fbac7ba"
TORCH, TRANSFORMERS = "2.13.0", "4.57.3"
TOLERANCE = 1e-5


def make_environment(folder: Path) -> Path:
    """Interpreter of an environment with Model-Optimizer's transformers."""
    python = folder / "bin" / "python"
    if not (folder / "complete").exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        pip = [str(python), "-m", "pip", "-q", "--disable-pip-version-check", "install"]
        subprocess.run([*pip, f"torch=={TORCH}", f"transformers=={TRANSFORMERS}"], check=True)
        (folder / "complete").touch()
    return python


def get_source(source: Path | None, folder: Path) -> Path:
    """``experimental/dms`` at the commit, taken out of a clone."""
    if source is None:
        source = folder / "clone"
        blobless = ["--filter=blob:none", "--no-checkout"]
        subprocess.run(["git", "clone", "-q", *blobless, REPOSITORY, str(source)], check=True)
    archive = subprocess.run(
        ["git", "-C", str(source), "archive", COMMIT, "experimental/dms"], check=True, capture_output=True
    )
    subprocess.run(["tar", "x", "-C", str(folder)], input=archive.stdout, check=True)
    return folder / "experimental" / "dms"


def compare(directory: Path, chunk: int, **settings: str) -> tuple[int, float]:
    """Tokens that the engine gives as expected before the first other one, and the largest difference over them."""
    said = json.loads((directory / "expected.json").read_text())
    llm = LLM(directory, dtype="float32", device="cpu", max_num_batched_tokens=chunk, max_num_seqs=1, **settings)
    params = SamplingParams(max_tokens=len(said["tokens"]), temperature=0.0, logprobs=0, ignore_eos=True)
    output = llm.generate([said["prompt"]], params)[0].outputs[0]
    same, largest = 0, 0.0
    for got, logprobs, token, logprob in zip(output.token_ids, output.logprobs, said["tokens"], said["logprobs"]):
        if got != token:
            break
        same, largest = same + 1, max(largest, abs(logprobs.logprob - logprob))
    return same, largest


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, help="clone of Model-Optimizer that has the commit")
    parser.add_argument("--environment", type=Path, help="directory of the environment, kept for the next run")
    args = parser.parse_args()
    failed = False
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        code = get_source(args.source, folder)
        python = make_environment(args.environment or folder / "environment")
        theirs = Path(__file__).with_name("theirs.py")
        subprocess.run([str(python), str(theirs), str(code), str(folder / "models")], check=True)
        for directory in sorted((folder / "models").iterdir()):
            expected = len(json.loads((directory / "expected.json").read_text())["tokens"])
            for chunk in (512, 5):
                same, largest = compare(directory, chunk)
                failed |= same < expected or largest > TOLERANCE
                print(f"{directory.name}, chunks of {chunk}: {same} of {expected} tokens, within {largest:.1e}")
            same, largest = compare(directory, 512, decision_about="self")
            failed |= same == expected and largest <= TOLERANCE
            print(f"{directory.name}, about the token itself: {same} of {expected} tokens (must differ)")
    print("failed" if failed else "the same")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
