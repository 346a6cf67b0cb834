"""The compressed cache of a model: slots, and how DMC appends tokens to them or merges tokens into them.

``modeling_dmc.py`` beside this file says what is computed. Shapes: b sequences, s tokens, ng KV heads, D channels.
"""

import torch
import torch.nn.functional as F
from transformers.cache_utils import Cache

POOL_ROWS = 128  # tokens that are averaged by one matrix product
SLOT_STEP = 16  # a cache grows by a multiple of so many slots per head


def rotate(x, cos, sin, neuron_out=True):
    """Channel i with channel i + D/2, in fp32: [b, h, s, D]. neuron_out: the last channel is 0 before and after."""
    x = F.pad(x[..., :-1], (0, 1)) if neuron_out else x
    left, right = x.float().chunk(2, dim=-1)
    turned = torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1)
    return F.pad(turned[..., :-1], (0, 1)) if neuron_out else turned


class DMCCacheLayer:
    """The compressed cache of one layer. Heads are ragged: ``keys[i, j, :lengths[i, j]]`` are the slots of one.

    keys, values: [b, ng, capacity, D] in the model's dtype, keys rotated; a layer's capacity is that of its longest
    head. history, weight: [b, ng, R, 2D] and fp32 [b, ng, R], what the open (last) slot is made of, before the
    rotation: its last W - 1 tokens, oldest first, with weight 0 for what is not of the slot; or without a window its
    mean and total weight.
    """

    tensors = ("keys", "values", "lengths", "history", "weight")

    def __init__(self, window):
        self.window = window
        self.reset()

    def reset(self):
        for name in self.tensors:
            setattr(self, name, None)
        self.bound = 0  # no head is longer; known without asking the device

    def _start(self, k):
        b, ng, _, d = k.shape
        self.keys, self.values = k.new_zeros(b, ng, 0, d), k.new_zeros(b, ng, 0, d)
        self.lengths = torch.zeros(b, ng, dtype=torch.long, device=k.device)
        remembered = 1 if self.window is None else self.window - 1
        # A mean that is updated again and again stays in fp32; tokens are kept as they came.
        kept_as = torch.float32 if self.window is None else k.dtype
        self.history = torch.zeros(b, ng, remembered, 2 * d, dtype=kept_as, device=k.device)
        self.weight = torch.zeros(b, ng, remembered, dtype=torch.float32, device=k.device)

    def append(self, k, v, merge, omega, valid, cos, sin):
        """Take a chunk of tokens.

        k, v: [b, ng, s, D] before the rotation. merge: bool, omega: fp32 [b, ng, s]. valid: bool [b, s], False for
        padding, which lies behind the tokens here. cos, sin: fp32 [b, 1, s, D/2].

        Returns each token's slot, int64 [b, ng, s], and that slot's rotated key and value right after it, [b, ng, s,
        D].
        """
        if self.keys is None:
            self._start(k)
        before, valid = self.lengths, valid[:, None]
        merge = merge.clone()
        merge[..., 0] &= before > 0  # the first token of a sequence has nothing to merge with
        opens = valid & ~merge
        slot = before[..., None] - 1 + opens.cumsum(-1)
        self.lengths = slot[..., -1] + 1
        k_own, v_own = self._pool(torch.cat((k, v), dim=-1), omega * valid, slot, before - 1, valid).chunk(2, dim=-1)
        k_own, v_own = rotate(k_own, cos, sin).to(k.dtype), v_own.to(v.dtype)
        # A slot keeps the state after its newest token; the others go to the last column, which is no slot.
        self._reserve(k.size(2))
        newest = valid & F.pad((opens | ~valid)[..., 1:], (0, 1), value=True)
        column = torch.where(newest, slot, self.keys.size(2) - 1)[..., None].expand_as(k)
        self.keys.scatter_(2, column, k_own)
        self.values.scatter_(2, column, v_own)
        return slot, k_own, v_own

    def _pool(self, x, omega, slot, open_slot, valid):
        """State of every token's slot right after it, fp32 [b, ng, s, 2D], as products with a matrix of weights.

        x: keys and values [b, ng, s, 2D]; omega: 0 for padding; open_slot: [b, ng], that of the history.
        """
        out = []
        for start in range(0, x.size(2), POOL_ROWS):
            here = slice(start, start + POOL_ROWS)
            remembered, rows = self.weight.size(-1), slot[..., here]  # R, [b, ng, r]
            tokens = torch.cat((self.history, x[:, :, here].to(self.history.dtype)), dim=2)  # [b, ng, R + r, 2D]
            weight = torch.cat((self.weight, omega[..., here]), dim=-1)  # [b, ng, R + r]
            home = torch.cat((open_slot[..., None].expand(-1, -1, remembered), rows), dim=-1)
            # How many tokens column j is older than row i: [r, R + r]
            column = torch.arange(weight.size(-1), device=x.device)
            age = column[remembered:, None] - column
            counts = (age >= 0) & (age < (self.window or age.size(-1)))
            share = weight[..., None, :] * (counts & (home[..., None, :] == rows[..., None]))  # [b, ng, r, R + r]
            total = share.sum(-1, keepdim=True)
            share = share / total.clamp_min(1e-30)  # 0 in padding before any token
            out.append(torch.matmul(share, tokens.float()))
            open_slot = rows[..., -1]
            if self.window is None:
                self.history, self.weight = out[-1][:, :, -1:], total[:, :, -1]
            else:  # the last R columns that are tokens; padding lies behind them
                last = valid[..., here].sum(-1, keepdim=True) + column[:remembered]
                last = last.expand(*rows.shape[:2], remembered)
                self.weight = (weight * (home == open_slot[..., None])).gather(-1, last)
                self.history = tokens.gather(2, last[..., None].expand(-1, -1, -1, x.size(-1)))
        return torch.cat(out, dim=2)

    def _reserve(self, more):
        """Room for the slots in use and one column besides, after a chunk of ``more`` tokens."""
        capacity, self.bound = self.keys.size(2), self.bound + more
        if self.bound >= capacity:
            self.bound = int(self.lengths.max())  # waits for the device; seldom, since the room grows by steps
        if self.bound >= capacity:
            wanted = max(self.bound + 1, capacity + capacity // 8)
            wanted = -(-wanted // SLOT_STEP) * SLOT_STEP
            self.keys, self.values = (F.pad(x, (0, 0, 0, wanted - capacity)) for x in (self.keys, self.values))

    def final(self, slot, one):
        """Slots that are final for queries whose own slots are given: bool [b, ng, rows, slots]. Of a prompt no more
        than some query needs, of one token all that there may be, without a question to the device.
        """
        n = self.bound if one else max(0, int(slot.max()))
        return torch.arange(n, device=slot.device) < slot[..., None]

    def select(self, indices):
        """Keep the sequences ``indices`` (int64 [b']), in this order."""
        if self.keys is not None:
            for name in self.tensors:
                value = getattr(self, name)
                setattr(self, name, value.index_select(0, indices.to(value.device)))


class DMCCache(Cache):
    """The compressed cache of a model: what ``generate`` and a forward pass with ``use_cache`` return as
    past_key_values.
    """

    is_compileable = False
    is_croppable = False

    def __init__(self, layers):
        """layers: a cache for each layer, DMCCacheLayer or DMSCacheLayer."""
        # Cache.__init__ makes layers of its own, of other arguments from version to version.
        self.layers = layers
        self.layer_class_to_replicate, self.offloading = None, False
        self.reset()

    def reset(self):
        for layer in self.layers:
            layer.reset()
        self.tokens = None  # int64 [b], tokens that each sequence has given, padding left out
        self.next_position = None  # int64 [b], of the token that follows each sequence's last one
        self.columns = 0  # of the attention mask, padding counted

    def take(self, valid):
        """Count a chunk, bool [b, s]; returns the position that each sequence's first token should have, int64 [b]."""
        b, s = valid.shape
        if self.tokens is None:
            self.tokens = self.next_position = valid.new_zeros(b, dtype=torch.long)
        if self.tokens.numel() != b:
            raise ValueError(
                f"the cache holds {self.tokens.numel()} sequences and the input {b}; give a cache of the same batch"
            )
        self.tokens, self.columns = self.tokens.to(valid.device) + valid.sum(-1), self.columns + s
        return self.next_position.to(valid.device)

    def lengths(self):
        """Slots in use: int64 [layers, b, ng], on the CPU."""
        if self.tokens is None:
            raise ValueError("the cache is empty; run the model with it first")
        return torch.stack([layer.lengths.cpu() for layer in self.layers])

    def compression_ratio(self):
        """Tokens / slots, over all sequences, layers and heads."""
        lengths = self.lengths()
        return int(self.tokens.sum()) * lengths.size(0) * lengths.size(2) / max(1, int(lengths.sum()))

    def nbytes(self):
        """Bytes held by slots, the room to grow and the last tokens of each head."""
        held = (getattr(layer, name) for layer in self.layers for name in layer.tensors)
        return sum(x.numel() * x.element_size() for x in held if x is not None)

    def get_seq_length(self, layer_idx=0):
        """Columns of the attention mask that went by (tokens and padding), not slots: what ``generate`` counts in."""
        return self.columns

    def get_max_length(self, layer_idx=None):
        return -1  # grows as needed

    def get_max_cache_shape(self, layer_idx=0):
        return -1

    def __len__(self):
        return len(self.layers)

    @property
    def is_initialized(self):
        return self.tokens is not None

    def batch_select_indices(self, indices):
        """Keep the sequences ``indices``: int64, or bool [b]."""
        if self.tokens is not None:
            indices = torch.as_tensor(indices, device=self.tokens.device)
            indices = indices.nonzero().flatten() if indices.dtype == torch.bool else indices.long()
            self.tokens, self.next_position = self.tokens[indices], self.next_position[indices]
            for layer in self.layers:
                layer.select(indices)

    def reorder_cache(self, beam_idx):
        """Sequence i goes on from ``beam_idx[i]``, for beam search."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats):
        """Every sequence ``repeats`` times, for several completions of one prompt."""
        if self.tokens is not None:
            indices = torch.arange(self.tokens.numel(), device=self.tokens.device)
            self.batch_select_indices(indices.repeat_interleave(repeats))

    def crop(self, *args, **kwargs):
        raise ValueError(
            "a compressed cache cannot be cropped: merging and evicting have no inverse. Keep a copy (copy.deepcopy) "
            "of the cache as it was, or generate without assisted decoding"
        )

    def activate_past_recording(self):
        self.crop()

    def update(self, *args, **kwargs):
        raise ValueError("a DMC cache is filled by the attention of a DMC model only")
