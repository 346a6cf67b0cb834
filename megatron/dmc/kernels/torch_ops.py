"""The kernels as operators of PyTorch, ``torch.ops.megatron_dmc.*``, which torch.compile and torch.export take as they
are.

Each has the parameters of the function of its name in ``reference.py``, records replaced by their fields in order: its
schema is made of that function's annotations. What an op writes is marked in its schema; CPU and CUDA go through
``dispatch.py``. The functions of this package use the operators where torch.compile traces, and else call the backend
without them: a call through PyTorch's dispatcher with all these tensors costs as much as the call itself.
"""

from itertools import islice
from typing import Any, Optional, get_args, get_type_hints

import torch
from torch import Tensor

from megatron.dmc.kernels import dispatch, reference
from megatron.dmc.kernels.params import Appended, AppendParams, EvictParams
from megatron.dmc.kernels.state import CacheState

NAMESPACE = "megatron_dmc"
TYPES = {Tensor: "Tensor", int: "int", float: "float", bool: "bool", Optional[int]: "int?"}
FIELDS = {record: get_type_hints(record) for record in (CacheState, AppendParams, EvictParams, Appended)}

_POOL, _RING = frozenset({"free_pages", "refcounts", "counters"}), frozenset({"ring_k", "ring_v", "ring_w"})
_RECENT = frozenset({"recent_table", "marks"})
_ALL = frozenset(FIELDS[CacheState])
# The tensors of the state that each op writes.
WRITES: dict[str, frozenset[str]] = {
    "append": _ALL - _RECENT - {"free_pages"},
    "append_evicting": _ALL - _RING,
    "decode_attention": frozenset(),
    "prefill_attention": frozenset(),
    "fork": _ALL - {"free_pages"},
    "free": _POOL | {"lengths", "segment"},
    "rms_norm": frozenset(),
    "add_rms_norm": frozenset(),
    "silu_and_mul": frozenset(),
}

_library = torch.library.Library(NAMESPACE, "DEF")


def _schema(op: str, hints: dict[str, Any], returned: Any) -> str:
    """Schema of ``op``, of the annotations of its function: ``hints`` by parameter, and ``returned``."""
    arguments = []
    for name, kind in hints.items():
        for field, of in FIELDS.get(kind, {name: kind}).items():
            written = kind is CacheState and field in WRITES[op]
            arguments.append(f"{f'Tensor({field}!)' if written else TYPES[of]} {field}")
    results = FIELDS[returned].values() if returned in FIELDS else get_args(returned) or [returned]
    results = [TYPES[kind] for kind in results if kind is not type(None)]
    return f"{op}({', '.join(arguments)}) -> ({', '.join(results)})"


def _define(op: str) -> None:
    hints = get_type_hints(getattr(reference, op))
    returned, kinds = hints.pop("return"), list(hints.values())

    def run(*flat: Any) -> Any:
        left = iter(flat)
        arguments = [kind(*islice(left, len(FIELDS[kind]))) if kind in FIELDS else next(left) for kind in kinds]
        return dispatch.call(op, flat[0].device.type, *arguments)

    _library.define(_schema(op, hints, returned), tags=(torch.Tag.pt2_compliant_tag,))
    for key in ("CPU", "CUDA"):
        _library.impl(op, run, key)


for _op in WRITES:
    _define(_op)

_STATE = len(FIELDS[CacheState])


def _appended(q: Tensor, k: Tensor, partial: bool, recent: tuple[int, ...]) -> tuple[Tensor, ...]:
    """Outputs of an append. recent: shape of ``recent_before``."""
    shape, index = k.shape if partial else (0,), {"dtype": torch.int32}
    parts = k.new_empty(shape), k.new_empty(shape), k.new_empty(shape[:2], **index)
    return q.new_empty(q.shape), *parts, k.new_empty(recent if partial else (0,), **index)


@torch.library.register_fake(f"{NAMESPACE}::append", lib=_library)
def _append(*flat: Any) -> tuple[Tensor, ...]:
    params = AppendParams(*flat[_STATE + 1 :])
    return _appended(params.q, params.k, params.partial, (0,))


@torch.library.register_fake(f"{NAMESPACE}::append_evicting", lib=_library)
def _append_evicting(*flat: Any) -> tuple[Tensor, ...]:
    state, params = CacheState(*flat[:_STATE]), EvictParams(*flat[_STATE + 1 :])
    recent = params.rows.size(0), *state.recent_table.shape[2:]
    return _appended(params.q, params.k, params.partial, recent)


@torch.library.register_fake(f"{NAMESPACE}::decode_attention", lib=_library)
@torch.library.register_fake(f"{NAMESPACE}::prefill_attention", lib=_library)
def _attention(*flat: Any) -> Tensor:
    q_rot = flat[_STATE + 1]
    return q_rot.new_empty(q_rot.shape)


@torch.library.register_fake(f"{NAMESPACE}::fork", lib=_library)
@torch.library.register_fake(f"{NAMESPACE}::free", lib=_library)
def _nothing(*flat: Any) -> None:
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


def call(op: str, device: torch.device, *arguments: Any) -> Any:
    """Run ``op`` on the backend of a device."""
    if not torch.compiler.is_compiling():
        return dispatch.call(op, device.type, *arguments)
    flat: list[Any] = []
    for x in arguments:
        flat += x.tensors() if isinstance(x, CacheState) else x if isinstance(x, tuple) else [x]
    return getattr(getattr(torch.ops, NAMESPACE), op)(*flat)
