"""Command line of a training run, and how the run's configuration is put together.

Later wins: the defaults, the model that the checkpoint records (``--init-from``, or the one under ``--save``), the
``--config`` file, the flags.
"""

import argparse
import dataclasses
import typing
from pathlib import Path
from typing import Optional

import yaml

from megatron.dmc import flags
from megatron.dmc.config import COMPRESSING, RunConfig, load_file

_MODEL_SECTIONS = ("model", "dmc")
_SECTIONS = typing.get_type_hints(RunConfig)
_SECTION_OF = {field.name: name for name, section in _SECTIONS.items() for field in dataclasses.fields(section)}
"""Section of every field. Field names are unique over the sections, so that each makes a flag."""


def build_parser() -> flags.Parser:
    """Parser with one flag for every field of every section, and ``--config``."""
    parser = flags.Parser(
        prog="dmc train",
        description="Pre-train, or retrofit a checkpoint with Dynamic Memory Compression, one stage at a time.\n\n"
        "--init-from starts a stage from another checkpoint's weights. --save is where it writes and, when it holds\n"
        "a complete checkpoint, where it resumes. Later wins: defaults, the checkpoint's model, --config, flags.",
        argument_default=argparse.SUPPRESS,
        examples="""
            dmc train --config FILE --stage zero_out --init-from llama2-7b --save zero_out
            dmc train --config FILE --stage retrofit --target-cr 4 --init-from zero_out --save retrofit-4x
            torchrun --nproc-per-node 8 --no-python dmc train --config FILE --stage finetune --init-from retrofit-4x
            """,
    )
    parser.add_argument(
        "--config", default=None, metavar="FILE", help="YAML or JSON file with the sections below; flags win over it."
    )
    for name, section in _SECTIONS.items():
        flags.add_fields(parser.add_argument_group(name), section, none=True)
    return parser


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
    asked: dict[str, dict] = {}
    for name, value in given.items():
        asked.setdefault(_SECTION_OF[name], {})[name] = None if value == "none" else value
    RunConfig.from_dict(file)  # unknown keys are named before anything else is looked at
    asked = _merge(_merge({}, file), asked)
    plain = RunConfig.from_dict(asked).to_dict()  # 1e-5 in YAML is a string: compare what it means
    saved = saved_config(asked)
    base = {section: saved[section] for section in _MODEL_SECTIONS} if saved else {}
    for section, values in base.items():
        if section == "dmc" and saved and saved["stage"]["stage"] not in COMPRESSING:
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
