"""GGUF files of llama.cpp: one file with weights, often quantized, configuration, tokenizer and chat template.

The file is read through the ``gguf`` library and presented as the Hugging Face directory that it was made from:
``config.json`` (:mod:`.config`), tensors under transformers' names (:mod:`.weights`) and tokenizer files
(:mod:`.tokenizer`). From there on the Hugging Face reader checks and maps it as any directory.
"""

import atexit
import json
import tempfile
from functools import cache
from pathlib import Path

from megatron.dmc.checkpoint import codes, mapping
from megatron.dmc.checkpoint.formats import hf
from megatron.dmc.checkpoint.formats.base import Given, Row, Source, model_rows, weight_row
from megatron.dmc.checkpoint.formats.gguf import tokenizer
from megatron.dmc.checkpoint.formats.gguf.config import hf_config
from megatron.dmc.checkpoint.formats.gguf.metadata import Metadata, open_file
from megatron.dmc.checkpoint.formats.gguf.weights import hf_tensors, stored_types
from megatron.dmc.checkpoint.manifest import write_files

MAGIC = b"GGUF"


def matches(path: Path) -> bool:
    """True for a file whose name ends in ``.gguf``."""
    return path.is_file() and path.suffix == ".gguf"


def open_model(path: Path, given: Given = Given()) -> Source:
    """The model in a GGUF file.

    Quantized weights are read as bfloat16, or as ``given.dtype`` says; the file's rounding stays in them.

    Raises:
        ValueError: the file is damaged or split, or holds an architecture, a quantization, a key, a tensor or a
            tokenizer that is not understood, by its name.
    """
    directory, metadata, notes = _directory(path, given)
    source = hf.source_of(directory, _small_files(directory, metadata))
    source.kind = f"{source.kind}, {stored_types(metadata)}"
    source.notes = notes + source.notes
    return source


def open_directory(path: Path, given: Given = Given()) -> hf.HFDirectory:
    """A GGUF file as the directory of its model, in the codes that it has. Raises ``ValueError`` as
    :func:`open_model` does.
    """
    directory, metadata, _ = _directory(path, given)
    tokenizer.files(metadata, directory.config)  # enters the special tokens into the configuration
    return directory


def small_files(path: Path) -> Path:
    """Directory with a model's tokenizer, generation configuration and config.json: ``path`` itself, unless it is a
    GGUF file.
    """
    return _unpacked(path) if matches(path) else path


@cache
def _unpacked(path: Path) -> Path:
    """Small files of a GGUF file in a directory that is there until the process ends."""
    directory, metadata, _ = _directory(path, Given())
    folder = tempfile.TemporaryDirectory(prefix="dmc-gguf-")
    atexit.register(folder.cleanup)
    write_files(Path(folder.name), _small_files(directory, metadata))
    return Path(folder.name)


def describe(path: Path) -> list[Row]:
    """Architecture, sizes, types of the stored weights and tokenizer."""
    directory, metadata, _ = _directory(path, Given())
    model, family = mapping.from_hf_config(directory.config), mapping.family_of(directory.config)
    model_name = metadata.text("general.name", "")
    return [
        ("format", f"GGUF file, version {metadata.version}" + (f", {model_name!r}" if model_name else "")),
        ("family", family.model_type),
        *model_rows(model),
        weight_row(directory.tensors.values()),
        ("stored as", f"{stored_types(metadata)}, {path.stat().st_size:,} bytes"),
        ("codes", codes.summary(directory.tensors.values())),
        ("tokenizer", tokenizer.kind(metadata)),
        ("license", metadata.text("general.license", "")),
    ]


def _directory(path: Path, given: Given) -> tuple[hf.HFDirectory, Metadata, list[str]]:
    metadata = open_file(path)
    config = hf_config(metadata)
    tensors, dtype = hf_tensors(metadata, config, given.dtype)
    config["torch_dtype"] = str(dtype).removeprefix("torch.")
    notes = []
    if given.dtype is None:
        notes.append(
            f"weights stored as {stored_types(metadata)} are read as {config['torch_dtype']}; --dtype for another"
        )
    quantization = "gguf" if codes.summary(tensors.values()) else None
    layout = hf.shard_layout(tensors)
    return hf.HFDirectory(path, config, tensors, layout, quantization=quantization), metadata, notes


def _small_files(directory: hf.HFDirectory, metadata: Metadata) -> dict[str, bytes]:
    """Tokenizer, generation configuration and config.json, name -> content."""
    files = tokenizer.files(metadata, directory.config)
    return {**files, "config.json": json.dumps(directory.config, indent=2).encode()}
