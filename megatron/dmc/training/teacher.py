"""Which checkpoint may teach which run; refused before any memory is taken."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from megatron.dmc import schedule
from megatron.dmc.checkpoint.manifest import Manifest, read_manifest, resolve_checkpoint
from megatron.dmc.config import RunConfig
from megatron.dmc.training import arguments

_FREE = ("max_position_embeddings", "init_method_std")
"""Of the model's settings, those that do not change what the teacher computes on the run's sequences."""


def find_teacher(config: RunConfig) -> tuple[Path, Manifest]:
    """The checkpoint that ``distill_from`` names.

    Raises:
        ValueError: there is none, it compresses, it is half-way through zero_out, or it is of another model.
    """
    asked = Path(config.training.distill_from or "")
    if (asked / "config.json").is_file() and not (asked / "manifest.json").is_file():
        raise ValueError(
            f"distill_from {asked} is a Hugging Face directory; import it first: tools/convert_checkpoint.py "
            "import, and name what that wrote"
        )
    path = resolve_checkpoint(asked)
    manifest = read_manifest(path)
    saved = RunConfig.from_dict(arguments.read_saved_config(path))
    if manifest.stage in ("retrofit", "finetune") or schedule.compresses(saved.stage):
        raise ValueError(
            f"distill_from {path} is of stage {manifest.stage}, which compresses; the teacher is the original model"
        )
    if manifest.stage == "zero_out" and not manifest.finished:
        raise ValueError(f"distill_from {path} stands in the middle of zero_out; name its end, or the original model")
    mine, other = dataclasses.asdict(config.model), dataclasses.asdict(saved.model)
    mine |= dict(num_query_groups=config.model.kv_heads, kv_channels=config.model.head_dim)
    other |= dict(num_query_groups=saved.model.kv_heads, kv_channels=saved.model.head_dim)
    for key in sorted(mine.keys() - set(_FREE)):
        if mine[key] != other[key]:
            raise ValueError(
                f"distill_from {path} has model.{key} {other[key]!r}, this run {mine[key]!r}; the teacher runs in the "
                "same layout and must be of the same model"
            )
    return path, manifest
