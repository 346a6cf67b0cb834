"""The compressed cache as plain tensors that every kernel reads and writes in place.

L layers, H local KV heads, D head dimension, W pooling window. A *row* is a place for one sequence. Every (row, layer,
head) has its own number of slots, kept in pages; a page holds slots of one head. Rows that share a prefix share its
full pages, which are not written any more; a page with a slot that may still be written belongs to one row.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Optional

import torch
from torch import Tensor

from megatron.dmc.kernels.cpu_tuning import empty_in_huge_pages

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PAGE_SIZES = (16, 32, 64)

TAKEN, RETURNED, REFUSED = range(3)  # what ``counters`` counts


@dataclass(frozen=True, eq=False)
class CacheState:
    """Cache of one engine and rank. All fields are device tensors; no kernel waits for the device to read one."""

    k_pages: Tensor
    v_pages: Tensor
    """[num_pages, page_size, D], model dtype; keys rotated at the position of their slot's newest token."""
    page_table: Tensor
    """int32 [rows, L, H, max_pages], page ids; what lies beyond the length is garbage."""
    lengths: Tensor
    """int32 [rows, L, H], slots in use; 0: no token yet."""
    ring_k: Tensor
    ring_v: Tensor
    """[rows, L, H, R, D], un-rotated keys and values of the open slot. Token i of the segment lies at i mod W, in the
    model's dtype; R = W. Without a window R = 1, and it is the fp32 mean of the segment so far. R = 0 for a plain
    model.
    """
    ring_w: Tensor
    """fp32 [rows, L, H, R], omega of these tokens; without a window their total."""
    segment: Tensor
    """int32 [rows, L, H], tokens in the open slot; 0 before the first token. Entries of the ring beyond it are garbage.
    """
    free_pages: Tensor
    """int32 [num_pages], a ring of page ids: entries [taken, returned + num_pages), modulo num_pages, are free."""
    refcounts: Tensor
    """int32 [num_pages], rows that hold a page; 0: it is free."""
    counters: Tensor
    """int64 [4]: pages taken, pages returned, and heads that an op on a GPU refused (see the package's text), since the
    start, never reset; the last one is the CUDA kernels' own, 0 between them.
    """

    def __post_init__(self) -> None:
        object.__setattr__(self, "bound", {})  # by compiled library: this state as the library takes it

    def __reduce__(self) -> tuple:
        """Copies and pickles are made of the tensors alone: what libraries know of this state are addresses."""
        return CacheState, self.tensors()

    def tensors(self) -> tuple[Tensor, ...]:
        """All tensors, in the order in which the kernels take them."""
        return tuple([getattr(self, name) for name in _FIELDS])

    @property
    def num_pages(self) -> int:
        return self.k_pages.size(0)

    @property
    def page_size(self) -> int:
        return self.k_pages.size(1)

    @property
    def head_dim(self) -> int:
        return self.k_pages.size(2)

    @property
    def max_slots(self) -> int:
        """Largest number of slots of a head, by the width of the page table."""
        return self.page_table.size(3) * self.page_size

    @property
    def compresses(self) -> bool:
        """True if the last slot of a head may be written again. Only a model that merges has a ring."""
        return self.ring_w.size(3) > 0

    def free_count(self) -> int:
        """Number of free pages. Waits for the device."""
        taken, returned = self.counters[:REFUSED].tolist()
        return self.num_pages - (taken - returned)

    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(x.numel() * x.element_size() for x in self.tensors())

    def check_integrity(self) -> None:
        """Check that every page is free, or held by as many rows as its count says, at the same place of each, and that
        a page which may still be written is held by one. Waits for the device.

        Raises:
            RuntimeError: what is wrong and with which page.
        """
        lengths, table = self.lengths.cpu().long(), self.page_table.cpu().long()
        if int(lengths.min()) < 0 or int(lengths.max()) > self.max_slots:
            raise RuntimeError(
                f"lengths are outside of 0..{self.max_slots}: {int(lengths.min())}..{int(lengths.max())}"
            )
        pages = -(-lengths // self.page_size)
        used = torch.arange(table.size(3)) < pages[..., None]
        owned = table[used]
        taken, returned = self.counters[:REFUSED].tolist()
        if not 0 <= taken - returned <= self.num_pages:
            raise RuntimeError(f"{taken} pages were taken and {returned} returned, of {self.num_pages}")
        order = torch.arange(taken, returned + self.num_pages) % self.num_pages
        free = self.free_pages.cpu().long()[order]
        every = torch.cat((free, owned))
        wrong = every[(every < 0) | (every >= self.num_pages)]
        if wrong.numel():
            raise RuntimeError(f"page id {int(wrong[0])} is not one of {self.num_pages} pages")
        free_counts, counts = (ids.bincount(minlength=self.num_pages) for ids in (free, owned))
        _none(free_counts > 1, "page {} is free twice")
        _none((free_counts > 0) & (counts > 0), "page {} is free and used")
        _none((free_counts == 0) & (counts == 0), "page {} is neither free nor used: it is lost")
        refcounts = self.refcounts.cpu().long()
        _none(refcounts != counts, "page {} is held by {} rows, and its count is {}", counts, refcounts)
        # Where each page lies in a row: (layer, head, column).
        place = torch.arange(used[0].numel()).view(used[0].shape).expand_as(used)[used]
        first = torch.empty(self.num_pages, dtype=torch.long)
        first[owned] = place
        _none(
            torch.zeros_like(first).index_add_(0, owned, (first[owned] != place).long()) > 0,
            "page {} is held at two places",
        )
        last = (
            lengths - 1 if self.compresses else lengths
        ) // self.page_size  # the page with the next slot to be written
        open_ = (used & (torch.arange(table.size(3)) == last[..., None]))[used]
        writable = torch.zeros_like(counts).index_add_(0, owned, open_.long()) > 0
        _none(writable & (counts > 1), "page {} may still be written and is shared by {} rows", counts)


_FIELDS = tuple(field.name for field in dataclasses.fields(CacheState))


def _none(wrong: Tensor, message: str, *numbers: Tensor) -> None:
    """Raise ``RuntimeError`` for the first page that is ``wrong`` (bool [num_pages]), with its numbers."""
    if bool(wrong.any()):
        page = int(wrong.int().argmax())
        raise RuntimeError(message.format(page, *(int(x[page]) for x in numbers)))


def make_state(
    *,
    num_pages: int,
    max_seqs: int,
    num_layers: int,
    num_kv_heads: int,
    head_dim: int,
    max_slots: int,
    page_size: int = 16,
    window: Optional[int] = 12,
    compress: bool = True,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> CacheState:
    """Make an empty cache.

    Args:
        num_pages: single-head pages of the pool, for all layers.
        max_seqs: number of rows.
        max_slots: longest cache of one head, in slots: for a model that may not compress, its longest sequence.
        page_size: slots of a page: 16, 32 or 64.
        window: pooling window W, 1 to 64 tokens, or None for the whole segment.
        compress: False for a plain model, which needs no ring.
        dtype: of keys and values: fp32, bf16 or fp16.

    Raises:
        ValueError: a shape, dtype or page size that the kernels do not take.
    """
    if dtype not in DTYPES:
        raise ValueError(f"a cache of {dtype} is not possible; use one of {', '.join(map(str, DTYPES))}")
    if page_size not in PAGE_SIZES:
        raise ValueError(f"page_size {page_size} is not possible; use one of {PAGE_SIZES}")
    if head_dim % 8 or not 8 <= head_dim <= 256:
        raise ValueError(f"head_dim {head_dim} is not possible; the kernels take multiples of 8 up to 256")
    if window is not None and not 1 <= window <= 64:
        raise ValueError(f"a pooling window of {window} is not possible; the kernels take 1 to 64, or None")
    sizes = {"num_pages": num_pages, "max_seqs": max_seqs, "num_layers": num_layers, "num_kv_heads": num_kv_heads}
    for name, value in {**sizes, "max_slots": max_slots}.items():
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    if num_pages >= 2**31:
        raise ValueError(f"num_pages is {num_pages}; page ids are 32-bit")
    ring = 0 if not compress else 1 if window is None else window
    ring_dtype = torch.float32 if window is None else dtype
    heads = (max_seqs, num_layers, num_kv_heads)

    def zeros(*shape: int, of: torch.dtype = torch.int32) -> Tensor:
        return torch.zeros(shape, dtype=of, device=device)

    return CacheState(
        k_pages=empty_in_huge_pages((num_pages, page_size, head_dim), dtype, device).zero_(),
        v_pages=empty_in_huge_pages((num_pages, page_size, head_dim), dtype, device).zero_(),
        page_table=zeros(*heads, -(-max_slots // page_size)),
        lengths=zeros(*heads),
        ring_k=zeros(*heads, ring, head_dim, of=ring_dtype),
        ring_v=zeros(*heads, ring, head_dim, of=ring_dtype),
        ring_w=zeros(*heads, ring, of=torch.float32),
        segment=zeros(*heads),
        free_pages=torch.arange(num_pages, dtype=torch.int32, device=device),
        refcounts=zeros(num_pages),
        counters=zeros(4, of=torch.int64),
    )
