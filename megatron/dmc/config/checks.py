"""Checks of a section's values. Each raises ``ValueError`` with the field, its value and what is allowed.

A field that is None, for "not set", passes.
"""

import os
import reprlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_REPR = reprlib.Repr()
_REPR.maxlevel, _REPR.maxdict, _REPR.maxlist, _REPR.maxstring, _REPR.maxother = 3, 6, 8, 60, 60


def shown(value: Any) -> str:
    """A value as messages show it: on one line, and cut where it is long or nested. Takes no time, whatever it is."""
    try:
        text = _REPR.repr(value)
    except ValueError:  # an integer of thousands of digits
        return f"a value of type {type(value).__name__}"
    return text if len(text) <= 120 else text[:100] + "..."


def one_line(error: BaseException, most: int = 300) -> str:
    """A message on one line, cut after ``most`` characters: other software quotes whole files."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= most else text[:most] + "..."


def require(ok: bool, message: str) -> None:
    if not ok:
        raise ValueError(message)


def _given(section: Any, names: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    values = ((name, getattr(section, name)) for name in names)
    return ((name, value) for name, value in values if value is not None)


def positive(section: Any, *names: str) -> None:
    for name, value in _given(section, names):
        require(value > 0, f"{name} is {value}; it must be positive")


def not_negative(section: Any, *names: str) -> None:
    for name, value in _given(section, names):
        require(value >= 0, f"{name} is {value}; it must not be negative")


def one_of(section: Any, name: str, *allowed: str) -> None:
    value = getattr(section, name)
    require(value in allowed, f"{name} {shown(value)} is unknown; use {', '.join(allowed[:-1])} or {allowed[-1]}")


def writable(name: str, directory: str | Path) -> None:
    """Refuse now a directory to write to that would fail at its first file, after hours. Makes nothing."""
    there = Path(directory).absolute()
    while not (there.exists() or there.is_symlink()):
        there = there.parent
    require(there.is_dir(), f"{name} {directory}: {there} is not a directory; name another place")
    require(os.access(there, os.W_OK | os.X_OK), f"{name} {directory}: {there} cannot be written; name another place")
