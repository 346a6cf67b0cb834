"""The kernels in plain PyTorch: they define the results that C++ and CUDA are tested against, and run where there is
no compiler.

Vectorised over tokens, heads and sequences; it reads counts on the host, so it waits for a GPU. Attention is in fp32
throughout, whatever the dtype of the cache.
"""

from typing import NamedTuple, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.dmc.kernels.panels import UNIT, unpack_weight
from megatron.dmc.kernels.params import Appended, AppendParams, BetweenAttention, PackedWeight
from megatron.dmc.kernels.reference_evict import append_evicting, recent_slots, window_of_queries
from megatron.dmc.kernels.reference_pages import Layout, Slots, check_room, give_back, kept_slots, rotate, take
from megatron.dmc.kernels.state import CacheState
from megatron.dmc.ops.decisions import decision_logits, importance
from megatron.dmc.ops.pooling import pool

__all__ = ["append", "append_evicting", "decode_attention", "prefill_attention", "fork", "free"]
__all__ += ["rms_norm", "add_rms_norm", "silu_and_mul", "packed_linear", "between_attention"]

name = "reference"  # as a backend

_QUERY_ROWS = 256  # queries of a chunk that attend at a time: bounds the scores


def _take_pages(state: CacheState, layer: int, rows: Tensor, before: Tensor, after: Tensor) -> None:
    """Give every head, in the order (sequence, head), the pages that it grows by. before, after: int64 slots [N, H]."""
    size, heads = state.page_size, before.size(1)
    check_room(state, after)
    had = -(-before // size)
    owner, nth, pages = take(state, (-(-after // size) - had).flatten())
    state.page_table[rows[owner // heads], layer, owner % heads, had.flatten()[owner] + nth] = pages


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
    state: CacheState, layer: int, layout: Layout, raw: _Raw, merge: Tensor, window: Optional[int]
) -> tuple[Tensor, Tensor]:
    """State of each token's slot right after it, before the rotation: fp32 [T', H, D]; ring and segment move on."""
    k_out, v_out = torch.empty_like(raw.k), torch.empty_like(raw.v)
    for members, tokens in layout.by_length():
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


def _decide(params: AppendParams, layout: Layout, before: Tensor) -> Tensor:
    """Which tokens merge into their head's last slot: bool [T', H]. before: int64 slots [N, H]."""
    neuron = params.k[layout.token, :, -1]
    if not params.compress:
        return torch.zeros_like(neuron, dtype=torch.bool)
    merge = decision_logits(neuron, params.bias) > 0
    merge[layout.first] &= before > 0  # the first token of a sequence has nothing to merge with
    return merge


def _slot_of_each_token(layout: Layout, merge: Tensor, before: Tensor) -> Tensor:
    """Slot that each token opens or merges into, counted from 0 in its head: int64 [T', H]."""
    appends = (~merge).long().cumsum(0)  # over all sequences
    appends_of_earlier = F.pad(appends, (0, 0, 1, 0))[layout.first]  # in sequences before: [N, H]
    return (before - appends_of_earlier)[layout.sequence] + appends - 1


def _write_slots(state: CacheState, layer: int, layout: Layout, merge: Tensor, slot: Tensor, parts: Slots) -> None:
    """Write the final state of every slot: that after its newest token, which is its sequence's last or is followed by
    an append.
    """
    newest = torch.ones_like(merge)
    newest[:-1] = ~merge[1:]
    newest[layout.last] = True
    t, h = newest.nonzero(as_tuple=True)
    column, place = slot[t, h] // state.page_size, slot[t, h] % state.page_size
    page = state.page_table[layout.rows[layout.sequence[t]], layer, h, column].long()
    for pages, new in zip(Slots.pool(state), parts.at(t, h)):
        pages[page, place] = new


def append(state: CacheState, layer: int, params: AppendParams) -> Appended:
    """See :func:`megatron.dmc.kernels.append`."""
    q, k, v, inv_freq, compress = params.q, params.k, params.v, params.inv_freq, params.compress
    layout = Layout.of(params.cu_seqlens, params.rows)
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
    where, neuron_out = params.positions[layout.token], slice(None if compress else 0)
    parts = Slots.of(state, rotate(k_part, where, inv_freq, neuron_out), v_part)
    _write_slots(state, layer, layout, merge, slot, parts)

    q_rot = torch.zeros_like(q, memory_format=torch.contiguous_format)
    q_rot[layout.token] = rotate(q[layout.token], where, inv_freq, neuron_out).to(q.dtype)
    if not params.partial:
        return Appended(q_rot, k.new_empty(0), v.new_empty(0), state.lengths.new_empty(0), state.lengths.new_empty(0))
    k_all, v_all = (torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (k, v))
    index = state.lengths.new_zeros(k.shape[:2])
    k_part, v_part = (x.to(k.dtype) for x in parts.values(state))
    k_all[layout.token], v_all[layout.token], index[layout.token] = k_part, v_part, slot.to(index.dtype)
    return Appended(q_rot, k_all, v_all, index, state.lengths.new_empty(0))


def decode_attention(state: CacheState, layer: int, q_rot: Tensor, rows: Tensor, scale: float) -> Tensor:
    """See :func:`megatron.dmc.kernels.decode_attention`."""
    heads, d = state.lengths.size(2), q_rot.size(-1)
    out = torch.zeros_like(q_rot, memory_format=torch.contiguous_format)
    at = rows.clamp_min(0).long()
    seen = state.segment if state.evicts else state.lengths
    keep = ((rows >= 0) & (seen[at, layer].amax(-1) > 0)).nonzero().flatten()
    if not keep.numel():
        return out
    k, v, used = kept_slots(state, layer, at[keep], state.lengths[at[keep], layer].long())
    if state.evicts:
        recent = recent_slots(state, layer, at[keep])
        k, v, used = (torch.cat(pair, dim=2) for pair in zip((k, v, used), recent))
    # [N, Hq, D] -> [N, H, g, D]
    q = q_rot[keep].float().view(keep.numel(), heads, -1, d)
    scores = torch.matmul(q, k.transpose(-1, -2)) * scale
    p = torch.softmax(scores.masked_fill(~used[:, :, None], float("-inf")), dim=-1)
    mixed = torch.matmul(p.masked_fill(~used.any(-1)[..., None, None], 0.0), v)
    out[keep] = mixed.flatten(1, 2).to(out.dtype)
    return out


def prefill_attention(
    state: CacheState, layer: int, appended: Appended, cu_seqlens: Tensor, rows: Tensor, scale: float
) -> Tensor:
    """See :func:`megatron.dmc.kernels.prefill_attention`."""
    q_rot, k_part, v_part, slot_index, _ = appended
    layout, heads, d = Layout.of(cu_seqlens, rows), k_part.size(1), q_rot.size(-1)
    out = torch.zeros_like(q_rot, memory_format=torch.contiguous_format)
    for members, tokens in layout.by_length():
        for start in range(0, tokens.size(1), _QUERY_ROWS):
            at = layout.token[tokens[:, start : start + _QUERY_ROWS]]  # [m, s]
            m, s = at.shape
            # [m, s, Hq, D] -> [m, H, g, s, D]; the others [m, s, H, D] -> [m, H, 1, s, D]
            q = q_rot[at].float().view(m, s, heads, -1, d).permute(0, 2, 3, 1, 4)
            index = slot_index[at].long().transpose(1, 2)  # [m, H, s]
            k, v, _ = kept_slots(state, layer, layout.rows[members], index.amax(-1))
            scores = torch.matmul(q, k[:, :, None].transpose(-1, -2)) * scale
            outside = torch.arange(k.size(2), device=k.device) >= index[..., None]
            scores = scores.masked_fill(outside[:, :, None], float("-inf"))
            if state.evicts:
                block = slice(start, start + s)
                near_k, near_v, near = window_of_queries(state, layer, layout, members, tokens, appended, block)
                own = torch.matmul(q, near_k[:, :, None].transpose(-1, -2)) * scale
                own = own.masked_fill(~near[:, None, None], float("-inf"))
            else:
                own_k, own_v = (x[at].float().transpose(1, 2)[:, :, None] for x in (k_part, v_part))
                own = (q * own_k).sum(-1, keepdim=True) * scale
            p, n = torch.softmax(torch.cat((scores, own), dim=-1), dim=-1), k.size(2)
            of_own = torch.matmul(p[..., n:], near_v[:, :, None]) if state.evicts else p[..., n:] * own_v
            mixed = torch.matmul(p[..., :n], v[:, :, None]) + of_own
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
        or bool(state.lengths[target].any() | state.segment[target].any())
    ):
        raise ValueError(f"target is {target.tolist()}; it must be distinct empty rows that are no sources")
    held = state.held_pages(source)
    copied, shared = held.used & held.open, held.used & ~held.open
    owner, _, pages = take(state, copied.flatten().long(), "the copies need")  # in the order (pair, layer, head, page)
    every = held.ids[shared]
    state.refcounts.index_add_(0, every, torch.ones_like(every, dtype=torch.int32))
    ids = held.ids.clone()
    ids.view(-1)[owner] = pages.long()
    for x in Slots.pool(state):
        x[pages.long()] = x[held.ids.view(-1)[owner]]
    # Where the source holds none the target's tables stay what they were.
    tables = torch.cat((state.page_table[target], state.recent_table[target]), dim=3).long()
    tables.scatter_(3, held.column, torch.where(held.used, ids, tables.gather(3, held.column)))
    tables = tables.to(state.page_table.dtype)
    state.page_table[target], state.recent_table[target] = tables.split(
        (state.page_table.size(3), state.recent_table.size(3)), dim=3
    )
    for x in (state.lengths, state.segment, state.ring_k, state.ring_v, state.ring_w, state.marks):
        x[target] = x[source]


def free(state: CacheState, rows: Tensor) -> None:
    """See :func:`megatron.dmc.kernels.free`."""
    rows = rows[rows >= 0].long()
    held = state.held_pages(rows)
    give_back(state, held.ids[held.used])  # in the order (row, layer, head, page)
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


def packed_linear(x: Tensor, packed: PackedWeight) -> Tensor:
    """See :func:`megatron.dmc.kernels.packed_linear`."""
    rows, panels = x, unpack_weight(packed)
    if packed.bits:
        rows = _round_rows(x.float(), packed.group or UNIT, 127 if packed.bits == 4 else 32767)
    each = panels.chunk(2, dim=1) if packed.gated else (panels,)
    bias = packed.bias if packed.bias.numel() else None
    products = [F.linear(rows, part.flatten(0, 1)[: packed.outputs]) for part in each]
    y = torch.cat(products, dim=1)
    y = (y if bias is None else y + bias).to(x.dtype)
    return silu_and_mul(y) if packed.gated else y


def _round_rows(x: Tensor, group: int, largest: int) -> Tensor:
    """Rows [T, K] in fp32, each group of inputs rounded to a multiple of its largest magnitude / ``largest``."""
    groups = F.pad(x, (0, -x.size(1) % group)).unflatten(1, (-1, group))
    scale = groups.abs().amax(2, keepdim=True) * (1 / largest)
    inverse = torch.where(scale < torch.finfo(torch.float32).tiny, 0.0, 1 / scale)
    return ((groups * inverse).round() * scale).flatten(1)[:, : x.size(1)]


def between_attention(weights: BetweenAttention, mixed: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """See :func:`megatron.dmc.kernels.between_attention`."""
    w = weights
    x, y = add_rms_norm(x, packed_linear(mixed, w.out), w.mlp_norm, w.epsilon)
    x, y = add_rms_norm(x, packed_linear(packed_linear(y, w.gate_up), w.down), w.next_norm, w.epsilon)
    return x, packed_linear(y, w.qkv)
