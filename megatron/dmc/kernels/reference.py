"""The kernels in plain PyTorch: they define the results that C++ and CUDA are tested against, and run where there is
no compiler.

Vectorised over tokens, heads and sequences; it reads counts on the host, so it waits for a GPU. Attention is in fp32
throughout, whatever the dtype of the cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.dmc.kernels.params import Appended, AppendParams
from megatron.dmc.kernels.state import RETURNED, TAKEN, CacheState
from megatron.dmc.ops.decisions import decision_logits, importance
from megatron.dmc.ops.pooling import pool

name = "reference"  # as a backend

_QUERY_ROWS = 256  # queries of a chunk that attend at a time: bounds the scores


class _Layout(NamedTuple):
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

    @property
    def last(self) -> Tensor:
        """int64 [N], place of each sequence's last token among the T'."""
        return self.first + self.count - 1


def _layout(cu_seqlens: Tensor, rows: Tensor) -> _Layout:
    """Layout without padding (a row below 0) and sequences without tokens."""
    starts, counts, rows = cu_seqlens[:-1].long(), cu_seqlens.diff().long(), rows.long()
    keep = (counts > 0) & (rows >= 0)
    starts, counts, rows = starts[keep], counts[keep], rows[keep]
    sequence = torch.arange(rows.numel(), device=rows.device).repeat_interleave(counts)
    first = counts.cumsum(0) - counts
    token = torch.arange(sequence.numel(), device=rows.device) - (first - starts)[sequence]
    return _Layout(sequence, token, first, counts, rows)


def _same_length(layout: _Layout) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of sequences with equally many tokens: (sequences [m], their tokens among the T' [m, s])."""
    for s in layout.count.unique().tolist():
        members = (layout.count == s).nonzero().flatten()
        yield members, layout.first[members, None] + torch.arange(s, device=members.device)


def rotate(x: Tensor, positions: Tensor, inv_freq: Tensor, compress: bool) -> Tensor:
    """fp32 [T, h, D], rotated at ``positions`` (half-split layout); with ``compress`` the last channel is 0 before and
    after.
    """
    angle = positions.float()[:, None, None] * inv_freq.float()
    cos, sin = angle.cos(), angle.sin()
    if compress:
        x = F.pad(x[..., :-1], (0, 1))
    left, right = x.float().chunk(2, dim=-1)
    turned = torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1)
    return F.pad(turned[..., :-1], (0, 1)) if compress else turned


def _take_pages(state: CacheState, layer: int, rows: Tensor, before: Tensor, after: Tensor) -> None:
    """Give every head the pages that it grows by. before, after: int64 slots [N, H].

    Demand per head -> exclusive prefix sum over (sequence, head) -> slice of the ring of free pages: no order of
    execution changes which head gets which page.
    """
    size, heads = state.page_size, before.size(1)
    had = -(-before // size)
    demand = (-(-after // size) - had).flatten()
    total = int(demand.sum())
    if after.numel() and int(after.max()) > state.max_slots:
        raise RuntimeError(
            f"a head would hold {int(after.max())} slots, and its row of the page table {state.max_slots}"
        )
    if total > state.free_count():
        raise RuntimeError(f"the step needs {total} pages and {state.free_count()} are free; nothing was written")
    order = torch.arange(total, device=demand.device)
    owner = torch.arange(demand.numel(), device=demand.device).repeat_interleave(demand)
    column = had.flatten()[owner] + order - (demand.cumsum(0) - demand)[owner]
    pages = state.free_pages[(state.counters[TAKEN] + order) % state.num_pages]
    state.page_table[rows[owner // heads], layer, owner % heads, column] = pages
    state.refcounts[pages.long()] = 1
    state.counters[TAKEN] += total


class _Raw(NamedTuple):
    """Tokens before pooling and rotation, in fp32."""

    k: Tensor
    v: Tensor
    """[..., D]"""
    omega: Tensor
    """[...], weights in a slot's mean."""


def _history(state: CacheState, layer: int, rows: Tensor, window: Optional[int]) -> tuple[_Raw, Tensor]:
    """Tokens of the open slots [m, H, R], oldest first and aligned to the right, and which of them exist: bool."""
    k, v, w = (x[rows, layer].float() for x in (state.ring_k, state.ring_v, state.ring_w))
    segment, r = state.segment[rows, layer].long(), w.size(-1)
    if window is None:
        valid = (segment > 0)[..., None]
    else:
        index = segment[..., None] - torch.arange(r, 0, -1, device=w.device)  # of the segment's tokens
        valid, at = index >= 0, index % r
        k, v = (x.gather(2, at[..., None].expand_as(x)) for x in (k, v))
        w = w.gather(2, at)
    # Places outside the open slot may hold anything, NaN too; as slots of their own with weight 1 they do no harm.
    k, v = (x.masked_fill(~valid[..., None], 0.0) for x in (k, v))
    return _Raw(k, v, w.masked_fill(~valid, 1.0)), valid


def _remember(
    state: CacheState, layer: int, rows: Tensor, raw: _Raw, merge: Tensor, newest: list[Tensor], window: Optional[int]
) -> None:
    """Update ring and segment after a chunk of s tokens.

    Args:
        raw: tokens [m, H, R + s], with the history.
        merge: bool [m, H, s].
        newest: pooled key and value after the last token, fp32 [m, H, 1, D].
    """
    k, v, omega = raw
    columns, r = k.size(2), state.ring_w.size(-1)
    s = columns - r
    age = torch.arange(s - 1, -1, -1, device=k.device)  # of the new tokens: 0 for the newest
    since = age.masked_fill(merge, columns).amin(-1)  # tokens after the last append; columns: there was none
    none = since == columns
    segment = torch.where(none, state.segment[rows, layer].long() + s, since + 1)
    if window is None:
        inside = torch.arange(columns - 1, -1, -1, device=k.device) <= since[..., None]
        inside[..., :r] = (none & (state.segment[rows, layer] > 0))[..., None]
        total = (omega * inside).sum(-1, keepdim=True)
        new = *newest, total
    else:
        last = segment[..., None] - 1
        back = (last - torch.arange(r, device=k.device)) % r  # age of the token that lies at each place of the ring
        column = columns - 1 - back
        wide = column[..., None].expand(*column.shape, k.size(-1))
        new = k.gather(2, wide), v.gather(2, wide), omega.gather(2, column)
    for ring, value in zip((state.ring_k, state.ring_v, state.ring_w), new):
        ring[rows, layer] = value.to(ring.dtype)
    state.segment[rows, layer] = segment.to(state.segment.dtype)


def _pool_chunks(
    state: CacheState, layer: int, layout: _Layout, raw: _Raw, merge: Tensor, window: Optional[int]
) -> tuple[Tensor, Tensor]:
    """State of each token's slot right after it, before the rotation: fp32 [T', H, D]; ring and segment move on."""
    k_out, v_out = torch.empty_like(raw.k), torch.empty_like(raw.v)
    for members, tokens in _same_length(layout):
        rows, chunk_merge = layout.rows[members], merge[tokens].transpose(1, 2)
        history, valid = _history(state, layer, rows, window)
        # [m, s, H, ...] -> [m, H, s, ...], behind the history
        chunk = _Raw(*(torch.cat((old, x[tokens].transpose(1, 2)), dim=2) for old, x in zip(history, raw)))
        # A token of the history merges into the one before it, if that is in the history too.
        alpha = torch.cat((F.pad(valid[..., :-1], (1, 0)) & valid, chunk_merge), dim=2)
        pooled = pool(chunk.k, chunk.v, alpha.to(chunk.omega.dtype), chunk.omega, window)
        _remember(state, layer, rows, chunk, chunk_merge, [x[:, :, -1:] for x in pooled], window)
        k_out[tokens], v_out[tokens] = (x[:, :, valid.size(-1) :].transpose(1, 2) for x in pooled)
    return k_out, v_out


def _decide(params: AppendParams, layout: _Layout, before: Tensor) -> Tensor:
    """Which tokens merge into their head's last slot: bool [T', H]. before: int64 slots [N, H]."""
    neuron = params.k[layout.token, :, -1]
    if not params.compress:
        return torch.zeros_like(neuron, dtype=torch.bool)
    merge = decision_logits(neuron, params.bias) > 0
    merge[layout.first] &= before > 0  # the first token of a sequence has nothing to merge with
    return merge


def _slot_of_each_token(layout: _Layout, merge: Tensor, before: Tensor) -> Tensor:
    """Slot that each token opens or merges into, counted from 0 in its head: int64 [T', H]."""
    appends = (~merge).long().cumsum(0)  # over all sequences
    appends_of_earlier = F.pad(appends, (0, 0, 1, 0))[layout.first]  # in sequences before: [N, H]
    return (before - appends_of_earlier)[layout.sequence] + appends - 1


def _write_slots(
    state: CacheState, layer: int, layout: _Layout, merge: Tensor, slot: Tensor, k_part: Tensor, v_part: Tensor
) -> None:
    """Write the final state of every slot: that after its newest token, which is its sequence's last or is followed by
    an append.
    """
    newest = torch.ones_like(merge)
    newest[:-1] = ~merge[1:]
    newest[layout.last] = True
    t, h = newest.nonzero(as_tuple=True)
    column, place = slot[t, h] // state.page_size, slot[t, h] % state.page_size
    page = state.page_table[layout.rows[layout.sequence[t]], layer, h, column].long()
    state.k_pages[page, place] = k_part[t, h].to(state.k_pages.dtype)
    state.v_pages[page, place] = v_part[t, h].to(state.v_pages.dtype)


def append(state: CacheState, layer: int, params: AppendParams) -> Appended:
    """See :func:`megatron.dmc.kernels.append`."""
    q, k, v, inv_freq, compress = params.q, params.k, params.v, params.inv_freq, params.compress
    layout = _layout(params.cu_seqlens, params.rows)
    before = state.lengths[layout.rows, layer].long()  # slots: [N, H]
    merge = _decide(params, layout, before)
    slot = _slot_of_each_token(layout, merge, before)
    after = slot[layout.last] + 1
    _take_pages(state, layer, layout.rows, before, after)
    state.lengths[layout.rows, layer] = after.to(state.lengths.dtype)

    k_part, v_part = k[layout.token].float(), v[layout.token].float()
    if compress:
        omega = importance(q[layout.token, :, -1][..., None], k.size(1), params.bias, params.epsilon)[..., 0]
        k_part, v_part = _pool_chunks(state, layer, layout, _Raw(k_part, v_part, omega), merge, params.window)
    where = params.positions[layout.token]
    k_part, v_part = rotate(k_part, where, inv_freq, compress).to(k.dtype), v_part.to(v.dtype)
    _write_slots(state, layer, layout, merge, slot, k_part, v_part)

    q_rot = torch.zeros_like(q, memory_format=torch.contiguous_format)
    q_rot[layout.token] = rotate(q[layout.token], where, inv_freq, compress).to(q.dtype)
    if not params.partial:
        return Appended(q_rot, k.new_empty(0), v.new_empty(0), state.lengths.new_empty(0))
    k_all, v_all = (torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (k, v))
    index = state.lengths.new_zeros(k.shape[:2])
    k_all[layout.token], v_all[layout.token], index[layout.token] = k_part, v_part, slot.to(index.dtype)
    return Appended(q_rot, k_all, v_all, index)


def _gather(state: CacheState, layer: int, rows: Tensor, limit: Tensor) -> tuple[Tensor, Tensor]:
    """Slots [0, limit) of every head in fp32, [N, H, n, D]; zeros beyond. limit: int64 [N, H]."""
    pages = -(-int(limit.max()) // state.page_size)
    ids = state.page_table[rows, layer, :, :pages].long()
    # Ids and slots beyond the length are garbage, and 0 * NaN is NaN.
    used = torch.arange(pages, device=ids.device) * state.page_size < limit[..., None]
    ids = ids.masked_fill(~used, 0)
    inside = torch.arange(pages * state.page_size, device=ids.device) < limit[..., None]
    # [N, H, pages, page_size, D] -> [N, H, n, D]
    return tuple(
        x[ids].flatten(2, 3).float().masked_fill(~inside[..., None], 0.0) for x in (state.k_pages, state.v_pages)
    )


def decode_attention(state: CacheState, layer: int, q_rot: Tensor, rows: Tensor, scale: float) -> Tensor:
    """See :func:`megatron.dmc.kernels.decode_attention`."""
    heads, d = state.lengths.size(2), q_rot.size(-1)
    out = torch.zeros_like(q_rot, memory_format=torch.contiguous_format)
    limit = state.lengths[rows.clamp_min(0).long(), layer].long()
    keep = ((rows >= 0) & (limit.amax(-1) > 0)).nonzero().flatten()
    if not keep.numel():
        return out
    limit = limit[keep]
    k, v = _gather(state, layer, rows[keep].long(), limit)
    # [N, Hq, D] -> [N, H, g, D]
    q = q_rot[keep].float().view(keep.numel(), heads, -1, d)
    scores = torch.matmul(q, k.transpose(-1, -2)) * scale
    outside = torch.arange(k.size(2), device=k.device) >= limit[..., None]
    p = torch.softmax(scores.masked_fill(outside[:, :, None], float("-inf")), dim=-1)
    mixed = torch.matmul(p.masked_fill((limit == 0)[..., None, None], 0.0), v)
    out[keep] = mixed.flatten(1, 2).to(out.dtype)
    return out


def prefill_attention(
    state: CacheState, layer: int, appended: Appended, cu_seqlens: Tensor, rows: Tensor, scale: float
) -> Tensor:
    """See :func:`megatron.dmc.kernels.prefill_attention`."""
    q_rot, k_part, v_part, slot_index = appended
    layout, heads, d = _layout(cu_seqlens, rows), k_part.size(1), q_rot.size(-1)
    out = torch.zeros_like(q_rot, memory_format=torch.contiguous_format)
    for members, tokens in _same_length(layout):
        for start in range(0, tokens.size(1), _QUERY_ROWS):
            at = layout.token[tokens[:, start : start + _QUERY_ROWS]]  # [m, s]
            m, s = at.shape
            # [m, s, Hq, D] -> [m, H, g, s, D]; the others [m, s, H, D] -> [m, H, 1, s, D]
            q = q_rot[at].float().view(m, s, heads, -1, d).permute(0, 2, 3, 1, 4)
            own_k, own_v = (x[at].float().transpose(1, 2)[:, :, None] for x in (k_part, v_part))
            index = slot_index[at].long().transpose(1, 2)  # [m, H, s]
            k, v = _gather(state, layer, layout.rows[members], index.amax(-1))
            scores = torch.matmul(q, k[:, :, None].transpose(-1, -2)) * scale
            outside = torch.arange(k.size(2), device=k.device) >= index[..., None]
            scores = scores.masked_fill(outside[:, :, None], float("-inf"))
            own = (q * own_k).sum(-1, keepdim=True) * scale
            p = torch.softmax(torch.cat((scores, own), dim=-1), dim=-1)
            mixed = torch.matmul(p[..., :-1], v[:, :, None]) + p[..., -1:] * own_v
            # [m, H, g, s, D] -> [m, s, Hq, D]
            out[at] = mixed.permute(0, 3, 1, 2, 4).flatten(2, 3).to(out.dtype)
    return out


def fork(state: CacheState, source: Tensor, target: Tensor) -> None:
    """See :func:`megatron.dmc.kernels.fork`."""
    keep = (source >= 0) & (target >= 0)
    source, target = source[keep].long(), target[keep].long()
    if (
        target.unique().numel() != target.numel()
        or bool(torch.isin(source, target).any())
        or bool(state.lengths[target].any())
    ):
        raise ValueError(f"target is {target.tolist()}; it must be distinct empty rows that are no sources")
    lengths = state.lengths[source].long()  # [n, L, H]
    final = (lengths - 1).clamp_min(0) if state.compresses else lengths  # slots that are not written any more
    held, shared = -(-lengths // state.page_size), final // state.page_size
    copied = held > shared
    total = int(copied.sum())
    if total > state.free_count():
        raise RuntimeError(f"the copies need {total} pages and {state.free_count()} are free; nothing was written")
    column = torch.arange(state.page_table.size(3), device=lengths.device)
    old = state.page_table[source]
    # Beyond the length the target's table stays what it was.
    table = torch.where(column < held[..., None], old, state.page_table[target])
    every = old[column < shared[..., None]].long()
    state.refcounts.index_add_(0, every, torch.ones_like(every, dtype=torch.int32))
    order = (state.counters[TAKEN] + torch.arange(total, device=lengths.device)) % state.num_pages
    pages, at = state.free_pages[order], copied.nonzero(as_tuple=True)  # in the order (pair, layer, head)
    before = old[(*at, shared[at])].long()
    table[(*at, shared[at])] = pages
    for x in (state.k_pages, state.v_pages):
        x[pages.long()] = x[before]
    state.refcounts[pages.long()] = 1
    state.counters[TAKEN] += total
    state.page_table[target] = table
    for x in (state.lengths, state.segment, state.ring_k, state.ring_v, state.ring_w):
        x[target] = x[source]


def free(state: CacheState, rows: Tensor) -> None:
    """See :func:`megatron.dmc.kernels.free`."""
    rows = rows[rows >= 0].long()
    pages = -(-state.lengths[rows].long() // state.page_size)
    used = torch.arange(state.page_table.size(3), device=rows.device) < pages[..., None]
    ids = state.page_table[rows][used].long()  # in the order (row, layer, head, page)
    state.refcounts.index_add_(0, ids, torch.full_like(ids, -1, dtype=torch.int32))
    # Rows may share a page: it is returned where the last of them lets go.
    order = torch.arange(ids.numel(), device=rows.device)
    last = order.new_zeros(state.num_pages).scatter_reduce_(0, ids, order, "amax")
    ids = ids[(state.refcounts[ids] == 0) & (last[ids] == order)]
    order = order[: ids.numel()]
    state.free_pages[(state.counters[RETURNED] + order) % state.num_pages] = ids.to(torch.int32)
    state.counters[RETURNED] += ids.numel()
    state.lengths[rows] = 0
    state.segment[rows] = 0


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """See :func:`megatron.dmc.kernels.rms_norm`."""
    return F.rms_norm(x, weight.shape, weight, epsilon)


def add_rms_norm(x: Tensor, delta: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """See :func:`megatron.dmc.kernels.add_rms_norm`."""
    total = x + delta
    return total, rms_norm(total, weight, epsilon)


def silu_and_mul(x: Tensor) -> Tensor:
    """See :func:`megatron.dmc.kernels.silu_and_mul`."""
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up
