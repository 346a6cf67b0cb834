"""A directory that appears under its name only when it is complete. No torch, no Megatron."""

import ctypes
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron.dmc.checkpoint.manifest import TEMPORARY

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


@contextmanager
def staged(target: Path, overwrite: bool) -> Iterator[Path]:
    """Yield an empty directory beside ``target`` that takes its name at the end; nothing is left after an error.

    What a killed run left behind is removed by the next one with the same target.

    Raises:
        ValueError: ``target`` exists and ``overwrite`` is False, or its parent cannot be written.
    """
    if (target.exists() or target.is_symlink()) and not overwrite:
        raise ValueError(f"{target} exists; give --overwrite to replace it, or name another directory")
    if target.exists() and not target.is_dir():
        raise ValueError(f"{target} is not a directory; name another place")
    temporary = target.with_name(TEMPORARY + target.name)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
    except OSError as error:
        raise ValueError(f"{temporary} cannot be made: {error.strerror}") from error
    try:
        yield temporary
        _put_in_place(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # after an exchange: what was there before


def _put_in_place(temporary: Path, target: Path) -> None:
    sync_tree(temporary)
    if not target.exists():
        os.rename(temporary, target)
    elif not _exchange(temporary, target):
        # Without the exchange nothing has the name for a moment, but never something incomplete.
        doomed = target.with_name(f"{TEMPORARY}old_{target.name}")
        shutil.rmtree(doomed, ignore_errors=True)
        os.rename(target, doomed)
        os.rename(temporary, target)
        shutil.rmtree(doomed, ignore_errors=True)
    sync(target.parent)


def _exchange(a: Path, b: Path) -> bool:
    """Swap two names in one step (Linux 3.15, on most file systems)."""
    try:
        rename = ctypes.CDLL(None).renameat2
    except (OSError, AttributeError):
        return False
    return rename(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE) == 0


def sync_tree(directory: Path) -> None:
    """:func:`sync` of everything in it, and of itself."""
    for path in directory.rglob("*"):
        sync(path)
    sync(directory)


def sync(path: Path) -> None:
    """Flush a file or a directory to disk: after a power cut a rename must not be all that is left."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
