"""Tuning for CPUs: the matrix product that is taken for few rows."""

from __future__ import annotations

import pytest
import torch

from megatron.dmc.kernels.cpu_tuning import FEW_ROWS, linear


@pytest.mark.parametrize("inputs", [48, 2080])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_takes_any_number_of_rows(dtype, inputs) -> None:
    """Every way of multiplying gives x W^T + b, contiguous, and leaves x as it was."""
    generator = torch.Generator().manual_seed(0)
    weight, bias = (torch.randn(shape, generator=generator) for shape in ((40, inputs), (40,)))
    weight, bias = (weight / inputs**0.5).to(dtype), bias.to(dtype)
    for rows in (0, 1, 2, 3, 8, 9, 15, 16, 17, FEW_ROWS, FEW_ROWS + 1):
        x = torch.randn(rows, inputs, generator=generator).to(dtype)
        before, want = x.clone(), x.double() @ weight.double().T
        for b in (None, bias):
            got = linear(x, weight, b)
            exact = want if b is None else want + b.double()
            assert got.shape == exact.shape and got.dtype == dtype and got.is_contiguous()
            assert torch.allclose(got.double(), exact, rtol=0, atol=1e-5 if dtype == torch.float32 else 0.05)
        assert torch.equal(x, before)
