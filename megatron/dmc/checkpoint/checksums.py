"""CRC-32 of the files of a checkpoint or an exported directory, compared when it is loaded. No torch.

A checkpoint has them in its manifest, a Hugging Face directory that was written here in ``checksums.json``. They find
what disks, copies and networks do to a file, by the file's name, and are no protection against an attacker. A thread
reads a few GB/s (zlib leaves the interpreter's lock alone meanwhile), and ranks share the files.
"""

import json
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

FILE = "checksums.json"
"""File of an exported directory with ``{"crc32": {name: CRC-32}}``."""
UNLISTED = (FILE, "README.md")
"""Files without a checksum: itself, and the model card, which people edit and nothing reads."""
ADVICE = f"restore it from a copy, or remove the lines of files that you have changed yourself from {FILE}"
_BLOCK = 4 << 20


def crc32(path: Path) -> str:
    """CRC-32 of one file: 8 hexadecimal digits, as ``crc32`` and ``rhash --crc32`` print them."""
    value, buffer = 0, memoryview(bytearray(_BLOCK))
    with open(path, "rb", buffering=0) as file:
        while size := file.readinto(buffer):
            value = zlib.crc32(buffer[:size], value)
    return f"{value:08x}"


def checksums(directory: Path, names: Iterable[str], of: Callable[[Path], str] = crc32) -> dict[str, str]:
    """CRC-32 of each file in ``directory``, taken by up to 4 threads.

    Raises:
        OSError: a file is missing.
    """
    names = list(names)
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        return dict(zip(names, pool.map(lambda name: of(directory / name), names)))


def share(files: Mapping[str, int], rank: int, world: int) -> list[str]:
    """Files that one of ``world`` processes reads, the largest dealt out first. ``files``: name -> bytes."""
    return sorted(files, key=lambda name: (-files[name], name))[rank::world]


def damaged(directory: Path, expected: Mapping[str, str], names: Iterable[str]) -> list[str]:
    """Files of ``names`` that cannot be read, or whose CRC-32 is not the one in ``expected`` (name -> CRC-32)."""

    def crc32_or_nothing(path: Path) -> str:
        try:
            return crc32(path)
        except OSError:
            return ""

    values = checksums(directory, (name for name in names if name in expected), crc32_or_nothing)
    odd = [(name, value) for name, value in values.items() if value != expected[name]]
    return [f"{name} ({value or 'cannot be read'}, should be {expected[name]})" for name, value in odd]


def require_undamaged(directory: Path, expected: Mapping[str, str], what: str, advice: str) -> None:
    """Compare the files of ``expected`` (name -> CRC-32).

    Raises:
        ValueError: "``what`` is damaged", with the names of the files that differ, and ``advice``.
    """
    if odd := damaged(directory, expected, expected):
        more = ", ..." if odd[5:] else ""
        raise ValueError(f"{what} is damaged, its checksums differ: {', '.join(odd[:5])}{more}; {advice}")


def write_file(directory: Path, crc32: Mapping[str, str]) -> None:
    """Write ``directory/checksums.json``, last of all.

    Args:
        crc32: what is known already (name -> CRC-32); the other files are read for theirs.
    """
    paths = sorted(path for path in directory.rglob("*") if path.is_file() and path.name not in UNLISTED)
    names = [path.relative_to(directory).as_posix() for path in paths]
    others = checksums(directory, [name for name in names if name not in crc32])
    content = {"crc32": {name: crc32.get(name) or others[name] for name in names}}
    (directory / FILE).write_text(json.dumps(content, indent=1) + "\n")


def read_file(directory: Path) -> dict[str, str]:
    """Checksums of a directory, name -> CRC-32; empty where there is no ``checksums.json``.

    Raises:
        ValueError: the file is damaged.
    """
    path = directory / FILE
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text())
        values = content["crc32"]
        if list(content) != ["crc32"] or not all(_is_entry(name, value) for name, value in values.items()):
            raise ValueError('it must hold {"crc32": {name: checksum}}')
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({error}); restore it from a copy") from error
    return values


def _is_entry(name: str, value: object) -> bool:
    """True for an entry of a checksum list that names a file of the directory and holds a CRC-32."""
    inside = name.isprintable() and ".." not in Path(name).parts and not Path(name).is_absolute()
    return inside and isinstance(value, str) and re.fullmatch("[0-9a-f]{8}", value) is not None


@contextmanager
def checking(directory: Path) -> Iterator[None]:
    """Compare a directory's files with its ``checksums.json`` while the body loads them, which takes as long.

    Raises:
        ValueError: after the body, with the names of the files that differ.
    """
    expected = read_file(directory)
    with ThreadPoolExecutor(1) as pool:
        compared = pool.submit(require_undamaged, directory, expected, str(directory), ADVICE)
        yield
        compared.result()
