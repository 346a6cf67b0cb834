#!/usr/bin/env python3
"""An exported model under every version of transformers: makes a directory once and an environment for each version.

    tests/versions/run.py [VERSION ...] [--environments DIR] [--write]

The model is tiny and random, its tokenizer a sentencepiece model; expected tokens come from the step-by-step oracle.
Every environment has the pinned torch and one transformers, and runs check.py beside this file. --environments keeps
the environments for the next run (a torch once, 200 MB for each version). --write puts the table into
docs/transformers.md. Exit status 1 when a version that setup.py allows fails a check.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from helpers.exported import CASES, DMS_CASES, VOCABULARY, Exported, tokens  # noqa: E402

from megatron.dmc.checkpoint.model_card import _sentencepiece_files  # noqa: E402

VERSIONS = ("4.50.3", "4.57.6", "5.0.0", "5.10.4", "5.23.0", "5.24.0")
PAGE = ROOT / "docs" / "transformers.md"
MARKS = ("<!-- versions: written by tests/versions/run.py -->", "<!-- end of versions -->")
TEXTS = ("the cache of a model", "two  spaces", "x", "the the")


def make_directory(folder: Path) -> Path:
    """An exported directory with ``expected.json`` in it."""
    import sentencepiece

    exported = Exported(folder / "model", **CASES["half"])
    corpus = folder / "corpus.txt"
    corpus.write_text("\n".join([*TEXTS, "a model compresses the cache of its keys", "x y z 0 1 2 3"] * 20))
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=VOCABULARY,
        model_type="bpe",
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    for name, content in _sentencepiece_files(folder / "tokenizer.model", say=lambda text: None).items():
        (exported.directory / name).write_bytes(content)
    # The model alone, and its class, beside a config.json of a type that transformers does not know.
    alone = exported.directory / "sentencepiece"
    alone.mkdir()
    for path in [exported.directory / "config.json", *exported.directory.glob("*.py")]:
        shutil.copy(path, alone)
    shutil.copy(folder / "tokenizer.model", alone)
    config = {"tokenizer_class": "LlamaTokenizer", "legacy": False, "bos_token": "<s>", "eos_token": "</s>"}
    (alone / "tokenizer_config.json").write_text(json.dumps({**config, "unk_token": "<unk>"}))
    # Ids of the random model mean nothing: no token of it ends a completion.
    (exported.directory / "generation_config.json").write_text("{}")
    model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    assert model.vocab_size() <= VOCABULARY
    prompts = [tokens(n, seed) for seed, n in enumerate((11, 3, 24))]
    evicting = Exported(exported.directory / "dms", **DMS_CASES["adapter"])
    (evicting.directory / "generation_config.json").write_text("{}")
    expected = {
        "prompts": prompts,
        "completions": [exported.oracle().generate(prompt, 25) for prompt in prompts],
        "dms": [evicting.oracle().generate(prompt, 25) for prompt in prompts],
        "texts": {text: model.encode(text) for text in TEXTS},
        "prompt_text": TEXTS[0],
    }
    (exported.directory / "expected.json").write_text(json.dumps(expected))
    return exported.directory


def make_environment(folder: Path, version: str) -> Path:
    """Interpreter of an environment with torch, shared by all, and one transformers."""
    base = folder / "torch"
    install(base, ["torch", "numpy", "safetensors", "sentencepiece"], constraints=True)
    python = install(folder / version, [f"transformers=={version}", "jinja2", "protobuf"])
    site = next((folder / version).glob("lib/python*/site-packages"))
    (site / "torch.pth").write_text(str(next(base.glob("lib/python*/site-packages"))) + "\n")
    return python


def install(environment: Path, packages: list[str], constraints: bool = False) -> Path:
    python = environment / "bin" / "python"
    if not (environment / "complete").exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(environment)], check=True)
        pinned = ["-c", str(ROOT / "constraints.txt")] if constraints else []
        command = [str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check", *pinned, *packages]
        subprocess.run(command, check=True)
        (environment / "complete").touch()
    return python


def run_checks(python: Path, directory: Path) -> dict[str, str]:
    command = [str(python), str(Path(__file__).with_name("check.py")), str(directory)]
    home = str(python.parent.parent / "huggingface")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": "", "HF_HUB_OFFLINE": "1", "HF_HOME": home}
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=900, env=environment, stdin=subprocess.DEVNULL
    )
    if result.returncode:
        return {"loading": result.stderr.strip().splitlines()[-1]}
    return json.loads(result.stdout.strip().splitlines()[-1])


def allowed(version: str) -> bool:
    """True when setup.py allows this version of transformers."""
    ranges = re.findall(r'"(transformers[^"]*)"', (ROOT / "setup.py").read_text())
    return all(version in Requirement(text).specifier for text in ranges)


def table(outcomes: dict[str, dict[str, str]]) -> str:
    columns = list(dict.fromkeys(name for outcome in outcomes.values() for name in outcome))
    columns = [name for name in columns if name not in ("transformers", "torch")]
    lines = [f"| transformers | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for version, outcome in outcomes.items():
        name = version if allowed(version) else f"{version} (not allowed)"
        lines.append(f"| {name} | {' | '.join(outcome.get(column, '').split(' (')[0] for column in columns)} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("versions", nargs="*", default=VERSIONS)
    parser.add_argument("--environments", type=Path, help="where environments are kept (default: a temporary folder)")
    parser.add_argument("--write", action="store_true", help="put the table into docs/transformers.md")
    args = parser.parse_args()
    failed, outcomes = False, {}
    with tempfile.TemporaryDirectory() as temporary:
        directory = make_directory(Path(temporary))
        environments = (args.environments or Path(temporary) / "environments").absolute()
        for version in args.versions:
            outcomes[version] = outcome = run_checks(make_environment(environments, version), directory)
            wrong = {name: text for name, text in outcome.items() if text.startswith("NO") or name == "loading"}
            failed |= bool(wrong) and allowed(version)
            print(version, wrong or "all as expected", flush=True)
    text = table(outcomes)
    print(text)
    if args.write:
        before, _, rest = PAGE.read_text().partition(MARKS[0])
        _, _, after = rest.partition(MARKS[1])
        PAGE.write_text(f"{before}{MARKS[0]}\n{text}\n{MARKS[1]}{after}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
