"""Quantized Hugging Face directories in the formats that libraries write, and log-probabilities of the engine over
them.
"""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Optional

import torch
from helpers.engines import prompt_scores
from safetensors.torch import save_file
from torch import Tensor

from megatron.dmc.checkpoint.codes import CodedTensor
from megatron.dmc.checkpoint.formats import hf
from megatron.dmc.checkpoint.tensors import Lazy
from megatron.dmc.inference import Engine, EngineConfig, dummy


class Numbers(Lazy):
    """A matrix of codes as one of numbers in fp32."""

    def __init__(self, coded: CodedTensor) -> None:
        self.coded, self.name, self.shape, self.dtype = coded, coded.name, coded.shape, torch.float32

    def read_into(self, out: Tensor, start: int) -> None:
        self.coded.read_into(out, start)


def as_numbers(directory: hf.HFDirectory) -> hf.HFDirectory:
    """A directory whose codes are read as numbers."""
    tensors = {n: Numbers(t) if isinstance(t, CodedTensor) else t for n, t in directory.tensors.items()}
    return replace(directory, tensors=tensors, quantization=None)


def log_probs(directory: hf.HFDirectory, prompt: Tensor) -> Tensor:
    """Log-probabilities of a prompt's tokens but the first, by the engine in fp32."""
    return prompt_scores(Engine(directory, EngineConfig(dtype="float32", max_num_seqs=1)), prompt.tolist())


CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "float16",
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "rms_norm_eps": 1e-5,
    "vocab_size": 96,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "rope_theta": 1e4,
}
FORMATS = ("pack-quantized", "int-quantized", "gptq", "gptq_v2", "awq")
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True)
class Kind:
    """How the matrices of a directory are quantized."""

    format: str
    """One of :data:`FORMATS`."""
    bits: int = 4
    group: Optional[int] = 32
    """None: one scale for each output."""
    symmetric: bool = False
    ordered: bool = False
    """Groups of inputs that are not consecutive: desc_act, actorder."""

    def config(self) -> dict:
        """``quantization_config`` of config.json."""
        if self.format == "awq":
            return {"quant_method": "awq", "version": "gemm", "bits": 4, "group_size": self.group, "zero_point": True}
        if self.format.startswith("gptq"):
            found = {"quant_method": "gptq", "checkpoint_format": self.format, "bits": self.bits}
            return found | {"group_size": self.group or -1, "sym": self.symmetric, "desc_act": self.ordered}
        weights = {"num_bits": self.bits, "type": "int", "symmetric": self.symmetric, "dynamic": False}
        weights |= {"strategy": "group" if self.group else "channel", "group_size": self.group}
        scheme = {"targets": ["re:.*_proj"], "weights": weights, "input_activations": None, "output_activations": None}
        ignore = ["lm_head", "re:model.layers.1.self_attn.v.*"]
        return {
            "quant_method": "compressed-tensors",
            "format": self.format,
            "quantization_status": "compressed",
            "config_groups": {"group_0": scheme},
            "ignore": ignore,
            "kv_cache_scheme": None,
        }


def words(codes: Tensor, bits: int) -> Tensor:
    """int32 words of codes [..., n], the first in the lowest bits; zeros fill the last one."""
    each = 32 // bits
    codes = torch.nn.functional.pad(codes.long(), (0, -codes.size(-1) % each)).unflatten(-1, (-1, each))
    found = sum(codes[..., i] << bits * i for i in range(each))
    return torch.where(found >= 2**31, found - 2**32, found).int()


def quantize(weight: Tensor, kind: Kind, order: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes [outputs, inputs], scales and zero points [outputs, groups], and the group of each input."""
    group, top = kind.group or weight.size(1), 2**kind.bits - 1
    group_of = torch.empty(weight.size(1), dtype=torch.int32)
    group_of[order] = torch.arange(weight.size(1), dtype=torch.int32) // group
    groups = weight[:, order].unflatten(1, (-1, group))
    low, high = groups.amin(2).clamp_max(0), groups.amax(2).clamp_min(0)
    if kind.symmetric:
        high = torch.maximum(high, -low)
        low = -high
    scales = ((high - low) / top).half()
    zeros = torch.full_like(scales, (top + 1) // 2) if kind.symmetric else (-low / scales.float()).round().clamp(0, top)
    index = group_of.long()
    codes = (weight / scales.float()[:, index] + zeros.float()[:, index]).round().clamp(0, top)
    return codes, scales, zeros.float(), group_of


def matrix(name: str, weight: Tensor, kind: Kind) -> tuple[dict[str, Tensor], Tensor]:
    """Tensors of a matrix in a format, and what they stand for."""
    module, bits = name.removesuffix(".weight"), kind.bits
    seed = zlib.crc32(name.split(".")[-2].encode()) if "o_proj" in name or "down" in name else 7
    order = torch.arange(weight.size(1))
    if kind.ordered:  # the same for all layers of one input
        order = torch.randperm(weight.size(1), generator=torch.Generator().manual_seed(seed))
    codes, scales, zeros, group_of = quantize(weight, kind, order)
    held = (codes - zeros[:, group_of.long()]) * scales.float()[:, group_of.long()]
    middle = 2 ** (bits - 1)
    if kind.format.startswith("gptq"):
        stored = words(zeros.T, bits)
        if kind.format == "gptq":
            stored -= {4: 0x11111111, 8: 0x01010101}[bits]
        parts = {"qweight": words(codes, bits).T, "qzeros": stored, "scales": scales.T, "g_idx": group_of}
    elif kind.format == "awq":
        packed, stored = (words(x.T.unflatten(-1, (-1, 8))[..., AWQ_ORDER].flatten(-2), 4) for x in (codes, zeros))
        parts = {"qweight": packed, "qzeros": stored, "scales": scales.T}
    else:
        parts = {"weight_scale": scales}
        if kind.format == "pack-quantized":
            parts |= {"weight_packed": words(codes, bits), "weight_shape": torch.tensor(weight.shape)}
        else:
            parts["weight"] = (codes - middle).to(torch.int8)
        if not kind.symmetric and kind.format == "pack-quantized":
            parts["weight_zero_point"] = words(zeros.T, bits).T
        elif not kind.symmetric:
            parts["weight_zero_point"] = (zeros - middle).to(torch.int8)
        if kind.ordered:
            parts["weight_g_idx"] = group_of
    return {f"{module}.{part}": tensor.contiguous() for part, tensor in parts.items()}, held


def write(path: Path, kind: Kind) -> dict[str, Tensor]:
    """A small random Llama in a format. Returns every weight that the directory holds, fp32."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps(CONFIG))
    tensors, held = {}, {}
    for name, lazy in dummy.open_directory(path).tensors.items():
        weight = lazy.read()
        ignored = kind.format.endswith("quantized") and "layers.1.self_attn.v" in name
        if not name.endswith("_proj.weight") or ignored:
            tensors[name], held[name] = weight, weight.float()
            continue
        weight = weight.float()
        weight[3, :32] = weight[3, :32].abs()  # a zero point of 0
        parts, held[name] = matrix(name, weight, kind)
        tensors |= parts
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    (path / "config.json").write_text(json.dumps({**CONFIG, "quantization_config": kind.config()}))
    return held
