"""Prefix caching over compressed states: a radix tree of token ids whose nodes may hold a snapshot of the cache.

Merging rewrites the last slot of a head, so the state after token t cannot be cut back to an earlier token: like the
states of recurrent models (Marconi, arXiv 2411.19379) it is of use only at the very token where it was kept. A snapshot
is a row of the cache that was forked from a sequence's, or the row of a sequence that has ended. They are kept

- at the end of a prompt, together with the logits there, so that the same prompt need not read a single token;
- at the end of an answer, for the next turn;
- where prompts part: all prompts that wait, run or were kept are in the tree, and one that is read stops at the places
  where others leave it.

Snapshots cost nothing: their rows and pages are given to sequences as soon as these need them, least recently used
first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Container, Iterator
from typing import Optional

import numpy as np
import torch
from torch import Tensor

from megatron.dmc.inference.cache import PagedCache
from megatron.dmc.inference.request import Sequence


class Node:
    """A run of tokens below its parent's."""

    __slots__ = ("children", "depth", "ends", "has_logits", "parent", "row", "tokens")

    def __init__(self, tokens: np.ndarray, parent: Optional[Node]) -> None:
        self.tokens, self.parent = tokens, parent
        self.depth: int = len(tokens) + (parent.depth if parent else 0)
        """Tokens from the root to the end of this node."""
        self.children: dict[int, Node] = {}
        self.ends = 0
        """Prompts of unfinished requests that end here."""
        self.row: Optional[int] = None
        """Of the snapshot of the state after the last token."""
        self.has_logits = False

    def split(self, at: int) -> Node:
        """A new node with the first ``at`` tokens, between this one and its parent."""
        assert self.parent is not None
        upper = Node(self.tokens[:at].copy(), self.parent)
        self.parent.children[int(self.tokens[0])] = upper
        self.tokens, self.parent = self.tokens[at:], upper
        upper.children[int(self.tokens[0])] = self
        return upper

    def prune(self) -> None:
        """Remove what nobody needs from here up, and make one node of two where nothing tells them apart."""
        node = self
        while node.parent is not None and node.row is None and not node.ends:
            above = node.parent
            if len(node.children) > 1:
                return
            if node.children:
                (child,) = node.children.values()
                above.children[int(node.tokens[0])] = child
                child.tokens, child.parent = np.concatenate((node.tokens, child.tokens)), above
                return
            del above.children[int(node.tokens[0])]
            node = above

    def path(self) -> Iterator[Node]:
        """This node and those above it, without the root."""
        node = self
        while node.parent is not None:
            yield node
            node = node.parent


class PrefixCache:
    """Where the sequences' rows come from and go to. All ranks do the same, in the same order."""

    def __init__(self, cache: PagedCache, vocabulary: int, min_tokens: int, enabled: bool = True) -> None:
        """``min_tokens``: shortest prefix that is kept, and shortest distance between two snapshots of a prompt."""
        self.cache, self.min_tokens, self.enabled = cache, min_tokens, enabled
        self.queries = self.hits = 0
        self._roots: dict[Optional[str], Node] = {}
        self._kept: OrderedDict[Node, None] = OrderedDict()
        """Nodes with a snapshot, least recently used first."""
        rows = cache.rows if enabled else 0
        self._logits = torch.zeros(rows, vocabulary, device=cache.state.lengths.device)

    def nbytes(self) -> int:
        """Of what it holds besides rows and pages."""
        return self._logits.numel() * self._logits.element_size()

    # -------------------------------------------------------------------------------------------------------- the tree

    def enter(self, sequence: Sequence) -> None:
        """A new sequence: its prompt is in the tree until it :meth:`leave`s."""
        if self.enabled:
            sequence.node = self._insert(sequence, sequence.prompt_length)
            sequence.node.ends += 1

    def leave(self, sequence: Sequence) -> None:
        if sequence.node is not None:
            sequence.node.ends -= 1
            sequence.node.prune()
            sequence.node = None

    def _insert(self, sequence: Sequence, count: int) -> Node:
        """The node at the end of the sequence's first ``count`` tokens."""
        if sequence.cache_salt not in self._roots:
            self._roots = {salt: root for salt, root in self._roots.items() if root.children}
            self._roots[sequence.cache_salt] = Node(np.empty(0, np.int32), None)
        node = self._roots[sequence.cache_salt]
        tokens = np.asarray(sequence.tokens[:count], dtype=np.int32)
        while node.depth < count:
            rest = tokens[node.depth :]
            child = node.children.get(int(rest[0]))
            if child is None:
                child = node.children[int(rest[0])] = Node(rest, node)
            else:
                n = min(len(rest), len(child.tokens))
                differ = rest[:n] != child.tokens[:n]
                common = int(differ.argmax()) if differ.any() else n
                if common < len(child.tokens):
                    child = child.split(common)
            node = child
        return node

    # ------------------------------------------------------------------------------------------------- reading a prompt

    @staticmethod
    def _limit(sequence: Sequence) -> int:
        """Tokens that it may skip: log-probabilities of a prompt come from reading it."""
        wants = (
            sequence.params.prompt_logprobs is not None and len(sequence.prompt_logprobs) < sequence.prompt_length - 1
        )
        return len(sequence.prompt_logprobs) if wants else len(sequence.tokens)

    def found(self, sequence: Sequence) -> Iterator[Node]:
        """Snapshots that a waiting sequence could go on from, longest first."""
        limit = self._limit(sequence)
        for node in sequence.node.path() if sequence.node else ():
            if node.row is not None and node.depth <= limit and (node.depth < len(sequence.tokens) or node.has_logits):
                yield node

    def stops(self, sequence: Sequence) -> list[Node]:
        """Where a snapshot should be taken of what a running sequence has still to read of its prompt,
        first one first.
        """
        if sequence.node is None or sequence.computed >= sequence.prompt_length:
            return []
        found: list[Node] = []
        since = 0
        for node in reversed(list(sequence.node.path())):
            parting = len(node.children) > 1 or node.ends > 0
            shared = node is sequence.node and node.ends > 1  # its own prompt again, however short
            if node.row is not None or node.depth <= sequence.computed:
                since = node.depth if node.row is not None else since
            elif parting and (node.depth - since >= self.min_tokens or shared):
                found.append(node)
                since = node.depth
        return found

    def next_stop(self, sequence: Sequence) -> int:
        """Tokens until the next of :meth:`stops`; 0 when there is none."""
        return next((node.depth - sequence.computed for node in self.stops(sequence)), 0)

    def awaits(self, sequence: Sequence, coming: Container[Node]) -> bool:
        """Whether a longer snapshot for a waiting sequence is among those that are ``coming``."""
        if sequence.node is None:
            return False
        limit, have = self._limit(sequence), next((node.depth for node in self.found(sequence)), 0)
        return any(have < node.depth <= limit for node in sequence.node.path() if node in coming)

    # ------------------------------------------------------------------------------------------------------------ rows

    def start(self, sequence: Sequence, node: Optional[Node], promised: np.ndarray) -> None:
        """Give a waiting sequence a row: an empty one, or one that goes on from a snapshot, of which the caller knows
        that its :meth:`PagedCache.cost` is there beside the pages that were ``promised`` ([ranks]).
        """
        first = sequence.num_cached_tokens is None
        if node is None:
            enough = self._room(0)
            assert enough
            sequence.row, sequence.computed = self.cache.take_row(), 0
        else:
            assert node.row is not None
            self._touch(node)
            sequence.computed = node.depth
            if node.depth == len(sequence.tokens):
                sequence.logits = self._logits[node.row]
            if self._room(promised + self.cache.copies(node.row), but=node):
                sequence.row = self.cache.fork(node.row, live=True)
            else:  # the snapshot itself is the room that there is
                sequence.row = self._forget(node)
                self.cache.resume(sequence.row)
        if first:
            sequence.num_cached_tokens = min(sequence.computed, sequence.prompt_length)
            self.queries += sequence.prompt_length if self.enabled else 0
            self.hits += sequence.num_cached_tokens

    def take(self, sequence: Sequence, logits: Tensor) -> None:
        """Keep a snapshot of a running sequence as it is, if there is room.
        logits: [vocabulary], after its last token.
        """
        assert sequence.row is not None
        node = self._insert(sequence, sequence.computed)
        if node.row is not None:  # another sequence read the same in this step
            return
        node.ends += 1  # stays, whatever is forgotten for its sake
        if self._room(self.cache.copies(sequence.row)):
            self._keep(node, self.cache.fork(sequence.row, live=False))
            self._logits[node.row] = logits
            node.has_logits = True
        node.ends -= 1
        node.prune()

    def end(self, sequence: Sequence, sound: bool) -> None:
        """Take back a sequence's row; what it holds is kept, when it is ``sound`` and long enough."""
        assert sequence.row is not None
        row, sequence.row = sequence.row, None
        if sound and self.enabled and sequence.computed >= self.min_tokens:
            node = self._insert(sequence, sequence.computed)
            if node.row is None:
                self.cache.park(row)
                self._keep(node, row)
                return
            self._touch(node)
        self.cache.release([row])

    def reclaim(self, pages: np.ndarray) -> None:
        """Make so many pages free ([ranks]), which no sequence holds."""
        enough = self._room(pages, rows=0)
        assert enough

    def reset(self) -> None:
        """Forget all snapshots."""
        for node in list(self._kept):
            self._evict(node)

    def _room(self, pages: np.ndarray | int, rows: int = 1, but: Optional[Node] = None) -> bool:
        """Forget snapshots, least recently used first and ``but`` never, until there are free rows and so many free
        pages; or none at all, and say so, when that would not do.
        """
        cache = self.cache
        spared = 0 if but is None or but.row is None else cache.cost(but.row)
        most = cache.free_rows + len(self._kept) - (but is not None)
        if rows > most or (pages > cache.available_pages() - spared).any():
            return False
        while cache.free_rows < rows or (cache.free_pages() < pages).any():
            self._evict(next(node for node in self._kept if node is not but))
        return True

    def _keep(self, node: Node, row: int) -> None:
        node.row, node.has_logits = row, False
        self._kept[node] = None

    def _touch(self, node: Node) -> None:
        self._kept.move_to_end(node)

    def _forget(self, node: Node) -> int:
        """Returns the row, which is the caller's now."""
        assert node.row is not None
        row, node.row = node.row, None
        del self._kept[node]
        node.prune()
        return row

    def _evict(self, node: Node) -> None:
        self.cache.release([self._forget(node)])
