"""The compressed cache as plain tensors that every kernel reads and writes in place.

L layers, H local KV heads, D head dimension, W pooling window. A *row* is a place for one sequence. Every (row, layer,
head) has its own number of slots, kept in pages; a page holds slots of one head. Rows that share a prefix share its
full pages, which are not written any more; a page with a slot that may still be written belongs to one row.

A model that evicts (DMS) has two runs of pages per head. The *kept pages* of ``page_table`` hold the unmarked tokens
that are older than the eviction window w; they only ever grow. The *recent pages* of ``recent_table`` hold the latest
w + 1 tokens, whatever was decided about them: token t in page t // page_size of the sequence, place t % page_size. A
page is written once, place after place, and given back when its last token has left the window.
"""

import dataclasses
from dataclasses import dataclass
from typing import NamedTuple, Optional

import torch
from torch import Tensor

from megatron.dmc.kernels.cpu_tuning import empty_in_huge_pages

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LARGEST_CODES = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
"""Largest magnitude of the codes of a quantized cache, by the dtype of its pages."""
PAGE_SIZES = (16, 32, 64)
MAX_EVICT_WINDOW = 1024

TAKEN, RETURNED, REFUSED = range(3)  # what ``counters`` counts


class HeldPages(NamedTuple):
    """Pages of n rows, each [n, L, H, max_pages + R]: of every head its kept pages, then its recent ones, both in the
    order of their tokens.
    """

    column: Tensor
    """int64, where each lies in the head's row of ``page_table``, or ``max_pages`` after that of ``recent_table``."""
    ids: Tensor
    """int64, garbage where none is held."""
    used: Tensor
    """bool, those that are held."""
    open: Tensor
    """bool, those of them that may still be written: at most one of each kind."""


@dataclass(frozen=True, eq=False)
class CacheState:
    """Cache of one engine and rank. All fields are device tensors; no kernel waits for the device to read one."""

    k_pages: Tensor
    v_pages: Tensor
    """[num_pages, page_size, D], keys rotated at the position of their slot's newest token. In the model's dtype; of a
    quantized cache codes, int8 or float8_e4m3fn, that stand for code * scale.
    """
    k_scales: Tensor
    v_scales: Tensor
    """bf16 [num_pages, page_size, 1], one of every slot of a quantized cache; [..., 0] of any other."""
    page_table: Tensor
    """int32 [rows, L, H, max_pages], page ids; what lies beyond the length is garbage."""
    lengths: Tensor
    """int32 [rows, L, H], slots of ``page_table`` in use: 0 before the first token, and while an evicting model has
    kept none beyond its window.
    """
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
    An evicting model's: all tokens that the head has seen.
    """
    recent_table: Tensor
    """int32 [rows, L, H, R], ids of the recent pages: page p of the sequence in column p mod R, R = ceil(w / page_size)
    + 2. Other columns are garbage. R = 0 unless the model evicts.
    """
    marks: Tensor
    """uint8 [rows, L, H, w + 2], 1 for a token that is not kept when it leaves the window: token j in place
    j mod (w + 2). Nobody has decided yet about a token with 0 whose decision comes with the next token. [..., 0] unless
    the model evicts.
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
    def slot_bytes(self) -> int:
        """Bytes of one slot: key, value, and their scales where the cache is quantized."""
        return sum(x[0, 0].nbytes for x in (self.k_pages, self.v_pages, self.k_scales, self.v_scales))

    @property
    def quantized(self) -> bool:
        """True if pages hold codes of 8 bits and their scales."""
        return self.k_scales.size(2) > 0

    @property
    def compresses(self) -> bool:
        """True if the last slot of a head may be written again. Only a model that merges has a ring."""
        return self.ring_w.size(3) > 0

    @property
    def evicts(self) -> bool:
        """True if marked tokens are given up when they leave a window of recent tokens."""
        return self.marks.size(3) > 0

    @property
    def evict_window(self) -> int:
        """Eviction window w: the queries after a token that see it whatever was decided. 0 unless the model evicts."""
        return max(0, self.marks.size(3) - 2)

    def recent_pages(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Pages of a sequence, by its own count, that hold its recent tokens: the first, and the one after the last.

        Args:
            tokens: int64 of any shape, tokens seen.
        """
        return (tokens - 1 - self.evict_window).clamp_min(0) // self.page_size, -(-tokens // self.page_size)

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
        lengths = self.lengths.cpu().long()
        if int(lengths.min()) < 0 or int(lengths.max()) > self.max_slots:
            raise RuntimeError(
                f"lengths are outside of 0..{self.max_slots}: {int(lengths.min())}..{int(lengths.max())}"
            )
        if self.evicts and bool((lengths > (self.segment.cpu() - 1 - self.evict_window).clamp_min(0)).any()):
            raise RuntimeError("a head has kept more tokens than have left its window")
        held = HeldPages(*(x.cpu() for x in self.held_pages(torch.arange(self.lengths.size(0)))))
        used, owned = held.used, held.ids[held.used]
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
        heads = torch.arange(used[0, ..., 0].numel()).view(used[0, ..., :1].shape) * used.size(3)
        place = (heads + held.column)[used]
        first = torch.empty(self.num_pages, dtype=torch.long)
        first[owned] = place
        _none(
            torch.zeros_like(first).index_add_(0, owned, (first[owned] != place).long()) > 0,
            "page {} is held at two places",
        )
        writable = torch.zeros_like(counts).index_add_(0, owned, held.open[used].long()) > 0
        _none(writable & (counts > 1), "page {} may still be written and is shared by {} rows", counts)

    def held_pages(self, rows: Tensor) -> HeldPages:
        """Pages of some rows, kept ones and recent ones. rows: int [n], all of the cache's."""
        rows = rows.to(self.lengths.device)
        lengths = self.lengths[rows].long()[..., None]
        column = torch.arange(self.page_table.size(3), device=rows.device).expand(*lengths.shape[:-1], -1)
        ids, used = self.page_table[rows].long(), column < -(-lengths // self.page_size)
        # That of the next slot to be written.
        open_ = used & (column == ((lengths - 1) if self.compresses else lengths) // self.page_size)
        if not self.evicts:
            return HeldPages(column, ids, used, open_)
        tokens = self.segment[rows].long()[..., None]
        begin, end = self.recent_pages(tokens)
        page = begin + torch.arange(self.recent_table.size(3), device=rows.device)
        at, held = page % self.recent_table.size(3), page < end
        recent = self.recent_table[rows].long().gather(3, at), held, held & (page == tokens // self.page_size)
        kept = column, ids, used, open_
        return HeldPages(*(torch.cat(pair, dim=3) for pair in zip(kept, (at + column.size(3), *recent))))


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
    evict_window: Optional[int] = None,
    dtype: torch.dtype = torch.float32,
    kv_dtype: Optional[torch.dtype] = None,
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
        evict_window: w of a model that evicts, 1 to 1,024 tokens, which has no ring either; ``window`` and ``compress``
            are ignored then.
        dtype: of the model's keys and values: fp32, bf16 or fp16.
        kv_dtype: of the pages: int8 or float8_e4m3fn for a quantized cache; None for ``dtype``.

    Raises:
        ValueError: a shape, dtype or page size that the kernels do not take.
    """
    if dtype not in DTYPES:
        raise ValueError(f"a cache of {dtype} is not possible; use one of {', '.join(map(str, DTYPES))}")
    if kv_dtype is not None and kv_dtype not in LARGEST_CODES:
        raise ValueError(
            f"pages of {kv_dtype} are not possible; use one of {', '.join(map(str, LARGEST_CODES))}, or None"
        )
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
    if evict_window is not None and not 1 <= evict_window <= MAX_EVICT_WINDOW:
        raise ValueError(f"an eviction window of {evict_window} is not possible; use 1 to {MAX_EVICT_WINDOW}")
    evicts = evict_window is not None
    recent, marks = (-(-evict_window // page_size) + 2, evict_window + 2) if evicts else (0, 0)
    ring = 0 if evicts or not compress else 1 if window is None else window
    ring_dtype = torch.float32 if window is None else dtype
    heads = (max_seqs, num_layers, num_kv_heads)

    def zeros(*shape: int, of: torch.dtype = torch.int32) -> Tensor:
        return torch.zeros(shape, dtype=of, device=device)

    def pages() -> Tensor:
        shape, stored = (num_pages, page_size, head_dim), kv_dtype or dtype
        return empty_in_huge_pages(shape, torch.uint8 if kv_dtype else dtype, device).zero_().view(stored)

    scales = (num_pages, page_size, 0 if kv_dtype is None else 1)
    return CacheState(
        k_pages=pages(),
        v_pages=pages(),
        k_scales=zeros(*scales, of=torch.bfloat16),
        v_scales=zeros(*scales, of=torch.bfloat16),
        page_table=zeros(*heads, -(-max_slots // page_size)),
        lengths=zeros(*heads),
        ring_k=zeros(*heads, ring, head_dim, of=ring_dtype),
        ring_v=zeros(*heads, ring, head_dim, of=ring_dtype),
        ring_w=zeros(*heads, ring, of=torch.float32),
        segment=zeros(*heads),
        recent_table=zeros(*heads, recent),
        marks=zeros(*heads, marks, of=torch.uint8),
        free_pages=torch.arange(num_pages, dtype=torch.int32, device=device),
        refcounts=zeros(num_pages),
        counters=zeros(4, of=torch.int64),
    )
