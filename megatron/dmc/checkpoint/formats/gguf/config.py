"""``config.json`` of the model in a GGUF file, from the keys of its architecture."""

import math
from typing import Any, Optional

import torch
from torch import Tensor

from megatron.dmc.checkpoint.formats.gguf.metadata import Metadata
from megatron.dmc.checkpoint.mapping import FAMILIES

ARCHITECTURES = ("llama", "qwen2", "qwen3")
"""``general.architecture`` of the files that are understood; each is a ``model_type`` of transformers too."""

# Key after the architecture's name -> key of config.json.
_SIZES = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
}
_READ = {
    *_SIZES,
    *"attention.head_count_kv attention.layer_norm_rms_epsilon attention.key_length attention.value_length".split(),
    *"rope.freq_base rope.dimension_count rope.scaling.type rope.scaling.factor rope.scaling.attn_factor".split(),
    *"rope.scaling.original_context_length rope.scaling.finetuned vocab_size attention.sliding_window".split(),
}
_NEUTRAL: dict[str, tuple] = {
    "expert_count": (0,),
    "expert_used_count": (0,),
    "attention.causal": (True,),
    "attention.clamp_kqv": (0.0,),
    "rope.scale_linear": (1.0,),
    "pooling_type": (0,),
    "tensor_data_layout": ("Meta AI original pth",),
}
"""Keys that change what a model computes, and the values at which they do not."""

_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def hf_config(metadata: Metadata) -> dict[str, Any]:
    """``config.json`` in transformers 4's keys, without the dtype.

    Raises:
        ValueError: an architecture, a key or a value that is not understood, by its name.
    """
    arch = metadata.architecture
    if arch not in ARCHITECTURES:
        raise ValueError(f"{metadata.path}: general.architecture is {arch!r}; supported: {', '.join(ARCHITECTURES)}")
    _check_keys(metadata, arch)
    config: dict[str, Any] = {"architectures": [FAMILIES[arch].architecture], "model_type": arch}
    config |= {name: metadata.integer(f"{arch}.{key}") for key, name in _SIZES.items()}
    heads = config["num_attention_heads"]
    config["num_key_value_heads"] = metadata.integer(f"{arch}.attention.head_count_kv", heads)
    config["head_dim"] = _head_dim(metadata, arch, config)
    config["rms_norm_eps"] = _short(metadata.number(f"{arch}.attention.layer_norm_rms_epsilon"))
    config["vocab_size"] = _vocab_size(metadata, arch)
    config["hidden_act"] = "silu"
    config["tie_word_embeddings"] = "output.weight" not in metadata.tensors
    config["rope_theta"] = _short(metadata.number(f"{arch}.rope.freq_base", 10000.0))
    if scaling := _rope_scaling(metadata, arch, config):
        config["rope_scaling"] = scaling
    if window := metadata.integer(f"{arch}.attention.sliding_window", 0):
        config |= {"sliding_window": window, "use_sliding_window": True}
    return config


def _check_keys(metadata: Metadata, arch: str) -> None:
    for key in metadata.keys():
        short = key.removeprefix(f"{arch}.")
        if short == key or short in _READ:
            continue
        if short not in _NEUTRAL:
            raise ValueError(f"{metadata.path}: {key} = {str(metadata.get(key))[:60]} is not understood")
        if metadata.get(key) not in _NEUTRAL[short]:
            raise ValueError(
                f"{metadata.path}: {key} = {metadata.get(key)!r} is not supported; "
                f"only {' or '.join(map(repr, _NEUTRAL[short]))} is"
            )


def _head_dim(metadata: Metadata, arch: str, config: dict) -> int:
    heads = config["num_attention_heads"]
    if heads < 1:
        raise ValueError(f"{metadata.path}: {arch}.attention.head_count is {heads}; it must be positive")
    size = metadata.integer(f"{arch}.attention.key_length", config["hidden_size"] // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if metadata.integer(f"{arch}.{key}", size) != size:
            raise ValueError(
                f"{metadata.path}: {arch}.{key} is {metadata.integer(f'{arch}.{key}')}, other than the {size} channels "
                "of a key; this is not supported"
            )
    return size


def _vocab_size(metadata: Metadata, arch: str) -> int:
    """Rows of the embedding: the key is missing in files of some converters, and in some counts another number."""
    embedding = metadata.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise ValueError(f"{metadata.path} has no matrix token_embd.weight; the file is incomplete")
    return int(embedding.shape[1])


def _short(value: float) -> float:
    """The shortest decimal number that is ``value`` in fp32, as which the file holds it: 1e-05, not 9.99999974e-06."""
    for digits in range(1, 10):
        short = float(f"{value:.{digits}g}")
        if torch.tensor(short, dtype=torch.float32).item() == torch.tensor(value, dtype=torch.float32).item():
            return short
    return value


def _rope_scaling(metadata: Metadata, arch: str, config: dict) -> Optional[dict[str, Any]]:
    """``rope_scaling`` of config.json. What of it is supported the Hugging Face reader says."""
    kind = metadata.text(f"{arch}.rope.scaling.type", "none")
    if "rope_freqs.weight" in metadata.tensors:
        if kind != "none":
            raise ValueError(
                f"{metadata.path}: rope_freqs.weight beside {arch}.rope.scaling.type {kind!r} is not supported"
            )
        return _llama3(metadata, config)
    if kind == "none":
        return None
    scaling: dict[str, Any] = {"rope_type": kind, "factor": _short(metadata.number(f"{arch}.rope.scaling.factor"))}
    key = f"{arch}.rope.scaling.original_context_length"
    if key in metadata:
        scaling["original_max_position_embeddings"] = metadata.integer(key)
    key = f"{arch}.rope.scaling.attn_factor"
    if metadata.number(key, 1.0) != 1.0:
        # llama.cpp multiplies YaRN's own factor by it; transformers' attention_factor stands in that one's place.
        raise ValueError(f"{metadata.path}: {key} = {metadata.number(key)!r} is not supported; only 1.0 is")
    return scaling


def _llama3(metadata: Metadata, config: dict) -> dict[str, Any]:
    """Llama 3.1's scaling, which a GGUF file holds as one divisor per frequency in ``rope_freqs.weight`` [D / 2].

    Raises:
        ValueError: divisors that Llama 3.1's formula does not give.
    """
    tensor = metadata.tensors["rope_freqs.weight"]
    found = torch.tensor(tensor.data.reshape(-1).tolist())
    scaling = {"rope_type": "llama3", "factor": _short(float(found.max())), **_LLAMA3}
    if found.shape != (config["head_dim"] // 2,) or not torch.allclose(
        found, llama3_divisors(config, scaling), rtol=1e-4
    ):
        raise ValueError(
            f"{metadata.path}: rope_freqs.weight is not what Llama 3.1's scaling gives with {_LLAMA3}; other scalings "
            "are not supported"
        )
    return scaling


def llama3_divisors(config: dict, scaling: dict) -> Tensor:
    """Divisors [D / 2] of the rotary frequencies under Llama 3.1's scaling (transformers' ``rope_type: llama3``)."""
    size = config["head_dim"]
    wavelengths = 2 * math.pi * config["rope_theta"] ** (torch.arange(0, size, 2, dtype=torch.float64) / size)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    rotations = scaling["original_max_position_embeddings"] / wavelengths
    smooth = ((rotations - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - smooth) / scaling["factor"] + smooth)).float()
