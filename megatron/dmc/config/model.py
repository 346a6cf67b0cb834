"""Sections ``model`` and ``dmc``: what is part of a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Optional

from megatron.dmc.config.checks import not_negative, one_of, positive, require
from megatron.dmc.config.rope import check_rope_scaling


@dataclass
class DMCConfig:
    """Dynamic Memory Compression (arXiv 2403.09636): what is part of the model, at training and at inference."""

    method: Literal["dmc", "dms"] = "dmc"
    """Compression method. dmc: a marked token is merged into the slot before it. dms: Dynamic Memory Sparsification
    (arXiv 2506.05345), to compare with: a marked token is evicted --window tokens later. The engine serves dmc."""
    decision_bias: float = 5.0
    """Decision bias b, in logits: a token merges when its decision logit, key[D-1] - b, is positive. Must match the
    checkpoint's."""
    window: Optional[int] = 12
    """Window W, in tokens. dmc: newest tokens of a segment that its slot averages over; none: the whole segment. dms:
    tokens from a mark to the eviction (256 in the paper)."""
    temperature: float = 0.1
    """Temperature of the Gumbel-sigmoid relaxation of decisions in training."""
    importance_epsilon: float = 2.0**-7
    """Constant that is added to every importance weight, so that a pooled slot never divides by zero."""
    loss_weight: float = 1.0
    """Weight of the compression loss beside the token-mean language-model loss."""

    def check(self) -> None:
        one_of(self, "method", "dmc", "dms")
        dms_window = self.method == "dmc" or self.window is not None
        require(dms_window, "method dms needs a window: tokens from a mark to the eviction")
        fits = self.window is None or self.window >= 1
        require(fits, f"window is {self.window}; use at least 1, or null for no window")
        positive(self, "temperature", "importance_epsilon")
        not_negative(self, "loss_weight")


@dataclass
class ModelConfig:
    """A Llama-family decoder: RMSNorm, SwiGLU, RoPE, grouped-query attention. Names are Megatron's."""

    num_layers: int = 32
    """Number of transformer layers."""
    hidden_size: int = 4096
    """Width of the residual stream."""
    ffn_hidden_size: int = 11008
    """Width of the MLP's hidden layer."""
    num_attention_heads: int = 32
    """Number of query heads."""
    num_query_groups: Optional[int] = None
    """Number of KV heads. Default: as many as attention heads (no GQA)."""
    kv_channels: Optional[int] = None
    """Head dimension D. Default: hidden_size / num_attention_heads."""
    vocab_size: int = 32000
    """Tokens in the vocabulary: rows of the embedding before padding."""
    make_vocab_size_divisible_by: int = 128
    """Multiple that the embedding's rows are padded to, in every layout, so that checkpoints fit every layout."""
    max_position_embeddings: int = 4096
    """Context length of the model, in tokens."""
    rotary_base: float = 10000.0
    """Base of the rotary embedding's frequencies (theta)."""
    rope_scaling: Optional[dict] = None
    """Scaling of rotary frequencies, as JSON with Hugging Face's keys. Llama 3.1's: {"rope_type": "llama3", "factor":
    ..., "low_freq_factor": ..., "high_freq_factor": ..., "original_max_position_embeddings": ...}. YaRN's (arXiv
    2309.00071): {"rope_type": "yarn", "factor": ..., "original_max_position_embeddings": ...} and, optional,
    attention_factor, beta_fast, beta_slow, mscale, mscale_all_dim and truncate. Default: no scaling."""
    norm_epsilon: float = 1e-5
    """Epsilon of RMSNorm."""
    add_qkv_bias: bool = False
    """Bias on the QKV projection (Qwen 2)."""
    qk_layernorm: bool = False
    """RMSNorm on every query and key head (Qwen 3)."""
    untie_embeddings_and_output_weights: bool = True
    """Separate weights for the embedding and the output layer."""
    init_method_std: float = 0.02
    """Standard deviation of the initial weights; output projections divide it by sqrt(2 * num_layers)."""

    @property
    def head_dim(self) -> int:
        return self.kv_channels or self.hidden_size // self.num_attention_heads

    @property
    def kv_heads(self) -> int:
        return self.num_query_groups or self.num_attention_heads

    @property
    def padded_vocab_size(self) -> int:
        n = self.make_vocab_size_divisible_by
        return (self.vocab_size + n - 1) // n * n

    def check(self) -> None:
        positive(self, "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "vocab_size")
        positive(self, "max_position_embeddings", "make_vocab_size_divisible_by", "rotary_base", "norm_epsilon")
        positive(self, "num_query_groups", "kv_channels")
        heads = self.num_attention_heads
        require(
            self.kv_channels is not None or self.hidden_size % heads == 0,
            f"hidden_size {self.hidden_size} is not divisible by num_attention_heads {heads}; "
            "set kv_channels to the head dimension",
        )
        require(
            heads % self.kv_heads == 0,
            f"num_attention_heads {heads} is not divisible by num_query_groups {self.kv_heads}",
        )
        require(self.head_dim % 8 == 0, f"head dimension {self.head_dim} is not a multiple of 8; set kv_channels")
        if self.rope_scaling is not None:
            check_rope_scaling(self.rope_scaling, self.rotary_base, self.max_position_embeddings)
