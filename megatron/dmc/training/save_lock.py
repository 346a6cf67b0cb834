"""The lock on a --save directory: one run writes it at a time. No torch."""

import errno
import fcntl
import json
import os
import socket
import time
from pathlib import Path
from typing import Optional

from megatron.dmc.checkpoint.manifest import newest_checkpoint

FILE = "being_written"
_SECONDS_HERE, _SECONDS_ELSEWHERE = 3.0, 120.0
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


class SaveLock:
    """Lock that rank 0 holds from its start to its end, in ``FILE`` under --save.

    It is a POSIX record lock (``fcntl(2)``, F_SETLK): the kernel gives it back when its process ends in whatever way,
    forked writers and loaders do not inherit it, and NFS (version 4, or 3 with lockd), Lustre (mounted with flock),
    GPFS and BeeGFS keep it between nodes. A file server gives the locks of a dead node back when its lease has run
    out, 90 seconds by Linux' default: a holder on another host is waited for that long, so that a requeued job goes
    on. Where a file system has no locks, the run goes on without and :attr:`warning` says so.

    Args:
        save: the --save directory; None locks nothing (pass it on ranks other than 0).
    """

    def __init__(self, save: Optional[str]) -> None:
        self.save = None if save is None else Path(save)
        self.warning = ""
        """What the log should say about it, or ""."""
        self._descriptor = -1

    def acquire(self, start: Optional[Path]) -> None:
        """Take the lock, or wait a little for one whose holder may be gone.

        Args:
            start: newest checkpoint under --save as this run has found it, None for none.

        Raises:
            ValueError: the directory cannot be made, another run holds the lock, or one has held it and written a newer
                checkpoint meanwhile.
        """
        if self.save is None:
            return
        try:
            self.save.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"--save {self.save} cannot be made: {error.strerror or error}") from None
        begun, waited = time.monotonic(), False
        while not self._try():
            if self.warning:
                return
            holder = self._holder()
            here = holder.get("host", socket.gethostname()) == socket.gethostname()
            if time.monotonic() - begun > (_SECONDS_HERE if here else _SECONDS_ELSEWHERE):
                who = ", ".join(f"{name} {value}" for name, value in holder.items()) or "its name cannot be read"
                raise ValueError(
                    f"--save {self.save} is being written by another run ({who}); wait for its end or stop it, or "
                    "name another directory"
                )
            waited = True
            time.sleep(0.2)
        if waited and (newest := newest_checkpoint(self.save)) != start:
            self.release()
            raise ValueError(f"another run that wrote --save {self.save} has just ended, with {newest}; start again")

    def release(self) -> None:
        """Give the lock back and remove its file. Safe to call twice."""
        if self._descriptor >= 0:
            (self.save / FILE).unlink(missing_ok=True)  # type: ignore[operator]
            os.close(self._descriptor)
            self._descriptor = -1

    def _try(self) -> bool:
        path = self.save / FILE  # type: ignore[operator]
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Its last holder may have removed the file between the two calls: then this is a lock on nothing.
            if not os.path.exists(path) or os.stat(path).st_ino != os.fstat(descriptor).st_ino:
                os.close(descriptor)
                return False
        except OSError as error:
            os.close(descriptor)
            if error.errno in _NO_LOCKS:
                self.warning = (
                    f"the file system of --save {self.save} has no locks ({error.strerror}): nothing keeps a second "
                    "run from writing it too"
                )
                path.unlink(missing_ok=True)
            elif error.errno not in (errno.EACCES, errno.EAGAIN):
                raise ValueError(f"--save {self.save} cannot be locked: {error.strerror}") from error
            return False
        self._descriptor = descriptor
        holder = {"host": socket.gethostname(), "process": os.getpid(), "SLURM job": os.environ.get("SLURM_JOB_ID")}
        holder["since"] = time.strftime("%Y-%m-%d %H:%M:%S")
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps({k: v for k, v in holder.items() if v}).encode(), 0)
        return True

    def _holder(self) -> dict:
        """Who says that it holds the lock; empty while it has not written it yet."""
        try:
            found = json.loads((self.save / FILE).read_text())  # type: ignore[operator]
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}
