"""Finding tensors in ``torch.save`` files: quickly where the pickle is known, and never trusting a place that was not
checked.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.dmc.checkpoint import pickled
from megatron.dmc.checkpoint.pickled import TensorFinder, load_lazily
from megatron.dmc.checkpoint.tensors import FileTensor


def saved_parts(path: Path, objects: list[Any]) -> list[tuple[int, int]]:
    """One file with ``torch.save`` of each object behind the other; (offset, length) of each."""
    places = []
    with path.open("wb") as file:
        for value in objects:
            start = file.tell()
            torch.save(value, file)
            places.append((start, file.tell() - start))
    return places


class Call:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.path}",)


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Offsets of the parts that were read the slow way."""
    seen: list[int] = []

    def counted(path: Path, **where: Any) -> Any:
        seen.append(where["offset"])
        return load_lazily(path, **where)

    monkeypatch.setattr(pickled, "load_lazily", counted)
    return seen


def test_every_tensor_is_found_and_every_pickle_read_once(tmp_path: Path, loads: list[int]) -> None:
    whole = torch.arange(60, dtype=torch.float32).view(6, 10)
    plain = [torch.randn(3, 4), torch.randn(3, 4), torch.randn(3, 4).bfloat16(), torch.randn(4, 3)]
    tensors = [*plain, whole[2:4], whole[3:5], whole[2:4] + 1]
    path = tmp_path / "__0_0.distcp"
    parts = saved_parts(path, tensors)
    find = TensorFinder()
    for tensor, (offset, length) in zip(tensors, parts):
        found, slow = find(path, offset, length), load_lazily(path, offset=offset, length=length)
        assert isinstance(found, FileTensor) and (found.offset, found.shape, found.dtype) == (
            slow.offset,
            slow.shape,
            slow.dtype,
        )
        assert torch.equal(found.read(), tensor)
    # The second is like the first, and the rows that are views differ in where they begin in their storage.
    assert loads == [parts[i][0] for i in (0, 2, 3, 4, 5, 6)]


def test_what_is_no_tensor_is_refused_each_time(tmp_path: Path, loads: list[int]) -> None:
    path, marker = tmp_path / "file", tmp_path / "was_run"
    parts = saved_parts(path, [torch.zeros(3), Call(marker), Call(marker), {"a": torch.zeros(3)}])
    find = TensorFinder()
    find(path, *parts[0])
    for part in (parts[1], parts[2], parts[1]):
        with pytest.raises(ValueError, match="would run code"):
            find(path, *part)
    assert not isinstance(find(path, *parts[3]), FileTensor)
    assert len(loads) == 5 and not marker.exists()


def test_a_known_pickle_with_too_little_data_goes_the_slow_way(tmp_path: Path, loads: list[int]) -> None:
    """The pickle says four rows; in the second file the storage has two."""
    import zipfile

    path = tmp_path / "file"
    (part,) = saved_parts(path, [torch.ones(4, 8)])
    short = tmp_path / "short"
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(short, "w") as target:
        for info in source.infolist():
            data = source.read(info)
            target.writestr(info.filename, data[:64] if info.filename.endswith("data/0") else data)
    find = TensorFinder()
    find(path, *part)
    try:
        found = find(short, 0, short.stat().st_size)
        slow = load_lazily(short)
        assert (found.offset, found.shape) == (slow.offset, slow.shape)
    except ValueError:
        with pytest.raises(ValueError):
            load_lazily(short)
    assert len(loads) == 2


@pytest.mark.parametrize("cut", [1, 200])
def test_a_part_that_is_cut_off(cut: int, tmp_path: Path) -> None:
    path = tmp_path / "file"
    (part,) = saved_parts(path, [torch.ones(4, 8)])
    os.truncate(path, part[1] - cut)
    with pytest.raises(ValueError, match="cannot be read|is no|is not"):
        TensorFinder()(path, *part)
