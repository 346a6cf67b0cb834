"""Sampling parameters that a model's authors recommend, from its ``generation_config.json``, as vLLM takes them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron.dmc.checkpoint.formats import gguf, hf
from megatron.dmc.config.checks import one_line
from megatron.dmc.inference.sampling_params import SamplingParams

FILE = "generation_config.json"
NAMES = {
    "repetition_penalty": "repetition_penalty",
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "max_new_tokens": "max_tokens",
}
"""Keys that count and the parameters that they are, those of vLLM's ``ModelConfig.get_diff_sampling_param`` (0.33). All
others, such as ``do_sample``, are ignored; end-of-sequence tokens are read with the model."""


def default_sampling_params(
    model: str | Path, source: str = "auto", override: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Sampling parameters of requests that do not give them, by their names in :class:`SamplingParams`. ``max_tokens``
    among them is a bound on that of every request.

    Args:
        model: model directory, or GGUF file.
        source: ``auto`` for the model's own file, ``vllm`` for none, or another directory that has one.
        override: values that win, by their keys in the file.

    Raises:
        ValueError: a directory without the file, or a value that is wrong.
    """
    found: dict[str, Any] = {}
    path = gguf.small_files(Path(model if source == "auto" else source)) / FILE
    if source != "vllm" and (source != "auto" or path.is_file()):
        found = hf.read_json(path)
    if not isinstance(override or {}, Mapping):
        raise ValueError(f"--override-generation-config is {json.dumps(override)[:100]}; it must be a JSON object")
    unknown = sorted(set(override or {}) - NAMES.keys())
    if unknown:
        raise ValueError(f"--override-generation-config has the key {unknown[0]!r}; use {', '.join(NAMES)}")
    found = {**found, **(override or {})}
    params = {name: found[key] for key, name in NAMES.items() if found.get(key) is not None}
    try:
        SamplingParams(**params)
    except ValueError as error:
        raise ValueError(f"{path if source != 'vllm' else '--override-generation-config'}: {one_line(error)}") from None
    return params
