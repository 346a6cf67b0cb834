"""The two files of ``dmc batch``: lines of requests in, lines of responses out. Either may be larger than memory.

The output is the journal of the run. A line is written by one call, whole, when its response is there; what a kill
leaves behind is at most one torn line at the end, which is cut off when the next run begins. So a line that is there is
done.
"""

import contextlib
import fcntl
import gzip
import json
import os
import stat
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
_BEGINNING = b'{"id": "' + _PREFIX.encode()
"""First bytes of every line of an output, by which a torn one is known."""
_HEAD = 1 << 16
_GZIP = b"\x1f\x8b"
_FORMATS = {
    b"\x28\xb5\x2f\xfd": "zstd; decompress it first: zstd -d",
    b"\xfd7zXZ\0": "xz; decompress it first: unxz",
    b"\x04\x22\x4d\x18": "lz4; decompress it first: lz4 -d",
    b"BZh": "bzip2; decompress it first: bunzip2",
    b"PK\x03\x04": "a zip archive; unpack it first: unzip",
    b"PAR1": "Parquet; write it as JSONL first",
    b"\xff\xfe": "UTF-16; convert it first: iconv -f UTF-16 -t UTF-8",
    b"\xfe\xff": "UTF-16; convert it first: iconv -f UTF-16 -t UTF-8",
}
"""Formats that are no lines of UTF-8, by their first bytes, with the way out."""


def _check_head(path: str | Path, head: bytes) -> None:
    """Raise ``ValueError`` when a file that begins with ``head`` cannot hold a JSON object in every line."""
    name = next((name for magic, name in _FORMATS.items() if head.startswith(magic)), None)
    if name is None and b"\0" in head[:4]:
        name = "UTF-16 or UTF-32, or no text at all; give JSONL in UTF-8"
    if name is not None:
        raise ValueError(f"{path} is {name}")
    lines = [line for line in head.split(b"\n")[:-1] if line.strip()]
    if any(_object(line) is not None for line in lines):
        return
    if head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
        raise ValueError(f"{path} is one JSON array; write each element on a line of its own: jq -c '.[]' {path}")
    if lines:
        raise ValueError(f"{path} has no JSON object in its first {len(lines)} lines; give one in every line (JSONL)")


def _object(line: bytes) -> Optional[dict[str, Any]]:
    """JSON object of a line; None for anything else."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


class Input:
    """Reader of the lines of a file, plain or gzip (told by its first bytes)."""

    def __init__(self, path: str | Path) -> None:
        """Open the file. Raises ``ValueError`` when it cannot be read, or is nothing like JSONL."""
        self.path = path
        try:
            self._raw: BinaryIO = open(path, "rb", buffering=_HEAD)  # noqa: SIM115
            compressed = self._raw.peek(2)[:2] == _GZIP  # type: ignore[attr-defined]
        except OSError as error:
            raise ValueError(f"{path} cannot be read: {error.strerror}") from error
        self._file: Any = gzip.GzipFile(fileobj=self._raw) if compressed else self._raw
        self.nbytes = os.fstat(self._raw.fileno()).st_size
        try:
            _check_head(path, self._file.peek(_HEAD))
        except (EOFError, OSError, zlib.error):
            pass  # damaged: reading its lines says where
        except ValueError:
            self.close()
            raise

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

    ids: dict[str, str] = field(default_factory=dict)
    """Their ``custom_id``, without duplicates, and the digest of the request; "" where an older version wrote none."""
    duplicates: set[tuple[int, str]] = field(default_factory=set)
    """Line number and ``custom_id`` of lines that got an error because their id was there before."""
    errors: int = 0
    """Number of lines with an error."""

    def __len__(self) -> int:
        return len(self.ids) + len(self.duplicates)


def _check_written(path: str | Path, number: int, line: bytes) -> tuple[int, dict[str, Any]]:
    """Number of the input line, and the entry, of a line of an output.

    Raises:
        ValueError: ``dmc batch`` has not written it.
    """
    entry = _object(line) or {}
    name, custom, error = entry.get("id"), entry.get("custom_id"), entry.get("error")
    at = name.removeprefix(_PREFIX) if isinstance(name, str) else ""
    if not (at.isdecimal() and len(at) < 19 and isinstance(custom, str) and isinstance(error, (dict, type(None)))):
        raise ValueError(f"{path}, line {number} is not a line that dmc batch writes; name another output file")
    return int(at), entry


def _digest_of(entry: dict[str, Any]) -> str:
    """Digest of the request in an entry that :meth:`Output.write` has written; "" in one of an older version."""
    response = entry.get("response")
    name = response.get("request_id") if isinstance(response, dict) else None
    return name.rpartition("_")[2] if isinstance(name, str) and name.count("_") == 2 else ""


class Output:
    """Output file, held by one run at a time."""

    def __init__(self, path: str | Path, write: bool = True) -> None:
        """Open or make the file, cut off a torn last line, and read which lines are done.

        Args:
            write: False for a rank that only has to know what is done.

        Raises:
            ValueError: it cannot be written, is no regular file, belongs to something else, or another run is writing
                it. Nothing of it has been changed then.
        """
        self.path, self.done = path, Done()
        self._synced = time.monotonic()
        self._fd: Optional[int] = None
        try:
            if write:
                Path(path).parent.mkdir(parents=True, exist_ok=True)
            # A pipe would wait for its reader, and could neither be read again nor cut.
            if os.path.exists(path) and not stat.S_ISREG(os.stat(path).st_mode):
                raise ValueError(f"{path} cannot be opened: it is no regular file; name one, as output is read again")
            if write:
                self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._end = self._read()
            if self._fd is not None:
                os.ftruncate(self._fd, self._end)
        except BlockingIOError:
            self._release()
            raise ValueError(
                f"{path} is being written by another run; wait for it, or name another output file"
            ) from None
        except OSError as error:
            self._release()
            raise ValueError(f"{path} cannot be opened: {error.strerror}") from error
        except ValueError:
            self._release()
            raise

    def _read(self) -> int:
        """Read the lines that are done; returns where the last whole line ends."""
        end = 0
        with open(self.path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.endswith(b"\n"):
                    self._check_torn(number, line)
                    break
                at, entry = _check_written(self.path, number, line)
                if (entry["error"] or {}).get("code") == DUPLICATE:
                    self.done.duplicates.add((at, entry["custom_id"]))
                else:
                    self.done.ids[entry["custom_id"]] = _digest_of(entry)
                self.done.errors += entry["error"] is not None
                end += len(line)
        return end

    def _check_torn(self, number: int, line: bytes) -> None:
        """Raise ``ValueError`` for a last line without an end that is no part of one of ours.

        A few bytes, or the zeros that a power cut leaves, are ours only behind a whole line that is.
        """
        ours = line.startswith(_BEGINNING) or (number > 1 and (_BEGINNING.startswith(line) or not line.strip(b"\0")))
        if not ours:
            raise ValueError(
                f"{self.path}, line {number} has no end and is not a line that dmc batch writes; name another output "
                "file"
            )

    def write(
        self,
        number: int,
        custom_id: str,
        digest: str,
        status: int,
        body: dict[str, Any],
        error: Optional[dict[str, Any]] = None,
    ) -> None:
        """Append the response to input line ``number`` in OpenAI's form, in one write.

        Args:
            digest: of the request, for later runs.

        Raises:
            ValueError: the disk is full, or fails. The file ends with its last whole line then.
        """
        if self._fd is None:
            return
        response = {"status_code": status, "request_id": f"req_{number}_{digest}", "body": body}
        entry = {"id": f"{_PREFIX}{number}", "custom_id": custom_id, "response": response, "error": error}
        line = json.dumps(entry).encode() + b"\n"
        try:
            self._append(memoryview(line))
            if time.monotonic() - self._synced > SYNC_EVERY:
                self._sync()
        except OSError as error:
            raise self._failed(error) from error

    def _append(self, data: memoryview) -> None:
        assert self._fd is not None
        try:
            end = self._end + len(data)
            while data:  # a write may be short on a full disk
                data = data[os.write(self._fd, data) :]
            self._end = end
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(self._fd, self._end)
            raise

    def _failed(self, error: OSError) -> ValueError:
        return ValueError(
            f"{self.path} cannot be written: {error.strerror}; what is there is whole: run the same command again for "
            "the rest"
        )

    def _sync(self) -> None:
        if self._fd is not None:
            os.fsync(self._fd)
        self._synced = time.monotonic()

    def close(self) -> None:
        """Close the file; what was written is on the disk then. Raises ``ValueError`` when the disk fails."""
        try:
            self._sync()
        except OSError as error:
            raise self._failed(error) from error
        finally:
            self._release()

    def _release(self) -> None:
        """Give the file and its lock free."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None
