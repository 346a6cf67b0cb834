"""Errors of the disk, by their names: what torch says when a file cannot be written hides why. No torch."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Optional

_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.ESTALE)
_PROBE_BYTES = 1 << 20


class DiskError(OSError):
    """A file cannot be written; ``str`` is one line for the user."""

    def __str__(self) -> str:
        return f"writing {self.filename} failed: {self.strerror}; look at the disk, then run the same command again"


@contextmanager
def naming_disk_errors(directory: Path, caught: tuple[type[BaseException], ...]) -> Iterator[None]:
    """Raise :class:`DiskError` for an error of the body that comes from the disk of ``directory``; others pass.

    A full disk reaches this place as anything: ``torch.save`` of 2.13 answers ENOSPC with ``RuntimeError: unexpected
    pos 704 vs 598``, and other ranks only hear that one of them has failed. So unless the error names its cause, the
    disk is asked: a megabyte is written beside the checkpoint.

    Args:
        caught: types of errors that are looked at.
    """
    try:
        yield
    except caught as error:
        if isinstance(error, DiskError):
            raise
        number = _number(error) or _probe(directory)
        if number is None:
            raise
        full = "the disk is full: " if number in (errno.ENOSPC, errno.EDQUOT) else ""
        raise DiskError(number, full + os.strerror(number), str(directory)) from error


def _number(error: Optional[BaseException]) -> Optional[int]:
    """``errno`` of the first error of a disk in a chain of causes."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _DISK:
            return error.errno
        error = error.__cause__ or error.__context__
    return None


def _probe(directory: Path) -> Optional[int]:
    """``errno`` of an attempt to write there, None when it can be written."""
    path = directory / f".probe_{os.getpid()}"
    try:
        with open(path, "wb") as file:
            file.write(bytes(_PROBE_BYTES))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return error.errno if error.errno in _DISK else None
    finally:
        with suppress(OSError):
            path.unlink(missing_ok=True)
    return None
