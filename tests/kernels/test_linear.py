"""Linear layers over weights in panels, against the products of torch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from megatron.dmc.inference.linear import PanelLinear
from megatron.dmc.kernels import BetweenAttention, add_rms_norm, between_attention, silu_and_mul, use_backend
from megatron.dmc.kernels.panels import pack_weight, unpack_weight

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.02}
ROWS = (0, 1, 2, 3, 11, 12, 13, 25, 97, 200)  # around the sizes of blocks and tasks
BACKENDS = ("cpp", "reference")


def make(outputs: int, inputs: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A weight, a bias and as many rows as any test wants."""
    generator = torch.Generator().manual_seed(outputs + inputs)
    weight = torch.randn(outputs, inputs, generator=generator) / inputs**0.5
    bias, x = torch.randn(outputs, generator=generator), torch.randn(max(ROWS), inputs, generator=generator)
    return weight.to(dtype), bias.to(dtype), x.to(dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(("outputs", "inputs"), [(32, 2), (40, 48), (17, 576), (160, 66)])
def test_layer_is_the_product(backend, dtype, outputs, inputs) -> None:
    """x W^T + b for any number of rows, with outputs that fill no panel."""
    weight, bias, x = make(outputs, inputs, dtype)
    with use_backend(backend):
        for rows in ROWS:
            want = x[:rows].double() @ weight.double().T
            for b in (None, bias):
                got = PanelLinear(weight, b)(x[:rows])
                exact = want if b is None else want + b.double()
                assert got.shape == exact.shape and got.dtype == dtype and got.is_contiguous()
                torch.testing.assert_close(got.double(), exact, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("width", [16, 40, 7, 96])
def test_gated_layer_is_the_gate_of_the_product(backend, dtype, width) -> None:
    """Gates far out on both sides too, where exp overflows; NaN stays NaN."""
    weight, _, x = make(2 * width, 64, dtype)
    x[3] *= 300
    x[5, 7] = float("nan")
    with use_backend(backend):
        for rows in ROWS:
            got = PanelLinear(weight, gated=True)(x[:rows])
            want = silu_and_mul(F.linear(x[:rows], weight))
            torch.testing.assert_close(got, want, rtol=4 * TOLERANCE[dtype], atol=TOLERANCE[dtype], equal_nan=True)


def test_row_does_not_depend_on_the_rows_beside_it_or_on_threads() -> None:
    before = torch.get_num_threads()
    try:
        with use_backend("cpp"):
            for dtype in TOLERANCE:
                weight, bias, x = make(100, 200, dtype)
                layer = PanelLinear(weight, bias)
                all_rows = layer(x)
                torch.set_num_threads(2)
                assert torch.equal(layer(x), all_rows)
                torch.set_num_threads(1)
                assert torch.equal(layer(x), all_rows)
                for row in (0, 7, 199):
                    assert torch.equal(layer(x[row : row + 1]), all_rows[row : row + 1])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_panels_hold_the_weight(dtype) -> None:
    weight, _, _ = make(70, 48, dtype)
    panels = pack_weight(weight)
    assert panels.is_contiguous() and panels.shape[0] == 3
    unpacked = unpack_weight(panels)
    assert torch.equal(unpacked[:70], weight) and not unpacked[70:].any()
    ids = torch.tensor([0, 69, 31, 32, 0])
    assert torch.equal(PanelLinear(weight).rows(ids), weight[ids])
    with pytest.raises(ValueError, match="no pairs of inputs"):
        pack_weight(torch.zeros(4, 3, dtype=torch.bfloat16))


def test_tensors_that_do_not_fit_are_refused() -> None:
    weight, bias, x = make(64, 48, torch.float32)
    with use_backend("cpp"):
        layer = PanelLinear(weight, bias)
        for wrong in (x[:, :40].contiguous(), x.t()[:48], x.half(), x.bfloat16(), x[0]):
            with pytest.raises(ValueError, match="x is|weight is"):
                layer(wrong)
        with pytest.raises(ValueError, match="bias is"):
            PanelLinear(weight, bias[:60])(x)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("bias", [False, True])
def test_between_attention_is_its_steps(dtype, bias) -> None:
    """To the bit in C++; the reference within rounding. Weights that do not fit are refused by name."""
    hidden, inner, mixed, outputs = 48, 40, 64, 96
    out, gate_up, down, qkv = (
        PanelLinear(make(n, k, dtype)[0], gated=gated)
        for n, k, gated in (
            (hidden, mixed, False),
            (2 * inner, hidden, True),
            (hidden, inner, False),
            (outputs, hidden, False),
        )
    )
    qkv.bias = make(outputs, 8, dtype)[1] if bias else None
    norms = [1 + make(hidden, 4, dtype)[1] / 8, 1 - make(hidden, 6, dtype)[1] / 8]
    tensors = (out.weight, norms[0], gate_up.weight, down.weight, norms[1], qkv.weight, qkv.bias)
    weights = BetweenAttention(*tensors, outputs, 1e-5)
    for rows in (0, 1, 5, 30):
        attended, x = make(8, mixed, dtype)[2][:rows], make(8, hidden, dtype)[2][:rows]
        with use_backend("cpp"):
            total, y = add_rms_norm(x, out(attended), norms[0], 1e-5)
            total, y = add_rms_norm(total, down(gate_up(y)), norms[1], 1e-5)
            for _ in range(2):
                got = between_attention(weights, attended, x)
                assert torch.equal(got[0], total) and torch.equal(got[1], qkv(y))
        with use_backend("reference"):
            for one, two in zip(between_attention(weights, attended, x), got):
                torch.testing.assert_close(one, two, rtol=8 * TOLERANCE[dtype], atol=8 * TOLERANCE[dtype])
    with use_backend("cpp"):
        with pytest.raises(ValueError, match="mixed is"):
            between_attention(weights, attended[:3], x)
        with pytest.raises(ValueError, match="down is"):
            between_attention(BetweenAttention(*tensors[:3], gate_up.weight, *tensors[4:], outputs, 1e-5), attended, x)
