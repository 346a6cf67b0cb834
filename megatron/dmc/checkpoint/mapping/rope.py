"""YaRN (arXiv 2309.00071) in ``config.json``, as transformers reads it (4.57.6 and 5.23.0, ``modeling_rope_utils``)."""

from collections.abc import Mapping
from typing import Any

_DEFAULT_IF_ZERO = ("beta_fast", "beta_slow", "mscale", "mscale_all_dim")
_INERT = ("finetuned",)
"""Said of a model by its authors (Yarn-Llama-2); transformers does not read it."""


def yarn_scaling(rope: Mapping[str, Any], max_position_embeddings: int) -> dict[str, Any]:
    """``ModelConfig.rope_scaling`` from the rope parameters of ``config.json``, without theta and the type.

    What is left out, null or (some keys) 0 has transformers' default; ``original_max_position_embeddings`` has
    ``max_position_embeddings``.
    """
    scaling = {key: value for key, value in rope.items() if key not in _INERT and value is not None}
    scaling = {key: value for key, value in scaling.items() if value or key not in _DEFAULT_IF_ZERO}
    if "truncate" in rope:
        scaling["truncate"] = bool(rope["truncate"])  # null is false there
    return {"rope_type": "yarn", "original_max_position_embeddings": max_position_embeddings, **scaling}


def yarn_context_length(scaling: Mapping[str, Any], max_position_embeddings: int) -> int:
    """Context length of the model in tokens.

    ``max_position_embeddings`` is the length before the stretching in some published configurations (Qwen 2.5) and the
    one after it in others, so that factor x original length decides, as in vLLM.
    """
    factor, original = scaling.get("factor"), scaling["original_max_position_embeddings"]
    sizes = isinstance(factor, (int, float)) and isinstance(original, (int, float))
    return max(max_position_embeddings, int(factor * original)) if sizes else max_position_embeddings
