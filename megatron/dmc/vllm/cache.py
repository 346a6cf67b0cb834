"""vLLM's scheduler side: the kind of cache that a compressed model has, and the manager that grants its blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import CircularBufferManager
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheSpec

from megatron.dmc.vllm.grants import Grants, Layout, Lengths
from megatron.dmc.vllm.prefixes import MIN_TOKENS, Prefixes, Snapshot

logger = init_logger(f"vllm.{__name__}")


@dataclass(frozen=True, kw_only=True)
class CompressedSpec(AttentionSpec):
    """Cache of all layers of a model as one. A block has a page for each of ``num_kv_heads`` heads (layers x KV heads
    of this rank), and is for ``block_size`` tokens: slots of a page times the compression ratio, rounded down.
    """

    grants: Grants
    layout: Layout
    snapshots: int
    """Rows for states that are kept for prefix caching; 0 without."""
    report_every: int
    """Decoding steps from one report of lengths to the next, unless blocks are short."""

    def max_memory_usage_bytes(self, vllm_config: VllmConfig) -> int:
        """Memory in which one request of the longest context is expected to fit, with the rows of all."""
        blocks = self.grants.expected(vllm_config.model_config.max_model_len)
        return self.layout.needed(blocks) * self.page_size_bytes

    def max_num_blocks_per_req(self, vllm_config: VllmConfig, max_len: int) -> int:
        """Width of the worker's block table. Only the first block of a request is read there: it names the request."""
        return self.grants.worst(max_len)

    @property
    def block_table_token_alignment(self) -> int | None:
        return None

    def is_uniform_with_collection(self, kv_cache_specs: dict[str, KVCacheSpec]) -> bool:
        return all(isinstance(spec, CompressedSpec) for spec in kv_cache_specs.values())

    @property
    def prefix_cacheable(self) -> bool:
        return False

    @property
    def uses_slot_mapping(self) -> bool:
        return False


@dataclass
class _Life:
    """A request from its first block until it gives all blocks back."""

    number: int = 0
    """Given when a step first has it; lengths of an earlier life are ignored by it."""
    tokens: int = 0
    """Tokens that it was granted blocks for."""
    enough: int = 0
    """Tokens for which its blocks are enough at worst: so many or more."""
    known: Lengths | None = None
    refused: bool = False
    source: Snapshot | None = None
    """What it continues from, until its first step."""
    worst: tuple[int, Lengths | None, int] | None = None
    """What the worst case was last asked for, and its blocks: vLLM asks several times in a step."""


class CompressedManager(CircularBufferManager):
    """Grants blocks to requests by the worst case, and takes back what turns out not to be needed."""

    def __init__(self, kv_cache_spec: CompressedSpec, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, **kwargs)
        self.grants = kv_cache_spec.grants
        self.usable = kv_cache_spec.layout.usable(self.block_pool.num_gpu_blocks)
        # The rows of all sequences lie in the memory of blocks that are never granted; vLLM's null block is one.
        reserved = max(0, self.block_pool.num_gpu_blocks - 1 - self.usable)
        self.usable = self.block_pool.num_gpu_blocks - 1 - reserved
        if self.usable < 1:
            raise ValueError(
                f"the cache of {self.block_pool.num_gpu_blocks} blocks has no room beside the rows of all sequences; "
                "raise --kv-cache-memory-bytes or --gpu-memory-utilization, or lower --max-num-seqs"
            )
        self.block_pool.get_new_blocks(reserved)
        self.block_pool.num_gpu_blocks -= reserved
        self.lives: dict[str, _Life] = {}
        self._numbers = 0
        self.prefixes = Prefixes(kv_cache_spec.snapshots) if kv_cache_spec.snapshots else None
        self._matches: dict[str, Snapshot] = {}
        self._report_every, self._unreported, self._reports = kv_cache_spec.report_every, 0, True
        self._reported: dict[int, Snapshot] = {}
        # Blocks of snapshots are anybody's who needs them: vLLM counts them as free, as its own cached ones.
        self._unused = self.block_pool.get_num_free_blocks
        self.block_pool.get_num_free_blocks = self.free_count

    # ------------------------------------------------------------------------------------------ what the scheduler asks

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock],
        total_computed_tokens: int,
        num_local_computed_tokens: int,
        num_tokens_main_model: int,
        apply_admission_cap: bool = False,
        prefill_end: int = 0,
    ) -> int:
        """Blocks to grant for ``num_tokens`` tokens. ``apply_admission_cap``: those in which the whole prompt is
        expected to fit. A request that would not fit alone asks for none, and is refused in this step.
        """
        held = len(self.req_to_blocks.get(request_id, ()))
        if apply_admission_cap:
            return max(0, min(self.grants.expected(num_tokens), self.usable) - held)
        life = self.lives.get(request_id) or self._new_life(request_id, total_computed_tokens)
        return 0 if num_tokens <= life.enough else max(0, self._needed(life, num_tokens) - held)

    def allocate_new_blocks(self, request_id: str, num_tokens: int, num_tokens_main_model: int) -> list[KVCacheBlock]:
        """Grant blocks. Returns the first of a life alone: the others are memory, and no place for the worker."""
        blocks, life = self.req_to_blocks[request_id], self.lives.setdefault(request_id, _Life())
        if num_tokens <= life.enough:
            life.tokens = max(life.tokens, num_tokens)
            return []
        begins = not blocks
        needed = self._needed(life, num_tokens)
        life.tokens = max(life.tokens, num_tokens)
        if not life.refused and self._worst(life, life.tokens) > self.usable:
            self._refuse(request_id, life)
            life.source = None  # its one block is none for a copy
        if life.source is not None and needed + len(life.source.blocks) > self.free_count():
            blocks.extend(self.prefixes.remove(life.source))
        self._resize(blocks, max(needed, len(blocks)), life.source)
        if not life.refused:
            # Asked ahead, since the counting of every next token would take a part of each step.
            counts = (life.tokens + more for more in (8, 4, 2, 1, 0))
            life.enough = next(count for count in counts if self.grants.worst(count, life.known) <= len(blocks))
        self.num_cached_block[request_id] = 0
        return blocks[:1] if begins else []

    def allocate_external_computed_blocks(
        self,
        request_id: str,
        num_local_computed_tokens: int,
        num_external_computed_tokens: int,
        *args: Any,
        **named: Any,
    ) -> None:
        """Let a request begin with the snapshot that it was matched with; blocks come with its first tokens."""
        life = self._new_life(request_id, num_local_computed_tokens + num_external_computed_tokens)
        assert life.source is not None and self.prefixes is not None
        self.prefixes.touch(life.source)
        self.lives[request_id] = life

    def _new_life(self, request_id: str, computed: int) -> _Life:
        match = self._matches.get(request_id)
        if match is None or match.tokens != computed or match not in self.prefixes:
            return _Life()
        return _Life(known=match.known, source=match)

    def free_count(self) -> int:
        """Blocks that no request holds."""
        return self._unused() + (self.prefixes.num_blocks if self.prefixes else 0)

    def _resize(self, blocks: list[KVCacheBlock], needed: int, spare: Snapshot | None = None) -> None:
        """Get blocks, those of snapshots other than ``spare`` where no others are left; or give some back."""
        while self._unused() < needed - len(blocks):
            self._drop(self.prefixes.oldest(spare))
        if needed > len(blocks):
            blocks.extend(self.block_pool.get_new_blocks(needed - len(blocks)))
        elif needed < len(blocks):
            self.block_pool.free_blocks(reversed(blocks[needed:]))
            del blocks[needed:]

    def _drop(self, snapshot: Snapshot) -> None:
        self.block_pool.free_blocks(reversed(self.prefixes.remove(snapshot)))

    def _needed(self, life: _Life, tokens: int) -> int:
        """Blocks that a request holds at worst; 1 for one that would not fit alone, which is refused."""
        needed = self._worst(life, max(tokens, life.tokens))
        return 1 if life.refused or needed > self.usable else needed

    def _worst(self, life: _Life, tokens: int) -> int:
        last = life.worst
        if last is None or last[0] != tokens or last[1] is not life.known:
            last = life.worst = (tokens, life.known, self.grants.worst(tokens, life.known))
        return last[2]

    def _refuse(self, request_id: str, life: _Life) -> None:
        life.refused = True
        tokens, slots = (life.known.tokens, self.grants.slots(life.known)) if life.known else (0, 0)
        logger.error(
            "Request %s ends with an error: its first %d tokens take %d KV slots over all layers and heads, "
            "and with %d tokens it may take more than the %d blocks of the cache. Raise --kv-cache-memory-bytes or "
            "--gpu-memory-utilization, or lower --max-model-len or --max-num-batched-tokens.",
            *(request_id, tokens, slots, life.tokens, self.usable),
        )

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        self.lives.pop(request_id, None)
        self._matches.pop(request_id, None)
        return super().pop_blocks_for_free(request_id)

    def get_num_common_prefix_blocks(self, running_request_id: str) -> int:
        return 0

    # ----------------------------------------------------------------------------------------- what the connector tells

    def begin(self, request_id: str) -> int:
        """Number a request's life, which begins with this step."""
        self._numbers += 1
        self.lives[request_id].number = self._numbers
        return self._numbers

    def refused(self, request_ids: Sequence[str]) -> list[str]:
        """Those of ``request_ids`` that the cache cannot hold."""
        return [request for request in request_ids if self.lives[request].refused]

    def wants_report(self, tokens: int, requests: int) -> bool:
        """Whether lengths are to be reported after a step of so many tokens and requests.

        Reports take time, so some steps in which all requests decode have none, and grants stay as if none of their
        tokens had merged. That must not cost a request its place: without a report there are free blocks for the next
        step of all requests whose blocks may not be enough for it.
        """
        kinds = 2 if self.grants.window.size else 1
        short = sum(life.enough <= life.tokens for life in self.lives.values())
        self._unreported += 1
        self._reports = self._unreported >= self._report_every or tokens > requests or self.free_count() < kinds * short
        if self._reports:
            self._unreported = 0
        return self._reports

    def report(self, request_id: str, number: int, known: Lengths) -> None:
        """Take the lengths after a step, and take back blocks that the request does not need any more."""
        snapshot, life = self._reported.pop(number, None), self.lives.get(request_id)
        if snapshot is not None and snapshot in self.prefixes:  # the request ended with this step
            snapshot.known = known
            self._shrink(snapshot.blocks, snapshot.tokens, known)
        if life is None or life.number != number or life.refused:
            return
        life.known = known
        if self._shrink(self.req_to_blocks[request_id], life.tokens, known):
            life.enough = life.tokens

    def _shrink(self, blocks: list[KVCacheBlock], tokens: int, known: Lengths) -> bool:
        """Give back blocks that are not needed for so many tokens. Returns whether there were some."""
        needed = self.grants.worst(tokens, known)
        if needed >= len(blocks):
            return False
        self._resize(blocks, needed)
        return True

    # -------------------------------------------------------------------------------------------------- prefix caching

    def match(self, request_id: str, most: int) -> int:
        """Tokens of the longest snapshot with which a request can begin, at most ``most``; 0 without."""
        found = self.prefixes.match(request_id, most) if self.prefixes is not None else None
        self._matches.pop(request_id, None)
        if found is None:
            return 0
        self._matches[request_id] = found
        return found.tokens

    def keep(self, request_id: str, salt: str, token_ids: Sequence[int]) -> int | None:
        """Turn a request that has ended into a snapshot. Returns its number; None when there is nothing to keep.

        Args:
            token_ids: of prompt and completion. The last one was sampled, and is not in the cache.
        """
        life = self.lives.get(request_id)
        if life is None or life.refused or life.tokens != len(token_ids) - 1 or life.tokens < MIN_TOKENS:
            return None
        tokens = list(token_ids[: life.tokens])
        if self.prefixes.vacant(salt, tokens) is None:
            return None
        self._make_place()
        node = self.prefixes.vacant(salt, tokens)  # what was dropped may have taken the first one with it
        assert node is not None
        snapshot = self.prefixes.add(node, life.known, self.req_to_blocks.pop(request_id))
        if self._reports:
            self._reported[life.number] = snapshot
        return snapshot.number

    def copy(self, request_id: str, computed: int) -> int | None:
        """Keep the state of a request after ``computed`` tokens, if it is of use. Returns the snapshot's number."""
        life = self.lives[request_id]
        if life.refused or self.prefixes.wanted(request_id, computed) is None:
            return None
        needed = self.grants.worst(computed, life.known)
        if needed > self.free_count():
            return None
        blocks: list[KVCacheBlock] = []
        self._make_place()
        self._resize(blocks, needed)
        node = self.prefixes.wanted(request_id, computed)  # what was dropped may have changed where prompts part
        if node is None:
            self.block_pool.free_blocks(reversed(blocks))
            return None
        return self.prefixes.add(node, life.known, blocks).number

    def _make_place(self) -> None:
        while len(self.prefixes) >= self.prefixes.limit:
            self._drop(self.prefixes.oldest())

    def source(self, request_id: str) -> tuple[int, int] | None:
        """(number, tokens) of the snapshot that a request begins with."""
        life = self.lives[request_id]
        source, life.source = life.source, None
        return (source.number, source.tokens) if source else None

    def forget(self) -> None:
        """Drop all snapshots."""
        while self.prefixes:
            self._drop(self.prefixes.oldest())

    def totals(self) -> tuple[int, int]:
        """(tokens x heads, slots) of all requests over all ranks after the last step that is known."""
        known = [life.known for life in self.lives.values() if life.known is not None]
        return sum(x.tokens * self.grants.heads * len(x.slots) for x in known), sum(map(self.grants.slots, known))
