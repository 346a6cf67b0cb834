"""Rotary embeddings (Su et al. 2021), with the decision neuron's channel taken out of the rotation.

Half-split layout as in Hugging Face's and Megatron's Llama: channel i is rotated with channel i + D/2. The neuron is
channel D-1, whose partner is D/2-1: the neuron is zero before the rotation, so its partner is only scaled, and what
the rotation would put into channel D-1 is replaced by a value of our choice (0, or the column mask).
"""

import math
from typing import Optional

import torch
from torch import Tensor


def rotary_frequencies(dim: int, base: float, scaling: Optional[dict] = None, device=None) -> Tensor:
    """Inverse frequencies of the rotation in radians per token: fp32 [dim / 2].

    Args:
        dim: D, head dimension.
        base: theta of the model's configuration.
        scaling: as in the config.json of Llama 3.1 (rope_type llama3) or of a model with YaRN (yarn), or None. YaRN
            also scales attention: :func:`attention_factor`.
    """
    inv = 1.0 / (base ** (torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim))
    if scaling is None:
        return inv
    kept = _llama3_kept(inv, scaling) if scaling["rope_type"] == "llama3" else _yarn_kept(inv, base, scaling)
    return inv * (kept + (1.0 - kept) / scaling["factor"])


def _llama3_kept(inv: Tensor, scaling: dict) -> Tensor:
    """Share of each frequency that is kept, [dim / 2]; the rest is divided by the factor.

    Llama 3.1's published rule: wavelengths beyond the original context are stretched.
    """
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    wavelength = 2 * math.pi / inv
    ratio = scaling["original_max_position_embeddings"] / wavelength
    return ((ratio - low) / (high - low)).clamp(0.0, 1.0)


def _yarn_kept(inv: Tensor, base: float, scaling: dict) -> Tensor:
    """Share of each frequency that is kept, [dim / 2]; the rest is divided by the factor.

    YaRN, "NTK-by-parts" (arXiv 2309.00071, section 3.2): channel pairs that turn ``beta_fast`` times over the original
    context are kept, those that turn ``beta_slow`` times are stretched. Between them the share falls linearly in the
    pair's index, and the two ends are whole indices unless ``truncate`` is false, as in the authors' code.
    """
    dim, original = 2 * inv.numel(), scaling["original_max_position_embeddings"]

    def pair_that_turns(times: float) -> float:
        return dim * math.log(original / (times * 2 * math.pi)) / (2 * math.log(base))

    first, last = (pair_that_turns(scaling.get(*beta)) for beta in (("beta_fast", 32), ("beta_slow", 1)))
    if scaling.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dim - 1)
    width = last - first or 1e-3
    pairs = torch.arange(inv.numel(), dtype=torch.float32, device=inv.device)
    return 1.0 - ((pairs - first) / width).clamp(0.0, 1.0)


def attention_factor(scaling: Optional[dict]) -> float:
    """Factor on the cosines and sines, so its square is one on attention's scores: YaRN's, 1 for other rotations.

    ``0.1 ln(factor) + 1`` (arXiv 2309.00071, section 3.4), unless the configuration gives it, or gives ``mscale`` and
    ``mscale_all_dim``, whose factors are divided (DeepSeek V2, arXiv 2405.04434).
    """
    if scaling is None or scaling["rope_type"] != "yarn":
        return 1.0
    if scaling.get("attention_factor") is not None:
        return float(scaling["attention_factor"])

    def factor(weight: float) -> float:
        return 0.1 * weight * math.log(scaling["factor"]) + 1.0

    over, under = scaling.get("mscale"), scaling.get("mscale_all_dim")
    return factor(over) / factor(under) if over and under else factor(1.0)


def cos_sin(inv_freq: Tensor, positions: Tensor, factor: float = 1.0) -> tuple[Tensor, Tensor]:
    """Tables of cosines and sines for integer ``positions`` [s], times ``factor``: fp32 [s, D/2] each."""
    angle = positions.float()[:, None] * inv_freq[None, :]
    return angle.cos() * factor, angle.sin() * factor


def _rotate_into(out: Tensor, x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Write x, rotated by +angle, to ``out``; tables [s, D/2] in x's dtype."""
    half = x.size(-1) // 2
    a, b = x[..., :half], x[..., half:]
    torch.mul(a, cos, out=out[..., :half]).addcmul_(b, sin, value=-1)
    torch.mul(b, cos, out=out[..., half:]).addcmul_(a, sin)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos, sin, last):
        # The neuron's pair is not mixed: its partner sees a zero, its own channel is overwritten.
        cos, sin = cos.to(x.dtype), sin.to(x.dtype, copy=True)
        sin[..., -1] = 0
        ctx.save_for_backward(cos, sin)
        ctx.last_dtype = last.dtype if isinstance(last, Tensor) else None
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        _rotate_into(out, x, cos, sin)
        neuron = x[..., -1].clone()
        out[..., -1] = last
        return out, neuron

    @staticmethod
    def backward(ctx, grad, grad_neuron):
        cos, sin = ctx.saved_tensors
        dx = torch.empty_like(grad)
        _rotate_into(dx, grad, cos, -sin)
        dx[..., -1] = grad_neuron
        dlast = grad[..., -1].to(ctx.last_dtype) if ctx.last_dtype is not None else None
        return dx, None, None, dlast


def rotate_and_split_neuron(x: Tensor, cos: Tensor, sin: Tensor, last: Tensor | float) -> tuple[Tensor, Tensor]:
    """Rotate heads whose last channel is the decision neuron.

    Args:
        x: [b, h, s, D] raw queries or (pooled) keys; any strides.
        cos, sin: fp32 [s, D/2].
        last: what channel D-1 holds afterwards: a number, or [b, h, s].

    Returns:
        (rotated [b, h, s, D] in x's dtype, contiguous; the neuron [b, h, s] as it was in x)
    """
    return _Rotate.apply(x, cos, sin, last)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Plain rotation of all channels: [b, h, s, D] -> [b, h, s, D]."""
    half = x.size(-1) // 2
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
