"""The command line, generated from the dataclasses, and how a run's configuration is put together.

Later wins: the defaults, what the checkpoint says of its model (``--init-from``, or the one under ``--save``), the
``--config`` file, the flags.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import typing
from pathlib import Path
from typing import Any, Literal, Optional

import yaml

from megatron.dmc.config import RunConfig, load_file

_MODEL_SECTIONS = ("model", "dmc")


def _flags() -> dict[str, tuple[str, Any, Any]]:
    """field name -> (section, annotation, default). Names are unique over sections."""
    flags: dict[str, tuple[str, Any, Any]] = {}
    for section in dataclasses.fields(RunConfig):
        hints = typing.get_type_hints(typing.get_type_hints(RunConfig)[section.name])
        for name, hint in hints.items():
            assert name not in flags, f"{name} stands in two sections"
            default = section.default_factory()  # type: ignore[misc]
            flags[name] = (section.name, hint, getattr(default, name))
    return flags


def _plain(hint: Any) -> Any:
    args = [a for a in typing.get_args(hint) if a is not type(None)]
    return args[0] if typing.get_origin(hint) is typing.Union else hint


class _Parser(argparse.ArgumentParser):
    """Raises instead of printing the usage of a hundred flags: the caller says it in one line, on one rank."""

    def error(self, message: str) -> typing.NoReturn:
        raise ValueError(f"{message}; --help lists all flags")


def build_parser() -> argparse.ArgumentParser:
    """One flag for every field of every section, and ``--config``."""
    parser = _Parser(
        prog="megatron.dmc.training.retrofit",
        description="Pre-train, or retrofit a checkpoint with Dynamic Memory Compression, one stage at a time.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument("--config", default=None, metavar="FILE", help="YAML or JSON file with the sections below")
    groups: dict[str, Any] = {}
    for name, (section, hint, default) in _flags().items():
        group = groups.setdefault(section, parser.add_argument_group(section))
        flag, kind = "--" + name.replace("_", "-"), _plain(hint)
        optional = kind is not hint
        text = f"default: {'none' if default is None else default}"
        if kind is bool:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, help=text)
        elif typing.get_origin(kind) is list:
            group.add_argument(flag, nargs="*", type=typing.get_args(kind)[0], help=text)
        elif typing.get_origin(kind) is Literal:
            choices = list(typing.get_args(kind)) + (["none"] if optional else [])
            group.add_argument(flag, type=str, choices=choices, help=text)
        else:
            parse = json.loads if kind is dict else kind
            group.add_argument(flag, type=_or_none(parse) if optional else parse, metavar=name.upper(), help=text)
    return parser


def _or_none(parse: Any) -> Any:
    def take(text: str) -> Any:
        return None if text.lower() in ("none", "null") else parse(text)

    take.__name__ = getattr(parse, "__name__", "value")  # argparse names it in its messages
    return take


def _merge(base: dict, extra: dict) -> dict:
    merged = {section: dict(values) for section, values in base.items()}
    for section, values in extra.items():
        if section in merged and not isinstance(values, dict):
            raise ValueError(f"configuration section {section} is {values!r}; it must be a mapping")
        merged.setdefault(section, {}).update(values)
    return merged


def read_saved_config(checkpoint: Path) -> dict:
    """The resolved configuration that was saved with a checkpoint, as nested dicts. Raises ``ValueError`` for none."""
    saved = load_file(checkpoint / "config.yaml")
    RunConfig.from_dict(saved)
    missing = [section.name for section in dataclasses.fields(RunConfig) if section.name not in saved]
    if missing:
        raise ValueError(
            f"{checkpoint / 'config.yaml'} lacks {', '.join(missing)}; it must hold the resolved configuration "
            "that the checkpoint was trained with"
        )
    return saved


def resolve(argv: Optional[list[str]], saved_config: typing.Callable[[dict], Optional[dict]]) -> RunConfig:
    """Parse the command line into a :class:`RunConfig`.

    Args:
        argv: arguments, or None for the process' own.
        saved_config: given what the user asked for (nested dicts), the saved configuration of the checkpoint that the
            run starts from, or None.

    Raises:
        ValueError: unknown keys, wrong values, or a model that is not the checkpoint's.
    """
    given = vars(build_parser().parse_args(argv))
    path = given.pop("config")
    file = load_file(path) if path else {}
    flags, asked = _flags(), {}
    for name, value in given.items():
        asked.setdefault(flags[name][0], {})[name] = None if value == "none" else value
    RunConfig.from_dict(file)  # unknown keys are named before anything else is looked at
    asked = _merge(_merge({}, file), asked)
    plain = RunConfig.from_dict(asked).to_dict()  # 1e-5 in YAML is a string: compare what it means
    saved = saved_config(asked)
    base = {section: saved[section] for section in _MODEL_SECTIONS} if saved else {}
    for section, values in base.items():
        if section == "dmc" and saved and saved["stage"]["stage"] not in ("retrofit", "finetune"):
            continue  # nothing of it is in the weights yet
        for key in asked.get(section, {}):
            value = plain[section][key]
            # loss_weight and temperature shape training, not the checkpoint.
            if key not in ("loss_weight", "temperature") and value != values.get(key):
                raise ValueError(
                    f"{section}.{key} is {value!r}, but the checkpoint was trained with {values.get(key)!r}; "
                    f"leave it out"
                )
    return RunConfig.from_dict(_merge(base, asked))


def dump(config: RunConfig) -> str:
    """The resolved configuration as YAML."""
    return yaml.safe_dump(config.to_dict(), sort_keys=False)
