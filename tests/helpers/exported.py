"""Small exported DMC and DMS models of random weights, and the same models step by step over the oracles' caches."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import save_file
from torch import Tensor

from megatron.dmc import checkpoint
from megatron.dmc.config import DMCConfig
from megatron.dmc.ops import EvictingOracleCache, OracleCache, attention_factor, rotary_frequencies

REMOTE_CODE = Path(checkpoint.__file__).parent / "remote_code"
EPSILON, VOCABULARY, HIDDEN, LAYERS, GROUPS, D = 2.0**-7, 61, 32, 2, 2, 16
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {
    "rope_type": "yarn",
    "factor": 8.0,
    "original_max_position_embeddings": 32,
    "mscale": 1.0,
    "mscale_all_dim": 0.2,
}

# decision_bias sets how often tokens merge: the neuron's rows below give keys[D-1] of about N(0, 1).
CASES = {
    "half": dict(bias=0.0),
    "window": dict(bias=-1.6),
    "unbounded": dict(bias=-1.6, window=None, g=1),
    "window of one": dict(bias=-0.5, window=1),
    "every head": dict(bias=-0.5, g=4, tied=True),
    "qwen 2": dict(bias=-1.6, qkv_bias=True, window=3),
    "qwen 3": dict(bias=-0.8, qk_norm=True, head_dim=24),
    "llama 3": dict(bias=-0.8, rope=LLAMA3, g=4, window=None),
    "rope_parameters": dict(bias=-0.8, rope=LLAMA3, new_style=True),
    "yarn": dict(bias=-0.8, rope=YARN),
    "no merging": dict(bias=50.0),
    "one slot": dict(bias=-50.0),
    "zero_out": dict(bias=-1.6, stage="zero_out"),
}
DMS_CASES = {
    "key": dict(bias=0.2, window=5, dms={}),
    "key, self": dict(bias=0.2, window=12, g=4, dms=dict(about="self")),
    "query": dict(bias=0.5, window=6, qk_norm=True, head_dim=24, dms=dict(source="query", scale=3.0)),
    "query, self": dict(bias=-0.5, window=1, g=3, rope=YARN, dms=dict(source="query", about="self")),
    "adapter": dict(bias=0.5, window=4, qk_norm=True, dms=dict(source="adapter", scale=4.0)),
    "adapter, self": dict(bias=-1.0, window=20, g=1, qkv_bias=True, dms=dict(source="adapter", about="self")),
    "adapter, layer": dict(bias=-0.2, window=3, tied=True, rope=LLAMA3, dms=dict(source="adapter", per="layer")),
    "no eviction": dict(bias=50.0, window=3, dms=dict(source="adapter")),
    "all evicted": dict(bias=-50.0, window=7, dms=dict(source="query")),
    "dms zero_out": dict(bias=-1.6, window=3, stage="zero_out", dms={}),
}
"""Models under DMS: dms holds what their decisions are (``DMCConfig.decision_*``)."""


class Exported:
    """A small random model: its directory, and the same model as plain PyTorch over an oracle's cache."""

    def __init__(
        self,
        directory: Path,
        *,
        bias: float,
        window: int | None = 12,
        g: int = 2,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        tied: bool = False,
        head_dim: int | None = None,
        rope: dict | None = None,
        new_style: bool = False,
        stage: str = "finetune",
        seed: int = 0,
        dms: dict | None = None,
        positions: int = 256,
    ) -> None:
        self.directory, self.bias, self.window, self.g, self.d, self.stage = (
            directory,
            bias,
            window,
            g,
            head_dim or D,
            stage,
        )
        method = "dmc" if dms is None else "dms"
        decision = {f"decision_{name}": value for name, value in (dms or {}).items()}
        self.decision = DMCConfig(method=method, decision_bias=bias, window=window, **decision)
        self.decision.check()
        self.inv_freq, self.rotary_factor = rotary_frequencies(self.d, 5e4, rope), attention_factor(rope)
        self.dmc = {
            "format_version": 1,
            "base_model_type": "qwen3" if qk_norm else "qwen2" if qkv_bias else "llama",
            "decision_bias": bias,
            "window": window,
            "importance_epsilon": EPSILON,
            "add_qkv_bias": qkv_bias,
            "qk_layernorm": qk_norm,
            "stage": stage,
            "step": 2000,
            "target_cr": 4.0,
            "measured_cr": 4.03,
        }
        if dms is not None:
            names = [f"decision_{name}" for name in ("source", "about", "per", "scale")]
            self.dmc |= {name: getattr(self.decision, name) for name in ("method", *names)}
        self.config = {
            "architectures": ["DMCForCausalLM"],
            "model_type": "dmc",
            "dmc": self.dmc,
            "dtype": "float32",
            "auto_map": {
                "AutoConfig": "configuration_dmc.DMCConfig",
                "AutoModelForCausalLM": "modeling_dmc.DMCForCausalLM",
            },
            "hidden_size": HIDDEN,
            "intermediate_size": 48,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": GROUPS * g,
            "num_key_value_heads": GROUPS,
            "head_dim": self.d,
            "rms_norm_eps": 1e-5,
            "vocab_size": VOCABULARY,
            "max_position_embeddings": positions,
            "tie_word_embeddings": tied,
            "hidden_act": "silu",
        }
        if new_style:
            self.config["rope_parameters"] = {"rope_theta": 5e4, **(rope or {"rope_type": "default"})}
        else:
            self.config |= {"rope_theta": 5e4, "rope_scaling": rope}
        self.weights = self.random_weights(torch.Generator().manual_seed(seed), qkv_bias, qk_norm, tied)
        directory.mkdir(parents=True)
        (directory / "config.json").write_text(json.dumps(self.config))
        save_file(self.weights, directory / "model.safetensors", {"format": "pt"})
        for file in REMOTE_CODE.glob("*.py"):
            shutil.copy(file, directory)

    def random_weights(
        self, generator: torch.Generator, qkv_bias: bool, qk_norm: bool, tied: bool
    ) -> dict[str, Tensor]:
        def draw(*shape: int, scale: float = 1.0) -> Tensor:
            return torch.randn(*shape, generator=generator) * scale

        d, weights = (
            self.d,
            {"model.embed_tokens.weight": draw(VOCABULARY, HIDDEN), "model.norm.weight": 1 + draw(HIDDEN) / 9},
        )
        for n in range(LAYERS):
            name = f"model.layers.{n}."
            for projection, heads in (("q", GROUPS * self.g), ("k", GROUPS), ("v", GROUPS)):
                weights[f"{name}self_attn.{projection}_proj.weight"] = draw(heads * d, HIDDEN, scale=HIDDEN**-0.5)
                if qkv_bias:
                    weights[f"{name}self_attn.{projection}_proj.bias"] = draw(heads * d, scale=0.3)
                if qk_norm and projection != "v":
                    weights[f"{name}self_attn.{projection}_norm.weight"] = 1 + draw(d) / 9
            if self.decision.decision_source == "adapter":
                rows = GROUPS if self.decision.decision_per == "head" else 1
                weights[f"{name}self_attn.dms_proj_alpha_norm.weight"] = 1 + draw(HIDDEN) / 9
                weights[f"{name}self_attn.dms_proj_alpha.weight"] = draw(rows, HIDDEN, scale=HIDDEN**-0.5)
            weights[f"{name}self_attn.o_proj.weight"] = draw(HIDDEN, GROUPS * self.g * d, scale=HIDDEN**-0.5)
            weights[f"{name}mlp.gate_proj.weight"] = draw(48, HIDDEN, scale=HIDDEN**-0.5)
            weights[f"{name}mlp.up_proj.weight"] = draw(48, HIDDEN, scale=HIDDEN**-0.5)
            weights[f"{name}mlp.down_proj.weight"] = draw(HIDDEN, 48, scale=48**-0.5)
            for norm in ("input_layernorm", "post_attention_layernorm"):
                weights[f"{name}{norm}.weight"] = 1 + draw(HIDDEN) / 9
        if not tied:
            weights["lm_head.weight"] = draw(VOCABULARY, HIDDEN, scale=HIDDEN**-0.5)
        return weights

    def load(self, **named):
        return transformers.AutoModelForCausalLM.from_pretrained(self.directory, trust_remote_code=True, **named)

    def oracle(self, **cache: object) -> Oracle:
        return Oracle(self, **cache)


class Oracle:
    """One sequence, token by token: Llama in plain PyTorch with one oracle's cache per layer."""

    def __init__(self, model: Exported, **cache: object) -> None:
        """``cache``: more arguments of :class:`OracleCache` or :class:`EvictingOracleCache`."""
        self.model, c = model, model.decision
        # Above any logit: a model of zero_out keeps every token, with the neuron out of attention.
        self.bias = model.bias if model.stage != "zero_out" else 1e9
        settings = dict(window=model.window, factor=model.rotary_factor, **cache)
        if c.evicts:
            settings |= dict(about_self=c.decision_about == "self", neuron=c.neuron)
            self.caches = [EvictingOracleCache(1, GROUPS, model.inv_freq, **settings) for _ in range(LAYERS)]
        else:
            settings |= dict(decision_bias=self.bias, epsilon=EPSILON)
            self.caches = [OracleCache(1, GROUPS, model.inv_freq, **settings) for _ in range(LAYERS)]

    def logits(self, name: str, x: Tensor, q: Tensor, k: Tensor) -> Tensor:
        """Decision logits of one token: [1, KV heads]. name: of the attention; x: before the layer's norm, [1, h]."""
        source, w = self.model.decision.decision_source, self.model.weights
        if source == "adapter":
            y = F.linear(self.norm(x, f"{name}dms_proj_alpha_norm"), w[f"{name}dms_proj_alpha.weight"])
        else:
            read = [k[0, n, -1] if source == "key" else q[0, n * self.model.g, -1] for n in range(GROUPS)]
            y = torch.stack(read)[None]
        return self.model.decision.decision_scale * y.expand(1, GROUPS) - self.bias

    def lengths(self) -> Tensor:
        return torch.stack([cache.lengths()[0] for cache in self.caches])

    def step(self, token: int) -> Tensor:
        """Logits of the next token: fp32 [vocabulary]."""
        w, d = self.model.weights, self.model.d
        x = w["model.embed_tokens.weight"][token][None]  # [1, h]
        for n, cache in enumerate(self.caches):
            name = f"model.layers.{n}."
            y = self.norm(x, name + "input_layernorm")
            q, k, v = (
                F.linear(y, w[f"{name}self_attn.{p}_proj.weight"], w.get(f"{name}self_attn.{p}_proj.bias")).view(
                    1, -1, d
                )
                for p in "qkv"
            )
            if f"{name}self_attn.q_norm.weight" in w:
                q, k = self.norm(q, f"{name}self_attn.q_norm"), self.norm(k, f"{name}self_attn.k_norm")
            decided = (self.logits(f"{name}self_attn.", x, q, k),) if isinstance(cache, EvictingOracleCache) else ()
            x = x + F.linear(cache.step(q, k, v, *decided).view(1, -1), w[f"{name}self_attn.o_proj.weight"])
            y = self.norm(x, name + "post_attention_layernorm")
            gate, up = F.linear(y, w[f"{name}mlp.gate_proj.weight"]), F.linear(y, w[f"{name}mlp.up_proj.weight"])
            x = x + F.linear(F.silu(gate) * up, w[f"{name}mlp.down_proj.weight"])
        head = w["model.embed_tokens.weight"] if self.model.config["tie_word_embeddings"] else w["lm_head.weight"]
        return F.linear(self.norm(x, "model.norm"), head)[0]

    def norm(self, x: Tensor, name: str) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.model.weights[f"{name}.weight"], 1e-5)

    def run(self, tokens: list[int]) -> Tensor:
        """[tokens, vocabulary]"""
        return torch.stack([self.step(token) for token in tokens])

    def generate(self, prompt: list[int], more: int) -> list[int]:
        logits, out = self.run(prompt)[-1], []
        for _ in range(more):
            out.append(int(logits.argmax()))
            logits = self.step(out[-1])
        return out


def tokens(n: int, seed: int = 1) -> list[int]:
    return torch.randint(1, VOCABULARY, (n,), generator=torch.Generator().manual_seed(seed)).tolist()
