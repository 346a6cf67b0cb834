"""What the reference's ops share: places of a step's tokens, the rotation, and the pool of pages."""

from collections.abc import Iterator
from typing import NamedTuple, Self

import torch
from torch import Tensor

from megatron.dmc.kernels.state import LARGEST_CODES, RETURNED, TAKEN, CacheState


class Layout(NamedTuple):
    """Places of a step's tokens: T' tokens of N sequences that have tokens and a row, of T with the ignored ones."""

    sequence: Tensor
    """int64 [T'], 0..N-1."""
    token: Tensor
    """int64 [T'], place among all T."""
    first: Tensor
    """int64 [N], place of each sequence's first token among the T'."""
    count: Tensor
    """int64 [N], tokens of each sequence, at least 1."""
    rows: Tensor
    """int64 [N], row of the cache."""
    index: Tensor
    """int64 [N], place among all sequences."""

    @classmethod
    def of(cls, cu_seqlens: Tensor, rows: Tensor) -> Self:
        """Layout without padding (a row below 0) and sequences without tokens."""
        starts, counts, rows = cu_seqlens[:-1].long(), cu_seqlens.diff().long(), rows.long()
        keep = (counts > 0) & (rows >= 0)
        starts, counts, rows = starts[keep], counts[keep], rows[keep]
        sequence = torch.arange(rows.numel(), device=rows.device).repeat_interleave(counts)
        first = counts.cumsum(0) - counts
        token = torch.arange(sequence.numel(), device=rows.device) - (first - starts)[sequence]
        return cls(sequence, token, first, counts, rows, keep.nonzero().flatten())

    @property
    def last(self) -> Tensor:
        """int64 [N], place of each sequence's last token among the T'."""
        return self.first + self.count - 1

    def by_length(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of sequences with equally many tokens: (sequences [m], their tokens among the T' [m, s])."""
        for s in self.count.unique().tolist():
            members = (self.count == s).nonzero().flatten()
            yield members, self.first[members, None] + torch.arange(s, device=members.device)


def rotate(x: Tensor, positions: Tensor, inv_freq: Tensor, neuron_out: slice) -> Tensor:
    """fp32 [T, h, D], rotated at ``positions`` (half-split layout); the last channel of the heads ``neuron_out`` is 0
    before and after.
    """
    angle = positions.float()[:, None, None] * inv_freq.float()
    cos, sin = angle.cos(), angle.sin()
    x = x.float().clone()
    x[:, neuron_out, -1] = 0.0
    left, right = x.chunk(2, dim=-1)
    turned = torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1)
    turned[:, neuron_out, -1] = 0.0
    return turned


class Slots(NamedTuple):
    """Slots as pages hold them: of a cache's pool [num_pages, page_size, ...], or new ones [...]."""

    k: Tensor
    v: Tensor
    """[..., D], in the model's dtype; where quantized, the bits of the codes as int8."""
    k_scales: Tensor
    v_scales: Tensor
    """bf16 [..., 1]; [..., 0] unless quantized."""

    @classmethod
    def pool(cls, state: CacheState) -> Self:
        """The pages of a cache: writing to them writes to it."""
        slots = state.k_pages, state.v_pages, state.k_scales, state.v_scales
        return cls(*(x.view(torch.int8) if x.dtype in LARGEST_CODES else x for x in slots))

    @classmethod
    def of(cls, state: CacheState, k: Tensor, v: Tensor) -> Self:
        """fp32 keys and values [..., D] as pages of ``state`` would hold them. A quantized slot has the scale with
        which its largest channel is the largest code, rounded to bf16; all its codes are 0 where that is below fp32's
        smallest normal number.
        """
        if not state.quantized:
            none = k.new_empty((*k.shape[:-1], 0), dtype=torch.bfloat16)
            return cls(k.to(state.k_pages.dtype), v.to(state.v_pages.dtype), none, none)
        dtype, codes, scales = state.k_pages.dtype, [], []
        most = LARGEST_CODES[dtype]
        for x in (k, v):
            scale = (x.abs().amax(-1, keepdim=True) * (1 / most)).to(torch.bfloat16)
            inverse = torch.where(scale.float() < torch.finfo(torch.float32).tiny, 0.0, 1 / scale.float())
            code = (x * inverse).clamp(-most, most)
            codes.append((code if dtype.is_floating_point else code.round()).to(dtype).view(torch.int8))
            scales.append(scale)
        return cls(*codes, *scales)

    def values(self, state: CacheState) -> tuple[Tensor, Tensor]:
        """Keys and values that slots of ``state`` stand for: fp32 [..., D]."""
        if not state.quantized:
            return self.k.float(), self.v.float()
        dtype = state.k_pages.dtype
        return self.k.view(dtype).float() * self.k_scales, self.v.view(dtype).float() * self.v_scales

    def at(self, *where: Tensor) -> Self:
        """Slots by an index of the leading axes."""
        return Slots(*(x[where] for x in self))


def take(state: CacheState, demand: Tensor, what: str = "the step needs") -> tuple[Tensor, Tensor, Tensor]:
    """Take pages for owners in order: an owner's number, which of its pages, and the page's id, each [pages].

    Demand per owner -> exclusive prefix sum -> slice of the ring of free pages: no order of execution changes which
    owner gets which page.

    Args:
        demand: int64 [owners], pages wanted.
        what: of the error, where too few are free.
    """
    total = int(demand.sum())
    if total > state.free_count():
        raise RuntimeError(f"{what} {total} pages and {state.free_count()} are free; nothing was written")
    order = torch.arange(total, device=demand.device)
    owner = torch.arange(demand.numel(), device=demand.device).repeat_interleave(demand)
    pages = state.free_pages[(state.counters[TAKEN] + order) % state.num_pages]
    state.refcounts[pages.long()] = 1
    state.counters[TAKEN] += total
    return owner, order - (demand.cumsum(0) - demand)[owner], pages


def give_back(state: CacheState, ids: Tensor) -> None:
    """Let go of pages, int64 [n] in the order of their return. Where several rows hold one it is returned by the last
    that lets go.
    """
    state.refcounts.index_add_(0, ids, torch.full_like(ids, -1, dtype=torch.int32))
    order = torch.arange(ids.numel(), device=ids.device)
    last = order.new_zeros(state.num_pages).scatter_reduce_(0, ids, order, "amax")
    ids = ids[(state.refcounts[ids] == 0) & (last[ids] == order)]
    order = order[: ids.numel()]
    state.free_pages[(state.counters[RETURNED] + order) % state.num_pages] = ids.to(torch.int32)
    state.counters[RETURNED] += ids.numel()


def check_room(state: CacheState, after: Tensor) -> None:
    """Raise ``RuntimeError`` where a head would hold more slots than its row of the page table. after: int64 [N, H]."""
    if after.numel() and int(after.max()) > state.max_slots:
        raise RuntimeError(
            f"a head would hold {int(after.max())} slots, and its row of the page table {state.max_slots}"
        )


def read_slots(state: CacheState, ids: Tensor, used: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values in fp32, [..., pages * page_size, D], 0 where not ``used``.

    Args:
        ids: int64 [..., pages], page ids; those without a used slot may be garbage.
        used: bool [..., pages * page_size].
    """
    # Ids and slots that are not in use are garbage, and 0 * NaN is NaN.
    ids = ids.masked_fill(~used.unflatten(-1, (-1, state.page_size)).any(-1), 0)
    # [..., pages, page_size, D] -> [..., pages * page_size, D]
    slots = Slots.pool(state).at(ids).values(state)
    return tuple(x.flatten(-3, -2).masked_fill(~used[..., None], 0.0) for x in slots)


def kept_slots(state: CacheState, layer: int, rows: Tensor, limit: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Slots [0, limit) of every head's ``page_table`` in fp32, [N, H, n, D], and which of them there are: bool
    [N, H, n]. limit: int64 [N, H].
    """
    pages = -(-int(limit.max()) // state.page_size)
    used = torch.arange(pages * state.page_size, device=limit.device) < limit[..., None]
    return *read_slots(state, state.page_table[rows, layer, :, :pages].long(), used), used
