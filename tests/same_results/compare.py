"""Whether two folders hold the same results, and the first difference where they do not.

Compared: tensors bit for bit, JSON and YAML value by value, TensorBoard's scalars and the log line's fields, all other
files byte for byte. Left out: times, versions, ids, prose (``.md``, messages), pictures, megatron-core's index cache,
and the modelling files of exported models, which are compared by what they compute.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

VOLATILE = {"versions", "crc32", "manifest_crc32", "files", "id", "created", "machine", "checkpoint_stages"}
"""Keys of JSON and YAML files that name a time, a version, or the bytes of files that are compared themselves."""
TIMES = ("elapsed time", "tokens/s", "TFLOP/s", "MFU", "mem:", "eta:")
LEFT_OUT = (".md", ".png", ".py", ".pyc")

Difference = Iterator[str]


def values(name: str, before: Any, after: Any) -> Difference:
    """Differences of nested values; a float equals only itself, NaN included."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in dict.fromkeys((*before, *after)):
            if key in VOLATILE:
                continue
            if key not in before or key not in after:
                yield f"{name}: {key!r} is there {'before' if key in before else 'after'} only"
            else:
                yield from values(f"{name}.{key}", before[key], after[key])
    elif isinstance(before, (list, tuple)) and type(before) is type(after):
        if len(before) != len(after):
            yield f"{name}: {len(before)} entries before, {len(after)} after"
        for index, (old, new) in enumerate(zip(before, after)):
            yield from values(f"{name}[{index}]", old, new)
    elif torch.is_tensor(before) and torch.is_tensor(after):
        yield from tensors(name, before, after)
    elif isinstance(before, np.ndarray) and isinstance(after, np.ndarray):
        yield from tensors(name, torch.from_numpy(before), torch.from_numpy(after))
    elif type(before) is not type(after) or repr(before) != repr(after):
        yield f"{name}: {before!r} before, {after!r} after"


def tensors(name: str, before: torch.Tensor, after: torch.Tensor) -> Difference:
    if (before.shape, before.dtype) != (after.shape, after.dtype):
        yield f"{name}: {tuple(before.shape)} {before.dtype} before, {tuple(after.shape)} {after.dtype} after"
    elif not torch.equal(*(t.contiguous().flatten().view(torch.uint8) for t in (before, after))):
        where = (before != after).flatten().nonzero().flatten()
        at = int(where[0]) if len(where) else 0
        old, new = before.flatten()[at].item(), after.flatten()[at].item()
        yield f"{name}: {len(where)} of {before.numel()} elements, at {at} {old!r} before, {new!r} after"


def checkpoint(name: str, before: Path, after: Path) -> Difference:
    """A ``torch_dist`` checkpoint: weights, optimizer state, and what is not sharded."""
    yield from values(name, *map(read_checkpoint, (before, after)))


def read_checkpoint(directory: Path) -> dict[str, Any]:
    from torch.distributed import checkpoint as dcp
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    reader = dcp.FileSystemReader(str(directory))
    metadata = reader.read_metadata().state_dict_metadata
    state = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    dcp.load(state, storage_reader=reader, no_dist=True)
    common = torch.load(directory / "common.pt", weights_only=False)
    return {"objects": sorted(metadata.keys() - state.keys()), "tensors": state, "common": common}


def scalars(name: str, before: Path, after: Path) -> Difference:
    """TensorBoard's, all of them but the speed: float32, more digits than the log line has."""
    yield from values(name, *map(read_scalars, (before, after)))


def read_scalars(directory: Path) -> dict[str, Any]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(directory), size_guidance={"scalars": 0})
    accumulator.Reload()
    tags = [tag for tag in accumulator.Tags()["scalars"] if not tag.startswith("tokens/s")]
    return {tag: [(event.step, event.value) for event in accumulator.Scalars(tag)] for tag in tags}


def log(name: str, before: Path, after: Path) -> Difference:
    yield from values(name, *map(read_log, (before, after)))


def read_log(path: Path) -> list[str]:
    """Fields of the iterations' lines less times, measured figures of ``verify``, and the text of ``dmc generate``."""
    text, found = path.read_text(errors="replace"), []
    for line in text.splitlines():
        if re.match(r" \[[-0-9 :]+\] iteration ", line):
            fields = line.partition("] ")[2].split(" | ")
            found += [field for field in fields if not field.startswith(TIMES)]
        elif line.startswith((" validation at", "logits over")):
            found += re.findall(r"\d+\.\d+(?:[eE][-+]?\d+)?", line)
    return found


def printed(name: str, before: Path, after: Path) -> Difference:
    """Everything that a command has printed but warnings and headings."""

    def lines(path: Path) -> list[str]:
        found = path.read_text(errors="replace").splitlines()
        return [line for line in found if not line.startswith("---") and "warn" not in line.lower()]

    yield from values(name, lines(before), lines(after))


def structured(name: str, before: Path, after: Path) -> Difference:
    """JSON, JSON lines and YAML. Lines of a batch's output are sorted: they are written as they finish."""

    def load(path: Path) -> Any:
        text = path.read_text()
        if path.suffix == ".jsonl":
            lines = [json.loads(line) for line in text.splitlines()]
            return sorted(lines, key=lambda line: line["custom_id"])
        return json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)

    yield from values(name, load(before), load(after))


def raw(name: str, before: Path, after: Path) -> Difference:
    old, new = before.read_bytes(), after.read_bytes()
    if old != new:
        at = next((i for i, (a, b) in enumerate(zip(old, new)) if a != b), min(len(old), len(new)))
        yield f"{name}: {len(old)} bytes before, {len(new)} after, the first different one at {at}"


def parts(directory: Path) -> dict[str, Callable[[str, Path, Path], Difference]]:
    """Relative path -> how it is compared, of everything below ``directory``."""
    found: dict[str, Callable[[str, Path, Path], Difference]] = {}
    inside: list[str] = []
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory).as_posix()
        if path.is_dir():
            if (path / ".metadata").is_file():
                found[name] = checkpoint
                inside.append(name + "/")
            elif path.name == "tensorboard":
                found[name] = scalars
        elif path.suffix in LEFT_OUT or "cache/" in name or "tfevents" in path.name or ".rank" in path.suffix:
            continue
        elif any(name.startswith(prefix) for prefix in inside) and path.suffix in (".distcp", ".metadata", ".pt", ""):
            continue
        elif path.suffix == ".log":
            found[name] = printed if directory.name == "generate" else log
        else:
            found[name] = structured if path.suffix in (".json", ".jsonl", ".yaml") else raw
    return found


def differences(before: Path, after: Path) -> Difference:
    """Of two folders of one case."""
    old, new = parts(before), parts(after)
    for name in dict.fromkeys((*old, *new)):
        if name not in old or name not in new:
            yield f"{name} is there {'before' if name in old else 'after'} only"
        else:
            yield from old[name](name, before / name, after / name)
