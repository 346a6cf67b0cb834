"""What a compressed model changes in vLLM's configuration, and what of it cannot be had."""

from __future__ import annotations

from typing import Any

from vllm.config import KVTransferConfig, VllmConfig
from vllm.logger import init_logger

from megatron.dmc.kernels.state import PAGE_SIZES

logger = init_logger(f"vllm.{__name__}")

MAX_SNAPSHOTS = 64  # each has a ring and a page table, in memory that pages would have otherwise
OPERATOR, LAYER_OPERATOR = "vllm::dmc_attention", "vllm::dmc_layer"
SCHEDULER = "megatron.dmc.vllm.scheduler.SnapshotScheduler"
CONNECTOR, MODULE = "DMCConnector", "megatron.dmc.vllm.connector"


def page_size(config: VllmConfig) -> int:
    """Slots of a page: what --block-size says, else the smallest."""
    cache = config.cache_config
    return cache.block_size if cache.user_specified_block_size else PAGE_SIZES[0]


def snapshot_rows(config: VllmConfig) -> int:
    """Rows of the cache for states that are kept for prefix caching: as many as for sequences, up to a limit, or
    none.
    """
    transfer = config.kv_transfer_config
    caching = transfer is not None and transfer.kv_connector_extra_config.get("prefix_caching", False)
    return min(config.scheduler_config.max_num_seqs, MAX_SNAPSHOTS) if caching else 0


def refusals(config: VllmConfig) -> list[str]:
    """What a compressed cache does not do, of what is asked for: one sentence each."""
    parallel, cache, model = config.parallel_config, config.cache_config, config.model_config
    transfer = config.kv_transfer_config
    heads = model.hf_config.num_key_value_heads
    wrong = {
        f"--pipeline-parallel-size {parallel.pipeline_parallel_size}: use --tensor-parallel-size": (
            parallel.pipeline_parallel_size > 1
        ),
        f"--tensor-parallel-size {parallel.tensor_parallel_size} does not divide the {heads} KV heads": (
            heads % parallel.tensor_parallel_size > 0
        ),
        "--decode-context-parallel-size": parallel.decode_context_parallel_size > 1,
        "--prefill-context-parallel-size": parallel.prefill_context_parallel_size > 1,
        "--speculative-config: what is merged or evicted cannot be taken back": config.speculative_config is not None,
        f"the KV connector {getattr(transfer, 'kv_connector', None)}: slots are not vLLM's blocks": (
            transfer is not None and transfer.kv_connector != CONNECTOR
        ),
        "--kv-offloading-size": cache.kv_offloading_size is not None,
        f"--kv-cache-dtype {cache.cache_dtype}: use auto": cache.cache_dtype != "auto",
        f"--block-size {cache.block_size}: use one of {', '.join(map(str, PAGE_SIZES))}": (
            page_size(config) not in PAGE_SIZES
        ),
        "--enable-sleep-mode": model.enable_sleep_mode,
        "--enable-dbo": parallel.enable_dbo,
        "--hf-overrides: attention is as config.json says": bool(model.hf_overrides),
    }
    return [text for text, asked in wrong.items() if asked]


class ConfigHook:
    """vLLM's hook for the configuration of an architecture."""

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        return

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        """Raise ``ValueError`` for what cannot be had; switch the connector on, and prefix caching to its snapshots."""
        if wrong := refusals(vllm_config):
            raise ValueError("a compressed KV cache cannot be had with " + "; nor with ".join(wrong))
        cache, scheduling = vllm_config.cache_config, vllm_config.scheduler_config
        on_gpu = vllm_config.device_config.device_type == "cuda"
        caching, cache.enable_prefix_caching = cache.enable_prefix_caching, False  # vLLM's own, by blocks
        if caching and (on_gpu or scheduling.scheduler_cls is not None):
            logger.info("Prefix caching is off: of a compressed cache it works on CPUs, with vLLM's own scheduler.")
            caching = False
        if vllm_config.kv_transfer_config is None:
            vllm_config.kv_transfer_config = KVTransferConfig(
                kv_connector=CONNECTOR,
                kv_connector_module_path=MODULE,
                kv_role="kv_both",
                kv_connector_extra_config={"prefix_caching": caching},
            )
            if caching:
                scheduling.scheduler_cls = SCHEDULER
        if on_gpu:
            logger.warning("The compressed cache has not been run inside vLLM on a GPU yet.")
            # Attention looks up what a step is in Python, so no CUDA graph may hold it.
            compilation = vllm_config.compilation_config
            compilation.splitting_ops = [*(compilation.splitting_ops or ()), OPERATOR]
