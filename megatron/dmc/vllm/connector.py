"""The channel between vLLM's scheduler and its workers, as a KV connector that transfers nothing: requests that begin
and end on the way there, the true lengths of the cache on the way back.
"""

from __future__ import annotations

import json
from typing import Any

from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorWorkerMetadata,
    SupportsHMA,
)
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats
from vllm.v1.request import RequestStatus

from megatron.dmc.vllm.cache import CompressedManager
from megatron.dmc.vllm.grants import Lengths
from megatron.dmc.vllm.model import pool_of
from megatron.dmc.vllm.rows import Plan


class Metadata(Plan, KVConnectorMetadata):
    """The scheduler's plan of a step, in vLLM's envelope."""


class WorkerMetadata(KVConnectorWorkerMetadata):
    """Lives and lengths of requests after a step, of one rank or of several."""

    def __init__(self, found: dict[str, tuple[int, Lengths]]) -> None:
        self.found = found

    def aggregate(self, other: KVConnectorWorkerMetadata) -> WorkerMetadata:
        assert isinstance(other, WorkerMetadata) and self.found.keys() == other.found.keys()
        pairs = ((request, known, other.found[request]) for request, known in self.found.items())
        return WorkerMetadata({request: (a[0], a[1].beside(b[1])) for request, a, b in pairs})


class DMCConnector(KVConnectorBase_V1, SupportsHMA):
    """Both halves: the scheduler's has a manager, a worker's has rows."""

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self._rows = pool_of(vllm_config).rows if role == KVConnectorRole.WORKER else None
        self._kept: list[tuple[int, str]] = []

    @property
    def requires_kv_delivery(self) -> bool:
        return False

    # ------------------------------------------------------------------------------------------------- in the scheduler

    @property
    def manager(self) -> CompressedManager:
        (manager,) = self._kv_cache_manager.coordinator.single_type_managers
        return manager

    def bind_kv_cache_manager(self, kv_cache_manager: Any) -> None:
        """Raise ``ValueError`` when the cache is smaller than what the longest context is expected to take."""
        super().bind_kv_cache_manager(kv_cache_manager)
        length = self._vllm_config.model_config.max_model_len
        needed, usable = self.manager.grants.expected(length), self.manager.usable
        if needed > usable:
            raise ValueError(
                f"max_model_len is {length}, for which {needed} blocks of the cache are expected to be needed, and it "
                f"has {usable}; lower --max-model-len or --max-num-batched-tokens, or give the cache more memory"
            )

    def on_new_request(self, request: Any) -> None:
        if self.manager.prefixes is not None and request.prompt_token_ids is not None:
            self.manager.prefixes.begin(request.request_id, _salt(request), request.prompt_token_ids)

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        """Tokens of the snapshot with which a request can begin. The last token is always computed."""
        return self.manager.match(request.request_id, request.num_tokens - 1), False

    def chunk(self, request_id: str, start: int, count: int) -> int:
        """How many of ``count`` tokens from ``start`` on a step computes, see :meth:`Prefixes.chunk`."""
        prefixes = self.manager.prefixes
        return count if prefixes is None else prefixes.chunk(request_id, start, count)

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        return

    def build_connector_meta(self, scheduler_output: Any) -> Metadata:
        manager, cached = self.manager, scheduler_output.scheduled_cached_reqs
        copied = self._copy(cached) if manager.prefixes is not None else []
        named = [(new.req_id, new.block_ids) for new in scheduler_output.scheduled_new_reqs]
        resumed = cached.resumed_req_ids
        named += [pair for pair in zip(cached.req_ids, cached.new_block_ids, strict=True) if pair[0] in resumed]
        kept, self._kept = self._kept, []
        dropped = manager.prefixes.take_dropped() if manager.prefixes is not None else []
        made = {snapshot for snapshot, _ in copied}
        return Metadata(
            kept=kept,
            copied=[pair for pair in copied if pair[0] not in dropped],
            resumed={request: source for request, _ in named if (source := manager.source(request)) is not None},
            dropped=[snapshot for snapshot in dropped if snapshot not in made],
            begun=[(request, manager.begin(request), blocks[0][0]) for request, blocks in named],
            ended=list(scheduler_output.finished_req_ids | (scheduler_output.preempted_req_ids or set())),
            refused=manager.refused(scheduler_output.num_scheduled_tokens),
            tokens=dict(scheduler_output.num_scheduled_tokens),
            report=manager.wants_report(
                scheduler_output.total_num_scheduled_tokens, len(scheduler_output.num_scheduled_tokens)
            ),
        )

    def _copy(self, cached: Any) -> list[tuple[int, str]]:
        """Snapshots of requests that go on with this step: (number, request)."""
        pairs = zip(cached.req_ids, cached.num_computed_tokens, strict=True)
        going = ((request, computed) for request, computed in pairs if request not in cached.resumed_req_ids)
        return [(n, request) for request, computed in going if (n := self.manager.copy(request, computed)) is not None]

    def update_connector_output(self, connector_output: Any) -> None:
        if connector_output.kv_connector_worker_meta is not None:
            for request, (life, known) in connector_output.kv_connector_worker_meta.found.items():
                self.manager.report(request, life, known)

    def request_finished_all_groups(self, request: Any, block_ids: Any) -> tuple[bool, None]:
        manager, name = self.manager, request.request_id
        if manager.prefixes is not None:
            ended = request.status in (RequestStatus.FINISHED_STOPPED, RequestStatus.FINISHED_LENGTH_CAPPED)
            if ended and (snapshot := manager.keep(name, _salt(request), request.all_token_ids)) is not None:
                self._kept.append((snapshot, name))
            manager.prefixes.end(name)
        return False, None

    def reset_cache(self) -> bool:
        """Forget all snapshots."""
        self.manager.forget()
        return True

    def get_kv_connector_stats(self) -> CompressionStats | None:
        if self._rows is not None:
            return None
        tokens, slots = self.manager.totals()
        return CompressionStats({"head_tokens": tokens, "slots": slots})

    # ------------------------------------------------------------------------------------------------------ in a worker

    def handle_preemptions(self, kv_connector_metadata: Metadata) -> None:
        """Begin a step: vLLM calls it before anything else."""
        self._rows.begin(kv_connector_metadata)

    def get_block_ids_with_load_errors(self) -> set[int]:
        """First blocks of requests that the cache cannot hold: vLLM ends these with an error."""
        return self._rows.take_failed()

    def build_connector_worker_meta(self) -> WorkerMetadata:
        return WorkerMetadata(self._rows.take_lengths())

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        return

    def wait_for_layer_load(self, layer_name: str) -> None:
        return

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        return

    def wait_for_save(self) -> None:
        return

    # ---------------------------------------------------------------------------------------------------------- metrics

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> CompressionStats:
        return CompressionStats(data or {})

    @classmethod
    def build_prom_metrics(cls, *args: Any) -> CompressionMetrics:
        return CompressionMetrics(*args)


def _salt(request: Any) -> str:
    """What two requests must have in common to share a prefix, beside its tokens."""
    adapter = request.lora_request
    return json.dumps([request.cache_salt, adapter.lora_name if adapter else None])


class CompressionStats(KVConnectorStats):
    """``head_tokens`` (tokens x layers x KV heads) and ``slots`` that running requests hold at a moment."""

    def reset(self) -> None:
        self.data = {}

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        """The later one: it is a state, not a count."""
        return self if other.is_empty() else other

    def reduce(self) -> dict[str, int | float]:
        """What vLLM's log prints."""
        return {"KV slots": self.data["slots"], "compression ratio": round(compression_ratio(self.data), 2)}

    def is_empty(self) -> bool:
        return not self.data


def compression_ratio(data: dict[str, int]) -> float:
    """Tokens per slot over all layers and heads; 0 when nothing runs."""
    return data.get("head_tokens", 0) / max(1, data.get("slots", 0))


class CompressionMetrics(KVConnectorPromMetrics):
    """Gauges beside vLLM's own."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        documented = {
            "vllm:dmc_kv_slots": "KV slots that running requests hold, over all layers, heads and ranks.",
            "vllm:dmc_compression_ratio": "Tokens per KV slot of running requests, over all layers and heads.",
        }
        self._gauges = [
            self._gauge_cls(name=name, documentation=text, labelnames=self._labelnames, multiprocess_mode="mostrecent")
            for name, text in documented.items()
        ]

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        labels = self.per_engine_labelvalues[engine_idx]
        values = transfer_stats_data.get("slots", 0), compression_ratio(transfer_stats_data)
        for gauge, value in zip(self._gauges, values, strict=True):
            gauge.labels(*labels).set(value)
