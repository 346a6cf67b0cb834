"""The cache of a DMS model (arXiv 2506.05345): tokens as they are, until they are evicted.

``modeling_dmc.py`` beside this file says what is computed. Shapes: b sequences, s tokens, ng KV heads, D channels.
"""

import torch
import torch.nn.functional as F

COLUMN_STEP = 16  # a cache grows by a multiple of so many columns


class DMSCacheLayer:
    """The cache of one layer. Every head evicts by itself: a column holds a token of some heads and none of others.

    keys, values: [b, ng, capacity, D] in the model's dtype, keys rotated. number: int32 [b, ng, capacity], of the token
    in its sequence, -1 where there is none. marked: bool [b, ng, capacity], True for a token that is evicted when it is
    more than ``window`` tokens old. seen: int32 [b], tokens so far. What has been evicted leaves its column when there
    is no room for more, all at once.
    """

    tensors = ("keys", "values", "number", "marked", "seen")

    def __init__(self, window, about):
        self.window, self.about_self = window, about == "self"
        self.reset()

    def reset(self):
        for name in self.tensors:
            setattr(self, name, None)
        self.bound = 0  # columns in use

    def _start(self, k):
        b, ng, _, d = k.shape
        self.keys, self.values = k.new_zeros(b, ng, 0, d), k.new_zeros(b, ng, 0, d)
        self.number = torch.zeros(b, ng, 0, dtype=torch.int32, device=k.device)
        self.marked = torch.zeros(b, ng, 0, dtype=torch.bool, device=k.device)
        self.seen = torch.zeros(b, dtype=torch.int32, device=k.device)

    def append(self, k, v, mark, valid):
        """Take a chunk of tokens.

        k, v: [b, ng, s, D], keys rotated. mark: bool [b, ng, s], the decisions that are read from these tokens. valid:
        bool [b, s], False for padding, which lies behind the tokens here.

        Returns each token's number in its sequence: int32 [b, s].
        """
        if self.keys is None:
            self._start(k)
        mark = mark & valid[:, None]
        number = self.seen[:, None] - 1 + valid.cumsum(-1, dtype=torch.int32)
        if not self.about_self:  # the first decision is about the last token of the cache
            self.marked |= mark[..., :1] & (self.number == self.seen[:, None, None] - 1)
            mark = F.pad(mark[..., 1:], (0, 1))
        self._reserve(k.size(2))
        here = slice(self.bound, self.bound + k.size(2))
        self.keys[:, :, here], self.values[:, :, here], self.marked[:, :, here] = k, v, mark
        self.number[:, :, here] = number.masked_fill(~valid, -1)[:, None]
        self.bound, self.seen = here.stop, number[:, -1] + 1
        return number

    def visible(self, number, here):
        """Mask of the columns that the queries ``here`` of the latest chunk see: bool [b, ng, rows, columns].

        number: of the chunk's tokens, int32 [b, s]; here: a slice of them.
        """
        columns = self.bound - number.size(1) + min(here.stop, number.size(1))  # no query sees later ones
        keys, marked = self.number[:, :, None, :columns], self.marked[:, :, None, :columns]
        age = number[:, None, here, None] - keys
        return (keys >= 0) & (age >= 0) & ((age <= self.window) | ~marked)

    def _held(self):
        return (self.number >= 0) & ~(self.marked & (self.seen[:, None, None] - 1 - self.number > self.window))

    @property
    def lengths(self):
        """Tokens held, the latest ``window + 1`` included: int64 [b, ng]."""
        return self._held().sum(-1)

    def _reserve(self, more):
        """Room for ``more`` columns."""
        if self.bound + more <= self.keys.size(2):
            return
        held = self._held()
        self.bound = int(held.sum(-1).max()) if held.numel() else 0  # waits for the device; seldom
        order = held.byte().argsort(dim=-1, descending=True, stable=True)[..., : self.bound]
        wanted = self.bound + max(more, self.bound // 8)
        room = -(-wanted // COLUMN_STEP) * COLUMN_STEP - self.bound
        self.number = F.pad(self.number.masked_fill(~held, -1).gather(-1, order), (0, room), value=-1)
        self.marked = F.pad(self.marked.gather(-1, order), (0, room))
        order = order[..., None].expand(-1, -1, -1, self.keys.size(-1))
        self.keys, self.values = (F.pad(x.gather(2, order), (0, 0, 0, room)) for x in (self.keys, self.values))

    def select(self, indices):
        """Keep the sequences ``indices`` (int64 [b']), in this order."""
        if self.keys is not None:
            for name in self.tensors:
                value = getattr(self, name)
                setattr(self, name, value.index_select(0, indices.to(value.device)))
