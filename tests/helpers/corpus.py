"""A small corpus, and ``dmc data preprocess`` run on it in this process."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron.dmc import cli

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "examples" / "dmc"))  # build_corpus

SUFFIXES = (".bin", ".idx", ".json")
SEQ = 32
"""Length of the sequences that are cut from it."""


def write_jsonl(path: Path, texts: Sequence[str], key: str = "text") -> None:
    path.write_text("".join(json.dumps({key: text}) + "\n" for text in texts))


def preprocess(directory: Path, source: str | Sequence[str], prefix: str, *options: str) -> int:
    """Make the dataset ``directory/prefix`` from files of ``directory``. Returns the exit status."""
    sources = [source] if isinstance(source, str) else source
    inputs = ["--input", *(str(directory / name) for name in sources)]
    tokenizer = ["--tokenizer", str(directory / "tokenizer.model")]
    output = ["--output-prefix", str(directory / prefix), "--workers", "1"]
    return cli.main(["data", "preprocess", *inputs, *tokenizer, *output, *options])


def bytes_of(prefix: Path | str) -> list[bytes]:
    """Content of a dataset's three files."""
    return [Path(f"{prefix}{suffix}").read_bytes() for suffix in SUFFIXES]
