"""Are a Hugging Face directory and a checkpoint the same model, bit by bit?"""

from __future__ import annotations

from pathlib import Path

from megatron.dmc.checkpoint import convert, hf, mapping
from megatron.dmc.checkpoint.convert import Progress
from megatron.dmc.checkpoint.tensors import same_bits


def verify(source: str | Path, load: str | Path, progress: Progress) -> str:
    """Compare key sets, configurations, shapes, dtypes and every bit. Streams.

    Returns:
        One line that says what was compared.

    Raises:
        ValueError: the first difference of each kind, by name.
    """
    directory, found = hf.open_directory(source), convert.open_checkpoint(load)
    family = mapping.family_of(directory.config)
    model = mapping.from_hf_config(directory.config)
    tensors = convert.check_tensors(directory.tensors, family, model, str(source))
    theirs, ours = mapping.base_config(directory.config), mapping.base_config(found.config)
    if family.model_type != found.family.model_type or model != mapping.from_hf_config(found.config):
        keys = sorted(k for k in {*theirs, *ours} if theirs.get(k) != ours.get(k))
        raise ValueError(
            f"{source} and {found.checkpoint} differ in config.json: "
            + ", ".join(f"{k} is {theirs.get(k)!r} and {ours.get(k)!r}" for k in keys[:5])
        )
    if ("dmc" in directory.config) != ("dmc" in found.config):
        raise ValueError(
            f"one of {source} and {found.checkpoint} (stage {found.manifest.stage}) is a DMC model and the other is not"
        )
    if mapping.dmc_from_hf_config(directory.config) != mapping.dmc_from_hf_config(found.config):
        raise ValueError(
            f"{source} and {found.checkpoint} differ in their dmc settings: {directory.config['dmc']} and "
            f"{found.config['dmc']}"
        )
    hf.compare_names(found.tensors, tensors, str(found.checkpoint))
    differing = []
    for name, tensor in tensors.items():
        other = found.tensors[name]
        if tensor.dtype != other.dtype:
            raise ValueError(f"{name} is {tensor.dtype} in {source} and {other.dtype} in {found.checkpoint}")
        for start, block in tensor.blocks():
            progress.block(name, block)
            if not same_bits(block, other.read(start, start + block.shape[0])):
                differing.append(name)
                break
    if differing:
        raise ValueError(
            f"{len(differing)} of {len(tensors)} tensors differ between {source} and {found.checkpoint}: "
            f"{', '.join(differing[:5])}{', ...' if differing[5:] else ''}"
        )
    progress.warn()
    nbytes = sum(t.nbytes for t in tensors.values())
    return f"identical: {len(tensors)} tensors, {nbytes} bytes, same names, shapes and dtypes"
