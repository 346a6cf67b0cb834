"""Configuration files of Megatron-Bridge and NeMo 2: a model's settings in megatron-core's names, as Megatron-LM's
arguments.

Megatron-Bridge writes ``run_config.yaml`` into every iteration's directory, with the settings under ``model``, flat or
with those of the layers under ``model.transformer``; NeMo 2 writes ``context/model.yaml`` beside ``weights/``, with the
settings under ``config``. Callables are mappings with their dotted name under ``_target_``.

Sources: ``src/megatron/bridge/{models/gpt_provider.py,models/gpt/model_config.py,training/utils/checkpoint_utils.py}``
of github.com/NVIDIA-NeMo/Megatron-Bridge, commit 067f987 (August 2026), and ``TransformerConfig`` of megatron-core.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Optional

import yaml

from megatron.dmc.checkpoint.formats.megatron.arguments import wrong

_RENAMED = {
    "layernorm_epsilon": "norm_epsilon",
    "layernorm_zero_centered_gamma": "apply_layernorm_1p",
    "num_moe_experts": "num_experts",
    "rope_scaling": "use_rope_scaling",
    "seq_length": "max_position_embeddings",
    "seq_len_interpolation_factor": "rotary_seq_len_interpolation_factor",
}
"""megatron-core's name -> Megatron-LM's argument."""
_SILU = ("torch.nn.functional.silu", "silu", "torch.nn.modules.activation.silu")
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "old_context_len": 8192}
"""What megatron-core's rope scaling has built in; providers of models repeat it."""


def find_run_config(checkpoint: Path) -> Optional[Path]:
    """The configuration file that belongs to a checkpoint's directory; None where there is none."""
    places = (checkpoint / "run_config.yaml", checkpoint.parent / "context" / "model.yaml")
    return next((path for path in places if path.is_file()), None)


def read_run_config(path: Path) -> dict[str, Any]:
    """The model's settings as Megatron-LM's arguments.

    Raises:
        ValueError: the file cannot be read, has no model in it, or has one that our names do not express.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {' '.join(str(error).split())[:200]}") from error
    key = "config" if path.name == "model.yaml" else "model"
    model = content.get(key) if isinstance(content, dict) else None
    if not isinstance(model, dict):
        raise wrong(path, f"has no mapping {key}", "the model's settings there")
    inner = model.get("transformer")
    settings = {**model, **inner} if isinstance(inner, dict) else dict(model)
    return _as_arguments(path, {str(name): value for name, value in settings.items()})


def _as_arguments(path: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    args = {_RENAMED.get(name, name): value for name, value in settings.items()}
    for name, value in _LLAMA3.items():
        if settings.get("rope_scaling") and settings.get(name, value) != value:
            raise wrong(f"{path}: {name}", f"is {settings[name]!r}", f"{value}, as in megatron-core's rope scaling")
    activation = settings.get("activation_func")
    if isinstance(activation, dict):
        activation = activation.get("_target_")
    if activation not in _SILU:
        raise wrong(f"{path}: activation_func", f"is {activation!r}", "silu")
    args["swiglu"] = bool(settings.get("gated_linear_unit"))
    # Megatron's models share them unless they are told not to.
    args["untie_embeddings_and_output_weights"] = not settings.get("share_embeddings_and_output_weights", True)
    args["group_query_attention"] = settings.get("num_query_groups") is not None
    return args
