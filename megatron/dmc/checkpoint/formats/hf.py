"""Hugging Face model directories: read tensor by tensor, written shard by shard, never a shard in memory."""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Optional

import torch
from safetensors import SafetensorError, safe_open

from megatron.dmc.checkpoint import checksums, codes, foreign, mapping
from megatron.dmc.checkpoint.direct import DirectFile
from megatron.dmc.checkpoint.fields import Fields, read_json
from megatron.dmc.checkpoint.formats import dms, quantized
from megatron.dmc.checkpoint.formats.base import (
    Given,
    Row,
    Source,
    compare_names,
    cr_row,
    decision_rows,
    imported_run,
    model_rows,
    weight_row,
)
from megatron.dmc.checkpoint.manifest import SHARDS_FILE, Manifest
from megatron.dmc.checkpoint.mapping import views
from megatron.dmc.checkpoint.pickled import load_lazily
from megatron.dmc.checkpoint.tensors import BackgroundWriter, Buffers, FileTensor, Lazy, Rows, equal
from megatron.dmc.checkpoint.tokenizer_files import tokenizer_files
from megatron.dmc.config import DMCConfig, ModelConfig
from megatron.dmc.environment import versions

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_BIN_INDEX, _BIN_SINGLE = "pytorch_model.bin.index.json", "pytorch_model.bin"
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_CODE_DTYPES = {"I8": torch.int8, "I32": torch.int32, "I64": torch.int64}
"""Types of the tensors that only quantized weights have."""
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_LEGAL = re.compile(r"(licen[cs]e|notice|copying|copyright|patents|(acceptable_)?use_policy|third_party)", re.I)
"""Beginnings of the names of files that go wherever a model goes, because its licence wants it."""
_LEGAL_BYTES, _HEADER_BYTES = 1 << 20, 16 << 20
"""Bounds of a legal text, and of the header of a safetensors file: the tensors of 10,000 layers take less."""
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
    foreign: Optional[dms.ForeignDMS] = None
    """Description of a DMS model by another program, from which the ``dmc`` block of ``config`` was made."""
    adapter: Optional[Path] = None
    """Directory of adapters that were put on the model (:mod:`adapter`)."""
    quantization: Optional[str] = None
    """How its matrices of codes are stored, by vLLM's name (:mod:`quantized`, or gguf); None: there are none."""

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def side_files(self) -> dict[str, Path]:
        """Name -> path of the files that go along with the weights: tokenizer, generation configuration, licence."""
        found = tokenizer_files(self.path)
        if (self.path / "generation_config.json").is_file():
            found["generation_config.json"] = self.path / "generation_config.json"
        legal = sorted(path for path in self.path.iterdir() if _LEGAL.match(path.name) and path.is_file())
        return found | {path.name: path for path in legal if path.stat().st_size <= _LEGAL_BYTES}


def read_safetensors(path: Path, dtypes: Mapping[str, torch.dtype] = DTYPES) -> dict[str, FileTensor]:
    """The tensors of one file, in their order. Raises ``ValueError`` when it is damaged or a tensor of another type
    than ``dtypes``.
    """
    try:
        with path.open("rb") as raw:
            length = int.from_bytes(raw.read(8), "little")
        if _HEADER_BYTES < length <= path.stat().st_size:
            raise ValueError(f"{path} has a header of {length:,} bytes; at most {_HEADER_BYTES:,} are read")
        with safe_open(str(path), framework="pt") as file:  # checks the header against the file's size
            names = list(file.keys())
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a complete safetensors file ({error}); copy it again") from error
    with path.open("rb") as raw:
        raw.seek(8)
        header = json.loads(raw.read(length))
    tensors = {}
    for name in sorted(names, key=lambda n: header[n]["data_offsets"]):
        entry = header[name]
        if entry["dtype"] not in dtypes:
            raise ValueError(
                f"{name} in {path} is of type {entry['dtype']}; expected {', '.join(dtypes)} (quantized weights need "
                "the quantization_config of their config.json)"
            )
        start, _ = entry["data_offsets"]
        tensors[name] = FileTensor(path, 8 + length + start, entry["shape"], dtypes[entry["dtype"]], name)
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


def open_directory(path: str | Path, given: Given = Given()) -> HFDirectory:
    """Open a directory with ``config.json`` and weights: safetensors, or ``pytorch_model*.bin`` read without running
    code. One with another program's DMS model gets a ``dmc`` block (:mod:`dms`); quantized weights are read by
    :mod:`quantized`, whose ``quantization_config`` is left out of ``config`` then.

    Raises:
        ValueError: a file is missing, truncated, or does not hold what its index says; naming file and tensor. Or see
            :func:`dms.canonical_config`.
    """
    path = Path(path)
    if not path.is_dir():
        raise ValueError(f"{path} is not a directory; name a Hugging Face model directory")
    if not (path / "config.json").is_file() and (what := foreign.export_command(path)):
        raise ValueError(what)
    config = read_json(path / "config.json")
    quantization, coded = quantized.method_of(config), config
    config = {key: value for key, value in config.items() if key != quantized.KEY}
    config, found = dms.canonical_config(path, config, given)
    dtypes = DTYPES if quantization is None else DTYPES | _CODE_DTYPES
    read_tensors = partial(read_safetensors, dtypes=dtypes)
    for index, single, read in ((INDEX, SINGLE, read_tensors), (_BIN_INDEX, _BIN_SINGLE, _read_bin)):
        if (path / index).is_file():
            tensors, weight_map = _read_shards(path, index, _read_index(path / index), read)
            break
        if (path / single).is_file():
            tensors = dict(read(path / single))
            weight_map = {name: single for name in tensors}
            break
    else:
        raise ValueError(f"{path} holds no weights: none of {INDEX}, {SINGLE}, {_BIN_INDEX}, {_BIN_SINGLE} is there")
    if quantization is not None:
        tensors = quantized.decode({**config, quantized.KEY: coded[quantized.KEY]}, tensors)
        weight_map = {name: weight_map.get(name, SINGLE) for name in tensors}
    tensors = _one_row_per_layer(tensors, config, path)
    return HFDirectory(path, config, tensors, weight_map, found, quantization=quantization)


def _one_row_per_layer(tensors: dict[str, Lazy], config: dict, path: Path) -> dict[str, Lazy]:
    """Tensors in which adapters that decide by layer have one row: Model-Optimizer keeps a row per KV head and reads
    the first.

    Raises:
        ValueError: there are adapters, and nothing in ``config.json`` says so.
    """
    adapters = [name for name in tensors if mapping.is_adapter(name)]
    dmc = mapping.dmc_from_hf_config(config)
    if adapters and (dmc is None or dmc.decision_source != "adapter"):
        raise ValueError(
            f"{path} holds the adapters of a DMS model ({adapters[0]}), and its config.json does not say how they "
            "decide; restore its dms_* keys, dms_separate_alpha among them, or its dmc block"
        )
    if dmc is None or dmc.decision_per != "layer":
        return tensors
    first = {name: Rows(tensors[name], 0, 1) for name in adapters if name.endswith("alpha.weight")}
    return tensors | {name: tensor for name, tensor in first.items() if tensors[name].shape[0] > 1}


def _read_index(path: Path) -> dict[str, str]:
    """Name of a tensor -> name of its file."""
    index = Fields(read_json(path), f"{path}: ")
    weight_map = index.object("weight_map")
    if weight_map is None or not weight_map.content:
        index.refuse("weight_map", "an object with the file of every tensor")
    for name in weight_map.content:
        if not weight_map.text(name):
            weight_map.refuse(name, "the name of a file")
    return dict(weight_map.content)


def _read_shards(path: Path, index: str, weight_map: dict, read: Callable) -> tuple[dict[str, Lazy], dict[str, str]]:
    tensors: dict[str, Lazy] = {}
    files: dict[str, str] = {}
    expected_in: dict[str, set[str]] = {}
    for tensor, file in weight_map.items():
        expected_in.setdefault(file, set()).add(tensor)
    for name, expected in sorted(expected_in.items()):
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
) -> str:
    """Write one file block by block, in the order given. ``seen`` gets every (name, block). Returns its CRC-32."""
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
    return file.crc32


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
) -> dict[str, str]:
    """Write every shard of ``weight_map``, and the index when there are several. Returns their CRC-32 by name."""
    files: dict[str, dict[str, Lazy]] = {}
    for name, file in weight_map.items():
        files.setdefault(file, {})[name] = tensors[name]
    crc32 = {file: write_safetensors(directory / file, content, seen) for file, content in files.items()}
    if list(files) != [SINGLE]:
        total = sum(tensor.nbytes for tensor in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": dict(weight_map)}
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    return crc32


# -------------------------------------------------------------------------------------------------------- the format


def matches(path: Path) -> bool:
    """True for a directory with a ``config.json``."""
    return (path / "config.json").is_file()


def open_model(path: Path, given: Given = Given()) -> Source:
    """The model in a directory, plain or exported, whose files are first compared with its checksums, if it has any."""
    checksums.require_undamaged(path, checksums.read_file(path), str(path), checksums.ADVICE)
    return source_of(open_directory(path, given))


def source_of(directory: HFDirectory, files: Optional[dict[str, bytes]] = None) -> Source:
    """The model in a directory that was opened, or in a file that was read as one.

    Args:
        files: small files to carry along: tokenizer, configuration. None: those of the directory.
    """
    if files is None:
        files = {name: file.read_bytes() for name, file in directory.side_files().items()}
        changed = directory.foreign or directory.adapter or directory.quantization
        config = directory.path / "config.json"
        files["config.json"] = dms.as_json(directory.config) if changed else config.read_bytes()
    config = directory.config
    model, family = mapping.from_hf_config(config), mapping.family_of(config)
    block = mapping.dmc_block(config)
    tensors = check_tensors(directory, family, model)
    dropped = sorted(set(directory.tensors) - set(tensors))
    more = ", ..." if dropped[3:] else ""
    notes = [f"left out (computed from the configuration): {', '.join(dropped[:3])}{more}"] if dropped else []
    if directory.foreign:
        notes.append(directory.foreign.note())
    if directory.quantization not in (None, "gguf"):  # whose own note says what they are read as
        notes.append(f"quantized weights are read as numbers: {codes.summary(tensors.values())}")
    manifest = _manifest(block, family, directory.path)
    weight_map = safetensors_names({name: directory.weight_map[name] for name in tensors})
    files = {**files, SHARDS_FILE: json.dumps(weight_map, indent=1).encode()}
    return Source(
        path=directory.path,
        kind=family.model_type + (f" + {block.dmc.method}" if block else ""),
        family=family,
        config=config,
        run=imported_run(model, block.dmc if block else DMCConfig(), manifest),
        manifest=manifest,
        tensors=tensors,
        parameters=views.to_megatron(family, model, tensors),
        weight_map=weight_map,
        files=files,
        notes=notes,
    )


def model_tensors(directory: HFDirectory, family: mapping.Family, model: ModelConfig) -> dict[str, Lazy]:
    """Tensors that the model is made of, and a second copy of tied embeddings where a file has one. Names and shapes
    are checked.

    Raises:
        ValueError: naming tensor, expected and found.
    """
    kept = {name: t for name, t in directory.tensors.items() if not name.endswith(family.dropped)}
    duplicate = set() if model.untie_embeddings_and_output_weights else {"lm_head.weight"} & set(kept)
    per_layer = sum(len(rule.hf) for rule in mapping.rules(family, model) if rule.per_layer)
    if model.num_layers > len(kept):  # before anything is made of as many layers
        raise ValueError(
            f"{directory.path} has {len(kept)} tensors; {model.num_layers} layers (num_hidden_layers in config.json) "
            f"would have {per_layer} each"
        )
    shapes = mapping.hf_shapes(family, model)
    compare_names(set(kept) - duplicate, shapes, str(directory.path))
    for name, shape in shapes.items():
        if tuple(kept[name].shape) != tuple(shape):
            raise ValueError(
                f"{kept[name].name} has shape {list(kept[name].shape)}; expected {list(shape)} from config.json"
            )
    return kept


def check_tensors(directory: HFDirectory, family: mapping.Family, model: ModelConfig) -> dict[str, Lazy]:
    """:func:`model_tensors` of a model that can be imported.

    Raises:
        ValueError: also for tied embeddings of which there are two, and for tensors of two types that belong to one
            parameter of a checkpoint (the layers of a norm, say; norms in fp32 among bf16 matrices are fine).
    """
    kept = model_tensors(directory, family, model)
    tied = not model.untie_embeddings_and_output_weights
    if tied and "lm_head.weight" in kept and not equal(kept["lm_head.weight"], kept["model.embed_tokens.weight"]):
        raise ValueError(
            f"{kept['lm_head.weight'].name} differs from model.embed_tokens.weight, but tie_word_embeddings is true"
        )
    first: dict[str, Lazy] = {}
    for rule, layer in mapping.in_order(family, model):
        for name in rule.names(layer):
            like = first.setdefault(rule.megatron, kept[name])
            if kept[name].dtype != like.dtype:
                raise ValueError(
                    f"{kept[name].name} is of type {kept[name].dtype} and {like.name} of {like.dtype}; expected one "
                    f"type, since both are part of {rule.megatron}"
                )
    return kept


def main_dtype(tensors: Iterable[Lazy]) -> torch.dtype:
    """Type that most bytes of a model have."""
    counts: Counter[torch.dtype] = Counter()
    for tensor in tensors:
        counts[tensor.dtype] += tensor.nbytes
    return counts.most_common(1)[0][0]


def _manifest(block: Optional[mapping.DMCBlock], family: mapping.Family, source: Path) -> Manifest:
    step = block.step if block else 0
    return Manifest(
        stage=block.stage if block else "import",
        iteration=step,
        train_iters=step,
        consumed_samples=0,
        consumed_tokens=0,
        target_cr=block.target_cr if block else 1.0,
        measured_cr=block.measured_cr if block else None,
        source=source.name,
        versions=versions(),
        has_optimizer=False,
        family=family.model_type,
    )


def describe(path: Path) -> list[Row]:
    """Family, sizes and, for an exported model, how it was trained."""
    found = open_directory(path)
    model, family = mapping.from_hf_config(found.config), mapping.family_of(found.config)
    block, files = mapping.dmc_block(found.config), set(found.weight_map.values())
    model_tensors(found, family, model)  # raises for tensors that are not those of the configuration
    dmc: list[Row] = []
    if block:
        dmc = [
            ("stage", f"{block.stage}, step {block.step}"),
            cr_row({"target_cr": block.target_cr, "measured_cr": block.measured_cr}),
            *decision_rows(block.dmc),
        ]
    return [
        ("format", f"Hugging Face directory, {len(files)} weight file{'s' * (len(files) > 1)}"),
        ("family", family.model_type + (f" + {block.dmc.method}" if block else "")),
        ("written by", found.foreign and found.foreign.origin),
        *model_rows(model),
        *dmc,
        weight_row(found.tensors.values()),
        ("stored as", codes.summary(found.tensors.values())),
        ("also there", ", ".join(found.side_files())),
    ]
