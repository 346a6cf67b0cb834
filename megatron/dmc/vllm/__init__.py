"""The compressed cache inside vLLM, as a plugin: vLLM imports this package, and nothing of ``megatron.dmc`` does.

vLLM calls :func:`register` in every process that it starts (entry point ``vllm.general_plugins``). Other models are
left as they are.
"""

from __future__ import annotations

ARCHITECTURE = "DMCForCausalLM"


def register() -> None:
    """Make vLLM know exported models. Where it lacks something that this needs, log one line and change nothing."""
    from vllm.logger import init_logger

    from megatron.dmc.vllm.seams import missing

    if lacking := missing():
        from vllm import __version__

        init_logger(f"vllm.{__name__}").error(
            "megatron-dmc cannot serve compressed models inside vLLM %s, which has no %s. docs/vllm.md of megatron-dmc "
            "has the releases that it was tried with.",
            *(__version__, "; no ".join(lacking)),
        )
        return
    from transformers import AutoConfig
    from vllm.model_executor.models import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

    from megatron.dmc.checkpoint.remote_code.configuration_dmc import DMCConfig
    from megatron.dmc.vllm.cache import CompressedManager, CompressedSpec
    from megatron.dmc.vllm.config import ConfigHook

    AutoConfig.register(DMCConfig.model_type, DMCConfig, exist_ok=True)
    ModelRegistry.register_model(ARCHITECTURE, f"{__name__}.model:{ARCHITECTURE}")
    MODELS_CONFIG_MAP[ARCHITECTURE] = ConfigHook
    # A registry that holds anything takes itself for complete: vLLM's own kinds of cache come first.
    KVCacheSpecRegistry._ensure_registered()
    KVCacheSpecRegistry.register(CompressedSpec, CompressedManager)
