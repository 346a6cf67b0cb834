"""Token-by-token decoding of a training checkpoint with the step-by-step oracles of the compressed cache.

Slow (Python loops over heads) and exact: tests compare teacher forcing with it. To serve a model, use
:mod:`megatron.dmc.inference`.
"""

from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.dmc.evaluation.load import Loaded
from megatron.dmc.ops import EvictingOracleCache, OracleCache, attention_factor


class ReferenceDecoder:
    """Decodes one sequence, token by token, through a local-spec model with one oracle's cache per layer:
    :class:`OracleCache` or, for DMS, :class:`EvictingOracleCache`.
    """

    def __init__(self, loaded: Loaded) -> None:
        if not loaded.compresses:
            raise ValueError(
                f"{loaded.path} is of stage {loaded.manifest.stage}, which does not compress; name a "
                "checkpoint of retrofit or finetune"
            )
        self.model, self.config = loaded.model, loaded.config
        self.caches = [self._cache() for _ in range(self.config.model.num_layers)]
        self.tokens = 0

    def _cache(self) -> OracleCache | EvictingOracleCache:
        m, dmc, inv_freq = self.config.model, self.config.dmc, self.model.rotary_pos_emb.inv_freq
        factor = attention_factor(m.rope_scaling)
        if dmc.evicts:
            decides = dict(about_self=dmc.decision_about == "self", neuron=dmc.neuron)
            return EvictingOracleCache(1, m.kv_heads, inv_freq, window=dmc.window, factor=factor, **decides)
        rule = dict(decision_bias=dmc.decision_bias, epsilon=dmc.importance_epsilon, window=dmc.window)
        return OracleCache(1, m.kv_heads, inv_freq, factor=factor, **rule)

    def lengths(self) -> Tensor:
        """Slots in use: int64 [layers, KV heads]."""
        return torch.cat([cache.lengths() for cache in self.caches])

    @torch.no_grad()
    def step(self, token: int) -> Tensor:
        """Feed one token; returns the logits of the next one, fp32 [vocab]."""
        m, model = self.config.model, self.model
        g, d = m.num_attention_heads // m.kv_heads, m.head_dim
        x = model.embedding.word_embeddings.weight[token][None]  # [1, h]
        for layer, cache in zip(model.decoder.layers, self.caches, strict=True):
            attention = layer.self_attention
            mixed = F.linear(layer.input_layernorm(x), attention.linear_qkv.weight, attention.linear_qkv.bias)
            # [1, ng * (g + 2) * D] -> [1, ng, g + 2, D]: g queries, the key, the value of each group
            mixed = mixed.view(1, m.kv_heads, g + 2, d)
            q, k, v = mixed[:, :, :g].reshape(1, -1, d), mixed[:, :, g], mixed[:, :, g + 1]
            if m.qk_layernorm:
                q, k = attention.q_layernorm(q), attention.k_layernorm(k)
            decided = (self._decision_logits(attention, x, q, k),) if isinstance(cache, EvictingOracleCache) else ()
            x = x + F.linear(cache.step(q, k, v, *decided).view(1, -1), attention.linear_proj.weight)
            gate, up = F.linear(layer.pre_mlp_layernorm(x), layer.mlp.linear_fc1.weight).chunk(2, dim=-1)
            x = x + F.linear(F.silu(gate) * up, layer.mlp.linear_fc2.weight)
        self.tokens += 1
        head = model.output_layer if m.untie_embeddings_and_output_weights else model.embedding.word_embeddings
        return F.linear(model.decoder.final_layernorm(x), head.weight)[0, : m.vocab_size].float()

    def _decision_logits(self, attention: torch.nn.Module, x: Tensor, q: Tensor, k: Tensor) -> Tensor:
        """Decision logits of one token: fp32 [1, ng]. x: before the layer's norm, [1, h]; q, k: [1, heads, D]."""
        dmc, ng = self.config.dmc, k.size(1)
        if dmc.decision_source == "adapter":
            y = F.linear(attention.dms_proj_alpha_norm(x), attention.dms_proj_alpha.weight)
        else:
            y = k[..., -1] if dmc.decision_source == "key" else q.view(1, ng, -1, q.size(-1))[:, :, 0, -1]
        return dmc.decision_scale * y.float().expand(1, ng) - dmc.decision_bias

    def generate(
        self,
        prompt: list[int],
        max_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: Optional[int] = None,
        stop: Optional[int] = None,
    ):
        """Yield up to ``max_tokens`` token ids after ``prompt``.

        Args:
            temperature: 0 means greedy decoding; ``top_p`` and ``seed`` are ignored.
            stop: token id after which generation ends.
        """
        if not prompt:
            raise ValueError("the prompt is empty; give at least one token")
        generator = torch.Generator().manual_seed(seed or 0)
        for token in prompt:
            logits = self.step(token)
        for _ in range(max_tokens):
            if temperature == 0:
                token = int(logits.argmax())
            else:
                p, order = torch.softmax(logits.cpu() / temperature, dim=-1).sort(descending=True)
                p = p * ((p.cumsum(0) - p) < top_p)
                token = int(order[torch.multinomial(p / p.sum(), 1, generator=generator)])
            yield token
            if token == stop:
                return
            logits = self.step(token)
