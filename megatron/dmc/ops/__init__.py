"""The mathematics of DMC in plain PyTorch, for CPU and CUDA, fp32, bf16 and (for finite differences) fp64.

Tensors are ``[b, h, s, d]``: batch, heads, sequence, head dimension. ``np`` counts query heads, ``ng`` KV heads (query
groups), ``g = np / ng``. Nothing here knows of Megatron, of ranks or of files.
"""

from megatron.dmc.ops.attention import attention_backend, dmc_attention, flash_attention
from megatron.dmc.ops.decisions import (
    Decisions,
    decision_logits,
    hard_decisions,
    importance,
    kept_slots,
    make_decisions,
)
from megatron.dmc.ops.eviction import evicting_attention, held_slots
from megatron.dmc.ops.noise import logistic_noise
from megatron.dmc.ops.oracle import EvictingOracleCache, OracleCache
from megatron.dmc.ops.pooling import pool
from megatron.dmc.ops.prefill import compress, prefill_attention
from megatron.dmc.ops.rotary import attention_factor, rotary_frequencies, rotate, rotate_and_split_neuron
