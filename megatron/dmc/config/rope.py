"""Scaling of rotary embeddings in ``ModelConfig.rope_scaling``: the kinds that are known, and their checks."""

import math

from megatron.dmc.config.checks import require

ROPE_SCALING = {
    "llama3": ({"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}, set()),
    "yarn": (
        {"factor", "original_max_position_embeddings"},
        {"attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"},
    ),
}
"""rope_type -> keys that it needs, keys that it may have beside them; named as in Hugging Face's config.json."""


def check_rope_scaling(scaling: dict, rotary_base: float, max_position_embeddings: int) -> None:
    """Raise ``ValueError`` for a scaling that is unknown, incomplete or does not fit the context length."""
    kind = scaling.get("rope_type")
    known = " and ".join(ROPE_SCALING)
    require(isinstance(kind, str) and kind in ROPE_SCALING, f"rope_scaling type {kind!r} is unknown; {known} are known")
    needed, optional = ROPE_SCALING[kind]
    found = set(scaling) - {"rope_type"}
    odd = sorted(map(str, needed - found | found - needed - optional))
    may = f", and may have {sorted(optional)}" if optional else ""
    require(not odd, f"rope_scaling has unknown or missing keys {odd}; {kind} needs {sorted(needed)}{may}")
    for key in sorted(found - {"truncate"}):
        require(_is_positive(scaling[key]), f"rope_scaling.{key} is {scaling[key]!r}; it must be a positive number")
    low, high = scaling.get("low_freq_factor"), scaling.get("high_freq_factor")
    require(kind != "llama3" or high > low, f"rope_scaling.high_freq_factor {high} must be above low_freq_factor {low}")
    if kind == "yarn":
        _check_yarn(scaling, rotary_base, max_position_embeddings)


def _is_positive(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value > 0


def _check_yarn(scaling: dict, rotary_base: float, max_position_embeddings: int) -> None:
    truncate, factor, original = (
        scaling.get("truncate", True),
        scaling["factor"],
        scaling["original_max_position_embeddings"],
    )
    require(isinstance(truncate, bool), f"rope_scaling.truncate is {truncate!r}; it must be true or false")
    require(factor >= 1, f"rope_scaling.factor is {factor}; YaRN stretches a context, by at least 1")
    require(original == int(original), f"rope_scaling.original_max_position_embeddings is {original}; use whole tokens")
    fast, slow = scaling.get("beta_fast", 32), scaling.get("beta_slow", 1)
    require(fast > slow, f"rope_scaling.beta_fast {fast} must be above beta_slow {slow}")
    require(rotary_base > 1, f"rotary_base is {rotary_base}; YaRN needs one above 1")
    stretched = int(original * factor)
    require(
        max_position_embeddings >= stretched,
        f"max_position_embeddings is {max_position_embeddings}, but YaRN stretches {original} tokens by {factor} to "
        f"{stretched}: set it to that at least",
    )
