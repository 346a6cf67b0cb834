"""Tuning for CPUs: the matrix product that is taken for few rows."""

from __future__ import annotations

import pytest
import torch

from megatron.dmc.inference.linear import PackedLinear
from megatron.dmc.kernels import cpu_tuning
from megatron.dmc.kernels.cpu_tuning import FEW_ROWS, linear, onednn_multiplies

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.05, torch.float16: 0.005}


@pytest.mark.parametrize("inputs", [48, 2080])
@pytest.mark.parametrize("form", ["plain", "widened", "packed"])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_linear_takes_any_number_of_rows(monkeypatch, dtype, form, inputs) -> None:
    """Every way of multiplying gives x W^T + b, contiguous, and leaves x as it was."""
    if form == "packed" and not onednn_multiplies(dtype):
        pytest.skip(f"oneDNN has no product of {dtype} for this CPU")
    if form != "packed":
        monkeypatch.setattr(cpu_tuning, "onednn_multiplies", lambda _: form == "plain")
        monkeypatch.setattr(cpu_tuning, "CONVERTED", 7 * inputs)  # blocks of seven rows of the weight, the last of five
    generator = torch.Generator().manual_seed(0)
    weight, bias = (torch.randn(shape, generator=generator) for shape in ((40, inputs), (40,)))
    weight, bias = (weight / inputs**0.5).to(dtype), bias.to(dtype)
    for rows in (0, 1, 2, 3, 8, 9, 15, 16, 17, FEW_ROWS, FEW_ROWS + 1):
        x = torch.randn(rows, inputs, generator=generator).to(dtype)
        before, want = x.clone(), x.double() @ weight.double().T
        for b in (None, bias):
            got = PackedLinear(weight, b)(x) if form == "packed" else linear(x, weight, b)
            exact = want if b is None else want + b.double()
            assert got.shape == exact.shape and got.dtype == dtype and got.is_contiguous()
            assert torch.allclose(got.double(), exact, rtol=0, atol=TOLERANCE[dtype])
        assert torch.equal(x, before)


def test_memory_is_cleared_in_huge_pages() -> None:
    """All of it is zero, the ends beside whole huge pages too, and what lies around it stays."""
    whole = torch.full((5 * cpu_tuning.HUGE_PAGE_BYTES,), 7, dtype=torch.uint8)
    cpu_tuning.clear_in_huge_pages(whole[3:-5])
    assert not whole[3:-5].any() and whole[:3].eq(7).all() and whole[-5:].eq(7).all()
    few = torch.ones(10)
    cpu_tuning.clear_in_huge_pages(few)
    assert not few.any()
