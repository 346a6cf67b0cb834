"""The worker's half of the cache: rows of requests, and a device's memory as a :class:`CacheState`; nothing of vLLM."""

from __future__ import annotations

import dataclasses
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megatron.dmc import kernels
from megatron.dmc.kernels.cpu_tuning import clear_in_huge_pages
from megatron.dmc.kernels.state import CacheState, make_state
from megatron.dmc.vllm.grants import Layout, Lengths

ALIGNMENT = 64  # bytes, of each tensor in the buffer


@dataclass
class Plan:
    """What the scheduler tells every worker before a step."""

    begun: list[tuple[str, int, int]] = field(default_factory=list)
    """(request, life, block) of requests that begin, or begin again: the block names the request to the model."""
    ended: list[str] = field(default_factory=list)
    """Requests that gave their blocks back since the last step, finished or preempted."""
    refused: list[str] = field(default_factory=list)
    """Requests of this step that the cache cannot hold, even alone. They end with an error."""
    kept: list[tuple[int, str]] = field(default_factory=list)
    """(snapshot, request) of requests that ended and whose state is kept."""
    copied: list[tuple[int, str]] = field(default_factory=list)
    """(snapshot, request) of requests whose state before this step is kept, while they go on."""
    resumed: dict[str, tuple[int, int]] = field(default_factory=dict)
    """(snapshot, its tokens) of requests of ``begun`` that continue from one."""
    dropped: list[int] = field(default_factory=list)
    """Snapshots that are given up, some of which ``resumed`` names for the last time."""
    tokens: dict[str, int] = field(default_factory=dict)
    """Tokens of each request of this step."""
    report: bool = True
    """Whether the lengths after this step are reported."""


@dataclass
class _Row:
    index: int
    life: int
    block: int
    tokens: int = 0
    refused: bool = False


def steps_late(device: torch.device) -> int:
    """Steps that lie between a step and the one whose lengths are told after it."""
    return int(device.type == "cuda")


def layout(page_size: int, **shape: Any) -> Layout:
    """Division of a buffer for :class:`Rows` of this shape (see :func:`make_state`, without ``num_pages``)."""
    one, two = (make_state(num_pages=n, page_size=page_size, device="meta", **shape) for n in (1, 2))
    block = shape["num_layers"] * shape["num_kv_heads"]
    pages = 2 * one.k_pages.numel() * one.k_pages.element_size()
    overhead = two.nbytes() - one.nbytes() - pages
    fixed = one.nbytes() - pages - overhead + ALIGNMENT * len(one.tensors())
    return Layout(block * pages, block * overhead, fixed)


def state_in(buffer: Tensor, num_pages: int, **shape: Any) -> CacheState:
    """Make an empty cache whose tensors lie in ``buffer`` (uint8 [bytes], zeros) one behind the other."""
    model = make_state(num_pages=num_pages, device="meta", **shape)
    tensors, at = {}, 0
    for spec in dataclasses.fields(model):
        like = getattr(model, spec.name)
        size = like.numel() * like.element_size()
        if at + size > buffer.numel():
            raise ValueError(f"a cache of {num_pages} pages does not fit {buffer.numel()} bytes; give it fewer pages")
        tensors[spec.name] = buffer[at : at + size].view(like.dtype).view(like.shape)
        at += -(-size // ALIGNMENT) * ALIGNMENT
    torch.arange(num_pages, dtype=torch.int32, out=tensors["free_pages"])
    return CacheState(**tensors)


class Rows:
    """Rows of the cache by request. Every request that runs has one; the scheduler's grants guarantee its pages."""

    def __init__(self, max_seqs: int, page_size: int, **shape: Any) -> None:
        """``shape``: see :func:`make_state`, without ``num_pages``; heads are those of this rank."""
        self.shape = dict(shape, max_seqs=max_seqs, page_size=page_size)
        self.layout = layout(**self.shape)
        self.heads = shape["num_layers"] * shape["num_kv_heads"]
        self.state: CacheState | None = None

    def bind(self, buffer: Tensor) -> None:
        """Build the cache in ``buffer`` (uint8 [bytes], a whole number of blocks). All rows are empty after it."""
        clear_in_huge_pages(buffer)
        blocks = buffer.numel() // self.layout.block_bytes
        self.state = state_in(buffer, self.layout.usable(blocks) * self.heads, **self.shape)
        self._free = list(range(self.shape["max_seqs"] - 1, -1, -1))
        self._rows: dict[str, _Row] = {}
        self._snapshots: dict[int, int] = {}
        self._step: list[str] = []  # whose lengths are reported
        self._failed: set[int] = set()
        self._copies: deque[tuple[list[tuple[str, int, int]], Tensor, torch.cuda.Event | None]] = deque()
        self.row_of_block = torch.full((blocks,), -1, dtype=torch.int32, device=buffer.device)
        """int32 [blocks], row of the request whose first block it is; -1 where there is none."""

    @property
    def requests(self) -> int:
        """Number of requests that hold a row."""
        return len(self._rows)

    @property
    def snapshots(self) -> int:
        """Number of kept states, which hold a row each."""
        return len(self._snapshots)

    def begin(self, plan: Plan) -> None:
        """Begin a step: free what ended, keep what is to be kept, and give rows to what begins."""
        for snapshot, request in plan.kept:
            row = self._rows.pop(request)
            self.row_of_block[row.block] = -1
            self._snapshots[snapshot] = row.index
        # Whoever is the last to continue from a snapshot takes its row: there may be no pages for a copy.
        last = {snapshot: request for request, (snapshot, _) in plan.resumed.items() if snapshot in plan.dropped}
        ended = [row for request in plan.ended if (row := self._rows.pop(request, None)) is not None]
        index = [row.index for row in ended]
        index += [self._snapshots.pop(snapshot) for snapshot in plan.dropped if snapshot not in last]
        if index:
            kernels.free(self.state, self._on_device(index))
            self.row_of_block[[row.block for row in ended]] = -1
            self._free += index
        for snapshot, request in plan.copied:
            self._snapshots[snapshot] = self._fork(self._rows[request].index)
        for request, life, block in plan.begun:
            snapshot, tokens = plan.resumed.get(request, (None, 0))
            if snapshot is None:
                at = self._free.pop()
            elif last.get(snapshot) == request:
                at = self._snapshots.pop(snapshot)
            else:
                at = self._fork(self._snapshots[snapshot])
            self._rows[request] = row = _Row(at, life, block, tokens)
            self.row_of_block[block] = row.index
        for request in plan.refused:
            row = self._rows[request]
            self.row_of_block[row.block] = -1  # its tokens are padding: the pages for them were not granted
            if row.tokens and not row.refused:
                self._failed.add(row.block)
                row.refused = True
        for request, tokens in plan.tokens.items():
            self._rows[request].tokens += tokens
        self._step = list(plan.tokens) if plan.report else []

    def _on_device(self, rows: list[int]) -> Tensor:
        return torch.tensor(rows, dtype=torch.int32, device=self.row_of_block.device)

    def _fork(self, source: int) -> int:
        """Copy a row, whose final pages both have then. Returns the copy's."""
        target = self._free.pop()
        kernels.fork(self.state, self._on_device([source]), self._on_device([target]))
        return target

    def take_failed(self) -> set[int]:
        """First blocks of refused requests, once each."""
        failed, self._failed = self._failed, set()
        return failed

    def take_lengths(self) -> dict[str, tuple[int, Lengths]]:
        """Lives and lengths of requests after the last step, none where its plan wants no report; on a GPU after the
        one before, which has ended by now, so that the host waits for nothing and all ranks tell of the same step.
        """
        if self._step:
            rows = [self._rows[request] for request in self._step]
            at = torch.tensor([row.index for row in rows], device=self.row_of_block.device)
            lengths, event = self.state.lengths[at].flatten(1), None
            if lengths.is_cuda:
                lengths = torch.empty_like(lengths, device="cpu", pin_memory=True).copy_(lengths, non_blocking=True)
                event = torch.cuda.Event()
                event.record()
            known = [(request, row.life, row.tokens) for request, row in zip(self._step, rows, strict=True)]
            self._copies.append((known, lengths, event))
            self._step = []
        found: dict[str, tuple[int, Lengths]] = {}
        while len(self._copies) > steps_late(self.row_of_block.device):
            known, lengths, event = self._copies.popleft()
            if event is not None:
                event.synchronize()
            requests, lives, tokens = zip(*known, strict=True)
            after = Lengths.of_all(tokens, lengths.numpy(), self.shape["page_size"])
            found |= zip(requests, zip(lives, after, strict=True), strict=True)
        return found
