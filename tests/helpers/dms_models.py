"""Small random DMS models in the files of the programs that write them: NVIDIA's, Model-Optimizer's, FastDMS's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Optional

import torch
from helpers import families
from safetensors.torch import load_file, save_file

NVIDIA = {"dms_window_size": 8, "dms_alpha_scale": 100.0, "dms_initial_alpha_offset": 5.0, "dms_cr": 8}
"""Keys of NVIDIA's release, with a small window."""
MODEL_OPTIMIZER = {
    **NVIDIA,
    "dms_separate_alpha": True,
    "dms_alpha_per": "head",
    "dms_disable_eviction": False,
    "dms_tau": 0.1,
    "dms_paged_attention_block_size": 4,
    "dms_manual_inference_mode": False,
    "dms_chunked_prefill": None,
    "dms_preallocate_for_tokens": 4096,
}
"""All keys that Model-Optimizer's configuration class saves."""
FASTDMS = {"window_size": 16, "alpha_scale": 100.0, "alpha_offset": 5.0, "target_cr": 8}
"""What FastDMS reads of its metadata."""


def edit(directory: Path, add: dict[str, Any], remove: tuple[str, ...] = ()) -> None:
    """Change keys of ``config.json``."""
    path = directory / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**{k: v for k, v in config.items() if k not in remove}, **add}))


def nvidia(directory: Path, case: str = "qwen3-untied", **keys: Any) -> Path:
    """A ``query`` release: the plain family's tensors, ``dms_*`` keys and remote code in ``auto_map``."""
    families.make(case, directory)
    auto_map = {"AutoConfig": "configuration_qwen3_dms.Qwen3Config", "AutoModelForCausalLM": "m.Qwen3ForCausalLM"}
    edit(directory, {**NVIDIA, "auto_map": auto_map, **keys})
    return directory


def model_optimizer(directory: Path, case: str = "qwen3-untied", per: str = "head", **sizes: Any) -> Path:
    """An adapter checkpoint in one file: a row per KV head whatever ``per`` says, and no ``architectures``.

    ``sizes``: keys of config.json other than the family's.
    """
    model = families.make(case, directory, shard="1GB", **sizes)
    config, generator = model.config, torch.Generator().manual_seed(3)
    tensors, dtype = load_file(directory / "model.safetensors"), next(model.parameters()).dtype
    for layer in range(config.num_hidden_layers):
        name = f"model.layers.{layer}.self_attn.dms_proj_alpha"
        weight = torch.randn(config.num_key_value_heads, config.hidden_size, generator=generator) * 0.02
        tensors[f"{name}.weight"] = weight.to(dtype)
        tensors[f"{name}_norm.weight"] = (1 + 0.1 * torch.randn(config.hidden_size, generator=generator)).to(dtype)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    auto_map = {"AutoConfig": "configuration_qwen3_dms.Qwen3ConfigDMS"}
    edit(directory, {**MODEL_OPTIMIZER, "dms_alpha_per": per, "auto_map": auto_map}, ("architectures",))
    return directory


def fastdms(directory: Path, case: str = "llama3.2", metadata: Optional[str] = "dms_metadata.json") -> Path:
    """A model of FastDMS's trainer: a Llama, and its metadata beside it or in the parent's ``training_log.json``."""
    families.make(case, directory)
    if metadata == "dms_metadata.json":
        (directory / metadata).write_text(json.dumps(FASTDMS))
    elif metadata == "training_log.json":
        config = {**FASTDMS, "model": "base", "context_len": 4096, "zeroing_steps": 2000}
        (directory.parent / metadata).write_text(json.dumps({"config": config, "log": [{"step": 1}]}))
    return directory
