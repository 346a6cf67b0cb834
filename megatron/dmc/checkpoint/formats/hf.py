"""Hugging Face model directories: read tensor by tensor, written shard by shard, never a shard in memory."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import torch
from safetensors import SafetensorError, safe_open

from megatron.dmc.checkpoint import mapping
from megatron.dmc.checkpoint.direct import DirectFile
from megatron.dmc.checkpoint.formats.base import (
    Given,
    Row,
    Source,
    compare_names,
    cr_row,
    imported_run,
    model_rows,
    weight_row,
)
from megatron.dmc.checkpoint.manifest import SHARDS_FILE, Manifest
from megatron.dmc.checkpoint.mapping import views
from megatron.dmc.checkpoint.pickled import load_lazily
from megatron.dmc.checkpoint.tensors import BackgroundWriter, Buffers, FileTensor, Lazy, equal
from megatron.dmc.config import DMCConfig, ModelConfig
from megatron.dmc.environment import versions

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_BIN_INDEX, _BIN_SINGLE = "pytorch_model.bin.index.json", "pytorch_model.bin"
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
TOKENIZER_FILES = tuple(
    "tokenizer.json tokenizer.model tokenizer_config.json special_tokens_map.json added_tokens.json vocab.json "
    "merges.txt chat_template.jinja chat_template.json tekken.json".split()
)
SHARD_BYTES = 5 * 10**9
"""Size of shards whose layout is ours to choose; transformers' own default of many years."""


@dataclass
class HFDirectory:
    """A model directory: its configuration and where its tensors are. :func:`open_directory` makes it."""

    path: Path
    config: dict
    tensors: dict[str, Lazy]
    """Name -> tensor, in the order of the files and of the tensors inside each."""
    weight_map: dict[str, str]
    """Name of a tensor -> name of its file."""

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def side_files(self) -> list[Path]:
        """Tokenizer files and generation configuration that are there."""
        paths = [self.path / name for name in (*TOKENIZER_FILES, "generation_config.json")]
        return [path for path in paths if path.is_file()]


def read_json(path: Path) -> dict:
    """A JSON object. Raises ``ValueError`` with the file's name when it is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, not {type(content).__name__}")
    return content


def read_safetensors(path: Path) -> dict[str, FileTensor]:
    """The tensors of one file, in their order. Raises ``ValueError`` when it is damaged or a tensor is no float."""
    try:
        with safe_open(str(path), framework="pt") as file:  # checks the header against the file's size
            names = list(file.keys())
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a complete safetensors file ({error}); copy it again") from error
    with path.open("rb") as raw:
        length = int.from_bytes(raw.read(8), "little")
        header = json.loads(raw.read(length))
    tensors = {}
    for name in sorted(names, key=lambda n: header[n]["data_offsets"]):
        entry = header[name]
        if entry["dtype"] not in DTYPES:
            raise ValueError(
                f"{name} in {path} is of type {entry['dtype']}; expected {', '.join(DTYPES)} (quantized weights "
                "must be converted first)"
            )
        start, _ = entry["data_offsets"]
        tensors[name] = FileTensor(path, 8 + length + start, entry["shape"], DTYPES[entry["dtype"]], name)
    return tensors


def _read_bin(path: Path) -> dict[str, Lazy]:
    content = load_lazily(path)
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    odd = [type(content).__name__]
    if isinstance(content, dict):
        odd = [name for name, value in content.items() if not isinstance(value, Lazy)]
    if odd:
        raise ValueError(f"{path} holds {odd[0]}, which is no dense tensor; expected a state dict")
    for name, tensor in content.items():
        if tensor.dtype not in _NAMES:
            raise ValueError(f"{name} in {path} is of type {tensor.dtype}; expected {', '.join(DTYPES)}")
    return content


def open_directory(path: str | Path) -> HFDirectory:
    """Open a directory with ``config.json`` and weights: safetensors, or ``pytorch_model*.bin`` read without running
    code.

    Raises:
        ValueError: a file is missing, truncated, or does not hold what its index says; naming file and tensor.
    """
    path = Path(path)
    if not path.is_dir():
        raise ValueError(f"{path} is not a directory; name a Hugging Face model directory")
    config = read_json(path / "config.json")
    for index, single, read in ((INDEX, SINGLE, read_safetensors), (_BIN_INDEX, _BIN_SINGLE, _read_bin)):
        if (path / index).is_file():
            weight_map = read_json(path / index).get("weight_map")
            if not isinstance(weight_map, dict):
                raise ValueError(f"{path / index} has no weight_map")
            tensors, weight_map = _read_shards(path, index, weight_map, read)
            break
        if (path / single).is_file():
            tensors = dict(read(path / single))
            weight_map = {name: single for name in tensors}
            break
    else:
        raise ValueError(f"{path} holds no weights: none of {INDEX}, {SINGLE}, {_BIN_INDEX}, {_BIN_SINGLE} is there")
    return HFDirectory(path, config, tensors, weight_map)


def _read_shards(path: Path, index: str, weight_map: dict, read: Callable) -> tuple[dict[str, Lazy], dict[str, str]]:
    tensors: dict[str, Lazy] = {}
    files: dict[str, str] = {}
    for name in sorted(set(weight_map.values())):
        expected = {tensor for tensor, file in weight_map.items() if file == name}
        if Path(name).name != name or not (path / name).is_file():
            raise ValueError(
                f"{path / name} is missing; {index} lists {len(expected)} tensors in it, {min(expected)} among "
                "them: copy it again"
            )
        found = read(path / name)
        if missing := sorted(expected - set(found)):
            raise ValueError(
                f"{path / name} lacks {missing[0]} (and {len(missing) - 1} more), which {index} expects there"
            )
        for tensor, lazy in found.items():
            if tensor in tensors:
                raise ValueError(f"{tensor} stands in {path / files[tensor]} and in {path / name}")
            tensors[tensor], files[tensor] = lazy, name
    return tensors, files


def write_safetensors(
    path: Path, tensors: Mapping[str, Lazy], seen: Optional[Callable[[str, torch.Tensor], None]] = None
) -> None:
    """Write one file block by block, in the order given. ``seen`` gets every (name, block)."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, tensor in tensors.items():
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [at, at + tensor.nbytes],
        }
        at += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the data is aligned
    background, buffers = BackgroundWriter(), Buffers()
    with DirectFile(path) as file:
        try:
            file.write(len(text).to_bytes(8, "little") + text)
            for name, tensor in tensors.items():
                for _, block in tensor.blocks(buffers=buffers):
                    if seen is not None:
                        seen(name, block)
                    background(file.write, block.view(torch.uint8).reshape(-1).numpy())
        finally:
            background.finish()  # before the file is closed


def shard_layout(tensors: Mapping[str, Lazy], shard_bytes: int = SHARD_BYTES) -> dict[str, str]:
    """Tensor -> file for shards of at most ``shard_bytes``, in the order given; one file when everything fits."""
    numbers: dict[str, int] = {}
    shard, filled = 0, 0
    for name, tensor in tensors.items():
        if filled and filled + tensor.nbytes > shard_bytes:
            shard, filled = shard + 1, 0
        numbers[name], filled = shard, filled + tensor.nbytes
    if shard == 0:
        return {name: SINGLE for name in numbers}
    return {name: f"model-{number + 1:05d}-of-{shard + 1:05d}.safetensors" for name, number in numbers.items()}


def safetensors_names(weight_map: Mapping[str, str]) -> dict[str, str]:
    """Layout ``weight_map`` with safetensors names in place of ``pytorch_model-*.bin``."""

    def rename(file: str) -> str:
        if not file.endswith(".bin"):
            return file
        return file.replace("pytorch_model", "model", 1).removesuffix(".bin") + ".safetensors"

    return {tensor: rename(file) for tensor, file in weight_map.items()}


def write_weights(
    directory: Path,
    tensors: Mapping[str, Lazy],
    weight_map: Mapping[str, str],
    seen: Optional[Callable[[str, torch.Tensor], None]] = None,
) -> None:
    """Write every shard of ``weight_map``, and the index when there are several."""
    files: dict[str, dict[str, Lazy]] = {}
    for name, file in weight_map.items():
        files.setdefault(file, {})[name] = tensors[name]
    for file, content in files.items():
        write_safetensors(directory / file, content, seen)
    if list(files) != [SINGLE]:
        total = sum(tensor.nbytes for tensor in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": dict(weight_map)}
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")


# -------------------------------------------------------------------------------------------------------- the format


def matches(path: Path) -> bool:
    """True for a directory with a ``config.json``."""
    return (path / "config.json").is_file()


def open_model(path: Path, given: Given = Given()) -> Source:
    """The model in a directory, plain or exported."""
    directory = open_directory(path)
    files = {file.name: file.read_bytes() for file in directory.side_files()}
    files["config.json"] = (path / "config.json").read_bytes()
    return source_of(directory, files)


def source_of(directory: HFDirectory, files: dict[str, bytes]) -> Source:
    """The model in a directory that was opened, or in a file that was read as one.

    Args:
        files: small files to carry along: tokenizer, configuration.
    """
    config = directory.config
    model, family = mapping.from_hf_config(config), mapping.family_of(config)
    dmc = mapping.dmc_from_hf_config(config) or DMCConfig()
    tensors = check_tensors(directory, family, model)
    dropped = sorted(set(directory.tensors) - set(tensors))
    more = ", ..." if dropped[3:] else ""
    notes = [f"left out (computed from the configuration): {', '.join(dropped[:3])}{more}"] if dropped else []
    manifest = _manifest(config, family, directory.path)
    weight_map = safetensors_names({name: directory.weight_map[name] for name in tensors})
    files = {**files, SHARDS_FILE: json.dumps(weight_map, indent=1).encode()}
    return Source(
        path=directory.path,
        kind=family.model_type,
        family=family,
        config=config,
        run=imported_run(model, dmc, manifest),
        manifest=manifest,
        tensors=tensors,
        parameters=views.to_megatron(family, model, tensors),
        weight_map=weight_map,
        files=files,
        notes=notes,
    )


def check_tensors(directory: HFDirectory, family: mapping.Family, model: ModelConfig) -> dict[str, Lazy]:
    """Tensors that the model is made of, after names, shapes and dtypes were checked.

    Raises:
        ValueError: naming tensor, expected and found.
    """
    shapes = mapping.hf_shapes(family, model)
    kept = {name: t for name, t in directory.tensors.items() if not name.endswith(family.dropped)}
    duplicate = {} if model.untie_embeddings_and_output_weights else {"lm_head.weight"} & set(kept)
    compare_names(set(kept) - set(duplicate), shapes, str(directory.path))
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
    counts = Counter(t.dtype for t in kept.values())
    if len(counts) > 1:
        odd = min(counts, key=lambda dtype: counts[dtype])
        name = next(t.name for t in kept.values() if t.dtype == odd)
        others = ", ".join(str(dtype) for dtype in counts if dtype != odd)
        raise ValueError(f"{name} is of type {odd}, others of {others}; expected one type")
    return kept


def _manifest(config: dict, family: mapping.Family, source: Path) -> Manifest:
    block = config.get("dmc") or {}
    step = int(block.get("step") or 0)
    return Manifest(
        stage=block.get("stage", "import"),
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


def describe(path: Path) -> list[Row]:
    """Family, sizes and, for an exported model, how it was trained."""
    found = open_directory(path)
    model, family = mapping.from_hf_config(found.config), mapping.family_of(found.config)
    mapping.dmc_from_hf_config(found.config)  # raises for a damaged block
    block, files = found.config.get("dmc") or {}, set(found.weight_map.values())
    decisions = block and f"bias {block['decision_bias']:g}, window {block['window'] or 'unbounded'}"
    return [
        ("format", f"Hugging Face directory, {len(files)} weight file{'s' * (len(files) > 1)}"),
        ("family", family.model_type + (" + dmc" if block else "")),
        *model_rows(model),
        ("stage", block and f"{block['stage']}, step {block['step']}"),
        cr_row(block),
        ("decisions", decisions),
        weight_row(found.tensors.values()),
        ("also there", ", ".join(p.name for p in found.side_files())),
    ]
