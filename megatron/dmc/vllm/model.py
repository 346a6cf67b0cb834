"""vLLM's Llama with compressed attention, which also runs Mistral, Qwen 2 and Qwen 3.

One object stands for the cache of all layers, as one attention layer: vLLM allocates its memory, and knows of no other
cache. Projections, norms, MLP and weights are vLLM's own, or this package's where these are faster (``layers.py``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from vllm.model_executor.models.llama import LlamaDecoderLayer, LlamaForCausalLM
from vllm.model_executor.models.utils import extract_layer_index
from vllm.transformers_utils.repo_utils import get_hf_file_to_dict
from vllm.utils.torch_utils import direct_register_custom_op
from vllm.v1.attention.backend import AttentionBackend, AttentionMetadataBuilder, CommonAttentionMetadata
from vllm.v1.kv_cache_interface import KVCacheLayout

from megatron.dmc.inference.attention import CompressedAttention
from megatron.dmc.inference.decoder import Decoder
from megatron.dmc.inference.recent_pages import Window
from megatron.dmc.inference.weights import ModelInfo, describe
from megatron.dmc.kernels.state import DTYPES
from megatron.dmc.vllm.cache import CompressedSpec
from megatron.dmc.vllm.config import LAYER_OPERATOR, OPERATOR, page_size, snapshot_rows
from megatron.dmc.vllm.grants import Grants
from megatron.dmc.vllm.layers import make_decoder, own_layers, prepare_ends, prepare_layer
from megatron.dmc.vllm.rows import Rows, steps_late

REPORT_EVERY = 8
"""Decoding steps from one report of lengths to the next. A report took 0.3 ms of a step of 27."""
POOL = "dmc_cache.0"
"""Name of the one attention layer. vLLM wants exactly one number in it."""


def model_info(vllm_config: VllmConfig) -> ModelInfo:
    """Configuration of the model that vLLM serves. Raises ``ValueError`` for one that this plugin cannot serve."""
    served = vllm_config.model_config
    config = get_hf_file_to_dict("config.json", served.model, served.revision)
    info = describe(Path(served.model), config, served.dtype)
    info.check_served()
    return info


@dataclass
class Step:
    """Attention metadata of a step, see :class:`megatron.dmc.inference.attention.Step`."""

    positions: Tensor
    cu_seqlens: Tensor
    blocks: Tensor
    """int64 [n], first block of each sequence."""
    decoding: int
    count: int
    """Tokens of the step; vLLM may pad its tensors beyond them."""
    rows: Tensor | None = None
    """Set by the first layer: vLLM may build a step before the connector has given rows to what begins with it."""


class StepBuilder(AttentionMetadataBuilder[Step]):
    """Builder of :class:`Step` from what vLLM knows of a batch."""

    reorder_batch_threshold = 1  # sequences with one token come first

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: VllmConfig, device: Any) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)  # abstract in vLLM

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> Step:
        batch = common_attn_metadata
        n, total = batch.num_reqs, batch.num_actual_tokens
        cu_seqlens = batch.query_start_loc[: n + 1].to(torch.int32)
        if batch.max_query_len == 1:
            decoding, positions = n, batch.seq_lens[:n].to(torch.int32) - 1
        else:
            more = (batch.query_start_loc_cpu[: n + 1].diff() != 1).nonzero()
            decoding = int(more[0]) if len(more) else n
            counts = cu_seqlens.diff()
            first = batch.seq_lens[:n] - counts  # position of each sequence's first token in the step
            shift = torch.repeat_interleave(first - cu_seqlens[:-1], counts, output_size=total)
            positions = torch.arange(total, dtype=torch.int32, device=shift.device).add_(shift)
        return Step(
            positions=positions,
            cu_seqlens=cu_seqlens,
            blocks=batch.block_table_tensor[:n, 0].long(),
            decoding=decoding,
            count=total,
        )


class Backend(AttentionBackend):
    """What vLLM asks of an attention backend. It has no implementation to give: attention is an operator of its own."""

    supported_dtypes = list(DTYPES)

    @staticmethod
    def get_name() -> str:
        return "MEGATRON_DMC"

    @staticmethod
    def get_impl_cls() -> Any:
        raise NotImplementedError("compressed attention is called as torch.ops.vllm.dmc_attention")

    @staticmethod
    def get_builder_cls() -> type[StepBuilder]:
        return StepBuilder

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        return (KVCacheLayout.LBHNC,)


class Pool(AttentionLayerBase):
    """The cache of all layers of a rank; to vLLM it is one attention layer."""

    impl = None

    def __init__(self, vllm_config: VllmConfig) -> None:
        self.info = model_info(vllm_config)
        c, parallel, scheduling = self.info.model, vllm_config.parallel_config, vllm_config.scheduler_config
        self.dtype, self.device = vllm_config.model_config.dtype, vllm_config.device_config.device
        self.heads = c.kv_heads // parallel.tensor_parallel_size
        self.attention = CompressedAttention(self.info, self.device)
        self.own_layers = own_layers(vllm_config)
        self.modules: list[nn.Module] = []
        """vLLM's decoder layers, where ``own_layers``."""
        self.rows = Rows(
            scheduling.max_num_seqs + snapshot_rows(vllm_config),
            page_size(vllm_config),
            num_layers=c.num_layers,
            num_kv_heads=self.heads,
            head_dim=c.head_dim,
            max_slots=vllm_config.model_config.max_model_len,
            dtype=self.dtype,
            **self.attention.method.state_options(),
        )
        vllm_config.compilation_config.static_forward_context[POOL] = self

    def get_attn_backend(self) -> type[Backend]:
        return Backend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> CompressedSpec:
        overlapping = vllm_config.max_concurrent_batches + steps_late(self.device)
        heads, slots = self.rows.heads, page_size(vllm_config)
        cr, window = max(1.0, self.info.expected_cr), Window(self.rows.shape.get("evict_window", 0), slots)
        return CompressedSpec(
            block_size=slots * math.floor(cr),
            tokens_per_state=math.floor(cr),
            num_kv_heads=heads,
            head_size=self.info.model.head_dim,
            dtype=self.dtype,
            dcp_sharded=False,
            grants=Grants(heads, window, cr, vllm_config.scheduler_config.max_num_batched_tokens * overlapping),
            layout=self.rows.layout,
            snapshots=snapshot_rows(vllm_config),
            report_every=1 if overlapping > 1 else REPORT_EVERY,
        )

    def bind_kv_cache(self, kv_cache: Tensor) -> None:
        """Take the memory that vLLM allocated."""
        self.kv_cache = kv_cache
        size = kv_cache.numel() * kv_cache.element_size()
        storage = kv_cache.untyped_storage()
        buffer = torch.empty(0, dtype=torch.uint8, device=kv_cache.device).set_(storage)
        start = kv_cache.storage_offset() * kv_cache.element_size()
        self.rows.bind(buffer[start : start + size])

    @cached_property
    def decoder(self) -> Decoder:
        """This package's layers, of the weights that vLLM has loaded by now."""
        return make_decoder(self.info, self.modules)


def pool_of(vllm_config: VllmConfig) -> Pool:
    """The cache of the model that a process has built."""
    return vllm_config.compilation_config.static_forward_context[POOL]


def attend(q: Tensor, k: Tensor, v: Tensor, decisions: Tensor | None, layer: int) -> Tensor:
    """Compressed attention of one layer, see :class:`megatron.dmc.inference.attention.CompressedAttention`. Tokens
    beyond those of the step are padding. In a run without a step, which vLLM has for profiling, the result is 0.
    """
    context = get_forward_context()
    if context.attn_metadata is None:
        return torch.zeros_like(q)
    step, pool = context.attn_metadata[POOL], context.no_compile_layers[POOL]
    if step.rows is None:
        step.rows = pool.rows.row_of_block[step.blocks]
    t = step.count
    decided = None if decisions is None else decisions[:t]
    out = pool.attention(pool.rows.state, layer, q[:t], k[:t], v[:t], step, decided)
    return out if t == q.size(0) else torch.cat((out, q.new_zeros(q.size(0) - t, *q.shape[1:])))


def _attend_fake(q: Tensor, k: Tensor, v: Tensor, decisions: Tensor | None, layer: int) -> Tensor:
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)


direct_register_custom_op(OPERATOR.partition("::")[2], attend, fake_impl=_attend_fake)


def step_layer(x: Tensor, qkv: Tensor | None, layer: int, outputs: int) -> tuple[Tensor, Tensor]:
    """One of this package's layers, see :meth:`megatron.dmc.inference.decoder.Decoder.step`.

    Args:
        qkv: None for the first layer.
        outputs: columns of the second result.
    """
    decoder = get_forward_context().no_compile_layers[POOL].decoder
    return decoder.step(layer, x, decoder.begin(x) if qkv is None else qkv, attend)


def _step_layer_fake(x: Tensor, qkv: Tensor | None, layer: int, outputs: int) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(x.size(0), outputs)


direct_register_custom_op(LAYER_OPERATOR.partition("::")[2], step_layer, fake_impl=_step_layer_fake)


class Attention(nn.Module):
    """Projections around compressed attention, with Qwen 2's biases, Qwen 3's norms and DMS's adapter where the model
    has them.
    """

    def __init__(
        self, config: Any, hidden_size: int, num_heads: int, num_kv_heads: int, prefix: str, **kwargs: Any
    ) -> None:
        super().__init__()
        info, quantization = pool_of(get_current_vllm_config()).info, kwargs.get("quant_config")
        c = info.model
        ranks = get_tensor_model_parallel_world_size()
        self.layer, self.head_dim = extract_layer_index(prefix), c.head_dim
        self.heads, self.kv_heads = num_heads // ranks, num_kv_heads // ranks
        self.qkv_proj = QKVParallelLinear(
            hidden_size,
            c.head_dim,
            num_heads,
            num_kv_heads,
            bias=c.add_qkv_bias,
            quant_config=quantization,
            prefix=f"{prefix}.qkv_proj",
        )
        self.o_proj = RowParallelLinear(
            num_heads * c.head_dim, hidden_size, bias=False, quant_config=quantization, prefix=f"{prefix}.o_proj"
        )
        self.q_norm = self.k_norm = None
        if c.qk_layernorm:
            self.q_norm, self.k_norm = (RMSNorm(c.head_dim, eps=c.norm_epsilon) for _ in range(2))
        self.dms_proj_alpha = self.dms_proj_alpha_norm = None
        if info.dmc is not None and info.dmc.decision_source == "adapter":
            name = f"{prefix}.dms_proj_alpha"
            self.dms_proj_alpha_norm = RMSNorm(hidden_size, eps=c.norm_epsilon)
            if info.dmc.decision_per == "layer":
                self.dms_proj_alpha = ReplicatedLinear(hidden_size, 1, bias=False, prefix=name)
            else:
                self.dms_proj_alpha = ColumnParallelLinear(hidden_size, num_kv_heads, bias=False, prefix=name)

    def forward(self, positions: Tensor, hidden_states: Tensor, residual: Tensor) -> Tensor:
        """``residual``: the hidden states before the layer's input norm, which an adapter decides by."""
        qkv, _ = self.qkv_proj(hidden_states)
        qkv = qkv.view(qkv.size(0), -1, self.head_dim)
        q, k, v = qkv.split((self.heads, self.kv_heads, self.kv_heads), dim=1)
        if self.q_norm is not None and self.k_norm is not None:  # the neuron is read after the norm
            q, k = self.q_norm(q.contiguous()), self.k_norm(k.contiguous())
        decisions = None
        if self.dms_proj_alpha is not None and self.dms_proj_alpha_norm is not None:
            decisions, _ = self.dms_proj_alpha(self.dms_proj_alpha_norm(residual))
        mixed = torch.ops.vllm.dmc_attention(q, k, v, decisions, self.layer)
        out, _ = self.o_proj(mixed.flatten(1))
        return out


class DecoderLayer(LlamaDecoderLayer):
    """Llama's layer with compressed attention."""

    def __init__(self, vllm_config: VllmConfig, prefix: str = "", config: Any = None) -> None:
        super().__init__(vllm_config, prefix=prefix, config=config, attn_layer_type=Attention)
        pool = pool_of(vllm_config)
        self.layer, self.own = extract_layer_index(prefix), pool.own_layers
        if self.own:
            prepare_layer(self)
            pool.modules.append(self)
            last = self.layer + 1 == pool.info.model.num_layers
            qkv = (self.self_attn.heads + 2 * self.self_attn.kv_heads) * self.self_attn.head_dim
            self.outputs = self.hidden_size if last else qkv

    def forward(self, positions: Tensor, hidden_states: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """As Llama's, but that attention is given the residual stream too. This package's layers hand each other
        queries, keys and values in the place of ``hidden_states``.
        """
        if self.own:
            x, qkv = (hidden_states, None) if residual is None else (residual, hidden_states)
            run = torch.ops.vllm.dmc_layer if torch.compiler.is_compiling() else step_layer
            residual, hidden_states = run(x, qkv, self.layer, self.outputs)
            return hidden_states, residual
        if residual is None:
            residual, hidden_states = hidden_states, self.input_layernorm(hidden_states)
        else:
            hidden_states, residual = self.input_layernorm(hidden_states, residual)
        hidden_states = self.self_attn(positions, hidden_states, residual)
        hidden_states, residual = self.post_attention_layernorm(hidden_states, residual)
        return self.mlp(hidden_states), residual


class DMCForCausalLM(LlamaForCausalLM):
    """A model that ``dmc convert export`` wrote."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        pool = Pool(vllm_config)
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=DecoderLayer)
        if pool.own_layers:
            prepare_ends(self)
