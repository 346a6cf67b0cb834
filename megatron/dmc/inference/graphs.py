"""Decode steps as CUDA graphs: the host writes three numbers per sequence into a buffer, and launches one graph.

Compression makes attention short, and a decode step then is hundreds of kernels of a few microseconds: launching them
one by one would take longer than running them. A graph has fixed shapes, so there is one for each of a few batch sizes;
the rows that a batch does not fill are padding (row -1), which every kernel ignores. Prompts, and mixed steps, run as
they are.
"""

import bisect
import itertools
import sys
import time
from collections.abc import Callable
from typing import Optional

import torch
from torch import Tensor

from megatron.dmc.inference.model import InputBatch

Forward = Callable[[InputBatch], Tensor]
Replay = Callable[[], Tensor]


def capture_sizes(most: int) -> list[int]:
    """Batch sizes up to ``most``, close enough that little is padding (vLLM's steps): 1, 2, 4, 8, 16, 24, ..., 256,
    272, ...
    """
    sizes = [1, 2, 4, *range(8, 256, 8), *range(256, most + 16, 16)]
    return [size for size in sizes if size < most] + [most]


class CudaGraphRecorder:
    """Captures functions without arguments whose inputs and results stay where they are. All graphs share one pool of
    memory.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Callable[[], Tensor]) -> Replay:
        current = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            run()  # what libraries reserve on first use must not be captured
        current.wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            out = run()

        def replay() -> Tensor:
            graph.replay()
            return out

        return replay


class DecodeGraphs:
    """Forward pass of steps in which every sequence has one token, one graph per batch size."""

    def __init__(
        self,
        forward: Forward,
        max_seqs: int,
        device: torch.device,
        record: Optional[Callable[[Callable[[], Tensor]], Replay]] = None,
    ) -> None:
        """Capture all sizes, the largest first, so that the smaller ones find its memory. Changes nothing in the cache.

        Args:
            forward: takes the tokens into the cache; fp32 [m, vocabulary]. Must not wait for the device.
            record: makes a graph of a function; default: :class:`CudaGraphRecorder`.
        """
        began = time.perf_counter()
        self._forward = forward
        record = record or CudaGraphRecorder(device)
        on_gpu = device.type == "cuda"
        # Token, position and row of each sequence. Two copies on the host, in turn: while a step is in flight, its own
        # may not have been read yet when the next is launched.
        self._hosts = itertools.cycle([torch.zeros(3, max_seqs, dtype=torch.int32, pin_memory=on_gpu) for _ in "ab"])
        self._inputs = torch.zeros(3, max_seqs, dtype=torch.int32, device=device)
        self._inputs[2] = -1
        self._ends = torch.arange(max_seqs + 1, dtype=torch.int32, device=device)
        self._all = torch.arange(max_seqs, device=device)
        self.sizes = capture_sizes(max_seqs)
        self._replays = {size: record(lambda size=size: self._run(size)) for size in reversed(self.sizes)}  # type: ignore[misc]
        if on_gpu:
            torch.cuda.synchronize(device)
            print(
                f"megatron.dmc: captured CUDA graphs of {len(self.sizes)} batch sizes up to {max_seqs} in "
                f"{time.perf_counter() - began:.1f} s",
                file=sys.stderr,
            )

    @torch.inference_mode()
    def _run(self, size: int) -> Tensor:
        tokens, positions, rows = self._inputs[:, :size]
        return self._forward(InputBatch(tokens.long(), positions, self._ends[: size + 1], rows, size, self._all[:size]))

    @torch.inference_mode()
    def __call__(self, tokens: list[int], positions: list[int], rows: list[int]) -> Optional[Tensor]:
        """Logits of a decode step, fp32 [n, vocabulary]; None when there is no graph for so many sequences.

        Args:
            tokens: one token of each of n sequences.
            positions: of these tokens.
            rows: of the sequences, in the cache.
        """
        n = len(tokens)
        if n > self.sizes[-1]:
            return None
        size = self.sizes[bisect.bisect_left(self.sizes, n)]
        copied = next(self._hosts)[:, :size]
        host = copied.numpy()
        host[:2, n:], host[2, n:] = 0, -1
        # Whole rows: numpy takes a microsecond for an assignment, whatever its length.
        host[0, :n], host[1, :n], host[2, :n] = tokens, positions, rows
        self._inputs[:, :size].copy_(copied, non_blocking=True)
        return self._replays[size]()[:n]
