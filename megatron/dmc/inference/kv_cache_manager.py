"""KV cache manager: gives sequences their rows of the cache, and keeps snapshots of prefixes for later ones.

A snapshot is a row that was forked from a sequence's, or the row of a sequence that has ended. Snapshots are taken

- at the end of a prompt, together with the logits there, so that the same prompt need not be computed at all;
- at the end of a completion, for the next turn of a conversation;
- where prompts part, since every prompt that waits, runs or was kept is in the radix tree.

Snapshots cost nothing: their rows and pages go to sequences as soon as these need them, least recently used first. All
tensor-parallel ranks do the same in the same order.
"""

from collections.abc import Container, Iterator
from typing import Optional

import numpy as np
import torch
from torch import Tensor

from megatron.dmc.inference.cache import PagedCache
from megatron.dmc.inference.radix_tree import Node, RadixTree
from megatron.dmc.inference.request import Sequence


class KVCacheManager:
    """Owner of the cache's rows. Page counts are int64 [ranks]."""

    def __init__(self, cache: PagedCache, vocab_size: int, min_tokens: int, enable_prefix_caching: bool = True) -> None:
        """``min_tokens``: length of the shortest prefix to keep, and least distance of two snapshots in a prompt."""
        self.cache, self.min_tokens, self.enabled = cache, min_tokens, enable_prefix_caching
        self.tree = RadixTree()
        self.num_queried_tokens = self.num_hit_tokens = 0
        rows = cache.rows if enable_prefix_caching else 0
        self._logits = torch.zeros(rows, vocab_size, device=cache.state.lengths.device)

    def nbytes(self) -> int:
        """Bytes held besides rows and pages: the snapshots' logits."""
        return self._logits.numel() * self._logits.element_size()

    # ------------------------------------------------------------------------------------------------- prefix matching

    def add_sequence(self, sequence: Sequence) -> None:
        """Put a new sequence's prompt into the radix tree, until :meth:`remove_sequence`."""
        if self.enabled:
            self.tree.lock(sequence.id, sequence.request.cache_salt, sequence.request.prompt_token_ids)

    def remove_sequence(self, sequence: Sequence) -> None:
        self.tree.unlock(sequence.id)

    def match_prefix(self, sequence: Sequence) -> Iterator[Node]:
        """Snapshots that a waiting sequence could continue from, longest first."""
        limit, length = _skippable_tokens(sequence), len(sequence.token_ids)

        def usable(node: Node) -> bool:
            return node.depth <= limit and (node.depth < length or node.has_logits)

        return self.tree.match_prefix(sequence.id, usable)

    def snapshot_points(self, sequence: Sequence) -> list[Node]:
        """Nodes where snapshots are still to come in the prompt of a running sequence, in order."""
        if not sequence.in_prefill:
            return []
        computed = sequence.num_computed_tokens - sequence.snapshot_in_flight
        return self.tree.snapshot_points(sequence.id, computed, self.min_tokens)

    def tokens_to_snapshot(self, sequence: Sequence) -> int:
        """Tokens to compute until the next snapshot is wanted; 0 when none is."""
        points = self.snapshot_points(sequence)
        return points[0].depth - sequence.num_computed_tokens if points else 0

    def should_wait(self, sequence: Sequence, coming: Container[Node]) -> bool:
        """Whether snapshots that are ``coming`` hold a longer prefix of a waiting sequence than those there are."""
        best = next((node.depth for node in self.match_prefix(sequence)), 0)
        limit = _skippable_tokens(sequence)
        return any(best < node.depth <= limit for node in self.tree.prompt_path(sequence.id) if node in coming)

    # ------------------------------------------------------------------------------------------------------------ rows

    def allocate_row(self, sequence: Sequence, prefix: Optional[Node], promised: np.ndarray) -> None:
        """Give a waiting sequence a row: an empty one, or a copy of a snapshot.

        Args:
            prefix: snapshot to continue from, whose :meth:`PagedCache.cost` the caller knows to be available beside
                what was promised.
            promised: pages that this step may take: [ranks].
        """
        if prefix is None:
            enough = self._make_room(0)
            assert enough
            sequence.row, sequence.num_computed_tokens = self.cache.take_row(), 0
        else:
            assert prefix.row is not None
            if prefix.depth == len(sequence.token_ids):
                sequence.cached_logits = self._logits[prefix.row]
            sequence.row, sequence.num_computed_tokens = self._continue_from(prefix, promised), prefix.depth
        if sequence.num_cached_tokens is None:
            sequence.num_cached_tokens = min(sequence.num_computed_tokens, sequence.prompt_length)
            self.num_queried_tokens += sequence.prompt_length if self.enabled else 0
            self.num_hit_tokens += sequence.num_cached_tokens

    def _continue_from(self, prefix: Node, promised: np.ndarray) -> int:
        """A row that holds a snapshot's state: a fork, or the snapshot's own row where there is no room for both."""
        assert prefix.row is not None
        self.tree.touch(prefix)
        if self._make_room(promised + self.cache.copies(prefix.row), spare=prefix):
            return self.cache.fork(prefix.row, live=True)
        row = self.tree.remove_snapshot(prefix)
        self.cache.resume(row)
        return row

    def take_snapshot(self, sequence: Sequence, logits: Tensor) -> None:
        """Keep the state of a running sequence that no step in flight computes, if there is room.

        Args:
            logits: after its last computed token: [vocabulary].
        """
        assert sequence.row is not None
        computed = sequence.token_ids[: sequence.num_computed_tokens]
        node = self.tree.insert(sequence.request.cache_salt, computed)
        if node.row is not None:  # another sequence computed the same in this step
            return
        node.locks += 1  # stays, whatever is evicted for its sake
        if self._make_room(self.cache.copies(sequence.row)):
            self.tree.add_snapshot(node, self.cache.fork(sequence.row, live=False))
            kept = self._logits[node.row]
            self.cache.queue.order(lambda: kept.copy_(logits))
            node.has_logits = True
        node.locks -= 1
        node.prune()

    def release_row(self, sequence: Sequence, keep: bool) -> None:
        """Take back a sequence's row, which no step in flight computes. With ``keep``, its state becomes a snapshot
        when it is long enough.
        """
        assert sequence.row is not None and not (keep and self.cache.in_flight(sequence.row))
        row, sequence.row = sequence.row, None
        if keep and self.enabled and sequence.num_computed_tokens >= self.min_tokens:
            computed = sequence.token_ids[: sequence.num_computed_tokens]
            node = self.tree.insert(sequence.request.cache_salt, computed)
            if node.row is None:
                self.cache.park(row)
                self.tree.add_snapshot(node, row)
                return
            self.tree.touch(node)
        self.cache.release([row])

    def reserve_pages(self, pages: np.ndarray) -> None:
        """Make so many pages free ([ranks]), which must be available."""
        enough = self._make_room(pages, rows=0)
        assert enough

    def reset(self) -> None:
        """Evict all snapshots."""
        while self.tree.num_snapshots:
            self._evict(self.tree.least_recently_used())

    def _make_room(self, pages: np.ndarray | int, rows: int = 1, spare: Optional[Node] = None) -> bool:
        """Evict snapshots until so many rows and pages are free; none, and False, when all of them would not do.

        Args:
            spare: a snapshot that is not evicted.
        """
        cache = self.cache
        spared = 0 if spare is None or spare.row is None else cache.cost(spare.row)
        most = cache.free_rows + self.tree.num_snapshots - (spare is not None)
        if rows > most or (pages > cache.available_pages() - spared).any():
            return False
        while cache.free_rows < rows or (cache.free_pages() < pages).any():
            self._evict(self.tree.least_recently_used(spare))
        return True

    def _evict(self, node: Node) -> None:
        self.cache.release([self.tree.remove_snapshot(node)])


def _skippable_tokens(sequence: Sequence) -> int:
    """Number of tokens that need not be computed: those of a prompt whose log-probabilities are wanted must be."""
    return len(sequence.prompt_logprobs) if sequence.needs_prompt_logprobs else len(sequence.token_ids)
