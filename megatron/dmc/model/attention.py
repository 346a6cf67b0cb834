"""DMC self-attention as a drop-in for Megatron's ``SelfAttention``."""

from dataclasses import dataclass, field
from functools import partial
from typing import Any, Optional, Protocol

import torch
from megatron.core import tensor_parallel
from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import _yarn_get_concentration_factor_from_config
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron.dmc import ops
from megatron.dmc.config import DMCConfig
from megatron.dmc.model.adapter import DecisionProjection
from megatron.dmc.model.norm import RMSNorm
from megatron.dmc.model.supported import check_supported
from megatron.dmc.ops.attention import mask_channel, mask_unit


class MaskWatcher(Protocol):
    """What takes note of masks and their gradients while adapters are calibrated."""

    def watch(self, layer: int, x: Tensor, mask: Tensor) -> None:
        """Take note of one layer's part of a micro-batch: what its adapter's linear layer reads, [s, b, h], and the
        column mask of its attention, fp32 [b, KV heads of this rank, s], which the gradient may be asked of."""


@dataclass(frozen=True)
class SharedPrefix:
    """First tokens of a micro-batch that a frozen model computes once, with compression off, for its pass with
    compression too: until something has left the window, both are the same and there is no gradient.
    """

    tokens: int
    """At most window + 1."""
    layers: dict[int, tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict)
    """By layer number: the layer's input [tokens, b, h], keys and values [tokens, b, KV heads of this rank, D], before
    RoPE."""


@dataclass(frozen=True)
class DMCStep:
    """State of the step and the micro-batch that an attention layer runs in.

    It reaches every layer as the decoder's ``attention_bias`` argument (DMC *is* an additive attention bias), so
    the forward pass, its recomputation and the backward pass of a micro-batch see the same one however the pipeline
    schedule interleaves them. Nothing is global.
    """

    compress: bool = True
    """True: merge or evict tokens. False: plain attention, with the decision neuron scaled by ``neuron_scale``."""
    neuron_scale: float = 1.0
    """Factor on channel D-1 of the heads that ``DMCConfig.neuron`` names, as they leave the projection and after RoPE,
    when not compressing: 1 plain, 0 neuron out."""
    sample_ids: Optional[Tensor] = None
    """Global index of each sequence, int64 [b], a key of the noise. None: hard decisions, no noise (evaluation)."""
    seed: int = 0
    step: int = 0
    """Optimizer step, a key of the noise."""
    calibration: Optional[MaskWatcher] = None
    """Evict nothing, and show this the masks with which tokens would be evicted."""
    prefix: Optional[SharedPrefix] = None
    """With compression off, the layers fill it in; else it precedes the tokens of the forward pass."""
    layer_input: Optional[Tensor] = None
    """Hidden state before the layer's input norm, [s, b, h] (s / tp under sequence parallelism), which adapters read.
    The layer puts it here for its attention."""
    kept: dict[int, Tensor] = field(default_factory=dict)
    """Tokens not marked by hard decisions (``ops.kept_slots``), which the layers fill in: layer number -> int64
    [b, KV heads of this rank]."""
    held: dict[int, Tensor] = field(default_factory=dict)
    """Slots that a cache holds after the last token, filled in like ``kept`` when there is no noise. Under DMS the
    marked tokens of the window are among them."""


class DMCSelfAttention(SelfAttention):
    """Self-attention whose KV heads merge tokens into their last slot (arXiv 2403.09636), or evict them
    (``DMCConfig.method``).

    Takes and returns [s, b, h] like ``SelfAttention``; weights, their names and their sharding are the same, and an
    adapter's come in addition. After each compressing forward, ``kept_count`` holds the slots kept by this rank's
    heads: fp64 [b], differentiable (straight-through).
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: SelfAttentionSubmodules,
        layer_number: int,
        attn_mask_type: AttnMaskType = AttnMaskType.causal,
        *,
        dmc: DMCConfig,
        rotary_factor: Optional[float] = None,
        **kwargs,
    ) -> None:
        super().__init__(config, submodules, layer_number, attn_mask_type, **kwargs)
        check_supported(config)
        self.dmc = dmc
        self.rotary_factor = (
            _yarn_get_concentration_factor_from_config(config) if rotary_factor is None else rotary_factor
        )
        """Factor on the cosines and sines: YaRN's, else 1."""
        self.kept_count: Optional[Tensor] = None
        rank = self.tp_group.rank() if self.tp_group is not None else 0
        n = self.num_query_groups_per_partition
        self.kv_head_range = range(rank * n, (rank + 1) * n)
        """Global indices of this rank's KV heads."""
        if dmc.decision_source == "adapter":
            heads = 1 if dmc.decision_per == "layer" else config.num_query_groups
            self.dms_proj_alpha_norm = RMSNorm(config, config.hidden_size, config.layernorm_epsilon)
            self.dms_proj_alpha = DecisionProjection(config, heads, self.tp_group)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Optional[Tensor] = None,
        *,
        rotary_pos_emb: Optional[Tensor] = None,
        attention_bias: Optional[DMCStep] = None,
        **others: Any,
    ) -> tuple[Tensor, Optional[Tensor]]:
        """hidden_states [s, b, h] (s / tp under sequence parallelism) -> (output [s, b, h], bias).

        ``attention_bias`` takes the :class:`DMCStep`; in eval mode it may be left out (hard decisions). The attention
        mask is always causal: leave it out, since comparing a given one with it takes s^2 bytes and waits for the GPU
        in every layer. ``rotary_pos_emb``: frequencies [>= s, 1, 1, D] as Megatron's ``RotaryEmbedding`` gives.
        Megatron's other arguments serve packed sequences and its inference; any that is not None is refused.

        Raises:
            ValueError: an argument that asks for what DMC attention does not compute, by name.
        """
        if given := [name for name, value in others.items() if value is not None]:
            raise ValueError(
                f"DMC attention does not support {', '.join(given)}: it trains and evaluates whole sequences; use "
                "megatron.dmc.inference to decode, and unpacked sequences to train"
            )
        if attention_bias is not None and not isinstance(attention_bias, DMCStep):
            raise ValueError(
                f"attention_bias is a {type(attention_bias).__name__}; DMC attention takes a DMCStep there, and adds "
                "no other bias"
            )
        if attention_mask is not None:
            _check_causal(attention_mask)
        if attention_bias is None and self.training:
            raise ValueError(
                "DMC attention in training needs a DMCStep: pass extra_block_kwargs="
                "{'attention_bias': DMCStep(...)} to the model, or use DMCGPTModel"
            )
        step = DMCStep() if attention_bias is None else attention_bias
        if isinstance(rotary_pos_emb, tuple):
            rotary_pos_emb = rotary_pos_emb[0]
        if rotary_pos_emb is None or rotary_pos_emb.size(-1) != self.hidden_size_per_attention_head:
            raise ValueError(
                "DMC attention needs rotary embeddings of all "
                f"{self.hidden_size_per_attention_head} channels of a head: position_embedding_type rope, "
                "rotary_percent 1"
            )
        if rotary_pos_emb.size(1) != 1:
            raise ValueError(
                f"rotary_pos_emb has angles of its own for each of {rotary_pos_emb.size(1)} sequences (mrope); DMC "
                "attention rotates all sequences alike: position_embedding_type rope or yarn"
            )
        query, key, value = self._project(hidden_states, step)
        adapted = None
        if step.compress and self.dmc.decision_source == "adapter":
            adapted = self._adapted(step.layer_input)
        if step.prefix is not None and step.compress:
            x, *before = step.prefix.layers[self.layer_number]
            key, value, adapted = map(torch.cat, zip((*before, self._adapted(x)), (key, value, adapted), strict=True))
        elif step.prefix is not None:
            found = (x[: step.prefix.tokens].clone() for x in (step.layer_input, key, value))
            step.prefix.layers[self.layer_number] = tuple(found)
        # The model may have made frequencies for more rows than there are tokens (the carried row).
        angles = rotary_pos_emb[: key.size(0), 0, 0, : self.hidden_size_per_attention_head // 2]
        attend = partial(self._attend, step, angles)
        if self.checkpoint_core_attention and self.training:
            context, self.kept_count = tensor_parallel.checkpoint(attend, False, query, key, value, adapted)
        else:
            context, self.kept_count = attend(query, key, value, adapted)
        return self.linear_proj(context)

    def _adapted(self, layer_input: Optional[Tensor]) -> Tensor:
        """Outputs of the adapter for this rank's KV heads: [s, b, ng], or [s, b, 1] for the layer."""
        if layer_input is None:
            raise ValueError(
                "decision_source adapter reads the layer's input, which DMCStep.layer_input lacks; use the spec's "
                "DMCTransformerLayer around this attention"
            )
        adapted = self.dms_proj_alpha(self.dms_proj_alpha_norm(layer_input))
        own = (
            slice(None)
            if self.dmc.decision_per == "layer"
            else slice(self.kv_head_range.start, self.kv_head_range.stop)
        )
        return adapted[..., own]

    def _project(self, hidden_states: Tensor, step: DMCStep) -> tuple[Tensor, Tensor, Tensor]:
        """hidden_states [s, b, h] -> query [s, b, np, D], key, value [s, b, ng, D], before RoPE."""
        # mixed: [s, b, ng, (g + 2) * D], before the norms of q and k
        mixed, sizes = self.get_query_key_value_tensors(hidden_states, split_qkv=False)
        query, key, value = mixed.split(sizes, dim=-1)
        query = query.reshape(*query.shape[:2], -1, self.hidden_size_per_attention_head)
        if not step.compress:
            # Before the norms: zero_out ends with zeros in the projection, so the channel leaves the root mean square
            # of the others too. Faded after the norms it would leave that one at once, at the end.
            query, key = self._scale_neuron(query, key, step.neuron_scale)
        if self.q_layernorm is not None and self.k_layernorm is not None:
            query, key = self.q_layernorm(query), self.k_layernorm(key)
        return query, key, value

    def _attend(
        self, step: DMCStep, angles: Tensor, query: Tensor, key: Tensor, value: Tensor, adapted: Optional[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """query [rows, b, np, D], key, value [s, b, ng, D] -> (context [rows, b, np * D], kept fp64 [b]).

        The queries are those of the last tokens. adapted: outputs of the adapter, [s, b, ng] or [s, b, 1].
        """
        # [s, b, heads, D] -> [b, heads, s, D]
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        cos, sin = angles.cos() * self.rotary_factor, angles.sin() * self.rotary_factor
        if step.calibration is not None:
            kept = torch.full((q.size(0),), float(k.size(1) * k.size(2)), dtype=torch.float64, device=q.device)
            out = self._watched_attention(step, adapted, q, k, v, cos, sin)
        elif step.compress:
            decisions = self._decide(step, q, k, adapted)
            slots = ops.kept_slots(decisions)
            step.kept[self.layer_number] = slots.detach().long()
            if step.sample_ids is None:
                step.held[self.layer_number] = self._held(decisions, slots)
            kept = slots.double().sum(dim=-1)
            attend = self._evicting_attention if self.dmc.evicts else self._merging_attention
            out = attend(decisions, q, k, v, cos, sin)
        else:
            kept = torch.zeros(q.size(0), dtype=torch.float64, device=q.device)
            q, k = ops.rotate(q, cos, sin), ops.rotate(k, cos, sin)
            # A rotation refills the channel from its partner.
            out = ops.flash_attention(*self._scale_neuron(q, k, step.neuron_scale, heads=1), v)
        # [b, np, s, D] -> [s, b, np * D]
        return out.permute(2, 0, 1, 3).reshape(query.size(0), query.size(1), -1), kept

    def _decide(self, step: DMCStep, q: Tensor, k: Tensor, adapted: Optional[Tensor]) -> ops.Decisions:
        """Decisions of this rank's KV heads from what ``decision_source`` names: [b, heads, s, D] before RoPE."""
        dmc, heads = self.dmc, self.kv_head_range
        if adapted is not None:
            x = adapted.permute(1, 2, 0)  # [s, b, heads] -> [b, heads, s]
            heads = heads if dmc.decision_per == "head" else range(1)
        else:
            x = (k if dmc.decision_source == "key" else q[:, :: q.size(1) // k.size(1)])[..., -1]
        logits, noise = ops.decision_logits(x, dmc.decision_bias, dmc.decision_scale), None
        if step.sample_ids is not None:
            keys = dict(seed=step.seed, step=step.step, layer=self.layer_number)
            noise = ops.logistic_noise(step.sample_ids, heads, k.size(2), **keys).expand(-1, k.size(1), -1)
        logits = logits.expand(-1, k.size(1), -1)
        return ops.make_decisions(logits, dmc.temperature, noise, dmc.decision_about == "self")

    def _held(self, decisions: ops.Decisions, slots: Tensor) -> Tensor:
        """Slots that a cache holds after the last token: int64 [b, heads]; slots: ``ops.kept_slots``."""
        if not self.dmc.evicts:
            return slots.detach().long()
        return ops.held_slots(decisions.merge, self.dmc.window, self.dmc.decision_about == "self")

    def _merging_attention(
        self, decisions: ops.Decisions, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor
    ) -> Tensor:
        """Pool keys and values by the decisions and attend to the slots: [b, heads, s, D] each."""
        dmc, d = self.dmc, q.size(-1)
        q, q_neuron = ops.rotate_and_split_neuron(q, cos, sin, mask_channel(d))
        omega = ops.importance(q_neuron, k.size(1), dmc.decision_bias, dmc.importance_epsilon)
        k, v = ops.pool(k, v, decisions.alpha, omega, dmc.window)
        k, _ = ops.rotate_and_split_neuron(k, cos, sin, decisions.log_keep.to(k.dtype) * mask_unit(d))
        return ops.dmc_attention(q, k, v)

    def _evicting_attention(
        self, decisions: ops.Decisions, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor
    ) -> Tensor:
        """Attend to the window, and beyond it to what is not marked: [b, heads, s, D] each."""
        d, window, mask = q.size(-1), self.dmc.window, decisions.log_keep
        if self.dmc.neuron == "all":
            q, _ = ops.rotate_and_split_neuron(q, cos, sin, mask_channel(d))
            k, _ = ops.rotate_and_split_neuron(k, cos, sin, mask.to(k.dtype) * mask_unit(d))
            return ops.evicting_attention(q, k, v, window)
        q, _ = self._scale_neuron(q, k, 0.0, heads=1)
        first = k.size(2) - q.size(2)
        q, k = ops.rotate(q, cos[first:], sin[first:]), ops.rotate(k, cos, sin)
        q, _ = self._scale_neuron(q, k, 0.0, heads=1)
        return ops.evicting_attention(q, k, v, window, mask)

    def _watched_attention(
        self, step: DMCStep, adapted: Optional[Tensor], q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor
    ) -> Tensor:
        """Attend to everything, through a mask of zeros that ``step.calibration`` watches: [b, heads, s, D] each."""
        assert adapted is not None and step.calibration is not None and step.layer_input is not None
        with torch.no_grad():
            x = self.dms_proj_alpha.gather(self.dms_proj_alpha_norm(step.layer_input))
        # The adapter is part of the graph, with no weight: Megatron's wrappers wait for a gradient of each parameter.
        mask = ops.decision_logits(adapted.permute(1, 2, 0), 0.0, 0.0).expand(-1, k.size(1), -1)
        step.calibration.watch(self.layer_number, x, mask)
        q, k = ops.rotate(q, cos, sin), ops.rotate(k, cos, sin)
        return ops.evicting_attention(q, k, v, self.dmc.window, mask)

    def _scale_neuron(self, q: Tensor, k: Tensor, scale: float, heads: int = -2) -> tuple[Tensor, Tensor]:
        """Scale channel D-1 of the heads that ``DMCConfig.neuron`` names. heads: the axis of heads in q and k."""
        if scale == 1.0 or self.dmc.neuron == "none":
            return q, k
        every = slice(None, None, q.size(heads) // k.size(heads) if self.dmc.neuron == "query" else 1)
        q = q * _neuron_factor(q, scale, heads, every)
        return q, (k if self.dmc.neuron == "query" else k * _neuron_factor(k, scale, heads, every))

    @torch.no_grad()
    def zero_decision_neurons(self) -> None:
        """Set the QKV projection's rows (and bias) of channel D-1 of the heads that ``DMCConfig.neuron`` names to
        exactly 0: the end of zero_out."""
        ng = self.num_query_groups_per_partition
        g = self.num_attention_heads_per_partition // ng
        d = self.hidden_size_per_attention_head
        heads = {"all": g + 1, "query": 1, "none": 0}[self.dmc.neuron]
        for parameter in (self.linear_qkv.weight, self.linear_qkv.bias):
            if parameter is not None and parameter.numel():
                # [ng * (g + 2) * D, ...] -> [ng, g + 2, D, ...]: g queries, the key, the value
                parameter.data.view(ng, g + 2, d, -1)[:, :heads, d - 1] = 0


def _neuron_factor(x: Tensor, scale: float, heads: int, which: slice) -> Tensor:
    """Factors on x: ``scale`` for channel D-1 of the heads ``which``, else 1; heads: their axis in x."""
    shape = [1] * x.dim()
    shape[heads], shape[-1] = x.size(heads), x.size(-1)
    factor = torch.ones(shape[heads], shape[-1], dtype=x.dtype, device=x.device)
    factor[which, -1] = scale
    return factor.view(shape)


def _check_causal(mask: Tensor) -> None:
    """Raise ``ValueError`` for an attention mask that is not the causal one: [..., s, s], True where masked out."""
    s = mask.size(-1)
    if mask.dtype == torch.bool and mask.dim() >= 2 and mask.size(-2) == s:
        causal = torch.ones(s, s, dtype=torch.bool, device=mask.device).triu(1)
        if bool((mask == causal).all()):
            return
    raise ValueError(
        f"DMC attention got an attention_mask of shape {list(mask.shape)} that is not the causal one, such as one with "
        "the boundaries of documents or padding; it sees all tokens before: pass None, and documents one by one"
    )
