"""Order of a device's work: what the host submits runs after all that it submitted before, while the host goes on.

A CUDA stream does this for kernels, so there the host launches them at once. A CPU has no stream; a thread stands for
it when the host is not to wait.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Optional, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class Done:
    """Result of work that has been done, with the part of :class:`concurrent.futures.Future` that is used here."""

    __slots__ = ("_error", "_value")

    def __init__(self, work: Callable[[], Any]) -> None:
        """Do the work."""
        self._value = self._error = None
        try:
            self._value = work()
        except BaseException as error:
            self._error = error

    def result(self) -> Any:
        if self._error is not None:
            raise self._error
        return self._value


class DeviceQueue:
    """Work for one device, submitted by one thread."""

    def __init__(self, threaded: bool = False) -> None:
        """``threaded``: work on a thread, rather than launch it on the one that submits."""
        self._thread = ThreadPoolExecutor(1, "dmc-device") if threaded else None
        self._failure: Optional[BaseException] = None

    def submit(self, work: Callable[[], T]) -> Done | Future[T]:
        """Submit work with a result. None of it runs after work that has failed, until :meth:`reset`: the result is the
        same exception.
        """
        if self._thread is not None:
            return self._thread.submit(self._run_inference, work)
        return Done(lambda: self._run(work))

    def order(self, work: Callable[[], object]) -> None:
        """Submit work whose result nobody needs. It runs after work that has failed too: the host does not know of the
        failure yet, and counts on it. What it raises on a thread comes out of the work submitted next.
        """
        if self._thread is None:
            work()
        else:
            self._thread.submit(self._run_ordered, work)

    def synchronize(self) -> None:
        """Wait until a thread has done all that was submitted; kernels on a stream are not waited for."""
        if self._thread is not None:
            self._thread.submit(lambda: None).result()

    def reset(self) -> None:
        """Take work again after a failure, once all that was submitted is over."""
        self.synchronize()
        self._failure = None

    @torch.inference_mode()  # which holds for one thread
    def _run_ordered(self, work: Callable[[], object]) -> None:
        try:
            work()
        except BaseException as error:
            self._failure = self._failure or error

    def _run(self, work: Callable[[], T]) -> T:
        if self._failure is not None:
            raise self._failure
        try:
            return work()
        except BaseException as error:
            self._failure = error
            raise

    @torch.inference_mode()
    def _run_inference(self, work: Callable[[], T]) -> T:
        return self._run(work)


def to_device(values: Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Tensor of ``values`` on ``device``. Does not wait for what a GPU is doing: the copy takes its turn."""
    x = torch.tensor(values, dtype=dtype)
    return x if device.type == "cpu" else x.pin_memory().to(device, non_blocking=True)


def to_host(x: Tensor) -> Tensor:
    """A tensor on the CPU, complete once the device has done what was submitted before."""
    return x if x.device.type == "cpu" else x.to("cpu", non_blocking=True)
