"""Conversion: a model of any format to a ``torch_dist`` checkpoint (import), and a checkpoint to Hugging Face (export).

A format opens a model as a :class:`Source`, whose tensors stay in their files (:mod:`formats`, :mod:`mapping`); here it
is written, block by block. A result appears under its name only when it is complete, with everything synced to disk.
"""

import errno
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Optional

import yaml
from torch import Tensor

from megatron.dmc.checkpoint import checksums, mapping
from megatron.dmc.checkpoint.formats import adapter, gguf, hf, legacy, megatron, torch_dist
from megatron.dmc.checkpoint.formats.base import Format, Given, Source, count
from megatron.dmc.checkpoint.manifest import write_files, write_hf_files
from megatron.dmc.checkpoint.model_card import REMOTE_CODE, model_card, tokenizer_files
from megatron.dmc.checkpoint.staging import staged
from megatron.dmc.checkpoint.tensors import Buffers, Lazy, has_only_finite


@dataclass
class Progress:
    """Callbacks of a conversion, and what it has found on the way."""

    say: Callable[[str], None] = print
    begin: Callable[[int], None] = lambda n: None
    """Called with the number of bytes that will be read."""
    advance: Callable[[int], None] = lambda n: None
    """Called with the number of bytes of every block."""
    not_finite: set[str] = field(default_factory=set)
    """Names of tensors with a NaN or an infinity."""

    def block(self, name: str, block: Tensor) -> None:
        """Note one block that was read."""
        if not has_only_finite(block):
            self.not_finite.add(name)
        self.advance(block.nbytes)

    def warn(self) -> None:
        """Say which tensors hold NaN or infinite values."""
        if self.not_finite:
            names = sorted(self.not_finite)
            more = ", ..." if len(names) > 10 else ""
            self.say(f"warning: {len(names)} tensors hold NaN or infinite values: {', '.join(names[:10])}{more}")


def _size(n: float) -> str:
    return f"{n / 1e9:.2f} GB" if n >= 1e8 else f"{n / 1e6:.1f} MB"


def announce(what: str, tensors: Mapping[str, Lazy], target: Path, progress: Progress) -> None:
    """Say what is about to be read and written, and what it takes.

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
    memory = 2 * Buffers.DEPTH * min(largest, torch_dist.CHUNK_BYTES) + (256 << 20)
    progress.say(
        f"{what}: {len(tensors)} tensors, {count(elements)} parameters, {_size(nbytes)} to read and write; "
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


def import_hf(
    source: str | Path,
    save: str | Path,
    *,
    adapters: Optional[str | Path] = None,
    overwrite: bool = False,
    progress: Optional[Progress] = None,
    target_cr: Optional[float] = None,
    decision_about: Optional[str] = None,
) -> Path:
    """:func:`import_model` of a Hugging Face directory, plain, exported or with another program's DMS model:
    config.json with safetensors or ``pytorch_model*.bin``.

    Args:
        adapters: directory with the adapters of a DMS model, whose base ``source`` is.
        target_cr, decision_about: see :class:`Given`.
    """
    given = Given(target_cr=target_cr, decision_about=decision_about)
    return import_model(open_hf(source, adapters, given), Path(save), overwrite, progress)


def open_hf(source: str | Path, adapters: Optional[str | Path] = None, given: Given = Given()) -> Source:
    """:func:`hf.open_model`, with adapters where a directory of them is named (:func:`adapter.open_with_base`)."""
    if adapters is None:
        return hf.open_model(Path(source), given)
    return adapter.open_with_base(Path(source), Path(adapters), given)


def import_from(
    source_format: Format,
    source: str | Path,
    save: str | Path,
    *,
    overwrite: bool = False,
    progress: Optional[Progress] = None,
    **given: Any,
) -> Path:
    """:func:`import_model` of what a format reads.

    Args:
        given: fields of :class:`Given`.
    """
    return import_model(source_format.open_model(Path(source), Given(**given)), Path(save), overwrite, progress)


import_legacy = partial(import_from, legacy)
"""Import a ``mp_rank_*`` checkpoint of any tensor and pipeline parallel size; ``vocab_size`` and ``target_cr`` may be
given."""
import_gguf = partial(import_from, gguf)
"""Import a GGUF file of llama.cpp; ``dtype`` may be given."""
import_megatron = partial(import_from, megatron)
"""Import a ``torch_dist`` checkpoint that Megatron-LM, Megatron-Bridge or NeMo wrote; ``vocab_size`` and ``target_cr``
may be given."""


def import_model(source: Source, save: Path, overwrite: bool = False, progress: Optional[Progress] = None) -> Path:
    """Write a ``torch_dist`` checkpoint that any tensor- and pipeline-parallel layout loads.

    Args:
        save: the checkpoint's directory, for ``--init-from`` and export.

    Raises:
        ValueError: ``save`` exists and ``overwrite`` is False, the disk is too small, or a file of the source is
            truncated.
    """
    progress = progress or Progress()
    for note in source.notes:
        progress.say(note)
    announce(f"import {source.path} ({source.kind}) -> {save}", source.tensors, save, progress)
    with writing(save), staged(save, overwrite) as directory:
        with torch_dist.DistWriter(directory) as writer:
            write_parameters(writer, source, progress)
        write_hf_files(directory, source.files)
        (directory / "config.yaml").write_text(yaml.safe_dump(source.run.to_dict(), sort_keys=False))
        source.manifest.write(directory, writer.crc32)  # last: it lists the other files
    progress.warn()
    return save


def write_parameters(writer: torch_dist.DistWriter, source: Source, progress: Progress) -> None:
    """Write all parameters, in the order of a forward pass."""
    for rule, layer in mapping.in_order(source.family, source.run.model):
        parameter = source.parameters[rule.megatron, layer]
        stack = None if layer is None else (layer, source.run.model.num_layers)
        cuts = dict(split=rule.split, parts=rule.transform.stacked)
        for block in writer.write(rule.megatron, parameter, layer=stack, **cuts):
            progress.block(parameter.name, block)


def export(
    load: str | Path,
    save: str | Path,
    *,
    overwrite: bool = False,
    tokenizer: Optional[str | Path] = None,
    progress: Optional[Progress] = None,
) -> Path:
    """Write a checkpoint of any stage and layout as a Hugging Face directory.

    A model that was never retrofitted becomes its plain family, which transformers loads unchanged; any other one
    carries a ``dmc`` block and its own modelling file (``trust_remote_code=True``).

    Args:
        tokenizer: directory or sentencepiece model, for checkpoints whose lineage has no Hugging Face files. None: the
            one that the run was configured with, when it is still there.

    Raises:
        ValueError: see :func:`torch_dist.open_model`; or ``save`` exists and ``overwrite`` is False.
    """
    return write_hf(torch_dist.open_model(Path(load)), Path(save), overwrite, tokenizer, progress or Progress())


def merge_adapter(
    source: str | Path,
    adapters: str | Path,
    save: str | Path,
    *,
    overwrite: bool = False,
    progress: Optional[Progress] = None,
) -> Path:
    """Write a model and the adapters of another directory as one Hugging Face directory, as :func:`export` would.

    Raises:
        ValueError: see :func:`adapter.open_with_base`; or ``save`` exists and ``overwrite`` is False.
    """
    return write_hf(open_hf(source, adapters), Path(save), overwrite, None, progress or Progress())


def write_hf(source: Source, save: Path, overwrite: bool, tokenizer: Optional[str | Path], progress: Progress) -> Path:
    """Write a model as a Hugging Face directory, with the modelling file where it needs one."""
    announce(f"export {source.path} ({source.kind}) -> {save}", source.tensors, save, progress)
    files = tokenizer_files(source, tokenizer, progress.say)
    with writing(save), staged(save, overwrite) as directory:
        crc32 = hf.write_weights(directory, source.tensors, source.weight_map, progress.block)
        (directory / "config.json").write_text(json.dumps(source.config, indent=2) + "\n", encoding="utf-8")
        write_files(directory, files)
        if source.is_dmc:
            for path in REMOTE_CODE.glob("*_dm[cs].py"):
                shutil.copyfile(path, directory / path.name)
        (directory / "README.md").write_text(model_card(source), encoding="utf-8")
        checksums.write_file(directory, crc32)
    progress.warn()
    return save
