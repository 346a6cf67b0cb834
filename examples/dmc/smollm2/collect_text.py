#!/usr/bin/env python3
"""Collect English prose and code from Debian's documentation packages, for training and for evaluation.

    python examples/dmc/smollm2/collect_text.py --output DIR

Downloads the packages of ``PACKAGES`` with apt (Debian and its derivatives; nothing is installed, no root is needed)
and writes ``DIR/train.jsonl``, ``DIR/valid_prose.jsonl`` and ``DIR/valid_code.jsonl``, one document per line:
``{"text": ..., "source": package, "kind": "prose" or "code"}``. Consecutive pages of a book are one document, so that
contexts of thousands of tokens are of one piece. ``DIR/sources.json`` names version, licence and size of each package.
The same package versions give the same bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path


@dataclass(frozen=True)
class Package:
    """A package of Debian, and which of its files are read."""

    name: str
    pattern: str
    """Files, as a glob below the package's root."""
    kind: str
    """prose or code"""
    licence: str
    """As in the package's copyright file."""


PACKAGES = (
    Package("debian-handbook", "usr/share/doc/debian-handbook/html/en-US/*.html", "prose", "CC-BY-SA-3.0 or GPL-2+"),
    Package("git-doc", "usr/share/doc/git/html/*.html", "prose", "GPL-2"),
    Package("gimp-help-en", "usr/share/gimp/2.0/help/en/*.html", "prose", "GFDL-1.2+"),
    Package("sqlite3-doc", "usr/share/doc/sqlite3/*.html", "prose", "public domain"),
    Package("postgresql-doc-15", "usr/share/doc/postgresql-doc-15/html/*.html", "prose", "PostgreSQL"),
    Package("python3.11-doc", "usr/share/doc/python3.11/html/[dfhirt]*/*.html", "prose", "PSF-2"),
    Package("libpython3.11-stdlib", "usr/lib/python3.11/**/*.py", "code", "PSF-2"),
    Package("libpython3.11-minimal", "usr/lib/python3.11/**/*.py", "code", "PSF-2"),
    Package("python3-django", "usr/lib/python3/dist-packages/django/**/*.py", "code", "BSD-3-Clause"),
)
DOCUMENT_CHARACTERS = 40_000
"""Pages are joined until a document has as many: about 10,000 tokens."""
LONGEST_PAGE = 400_000
VALID_FRACTION = 0.06  # of the documents
SKIPPED = {"script", "style", "head", "nav", "button", "noscript"}
BLOCKS = {"p", "div", "br", "tr", "table", "ul", "ol", "dl", "dt", "dd", "section", "blockquote", "hr"}


class _Text(HTMLParser):
    """Text of a page: blocks on lines of their own, headings and list items marked as in Markdown, code as it is."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self.skipping = self.code = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in SKIPPED:
            self.skipping += 1
        elif tag == "pre":
            self.code += 1
            self.parts.append("\n\n")
        elif re.fullmatch("h[1-6]", tag):
            self.parts.append("\n\n" + "#" * int(tag[1]) + " ")
        elif tag == "li":
            self.parts.append("\n- ")
        elif tag == "td" or tag == "th":
            self.parts.append(" ")
        elif tag in BLOCKS:
            self.parts.append("\n" if tag in ("br", "tr") else "\n\n")

    def handle_endtag(self, tag: str) -> None:
        if tag in SKIPPED:
            self.skipping = max(0, self.skipping - 1)
        elif tag == "pre":
            self.code = max(0, self.code - 1)
            self.parts.append("\n\n")
        elif re.fullmatch("h[1-6]", tag) or tag in BLOCKS:
            self.parts.append("\n\n")

    def handle_data(self, data: str) -> None:
        if self.skipping:
            return
        if not self.code:
            data = re.sub(r"\s+", " ", data)
            if not self.parts or self.parts[-1].endswith(("\n", " ")):
                data = data.lstrip()
        if data:
            self.parts.append(data)

    def text(self) -> str:
        lines = [line.rstrip() for line in "".join(self.parts).replace("\u00b6", "").split("\n")]
        return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


def page_text(path: Path) -> str:
    """Text of a file, "" when it has none to speak of: shorter than 400 characters, or not text at all."""
    try:
        raw = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return ""
    if path.suffix == ".html":
        parser = _Text()
        parser.feed(raw)
        parser.close()
        raw = parser.text()
    return raw if 400 <= len(raw) <= LONGEST_PAGE else ""


def unpack(name: str, folder: Path) -> str:
    """Download a package of Debian and unpack it into ``folder``; returns its version. Raises ``ValueError``."""
    for command in (["apt-get", "download", "-q", name], ["dpkg-deb", "-x", "*.deb", "root"]):
        command = [found for part in command for found in (sorted(map(str, folder.glob(part))) or [part])]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        if done.returncode:
            raise ValueError(f"{' '.join(command[:2])} {name} failed; run apt-get update first: {done.stderr.strip()}")
    return next(folder.glob("*.deb")).stem.split("_")[1]


def documents(package: Package, root: Path) -> Iterator[tuple[str, str]]:
    """Name and text of each document of a package: files in order of their names, joined."""
    pages: list[str] = []
    first, size = "", 0
    for path in sorted(root.glob(package.pattern)):
        text = page_text(path) if path.is_file() else ""
        if not text:
            continue
        first = first or f"{package.name}/{path.relative_to(root)}"
        pages.append(text)
        size += len(text)
        if size >= DOCUMENT_CHARACTERS:
            yield first, "\n\n".join(pages)
            pages, first, size = [], "", 0
    if pages:
        yield first, "\n\n".join(pages)


def is_valid(name: str) -> bool:
    """Return True for documents of the validation sets: chosen by a hash of their names."""
    return int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) / 2**32 < VALID_FRACTION


def build(output: Path) -> None:
    """Write the files to ``output``. Raises ``ValueError`` when a package cannot be had or has no text."""
    splits: dict[str, list[dict]] = {"train": [], "valid_prose": [], "valid_code": []}
    sources = []
    for package in PACKAGES:
        with tempfile.TemporaryDirectory() as temporary:
            version = unpack(package.name, Path(temporary))
            found = list(documents(package, Path(temporary) / "root"))
        if not found:
            raise ValueError(f"{package.name} {version} has no text at {package.pattern}")
        characters = sum(len(text) for _, text in found)
        sources.append(
            {"package": package.name, "version": version, "licence": package.licence, "kind": package.kind}
            | {"documents": len(found), "characters": characters}
        )
        print(f"{package.name} {version}: {len(found)} documents, {characters:,} characters")
        for name, text in found:
            split = f"valid_{package.kind}" if is_valid(name) else "train"
            splits[split].append({"text": text, "source": package.name, "kind": package.kind})
    output.mkdir(parents=True, exist_ok=True)
    for split, items in splits.items():
        # In an order without books one after the other: by a hash of the text.
        items.sort(key=lambda item: hashlib.sha256(item["text"].encode()).digest())
        (output / f"{split}.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
        print(f"{split}: {len(items)} documents, {sum(len(item['text']) for item in items):,} characters")
    (output / "sources.json").write_text(json.dumps(sources, indent=1) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="directory to write")
    args = parser.parse_args()
    try:
        build(args.output)
    except (ValueError, OSError) as error:
        print(f"collect_text.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
