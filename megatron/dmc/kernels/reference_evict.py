"""The reference of eviction (DMS, arXiv 2506.05345): marks, a window of recent tokens in pages of their own, and those
that are kept beyond it.
"""

from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.dmc.kernels.params import NEURON_ALL, NEURON_NONE, NEURON_QUERY, Appended, EvictParams
from megatron.dmc.kernels.reference_pages import Layout, Slots, check_room, give_back, rotate, take
from megatron.dmc.kernels.state import CacheState


def _in_table(state: CacheState, token: Tensor) -> Tensor:
    """Column of ``recent_table`` with the page of a token, by its index in the sequence."""
    return token // state.page_size % state.recent_table.size(3)


def _of_tokens(state: CacheState, table: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
    """Page ids [n, H, c] of recent tokens, int64 [n, c], and places in them [n, 1, c]. table: [n, H, R], the row of
    ``recent_table`` of their sequence.
    """
    column = _in_table(state, token)[:, None].expand(-1, table.size(1), -1)
    return table.gather(2, column).long(), (token % state.page_size)[:, None]


class _Step:
    """A step of one layer: T' tokens of N sequences, and the F tokens that leave the windows of these, one sequence
    below the other. Token j leaves when token j + w + 1 comes.
    """

    def __init__(self, state: CacheState, layer: int, params: EvictParams) -> None:
        self.state, self.layer, self.params = state, layer, params
        self.layout = layout = Layout.of(params.cu_seqlens, params.rows)
        self.rows, self.sequence = layout.rows, layout.sequence
        self.heads = torch.arange(params.k.size(1), device=params.k.device)
        self.before = state.segment[layout.rows, layer, 0].long()
        """Tokens before the step, int64 [N]; every head has seen the same."""
        self.after = self.before + layout.count
        self.index = torch.arange(self.sequence.numel(), device=params.k.device)
        self.index += (self.before - layout.first)[self.sequence]
        """Of each token in its sequence, int64 [T']."""
        self.table = state.recent_table[params.rows.clamp_min(0).long(), layer]
        """``recent_table`` before the step, of all sequences: int32 [., H, R]."""
        self.slots = state.lengths[layout.rows, layer].long()
        """Kept slots before the step, int64 [N, H]."""

        begin, end = ((x - state.evict_window - 1).clamp_min(0) for x in (self.before, self.after))
        count = end - begin
        self.leaving_first = count.cumsum(0) - count
        """Place among the F of each sequence's first one, int64 [N]."""
        self.leaving_of = torch.arange(count.numel(), device=count.device).repeat_interleave(count)
        self.leaving = torch.arange(self.leaving_of.numel(), device=count.device)
        self.leaving += (begin - self.leaving_first)[self.leaving_of]
        """Sequence, and index in it, int64 [F]."""
        self.leaving_at = self.leaving - (self.before - layout.first)[self.leaving_of]
        """Place among the T' of those that came with this step, int64 [F]."""
        self.leaving_new = self.leaving >= self.before[self.leaving_of]
        # Kept ones among the leaving before each, over all sequences: int64 [F + 1, H].
        kept = F.pad(self.keep.long().cumsum(0), (0, 0, 1, 0))
        self.slots_after = self.slots + kept[self.leaving_first + count] - kept[self.leaving_first]
        self.keep_slot = (self.slots - kept[self.leaving_first])[self.leaving_of] + kept[:-1]
        """Slot of each leaving token, if it is kept: int64 [F, H]."""
        # Of the leaving of a sequence, those that have left when the token is the query.
        gone = (self.index - state.evict_window).clamp_min(0) - begin[self.sequence]
        seen = kept[self.leaving_first[self.sequence] + gone] - kept[self.leaving_first][self.sequence]
        self.slot_index = self.slots[self.sequence] + seen
        """Kept slots that each query sees, int64 [T', H]."""

    @cached_property
    def marks(self) -> tuple[Tensor, Tensor]:
        """Marks after the step: of its tokens, bool [T', H], and of the token before each sequence's first, [N, H]."""
        marked, layout = self.params.logits[self.layout.token] > 0, self.layout
        earlier = self._stored(layout.rows, self.before - 1)
        if self.params.about_self:
            return marked, earlier
        decisions = marked
        marked = F.pad(marked, (0, 0, 0, 1))[1:]
        marked[layout.last] = False  # nobody has decided about the last token
        return marked, torch.where((self.before > 0)[:, None], decisions[layout.first], earlier)

    @cached_property
    def keep(self) -> Tensor:
        """Whether a leaving token is kept: bool [F, H]."""
        marked, earlier = self.marks
        old = self._stored(self.rows[self.leaving_of], self.leaving)
        old = torch.where((self.leaving == self.before[self.leaving_of] - 1)[:, None], earlier[self.leaving_of], old)
        return ~torch.where(self.leaving_new[:, None], marked[self.leaving_at.clamp_min(0)], old)

    def _stored(self, rows: Tensor, token: Tensor) -> Tensor:
        """Marks of the cache: bool [n, H]."""
        return self.state.marks[rows[:, None], self.layer, self.heads, (token % self.state.marks.size(3))[:, None]] > 0

    def take_pages(self) -> None:
        """Take the pages that the heads grow by, in the order (sequence, head, kept before recent)."""
        state, size, columns = self.state, self.state.page_size, self.state.recent_table.size(3)
        check_room(state, self.slots_after)
        had = -(-self.slots // size)
        first = torch.maximum(state.recent_pages(self.before)[1], state.recent_pages(self.after)[0])
        recent_demand = (state.recent_pages(self.after)[1] - first)[:, None].expand_as(had)
        owner, nth, pages = take(state, torch.stack((-(-self.slots_after // size) - had, recent_demand), -1).flatten())
        head, recent = owner // 2, owner % 2 == 1
        n, h = head // had.size(1), head % had.size(1)
        for table, mine, column in (
            (state.page_table, ~recent, had[n, h] + nth),
            (state.recent_table, recent, (first[n] + nth) % columns),
        ):
            table[self.rows[n[mine]], self.layer, h[mine], column[mine]] = pages[mine]

    def write(self, tokens: Slots) -> None:
        """Write what leaves and is kept, and the recent ones of the step's tokens: [T', H]."""
        state, size = self.state, self.state.page_size
        # From pages that the sequence held before the step, or from the step itself.
        table = self.table[self.layout.index][self.leaving_of]
        page, place = _of_tokens(state, table, self.leaving[:, None])
        page = page.masked_fill(self.leaving_new[:, None, None], 0)
        f, h = self.keep.nonzero(as_tuple=True)
        slot = self.keep_slot[f, h]
        target = state.page_table[self.rows[self.leaving_of[f]], self.layer, h, slot // size].long()
        for pages, new in zip(Slots.pool(state), tokens):
            old, own = pages[page[..., 0], place[..., 0]], new[self.leaving_at.clamp_min(0)]
            pages[target, slot % size] = torch.where(self.leaving_new[:, None, None], own, old)[f, h]
        stays = self.index >= (self.after - state.evict_window - 1)[self.sequence]
        table = state.recent_table[self.rows[self.sequence[stays]], self.layer]
        page, place = _of_tokens(state, table, self.index[stays, None])
        for pages, new in zip(Slots.pool(state), tokens):
            pages[page[..., 0], place[..., 0]] = new[stays]

    def write_counts(self) -> None:
        """Write slots, tokens, and the marks of the latest tokens."""
        state, layer, (marked, earlier) = self.state, self.layer, self.marks
        state.lengths[self.rows, layer] = self.slots_after.to(state.lengths.dtype)
        state.segment[self.rows, layer] = self.after[:, None].expand_as(self.slots).to(state.segment.dtype)
        last = self.index >= (self.after - state.marks.size(3))[self.sequence]
        for rows, token, mark in (
            (self.rows, self.before - 1, earlier),
            (self.rows[self.sequence[last]], self.index[last], marked[last]),
        ):
            place = (token % state.marks.size(3))[:, None]
            state.marks[rows[:, None], layer, self.heads, place] = mark.to(state.marks.dtype)

    def give_back_pages(self) -> None:
        """Give back what has left the windows, in the order (sequence, head, page)."""
        state, columns = self.state, self.state.recent_table.size(3)
        (begin, end), (after, _) = state.recent_pages(self.before), state.recent_pages(self.after)
        page = begin[:, None] + torch.arange(columns, device=begin.device)
        left = (page < torch.minimum(end, after)[:, None])[:, None].expand(-1, self.heads.numel(), -1)
        table = self.table[self.layout.index].gather(2, (page % columns)[:, None].expand_as(left))
        give_back(state, table[left].long())


def append_evicting(state: CacheState, layer: int, params: EvictParams) -> Appended:
    """See :func:`megatron.dmc.kernels.append_evicting`."""
    q, k, v, step = params.q, params.k, params.v, _Step(state, layer, params)
    token = step.layout.token
    where = params.positions[token]
    g = q.size(1) // k.size(1)
    of_queries = {NEURON_NONE: slice(0), NEURON_ALL: slice(None), NEURON_QUERY: slice(None, None, g)}[params.neuron]
    of_keys = slice(None if params.neuron == NEURON_ALL else 0)
    parts = Slots.of(state, rotate(k[token], where, params.inv_freq, of_keys), v[token].float())
    step.take_pages()
    step.write(parts)
    step.write_counts()
    step.give_back_pages()

    q_rot = torch.zeros_like(q, memory_format=torch.contiguous_format)
    q_rot[token] = rotate(q[token], where, params.inv_freq, of_queries).to(q.dtype)
    if not params.partial:
        return Appended(q_rot, k.new_empty(0), v.new_empty(0), state.lengths.new_empty(0), state.lengths.new_empty(0))
    k_all, v_all = (torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (k, v))
    slots = state.lengths.new_zeros(k.shape[:2])
    k_part, v_part = (x.to(k.dtype) for x in parts.values(state))
    k_all[token], v_all[token], slots[token] = k_part, v_part, step.slot_index.to(slots.dtype)
    return Appended(q_rot, k_all, v_all, slots, step.table)


def _recent(state: CacheState, table: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of recent tokens in fp32, [n, H, c, D]; 0 for indices below 0. See :func:`_of_tokens`."""
    page, place = _of_tokens(state, table, token.clamp_min(0))
    outside = (token < 0)[:, None]
    page = page.masked_fill(outside, 0)  # garbage
    slots = Slots.pool(state).at(page, place).values(state)
    return tuple(x.masked_fill(outside[..., None], 0.0) for x in slots)


def recent_slots(state: CacheState, layer: int, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The latest w + 1 tokens of every head in fp32, [N, H, w + 1, D], and which of them there are: bool [N, H, w + 1].
    rows: int64 [N].
    """
    age = torch.arange(state.evict_window, -1, -1, device=rows.device)
    token = state.segment[rows, layer, 0].long()[:, None] - 1 - age
    k, v = _recent(state, state.recent_table[rows, layer], token)
    return k, v, (token >= 0)[:, None].expand(k.shape[:3])


def window_of_queries(
    state: CacheState, layer: int, layout: Layout, members: Tensor, tokens: Tensor, appended: Appended, block: slice
) -> tuple[Tensor, Tensor, Tensor]:
    """What queries of a chunk may see in their windows: keys and values in fp32, [m, H, n, D], and which of them each
    query sees: bool [m, s, n].

    Args:
        members: int64 [m], sequences.
        tokens: int64 [m, chunk], places of their tokens among the layout's.
        block: the s queries in the chunk.
    """
    window = state.evict_window
    before = state.segment[layout.rows[members], layer, 0].long() - tokens.size(1)  # tokens, [m]
    # Those that were there before the chunk, then those of the chunk from the window of the block's first query on.
    old = before[:, None] + torch.arange(-window, 0, device=tokens.device)
    first = max(0, block.start - window)
    own = torch.arange(first, block.stop, device=tokens.device)
    at = layout.token[tokens[:, own]]
    parts = zip(
        _recent(state, appended.recent_before[layout.index[members]], old),
        (x[at].float().transpose(1, 2) for x in (appended.k_part, appended.v_part)),
    )
    k, v = (torch.cat(pair, dim=2) for pair in parts)
    token = torch.cat((old, before[:, None] + own), dim=1)
    query = before[:, None] + torch.arange(block.start, block.stop, device=tokens.device)
    age = query[..., None] - token[:, None]
    return k, v, (age >= 0) & (age <= window) & (token >= 0)[:, None]
