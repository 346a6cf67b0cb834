"""Directories with the adapters of a DMS model alone, which name the unchanged model that they belong to.

DIR/config.json        model_type "dmc_adapter", the dmc block, sizes, and the base by name and SHA-256
DIR/model.safetensors  model.layers.N.self_attn.dms_proj_alpha.weight, ...dms_proj_alpha_norm.weight
"""

import hashlib
import logging
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Optional

import torch

from megatron.dmc.checkpoint import checksums, mapping
from megatron.dmc.checkpoint.fields import Fields, read_json
from megatron.dmc.checkpoint.formats import gguf, hf
from megatron.dmc.checkpoint.formats.base import Given, Row, Source, cr_row, decision_rows, weight_row
from megatron.dmc.checkpoint.tensors import Lazy
from megatron.dmc.config.checks import shown

log = logging.getLogger(__name__)
SIZES = ("num_hidden_layers", "hidden_size", "num_key_value_heads")
"""Keys of ``config.json`` in which a model and its adapters agree."""
_BLOCK = 8 << 20
"""Bytes that a thread reads at a time."""
_NEEDED = ("base_weights_sha256", *SIZES, "dmc")


@dataclass(frozen=True)
class Adapter:
    """A directory of adapters, opened. Its tensors stay in their file."""

    path: Path
    config: dict
    block: mapping.DMCBlock
    base_model: Optional[str]
    """Name of the base, for people."""
    base_sha256: str
    """:func:`weights_sha256` of the base."""
    tensors: Mapping[str, Lazy]


def weights_sha256(tensors: Mapping[str, Lazy], threads: Optional[int] = None) -> str:
    """SHA-256 of a model's weights: 64 hexadecimal digits that files, shards, the order of tensors and a type that
    holds the same values (bf16 saved as fp32) do not change.

    It is taken over the lines ``NAME SHAPE SHA256`` of all tensors, sorted, where SHA256 is of the tensor's values as
    little-endian fp32, and SHAPE is like ``64x128``. Reads everything, by up to 8 ``threads`` (None).

    Args:
        tensors: by Hugging Face name, without a second copy of tied embeddings.
    """

    def line(name: str) -> str:
        tensor, digest = tensors[name], hashlib.sha256()
        for _, block in tensor.blocks(_BLOCK):
            digest.update(memoryview(block.to(torch.float32).reshape(-1).numpy()).cast("B"))
        return f"{name} {'x'.join(map(str, tensor.shape))} {digest.hexdigest()}\n"

    with ThreadPoolExecutor(threads or min(8, os.cpu_count() or 1)) as pool:
        return hashlib.sha256("".join(pool.map(line, sorted(tensors))).encode()).hexdigest()


def base_tensors(directory: hf.HFDirectory) -> dict[str, Lazy]:
    """Weights of the model below the adapters, each once."""
    config = mapping.base_config(directory.config)
    shapes = mapping.hf_shapes(mapping.family_of(config), mapping.from_hf_config(config))
    return {name: directory.tensors[name] for name in shapes}


def open_adapter(path: Path) -> Adapter:
    """Open a directory of adapters, whose files are compared with its checksums.

    Raises:
        ValueError: it is no such directory, or is damaged.
    """
    if not (path / "config.json").is_file():
        raise ValueError(f"{path} has no config.json; --adapter names a directory that export --adapter-only wrote")
    config = read_json(path / "config.json")
    if config.get("model_type") != mapping.ADAPTER_MODEL_TYPE:
        raise ValueError(
            f"{path} is of model_type {shown(config.get('model_type'))}, a whole model; --adapter names a "
            "directory that export --adapter-only wrote"
        )
    checksums.require_undamaged(path, checksums.read_file(path), str(path), checksums.ADVICE)
    fields = Fields(config, f"{path / 'config.json'}: ")
    if missing := [key for key in _NEEDED if fields.get(key) is None]:
        raise ValueError(f"{path / 'config.json'}: {missing[0]} is missing; export the adapters again")
    block = mapping.dmc_block(config)
    if block is None or block.dmc.decision_source != "adapter":
        raise ValueError(f"{path / 'config.json'}: dmc.decision_source must be adapter; export the adapters again")
    for key in SIZES:
        fields.integer(key, least=1)
    digest = fields.needed_text("base_weights_sha256")
    if not (path / hf.SINGLE).is_file():
        raise ValueError(f"{path / hf.SINGLE} is missing; copy it again")
    tensors = hf.read_safetensors(path / hf.SINGLE)
    if odd := [name for name in tensors if not mapping.is_adapter(name)]:
        raise ValueError(f"{path / hf.SINGLE} holds {odd[0]}, which is part of no adapter; export the adapters again")
    wanted = (
        name
        for layer in range(config["num_hidden_layers"])
        for rule in mapping.adapter_rules(block.dmc)
        for name in rule.names(layer)
    )
    # No list: a damaged configuration may have a billion layers.
    if (missing := next((name for name in wanted if name not in tensors), None)) is not None:
        raise ValueError(f"{path / hf.SINGLE} lacks {missing}; export the adapters again")
    return Adapter(path, config, block, fields.text("base_model"), digest, tensors)


def put_on(base: hf.HFDirectory, adapter: Adapter) -> hf.HFDirectory:
    """A model with its adapters, as one directory. Weights are not compared: :func:`check_base` does.

    Raises:
        ValueError: the base is a retrofitted model, or of other sizes than the adapters' base.
    """
    wanted = adapter.base_model or "another model"
    if "dmc" in base.config:
        raise ValueError(f"{base.path} is a retrofitted model; {adapter.path} belongs to {wanted}, a plain one")
    family, model = mapping.family_of(base.config), mapping.from_hf_config(base.config)
    theirs = {"model_type": adapter.block.base_model_type, **{key: adapter.config[key] for key in SIZES}}
    sizes = (model.num_layers, model.hidden_size, model.kv_heads)
    ours = {"model_type": family.model_type, **dict(zip(SIZES, sizes, strict=True))}
    odd = [f"{key} {theirs[key]}, not {ours[key]}" for key in ours if theirs[key] != ours[key]]
    if odd:
        raise ValueError(f"{base.path} is not the base of {adapter.path}: that is {wanted}, with {', '.join(odd)}")
    last = max(base.weight_map.values(), default=hf.SINGLE)
    return replace(
        base,
        config=mapping.with_block(base.config, adapter.block),
        tensors={**base.tensors, **adapter.tensors},
        weight_map={**base.weight_map, **{name: last for name in adapter.tensors}},
        adapter=adapter.path,
    )


def open_directory(path: str | Path, adapter: Optional[str | Path] = None, given: Given = Given()) -> hf.HFDirectory:
    """:func:`hf.open_directory`, or :func:`gguf.open_directory` of a GGUF file, with the adapters of another directory
    on the model when one is named.
    """
    opened = gguf if gguf.matches(Path(path)) else hf
    base = opened.open_directory(Path(path), given)
    return base if adapter is None else put_on(base, open_adapter(Path(adapter)))


def open_with_base(path: Path, adapter: Path, given: Given = Given()) -> Source:
    """The model in a directory with the adapters of another one, whose base it must be.

    Raises:
        ValueError: see :func:`hf.open_model`, :func:`open_adapter` and :func:`check_base`.
    """
    checksums.require_undamaged(path, checksums.read_file(path), str(path), checksums.ADVICE)
    if gguf.matches(path):
        raise ValueError(f"{path} is a GGUF file; import and export it first (dmc convert import --gguf)")
    directory = open_directory(path, adapter, given)
    check_base(directory)
    return hf.source_of(directory)


def check_base(directory: hf.HFDirectory) -> None:
    """Raise ``ValueError`` unless the adapters of a directory were trained on its weights, all of which are read.

    Quantized weights are not those that adapters were trained on, and do not say which model they were made from, which
    is logged; a GGUF file's may have been trained on as they are.
    """
    if directory.adapter is None:
        return
    adapter = open_adapter(directory.adapter)
    read = directory.quantization in (None, "gguf")
    found = weights_sha256(base_tensors(directory)) if read else ""
    if found != adapter.base_sha256 and directory.quantization is not None:
        log.warning(
            "%s has quantized weights (%s); whether they were made from %s, which the adapters in %s were trained on, "
            "cannot be told",
            directory.path,
            directory.quantization,
            adapter.base_model or "the weights",
            adapter.path,
        )
    elif found != adapter.base_sha256:
        raise ValueError(
            f"{directory.path} is not the base of {adapter.path}: its weights have SHA-256 {found[:16]}..., and the "
            f"adapters were trained on {adapter.base_model or 'weights'} with {adapter.base_sha256[:16]}...; name that "
            "one, as it was published"
        )


@contextmanager
def checking(directory: hf.HFDirectory) -> Iterator[None]:
    """Compare a directory's files with its checksums, and a base with its adapters, while the body loads them.

    Raises:
        ValueError: after the body; see :func:`checksums.checking` and :func:`check_base`.
    """
    with checksums.checking(directory.path), ThreadPoolExecutor(1) as pool:
        compared = pool.submit(check_base, directory)
        yield
        compared.result()


# -------------------------------------------------------------------------------------------------------- the format


def matches(path: Path) -> bool:
    """True for a directory of adapters."""
    file = path / "config.json"
    return file.is_file() and read_json(file).get("model_type") == mapping.ADAPTER_MODEL_TYPE


def open_model(path: Path, given: Given = Given()) -> Source:
    """Raises ``ValueError``: adapters are no model, see :func:`open_with_base`."""
    return hf.open_model(path, given)


def describe(path: Path) -> list[Row]:
    """Base and decisions of a directory of adapters."""
    adapter = open_adapter(path)
    return [
        ("format", "adapters of a DMS model, without the model"),
        ("base", f"{adapter.base_model or 'not named'}, weights SHA-256 {adapter.base_sha256}"),
        ("family", f"{adapter.block.base_model_type} + {adapter.block.dmc.method}"),
        ("sizes", ", ".join(f"{key} {adapter.config[key]}" for key in SIZES)),
        ("stage", f"{adapter.block.stage}, step {adapter.block.step}"),
        cr_row({"target_cr": adapter.block.target_cr, "measured_cr": adapter.block.measured_cr}),
        *decision_rows(adapter.block.dmc),
        weight_row(adapter.tensors.values()),
    ]
