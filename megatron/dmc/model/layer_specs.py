"""Layer specs that make a Megatron model use DMC attention."""

import copy
from typing import Optional

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron.dmc.config import DMCConfig
from megatron.dmc.model.attention import DMCSelfAttention
from megatron.dmc.model.layer import DMCTransformerLayer
from megatron.dmc.model.norm import RMSNorm, RMSNormBesideCarry
from megatron.dmc.model.supported import check_supported
from megatron.dmc.ops.packages import trouble_with


def have_transformer_engine() -> bool:
    """True when Transformer Engine can be imported and there is a GPU to run it on."""
    return trouble_with("transformer_engine") is None and torch.cuda.is_available()


def resolve_transformer_impl(transformer_impl: str) -> str:
    """Resolve "auto" to "transformer_engine" or "local". Raises ``ValueError`` where Transformer Engine cannot run."""
    if transformer_impl == "auto":
        return "transformer_engine" if have_transformer_engine() else "local"
    if transformer_impl == "transformer_engine" and not have_transformer_engine():
        why = trouble_with("transformer_engine")
        why = "there is no GPU" if why is None else why or "Transformer Engine is not installed (docs/install.md)"
        raise ValueError(f"transformer_impl is transformer_engine, but {why}; mend that, or use transformer_impl local")
    if transformer_impl not in ("local", "transformer_engine"):
        raise ValueError(f"transformer_impl {transformer_impl!r} is unknown; use auto, local or transformer_engine")
    return transformer_impl


def get_dmc_layer_spec(
    config: TransformerConfig,
    dmc: DMCConfig,
    transformer_impl: str = "auto",
    *,
    carry: bool = False,
    rotary_factor: Optional[float] = None,
) -> ModuleSpec:
    """Spec of a transformer layer with DMC attention, for ``GPTModel(transformer_layer_spec=...)``.

    Args:
        config: the model's configuration; RMSNorm models only (the Llama family).
        dmc: decision bias, window, temperature.
        transformer_impl: "local" (megatron-core's own modules), "transformer_engine", or "auto".
        carry: the layer's input has one more row, see :mod:`megatron.dmc.model.carry`. ``DMCGPTModel`` sets it; for
            a plain ``GPTModel`` leave it out and use ``DMCStep.kept``.
        rotary_factor: factor on the cosines and sines of the rotation (YaRN). None: what ``GPTModel`` would take from
            ``config``'s yarn_rotary_scaling_factor, yarn_mscale and yarn_mscale_all_dim, 1 without them.

    Raises:
        ValueError: Transformer Engine is asked for and cannot run, or ``config`` has an option that DMC layers do not
            compute, by name (:mod:`megatron.dmc.model.supported`).
    """
    check_supported(config)
    transformer_impl = resolve_transformer_impl(transformer_impl)
    if config.use_te_activation_func and not (transformer_impl == "local" and _is_plain_swiglu(config)):
        raise ValueError(
            "DMC layers do not support use_te_activation_func True with Transformer Engine, or for another activation "
            "than SwiGLU; set it to False"
        )
    if transformer_impl == "transformer_engine":
        spec = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm)
    else:
        spec = get_gpt_layer_local_spec(qk_layernorm=config.qk_layernorm, normalization="RMSNorm")
        spec = copy.deepcopy(spec)
        spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = RMSNorm
        if config.qk_layernorm:
            attention = spec.submodules.self_attention.submodules
            attention.q_layernorm = attention.k_layernorm = RMSNorm
    spec.module = DMCTransformerLayer
    spec.params = {**spec.params, "carry": carry}
    attention = spec.submodules.self_attention
    attention.module = DMCSelfAttention
    attention.params = {**attention.params, "dmc": dmc, "rotary_factor": rotary_factor}
    attention.submodules.core_attention = IdentityOp
    return spec


def _is_plain_swiglu(config: TransformerConfig) -> bool:
    plain = not config.glu_linear_offset and config.activation_func_clamp_value is None
    return plain and config.gated_linear_unit and config.activation_func is F.silu


def get_dmc_block_spec(
    config: TransformerConfig,
    dmc: DMCConfig,
    transformer_impl: str = "auto",
    *,
    carry: bool,
    rotary_factor: Optional[float] = None,
    vp_stage: Optional[int] = None,
    pp_rank: Optional[int] = None,
) -> TransformerBlockSubmodules:
    """Spec of this rank's part of the decoder: its layers and the final norm."""
    layer = get_dmc_layer_spec(config, dmc, transformer_impl, carry=carry, rotary_factor=rotary_factor)
    layers = get_num_layers_to_build(config, vp_stage=vp_stage, pp_rank=pp_rank)
    return TransformerBlockSubmodules(layer_specs=[layer] * layers, layer_norm=RMSNormBesideCarry if carry else RMSNorm)
