"""Dataclasses from plain values: nested dicts, and the YAML or JSON files that hold them."""

import dataclasses
import json
import math
import typing
from pathlib import Path
from typing import Any, Literal, Self

from megatron.dmc.config.checks import one_line, require, shown


def build(cls: type, data: dict, where: str = "") -> Any:
    """Dataclass from nested dicts.

    Args:
        where: dotted prefix of the keys, for messages.

    Raises:
        ValueError: unknown keys, or values of a wrong type, with their names.
    """
    require(isinstance(data, dict), f"{where or 'the configuration'} must be a mapping, not {type(data).__name__}")
    hints = typing.get_type_hints(cls)
    unknown = [where + key for key in sorted(set(data) - set(hints))]
    require(
        not unknown,
        f"unknown configuration key{'s' * (len(unknown) > 1)} {', '.join(unknown)}; known here: "
        f"{', '.join(sorted(hints))}",
    )
    return cls(**{key: _value(hints[key], value, where + key) for key, value in data.items()})


def _value(hint: Any, value: Any, name: str) -> Any:
    """Check a plain value against its annotation; YAML's ``3e-5`` (a string) and ints for floats are taken."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return build(typing.cast(type, hint), value, f"{name}.")
    if origin is typing.Union:
        if value is None and type(None) in args:
            return None
        return _value(next(a for a in args if a is not type(None)), value, name)
    if origin is Literal:
        require(value in args, f"{name} is {shown(value)}; use one of {', '.join(map(str, args))}")
        return value
    if origin is dict:
        require(isinstance(value, dict), f"{name} is {value!r}; it must be a mapping")
        return {_value(args[0], k, name): _value(args[1], v, f"{name}.{k}") for k, v in value.items()}
    if origin is list:
        require(isinstance(value, list), f"{name} is {shown(value)}; it must be a list")
        return [_value(args[0], v, name) for v in value]
    if hint is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        try:
            value = float(value)
        except ValueError:
            raise ValueError(f"{name} is {shown(value)}; it must be a number") from None
    if hint is float and isinstance(value, float):
        require(math.isfinite(value), f"{name} is {value}; it must be a finite number")
    fits = isinstance(value, hint) and not (hint is int and isinstance(value, bool))
    require(fits, f"{name} is {shown(value)}; it must be of type {hint.__name__}")
    return value


class FileConfig:
    """Base of a dataclass that holds a whole configuration file, and has a ``check``."""

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a YAML or JSON file. Raises ``ValueError`` naming a wrong key or value."""
        config = build(cls, load_file(path))
        config.check()
        return config

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)  # type: ignore[call-overload]


def load_file(path: str | Path) -> dict:
    """Read a YAML or JSON configuration file as nested dicts. Raises ``ValueError`` when it is neither."""
    path = Path(path)
    require(path.is_file(), f"configuration file {path} does not exist")
    try:
        if path.suffix == ".json":
            data = json.loads(path.read_text())
        else:
            import yaml

            data = yaml.safe_load(path.read_text())
    except Exception as error:
        raise ValueError(f"configuration file {path} cannot be read: {one_line(error)}") from error
    require(isinstance(data or {}, dict), f"configuration file {path} must be a mapping, not {type(data).__name__}")
    return data or {}
