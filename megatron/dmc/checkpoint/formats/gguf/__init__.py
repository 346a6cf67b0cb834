"""GGUF files of llama.cpp: one file with weights, often quantized, configuration, tokenizer and chat template.

The file is read through the ``gguf`` library and presented as the Hugging Face directory that it was made from:
``config.json`` (:mod:`.config`), tensors under transformers' names (:mod:`.weights`) and tokenizer files
(:mod:`.tokenizer`). From there on the Hugging Face reader checks and maps it as any directory.
"""

import json
from pathlib import Path

from megatron.dmc.checkpoint import mapping
from megatron.dmc.checkpoint.formats import hf
from megatron.dmc.checkpoint.formats.base import Given, Row, Source, model_rows, weight_row
from megatron.dmc.checkpoint.formats.gguf import tokenizer
from megatron.dmc.checkpoint.formats.gguf.config import hf_config
from megatron.dmc.checkpoint.formats.gguf.metadata import Metadata, open_file
from megatron.dmc.checkpoint.formats.gguf.weights import hf_tensors, stored_types

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
    files = tokenizer.files(metadata, directory.config)
    files["config.json"] = json.dumps(directory.config, indent=2).encode()
    source = hf.source_of(directory, files)
    source.kind = f"{source.kind}, {stored_types(metadata)}"
    source.notes = notes + source.notes
    return source


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
    return hf.HFDirectory(path, config, tensors, hf.shard_layout(tensors)), metadata, notes
