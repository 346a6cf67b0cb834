"""Import and export: a Hugging Face directory to a ``torch_dist`` checkpoint and back, streaming.

Reading, composing and writing are :mod:`hf`, :mod:`views` and :mod:`torch_dist`; here they meet. A result appears under
its name only when it is complete, with everything synced to disk.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Optional

import torch
import yaml
from torch import Tensor

from megatron.dmc import __version__
from megatron.dmc.checkpoint import hf, mapping, views
from megatron.dmc.checkpoint.manifest import (
    HF_FILES,
    Manifest,
    read_hf_files,
    read_manifest,
    resolve_checkpoint,
    write_hf_files,
)
from megatron.dmc.checkpoint.staging import staged
from megatron.dmc.checkpoint.tensors import Buffers, Lazy, equal, has_only_finite
from megatron.dmc.checkpoint.torch_dist import CHUNK_BYTES, DistReader, DistWriter
from megatron.dmc.config import DMCConfig, ModelConfig, RunConfig, load_file
from megatron.dmc.environment import versions

SHARDS_FILE = "shards.json"
REMOTE_CODE = Path(__file__).parent / "remote_code"
Say = Callable[[str], None]


@dataclass
class Progress:
    """What a conversion reports while it runs."""

    say: Say = print
    begin: Callable[[int], None] = lambda n: None
    """Gets the bytes that there are."""
    advance: Callable[[int], None] = lambda n: None
    """Gets the bytes of every block."""
    not_finite: set[str] = field(default_factory=set)
    """Tensors with a NaN or an infinity."""

    def block(self, name: str, block: Tensor) -> None:
        if not has_only_finite(block):
            self.not_finite.add(name)
        self.advance(block.nbytes)

    def warn(self) -> None:
        if self.not_finite:
            names = sorted(self.not_finite)
            self.say(
                f"warning: {len(names)} tensors hold NaN or infinite values: {', '.join(names[:10])}"
                f"{', ...' if len(names) > 10 else ''}"
            )


def _size(n: float) -> str:
    return f"{n / 1e9:.2f} GB" if n >= 1e8 else f"{n / 1e6:.1f} MB"


def plan(what: str, tensors: Mapping[str, Lazy], target: Path, progress: Progress) -> None:
    """Say what is about to happen; refuse when the disk cannot hold it.

    Raises:
        ValueError: too little free disk.
    """
    nbytes = sum(t.nbytes for t in tensors.values())
    elements = sum(t.nbytes // t.dtype.itemsize for t in tensors.values())
    largest = max(t.nbytes for t in tensors.values())
    there = target.absolute()
    while not there.exists():
        there = there.parent
    free = shutil.disk_usage(there).free
    # Blocks are at most a chunk (rows that alone are larger come whole); a few are in flight, and of each size.
    memory = 2 * Buffers.DEPTH * min(largest, CHUNK_BYTES) + (256 << 20)
    progress.say(
        f"{what}: {len(tensors)} tensors, {elements / 1e9:.2f} billion parameters, {_size(nbytes)} to read and write; "
        f"at most {_size(memory)} of memory beside the interpreter's; {_size(free)} free on disk; about "
        f"{nbytes / 5e8 / 60:.0f} min at 0.5 GB/s"
    )
    if free < nbytes * 1.01:
        raise ValueError(
            f"{target} needs {_size(nbytes)} and its disk has {_size(free)} free; make room, or name another place"
        )
    progress.begin(nbytes)


@contextmanager
def writing(target: Path) -> Iterator[None]:
    """Turn a disk that is full or fails into a ``ValueError`` that names the file."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EIO):
            raise ValueError(
                f"writing {error.filename or target} failed: {error.strerror}; nothing was left behind"
            ) from error
        raise


def check_tensors(
    tensors: Mapping[str, Lazy], family: mapping.Family, model: ModelConfig, where: str
) -> dict[str, Lazy]:
    """The tensors that the model is made of, after names, shapes and dtypes were checked.

    Raises:
        ValueError: naming tensor, expected and found.
    """
    shapes = mapping.hf_shapes(family, model)
    kept = {name: t for name, t in tensors.items() if not name.endswith(family.dropped)}
    duplicate = {} if model.untie_embeddings_and_output_weights else {"lm_head.weight"} & set(kept)
    hf.compare_names(set(kept) - set(duplicate), shapes, where)
    for name in duplicate:
        if not equal(kept[name], kept["model.embed_tokens.weight"]):
            raise ValueError(
                f"{kept[name].name} differs from model.embed_tokens.weight, but tie_word_embeddings is true"
            )
    for name, shape in shapes.items():
        if kept[name].shape != shape:
            raise ValueError(
                f"{kept[name].name} has shape {list(kept[name].shape)}; expected {list(shape)} from config.json"
            )
    dtypes = {t.dtype for t in kept.values()}
    if len(dtypes) > 1:
        odd = min(dtypes, key=lambda d: sum(t.dtype == d for t in kept.values()))
        name = next(t.name for t in kept.values() if t.dtype == odd)
        raise ValueError(
            f"{name} is of type {odd}, others of {', '.join(str(d) for d in dtypes - {odd})}; expected one type"
        )
    return kept


def write_checkpoint(
    directory: Path,
    parameter: Callable[[mapping.TensorRule, Optional[int]], Lazy],
    family: mapping.Family,
    model: ModelConfig,
    progress: Progress,
) -> None:
    """The weights as ``torch_dist``. ``parameter`` gives Megatron's tensor for (rule, layer)."""
    with DistWriter(directory) as writer:
        for rule, layer in mapping.in_order(family, model):
            tensor = parameter(rule, layer)
            parts = len(rule.hf) if rule.transform == "gate_up" else 1
            stacked = None if layer is None else (layer, model.num_layers)
            for block in writer.write(rule.megatron, tensor, layer=stacked, split=rule.split, parts=parts):
                progress.block(tensor.name, block)


def imported_run(model: ModelConfig, dmc: DMCConfig, manifest: Manifest) -> RunConfig:
    """The configuration that goes with imported weights. What it says of training is only what later stages ask for."""
    run = RunConfig(model=model, dmc=dmc)
    run.stage.stage, run.stage.train_iters = "pretrain", 1
    if manifest.stage in mapping.COMPRESSED_STAGES:
        run.stage.stage, run.stage.target_cr = manifest.stage, manifest.target_cr  # type: ignore[assignment]
    run.data.seq_length = min(run.data.seq_length, model.max_position_embeddings)
    return run


def import_hf(
    source: str | Path, save: str | Path, *, overwrite: bool = False, progress: Optional[Progress] = None
) -> Path:
    """A Hugging Face directory as a ``torch_dist`` checkpoint that any tensor- and pipeline-parallel layout loads.

    Args:
        source: directory with config.json and safetensors or ``pytorch_model*.bin``; plain, or an exported DMC model.
        save: the checkpoint's directory, for ``--init-from``.

    Raises:
        ValueError: anything in the source that is missing, damaged or not understood, by name.
    """
    source, save, progress = Path(source), Path(save), progress or Progress()
    directory = hf.open_directory(source)
    model = mapping.from_hf_config(directory.config)
    dmc = mapping.dmc_from_hf_config(directory.config)
    family = mapping.family_of(directory.config)
    tensors = check_tensors(directory.tensors, family, model, str(source))
    dropped = sorted(set(directory.tensors) - set(tensors))
    if dropped:
        progress.say(
            f"left out (computed from the configuration): {', '.join(dropped[:3])}{', ...' if dropped[3:] else ''}"
        )
    plan(f"import {source} ({family.model_type}) -> {save}", tensors, save, progress)
    manifest = _manifest(directory.config, family, source)
    run = imported_run(model, dmc or DMCConfig(), manifest)
    with writing(save), staged(save, overwrite) as temporary:
        write_checkpoint(
            temporary, lambda rule, layer: views.to_megatron(rule, layer, tensors, model), family, model, progress
        )
        files = {path.name: path.read_bytes() for path in directory.side_files()}
        files["config.json"] = (source / "config.json").read_bytes()
        layout = hf.safetensors_names({name: directory.weight_map[name] for name in tensors})
        files[SHARDS_FILE] = json.dumps(layout, indent=1).encode()
        finish_checkpoint(temporary, run, manifest, files)
    progress.warn()
    return save


def finish_checkpoint(directory: Path, run: RunConfig, manifest: Manifest, files: Mapping[str, bytes]) -> None:
    """What a checkpoint has beside its weights."""
    write_hf_files(directory, files)
    (directory / "config.yaml").write_text(yaml.safe_dump(run.to_dict(), sort_keys=False))
    manifest.write(directory)


def _manifest(config: dict, family: mapping.Family, source: Path) -> Manifest:
    block = config.get("dmc") or {}
    stage = block.get("stage", "import")
    step = int(block.get("step") or 0)
    return Manifest(
        stage=stage,
        iteration=step,
        train_iters=step,
        consumed_samples=0,
        consumed_tokens=0,
        target_cr=float(block.get("target_cr") or 1.0),
        measured_cr=block.get("measured_cr"),
        source=source.name,
        versions=versions(),
        has_optimizer=False,
        family=family.model_type,
    )


@dataclass
class Export:
    """A checkpoint as a Hugging Face directory would have it: configuration, tensors, layout. Nothing is read yet."""

    checkpoint: Path
    manifest: Manifest
    run: RunConfig
    family: mapping.Family
    config: dict
    tensors: dict[str, Lazy]
    weight_map: dict[str, str]


def read_run_config(checkpoint: Path) -> RunConfig:
    """The configuration that was saved with a checkpoint."""
    return RunConfig.from_dict(load_file(checkpoint / "config.yaml"))


def open_checkpoint(load: str | Path) -> Export:
    """Look at a ``torch_dist`` checkpoint of any stage and layout as Hugging Face tensors.

    Raises:
        ValueError: it is incomplete, damaged, or cannot be expressed in a Hugging Face directory.
    """
    checkpoint = resolve_checkpoint(load)
    manifest, run = read_manifest(checkpoint), read_run_config(checkpoint)
    if manifest.stage == "zero_out" and not manifest.finished:
        raise ValueError(
            f"{checkpoint} is in the middle of zero_out (iteration {manifest.iteration} of {manifest.train_iters}), "
            "where attention depends on the step; let it finish, or export the checkpoint before it"
        )
    original = (
        hf.read_json(checkpoint / HF_FILES / "config.json")
        if (checkpoint / HF_FILES / "config.json").is_file()
        else None
    )
    reader = DistReader(checkpoint)
    found = reader.tensors()
    dtype = next(iter(found.values())).properties.dtype
    config = _exported_config(original, run.model, dtype)
    family = mapping.family_of(config)
    tensors: dict[str, Lazy] = {}
    hf.compare_names(found, {rule.megatron for rule in mapping.rules(family, run.model)}, str(checkpoint))
    for rule, layer in mapping.in_order(family, run.model):
        parameter = reader.get(rule.megatron, layer)
        shape = views.megatron_shape(rule, run.model)
        if parameter.shape != shape:
            raise ValueError(
                f"{parameter.name} in {checkpoint} has shape {list(parameter.shape)}; expected {list(shape)} from its "
                "config.yaml"
            )
        tensors |= views.to_hf(rule, layer, parameter, run.model)
    layout = checkpoint / HF_FILES / SHARDS_FILE
    weight_map = hf.read_json(layout) if layout.is_file() else None
    if weight_map and "lm_head.weight" in weight_map and not run.model.untie_embeddings_and_output_weights:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]  # a duplicate that the source had
    if weight_map is None or set(weight_map) != set(tensors):
        weight_map = hf.shard_layout(tensors)
    if manifest.stage in ("zero_out", *mapping.COMPRESSED_STAGES):
        config = dmc_config(config, family, run, manifest)
    return Export(checkpoint, manifest, run, family, config, tensors, weight_map)


def _exported_config(original: Optional[dict], model: ModelConfig, dtype: torch.dtype) -> dict:
    """The plain family's config.json: the original one, with what training was told to change."""
    text = str(dtype).removeprefix("torch.")
    if original is None:
        return mapping.to_hf_config(model, text)
    config = dict(mapping.base_config(original))
    if "dtype" in config or "torch_dtype" in config:
        config["dtype" if "dtype" in config else "torch_dtype"] = text
    config |= mapping.changed_sizes(mapping.from_hf_config(config), model)
    ignored = dict(
        make_vocab_size_divisible_by=model.make_vocab_size_divisible_by,
        num_query_groups=model.kv_heads,
        kv_channels=model.head_dim,
    )
    now, wanted = dataclasses.replace(mapping.from_hf_config(config), **ignored), dataclasses.replace(model, **ignored)
    if now != wanted:
        odd = [f.name for f in dataclasses.fields(model) if getattr(now, f.name) != getattr(wanted, f.name)]
        raise ValueError(
            f"{', '.join(odd)}: the run changed what config.json of the original model says; this cannot be exported"
        )
    return config


def dmc_config(config: dict, family: mapping.Family, run: RunConfig, manifest: Manifest) -> dict:
    """``config.json`` of a retrofitted model:
    its own names, so that a plain loader refuses it, and the ``dmc`` block.
    """
    block = {
        "format_version": mapping.DMC_FORMAT_VERSION,
        "base_model_type": family.model_type,
        "decision_bias": run.dmc.decision_bias,
        "window": run.dmc.window,
        "importance_epsilon": run.dmc.importance_epsilon,
        "add_qkv_bias": run.model.add_qkv_bias,
        "qk_layernorm": run.model.qk_layernorm,
        "stage": manifest.stage,
        "step": manifest.iteration,
        "target_cr": manifest.target_cr,
        "measured_cr": manifest.measured_cr,
    }
    if run.dmc.method != "dmc":
        block["method"] = run.dmc.method
    own = {
        "architectures": [mapping.DMC_ARCHITECTURE],
        "model_type": mapping.DMC_MODEL_TYPE,
        "auto_map": mapping.DMC_AUTO_MAP,
    }
    return {**config, **own, "dmc": block}


def export(
    load: str | Path,
    save: str | Path,
    *,
    overwrite: bool = False,
    tokenizer: Optional[str | Path] = None,
    progress: Optional[Progress] = None,
) -> Path:
    """A checkpoint of any stage and layout as a Hugging Face directory.

    A model that was never retrofitted becomes its plain family, which transformers loads unchanged; any other one
    carries a ``dmc`` block and its own modelling file (``trust_remote_code=True``).

    Args:
        tokenizer: directory or sentencepiece model, for checkpoints whose lineage has no Hugging Face files. None: the
            one that the run was configured with, when it is still there.

    Raises:
        ValueError: see :func:`open_checkpoint`; or ``save`` exists and ``overwrite`` is False.
    """
    save, progress = Path(save), progress or Progress()
    found = open_checkpoint(load)
    is_dmc = "dmc" in found.config
    kind = f"{found.family.model_type}{' + dmc' if is_dmc else ''}"
    plan(f"export {found.checkpoint} ({kind}, stage {found.manifest.stage}) -> {save}", found.tensors, save, progress)
    side = _side_files(found, tokenizer, progress.say)
    with writing(save), staged(save, overwrite) as temporary:
        hf.write_weights(temporary, found.tensors, found.weight_map, progress.block)
        (temporary / "config.json").write_text(json.dumps(found.config, indent=2) + "\n", encoding="utf-8")
        for name, content in side.items():
            (temporary / name).write_bytes(content)
        if is_dmc:
            for path in REMOTE_CODE.glob("*_dmc.py"):
                shutil.copyfile(path, temporary / path.name)
        (temporary / "README.md").write_text(model_card(found), encoding="utf-8")
    progress.warn()
    return save


def _side_files(found: Export, tokenizer: Optional[str | Path], say: Say) -> dict[str, bytes]:
    files = {k: v for k, v in read_hf_files(found.checkpoint).items() if k not in ("config.json", SHARDS_FILE)}
    if tokenizer is None and any(name in files for name in hf.TOKENIZER_FILES):
        return files
    path = Path(tokenizer or found.run.data.tokenizer or "")
    if tokenizer is not None and not path.exists():
        raise ValueError(f"tokenizer {tokenizer} does not exist; name a sentencepiece model or a tokenizer directory")
    if path.is_dir() and (tokenizer or found.run.data.tokenizer):
        files |= {name: (path / name).read_bytes() for name in hf.TOKENIZER_FILES if (path / name).is_file()}
    elif path.is_file():
        files |= _sentencepiece_files(path)
    if not any(name in files for name in hf.TOKENIZER_FILES):
        say("warning: no tokenizer was found; give --tokenizer, or copy its files into the directory")
    return files


def _sentencepiece_files(path: Path) -> dict[str, bytes]:
    """A sentencepiece model as transformers wants it: the model, and which special tokens it has."""
    from sentencepiece import SentencePieceProcessor

    try:
        model = SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError) as error:
        raise ValueError(f"tokenizer {path} is not a sentencepiece model: {error}") from error
    ids = {"bos": model.bos_id(), "eos": model.eos_id(), "unk": model.unk_id(), "pad": model.pad_id()}
    ids = {name: number for name, number in ids.items() if number >= 0}
    tokens = {f"{name}_token": model.id_to_piece(number) for name, number in ids.items()}
    # As the data was prepared: documents end with EOS and begin with nothing, not even a space that the model does not
    # add.
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": False,
        "add_eos_token": False,
        "legacy": False,
        "add_prefix_space": model.encode("x", out_type=str)[0].startswith("\u2581"),
        **tokens,
    }
    generation = {f"{name}_token_id": number for name, number in ids.items() if name != "unk"}
    return {
        "tokenizer.model": path.read_bytes(),
        "tokenizer_config.json": json.dumps(config, indent=2).encode(),
        "generation_config.json": json.dumps(generation, indent=2).encode(),
    }


def model_card(found: Export) -> str:
    """README.md of an exported directory."""
    manifest, model = found.manifest, found.run.model
    lineage = " -> ".join([*manifest.lineage, manifest.stage])
    lines = [
        "---",
        "library_name: transformers",
        "tags:",
        *(["- dmc", "- kv-cache-compression"] if "dmc" in found.config else []),
        f"- {found.family.model_type}",
        "---",
        "",
        f"# {found.checkpoint.parent.name or 'model'}",
        "",
    ]
    lines += [
        f"{found.family.model_type}, {model.num_layers} layers, hidden size {model.hidden_size}, "
        f"{model.num_attention_heads} "
        f"query and {model.kv_heads} KV heads. Exported by megatron.dmc {__version__} "
        f"from stage {manifest.stage}, step {manifest.iteration} (lineage: {lineage})."
    ]
    if manifest.stage in mapping.COMPRESSED_STAGES:
        measured = f"{manifest.measured_cr:.2f}" if manifest.measured_cr else "not measured"
        lines += [
            "",
            f"Retrofitted with Dynamic Memory Compression (arXiv 2403.09636) to {manifest.target_cr:g}x: every KV head "
            f"decides token by token to append to its cache or to merge into its last slot. Measured compression "
            f"ratio at the end of training: {measured}. Decision bias {found.run.dmc.decision_bias:g}, window "
            f"{found.run.dmc.window or 'unbounded'}.",
        ]
    if "dmc" in found.config:
        lines += [
            "",
            "```python",
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            'model = AutoModelForCausalLM.from_pretrained("DIR", trust_remote_code=True)',
            'tokenizer = AutoTokenizer.from_pretrained("DIR")',
            "```",
            "",
            "The weights are not those of a plain model: a loader that ignores the `dmc` block gives nonsense.",
        ]
    return "\n".join(lines) + "\n"
