"""The two files of ``dmc batch``: lines of requests in, lines of responses out. Either may be larger than memory.

The output is the journal of the run. A line is written by one call, whole, when its response is there; what a kill
leaves behind is at most one torn line at the end, which is cut off when the next run begins. So a line that is there is
done.
"""

from __future__ import annotations

import fcntl
import gzip
import json
import os
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Optional

MAX_LINE = 64 << 20  # bytes; a longer line gets an error, without being held in memory
SYNC_EVERY = 1.0  # seconds between two fsyncs: a kill loses nothing, a power cut at most this
DUPLICATE = "duplicate_custom_id"
_PREFIX = "batch_req_"


class Input:
    """Reader of the lines of a file, plain or gzip (told by its first bytes)."""

    def __init__(self, path: str | Path) -> None:
        """Open the file. Raises ``ValueError`` when it cannot be read."""
        self.path = path
        try:
            self._raw: BinaryIO = open(path, "rb")  # noqa: SIM115
            compressed = self._raw.peek(2)[:2] == b"\x1f\x8b"  # type: ignore[attr-defined]
        except OSError as error:
            raise ValueError(f"{path} cannot be read: {error.strerror}") from error
        self._file: Any = gzip.GzipFile(fileobj=self._raw) if compressed else self._raw
        self.nbytes = os.fstat(self._raw.fileno()).st_size

    def tell(self) -> int:
        """Position in the file as it lies there, in bytes."""
        return self._raw.tell()

    def lines(self, shard: tuple[int, int] = (0, 1)) -> Iterator[tuple[int, Optional[bytes]]]:
        """Number (from 1) and bytes of every ``shard[1]``-th line that is not blank; None for one longer than
        ``MAX_LINE``.

        Raises:
            ValueError: a gzip file that is damaged or cut off; what came before has been given.
        """
        number, (index, count) = 0, shard
        while True:
            try:
                line = self._file.readline(MAX_LINE + 1)
                whole = len(line) <= MAX_LINE
                rest = line
                while not whole and rest and not rest.endswith(b"\n"):
                    rest = self._file.readline(MAX_LINE + 1)
            except (EOFError, gzip.BadGzipFile, zlib.error, OSError) as error:
                raise ValueError(f"{self.path} cannot be read beyond line {number}: {error}; copy it again") from error
            if not line:
                return
            number += 1
            if (number - 1) % count == index and (not whole or line.strip()):
                yield number, line if whole else None

    def close(self) -> None:
        self._file.close()
        self._raw.close()


@dataclass
class Done:
    """Lines that the output has already."""

    ids: set[str] = field(default_factory=set)
    """Their ``custom_id``, without duplicates."""
    duplicates: set[tuple[int, str]] = field(default_factory=set)
    """Line number and ``custom_id`` of lines that got an error because their id was there before."""
    errors: int = 0
    """Number of lines with an error."""

    def __len__(self) -> int:
        return len(self.ids) + len(self.duplicates)


def _number(entry: Any, where: str) -> int:
    """Number of the input line of an output line. Raises ``ValueError`` for a line that ``dmc batch`` did not write."""
    name, custom = (entry.get("id"), entry.get("custom_id")) if isinstance(entry, dict) else (None, None)
    number = name.removeprefix(_PREFIX) if isinstance(name, str) else ""
    if not number.isdecimal() or not isinstance(custom, str):
        raise ValueError(f"{where} is not a line that dmc batch writes; name another output file")
    return int(number)


class Output:
    """Output file, held by one run at a time."""

    def __init__(self, path: str | Path, write: bool = True) -> None:
        """Open or make the file, cut off a torn last line, and read which lines are done.

        Args:
            write: False for a rank that only has to know what is done.

        Raises:
            ValueError: it cannot be written, belongs to something else, or another run is writing it.
        """
        self.path, self.done = path, Done()
        self._synced = time.monotonic()
        self._fd: Optional[int] = None
        try:
            if write:
                Path(path).parent.mkdir(parents=True, exist_ok=True)
                self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            end = self._read()
            if self._fd is not None:
                os.ftruncate(self._fd, end)
        except BlockingIOError:
            self.close()
            raise ValueError(
                f"{path} is being written by another run; wait for it, or name another output file"
            ) from None
        except OSError as error:
            raise ValueError(f"{path} cannot be opened: {error.strerror}") from error

    def _read(self) -> int:
        """Read the lines that are done; returns where the last whole line ends."""
        end = 0
        with open(self.path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.endswith(b"\n"):
                    break
                try:
                    entry = json.loads(line)
                except ValueError:
                    entry = None
                at = _number(entry, f"{self.path}, line {number}")
                if (entry.get("error") or {}).get("code") == DUPLICATE:
                    self.done.duplicates.add((at, entry["custom_id"]))
                else:
                    self.done.ids.add(entry["custom_id"])
                self.done.errors += entry.get("error") is not None
                end += len(line)
        return end

    def write(
        self, number: int, custom_id: str, status: int, body: dict[str, Any], error: Optional[dict[str, Any]] = None
    ) -> None:
        """Append the response to input line ``number`` in OpenAI's form, in one write."""
        if self._fd is None:
            return
        response = {"status_code": status, "request_id": f"req_{number}", "body": body}
        entry = {"id": f"{_PREFIX}{number}", "custom_id": custom_id, "response": response, "error": error}
        data = memoryview(json.dumps(entry).encode() + b"\n")
        # A write may be short on a full disk; the line is torn then, and the next run cuts it off.
        while data:
            data = data[os.write(self._fd, data) :]
        if time.monotonic() - self._synced > SYNC_EVERY:
            self._sync()

    def _sync(self) -> None:
        if self._fd is not None:
            os.fsync(self._fd)
        self._synced = time.monotonic()

    def close(self) -> None:
        """Close the file; what was written is on the disk then."""
        if self._fd is not None:
            self._sync()
            os.close(self._fd)
            self._fd = None
