"""Small random models of every supported family, as transformers itself writes them, for the tests of conversion."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import transformers

SIZES = dict(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=131,
    max_position_embeddings=128,
)
LLAMA3 = dict(
    rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32
)
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=32)

CASES: dict[str, dict] = {
    "llama2": dict(family="Llama", num_key_value_heads=4),
    "llama3": dict(family="Llama", rope_parameters={"rope_theta": 5e5, "rope_type": "default"}),
    "llama3.1": dict(family="Llama", rope_parameters={"rope_theta": 5e5, **LLAMA3}, dtype="bfloat16"),
    "llama3.2": dict(family="Llama", rope_parameters={"rope_theta": 5e5, **LLAMA3}, tie_word_embeddings=True),
    "mistral": dict(family="Mistral", head_dim=32, sliding_window=None, dtype="float16"),
    "qwen2": dict(family="Qwen2", rms_norm_eps=1e-5),
    "qwen2.5-tied": dict(family="Qwen2", tie_word_embeddings=True, dtype="bfloat16"),
    "qwen2.5-yarn": dict(family="Qwen2", rope_parameters={"rope_theta": 1e4, **YARN}),
    "qwen3": dict(family="Qwen3", head_dim=24, tie_word_embeddings=True),
    "qwen3-untied": dict(family="Qwen3", head_dim=16),
}


def make(case: str, directory: Path, shard: str = "60KB", **more: object) -> transformers.PreTrainedModel:
    """Write ``CASES[case]`` into ``directory`` in several shards; returns the model, in eval mode."""
    values = {**SIZES, **CASES[case], **more}
    family, dtype = values.pop("family"), getattr(torch, values.pop("dtype", "float32"))
    torch.manual_seed(sum(case.encode()))
    config = getattr(transformers, family + "Config")(**values)
    model = getattr(transformers, family + "ForCausalLM")(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Norms and biases are made of ones and zeros: mixed up they would not be noticed.
            parameter.copy_(torch.randn_like(parameter) * 0.1 + (1.0 if "norm" in name else 0.0))
    model = model.to(dtype).eval()
    model.save_pretrained(directory, max_shard_size=shard)
    return model


def as_transformers_4(directory: Path) -> None:
    """Rewrite config.json with the keys that transformers wrote before version 5."""
    path = directory / "config.json"
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = rope if rope["rope_type"] != "default" else None
    config["torch_dtype"] = config.pop("dtype")
    path.write_text(json.dumps(config))
