"""Sections ``model`` and ``dmc``: what is part of a checkpoint."""

from dataclasses import dataclass
from typing import Literal, Optional

from megatron.dmc.config.checks import not_negative, one_of, positive, require
from megatron.dmc.config.rope import check_rope_scaling


@dataclass
class DMCConfig:
    """How a model compresses its KV cache: what is part of the model, at training and at inference. Every field but
    the temperature and the loss weight must match the checkpoint's.
    """

    method: Literal["dmc", "dms"] = "dmc"
    """Compression method. dmc: Dynamic Memory Compression (arXiv 2403.09636), a marked token is merged into the slot
    before it. dms: Dynamic Memory Sparsification (arXiv 2506.05345), a marked token is evicted --window tokens later.
    """
    decision_source: Literal["key", "query", "adapter"] = "key"
    """Source of a KV head's decision x, from which the logit --decision-scale * x - --decision-bias is made. key:
    channel D-1 of the head's key, which no query and key use otherwise. query: channel D-1 of the first query head of
    its group, which that head does not use otherwise. adapter: a linear layer of its own, after an RMSNorm, on the
    hidden state before the layer's input norm; no channel is given up. dmc has key only."""
    decision_about: Literal["previous", "self"] = "previous"
    """Token that a decision is about: the one before the token that it is read from, or that token itself. Always
    previous for dmc."""
    decision_per: Literal["head", "layer"] = "head"
    """Whether every KV head decides, or all heads of a layer alike (adapter only)."""
    decision_scale: float = 1.0
    """Factor on the decision before the bias; NVIDIA's DMS checkpoints have 100. Always 1 for dmc."""
    decision_bias: float = 5.0
    """Decision bias b, in logits: a token is marked when its decision logit, --decision-scale * x - b, is positive."""
    window: Optional[int] = 12
    """Window W, in tokens. dmc: newest tokens of a segment that its slot averages over; none: the whole segment. dms:
    tokens from a mark to the eviction (256 in the paper)."""
    temperature: float = 0.1
    """Temperature of the Gumbel-sigmoid relaxation of decisions in training."""
    importance_epsilon: float = 2.0**-7
    """Constant that is added to every importance weight, so that a pooled slot never divides by zero."""
    loss_weight: float = 1.0
    """Weight of the compression loss beside the token-mean language-model loss."""

    @property
    def evicts(self) -> bool:
        """Whether marked tokens are evicted, rather than merged."""
        return self.method == "dms"

    @property
    def neuron(self) -> Literal["none", "all", "query"]:
        """Heads whose channel D-1 takes no part in attention: all query and key heads, the first query head of every
        group, or none.
        """
        return {"key": "all", "query": "query", "adapter": "none"}[self.decision_source]  # type: ignore[return-value]

    def check(self) -> None:
        one_of(self, "method", "dmc", "dms")
        one_of(self, "decision_source", "key", "query", "adapter")
        one_of(self, "decision_about", "previous", "self")
        one_of(self, "decision_per", "head", "layer")
        if self.method == "dmc":
            for name, value in (("source", "key"), ("about", "previous"), ("per", "head"), ("scale", 1.0)):
                got = getattr(self, f"decision_{name}")
                require(got == value, f"decision_{name} is {got}; method dmc has {value} only")
        elif self.decision_source != "adapter":
            require(
                self.decision_per == "head",
                f"decision_per is layer with decision_source {self.decision_source}; only an adapter decides per layer",
            )
        dms_window = self.method == "dmc" or self.window is not None
        require(dms_window, "method dms needs a window: tokens from a mark to the eviction")
        fits = self.window is None or self.window >= 1
        require(fits, f"window is {self.window}; use at least 1, or null for no window")
        positive(self, "temperature", "importance_epsilon", "decision_scale")
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
