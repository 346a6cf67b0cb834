#!/usr/bin/env python3
"""Build a small corpus of real text from the Python standard library's sources, which are on every machine.

    python examples/dmc/build_corpus.py --output DIR --vocab-size 2048

Writes ``DIR/train.jsonl`` and ``DIR/valid.jsonl`` (one file per line: ``{"text": ...}``) and ``DIR/tokenizer.model``, a
sentencepiece model trained on the training files that gives every text back exactly, indentation included. About 10 MB
in a few seconds. The same Python gives the same bytes; another Python 3.11 to 3.13 gives the same kind of text.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import sys
import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path

# Tests are not shipped by every distribution; installed packages are not the standard library; encodings/ is generated
# tables of characters; lib2to3 is gone in 3.13.
SKIPPED_DIRECTORIES = {
    "test",
    "tests",
    "idle_test",
    "site-packages",
    "dist-packages",
    "encodings",
    "lib2to3",
    "__pycache__",
}
SKIPPED_FILES = ("_sysconfigdata", "sitecustomize", "python-config")  # how this machine's Python was built
VALID_FRACTION = 0.05  # of the files; 3 to 4% of the text
LONGEST_VALID = 200_000  # characters; pydoc's topics alone would be most of the validation set


def source_files(root: Path) -> Iterator[tuple[str, str]]:
    """Relative name and text of every source file under ``root``, sorted by name; undecodable files are left out."""
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if SKIPPED_DIRECTORIES.intersection(name.parts[:-1]) or path.stem.startswith(SKIPPED_FILES):
            continue
        try:
            with tokenize.open(path) as stream:  # honours the file's own encoding line
                text = stream.read()
        except (SyntaxError, UnicodeDecodeError):
            continue
        if text.strip():
            yield name.as_posix(), text


def is_valid(name: str, text: str) -> bool:
    """Return True for the files of the validation set: chosen by a hash of their names, so that every Python agrees."""
    position = int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) / 2**32
    return len(text) <= LONGEST_VALID and position < VALID_FRACTION


def train_tokenizer(texts: list[str], vocab_size: int, path: Path) -> None:
    """Train a byte-pair sentencepiece model that is lossless on code, and write it to ``path``.

    A tokenizer_config.json beside it says that texts begin without BOS, in training data and at inference.

    Raises:
        ValueError: ``vocab_size`` is too small or too large for the texts.
    """
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(line for text in texts for line in text.splitlines()),
            model_writer=model,
            vocab_size=vocab_size,
            model_type="bpe",
            # Lossless: no normalization, no added or removed space, newline a piece of its own, rare characters as
            # bytes.
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            user_defined_symbols=["\n"],
            byte_fallback=True,
            character_coverage=0.9999,
            # Indentation: a run of spaces is one piece.
            allow_whitespace_only_pieces=True,
            shuffle_input_sentence=False,
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        raise ValueError(f"--vocab-size {vocab_size} does not work for this text; use 512 to 16384: {error}") from error
    path.write_bytes(model.getvalue())
    # For short documents on small models: nothing is spent on a token before every text.
    path.with_name("tokenizer_config.json").write_text(json.dumps({"add_bos_token": False}) + "\n")


def check_round_trip(path: Path, texts: list[str]) -> None:
    """Check that the tokenizer gives every text back exactly. Raises ``AssertionError`` if not."""
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    for text in texts:
        # U+2581 is the character that sentencepiece writes for a space; it is the one thing that it cannot give back.
        assert model.decode(model.encode(text)) == text.replace("\u2581", " "), f"lossy tokenizer: {text[:80]!r}"


def build(output: Path, vocab_size: int, root: Path) -> None:
    """Write the two JSONL files and the tokenizer to ``output``. Raises ``ValueError`` when ``root`` has no sources."""
    parts: dict[str, list[str]] = {"train": [], "valid": []}
    for name, text in source_files(root):
        parts["valid" if is_valid(name, text) else "train"].append(text)
    if not all(parts.values()):
        raise ValueError(
            f"no Python sources under {root}; install the full standard library, or run with another Python"
        )
    output.mkdir(parents=True, exist_ok=True)
    for part, texts in parts.items():
        path = output / f"{part}.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        print(f"{path}: {len(texts):,} documents, {sum(map(len, texts)):,} characters")
    path = output / "tokenizer.model"
    train_tokenizer(parts["train"], vocab_size, path)
    check_round_trip(path, parts["valid"])
    print(f"{path}: {vocab_size:,} pieces")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="directory to write")
    parser.add_argument(
        "--vocab-size", type=int, default=2048, metavar="N", help="pieces of the tokenizer (default: %(default)s)"
    )
    args = parser.parse_args()
    try:
        build(args.output, args.vocab_size, Path(sysconfig.get_paths()["stdlib"]))
    except (ValueError, OSError) as error:
        print(f"build_corpus.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
