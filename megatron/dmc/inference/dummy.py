"""Random weights for a ``config.json``, to measure the speed of a model's shape (``--load-format dummy``).

The decision of a random key, query or adapter is about N(0, 1), token by token, so the decision bias alone sets how
often tokens are marked: a directory that is plain can be measured as a model of any compression ratio.
"""

import zlib
from dataclasses import replace
from pathlib import Path
from statistics import NormalDist
from typing import Optional

import torch
from torch import Tensor

from megatron.dmc.checkpoint import mapping
from megatron.dmc.checkpoint.formats import dms, hf
from megatron.dmc.config import DMCConfig

LOAD_FORMATS = ("auto", "dummy")
METHODS = {"dmc": DMCConfig(), "dms": DMCConfig(method="dms", decision_source="adapter", window=256)}
"""How models of random weights compress, by method, where their ``config.json`` says nothing of it."""


class RandomTensor(hf.Lazy):
    """Weights made on the fly, the same every time: norms 1, biases 0, matrices normal with activations near 1."""

    def __init__(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, layers: int) -> None:
        self.name, self.shape, self.dtype = name, tuple(shape), dtype
        self._constant = 0.0 if name.endswith(".bias") else 1.0
        self._std = 1.0 if name == "model.embed_tokens.weight" else shape[-1] ** -0.5
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            self._std /= (2 * layers) ** 0.5  # the residual stream stays a token's own (as in GPT-2)

    def read_into(self, out: Tensor, start: int) -> None:
        if len(self.shape) == 1:
            out.fill_(self._constant)
            return
        generator = torch.Generator(out.device).manual_seed(zlib.crc32(f"{self.name} {start}".encode()))
        out.normal_(0, self._std, generator=generator)


def bias_for(compression_ratio: float) -> float:
    """Decision bias above which a share of 1 - 1 / CR of N(0, 1) lies. Raises ``ValueError`` for a ratio up to 1."""
    if not compression_ratio > 1:
        raise ValueError(
            f"compression_ratio is {compression_ratio!r}; above 1 tokens are marked, and 1 is a plain model"
        )
    return NormalDist().inv_cdf(1 / compression_ratio)


def _compressed(config: dict, ratio: float, method: Optional[str]) -> dict:
    plain, dmc = mapping.base_config(config), mapping.dmc_from_hf_config(config)
    if dmc is None or method not in (None, dmc.method):
        dmc = METHODS[method or "dmc"]
    block = mapping.DMCBlock(
        base_model_type=mapping.family_of(plain).model_type,
        dmc=replace(dmc, decision_bias=dmc.decision_scale * bias_for(ratio)),
        stage=mapping.COMPRESSED_STAGES[-1],
        step=0,
        target_cr=ratio,
        measured_cr=ratio,
    )
    return mapping.with_block(plain, block)


def open_directory(
    path: str | Path, compression_ratio: Optional[float] = None, method: Optional[str] = None
) -> hf.HFDirectory:
    """Open a directory by its ``config.json`` alone, with random weights.

    Args:
        compression_ratio: tokens per slot of the model to make, under dms of those beyond its window; 1 makes a plain
            model, None takes what the file says.
        method: one of :data:`METHODS`; None: the file's, or dmc.

    Raises:
        ValueError: no such file, a model that is not supported, or a ratio below 1.
    """
    path = Path(path)
    config = dms.read_config(path)
    if compression_ratio == 1:
        config = mapping.base_config(config)
    elif compression_ratio is not None:
        config = _compressed(config, compression_ratio, method)
    model, dtype = mapping.from_hf_config(config), getattr(torch, mapping.model_dtype(config) or "bfloat16")
    shapes = mapping.hf_shapes(mapping.family_of(config), model)
    tensors: dict[str, hf.Lazy] = {n: RandomTensor(n, shape, dtype, model.num_layers) for n, shape in shapes.items()}
    return hf.HFDirectory(path, config, tensors, {})
