"""The kernels as operators of PyTorch: what their schemas and fake versions promise is true, and torch.compile takes
them whole.
"""

from __future__ import annotations

import copy

import pytest
import torch
from test_kernels import BIAS, EPSILON, SHIFTS, ints, tokens
from torch import Tensor

from megatron.dmc import kernels
from megatron.dmc.kernels import AppendParams, CacheState, EvictParams, make_state
from megatron.dmc.kernels.torch_ops import NAMESPACE

OPS = getattr(torch.ops, NAMESPACE)
DEVICES = [pytest.param("cpu", id="cpu"), pytest.param("cuda", id="cuda", marks=pytest.mark.gpu)]
OPTIONS = {"bias": BIAS, "epsilon": EPSILON, "window": 12}


def start(device: str) -> tuple[CacheState, tuple[Tensor, ...]]:
    """A cache of three rows with some tokens in rows 1 and 0, and the arguments of the step that comes next."""
    state = make_state(
        num_pages=64, max_seqs=3, num_layers=2, num_kv_heads=2, head_dim=32, max_slots=128, device=device
    )
    q, k, v = (x.to(device) for x in tokens((46,), 2, 2, 32, SHIFTS["some"]))
    inv_freq = torch.logspace(0, -3, 16, device=device)
    at = [*range(37), *range(3), 37, 3, 4, 5, 6, 7]
    steps = []
    for begin, counts in ((0, [37, 3]), (40, [1, 5])):
        end = begin + sum(counts)
        cu = ints([0, *torch.tensor(counts).cumsum(0).tolist()], device)
        steps.append(
            (q[begin:end], k[begin:end], v[begin:end], cu, ints([1, 0], device), ints(at[begin:end], device), inv_freq)
        )
    kernels.append(state, 1, AppendParams(*steps[0], **OPTIONS))
    return state, steps[1]


def step(state: CacheState, q, k, v, cu_seqlens, rows, positions, inv_freq) -> Tensor:
    params = AppendParams(q, k, v, cu_seqlens, rows, positions, inv_freq, **OPTIONS)
    done = kernels.append(state, 1, params)
    out = kernels.prefill_attention(state, 1, done, cu_seqlens, rows, 0.2)
    kernels.fork(state, rows[:1], rows[:1] + 1)
    decoded = kernels.decode_attention(state, 1, done.q_rot[:2] * 2, rows + 1, 0.2)
    kernels.free(state, rows[:1])
    x, weight = torch.cat((out, decoded)).flatten(1), torch.ones(out[0].numel(), device=out.device)
    total, normed = kernels.add_rms_norm(x, kernels.rms_norm(x, weight, 1e-5), weight, 1e-5)
    return kernels.silu_and_mul(total + normed)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "op", ["append", "append without parts", "decode_attention", "prefill_attention", "fork", "free"]
)
def test_schemas_and_fakes_are_true(device, op) -> None:
    """Nothing is written that is not marked; shapes, dtypes and strides are those that tracing was told, sizes unknown
    included.
    """
    state, arguments = start(device)
    done = kernels.append(copy.deepcopy(state), 1, AppendParams(*arguments, **OPTIONS))
    _, _, _, cu, rows, *_ = arguments
    others = {
        "append": (1, *arguments, *OPTIONS.values(), True, True),
        "append without parts": (1, *arguments, *OPTIONS.values(), True, False),
        "decode_attention": (1, done.q_rot[:2], rows, 0.2),
        "prefill_attention": (1, *done, cu, rows, 0.2),
        "fork": (ints([1], device), ints([2], device)),
        "free": (rows,),
    }
    torch.library.opcheck(getattr(OPS, op.split()[0]).default, (*state.tensors(), *others[op]))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "op", ["append_evicting", "append_evicting without parts", "decode_attention", "prefill_attention", "fork", "free"]
)
def test_schemas_and_fakes_of_an_evicting_model_are_true(device, op) -> None:
    shape = {"num_layers": 2, "num_kv_heads": 2, "head_dim": 32, "max_slots": 128, "evict_window": 20}
    state = make_state(num_pages=64, max_seqs=3, device=device, **shape)
    _, (q, k, v, cu, rows, _, inv_freq) = start(device)
    steps = []
    for at in (0, 6):
        logits, positions = torch.randn(6, 2, device=device), ints([at, *range(at, at + 5)], device)
        steps.append((q, k, v, logits, cu, rows, positions, inv_freq, False, 1))
    kernels.append_evicting(state, 1, EvictParams(*steps[0]))
    done = kernels.append_evicting(copy.deepcopy(state), 1, EvictParams(*steps[1]))
    others = {
        "append_evicting": (1, *steps[1], True),
        "append_evicting without parts": (1, *steps[1], False),
        "decode_attention": (1, done.q_rot[:2], rows, 0.2),
        "prefill_attention": (1, *done, cu, rows, 0.2),
        "fork": (ints([1], device), ints([2], device)),
        "free": (rows,),
    }
    torch.library.opcheck(getattr(OPS, op.split()[0]).default, (*state.tensors(), *others[op]))


@pytest.mark.parametrize("device", DEVICES)
def test_schemas_and_fakes_of_rows_are_true(device) -> None:
    x, weight = torch.randn(3, 32, device=device), torch.rand(32, device=device)
    for op, arguments in (
        ("rms_norm", (x, weight, 1e-5)),
        ("add_rms_norm", (x, x + 1, weight, 1e-5)),
        ("silu_and_mul", (x,)),
    ):
        torch.library.opcheck(getattr(OPS, op).default, arguments)


@pytest.mark.parametrize("device", DEVICES)
def test_compiled_step_is_the_same(device) -> None:
    state, arguments = start(device)
    twin = copy.deepcopy(state)
    want = step(state, *arguments)
    got = torch.compile(step, fullgraph=True, backend="aot_eager")(twin, *arguments)
    assert torch.equal(got, want)
    for x, y in zip(state.tensors(), twin.tensors(), strict=True):
        assert torch.equal(x, y)
    twin.check_integrity()
