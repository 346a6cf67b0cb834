"""Files of all ranks of one checkpoint in Megatron's older format: found, opened, and joined to whole parameters."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Optional

import torch

from megatron.dmc.checkpoint import foreign, mapping
from megatron.dmc.checkpoint.formats import hf
from megatron.dmc.checkpoint.formats.legacy.rank_file import FILE, RankFile, read_rank_file
from megatron.dmc.checkpoint.formats.megatron.arguments import LOCAL_NAMES, Recorded, current_iteration, padded, wrong
from megatron.dmc.checkpoint.manifest import LATEST
from megatron.dmc.checkpoint.mapping import TensorRule
from megatron.dmc.checkpoint.mapping.transforms import Vocabulary
from megatron.dmc.checkpoint.mapping.views import Key
from megatron.dmc.checkpoint.tensors import Concat, Grid, Lazy, Rows, equal
from megatron.dmc.config import ModelConfig

_RANK = re.compile(r"mp_rank_(\d{2,})(?:_(\d{3,}))?")
EMBEDDING: Key = ("embedding.word_embeddings.weight", None)
OUTPUT: Key = ("output_layer.weight", None)


@dataclass
class LegacyCheckpoint:
    """All ranks' files of one checkpoint, made by :func:`open_legacy`. None of the tensors has been read yet."""

    directory: Path
    files: dict[tuple[int, int], RankFile]
    """(tensor rank, pipeline rank) -> file."""
    shares: dict[Key, list[Lazy]] = field(default_factory=dict)
    """Parameter -> the share of every tensor rank."""
    homes: dict[tuple[int, Optional[int]], Path] = field(default_factory=dict)
    """(tensor rank, layer) -> the file that it lies in."""
    notes: list[str] = field(default_factory=list)
    """Remarks for the user: what was assumed."""

    @property
    def first(self) -> RankFile:
        return self.files[0, 0]

    @property
    def tp(self) -> int:
        return self.first.layout[0]

    @property
    def rows(self) -> int:
        """Rows of the embedding, padding included."""
        return sum(share.shape[0] for share in self.shares[EMBEDDING])

    @property
    def dtype(self) -> torch.dtype:
        return self.shares[EMBEDDING][0].dtype

    def recorded(self) -> Recorded:
        """Reader of the arguments that training saved in the checkpoint; it collects the notes for the user."""
        return Recorded(
            args=self.first.args,
            where=str(self.first.path),
            directory=self.directory,
            iteration=self.first.iteration,
            rows=self.rows,
            embedding=self.shares[EMBEDDING][0].name,
            tensor_parallel_size=self.tp,
            dtype=self.dtype,
            notes=self.notes,
        )


def _has_ranks(path: Path) -> bool:
    return any(_RANK.fullmatch(p.name) for p in path.glob("mp_rank_*"))


def _iterations(source: Path) -> list[Path]:
    return [path for path in foreign.iterations(source) if _has_ranks(path)]


def is_legacy(path: Path) -> bool:
    """True when ``path``, or an iteration's directory in it, holds ``mp_rank_*`` directories."""
    return path.is_dir() and (_has_ranks(path) or bool(_iterations(path)))


def find_directory(source: Path) -> Path:
    """The directory that holds ``mp_rank_*``: ``source``, or the iteration in it that is current.

    Raises:
        ValueError: there is none, or it cannot be told which one.
    """
    if not source.is_dir():
        raise ValueError(f"{source} is not a directory; name a Megatron checkpoint directory")
    if _has_ranks(source):
        return source
    iterations = _iterations(source)
    if (current := current_iteration(source)) is not None:
        if _has_ranks(current):
            return current
        if not (current / foreign.METADATA).is_file():
            raise wrong(current / "mp_rank_00" / FILE, "is missing", f"it because {LATEST} names {current.name}")
        source = current
    elif len(iterations) == 1:
        return iterations[0]
    elif iterations:
        raise wrong(
            source, f"holds {', '.join(p.name for p in iterations[:5])} and no {LATEST}", "one of them to be named"
        )
    if (source / ".metadata").is_file():
        raise ValueError(f"{source} is a torch_dist checkpoint, not one of {FILE} files: {_way(source)}")
    raise wrong(source, "is no Megatron checkpoint", f"mp_rank_00/{FILE} in it, in release/, or in what {LATEST} names")


def _way(checkpoint: Path) -> str:
    """End of the error about a ``torch_dist`` checkpoint given as an older one: what to use instead."""
    if foreign.is_megatron(checkpoint):
        return f"import it with dmc convert import --megatron {checkpoint} --save DIR"
    return "it needs no import: export it, or give it to --init-from"


def open_legacy(source: str | Path) -> LegacyCheckpoint:
    """Open every rank's file and put names and layer numbers in order.

    Args:
        source: what --save was, one of its iteration directories, or any directory with ``mp_rank_*`` in it.

    Raises:
        ValueError: a file is missing, damaged, would run code, or does not belong to the others; naming it.
    """
    directory = find_directory(Path(source))
    found = _rank_directories(directory)
    start = min(found)
    first = read_rank_file(found[start] / FILE)
    _check_ranks(found, first)
    files = {rank: first if rank == start else read_rank_file(found[rank] / FILE) for rank in sorted(found)}
    for file in files.values():
        if (file.layout, file.iteration) != (first.layout, first.iteration):
            raise wrong(
                file.path,
                f"is of iteration {file.iteration}, tensor x pipeline x virtual size {file.layout}",
                f"iteration {first.iteration}, {first.layout} as in {first.path}",
            )
    checkpoint = LegacyCheckpoint(directory, files)
    for t in range(checkpoint.tp):
        _gather(checkpoint, t)
    if (found_in := len(checkpoint.shares.get(EMBEDDING, []))) != checkpoint.tp:
        raise wrong(directory, f"has {EMBEDDING[0]} in {found_in} tensor ranks", f"it in {checkpoint.tp}")
    return checkpoint


def _rank_directories(directory: Path) -> dict[tuple[int, int], Path]:
    """(tensor rank, pipeline rank) -> its ``mp_rank_*`` directory."""
    found: dict[tuple[int, int], Path] = {}
    for path in sorted(directory.glob("mp_rank_*")):
        match = _RANK.fullmatch(path.name)
        if match is None:
            raise wrong(
                path, "is of another layout", "mp_rank_TT or mp_rank_TT_PPP (expert parallelism is not supported)"
            )
        rank = int(match[1]), int(match[2] or 0)
        if rank in found:
            raise wrong(path, f"is the same rank as {found[rank].name}", "one of them")
        found[rank] = path
    return found


def _check_ranks(found: dict[tuple[int, int], Path], first: RankFile) -> None:
    """Raise ``ValueError`` unless the ranks are those of the layout that the first file says."""
    tp, pp, _ = first.layout
    expected = {(t, p) for t in range(tp) for p in range(pp)}
    sizes = f"tensor x pipeline parallel size {tp} x {pp}, which the args in {first.path} say"
    if missing := sorted(expected - set(found)):
        name = f"mp_rank_{missing[0][0]:02d}" + (f"_{missing[0][1]:03d}" if pp > 1 else "")
        raise wrong(
            first.path.parent.parent / name / FILE,
            f"is missing ({len(missing)} of {len(expected)} files are)",
            f"{sizes}; there are only {', '.join(p.name for p in found.values())}",
        )
    if extra := sorted(set(found) - expected):
        raise wrong(found[extra[0]], "is one too many", sizes)


def _gather(checkpoint: LegacyCheckpoint, t: int) -> None:
    """Add the tensors of rank ``t``. A file numbers the layers anew in every model chunk; here they get the model's."""
    mine: set[Key] = set()
    offset, counts = 0, []
    # An interleaved pipeline has the first chunk of every stage before the second one of any.
    for chunk in range(len(checkpoint.first.chunks)):
        for file in (checkpoint.files[t, p] for p in range(checkpoint.first.layout[1])):
            numbers = set()
            for name, layer, tensor in _named(file.chunks[chunk]):
                key = (name, None if layer is None else offset + layer)
                if key in mine:
                    raise wrong(tensor.name, "stands there a second time", "one in all pipeline stages")
                mine.add(key)
                checkpoint.shares.setdefault(key, []).append(tensor)
                checkpoint.homes[t, key[1]] = file.path
                numbers |= {layer} - {None}
            if numbers != set(range(len(numbers))):
                raise wrong(
                    f"{file.path} (model chunk {chunk})", f"has the layers {sorted(numbers)}", "no gap, from 0 on"
                )
            offset += len(numbers)
            counts.append(f"{len(numbers)} in {file.path.parent.name}")
    if offset != checkpoint.first.args.get("num_layers"):
        raise wrong(
            checkpoint.directory,
            f"has {offset} layers in tensor rank {t} ({', '.join(counts)})",
            f"{checkpoint.first.args.get('num_layers')} (args.num_layers)",
        )


def _named(chunk: dict[str, Lazy]) -> Iterator[tuple[str, Optional[int], Lazy]]:
    """(name in a ``torch_dist`` checkpoint, number of the layer in the chunk, tensor)."""
    for name, tensor in chunk.items():
        match = re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", name)
        plain = f"decoder.layers.{match[2]}" if match else name
        yield LOCAL_NAMES.get(plain, plain), int(match[1]) if match else None, tensor


def parameters(checkpoint: LegacyCheckpoint, family: mapping.Family, model: ModelConfig) -> dict[Key, Lazy]:
    """The parameters of a ``torch_dist`` checkpoint, composed over tensor ranks, in the order of a forward pass.

    Raises:
        ValueError: a tensor is missing, one too many, or of the wrong shape or type, or a rank's copy differs; naming
            it.
    """
    shares, tp = dict(checkpoint.shares), checkpoint.tp
    if not model.untie_embeddings_and_output_weights:
        # The last of several pipeline stages has a copy of the embeddings.
        for output, embedding in zip(shares.pop(OUTPUT, []), shares[EMBEDDING], strict=False):
            if not equal(output, embedding):
                raise wrong(
                    output.name,
                    f"differs from {embedding.name}",
                    "a copy: untie_embeddings_and_output_weights is False",
                )
    wanted = {(rule.megatron, layer): rule for rule, layer in mapping.in_order(family, model)}
    for name, layer in wanted:
        if len(found := shares.get((name, layer), [])) != tp:
            others = [path for (_, number), path in checkpoint.homes.items() if number == layer is not None]
            home = [path for path in others if not any(tensor.name.endswith(f" in {path}") for tensor in found)]
            raise wrong(
                f"{home[0]}: layer {layer}" if home else checkpoint.directory,
                f"lacks {name.replace('layers.', 'layers.N.')}",
                f"it in {tp - len(found)} more tensor ranks",
            )
    if extra := [tensors[0] for key, tensors in shares.items() if key not in wanted]:
        raise wrong(extra[0].name, f"is not known to a model of its args ({len(extra)} such tensors)", "none")
    for tensor in (tensor for tensors in shares.values() for tensor in tensors):
        if tensor.dtype != checkpoint.dtype or tensor.dtype not in hf.DTYPES.values():
            raise wrong(
                tensor.name,
                f"is of type {tensor.dtype}",
                f"that of {EMBEDDING[0]}, {checkpoint.dtype}, and one of {', '.join(map(str, hf.DTYPES.values()))}",
            )
    return {key: _compose(rule, key, checkpoint, model) for key, rule in wanted.items()}


def _compose(rule: TensorRule, key: Key, checkpoint: LegacyCheckpoint, model: ModelConfig) -> Lazy:
    """One parameter from the shares of all tensor ranks."""
    shares, tp, is_vocabulary = checkpoint.shares[key], checkpoint.tp, isinstance(rule.transform, Vocabulary)
    shape = list(rule.megatron_shape(model))
    if is_vocabulary:
        shape[0] = checkpoint.rows
    if rule.split is not None:
        units = rule.transform.units(model) or shape[rule.split]
        if units % tp:
            raise wrong(shares[0].name, f"is one of {tp} parts", f"a divisor of {units}, of what it is cut into")
        shape[rule.split] //= tp
    for share in shares:
        if list(share.shape) != shape:
            raise wrong(
                share.name, f"has shape {list(share.shape)}", f"{shape} by its args (tensor parallel size {tp})"
            )
    name = f"{key[0]}{'' if key[1] is None else f' of layer {key[1]}'} in {checkpoint.directory}"
    whole = _join(rule, shares, name)
    return padded(whole, model) if is_vocabulary else whole


def _join(rule: TensorRule, shares: list[Lazy], name: str) -> Lazy:
    """Shares as one tensor; copies of a tensor that is not cut are compared."""
    if rule.split is None:
        for share in shares[1:]:
            if not equal(share, shares[0]):
                raise wrong(share.name, f"differs from {shares[0].name}", "the same values in every tensor rank")
    if rule.split is None or len(shares) == 1:
        return shares[0]
    if rule.split == 1:
        rows, columns = shares[0].shape
        boxes = [((0, i * columns), share) for i, share in enumerate(shares)]
        return Grid((rows, columns * len(shares)), shares[0].dtype, boxes, name)
    # Every rank has its gates above its ups: tp x [2 * F / tp, h] -> [2 * F, h]
    stacked = rule.transform.stacked
    rows = shares[0].shape[0] // stacked
    parts = [Rows(share, i * rows, (i + 1) * rows) for i in range(stacked) for share in shares]
    return Concat(parts, name)
