"""``torch_dist`` checkpoints: Megatron's distributed format, as training and import write it, with a manifest.

The format is that of ``torch.distributed.checkpoint`` as megatron-core 0.16.1 uses it, with the layers of a parameter
stacked in a first dimension. Neither Megatron nor several processes are needed to read or write it.
"""

from collections.abc import Mapping
from pathlib import Path

from megatron.dmc.checkpoint import mapping
from megatron.dmc.checkpoint.formats import hf
from megatron.dmc.checkpoint.formats.base import (
    Given,
    Row,
    Source,
    compare_names,
    cr_row,
    decision_rows,
    model_rows,
    weight_row,
)
from megatron.dmc.checkpoint.formats.torch_dist.reader import DistReader
from megatron.dmc.checkpoint.formats.torch_dist.writer import CHUNK_BYTES, DistWriter
from megatron.dmc.checkpoint.frozen_base import find_base
from megatron.dmc.checkpoint.manifest import (
    HF_FILES,
    SHARDS_FILE,
    Manifest,
    check_contents,
    complete_checkpoints,
    read_hf_files,
    read_manifest,
    resolve_checkpoint,
)
from megatron.dmc.checkpoint.mapping import views
from megatron.dmc.checkpoint.mapping.views import Key
from megatron.dmc.checkpoint.tensors import Lazy
from megatron.dmc.config import ModelConfig, RunConfig, load_file

__all__ = ["CHUNK_BYTES", "DistReader", "DistWriter", "describe", "matches", "open_model", "read_run_config"]


def matches(path: Path) -> bool:
    """True for a checkpoint, or a --save directory with one."""
    return (path / "manifest.json").is_file() or bool(complete_checkpoints(path))


def read_run_config(checkpoint: Path) -> RunConfig:
    """Configuration that was saved with a checkpoint."""
    return RunConfig.from_dict(load_file(checkpoint / "config.yaml"))


def open_model(path: Path, given: Given = Given()) -> Source:
    """The model in a checkpoint of any stage and layout, or in the newest one of a --save directory.

    Raises:
        ValueError: it is incomplete, damaged, or cannot be expressed in a Hugging Face directory.
    """
    checkpoint = resolve_checkpoint(path)
    manifest, run = read_manifest(checkpoint), read_run_config(checkpoint)
    if manifest.stage == "zero_out" and not manifest.finished:
        raise ValueError(
            f"{checkpoint} is in the middle of zero_out (iteration {manifest.iteration} of {manifest.train_iters}), "
            "where attention depends on the step; let it finish, or export the checkpoint before it"
        )
    _check_contents(checkpoint, manifest)
    if (base := find_base(checkpoint, manifest)) != checkpoint:
        _check_contents(base, read_manifest(base))
    stored, model = _stored(checkpoint, base), run.model
    config = _config(checkpoint, stored, model)
    if manifest.stage in ("zero_out", *mapping.COMPRESSED_STAGES):
        config = mapping.dmc_config(config, run, manifest)
    family = mapping.family_of(config)
    parameters = _parameters(checkpoint, stored, family, model)
    tensors = views.to_hf(family, model, parameters)
    weight_map = _weight_map(checkpoint, tensors, model)
    return Source(
        path=checkpoint,
        kind=f"{family.model_type}{f' + {run.dmc.method}' if 'dmc' in config else ''}, stage {manifest.stage}",
        family=family,
        config=config,
        run=run,
        manifest=manifest,
        tensors=tensors,
        parameters=parameters,
        weight_map=weight_map,
        files=read_hf_files(checkpoint),
    )


def _stored(checkpoint: Path, base: Path) -> dict[str, DistReader]:
    """Name of a parameter -> reader of the checkpoint that has it: of adapters alone, or of the frozen base."""
    readers = [DistReader(path) for path in dict.fromkeys((base, checkpoint))]
    return {name: reader for reader in readers for name in reader.tensors()}


def _check_contents(checkpoint: Path, manifest: Manifest) -> None:
    """Compare what a conversion reads with its checksums: the model's tensors, and all files but those of tensors.

    The optimizer's state, which is most of a training checkpoint, lies between the tensors and is left out.
    """
    check_contents(checkpoint, manifest, [name for name in manifest.files if not name.endswith(".distcp")])
    reader = DistReader(checkpoint)
    if odd := reader.damaged_files(reader.tensors()):
        check_contents(checkpoint, manifest, odd)
        if unknown := sorted(odd - manifest.crc32.keys()):
            raise ValueError(
                f"checkpoint {checkpoint} is damaged, tensors in {', '.join(unknown[:5])} differ from their checksums; "
                "restore it from a copy, or name another checkpoint"
            )


def _config(checkpoint: Path, stored: Mapping[str, DistReader], model: ModelConfig) -> dict:
    """The plain family's ``config.json``: the original one as training has changed it, or a new one."""
    dtype = str(hf.main_dtype(reader.get(name) for name, reader in stored.items())).removeprefix("torch.")
    original = checkpoint / HF_FILES / "config.json"
    if original.is_file():
        return mapping.changed_config(hf.read_json(original), model, dtype)
    return mapping.to_hf_config(model, dtype)


def _parameters(
    checkpoint: Path, stored: Mapping[str, DistReader], family: mapping.Family, model: ModelConfig
) -> dict[Key, Lazy]:
    for reader in dict.fromkeys(stored.values()):
        _check_layers(reader, model)
    compare_names(stored, {rule.megatron for rule in mapping.rules(family, model)}, str(checkpoint))
    parameters: dict[Key, Lazy] = {}
    for rule, layer in mapping.in_order(family, model):
        reader = stored[rule.megatron]
        parameter, shape = reader.get(rule.megatron, layer), rule.megatron_shape(model)
        if parameter.shape != shape:
            raise ValueError(
                f"{parameter.name} in {reader.directory} has shape {list(parameter.shape)}; expected {list(shape)} "
                "from its config.yaml"
            )
        parameters[rule.megatron, layer] = parameter
    return parameters


def _check_layers(reader: DistReader, model: ModelConfig) -> None:
    """Raise ``ValueError`` when the stacked tensors are not of as many layers as the configuration says."""
    for name, entry in reader.tensors().items():
        if name.startswith("decoder.layers.") and entry.size[0] != model.num_layers:
            raise ValueError(
                f"{name} in {reader.directory} is of {entry.size[0]} layers; expected {model.num_layers} from its "
                "config.yaml"
            )


def _weight_map(checkpoint: Path, tensors: dict[str, Lazy], model: ModelConfig) -> dict[str, str]:
    """File of every tensor: as in the model that was imported, when it had the same tensors."""
    layout = checkpoint / HF_FILES / SHARDS_FILE
    weight_map = hf.read_json(layout) if layout.is_file() else {}
    if "lm_head.weight" in weight_map and not model.untie_embeddings_and_output_weights:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]  # a duplicate that the source had
    return weight_map if set(weight_map) == set(tensors) else hf.shard_layout(tensors)


def describe(path: Path) -> list[Row]:
    """Model, stage and layout of a checkpoint, or of the newest one of a --save directory."""
    checkpoint = resolve_checkpoint(path)
    manifest, run = read_manifest(checkpoint), read_run_config(checkpoint)
    reader = DistReader(checkpoint)
    entries = reader.tensors()
    older = len(complete_checkpoints(path)) - 1
    family = manifest.family or (
        f"none (made by training); exports as {mapping.to_hf_config(run.model, '')['model_type']}"
    )
    return [
        ("format", f"Megatron torch_dist checkpoint {checkpoint.name}" + f" ({older} older beside it)" * (older > 0)),
        ("family", family),
        *model_rows(run.model),
        *_training_rows(manifest, run, sum(len(entry.chunks) for entry in entries.values())),
        weight_row(reader.get(name) for name in entries),
        ("optimizer", "yes, training can resume" if manifest.has_optimizer else "no, weights only"),
        ("source", manifest.source),
        ("frozen base", manifest.base and f"{manifest.base}; this checkpoint holds adapters alone"),
        ("also there", ", ".join(_names(checkpoint / HF_FILES))),
        ("made with", ", ".join(f"{k} {v}" for k, v in manifest.versions.items())),
    ]


def _names(directory: Path) -> list[str]:
    return sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())


def _training_rows(manifest: Manifest, run: RunConfig, chunks: int) -> list[Row]:
    stage, layout = manifest.stage, f"{chunks} chunks, loads at any TP x PP"
    if manifest.stage != "import":
        stage += f", step {manifest.iteration} of {manifest.train_iters}"
        parallel = run.parallel
        layout += f", written by TP {parallel.tensor_model_parallel_size} x PP {parallel.pipeline_model_parallel_size}"
    return [
        ("stage", stage),
        ("lineage", " -> ".join(manifest.lineage)),
        cr_row({"target_cr": manifest.target_cr, "measured_cr": manifest.measured_cr}),
        *(decision_rows(run.dmc) if manifest.stage in ("zero_out", *mapping.COMPRESSED_STAGES) else []),
        ("layout", layout),
    ]
