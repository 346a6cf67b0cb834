"""JSONL files of text, plain or gzip, told by their first bytes and not by their names. No torch."""

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

_GZIP = b"\x1f\x8b"
_OTHERS = {
    b"\x28\xb5\x2f\xfd": "zstd-compressed; decompress it first: zstd -d",
    b"\xfd7zXZ\0": "xz-compressed; decompress it first: unxz",
    b"\x04\x22\x4d\x18": "lz4-compressed; decompress it first: lz4 -d",
    b"BZh": "bzip2-compressed; decompress it first: bunzip2",
    b"PK\x03\x04": "a zip archive; unpack it first: unzip",
    b"PAR1": "Parquet; write it as JSONL first",
    b"\xff\xfe": "UTF-16; convert it first: iconv -f UTF-16 -t UTF-8",
    b"\xfe\xff": "UTF-16; convert it first: iconv -f UTF-16 -t UTF-8",
}


def read_lines(path: str | Path) -> Iterator[tuple[int, bytes, int]]:
    """Read the lines of a file, one by one.

    Yields:
        Number of the line, from 1; its bytes; and the number of bytes read of the file on disk.

    Raises:
        ValueError: another compression or format, by name, or a damaged gzip file, with the line.
    """
    with open(path, "rb") as raw:
        head = raw.peek(8)[:8]
        for magic, name in _OTHERS.items():
            if head.startswith(magic):
                raise ValueError(f"{path} is {name}")
        yield from _read(path, raw, gzip.open(raw, "rb") if head.startswith(_GZIP) else raw)  # type: ignore[arg-type]


def read_texts(path: str | Path) -> Iterator[str]:
    """Read the texts of a file of ``{"text": ...}`` lines.

    Raises:
        ValueError: see :func:`read_lines`, and a line of another form, with its number.
    """
    for number, line, _ in read_lines(path):
        try:
            text = json.loads(line)["text"]
        except (ValueError, KeyError, TypeError):
            text = None
        if not isinstance(text, str):
            raise ValueError(f'{path}:{number} is no JSON of the form {{"text": "..."}}')
        yield text


def _read(path: str | Path, raw: BinaryIO, stream: BinaryIO) -> Iterator[tuple[int, bytes, int]]:
    number = 0
    try:
        for number, line in enumerate(stream, start=1):
            yield number, line, raw.tell()
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}:{number + 1}: the gzip file is damaged or cut off: {error}") from error
