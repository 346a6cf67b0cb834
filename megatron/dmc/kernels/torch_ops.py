"""The kernels as operators of PyTorch, ``torch.ops.megatron_dmc.*``, so that torch.compile and torch.export take them
as they are.

Each has the arguments of the function of its name in this package, with the tensors of the state, in the order of
``CacheState.tensors()``, in place of the state if it has one. What it writes is marked in its schema; CPU and CUDA go
through ``dispatch.py``. The functions of this package use the operators where torch.compile traces, and else call the
backend without them: a call through PyTorch's dispatcher with all these tensors costs as much as the call itself.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megatron.dmc.kernels import dispatch
from megatron.dmc.kernels.state import CacheState

NAMESPACE = "megatron_dmc"

_STATE = tuple(field.name for field in dataclasses.fields(CacheState))
_NEW_SLOTS = frozenset(_STATE) - {"free_pages"}
# What each op writes of the state, and its other arguments.
_SCHEMAS = {
    "append": (
        _NEW_SLOTS,
        "int layer, Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, Tensor slots, Tensor positions, Tensor inv_freq, "
        "float bias, float epsilon, int? window, bool compress, bool partial) -> (Tensor, Tensor, Tensor, Tensor)",
    ),
    "decode_attention": (frozenset(), "int layer, Tensor q_rot, Tensor slots, float scale) -> Tensor"),
    "prefill_attention": (
        frozenset(),
        "int layer, Tensor q_rot, Tensor k_part, Tensor v_part, Tensor slot_index, Tensor cu_seqlens, Tensor slots, "
        "float scale) -> Tensor",
    ),
    "fork": (_NEW_SLOTS, "Tensor source, Tensor target) -> ()"),
    "free": (frozenset({"lengths", "segment", "free_pages", "refcounts", "counters"}), "Tensor slots) -> ()"),
}
# Those without a state.
_ROWWISE = {
    "rms_norm": "Tensor x, Tensor weight, float epsilon) -> Tensor",
    "add_rms_norm": "Tensor x, Tensor delta, Tensor weight, float epsilon) -> (Tensor, Tensor)",
    "silu_and_mul": "Tensor x) -> Tensor",
}

_library = torch.library.Library(NAMESPACE, "DEF")


def _define(op: str) -> None:
    writes, arguments = _SCHEMAS[op]
    state = [f"Tensor(s{i}!) {name}" if name in writes else f"Tensor {name}" for i, name in enumerate(_STATE)]
    _library.define(f"{op}({', '.join(state)}, {arguments}", tags=(torch.Tag.pt2_compliant_tag,))

    def run(*arguments: Any) -> Any:
        state = CacheState(*arguments[: len(_STATE)])
        return dispatch.call(op, state.k_pages.device.type, state, *arguments[len(_STATE) :])

    _implement(op, run)


def _define_rowwise(op: str) -> None:
    _library.define(f"{op}({_ROWWISE[op]}", tags=(torch.Tag.pt2_compliant_tag,))
    _implement(op, lambda x, *arguments: dispatch.call(op, x.device.type, x, *arguments))


def _implement(op: str, run: Callable[..., Any]) -> None:
    for key in ("CPU", "CUDA"):
        _library.impl(op, run, key)


for _op in _SCHEMAS:
    _define(_op)
for _op in _ROWWISE:
    _define_rowwise(_op)


@torch.library.register_fake(f"{NAMESPACE}::append", lib=_library)
def _append(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q, k, v, *_, partial = arguments[len(_STATE) + 1 :]
    shape = k.shape if partial else (0,)
    return q.new_empty(q.shape), k.new_empty(shape), v.new_empty(shape), k.new_empty(shape[:2], dtype=torch.int32)


@torch.library.register_fake(f"{NAMESPACE}::decode_attention", lib=_library)
@torch.library.register_fake(f"{NAMESPACE}::prefill_attention", lib=_library)
def _attention(*arguments: Any) -> Tensor:
    q_rot = arguments[len(_STATE) + 1]
    return q_rot.new_empty(q_rot.shape)


@torch.library.register_fake(f"{NAMESPACE}::fork", lib=_library)
@torch.library.register_fake(f"{NAMESPACE}::free", lib=_library)
def _nothing(*arguments: Any) -> None:
    return None


@torch.library.register_fake(f"{NAMESPACE}::rms_norm", lib=_library)
def _rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return torch.empty_like(x)


@torch.library.register_fake(f"{NAMESPACE}::add_rms_norm", lib=_library)
def _add_rms_norm(x: Tensor, delta: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x)


@torch.library.register_fake(f"{NAMESPACE}::silu_and_mul", lib=_library)
def _silu_and_mul(x: Tensor) -> Tensor:
    return x.new_empty(x.size(0), x.size(1) // 2)


def call(op: str, state: CacheState, *arguments: Any) -> Any:
    """Run ``op`` on the backend of the state's device."""
    if torch.compiler.is_compiling():
        return getattr(getattr(torch.ops, NAMESPACE), op)(*state.tensors(), *arguments)
    return dispatch.call(op, state.k_pages.device.type, state, *arguments)


def call_rowwise(op: str, x: Tensor, *arguments: Any) -> Any:
    """Run an op without a state on the backend of x's device."""
    if torch.compiler.is_compiling():
        return getattr(getattr(torch.ops, NAMESPACE), op)(x, *arguments)
    return dispatch.call(op, x.device.type, x, *arguments)
