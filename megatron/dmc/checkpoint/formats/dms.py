"""DMS models that others wrote, recognized by their files and described as a ``dmc`` block describes them.

Their weights are those of a plain family, plus a linear layer per attention where an adapter decides. Read as a plain
model they talk nonsense, or hold a full cache in silence; so every directory is looked at here when it is opened.

| writer | says so in | decision | about |
|---|---|---|---|
| NVIDIA's releases (``nvidia/Qwen3-8B-DMS-8x``) | ``dms_*`` in ``config.json`` | query | previous |
| Model-Optimizer's ``experimental/dms`` (a2fbac7) | also ``dms_separate_alpha`` | adapter or query | previous |
| FastDMS 0.2.0 | ``dms_metadata.json``, else ``training_log.json`` of the parent directory | query | self |
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Optional

from megatron.dmc.checkpoint import mapping
from megatron.dmc.checkpoint.fields import Fields, read_json, shown_key
from megatron.dmc.checkpoint.formats.base import Given, decision_text
from megatron.dmc.config import DMCConfig
from megatron.dmc.config.checks import shown

METADATA, TRAINING_LOG = "dms_metadata.json", "training_log.json"
"""FastDMS's description beside the weights, and what its trainer writes into the parent directory."""
_INERT = (
    "dms_tau dms_paged_attention_block_size dms_manual_inference_mode dms_chunked_prefill dms_preallocate_for_tokens "
    "dms_compile_limit"
).split()
"""Keys of Model-Optimizer that say how it trains and runs a model, not what the model computes."""
_COMPUTING = (
    "dms_window_size dms_alpha_scale dms_initial_alpha_offset dms_cr dms_separate_alpha dms_alpha_per "
    "dms_disable_eviction"
).split()
_LONGEST_WINDOW, _LARGEST_CR = 65_536, 10_000


@dataclass(frozen=True)
class ForeignDMS:
    """Description of a DMS model that another program wrote."""

    origin: str
    """Program or publisher, and the file that says so."""
    dmc: DMCConfig
    target_cr: float
    """Compression ratio that the files name; 1 where they name none."""

    def note(self) -> str:
        """A line for the user on what was understood."""
        decisions = f"decisions: {decision_text(self.dmc)}; window {self.dmc.window}; target {self.target_cr:g}x"
        return f"a DMS model, described by {self.origin}; {decisions}"


def canonical_config(path: Path, config: dict, given: Given = Given()) -> tuple[dict, Optional[ForeignDMS]]:
    """``config.json`` with a ``dmc`` block in place of another program's description, and that description.

    Args:
        path: the model's directory.
        config: its ``config.json`` as it is; returned unchanged for a plain model and for one of this package.

    Raises:
        ValueError: a description that is incomplete, contradicts itself or asks for what is not supported, by file,
            key and value; or ``given`` says what is not open here.
    """
    if config.get("model_type") == mapping.ADAPTER_MODEL_TYPE:
        base = config.get("base_model") or "the model that it was trained on"
        raise ValueError(
            f"{path} holds the adapters of a DMS model and no model; name its base, {shown(base)}, and give --adapter "
            f"{path}"
        )
    found = _describe(path, config, given)
    if found is None:
        for name in ("decision_about", "target_cr"):
            if (value := getattr(given, name)) is not None:
                said = f"--{name.replace('_', '-')} {value}"
                raise ValueError(f"{said} is for DMS models of other programs, and {path} is none; leave it out")
        return config, None
    plain = {key: value for key, value in config.items() if not key.startswith("dms_") and key != "auto_map"}
    family = mapping.family_of(plain)
    block = mapping.DMCBlock(family.model_type, found.dmc, "retrofit", 0, found.target_cr, None)
    return mapping.with_block(plain, block), found


def _describe(path: Path, config: dict, given: Given) -> Optional[ForeignDMS]:
    if "dmc" in config:
        return None
    from_config = _nvidia(config) if any(key.startswith("dms_") for key in config) else None
    fastdms = _fastdms(path)
    found = from_config or fastdms
    if found is None:
        return None
    if from_config and fastdms:
        if given.decision_about is None:
            raise ValueError(
                f"{path} is described by {from_config.origin}, whose decisions are about the token before, and by "
                f"{fastdms.origin}, whose decisions are about the token itself; give --decision-about previous or self"
            )
        about = replace(fastdms.dmc, decision_about=from_config.dmc.decision_about)
        if about != from_config.dmc:
            raise ValueError(f"{path}: {_differences(from_config, fastdms)}; correct the one that is wrong")
    about = given.decision_about or found.dmc.decision_about
    dmc = replace(found.dmc, decision_about=about)
    dmc.check()
    return replace(found, dmc=dmc, target_cr=given.target_cr or found.target_cr)


def _differences(one: ForeignDMS, two: ForeignDMS) -> str:
    names = ("decision_source", "decision_per", "decision_scale", "decision_bias", "window")
    odd = [name for name in names if getattr(one.dmc, name) != getattr(two.dmc, name)]
    said = (", ".join(f"{name} {getattr(of.dmc, name)}" for name in odd) for of in (one, two))
    return " and ".join(f"{of.origin} says {text}" for of, text in zip((one, two), said))


def _nvidia(config: Mapping[str, Any]) -> ForeignDMS:
    """Description in the ``dms_*`` keys of NVIDIA's and Model-Optimizer's configuration class."""
    fields = Fields(config, "config.json: ")
    unknown = sorted(key for key in config if key.startswith("dms_") and key not in (*_COMPUTING, *_INERT))
    if unknown:
        fields.refuse(unknown[0], f"left out: of a DMS model {', '.join((*_COMPUTING, *_INERT))} are understood")
    if fields.flag("dms_disable_eviction", False):
        fields.refuse("dms_disable_eviction", "false: a model that evicts nothing is its base; load that")
    separate = fields.flag("dms_separate_alpha", False)
    per = fields.text("dms_alpha_per", "head")
    if per not in ("head", "layer"):
        fields.refuse("dms_alpha_per", "head or layer")
    if per == "layer" and not separate:
        fields.refuse("dms_alpha_per", "head without dms_separate_alpha: query channels decide by head")
    return ForeignDMS(
        origin=f"{'Model-Optimizer' if separate else 'NVIDIA'} (dms_* in config.json)",
        dmc=_dms_config(
            fields,
            {"window": "dms_window_size", "scale": "dms_alpha_scale", "bias": "dms_initial_alpha_offset"},
            decision_source="adapter" if separate else "query",
            decision_about="previous",
            decision_per=per,
        ),
        target_cr=fields.number("dms_cr", 1.0, least=1, most=_LARGEST_CR),
    )


def _fastdms(path: Path) -> Optional[ForeignDMS]:
    """Description by FastDMS: in its own file, or in its trainer's log one directory up. Its window is a count of
    tokens as ours, and a token of exactly that age is still read (``build_dms_live_mask``).
    """
    file = path / METADATA
    content = read_json(file) if file.is_file() else None
    if content is None:
        file = path.absolute().parent / TRAINING_LOG
        content = _training_log(file)
    if content is None:
        return None
    inner = content.get("config", content)
    if not isinstance(inner, dict):
        raise ValueError(f"{file}: config is {shown(inner)}; it must be an object")
    fields = Fields({**content, **inner}, f"{file}: ")
    _refuse_sidecars(fields)
    return ForeignDMS(
        origin=f"FastDMS ({file.name})",
        dmc=_dms_config(
            fields,
            {"window": "window_size", "scale": "alpha_scale", "bias": "alpha_offset"},
            decision_source="query",
            decision_about="self",
        ),
        target_cr=fields.number("target_cr", 1.0, least=1, most=_LARGEST_CR),
    )


def _refuse_sidecars(fields: Fields) -> None:
    """Raise ``ValueError`` for what other runtimes have added to FastDMS's file."""
    supported = {
        "schema_version": (1,),
        "sidecar": (),
        "decision_source": ("borrowed_query",),
        "borrowed_query_channel": (-1,),
        "zero_borrowed_query_channel": (True,),
    }
    for key, values in supported.items():
        if fields.get(key) is not None and fields.get(key) not in values:
            fields.refuse(key, " or ".join(map(str, values)) or "left out: weights beside the model are not read")


def _training_log(file: Path) -> Optional[dict]:
    """FastDMS's log; None where there is none, or another program's file of this common name."""
    if not file.is_file():
        return None
    try:
        content = read_json(file)
    except ValueError as error:
        if os.access(file, os.R_OK):
            with file.open("rb") as raw:
                if b'"alpha_offset"' not in raw.read(1 << 16):
                    return None
        raise ValueError(f"{error}; it may describe a DMS model: restore it, or move the model elsewhere") from None
    config = content.get("config")
    known = isinstance(config, dict) and {"window_size", "alpha_scale", "alpha_offset"} <= config.keys()
    return content if known else None


def _dms_config(fields: Fields, keys: Mapping[str, str], **decision: str) -> DMCConfig:
    """Settings of method dms from the three numbers under ``keys``; none of them has a default."""
    window = fields.integer(keys["window"], least=1, most=_LONGEST_WINDOW)
    scale, bias = fields.number(keys["scale"], above=0), fields.number(keys["bias"])
    for key, value in zip(keys.values(), (window, scale, bias), strict=True):
        if value is None:
            raise ValueError(f"{fields.where}{shown_key(key)} is missing; a DMS model needs {', '.join(keys.values())}")
    return DMCConfig(method="dms", window=window, decision_scale=scale, decision_bias=bias, **decision)  # type: ignore[arg-type]


def read_config(path: Path, given: Given = Given()) -> dict:
    """``config.json`` of a directory, in the form of :func:`canonical_config`."""
    return canonical_config(path, read_json(path / "config.json"), given)[0]


def as_json(config: dict) -> bytes:
    """``config.json`` as a file's content."""
    return (json.dumps(config, indent=2) + "\n").encode()
