"""Rounding of a quantized cache, channel by channel in Python, for the oracles' caches; pages read back; and two ranks
over one.
"""

from __future__ import annotations

import bisect
import json
import math
import sys
from collections.abc import Callable

import torch
from helpers.engines import Model
from helpers.processes import ROOT, run_command
from torch import Tensor

from megatron.dmc.kernels import CacheState

MARGIN = 0.01  # of logits: a closer second token may win after another rounding
KV_DTYPES = {"int8": torch.int8, "fp8_e4m3": torch.float8_e4m3fn}
# Magnitudes of float8_e4m3fn by their codes 0 to 126; 127 is NaN.
FP8 = [(1 + m / 8) * 2.0 ** (e - 7) if e else m / 8 * 2.0**-6 for e in range(16) for m in range(8)][:127]


def _nearest_fp8(x: float) -> float:
    """The nearest number of float8_e4m3fn, of two the one with the even code."""
    above = min(bisect.bisect(FP8, abs(x)), len(FP8) - 1)
    code = min((above - 1, above), key=lambda c: (abs(FP8[c] - abs(x)), c % 2))
    return math.copysign(FP8[code], x)


def rounding(kv_dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """Function from a key or value, fp32 [D], to what a cache with pages of ``kv_dtype`` holds of it."""
    most, nearest = (127, round) if kv_dtype == torch.int8 else (448, _nearest_fp8)

    def stored(x: Tensor) -> Tensor:
        channels = x.tolist()
        scale = float(torch.tensor(max(map(abs, channels)) / most).bfloat16())
        codes = [nearest(max(-most, min(most, c / scale))) if scale else 0.0 for c in channels]
        return scale * torch.tensor(codes, dtype=torch.float32)

    return stored


def poison(state: CacheState) -> CacheState:
    """Make what may not be read harmful: scales are NaN, page ids absurd."""
    for x in (state.k_scales, state.v_scales, state.ring_k, state.ring_v, state.ring_w):
        x.fill_(math.nan)
    state.page_table.fill_(2**30)
    return state


def values(state: CacheState, page: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of slots in fp32, [n, D]."""
    pools = (state.k_pages, state.k_scales), (state.v_pages, state.v_scales)
    return tuple(codes.float()[page, place] * scales[page, place].float() for codes, scales in pools)


def nearly(got: Tensor, want: Tensor, bound: float = 1e-4, share: float = 0.002, most: float = 0.03) -> None:
    """Equal within ``bound`` of the largest number, but for a share of numbers: what lies between two codes is rounded
    to the one or the other by what fp32 rounds before, and moves what depends on it by up to ``most``.
    """
    error = (got.float().cpu() - want.float()).abs() / want.float().abs().max()
    assert float(error.max()) <= most, f"{float(error.max()):.1e}"
    assert float((error > bound).float().mean()) <= share, f"{float((error > bound).float().mean()):.1e}"


def clear_answer(model: Model, name: str, prompt: tuple[int, ...], more: int) -> tuple[int, ...]:
    """Greedy tokens of a model over the oracle's cache in ``name`` of :data:`KV_DTYPES`, up to the first that another
    one comes close to.
    """
    oracle, tokens = model.exported.oracle(stored=rounding(KV_DTYPES[name])), []
    logits = oracle.run(list(prompt))[-1]
    while len(tokens) < more:
        best = logits.topk(2)
        if best.values[0] - best.values[1] < MARGIN:
            break
        tokens.append(int(best.indices[0]))
        logits = oracle.step(tokens[-1])
    return tuple(tokens)


def on_two_ranks(model: Model, name: str, **settings: object) -> dict:
    """What two tensor-parallel ranks over a cache in ``name`` of :data:`KV_DTYPES` say, the same on both and, unless
    other settings change it, the oracle's as far as that is clear: the record of tests/inference/engine_worker.py.
    """
    prompts = [model.prompt(n, seed) for seed, n in enumerate((50, 14, 3, 40))]
    limits = {"max_num_batched_tokens": 24, "max_num_seqs": 3, "prefix_cache_min_tokens": 8}
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    arguments = [json.dumps(prompts), "2", json.dumps({"kv_cache_dtype": name, **limits, **settings})]
    worker = ROOT / "tests" / "inference" / "engine_worker.py"
    done = run_command([sys.executable, *launch, str(worker), model.path, *arguments], cwd=ROOT, timeout=600)
    line = next(line for line in done.stdout.splitlines() if line.startswith("ANSWERS "))
    first, second = json.loads(line.removeprefix("ANSWERS "))
    assert first == second and first["free"]
    for prompt, got in zip(prompts, first["tokens"]):
        want = () if settings else clear_answer(model, name, prompt, len(got))
        assert tuple(got[: len(want)]) == want
    return first
