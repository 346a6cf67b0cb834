"""Quantized weights in Hugging Face directories: ``quantization_config`` of ``config.json`` and the tensors that stand
in the place of a matrix, read as one :class:`~megatron.dmc.checkpoint.codes.CodedTensor` under the matrix' name.

| ``quant_method`` | read | written by |
|---|---|---|
| ``compressed-tensors`` | ``pack-quantized``, ``int-quantized``; integers of 4 or 8 bits | llm-compressor |
| ``gptq`` | ``gptq``, ``gptq_v2``; 4 or 8 bits | AutoGPTQ, GPTQModel |
| ``awq`` | ``gemm``, 4 bits | AutoAWQ, GPTQModel |

Weights alone: what also rounds activations or the cache is refused, by its key.
"""

from collections.abc import Callable, Mapping
from typing import Optional

import torch

from megatron.dmc.checkpoint import mapping
from megatron.dmc.checkpoint.fields import Fields
from megatron.dmc.checkpoint.formats.quantized import compressed_tensors, transposed
from megatron.dmc.checkpoint.tensors import Lazy

KEY = "quantization_config"
_READERS: dict[str, Callable[[Fields, dict[str, Lazy], torch.dtype], dict[str, Lazy]]] = {
    "compressed-tensors": compressed_tensors.coded_tensors,
    "gptq": transposed.gptq_tensors,
    "awq": transposed.awq_tensors,
}


def method_of(config: Mapping) -> Optional[str]:
    """``quant_method`` of a ``config.json``; None for plain weights.

    Raises:
        ValueError: one that is not read.
    """
    found = Fields(config, "config.json: ").object(KEY)
    if found is None:
        return None
    method = found.needed_text("quant_method")
    if method not in _READERS:
        found.refuse("quant_method", f"one of {', '.join(_READERS)}; or take the model that it was made from")
    return method


def decode(config: dict, tensors: dict[str, Lazy]) -> dict[str, Lazy]:
    """Tensors of a model, matrices of codes under the names that they have in a plain directory.

    Args:
        config: ``config.json`` with a ``quantization_config``.
        tensors: of its files.

    Raises:
        ValueError: settings that are not understood, by key; or tensors that do not fit together, by name.
    """
    fields = Fields(config[KEY], f"config.json: {KEY}.")
    plain = {key: value for key, value in config.items() if key != KEY}
    wanted = mapping.hf_shapes(mapping.family_of(plain), mapping.from_hf_config(plain))
    dtype = getattr(torch, mapping.model_dtype(plain) or "bfloat16")
    found = _READERS[fields.needed_text("quant_method")](fields, tensors, dtype)
    # AutoGPTQ's first versions gave every layer a bias.
    extra = [name for name in found if name.endswith("_proj.bias") and name not in wanted and name in tensors]
    return {name: lazy for name, lazy in found.items() if name not in extra or lazy.read().any()}
