"""The kernels between the linear layers: sums, norms and gates of rows."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from test_kernels import (
    DTYPES,
    _backend,  # noqa: F401, the fixture
    on_backends,
)
from torch import Tensor

from megatron.dmc.kernels import add_rms_norm, rms_norm, silu_and_mul, use_backend

ONE_UNIT = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}  # in the last place, relative


def rows(count: int, width: int, dtype: torch.dtype, device: str, scale: float = 3.0) -> Tensor:
    generator = torch.Generator().manual_seed(count + width)
    return (scale * torch.randn(count, width, generator=generator)).to(dtype).to(device)


@on_backends
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("count", "width"), [(1, 64), (3, 2048), (2, 5120), (70, 40), (5, 17), (0, 64)])
def test_norm(backend, device, dtype, count, width) -> None:
    """Sums to the last bit, norms to one unit in the last place (the mean is summed in another order)."""
    x, weight = rows(count, width, dtype, device), rows(1, width, dtype, device)[0]
    delta = x.flip(-1)
    bound = ONE_UNIT[dtype]
    total, normed = add_rms_norm(x, delta, weight, 1e-5)
    assert torch.equal(total, x + delta)
    assert normed.dtype == dtype
    torch.testing.assert_close(normed, F.rms_norm(x + delta, (width,), weight, 1e-5), rtol=bound, atol=bound)
    torch.testing.assert_close(rms_norm(x, weight, 1e-5), F.rms_norm(x, (width,), weight, 1e-5), rtol=bound, atol=bound)
    again = add_rms_norm(x, delta, weight, 1e-5)
    assert torch.equal(again[1], normed)


@on_backends
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("count", "width"), [(1, 64), (3, 1408), (40, 48), (5, 17), (0, 64)])
def test_gates(backend, device, dtype, count, width) -> None:
    x = rows(count, 2 * width, dtype, device, scale=8.0)
    if count:  # far out on both sides, where exp overflows
        x[0, :6] = torch.tensor([-300.0, -90.0, -88.0, 88.0, 300.0, 0.0]).to(dtype).to(device)
    gate, up = x.chunk(2, dim=-1)
    torch.testing.assert_close(silu_and_mul(x), F.silu(gate) * up, rtol=2 * ONE_UNIT[dtype], atol=1e-6)


@on_backends
def test_numbers_that_are_none_stay_so(backend, device) -> None:
    x = rows(2, 64, torch.float32, device)
    x[1, 3] = float("nan")
    weight = torch.ones(64, device=device)
    for y in (rms_norm(x, weight, 1e-5), add_rms_norm(x, x, weight, 1e-5)[1], silu_and_mul(x)):
        assert torch.isfinite(y[0]).all()
        assert torch.isnan(y[1]).any()


@pytest.mark.parametrize(("backend", "device"), [("cpp", "cpu")])
def test_rows_that_do_not_fit_are_refused(backend, device) -> None:
    x, weight = rows(4, 64, torch.float32, device), torch.ones(64)
    with pytest.raises(ValueError, match="tensors must be of float32"):
        rms_norm(x.double(), weight.double(), 1e-5)
    for wrong in (x.t(), x[:, ::2]):
        with pytest.raises(ValueError, match="x is"):
            rms_norm(wrong, torch.ones(wrong.size(1)), 1e-5)
    with pytest.raises(ValueError, match="weight is"):
        rms_norm(x, weight[:32], 1e-5)
    with pytest.raises(ValueError, match="delta is"):
        add_rms_norm(x, x[:3], weight, 1e-5)
    with pytest.raises(ValueError, match="x is"):
        silu_and_mul(x[:, :63].contiguous())


def test_results_do_not_depend_on_threads_or_neighbours() -> None:
    x, weight = rows(300, 512, torch.float32, "cpu"), torch.rand(512)
    before = torch.get_num_threads()
    with use_backend("cpp"):
        results = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append((rms_norm(x, weight, 1e-5), silu_and_mul(x)))
        torch.set_num_threads(before)
        for one, two in zip(*results):
            assert torch.equal(one, two)
        assert torch.equal(rms_norm(x[7:8], weight, 1e-5), results[0][0][7:8])
