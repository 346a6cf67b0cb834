"""Checks of a section's values. Each raises ``ValueError`` with the field, its value and what is allowed.

A field that is None, for "not set", passes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


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
    require(value in allowed, f"{name} {value!r} is unknown; use {', '.join(allowed[:-1])} or {allowed[-1]}")
