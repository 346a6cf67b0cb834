"""What a directory holds, in whichever format: for people who were handed one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megatron.dmc.checkpoint import convert, hf, mapping
from megatron.dmc.checkpoint.manifest import complete_checkpoints, read_manifest, resolve_checkpoint
from megatron.dmc.checkpoint.tensors import Lazy
from megatron.dmc.checkpoint.torch_dist import DistReader
from megatron.dmc.config import ModelConfig


def describe(directory: str | Path) -> str:
    """A few lines on a Hugging Face directory, a ``torch_dist`` checkpoint, a --save directory or a legacy one.

    Raises:
        ValueError: it is none of these, or is damaged.
    """
    path = Path(directory)
    if not path.is_dir():
        raise ValueError(f"{path} is not a directory")
    if (path / "config.json").is_file():
        return _huggingface(path)
    if (path / "manifest.json").is_file() or complete_checkpoints(path):
        return _torch_dist(path)
    from megatron.dmc.checkpoint import legacy

    if legacy.is_legacy(path):
        return legacy.describe(path)
    resolve_checkpoint(path)  # raises: says what is missing
    raise ValueError(f"{path} is neither a Hugging Face directory nor a Megatron checkpoint")


def _lines(rows: Iterable[tuple[str, Any]]) -> str:
    kept = [(name, value) for name, value in rows if value not in (None, "")]
    width = max(len(name) for name, _ in kept)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in kept)


def model_rows(model: ModelConfig) -> list[tuple[str, Any]]:
    """Sizes and switches, for :func:`describe`."""
    switches = [name for name in ("add_qkv_bias", "qk_layernorm") if getattr(model, name)]
    if not model.untie_embeddings_and_output_weights:
        switches.append("tied embeddings")
    scaling = (
        f", {model.rope_scaling['rope_type']} scaling x{model.rope_scaling['factor']:g}" if model.rope_scaling else ""
    )
    return [
        (
            "sizes",
            f"{model.num_layers} layers, hidden {model.hidden_size}, ffn {model.ffn_hidden_size}, "
            f"{model.num_attention_heads} query and {model.kv_heads} KV heads of {model.head_dim}, vocabulary "
            f"{model.vocab_size}",
        ),
        ("positions", f"{model.max_position_embeddings}, rope base {model.rotary_base:g}{scaling}"),
        ("switches", ", ".join(switches)),
    ]


def weight_rows(tensors: dict[str, Lazy]) -> list[tuple[str, Any]]:
    """Count, parameters, bytes and types, for :func:`describe`."""
    nbytes = sum(t.nbytes for t in tensors.values())
    elements = sum(t.nbytes // t.dtype.itemsize for t in tensors.values())
    types = Counter(str(t.dtype).removeprefix("torch.") for t in tensors.values())
    size = f"{elements / 1e9:.2f} billion" if elements >= 1e8 else f"{elements:,}"
    return [("weights", f"{len(tensors)} tensors, {size} parameters, {nbytes:,} bytes, {', '.join(types)}")]


def _cr(target: float | None, measured: float | None) -> str | None:
    if not target or target == 1.0:
        return None
    return f"target {target:g}" + (f", measured {measured:.2f}" if measured else "")


def _huggingface(path: Path) -> str:
    found = hf.open_directory(path)
    model, family = mapping.from_hf_config(found.config), mapping.family_of(found.config)
    block, files = found.config.get("dmc") or {}, Counter(found.weight_map.values())
    mapping.dmc_from_hf_config(found.config)
    window = None if not block else block["window"] or "unbounded"
    return _lines(
        [
            ("format", f"Hugging Face directory, {len(files)} weight file{'s' * (len(files) > 1)}"),
            ("family", family.model_type + (" + dmc" if block else "")),
            *model_rows(model),
            ("stage", block and f"{block['stage']}, step {block['step']}"),
            ("compression", block and _cr(block["target_cr"], block["measured_cr"])),
            ("decisions", block and f"bias {block['decision_bias']:g}, window {window}"),
            *weight_rows(found.tensors),
            ("also there", ", ".join(p.name for p in found.side_files())),
        ]
    )


def _torch_dist(path: Path) -> str:
    checkpoint = resolve_checkpoint(path)
    manifest, run = read_manifest(checkpoint), convert.read_run_config(checkpoint)
    reader = DistReader(checkpoint)
    tensors: dict[str, Lazy] = {name: reader.get(name) for name in reader.tensors()}
    chunks = sum(len(entry.chunks) for entry in reader.tensors().values())
    p, others = run.parallel, len(complete_checkpoints(path)) - 1
    is_import = manifest.stage == "import"
    written = "" if is_import else f"written by TP {p.tensor_model_parallel_size} x PP {p.pipeline_model_parallel_size}"
    return _lines(
        [
            (
                "format",
                f"Megatron torch_dist checkpoint {checkpoint.name}"
                + (f" ({others} older beside it)" if others > 0 else ""),
            ),
            (
                "family",
                manifest.family
                or f"none (made by training); exports as {mapping.to_hf_config(run.model, '')['model_type']}",
            ),
            *model_rows(run.model),
            ("stage", manifest.stage + ("" if is_import else f", step {manifest.iteration} of {manifest.train_iters}")),
            ("lineage", " -> ".join(manifest.lineage)),
            ("compression", _cr(manifest.target_cr, manifest.measured_cr)),
            ("layout", ", ".join(filter(None, [f"{chunks} chunks, loads at any TP x PP", written]))),
            *weight_rows(tensors),
            ("optimizer", "yes, training can resume" if manifest.has_optimizer else "no, weights only"),
            ("source", manifest.source),
            ("also there", ", ".join(sorted(p.name for p in (checkpoint / "hf").glob("*")))),
            ("made with", ", ".join(f"{k} {v}" for k, v in manifest.versions.items())),
        ]
    )
