"""Writing past the page cache: the same bytes whatever the file system refuses."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from megatron.dmc.checkpoint.direct import DirectFile


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DirectFile, "BLOCK", 8192)


def pieces() -> list[bytes]:
    sizes = (0, 1, 7, 4096, 8191, 8192, 8193, 30_000, 5)
    return [bytes([i]) * (size - 1) + b"|" if size else b"" for i, size in enumerate(sizes)]


def write(path: Path, parts: list[bytes]) -> None:
    with DirectFile(path) as file:
        for i, part in enumerate(parts):
            assert file.write(part) == len(part) and file.tell() == sum(map(len, parts[: i + 1]))
            file.flush()


@pytest.mark.parametrize("count", range(10))
def test_bytes(count: int, tmp_path: Path) -> None:
    write(tmp_path / "file", pieces()[:count])
    assert (tmp_path / "file").read_bytes() == b"".join(pieces()[:count])


def test_an_older_file_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x" * 50_000)
    write(tmp_path / "file", [b"new"])
    assert (tmp_path / "file").read_bytes() == b"new"


@pytest.mark.parametrize("fault", ["refused at open", "refused at write", "cut short"])
def test_without_direct_writes(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inner_open, inner_write, faults = os.open, os.write, []

    def open_(path: Any, flags: int, mode: int = 0o777, **named: Any) -> int:
        if fault == "refused at open" and flags & os.O_DIRECT:
            faults.append(path)
            raise OSError(errno.EINVAL, "Invalid argument")
        return inner_open(path, flags, mode, **named)

    def write_(descriptor: int, data: memoryview) -> int:
        if fault != "refused at open" and len(faults) == 0:
            faults.append(descriptor)
            if fault == "refused at write":
                raise OSError(errno.EINVAL, "Invalid argument")
            os.ftruncate(descriptor, 0)
            # As a direct write of a whole sector would be, were the disk to stop in it.
            return os.pwrite(descriptor, data[:4096], 0) and os.lseek(descriptor, 4096, os.SEEK_SET)
        return inner_write(descriptor, data)

    monkeypatch.setattr(os, "open", open_)
    monkeypatch.setattr(os, "write", write_)
    write(tmp_path / "file", pieces())
    monkeypatch.undo()
    assert faults and (tmp_path / "file").read_bytes() == b"".join(pieces())


@pytest.mark.parametrize("at", ["write", "fsync"])
def test_a_full_disk_names_the_file(at: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, at, full)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError, match="No space left") as error:
        write(tmp_path / "file", pieces())
    assert error.value.filename == str(tmp_path / "file") and error.value.errno == errno.ENOSPC
    assert len(os.listdir("/proc/self/fd")) == before
