"""Linear layers over weights in panels, against the products of torch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from megatron.dmc.inference.linear import PanelLinear
from megatron.dmc.inference.quantization import int4_linear, int8_linear
from megatron.dmc.kernels import (
    BetweenAttention,
    add_rms_norm,
    between_attention,
    packed_linear,
    silu_and_mul,
    use_backend,
)
from megatron.dmc.kernels.panels import pack_codes, pack_weight, unpack_weight, weight_rows

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
                got = PanelLinear(pack_weight(weight, b))(x[:rows])
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
            got = PanelLinear(pack_weight(weight, gated=True))(x[:rows])
            want = silu_and_mul(F.linear(x[:rows], weight))
            torch.testing.assert_close(got, want, rtol=4 * TOLERANCE[dtype], atol=TOLERANCE[dtype], equal_nan=True)


def test_row_does_not_depend_on_the_rows_beside_it_or_on_threads() -> None:
    before = torch.get_num_threads()
    try:
        with use_backend("cpp"):
            for dtype in TOLERANCE:
                weight, bias, x = make(100, 200, dtype)
                layer = PanelLinear(pack_weight(weight, bias))
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
    packed = pack_weight(weight)
    assert packed.weight.is_contiguous() and packed.weight.shape[0] == 3 and packed.inputs == 48 and not packed.bits
    unpacked = unpack_weight(packed).flatten(0, 1)
    assert torch.equal(unpacked[:70], weight) and not unpacked[70:].any()
    ids = torch.tensor([0, 69, 31, 32, 0])
    assert torch.equal(PanelLinear(pack_weight(weight)).rows(ids), weight[ids])
    with pytest.raises(ValueError, match="no pairs of inputs"):
        pack_weight(torch.zeros(4, 3, dtype=torch.bfloat16))


def test_tensors_that_do_not_fit_are_refused() -> None:
    weight, bias, x = make(64, 48, torch.float32)
    with use_backend("cpp"):
        layer = PanelLinear(pack_weight(weight, bias))
        for wrong in (x[:, :40].contiguous(), x.t()[:48], x.half(), x.bfloat16(), x[0]):
            with pytest.raises(ValueError, match="x is|weight is"):
                layer(wrong)
        with pytest.raises(ValueError, match="bias is"):
            PanelLinear(pack_weight(weight, bias[:60]))(x)


QUANTIZED = {
    "int8": int8_linear,
    "int4": lambda *arguments: int4_linear(arguments[0], 32, *arguments[1:]),
    "int4 in groups of 64": lambda *arguments: int4_linear(arguments[0], 64, *arguments[1:]),
}


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("method", QUANTIZED)
@pytest.mark.parametrize(("outputs", "inputs"), [(64, 64), (70, 128), (34, 40)])
def test_products_of_codes_are_those_of_the_reference(method, outputs, inputs, dtype, gated) -> None:
    """Outputs that fill no panel, inputs that fill no group of 8 bits, any number of rows; NaN, infinities and zeros in
    a row stay in it.
    """
    if inputs == 40 and method != "int8":
        pytest.skip("int4 takes whole groups of inputs")
    weight, bias, x = make(outputs, inputs, dtype)
    weight[3] = 0
    x[1] = 0
    x[5, 7], x[6, 3] = float("nan"), float("inf")
    x[8] *= 1e-30
    layer = QUANTIZED[method](weight.float(), None if gated else bias, gated)
    for rows in ROWS:
        with use_backend("cpp"):
            got = layer(x[:rows])
        with use_backend("reference"):
            want = layer(x[:rows])
        assert got.shape == (rows, outputs // 2 if gated else outputs) and got.dtype == dtype and got.is_contiguous()
        # Halfway between two codes of a row the last bit of a product decides: of 16 bits often, a ten-thousandth.
        rtol, atol = 4 * TOLERANCE[dtype], max(TOLERANCE[dtype], 2e-4)
        torch.testing.assert_close(got, want, rtol=rtol, atol=atol, equal_nan=True)
        if rows > 6:
            assert got[5:7].isnan().all() and not got[:5].isnan().any()


def random_codes(outputs: int, inputs: int, bits: int, group: int, offsets: str, zero: int, of: torch.dtype):
    """(packed weight, what it stands for in fp32) of random codes."""
    generator = torch.Generator().manual_seed(4)
    codes = torch.randint(0, 2**bits, (outputs, inputs), generator=generator)
    scales = (torch.rand(outputs, inputs // group, 1, generator=generator) / 8).to(of)
    added = torch.randint(-8, 9, scales.shape, generator=generator).to(of) / (1 if offsets == "scaled" else 8)
    numbers = (codes - zero).unflatten(1, (-1, group)) * scales.float()
    if offsets != "none":
        numbers += added.float() * (scales.float() if offsets == "scaled" else 1)
        scales = torch.cat([scales, added], dim=2)
    packed = pack_codes(codes.to(torch.uint8), scales, None, bits, zero=zero, scaled=offsets == "scaled")
    return packed, numbers.flatten(1)


@pytest.mark.parametrize("of", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("offsets, zero", [("none", 8), ("added", 0), ("scaled", 8), ("scaled", 16)])
@pytest.mark.parametrize("bits, group", [(4, 32), (4, 128), (8, 32), (8, 128)])
def test_codes_with_scales_of_groups(bits, group, offsets, zero, of) -> None:
    """What codes stand for, bit for bit, by rows too; products are those of the reference."""
    packed, want = random_codes(70, 256, bits, group, offsets, zero, of)
    assert packed.bits == bits and packed.group == group
    assert torch.equal(unpack_weight(packed).flatten(0, 1)[:70], want)
    ids = torch.tensor([69, 0, 33, 33])
    assert torch.equal(weight_rows(packed, ids), want[ids])
    x = torch.randn(13, 256, generator=torch.Generator().manual_seed(5))
    for dtype, tolerance in TOLERANCE.items():
        for rows in (1, 6, 13):
            with use_backend("cpp"):
                got = packed_linear(x[:rows].to(dtype), packed)
            with use_backend("reference"):
                expected = packed_linear(x[:rows].to(dtype), packed)
            # A row that lies halfway between two codes may be rounded to either.
            assert float((got - expected).norm() / expected.norm()) <= 4 * tolerance


def test_groups_that_do_not_fit_are_refused() -> None:
    packed, _ = random_codes(64, 256, 8, 256, "none", 128, torch.float16)
    with use_backend("cpp"), pytest.raises(ValueError, match="groups of 8 bits of at most 128"):
        packed_linear(torch.randn(1, 256), packed)
    packed, _ = random_codes(64, 256, 4, 32, "none", 8, torch.float16)
    with use_backend("cpp"), pytest.raises(ValueError, match="zero is 200"):
        packed_linear(torch.randn(1, 256), packed._replace(zero=200))


@pytest.mark.parametrize("method", QUANTIZED)
def test_codes_hold_the_weight(method) -> None:
    """Within half a step of a group, or of an output, and the scales' rounding to bf16."""
    weight, _, _ = make(70, 128, torch.float32)
    packed = QUANTIZED[method](weight).packed
    unpacked = unpack_weight(packed).flatten(0, 1)
    groups = weight.unflatten(1, (packed.scales.size(1) if packed.bits == 4 else 1, -1))
    low, high = groups.aminmax(dim=2, keepdim=True)
    step = (high - low) / 15 if packed.bits == 4 else groups.abs().amax(2, keepdim=True) / 127
    error = (unpacked[:70].view_as(groups) - groups).abs() / step
    assert packed.inputs == 128 and not unpacked[70:].any() and error.max() <= (0.56 if packed.bits == 4 else 0.8)


def test_row_of_codes_does_not_depend_on_the_rows_beside_it_or_on_threads() -> None:
    before = torch.get_num_threads()
    try:
        with use_backend("cpp"):
            for make_layer in QUANTIZED.values():
                weight, bias, x = make(100, 192, torch.bfloat16)
                layer = make_layer(weight, bias)
                torch.set_num_threads(2)
                all_rows = layer(x)
                torch.set_num_threads(1)
                assert torch.equal(layer(x), all_rows)
                for row in (0, 7, 199):
                    assert torch.equal(layer(x[row : row + 1]), all_rows[row : row + 1])
    finally:
        torch.set_num_threads(before)


def test_codes_that_do_not_fit_are_refused() -> None:
    weight, bias, x = make(64, 64, torch.float32)
    with use_backend("cpp"):
        for method in ("int8", "int4"):
            packed = QUANTIZED[method](weight, bias).packed
            for inputs in (0, 32, 63):
                with pytest.raises(ValueError, match="x is"):
                    packed_linear(x[:, :inputs].contiguous(), packed)
            with pytest.raises(ValueError, match="weight is"):
                packed_linear(x, packed._replace(weight=packed.weight[:1]))
            with pytest.raises(ValueError, match="scales is"):
                packed_linear(x, packed._replace(scales=packed.scales[:1]))


PACKED = {
    "numbers": lambda weight, bias=None, gated=False: PanelLinear(pack_weight(weight, bias, gated)),
    "int8": QUANTIZED["int8"],
    "int4": QUANTIZED["int4"],
}


@pytest.mark.parametrize("form", PACKED)
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("bias", [False, True])
def test_between_attention_is_its_steps(dtype, bias, form) -> None:
    """To the bit in C++; the reference within rounding. Weights that do not fit are refused by name."""
    hidden, inner, mixed, outputs, layer = 64, 32, 96, 160, PACKED[form]
    out, gate_up = layer(make(hidden, mixed, dtype)[0]), layer(make(2 * inner, hidden, dtype)[0], None, True)
    down = layer(make(hidden, inner, dtype)[0])
    qkv = layer(make(outputs, hidden, dtype)[0], make(outputs, 8, dtype)[1] if bias else None)
    norms = [1 + make(hidden, 4, dtype)[1] / 8, 1 - make(hidden, 6, dtype)[1] / 8]
    weights = BetweenAttention(out.packed, norms[0], gate_up.packed, down.packed, norms[1], qkv.packed, 1e-5)
    for rows in (0, 1, 5, 30):
        attended, x = make(8, mixed, dtype)[2][:rows], make(8, hidden, dtype)[2][:rows]
        with use_backend("cpp"):
            total, y = add_rms_norm(x, out(attended), norms[0], 1e-5)
            total, y = add_rms_norm(total, down(gate_up(y)), norms[1], 1e-5)
            for _ in range(2):
                got = between_attention(weights, attended, x)
                assert torch.equal(got[0], total) and torch.equal(got[1], qkv(y))
        with use_backend("reference"):
            # Where steps are rounded to codes, a last bit makes a step of a code.
            tolerance = 8 * TOLERANCE[dtype] if form == "numbers" else max(0.02, 8 * TOLERANCE[dtype])
            for one, two in zip(between_attention(weights, attended, x), got):
                torch.testing.assert_close(one, two, rtol=tolerance, atol=tolerance)
    with use_backend("cpp"):
        with pytest.raises(ValueError, match="mixed is"):
            between_attention(weights, attended[:3], x)
        with pytest.raises(ValueError, match="down is of width"):
            between_attention(replace(weights, down=gate_up.packed, bound={}), attended, x)
        with pytest.raises(ValueError, match="weights are of|several dtypes|weight is"):
            other = make(outputs, hidden, torch.bfloat16 if dtype == torch.float32 else torch.float32)[0]
            between_attention(replace(weights, qkv=pack_weight(other), bound={}), attended, x)
