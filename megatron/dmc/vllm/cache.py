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

logger = init_logger(f"vllm.{__name__}")


@dataclass(frozen=True, kw_only=True)
class CompressedSpec(AttentionSpec):
    """Cache of all layers of a model as one. A block has a page for each of ``num_kv_heads`` heads (layers x KV heads
    of this rank), and is for ``block_size`` tokens: slots of a page times the compression ratio, rounded down.
    """

    grants: Grants
    layout: Layout

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
    known: Lengths | None = None
    refused: bool = False


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
        return max(0, self._needed(self.lives.get(request_id) or _Life(), num_tokens) - held)

    def allocate_new_blocks(self, request_id: str, num_tokens: int, num_tokens_main_model: int) -> list[KVCacheBlock]:
        """Grant blocks. Returns the first of a life alone: the others are memory, and no place for the worker."""
        blocks, life = self.req_to_blocks[request_id], self.lives.setdefault(request_id, _Life())
        begins = not blocks
        more = self._needed(life, num_tokens) - len(blocks)
        life.tokens = max(life.tokens, num_tokens)
        if not life.refused and self.grants.worst(life.tokens, life.known) > self.usable:
            self._refuse(request_id, life)
        if more > 0:
            blocks.extend(self.block_pool.get_new_blocks(more))
        self.num_cached_block[request_id] = 0
        return blocks[:1] if begins else []

    def _needed(self, life: _Life, tokens: int) -> int:
        """Blocks that a request holds at worst; 1 for one that would not fit alone, which is refused."""
        needed = self.grants.worst(max(tokens, life.tokens), life.known)
        return 1 if life.refused or needed > self.usable else needed

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
        return super().pop_blocks_for_free(request_id)

    def allocate_external_computed_blocks(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("a compressed cache takes no tokens that were computed elsewhere")

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

    def report(self, request_id: str, number: int, known: Lengths) -> None:
        """Take the lengths after a step, and take back blocks that the request does not need any more."""
        life = self.lives.get(request_id)
        if life is None or life.number != number or life.refused:
            return
        life.known = known
        blocks = self.req_to_blocks[request_id]
        needed = self.grants.worst(life.tokens, known)
        if needed < len(blocks):
            self.block_pool.free_blocks(reversed(blocks[needed:]))
            del blocks[needed:]

    def totals(self) -> tuple[int, int]:
        """(tokens x heads, slots) of all requests over all ranks after the last step that is known."""
        known = [life.known for life in self.lives.values() if life.known is not None]
        return sum(x.tokens * self.grants.heads * len(x.slots) for x in known), sum(map(self.grants.slots, known))
