"""Comparison of a Hugging Face directory and a checkpoint, bit by bit, or of one of them with its own checksums."""

from pathlib import Path
from typing import Optional

from megatron.dmc.checkpoint import checksums, mapping
from megatron.dmc.checkpoint.convert import Progress, open_hf
from megatron.dmc.checkpoint.formats import torch_dist
from megatron.dmc.checkpoint.formats.base import Given, Source, compare_names
from megatron.dmc.checkpoint.manifest import check_contents, read_manifest, resolve_checkpoint
from megatron.dmc.checkpoint.tensors import same_bits


def verify(
    source: str | Path,
    load: str | Path,
    progress: Progress,
    adapters: Optional[str | Path] = None,
    given: Given = Given(),
) -> str:
    """Compare key sets, configurations, shapes, dtypes and every bit. Streams.

    Args:
        adapters: see :func:`open_hf`.

    Returns:
        One line that says what was compared.

    Raises:
        ValueError: the first difference of each kind, by name.
    """
    theirs, ours = open_hf(source, adapters, given), torch_dist.open_model(Path(load))
    _compare_configs(theirs, ours)
    compare_names(ours.tensors, theirs.tensors, str(ours.path))
    differing = []
    for name, tensor in theirs.tensors.items():
        other = ours.tensors[name]
        if tensor.dtype != other.dtype:
            raise ValueError(f"{name} is {tensor.dtype} in {source} and {other.dtype} in {ours.path}")
        for start, block in tensor.blocks():
            progress.block(name, block)
            if not same_bits(block, other.read(start, start + block.shape[0])):
                differing.append(name)
                break
    if differing:
        raise ValueError(
            f"{len(differing)} of {len(theirs.tensors)} tensors differ between {source} and {ours.path}: "
            f"{', '.join(differing[:5])}{', ...' if differing[5:] else ''}"
        )
    progress.warn()
    nbytes = sum(t.nbytes for t in theirs.tensors.values())
    return f"identical: {len(theirs.tensors)} tensors, {nbytes} bytes, same names, shapes and dtypes"


def verify_checksums(path: str | Path, is_checkpoint: bool) -> str:
    """Compare every file of a checkpoint (or the newest of a --save directory), or of a directory that was exported
    here, with the checksums that were written with it.

    Returns:
        One line that says what was compared.

    Raises:
        ValueError: a file differs or is missing, by name; or there are no checksums.
    """
    path = Path(path)
    if is_checkpoint:
        path = resolve_checkpoint(path)
        manifest = read_manifest(path)
        expected = manifest.crc32
        check_contents(path, manifest)
    else:
        expected = checksums.read_file(path)
        checksums.require_undamaged(path, expected, str(path), checksums.ADVICE)
    if not expected:
        raise ValueError(f"{path} has no checksums; compare it with its source: dmc convert verify --hf DIR --load DIR")
    nbytes = sum((path / name).stat().st_size for name in expected)
    return f"undamaged: {len(expected)} files of {path}, {nbytes} bytes, have the checksums that were written with them"


def _compare_configs(theirs: Source, ours: Source) -> None:
    one, two = mapping.base_config(theirs.config), mapping.base_config(ours.config)
    if theirs.family.model_type != ours.family.model_type or mapping.from_hf_config(one) != mapping.from_hf_config(two):
        keys = sorted(k for k in {*one, *two} if one.get(k) != two.get(k))
        odd = ", ".join(f"{k} is {one.get(k)!r} and {two.get(k)!r}" for k in keys[:5])
        raise ValueError(f"{theirs.path} and {ours.path} differ in config.json: {odd}")
    if theirs.is_dmc != ours.is_dmc:
        raise ValueError(
            f"one of {theirs.path} and {ours.path} (stage {ours.manifest.stage}) is a DMC model and the other is not"
        )
    if mapping.dmc_from_hf_config(theirs.config) != mapping.dmc_from_hf_config(ours.config):
        raise ValueError(
            f"{theirs.path} and {ours.path} differ in their dmc settings: {theirs.config['dmc']} and "
            f"{ours.config['dmc']}"
        )
