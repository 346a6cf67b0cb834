"""A Llama-family language model whose key-value cache is compressed by DMC (arXiv 2403.09636) or DMS (arXiv
2506.05345), for inference.

This file lies in a model directory, beside ``cache_dmc.py``, ``cache_dms.py`` and ``configuration_dmc.py``;
transformers reads them when it is told ``trust_remote_code=True``. The export of the megatron.dmc package has put them
there, but they need only torch and transformers.

All but attention is Llama. Under DMC, every KV head decides at every token: *append* a slot to its cache, or *merge*
the token into its last slot. So a cache holds tokens / CR slots, and heads hold different numbers of them.

- Decision. The last channel of every key and query head is no part of attention: it is zero before and after the
  rotation. A token is merged when its key's last channel is above the bias b; a sequence's first token is always
  appended.
- Weight. omega = sigmoid(mean of the last channels of the group's queries + b) + epsilon.
- Merging. A slot is the mean, weighted by omega, of its last W tokens' keys and values before the rotation; its key is
  rotated to the position of the newest of them. Only the last slot of a head ever changes.
- Attention. A query sees all slots of its head, the last one as it was right after the query's own token.

Under DMS, a head marks tokens, and a marked token is *evicted* once it is more than ``window`` tokens old: no later
query sees it. Keys and values never change.

- Decision. A token is marked when ``scale * x - b`` is positive. x is the last channel of the head's key or of the
  first query of its group (after their norm, before the rotation; zero in attention, as under DMC), or the output of an
  adapter: a linear layer on the normed hidden state that comes into the layer.
- Token. The decision that is read from a token is about the token before it, or about itself.

A chunk of tokens (a prompt, or one token) is compressed at once and then attends: same result as token by token.
Decisions, weights and averages are computed in fp32. Decisions are hard and have no gradient: this file evaluates and
generates, and training is done with megatron.dmc. Shapes: b sequences, s tokens, n slots, np query heads, ng KV heads,
g = np / ng, D channels.
"""

import math

import torch
import torch.nn.functional as F
import transformers
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .cache_dmc import DMCCache, DMCCacheLayer, rotate
from .cache_dms import DMSCacheLayer  # here, not there: transformers 4.50 copies what this file imports itself
from .configuration_dmc import DMCConfig

TESTED = "4.50 to 5.24"  # versions of transformers
CACHE_NAME = next(
    (name for name in ("cache", "past_key_values") if name in CausalLMOutputWithPast.__annotations__), None
)
"""Name under which ``generate`` hands the cache from one step to the next: ``cache`` since transformers 5.24."""
if CACHE_NAME is None or tuple(int(part) for part in transformers.__version__.split(".")[:2]) < (4, 50):
    raise ImportError(f"transformers {transformers.__version__} is not known to modeling_dmc.py; use {TESTED}")

QUERY_ROWS = 512  # queries of a prompt that attend at a time, and fewer when that makes
QUERY_SCORES = 2**26  # more scores than this


# ------------------------------------------------------------------------------------------------------------ attention


def rotary_tables(config, positions):
    """cos and sin, fp32 [b, 1, s, D/2], at ``positions`` (int64 [b, s]), times YaRN's factor where there is one."""
    rope, d, factor = config.rope_parameters, config.head_dim, 1.0
    frequency = rope["rope_theta"] ** -(torch.arange(0, d, 2, device=positions.device).float() / d)
    if rope["rope_type"] != "default":
        kept = llama3_kept(rope, frequency) if rope["rope_type"] == "llama3" else yarn_kept(rope, frequency)
        frequency = frequency * (kept + (1 - kept) / rope["factor"])
    if rope["rope_type"] == "yarn":
        factor = yarn_factor(rope)
    angle = positions[:, None, :, None].float() * frequency
    return angle.cos() * factor, angle.sin() * factor


def llama3_kept(rope, frequency):
    """Share of each frequency [D/2] that is kept: wavelengths beyond the original context are stretched."""
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    turns = rope["original_max_position_embeddings"] * frequency / (2 * math.pi)
    return ((turns - low) / (high - low)).clamp(0, 1)


def yarn_kept(rope, frequency):
    """Share of each frequency [D/2] that is kept (arXiv 2309.00071, section 3.2): pairs that turn beta_fast times over
    the original context are, those that turn beta_slow times are stretched.
    """
    d = 2 * frequency.numel()

    def pair(turns):
        original = rope["original_max_position_embeddings"]
        return d * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(rope["rope_theta"]))

    first, last = pair(rope.get("beta_fast") or 32), pair(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, d - 1)
    index = torch.arange(d // 2, device=frequency.device).float()
    return 1 - ((index - first) / (last - first or 1e-3)).clamp(0, 1)


def yarn_factor(rope):
    """YaRN's factor on queries and keys (section 3.4 there)."""
    if rope.get("attention_factor") is not None:
        return rope["attention_factor"]

    def factor(weight):
        return 0.1 * weight * math.log(rope["factor"]) + 1

    over, under = rope.get("mscale"), rope.get("mscale_all_dim")
    return factor(over) / factor(under) if over and under else factor(1)


def attend(q, cache, seen, own=None):
    """Queries over the first slots of the cache, as far as they see them, and one slot of their own. Scores in fp32.

    q: [b, np, s, D] rotated; seen: from a slice of the queries to a mask of slots, bool [b, ng, rows, slots]; own: keys
    and values [b, ng, s, D]. Returns [b, s, np * D].
    """
    b, heads, s, d = q.shape
    ng = cache.keys.size(1)
    g, scale, out = heads // ng, 1 / math.sqrt(d), []
    q = q.view(b, ng, g, s, d)
    rows = max(1, min(QUERY_ROWS, QUERY_SCORES // (b * heads * (cache.bound + 1))))
    for start in range(0, s, rows):
        here = slice(start, start + rows)
        visible = seen(here)
        block, r, n = q[:, :, :, here], min(rows, s - start), visible.size(-1)
        # Queries of a group lie one below the other: [b, ng, g * r, D] x [b, ng, D, n]
        scores = torch.matmul(block.reshape(b, ng, g * r, d), cache.keys[:, :, :n].transpose(-1, -2))
        scores = scores.view(b, ng, g, r, n).float() * scale
        # Finite: padding before any token sees nothing.
        scores = scores.masked_fill(~visible[:, :, None], torch.finfo(scores.dtype).min)
        if own is not None:
            alone = (block.float() * own[0][:, :, None, here].float()).sum(-1, keepdim=True) * scale
            scores = torch.cat((scores, alone), dim=-1)
        p = torch.softmax(scores, dim=-1).to(q.dtype)
        mixed = torch.matmul(p[..., :n].reshape(b, ng, g * r, n), cache.values[:, :, :n]).view(b, ng, g, r, d)
        out.append(mixed if own is None else mixed + p[..., n:] * own[1][:, :, None, here])
    # [b, ng, g, s, D] -> [b, s, np * D]
    return torch.cat(out, dim=3).permute(0, 3, 1, 2, 4).reshape(b, s, heads * d)


class DMCAttention(nn.Module):
    """Grouped-query attention whose heads merge tokens."""

    def __init__(self, config):
        super().__init__()
        self.dmc, self.compresses, d = config.dmc, config.compresses, config.head_dim
        h, np_, ng = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
        self.head_dim, bias = d, self.dmc.get("add_qkv_bias", False)
        self.q_proj = nn.Linear(h, np_ * d, bias=bias)
        self.k_proj = nn.Linear(h, ng * d, bias=bias)
        self.v_proj = nn.Linear(h, ng * d, bias=bias)
        self.o_proj = nn.Linear(np_ * d, h, bias=False)
        if self.dmc.get("qk_layernorm", False):
            self.q_norm, self.k_norm = (nn.RMSNorm(d, eps=config.rms_norm_eps) for _ in range(2))
        else:
            self.q_norm = self.k_norm = None

    def project(self, x):
        """[b, s, h] -> queries, keys, values [b, heads, s, D], before the rotation."""
        b, s, _ = x.shape
        q, k, v = (project(x).view(b, s, -1, self.head_dim) for project in (self.q_proj, self.k_proj, self.v_proj))
        if self.q_norm is not None:  # the neuron is read after the norm
            q, k = self.q_norm(q), self.k_norm(k)
        return tuple(y.transpose(1, 2) for y in (q, k, v))

    def forward(self, x, hidden, cos, sin, valid, cache):
        """x: [b, s, h], normed; hidden: the same before the norm; cos, sin: [b, 1, s, D/2]; valid: bool [b, s], padding
        last; cache: the layer's, changed in place.
        """
        b, s, _ = x.shape
        q, k, v = self.project(x)
        with torch.autocast(x.device.type, enabled=False):
            bias = self.dmc["decision_bias"]
            merge = k[..., -1].float() - bias > 0
            if not self.compresses:
                merge = torch.zeros_like(merge)
            neuron = (
                q[..., -1].float().view(b, k.size(1), -1, s).mean(dim=2)
            )  # [b, np, s] -> [b, ng, g, s] -> [b, ng, s]
            omega = torch.sigmoid(neuron + bias) + self.dmc["importance_epsilon"]
            slot, k_own, v_own = cache.append(k, v, merge, omega, valid, cos, sin)
            q = rotate(q, cos, sin).to(q.dtype)
            out = attend(q, cache, lambda here: cache.final(slot[..., here], s == 1), (k_own, v_own))
        return self.o_proj(out)


class DMSAttention(DMCAttention):
    """Grouped-query attention whose heads evict tokens."""

    def __init__(self, config):
        super().__init__(config)
        self.source = self.dmc.get("decision_source", "key")
        if self.source == "adapter":
            h, deciding = config.hidden_size, config.num_key_value_heads
            deciding = deciding if self.dmc.get("decision_per", "head") == "head" else 1
            self.dms_proj_alpha_norm = nn.RMSNorm(h, eps=config.rms_norm_eps)
            self.dms_proj_alpha = nn.Linear(h, deciding, bias=False)

    def decide(self, q, k, hidden):
        """Decisions that are read from the tokens: bool [b, ng, s]."""
        if self.source == "adapter":
            x = self.dms_proj_alpha(self.dms_proj_alpha_norm(hidden)).transpose(1, 2).expand(-1, k.size(1), -1)
        else:
            x = (k if self.source == "key" else q[:, :: q.size(1) // k.size(1)])[..., -1]
        mark = self.dmc.get("decision_scale", 1.0) * x.float() - self.dmc["decision_bias"] > 0
        return mark if self.compresses else torch.zeros_like(mark)

    def forward(self, x, hidden, cos, sin, valid, cache):
        """See :class:`DMCAttention`."""
        q, k, v = self.project(x)
        mark = self.decide(q, k, hidden)
        with torch.autocast(x.device.type, enabled=False):
            neuron_out, first = self.source == "key", slice(None, None, q.size(1) // k.size(1))
            turned = rotate(q, cos, sin, neuron_out).to(q.dtype)
            if self.source == "query":  # the neuron is that of the first query head of each group
                turned[:, first] = rotate(q[:, first], cos, sin).to(q.dtype)
            number = cache.append(rotate(k, cos, sin, neuron_out).to(k.dtype), v, mark, valid)
            out = attend(turned, cache, lambda here: cache.visible(number, here))
        return self.o_proj(out)


# ------------------------------------------------------------------------------------------------------------ the model


class DMCMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class DMCDecoderLayer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.self_attn = (DMSAttention if config.evicts else DMCAttention)(config)
        self.mlp = DMCMLP(config)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, x, cos, sin, valid, cache):
        x = x + self.self_attn(self.input_layernorm(x), x, cos, sin, valid, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


def new_cache(config):
    """An empty cache for a model of this configuration."""
    dmc, layers = config.dmc, range(config.num_hidden_layers)
    if config.evicts:
        return DMCCache([DMSCacheLayer(dmc["window"], dmc.get("decision_about", "previous")) for _ in layers])
    return DMCCache([DMCCacheLayer(dmc["window"]) for _ in layers])


class DMCPreTrainedModel(PreTrainedModel):
    config_class = DMCConfig
    base_model_prefix = "model"
    _no_split_modules = ["DMCDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _supports_cache_class = True  # transformers before 4.57 asks whether a cache may be handed in
    _is_stateful = True  # the cache cannot be rolled back: transformers refuses assisted decoding


class DMCModel(DMCPreTrainedModel):
    """Embedding, decoder layers and final norm."""

    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DMCDecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_init()

    def get_input_embeddings(self):
        return self.embed_tokens

    def set_input_embeddings(self, value):
        self.embed_tokens = value

    @torch.no_grad()
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        use_cache=None,
        output_hidden_states=None,
        cache=None,
        **kwargs,
    ):
        """Hidden states of a batch. Arguments: :meth:`DMCForCausalLM.forward`."""
        cache = self._checked_cache(past_key_values, cache)
        self._check_arguments(input_ids, inputs_embeds, kwargs)
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        b, s, _ = x.shape
        use_cache = self.config.use_cache if use_cache is None else use_cache
        cache = new_cache(self.config) if cache is None else cache
        valid = self._valid(attention_mask, cache.columns, x)
        expected = cache.take(valid)
        if position_ids is None:
            position_ids = expected[:, None] + valid.long().cumsum(-1) - 1
        elif attention_mask is None and use_cache and s == 1:
            self._check_grown(position_ids, expected)
        position_ids = position_ids.expand(b, s)
        cache.next_position = position_ids.masked_fill(~valid, -1).amax(-1).clamp_min(expected - 1) + 1

        order = None
        if attention_mask is not None and s > 1:
            # Padding goes behind the tokens, where a causal model cannot see it, and back at the end.
            order = torch.argsort(valid.byte(), dim=-1, descending=True, stable=True)
            x = x.gather(1, order[..., None].expand_as(x))
            position_ids, valid = position_ids.gather(1, order), valid.gather(1, order)
        if s > 1 and bool(((position_ids.diff(dim=-1) <= 0) & valid[:, 1:]).any()):
            raise ValueError("position_ids do not rise from token to token; packed sequences are not supported")

        cos, sin = rotary_tables(self.config, position_ids.clamp_min(0))
        states = [x] if output_hidden_states else []
        for layer, layer_cache in zip(self.layers, cache.layers):
            x = layer(x, cos, sin, valid, cache=layer_cache)
            if output_hidden_states:
                states.append(x)
            if not use_cache:
                layer_cache.reset()  # one layer's slots at a time
        x = self.norm(x)
        states[-1:] = [x]  # as transformers has it: the last state is the normed one
        if order is not None:
            back = order.argsort(dim=-1)[..., None].expand_as(x)
            states = [state.gather(1, back) for state in states]
        return BaseModelOutputWithPast(
            last_hidden_state=states[-1],
            hidden_states=tuple(states) if output_hidden_states else None,
            **{CACHE_NAME: cache if use_cache else None},
        )

    @staticmethod
    def _checked_cache(past_key_values, cache):
        """The cache, which callers name one way or the other."""
        if past_key_values is not None and cache is not None and past_key_values is not cache:
            raise ValueError("past_key_values and cache are two names of one argument; give one of them")
        cache = past_key_values if cache is None else cache
        if cache is not None and not isinstance(cache, DMCCache):
            raise ValueError(f"{CACHE_NAME} is a {type(cache).__name__}; give the DMCCache of an earlier call, or None")
        return cache

    @staticmethod
    def _check_grown(position_ids, expected):
        """A caller that counts positions on while the cache stays behind has lost the cache on its way back here.

        position_ids: int64 [b or 1, 1]; expected: int64 [b]. With an attention mask ``_valid`` sees it.
        """
        if bool((position_ids[:, 0] > expected).any()):
            raise ValueError(
                f"the token is at position {int(position_ids.max())}, and the cache ends before {int(expected.max())}: "
                f"it has not grown with the text. These files work with transformers {TESTED}, this is "
                f"{transformers.__version__}"
            )

    def _check_arguments(self, input_ids, inputs_embeds, others):
        if self.training:
            raise ValueError(
                "this model takes hard decisions, without gradients: call model.eval(); train with megatron.dmc"
            )
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        if others.get("output_attentions"):
            raise ValueError("a compressed cache has no attention weight per token; leave output_attentions out")
        unknown = sorted(name for name, value in others.items() if not self._is_inert(name, value))
        if unknown:
            raise ValueError(f"{', '.join(unknown)}: this model does not know what to do with it; leave it out")

    @staticmethod
    def _is_inert(name, value):
        """True for what callers hand to every model, at a value that changes nothing here."""
        if value is None or name == "cache_position":  # older names for what position_ids and the cache say
            return True
        if name in ("return_dict", "output_attentions"):
            return bool(value) == (name == "return_dict")
        return name == "token_type_ids" and not bool(value.any())

    @staticmethod
    def _valid(mask, columns, x):
        """bool [b, s], True for the tokens of this call."""
        b, s, _ = x.shape
        if mask is None:
            return torch.ones(b, s, dtype=torch.bool, device=x.device)
        if mask.dim() != 2 or mask.size(0) != b or mask.size(1) != columns + s:
            raise ValueError(
                f"attention_mask has shape {tuple(mask.shape)}; it must be {(b, columns + s)}: one column for "
                "each token of the cache and of this call, 0 for padding"
            )
        return mask[:, columns:].to(device=x.device, dtype=torch.bool)


class DMCForCausalLM(DMCPreTrainedModel, GenerationMixin):
    """The language model. ``generate`` uses a :class:`DMCCache`; ask for it with ``return_dict_in_generate=True``."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config):
        super().__init__(config)
        self.model = DMCModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.model.embed_tokens

    def set_input_embeddings(self, value):
        self.model.embed_tokens = value

    def get_output_embeddings(self):
        return self.lm_head

    def set_output_embeddings(self, value):
        self.lm_head = value

    @torch.no_grad()
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        labels=None,
        use_cache=None,
        output_hidden_states=None,
        logits_to_keep=0,
        return_dict=None,
        cache=None,
        **kwargs,
    ):
        """Logits and loss of a batch, without gradients. Takes what LlamaForCausalLM takes.

        Args:
            attention_mask: [b, columns], a column for each token of the cache and of this call, 0 for padding on any
                side.
            position_ids: [b, s]; None: counted from the sequence's first token.
            past_key_values, cache: the DMCCache of an earlier call, which this call extends in place, or None; two
                names of one argument, the second is transformers' own since 5.24.
            labels: [b, s]; the loss is the mean over the positions whose next label is not -100.
            logits_to_keep: of the last so many positions only, or of these (a tensor of indices); 0 for all.
        """
        outputs = self.model(
            input_ids,
            attention_mask,
            position_ids,
            past_key_values,
            inputs_embeds,
            use_cache,
            output_hidden_states,
            cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            predicted, target = logits[:, :-1].float(), labels[:, 1:].to(logits.device)
            loss = F.cross_entropy(predicted.flatten(0, 1), target.flatten(), ignore_index=-100)
        named = {CACHE_NAME: outputs.get(CACHE_NAME)}
        result = CausalLMOutputWithPast(loss=loss, logits=logits, hidden_states=outputs.hidden_states, **named)
        return result.to_tuple() if return_dict is False else result

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        """Called by ``generate``: it would make a DynamicCache."""
        if generation_config.cache_implementation is not None:
            raise ValueError(
                f"cache_implementation is {generation_config.cache_implementation!r}; a DMC model has a cache of "
                "its own, leave it out"
            )
        given = self.model._checked_cache(model_kwargs.pop("past_key_values", None), model_kwargs.pop("cache", None))
        if given is None and generation_config.use_cache is not False:
            given = new_cache(self.config)
        if given is not None:
            model_kwargs[CACHE_NAME] = given

    def generate_batch(self, *args, **kwargs):
        """Refused: transformers' continuous batching."""
        raise ValueError(
            "continuous batching (generate_batch) keeps its own paged cache, with a slot for every token, which is not "
            "a DMC model's; call generate with a padded batch, or serve this directory with `dmc serve` of megatron.dmc"
        )

    init_continuous_batching = continuous_batching_context_manager = generate_batch


# transformers before 4.51 forgets to, and save_pretrained then writes config.json without these files.
DMCForCausalLM.register_for_auto_class("AutoModelForCausalLM")
