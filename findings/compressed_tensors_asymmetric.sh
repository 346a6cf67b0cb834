#!/usr/bin/env bash
# compressed-tensors 0.20.0: transformers cannot load an asymmetric pack-quantized directory that the library wrote.
#
# A good engineer expects from_pretrained to take what the library's own compressor has saved, as it does with symmetric
# weights. An asymmetric directory has its zero points packed along the outputs, eight of 4 bits to an int32. On loading
# the library builds the empty model by compressing it on the meta device, where its compressor leaves zero points
# unpacked, [outputs, groups]; transformers finds another shape in the file and raises. Packing works with any other
# reader: the file itself is right, and the library's decompress_model gives the weights back.
#
# Seen (torch 2.13.0, transformers 5.24.0, random Llama of one layer, 4 bits in groups of 32):
#     symmetric:  loaded
#     asymmetric: weight_zero_point: file [8, 2], model [64, 2]
# Exit status 0 while this holds, 1 when it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    torch==2.13.0 transformers==5.24.0 compressed-tensors==0.20.0 accelerate==1.15.0 numpy==2.4.6
cat > "$folder/load.py" <<'PYTHON'
import sys
from pathlib import Path

import torch
import transformers
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
from compressed_tensors.quantization.utils import calculate_qparams
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

transformers.logging.set_verbosity(transformers.logging.CRITICAL)
SIZES = dict(hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=64)


def loads(folder, symmetric):
    """Write a directory with the library; what happens when transformers loads it."""
    torch.manual_seed(1)
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    weights = dict(num_bits=4, strategy="group", group_size=32, symmetric=symmetric)
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    config = QuantizationConfig(
        config_groups=groups, ignore=["lm_head"], format="pack-quantized", quantization_status="frozen"
    )
    apply_quantization_config(model, config)
    for module in model.modules():
        if getattr(module, "quantization_scheme", None) is not None:
            parts = module.weight.detach().unflatten(1, (-1, 32))
            args = module.quantization_scheme.weights
            scale, zero_point = calculate_qparams(parts.amin(2), parts.amax(2), args)
            module.weight_scale.data.copy_(scale)
            module.weight_zero_point.data.copy_(zero_point)
    compressor = ModelCompressor(quantization_config=config, force_compression_format="pack-quantized")
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(folder)
    name = "model.layers.0.self_attn.q_proj.weight_zero_point"
    stored = model.state_dict().get(name)
    try:
        AutoModelForCausalLM.from_pretrained(folder)
    except RuntimeError as error:
        return f"refused ({str(error)[:60]}...); zero points of q_proj in the file {list(stored.shape)}"
    return "loaded"


found = {symmetric: loads(Path(sys.argv[1]) / str(symmetric), symmetric) for symmetric in (True, False)}
for symmetric, what in found.items():
    print(f"{'symmetric' if symmetric else 'asymmetric'}: {what}")
sys.exit(not (found[True] == "loaded" and found[False].startswith("refused")))
PYTHON
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" -W ignore "$folder/load.py" "$folder" 2>/dev/null
echo "holds: only symmetric weights are loaded"
