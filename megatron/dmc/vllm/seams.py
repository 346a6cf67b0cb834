"""The places where this package meets vLLM, as a table that is checked before anything else of vLLM is imported.

docs/vllm.md says what each is for, and how a release of vLLM that is not in the table of that page is tried.
"""

from __future__ import annotations

import importlib
import inspect
from dataclasses import dataclass

_V1 = "vllm.v1"
_EMBEDDING = "vllm.model_executor.layers.vocab_parallel_embedding"
_CONNECTOR = "vllm.distributed.kv_transfer.kv_connector.v1"


@dataclass(frozen=True)
class Seam:
    """A name of vLLM's that this package uses or overrides, ``module:attribute.attribute``, and its parameters."""

    name: str
    parameters: tuple[str, ...] = ()
    """Those that it must take, as they are given by name or overridden."""

    def missing(self) -> str | None:
        """What of it is not there; None when all is."""
        module, _, path = self.name.partition(":")
        try:
            found = importlib.import_module(module)
        except ImportError as error:
            return f"{self.name} ({error})"
        for part in path.split("."):
            if not hasattr(found, part):
                return self.name
            found = getattr(found, part)
        if self.parameters:
            taken = inspect.signature(found).parameters
            every = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in taken.values())
            lacking = [name for name in self.parameters if name not in taken and not every]
            if lacking:
                return f"{self.name} takes no {', '.join(lacking)}"
        return None


SEAMS = (
    # A model is found and configured.
    Seam("vllm.model_executor.models:ModelRegistry.register_model", ("model_arch", "model_cls")),
    Seam("vllm.model_executor.models.config:MODELS_CONFIG_MAP"),
    Seam("vllm.config:VllmConfig.max_concurrent_batches"),
    Seam(
        "vllm.config:KVTransferConfig",
        ("kv_connector", "kv_connector_module_path", "kv_role", "kv_connector_extra_config"),
    ),
    Seam("vllm.transformers_utils.repo_utils:get_hf_file_to_dict", ("file_name", "model", "revision")),
    # Its attention is replaced.
    Seam("vllm.model_executor.models.llama:LlamaForCausalLM.__init__", ("vllm_config", "prefix", "layer_type")),
    Seam(
        "vllm.model_executor.models.llama:LlamaDecoderLayer.__init__",
        ("vllm_config", "prefix", "config", "attn_layer_type"),
    ),
    Seam("vllm.model_executor.models.llama:LlamaDecoderLayer.forward", ("positions", "hidden_states", "residual")),
    Seam("vllm.model_executor.models.utils:extract_layer_index"),
    Seam("vllm.utils.torch_utils:direct_register_custom_op", ("op_name", "op_func", "fake_impl")),
    Seam("vllm.forward_context:get_forward_context"),
    # Its weights are packed.
    Seam("vllm.model_executor.layers.linear:UnquantizedLinearMethod.process_weights_after_loading", ("layer",)),
    Seam("vllm.model_executor.layers.linear:UnquantizedLinearMethod.apply", ("layer", "x", "bias")),
    Seam(
        "vllm.model_executor.layers.vocab_parallel_embedding:UnquantizedEmbeddingMethod.embedding", ("layer", "input_")
    ),
    Seam(
        "vllm.model_executor.layers.vocab_parallel_embedding:UnquantizedEmbeddingMethod.apply", ("layer", "x", "bias")
    ),
    Seam("vllm.model_executor.layers.layernorm:RMSNorm.forward"),
    # Its cache is one layer, in memory that vLLM allocates.
    Seam("vllm.model_executor.layers.attention_layer_base:AttentionLayerBase.bind_kv_cache", ("kv_cache",)),
    Seam("vllm.model_executor.layers.attention_layer_base:AttentionLayerBase.get_kv_cache_spec", ("vllm_config",)),
    Seam(f"{_V1}.attention.backend:AttentionBackend.supported_kv_cache_layouts"),
    Seam(
        f"{_V1}.attention.backend:AttentionMetadataBuilder.build",
        ("common_prefix_len", "common_attn_metadata", "fast_build"),
    ),
    Seam(
        f"{_V1}.attention.backend:CommonAttentionMetadata",
        ("query_start_loc_cpu", "seq_lens", "max_query_len", "block_table_tensor"),
    ),
    Seam(f"{_V1}.kv_cache_interface:KVCacheLayout.LBHNC"),
    # Its blocks are granted and taken back.
    Seam(
        f"{_V1}.kv_cache_interface:AttentionSpec",
        ("block_size", "num_kv_heads", "head_size", "dtype", "tokens_per_state"),
    ),
    Seam(f"{_V1}.kv_cache_interface:AttentionSpec.max_memory_usage_bytes", ("vllm_config",)),
    Seam(f"{_V1}.kv_cache_interface:AttentionSpec.max_num_blocks_per_req", ("vllm_config", "max_len")),
    Seam(f"{_V1}.kv_cache_interface:AttentionSpec.is_uniform_with_collection", ("kv_cache_specs",)),
    Seam(f"{_V1}.kv_cache_spec_registry:KVCacheSpecRegistry.register", ("kvcache_spec_cls", "manager_class")),
    Seam(f"{_V1}.kv_cache_spec_registry:KVCacheSpecRegistry._ensure_registered"),
    Seam(
        f"{_V1}.core.single_type_kv_cache_manager:CircularBufferManager.get_num_blocks_to_allocate",
        ("request_id", "num_tokens", "apply_admission_cap", "prefill_end"),
    ),
    Seam(
        f"{_V1}.core.single_type_kv_cache_manager:CircularBufferManager.allocate_new_blocks",
        ("request_id", "num_tokens", "num_tokens_main_model"),
    ),
    Seam(f"{_V1}.core.single_type_kv_cache_manager:CircularBufferManager.pop_blocks_for_free", ("request_id",)),
    Seam(f"{_V1}.core.block_pool:BlockPool.get_new_blocks"),
    Seam(f"{_V1}.core.block_pool:BlockPool.get_num_free_blocks"),
    Seam(f"{_V1}.core.block_pool:BlockPool.free_blocks"),
    # Prompts are read up to where a state is kept, and begin with one.
    Seam("vllm.config:SchedulerConfig.get_scheduler_cls"),
    Seam(
        f"{_V1}.core.sched.scheduler:Scheduler._mamba_block_aligned_split",
        ("request", "num_new_tokens", "num_new_local_computed_tokens", "num_external_computed_tokens"),
    ),
    Seam(
        f"{_V1}.core.single_type_kv_cache_manager:CircularBufferManager.allocate_external_computed_blocks",
        ("request_id", "num_local_computed_tokens", "num_external_computed_tokens"),
    ),
    Seam(f"{_CONNECTOR}.base:KVConnectorBase_V1.get_num_new_matched_tokens", ("request", "num_computed_tokens")),
    Seam(f"{_CONNECTOR}.base:KVConnectorBase_V1.on_new_request", ("request",)),
    Seam(f"{_CONNECTOR}.base:SupportsHMA.request_finished_all_groups", ("request", "block_ids")),
    Seam(f"{_CONNECTOR}.base:KVConnectorBase_V1.reset_cache"),
    # Scheduler and workers talk.
    Seam(f"{_CONNECTOR}.base:KVConnectorBase_V1.bind_kv_cache_manager", ("kv_cache_manager",)),
    Seam(f"{_CONNECTOR}.base:KVConnectorBase_V1.build_connector_meta", ("scheduler_output",)),
    Seam(f"{_CONNECTOR}.base:KVConnectorBase_V1.handle_preemptions", ("kv_connector_metadata",)),
    Seam(f"{_CONNECTOR}.base:KVConnectorBase_V1.build_connector_worker_meta"),
    Seam(f"{_CONNECTOR}.base:KVConnectorBase_V1.update_connector_output", ("connector_output",)),
    Seam(f"{_CONNECTOR}.base:KVConnectorBase_V1.get_block_ids_with_load_errors"),
    Seam(f"{_CONNECTOR}.base:KVConnectorWorkerMetadata.aggregate"),
    Seam(f"{_CONNECTOR}.metrics:KVConnectorStats.aggregate"),
    Seam(f"{_CONNECTOR}.metrics:KVConnectorPromMetrics.observe", ("transfer_stats_data", "engine_idx")),
)


def missing(seams: tuple[Seam, ...] = SEAMS) -> list[str]:
    """Seams that the installed vLLM does not have."""
    return [text for seam in seams if (text := seam.missing()) is not None]
