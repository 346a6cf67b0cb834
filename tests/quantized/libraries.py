"""Quantized directories that their own libraries wrote, against those libraries: weights bit for bit, and the engine's
log-probabilities.

    pip install --no-deps compressed-tensors==0.20.0 gptqmodel==7.7.0    # and what they import, but for torch
    python tests/quantized/libraries.py [NAME ...]

Each case is a small random Llama that the library quantizes, packs and saves. Every matrix that is read must be the
library's own dequantized one; log-probabilities of the engine must be those of transformers' model on the library's
matrices: to 1e-3 in fp32 with the codes read as numbers, and within what rounding of rows costs over the codes
themselves. Not collected by pytest; tests/checkpoint/test_quantized_directories.py has files in the same formats.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from helpers.quantized_directories import as_numbers, log_probs

from megatron.dmc.checkpoint.codes import CodedTensor
from megatron.dmc.checkpoint.formats import hf

SIZES = dict(hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4, vocab_size=320)
COMPRESSED = {
    "pack-quantized int4 group 32": dict(num_bits=4, strategy="group", group_size=32),
    "pack-quantized int4 group 128 asymmetric": dict(num_bits=4, strategy="group", group_size=128, symmetric=False),
    "pack-quantized int4 channel": dict(num_bits=4, strategy="channel"),
    "pack-quantized int4 channel asymmetric": dict(num_bits=4, strategy="channel", symmetric=False),
    "pack-quantized int8 channel": dict(num_bits=8, strategy="channel"),
    "pack-quantized int8 group 64 asymmetric": dict(num_bits=8, strategy="group", group_size=64, symmetric=False),
    "int-quantized int8 channel": dict(num_bits=8, strategy="channel"),
    "int-quantized int8 group 32 asymmetric": dict(num_bits=8, strategy="group", group_size=32, symmetric=False),
}
TRANSPOSED = {
    f"{kind} int{bits} group {group}{'' if sym else ' asymmetric'}{' desc_act' if order else ''}": (
        kind,
        bits,
        group,
        sym,
        order,
    )
    for kind, bits, group, sym, order in [
        ("gptq", 4, 128, True, False),
        ("gptq", 4, 32, False, False),
        ("gptq", 4, -1, True, False),
        ("gptq", 8, 64, True, False),
        ("gptq", 8, -1, False, False),
        ("gptq", 4, 64, True, True),
        ("gptq_v2", 4, 64, False, False),
        ("gptq_v2", 4, 64, False, True),
        ("gptq_v2", 8, 128, False, False),
        ("awq", 4, 128, False, False),
        ("awq", 4, 32, False, False),
    ]
}


def plain_model(dtype: torch.dtype) -> LlamaForCausalLM:
    torch.manual_seed(1)
    config = LlamaConfig(num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=False, **SIZES)
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.06)
    return model.to(dtype).eval()


def write_compressed(path: Path, name: str, weights: dict) -> dict[str, Tensor]:
    """A directory of compressed-tensors, by its own code. Returns the matrices that the library reads."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
    from compressed_tensors.quantization.utils import calculate_qparams

    model = plain_model(torch.bfloat16)
    ignore = ["lm_head", "re:.*layers\\.1\\.self_attn\\.v_proj"]
    scheme = {"targets": ["Linear"], "weights": weights}
    settings = {"config_groups": {"group_0": scheme}, "ignore": ignore, "format": name.split()[0]}
    config = QuantizationConfig(**settings, quantization_status="frozen")
    apply_quantization_config(model, config)
    for module in model.modules():
        if getattr(module, "quantization_scheme", None) is None:
            continue
        args, weight = module.quantization_scheme.weights, module.weight.detach().float()
        group = args.group_size or weight.size(1)
        groups = weight.unflatten(1, (-1, group))
        scale, zero_point = calculate_qparams(groups.amin(2), groups.amax(2), args)
        module.weight_scale.data.copy_(scale)
        if hasattr(module, "weight_zero_point"):
            module.weight_zero_point.data.copy_(zero_point)
    compressor = ModelCompressor(quantization_config=config, force_compression_format=name.split()[0])
    compressor.compress_model(model)
    model.save_pretrained(path)
    compressor.update_config(path)
    for module in model.modules():
        if hasattr(module, "weight_scale"):  # its type is that of what is dequantized
            module.weight_scale.data = module.weight_scale.data.float()
    compressor.decompress_model(model)
    return {f"{n}.weight": m.weight.detach() for n, m in model.named_modules() if isinstance(m, nn.Linear)}


def quantized_parameters(weight: Tensor, bits: int, group: int, sym: bool, group_of: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and zero points, [outputs, groups], of the smallest range that holds each group."""
    group = group if group > 0 else weight.size(1)
    groups = weight[:, torch.argsort(group_of, stable=True)].unflatten(1, (-1, group))
    low, high = groups.amin(2).clamp_max(0), groups.amax(2).clamp_min(0)
    most = 2**bits - 1
    if sym:
        high = torch.maximum(-low, high)
        low = -high
    scales = ((high - low) / most).half().float()
    zeros = torch.full_like(scales, 2 ** (bits - 1)) if sym else (-low / scales).round().clamp(0, most)
    return scales, zeros


def write_transposed(path: Path, kind: str, bits: int, group: int, sym: bool, order: bool) -> dict[str, Tensor]:
    """A directory of GPTQ or AWQ, each matrix packed by GPTQModel. Returns the matrices that it dequantizes."""
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear
    from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm
    from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module

    model, tensors, matrices = plain_model(torch.float16), {}, {}
    for name, parameter in model.state_dict().items():
        module = name.removesuffix(".weight")
        if not module.endswith("_proj"):
            tensors[name] = parameter
            continue
        weight = parameter.float()
        size = group if group > 0 else weight.size(1)
        group_of = torch.arange(weight.size(1)) // size
        if order:
            seed = 3 if module.endswith(("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")) else 4
            group_of = group_of[torch.randperm(weight.size(1), generator=torch.Generator().manual_seed(seed))]
        scales, zeros = quantized_parameters(weight, bits, group, sym, group_of)
        linear = nn.Linear(weight.size(1), weight.size(0), bias=False)
        linear.weight.data = weight
        common = dict(bits=bits, group_size=group, sym=sym, desc_act=order, bias=False)
        sizes = dict(in_features=weight.size(1), out_features=weight.size(0))
        if kind == "awq":
            packed = AwqTorchLinear(**common, **sizes, register_buffers=True)
            packed.pack(linear, scales, zeros)
            matrices[name] = dequantize_gemm(
                packed.qweight, packed.qzeros, packed.scales.float(), 4, size
            ).T.contiguous()
        else:
            packed = TorchLinear(**common, **sizes, register_buffers=True)
            packed.pack_original(linear, scales, zeros, group_of.int())
            packed.qzero_format(format=2)
            half, packed.scales = packed.scales, packed.scales.float()  # its type is that of what is dequantized
            matrices[name], packed.scales = packed.dequantize_weight().T.contiguous(), half
            if kind == "gptq":
                convert_gptq_v2_to_v1_format_module(packed, argparse.Namespace(bits=bits, pack_dtype=torch.int32))
        tensors |= {f"{module}.{n}": t.contiguous() for n, t in packed.state_dict().items() if t is not None}
    config = json.loads(model.config.to_json_string())
    method = {"quant_method": "awq", "version": "gemm", "zero_point": True}
    if kind != "awq":
        method = {"quant_method": "gptq", "checkpoint_format": kind, "sym": sym, "desc_act": order}
    config["quantization_config"] = {**method, "bits": bits, "group_size": group}
    config |= {"architectures": ["LlamaForCausalLM"], "dtype": "float16"}
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    return matrices


def check(path: Path, matrices: dict[str, Tensor]) -> str:
    """Compare a directory with the library's matrices; returns a line about what was found."""
    directory = hf.open_directory(path)
    coded = {name: t for name, t in directory.tensors.items() if isinstance(t, CodedTensor)}
    model, worst = plain_model(torch.float32), 0.0
    for name, tensor in coded.items():
        tensor.dtype = torch.float32
        ours, theirs = tensor.read(), matrices[name].float()
        worst = max(worst, float((ours - theirs).abs().max() / theirs.abs().max()))
    held = {name: parameter.float() for name, parameter in load_file(path / "model.safetensors").items()}
    model.load_state_dict({n: matrices[n].float() if n in matrices else held[n] for n in model.state_dict()})
    prompt = torch.randint(0, SIZES["vocab_size"], (100,), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        scores = model(prompt[None]).logits[0, :-1].log_softmax(-1)
    want = scores.gather(1, prompt[1:, None])[:, 0]
    numbers = float((log_probs(replace(as_numbers(directory)), prompt) - want).abs().max())
    codes = (log_probs(directory, prompt) - want).abs()
    line = f"{len(coded)} matrices, largest difference {worst:.1e} of the largest weight; log-probabilities as numbers "
    line += f"{numbers:.1e}, over codes {codes.max():.1e} (mean {codes.mean():.1e})"
    assert len(coded) >= 13 and worst <= 1e-6 and numbers <= 1e-3, line
    return line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="words that the cases to run have in their names; none: all")
    args = parser.parse_args()
    for name in [*COMPRESSED, *TRANSPOSED]:
        if args.names and not any(word in name for word in args.names):
            continue
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model"
            if name in COMPRESSED:
                matrices = write_compressed(path, name, COMPRESSED[name])
            else:
                matrices = write_transposed(path, *TRANSPOSED[name])
            print(f"{name}: {check(path, matrices)}", flush=True)


if __name__ == "__main__":
    main()
