"""CRC-32 of a checkpoint's files: written into its manifest, compared when it is loaded. No torch.

It finds what disks, copies and networks do to a file, by the file's name; it is no protection against an attacker. A
thread reads a few GB/s (zlib leaves the interpreter's lock alone meanwhile), and ranks share the files.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

_BLOCK = 4 << 20


def crc32(path: Path) -> str:
    """CRC-32 of one file: 8 hexadecimal digits, as ``crc32`` and ``rhash --crc32`` print them."""
    value, buffer = 0, memoryview(bytearray(_BLOCK))
    with open(path, "rb", buffering=0) as file:
        while size := file.readinto(buffer):
            value = zlib.crc32(buffer[:size], value)
    return f"{value:08x}"


def checksums(directory: Path, names: Iterable[str], threads: int | None = None) -> dict[str, str]:
    """CRC-32 of each file in ``directory``, by up to 4 ``threads`` (None) or as many as given.

    Raises:
        OSError: a file is missing.
    """
    names = list(names)
    with ThreadPoolExecutor(threads or min(4, os.cpu_count() or 1)) as pool:
        return dict(zip(names, pool.map(lambda name: crc32(directory / name), names)))


def share(files: Mapping[str, int], rank: int, world: int) -> list[str]:
    """Files that one of ``world`` processes reads, the largest dealt out first. ``files``: name -> bytes."""
    return sorted(files, key=lambda name: (-files[name], name))[rank::world]


def damaged(directory: Path, expected: Mapping[str, str], names: Iterable[str]) -> list[str]:
    """Files of ``names`` that cannot be read, or whose CRC-32 is not the one in ``expected`` (name -> CRC-32)."""
    found = []
    for name, value in _tolerant(directory, [name for name in names if name in expected]).items():
        if value != expected[name]:
            found.append(f"{name} ({value or 'cannot be read'}, should be {expected[name]})")
    return found


def _tolerant(directory: Path, names: list[str]) -> dict[str, str]:
    try:
        return checksums(directory, names)
    except OSError:
        result = {}
        for name in names:
            try:
                result[name] = crc32(directory / name)
            except OSError:
                result[name] = ""
        return result
