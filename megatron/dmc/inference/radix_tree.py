"""Radix tree over token ids, whose nodes may hold a snapshot of the cache after their last token.

Merging rewrites the last slot of a head, so the state after token t cannot be cut back to an earlier token: as the
states of recurrent models (Marconi, arXiv 2411.19379) it is of use only at the very token where it was kept. Prompts of
all unfinished sequences are in the tree, so it knows where they part before any of them is computed.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Optional, Self

import numpy as np

SequenceId = tuple[str, int]
"""Request id, and number of the completion in its request."""


class Node:
    """A run of tokens that follows its parent's."""

    __slots__ = ("children", "depth", "has_logits", "locks", "parent", "row", "tokens")

    def __init__(self, tokens: np.ndarray, parent: Optional[Self]) -> None:
        self.tokens, self.parent = tokens, parent
        self.depth: int = len(tokens) + (parent.depth if parent else 0)
        """Tokens from the root to the end of this node."""
        self.children: dict[int, Node] = {}
        self.locks = 0
        """Number of unfinished sequences whose prompt ends here; a locked node stays in the tree."""
        self.row: Optional[int] = None
        """Row of the cache that holds the snapshot after the last token; None without a snapshot."""
        self.has_logits = False
        """Whether the logits after the last token were kept with the snapshot."""

    def split(self, at: int) -> Self:
        """Cut off the first ``at`` tokens: returns the new node that holds them, this node's parent now."""
        assert self.parent is not None
        upper = Node(self.tokens[:at].copy(), self.parent)
        self.parent.children[int(self.tokens[0])] = upper
        self.tokens, self.parent = self.tokens[at:], upper
        upper.children[int(self.tokens[0])] = self
        return upper

    def prune(self) -> None:
        """Remove unneeded nodes from here up, and join a node with its only child where nothing else tells
        them apart.
        """
        node = self
        while node.parent is not None and node.row is None and not node.locks:
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

    def path(self) -> Iterator[Self]:
        """This node and its ancestors, without the root."""
        node = self
        while node.parent is not None:
            yield node
            node = node.parent


class RadixTree:
    """Prompts of unfinished sequences and snapshots, one root for each cache salt."""

    def __init__(self) -> None:
        self._roots: dict[Optional[str], Node] = {}
        self._locked: dict[SequenceId, Node] = {}
        self._snapshots: OrderedDict[Node, None] = OrderedDict()
        """Nodes with a snapshot, least recently used first."""

    def insert(self, cache_salt: Optional[str], token_ids: list[int]) -> Node:
        """The node at the end of ``token_ids``, made where there is none."""
        if cache_salt not in self._roots:
            self._roots = {salt: root for salt, root in self._roots.items() if root.children}
            self._roots[cache_salt] = Node(np.empty(0, np.int32), None)
        node = self._roots[cache_salt]
        tokens = np.asarray(token_ids, dtype=np.int32)
        while node.depth < len(tokens):
            rest = tokens[node.depth :]
            child = node.children.get(int(rest[0]))
            if child is None:
                child = node.children[int(rest[0])] = Node(rest, node)
            else:
                common = _common_prefix(rest, child.tokens)
                if common < len(child.tokens):
                    child = child.split(common)
            node = child
        return node

    # ---------------------------------------------------------------------------------- prompts of unfinished sequences

    def lock(self, sequence: SequenceId, cache_salt: Optional[str], prompt: list[int]) -> None:
        """Keep a sequence's prompt in the tree until :meth:`unlock`."""
        node = self._locked[sequence] = self.insert(cache_salt, prompt)
        node.locks += 1

    def unlock(self, sequence: SequenceId) -> None:
        """Let go of a sequence's prompt, if it was locked."""
        node = self._locked.pop(sequence, None)
        if node is not None:
            node.locks -= 1
            node.prune()

    def prompt_path(self, sequence: SequenceId) -> Iterator[Node]:
        """Nodes of a sequence's prompt, from its end to its beginning; none when it is not in the tree."""
        node = self._locked.get(sequence)
        if node is not None:
            yield from node.path()

    def match_prefix(self, sequence: SequenceId, usable: Callable[[Node], bool]) -> Iterator[Node]:
        """Snapshots along a sequence's prompt that are ``usable``, longest first."""
        return (node for node in self.prompt_path(sequence) if node.row is not None and usable(node))

    def snapshot_points(self, sequence: SequenceId, num_computed: int, min_tokens: int) -> list[Node]:
        """Nodes of a sequence's prompt where a snapshot would serve others, those ahead of ``num_computed``, in order.

        These are the places where prompts part or end, at least ``min_tokens`` after the snapshot before; and the end
        of its own prompt when other sequences have the same one, however short.
        """
        own = self._locked.get(sequence)
        found: list[Node] = []
        last_depth = 0
        for node in reversed(list(self.prompt_path(sequence))):
            parting = len(node.children) > 1 or node.locks > 0
            shared = node is own and node.locks > 1
            if node.row is not None or node.depth <= num_computed:
                last_depth = node.depth if node.row is not None else last_depth
            elif parting and (node.depth - last_depth >= min_tokens or shared):
                found.append(node)
                last_depth = node.depth
        return found

    # -------------------------------------------------------------------------------------------------------- snapshots

    @property
    def num_snapshots(self) -> int:
        return len(self._snapshots)

    def add_snapshot(self, node: Node, row: int) -> None:
        """Note that ``row`` of the cache holds the state after the node's last token."""
        node.row, node.has_logits = row, False
        self._snapshots[node] = None

    def touch(self, node: Node) -> None:
        """Make a snapshot the most recently used one."""
        self._snapshots.move_to_end(node)

    def remove_snapshot(self, node: Node) -> int:
        """Forget a node's snapshot. Returns its row, which belongs to the caller now."""
        assert node.row is not None
        row, node.row = node.row, None
        del self._snapshots[node]
        node.prune()
        return row

    def least_recently_used(self, spare: Optional[Node] = None) -> Node:
        """The snapshot to evict next, which is not ``spare``."""
        return next(node for node in self._snapshots if node is not spare)


def _common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    """Number of equal elements at the beginning of both."""
    n = min(len(a), len(b))
    differ = a[:n] != b[:n]
    return int(differ.argmax()) if differ.any() else n
