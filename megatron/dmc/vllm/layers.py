"""This package's layers in the place of vLLM's, on CPUs where they are faster: vLLM loads the weights into its own
modules, whose methods pack them then, and a layer is one call from one attention to the next.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size, tensor_model_parallel_all_reduce
from vllm.logger import init_logger
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod, VocabParallelEmbedding

from megatron.dmc import kernels
from megatron.dmc.inference.decoder import Adapter, Decoder, Layer
from megatron.dmc.inference.linear import PanelLinear, make_gated, make_linear
from megatron.dmc.inference.weights import ModelInfo
from megatron.dmc.kernels import cpu_tuning

logger = init_logger(f"vllm.{__name__}")


def own_layers(config: VllmConfig) -> bool:
    """True where a model has this package's layers: on CPUs for which weights in panels are best, with weights that are
    not quantized, and without LoRA. The log says which layers it has, and why vLLM's.
    """
    model = config.model_config
    if config.device_config.device_type != "cpu":
        return False
    wrong = {
        "quantized weights": config.quant_config is not None,
        "LoRA": config.lora_config is not None,
        f"{model.dtype} on this CPU": not cpu_tuning.panels_multiply(model.dtype),
        "no C++ kernels": kernels.active_backend("cpu") != "cpp",
    }
    reasons = ", ".join(text for text, holds in wrong.items() if holds)
    if reasons:
        logger.info("Layers: vLLM's (%s).", reasons)
    else:
        logger.info("Layers: megatron.dmc's, with weights in panels.")
    return not reasons


class PackedMethod(UnquantizedLinearMethod):
    """Method of a linear layer whose weight is packed once it is loaded."""

    supports_pre_processed_weights = False

    def __init__(self, gated: bool = False) -> None:
        """gated: see :func:`megatron.dmc.inference.linear.make_gated`."""
        super().__init__()
        self.gated = gated

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        weight = layer.weight.data
        layer.packed = make_gated(weight) if self.gated else make_linear(weight, layer.bias)
        _drop_weight(layer)

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return layer.packed(x)


class PlainMethod(UnquantizedLinearMethod):
    """Method of a linear layer whose weight stays as it was loaded."""

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        return


class EmbeddingMethod(UnquantizedEmbeddingMethod):
    """Method of token embeddings, which may share the packed weight of a tied output layer."""

    supports_pre_processed_weights = False

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        return

    def embedding(self, layer: nn.Module, input_: Tensor) -> Tensor:
        shared = getattr(layer, "packed", None)
        return F.embedding(input_, layer.weight) if shared is None else shared.rows(input_)


class HeadMethod(UnquantizedEmbeddingMethod):
    """Method of an output layer. Embeddings that are tied to it look their rows up in its packed weight."""

    supports_pre_processed_weights = False

    def __init__(self, embeddings: VocabParallelEmbedding) -> None:
        self.embeddings = embeddings

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        weight, embeddings = layer.weight.data, self.embeddings
        tied = weight.data_ptr() == embeddings.weight.data_ptr()
        layer.packed = make_linear(weight)
        if not tied:
            _drop_weight(layer)
        elif embeddings.tp_size == 1 and isinstance(layer.packed, PanelLinear):
            # Several ranks look up in the plain weight, which vLLM reads itself.
            embeddings.packed = layer.packed
            _drop_weight(layer)
            _drop_weight(embeddings)

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        y = layer.packed(x)
        return y if bias is None else y + bias


def _drop_weight(layer: nn.Module) -> None:
    layer.weight = nn.Parameter(layer.weight.new_empty(0), requires_grad=False)


class FinalNorm(RMSNorm):
    """Norm of what the last layer returns."""

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Any:
        assert residual is not None
        total, y = kernels.add_rms_norm(residual, x, self.weight, self.variance_epsilon)
        return y, total


def prepare_layer(layer: nn.Module) -> None:
    """Give the modules of a decoder layer of vLLM's the methods that pack their weights."""
    attention, mlp = layer.self_attn, layer.mlp
    for linear in (attention.qkv_proj, attention.o_proj, mlp.down_proj):
        _set_method(linear, PackedMethod())
    _set_method(mlp.gate_up_proj, PackedMethod(gated=True))
    if attention.dms_proj_alpha is not None:
        _set_method(attention.dms_proj_alpha, PlainMethod())


def _set_method(linear: LinearBase, method: UnquantizedLinearMethod) -> None:
    assert type(linear.quant_method) is UnquantizedLinearMethod, type(linear.quant_method)
    linear.quant_method = method


def prepare_ends(model: nn.Module) -> None:
    """Do as :func:`prepare_layer` for what lies before and behind the layers of vLLM's Llama."""
    inner = model.model
    inner.norm = FinalNorm(inner.config.hidden_size, eps=inner.config.rms_norm_eps)
    inner.embed_tokens.quant_method = EmbeddingMethod()
    model.lm_head.quant_method = HeadMethod(inner.embed_tokens)


def make_decoder(info: ModelInfo, modules: list[nn.Module]) -> Decoder:
    """The layers of a model whose weights vLLM has loaded into ``modules``, its decoder layers."""
    ranks, c = get_tensor_model_parallel_world_size(), info.model
    return Decoder(
        [_layer(module) for module in modules],
        c.num_attention_heads // ranks,
        c.kv_heads // ranks,
        c.head_dim,
        c.norm_epsilon,
        tensor_model_parallel_all_reduce if ranks > 1 else None,
    )


def _layer(module: nn.Module) -> Layer:
    attention, mlp = module.self_attn, module.mlp
    adapter = attention.dms_proj_alpha
    return Layer(
        input_norm=module.input_layernorm.weight.data,
        qkv=attention.qkv_proj.packed,
        q_norm=attention.q_norm and attention.q_norm.weight.data,
        k_norm=attention.k_norm and attention.k_norm.weight.data,
        adapter=adapter and Adapter(attention.dms_proj_alpha_norm.weight.data, adapter.weight.data),
        out=attention.o_proj.packed,
        mlp_norm=module.post_attention_layernorm.weight.data,
        gate_up=mlp.gate_up_proj.packed,
        down=mlp.down_proj.packed,
    )
