"""Prefix caching, the scheduler's half: states of the cache that are kept, and requests that continue from them;
nothing of vLLM.

A compressed state is of use only at the very token where it was kept (see ``megatron.dmc.inference.radix_tree``). Each
is a row of the workers' cache, and holds blocks for all of its pages, although it shares pages with other rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron.dmc.inference.radix_tree import Node, RadixTree
from megatron.dmc.vllm.grants import Lengths

MIN_TOKENS = 32
"""Least number of tokens between two snapshots of a prompt."""


@dataclass(eq=False)
class Snapshot:
    """A kept state."""

    number: int
    """Name of it to the workers."""
    node: Node
    known: Lengths | None
    """Lengths of it, or of a state before it."""
    blocks: list[Any]

    @property
    def tokens(self) -> int:
        return self.node.depth


class Prefixes:
    """Prompts of unfinished requests, and snapshots by what their tokens are."""

    def __init__(self, limit: int) -> None:
        """limit: most snapshots at a time."""
        self.limit = limit
        self._tree = RadixTree()
        self._snapshots: dict[int, Snapshot] = {}
        self._numbers = 0
        self._dropped: list[int] = []

    def __len__(self) -> int:
        return len(self._snapshots)

    def __contains__(self, snapshot: Snapshot) -> bool:
        return snapshot.number in self._snapshots

    @property
    def num_blocks(self) -> int:
        """Blocks of all snapshots."""
        return sum(len(snapshot.blocks) for snapshot in self._snapshots.values())

    # -------------------------------------------------------------------------------------------------------- requests

    def begin(self, request_id: str, salt: str, prompt: list[int]) -> None:
        """Note a request's prompt until :meth:`end`. Requests share with those of the same ``salt`` alone."""
        self._tree.lock((request_id, 0), salt, prompt)

    def end(self, request_id: str) -> None:
        self._tree.unlock((request_id, 0))

    def match(self, request_id: str, most: int) -> Snapshot | None:
        """The longest snapshot along a prompt, of at most ``most`` tokens."""
        found = self._tree.match_prefix((request_id, 0), lambda node: node.depth <= most)
        return next((self._snapshots[node.row] for node in found if node.row is not None), None)

    def chunk(self, request_id: str, start: int, count: int) -> int:
        """How many of ``count`` tokens from ``start`` on are read in a step, so that it ends where a snapshot is
        wanted.
        """
        points = self._tree.snapshot_points((request_id, 0), start, MIN_TOKENS)
        return min(count, points[0].depth - start) if points else count

    def wanted(self, request_id: str, computed: int) -> Node | None:
        """Where a snapshot of a request that has computed so many tokens belongs; None where none is of use."""
        points = self._tree.snapshot_points((request_id, 0), computed - 1, MIN_TOKENS)
        return points[0] if points and points[0].depth == computed else None

    # ------------------------------------------------------------------------------------------------------- snapshots

    def vacant(self, salt: str, tokens: list[int]) -> Node | None:
        """The place for a snapshot after ``tokens``; None where there is one, which counts as used then."""
        node = self._tree.insert(salt, tokens)
        if node.row is None:
            return node
        self._tree.touch(node)
        return None

    def add(self, node: Node, known: Lengths | None, blocks: list[Any]) -> Snapshot:
        """Note a snapshot, which owns ``blocks``."""
        self._numbers += 1
        snapshot = self._snapshots[self._numbers] = Snapshot(self._numbers, node, known, blocks)
        self._tree.add_snapshot(node, snapshot.number)
        return snapshot

    def touch(self, snapshot: Snapshot) -> None:
        """Make a snapshot the most recently used one."""
        self._tree.touch(snapshot.node)

    def remove(self, snapshot: Snapshot) -> list[Any]:
        """Forget a snapshot. Returns its blocks, which belong to the caller."""
        self._tree.remove_snapshot(snapshot.node)
        del self._snapshots[snapshot.number]
        self._dropped.append(snapshot.number)
        return snapshot.blocks

    def oldest(self, spare: Snapshot | None = None) -> Snapshot:
        """The least recently used snapshot that is not ``spare``."""
        node = self._tree.least_recently_used(spare.node if spare else None)
        assert node.row is not None
        return self._snapshots[node.row]

    def take_dropped(self) -> list[int]:
        """Numbers of snapshots that were forgotten since the last call."""
        dropped, self._dropped = self._dropped, []
        return dropped
