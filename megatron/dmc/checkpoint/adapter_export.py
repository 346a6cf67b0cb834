"""Adapters of a DMS checkpoint as a directory of their own, beside the unchanged model that they belong to."""

import dataclasses
import math
from pathlib import Path
from typing import Any, Optional

from megatron.dmc import __version__
from megatron.dmc.checkpoint import checksums, mapping
from megatron.dmc.checkpoint.convert import Progress, announce, writing
from megatron.dmc.checkpoint.formats import adapter, dms, hf, torch_dist
from megatron.dmc.checkpoint.formats.base import Source
from megatron.dmc.checkpoint.model_card import front_matter, method_text
from megatron.dmc.checkpoint.staging import staged


def export_adapter(
    load: str | Path,
    save: str | Path,
    *,
    base_model: Optional[str] = None,
    decision_bias: Optional[float] = None,
    overwrite: bool = False,
    progress: Optional[Progress] = None,
) -> Path:
    """Write the adapters of a checkpoint, with the name and the SHA-256 of the model below them.

    Args:
        base_model: name of the base for people, such as ``Qwen/Qwen3-8B``; or its directory, which then must hold the
            checkpoint's weights. None: the name that the checkpoint has for it.
        decision_bias: logit from which on a token is marked, in place of the one that was trained with: a higher one
            evicts less. The ratio that was measured in training is left out then. None: the trained one.

    Raises:
        ValueError: ``decision_bias`` is not finite; the checkpoint has no adapters; ``base_model`` is a directory with
            other weights; or ``save`` exists and ``overwrite`` is False.
    """
    if decision_bias is not None and not math.isfinite(decision_bias):
        raise ValueError(f"decision_bias is {decision_bias}; give a number of logits, such as 5")
    save, progress = Path(save), progress or Progress()
    source = torch_dist.open_model(Path(load))
    tensors = {name: tensor for name, tensor in source.tensors.items() if mapping.is_adapter(name)}
    if not tensors:
        dmc = source.run.dmc
        what = f"method {dmc.method}, decisions from {dmc.decision_source}" if source.is_dmc else "a plain model"
        raise ValueError(f"{source.path} has no adapters ({what}); export the whole model, without --adapter-only")
    digest = adapter.weights_sha256(
        {
            name: tensor
            for name, tensor in source.tensors.items()
            if not mapping.is_adapter(name) and _once(name, source)
        }
    )
    if base_model is not None and Path(base_model).is_dir():
        _check_same(Path(base_model), digest, source.path)
        base_model = Path(base_model).name
    if decision_bias is not None:
        source = _with_bias(source, decision_bias)
    config = _config(source, base_model or _name(source), digest)
    announce(f"export the adapters of {source.path} -> {save}", tensors, save, progress)
    with writing(save), staged(save, overwrite) as directory:
        crc32 = {hf.SINGLE: hf.write_safetensors(directory / hf.SINGLE, tensors, progress.block)}
        (directory / "config.json").write_bytes(dms.as_json(config))
        (directory / "README.md").write_text(_card(source, config), encoding="utf-8")
        checksums.write_file(directory, crc32)
    progress.warn()
    return save


def _with_bias(source: Source, decision_bias: float) -> Source:
    """A checkpoint of adapters with another decision bias, without the compression ratio that was measured before."""
    block = {key: value for key, value in source.config["dmc"].items() if key != "measured_cr"}
    return dataclasses.replace(
        source,
        config=source.config | {"dmc": block | {"decision_bias": decision_bias}},
        run=dataclasses.replace(source.run, dmc=dataclasses.replace(source.run.dmc, decision_bias=decision_bias)),
        manifest=dataclasses.replace(source.manifest, measured_cr=None),
    )


def _once(name: str, source: Source) -> bool:
    """False for the second copy of tied embeddings."""
    return name != "lm_head.weight" or source.run.model.untie_embeddings_and_output_weights


def _check_same(base: Path, digest: str, checkpoint: Path) -> None:
    found = adapter.weights_sha256(adapter.base_tensors(hf.open_directory(base)))
    if found != digest:
        raise ValueError(
            f"{base} is not the base of {checkpoint}: its weights have SHA-256 {found[:16]}..., the checkpoint's "
            f"{digest[:16]}...; train the adapters alone (--freeze-base), or export the whole model"
        )


def _name(source: Source) -> Optional[str]:
    """Name of the model at the beginning of the lineage, as far as the checkpoint knows it."""
    name = source.config.get("_name_or_path")
    if isinstance(name, str) and name:
        return Path(name).name if Path(name).is_absolute() else name
    return Path(source.manifest.source).name if source.manifest.source else None


def _config(source: Source, base_model: Optional[str], digest: str) -> dict[str, Any]:
    model = source.run.model
    sizes = (model.num_layers, model.hidden_size, model.kv_heads)
    return {
        "model_type": mapping.ADAPTER_MODEL_TYPE,
        "base_model": base_model,
        "base_weights_sha256": digest,
        **dict(zip(adapter.SIZES, sizes, strict=True)),
        "dmc": source.config["dmc"],
    }


def _card(source: Source, config: dict[str, Any]) -> str:
    base = config["base_model"] or "BASE"
    tags = ["dmc", "kv-cache-compression", "adapter"]
    return "\n".join(
        [
            *front_matter(tags, base_model=config["base_model"]),
            "",
            f"# DMS adapters for {base}",
            "",
            method_text(source),
            "",
            f"Exported by megatron.dmc {__version__} from step {source.manifest.iteration}. This directory has the "
            f"adapters alone; the weights of {base} are as they were (SHA-256 {config['base_weights_sha256']}, "
            "docs/conversion.md).",
            "",
            "    dmc serve BASE --adapter DIR",
            "    dmc convert merge-adapter --hf BASE --adapter DIR --save MODEL",
            "",
        ]
    )
