"""Training attention and pooling against the dense reference: output and every gradient, on CPU and CUDA."""

from __future__ import annotations

import pytest
import torch
from test_dense import EPSILON, reference_coefficients, reference_layer, reference_tables
from torch import Tensor

from megatron.dmc.ops import attention as attention_module
from megatron.dmc.ops import (
    attention_backend,
    decision_logits,
    dmc_attention,
    flash_attention,
    importance,
    logistic_noise,
    make_decisions,
    pool,
    rotate_and_split_neuron,
)
from megatron.dmc.ops.attention import mask_channel, mask_unit

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
WINDOWS = [12, 1, 3, 70, None]
FP32_TOLERANCE = {"cpu": 1e-5, "cuda": 3e-5}  # the memory-efficient kernel multiplies in three TF32 passes


def layer(q, k, v, *, bias, window, temperature=0.1, noise=None) -> Tensor:
    """The composed layer, as a model builds it."""
    d, ng = q.size(-1), k.size(1)
    cos, sin = reference_tables(d, q.size(2), torch.float64 if q.dtype == torch.float64 else torch.float32, q.device)
    decisions = make_decisions(decision_logits(k[..., -1], bias), temperature, noise)
    q, neuron = rotate_and_split_neuron(q, cos, sin, mask_channel(d))
    omega = importance(neuron, ng, bias, EPSILON)
    k, v = pool(k, v, decisions.alpha, omega, window)
    k, _ = rotate_and_split_neuron(k, cos, sin, decisions.log_keep.to(k.dtype) * mask_unit(d))
    return dmc_attention(q, k, v)


def inputs(s, g, *, ng=2, d=16, b=2, dtype=torch.float32, device="cpu", shift=0.0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(s * 31 + g)
    q, k, v = (torch.randn(b, h, s, d, generator=generator) for h in (ng * g, ng, ng))
    k[..., -1] += shift
    return tuple(x.to(device=device, dtype=dtype).requires_grad_() for x in (q, k, v))


def noise_for(x: Tensor, ng: int = 2) -> Tensor:
    ids = torch.arange(x.size(0), device=x.device)
    return logistic_noise(ids, range(ng), x.size(2), seed=1, step=2, layer=3)


def results(function, q, k, v, **options) -> dict[str, Tensor]:
    """Output and gradients in fp64; the neurons' gradients apart, so that no larger one hides them."""
    out = function(q, k, v, **options)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(5)).to(out)
    dq, dk, dv = torch.autograd.grad((out * weight).sum(), (q, k, v))
    named = {"out": out, "dq": dq[..., :-1], "d importance": dq[..., -1], "dk": dk[..., :-1], "d logit": dk[..., -1]}
    return {name: x.detach().double() for name, x in {**named, "dv": dv}.items()}


def wide(q, k, v, noise=None) -> tuple:
    return tuple(x.detach().double().requires_grad_() for x in (q, k, v)), None if noise is None else noise.double()


def check_close(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float, floor: float = 0.1) -> None:
    """Largest error over the largest value; gradients that are exactly zero (s = 1) are held to ``floor``."""
    for name in want:
        error = (got[name] - want[name]).abs().max() / want[name].abs().max().clamp_min(floor)
        assert error <= tolerance, f"{name}: relative error {error:.2e} > {tolerance:.0e}"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("relaxed", [True, False], ids=["relaxed", "hard"])
@pytest.mark.parametrize("g", [1, 2, 4])
@pytest.mark.parametrize("window", WINDOWS)
def test_layer_matches_dense_fp32(window, g, relaxed, device) -> None:
    for s in (1, 2, 63, 64, 65, 150):
        q, k, v = inputs(s, g, device=device, shift=0.5)
        noise = noise_for(q) if relaxed else None
        # tau 0.5: at 0.1 the exact gradients of d logit / d alpha are ten times the rounding of the logit itself
        options = {"bias": 0.3, "window": window, "temperature": 0.5}
        (q64, k64, v64), noise64 = wide(q, k, v, noise)
        want = results(reference_layer, q64, k64, v64, noise=noise64, **options)
        check_close(results(layer, q, k, v, noise=noise, **options), want, FP32_TOLERANCE[device])


@pytest.mark.parametrize("relaxed", [True, False], ids=["relaxed", "hard"])
@pytest.mark.parametrize("g", [1, 4])
@pytest.mark.parametrize("window", WINDOWS)
def test_layer_matches_dense_fp64(window, g, relaxed) -> None:
    for s in (2, 65, 130):
        q, k, v = inputs(s, g, dtype=torch.float64, shift=0.5)
        noise = noise_for(q).double() if relaxed else None
        options = {"bias": 0.3, "window": window, "noise": noise}
        got, want = (results(f, q, k, v, **options) for f in (layer, reference_layer))
        check_close(got, want, 1e-10)


@pytest.mark.parametrize("device", DEVICES)
def test_layer_matches_dense_at_the_defaults(device) -> None:
    """b = 5, tau = 0.1, W = 12, decisions around the threshold, saturated masks, head dimension 64."""
    q, k, v = inputs(200, 2, d=64, device=device, shift=5.0)
    noise = noise_for(q)
    (q64, k64, v64), noise64 = wide(q, k, v, noise)
    options = {"bias": 5.0, "window": 12}
    want = results(reference_layer, q64, k64, v64, noise=noise64, **options)
    # The fp32 logits carry 1e-7 * 10, which tau multiplies by 10.
    check_close(results(layer, q, k, v, noise=noise, **options), want, 3 * FP32_TOLERANCE[device])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("g", [1, 4])
@pytest.mark.parametrize("window", [12, None])
def test_layer_in_bf16_is_as_good_as_dense_bf16(window, g, device) -> None:
    for s in (65, 300):
        q, k, v = inputs(s, g, d=64, dtype=torch.bfloat16, device=device, shift=0.5)
        noise = noise_for(q)
        options = {"bias": 0.3, "window": window, "temperature": 0.5}
        (q64, k64, v64), noise64 = wide(q, k, v, noise)
        want = results(reference_layer, q64, k64, v64, noise=noise64, **options)
        dense = results(reference_layer, q, k, v, noise=noise, decide_in=torch.float32, **options)
        got = results(layer, q, k, v, noise=noise, **options)
        for name in want:
            error, allowed = ((x[name] - want[name]).norm() / want[name].norm() for x in (got, dense))
            assert error <= 2 * allowed, f"{name}: {error:.2e} > 2 x {allowed:.2e}, s = {s}"
            assert error < 0.05


@pytest.mark.parametrize("device", DEVICES)
def test_no_merges_is_plain_causal_attention(device) -> None:
    q, k, v = inputs(130, 2, d=64, device=device, shift=-9.0)
    with torch.no_grad():
        cos, sin = reference_tables(64, 130, torch.float32, q.device)
        qr, kr = (rotate_and_split_neuron(x, cos, sin, 0.0)[0] for x in (q, k))
        want = torch.nn.functional.scaled_dot_product_attention(qr, kr, v, is_causal=True, enable_gqa=True)
        assert (layer(q, k, v, bias=0.0, window=12) - want).abs().max() < 2e-6
        assert (flash_attention(qr, kr, v) - want).abs().max() < 2e-6


@pytest.mark.parametrize("device", DEVICES)
def test_plain_attention_gradients(device) -> None:
    q, k, v = inputs(70, 2, d=32, device=device)
    sdpa = lambda q, k, v: torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    (q64, k64, v64), _ = wide(q, k, v)
    check_close(results(flash_attention, q, k, v), results(sdpa, q64, k64, v64), FP32_TOLERANCE[device])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("window", WINDOWS)
def test_pool_matches_dense(window, device) -> None:
    for s in (1, 5, 64, 65, 140):
        _, k, v = inputs(s, 1, device=device)
        generator = torch.Generator().manual_seed(s)
        alpha, omega = (torch.rand(2, 2, s, generator=generator).to(device) for _ in range(2))
        alpha = torch.where(alpha > 0.8, 0.0, torch.where(alpha > 0.6, 1.0, alpha))
        alpha[..., 0] = 0
        leaves = [x.detach().requires_grad_() for x in (k, v, alpha, omega + 0.1)]
        wide_leaves = [x.detach().double().requires_grad_() for x in leaves]
        kp, vp = pool(*leaves, window)
        c = reference_coefficients(*wide_leaves[2:], window)
        outputs = []
        for pooled, xs in (((kp, vp), leaves), ((c @ wide_leaves[0], c @ wide_leaves[1]), wide_leaves)):
            gk, gv = (torch.randn(kp.shape, generator=torch.Generator().manual_seed(i)).to(pooled[0]) for i in (1, 2))
            grads = torch.autograd.grad((pooled[0] * gk + pooled[1] * gv).sum(), xs, materialize_grads=True)
            names = ("k", "v", "dk", "dv", "d alpha", "d omega")
            outputs.append({n: x.detach().double() for n, x in zip(names, (*pooled, *grads))})
        # Position 0 never merges, so the gradient there is of no consequence (but must be finite).
        assert all(torch.isfinite(x).all() for x in outputs[0].values())
        for out in outputs:
            out["d alpha"] = out["d alpha"][..., 1:] if s > 1 else torch.zeros(1)
        check_close(*outputs, FP32_TOLERANCE[device], floor=1.0)


def test_pool_takes_strided_inputs() -> None:
    _, k, v = inputs(70, 1)
    alpha, omega = torch.rand(2, 2, 70), torch.rand(2, 2, 70) + EPSILON
    for window in WINDOWS:
        want = pool(k, v, alpha, omega, window)
        buffer = torch.stack((k, v), dim=3).permute(2, 0, 1, 3, 4).contiguous()  # Megatron's [s, b, ng, 2, D]
        ks, vs = buffer.permute(1, 2, 0, 3, 4).unbind(dim=3)
        for a, b in zip(pool(ks, vs, alpha, omega, window), want):
            assert torch.allclose(a, b, atol=1e-6)


def test_attention_takes_a_strided_gradient() -> None:
    """Gradients of any strides: a model sends back a transposed view, ``sum()`` one with strides of 0."""
    q, k, v = inputs(70, 2)
    for expand in (True, False):
        grads = []
        for contiguous in (True, False):
            out = layer(q, k, v, bias=0.3, window=12, noise=noise_for(q))
            g = torch.ones(()).expand(out.shape) if expand else torch.randn(70, 2, 4, 16).permute(1, 2, 0, 3)
            torch.manual_seed(3)
            g = g if expand else torch.randn(70, 2, 4, 16).permute(1, 2, 0, 3)
            grads.append(torch.autograd.grad(out, (q, k, v), g.contiguous() if contiguous else g))
        for a, b in zip(*grads):
            assert torch.allclose(a, b, atol=1e-6)


# Finite differences, fp64. The kernels' parallel sums do not change between two calls on CPU.


def _leaves(*shapes, seed=0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]


@pytest.mark.parametrize(("window", "s"), [(1, 4), (3, 2), (3, 7), (12, 7), (3, 66), (70, 66), (None, 7), (None, 66)])
def test_gradcheck_pool(window, s) -> None:
    h, d = (1, 1) if s > 10 else (1, 2)
    k, v, alpha, omega = _leaves((1, h, s, d), (1, h, s, d), (1, h, s), (1, h, s))

    def f(k, v, alpha, omega):
        alpha = torch.cat((alpha[..., :1] * 0, alpha[..., 1:].sigmoid()), dim=-1)
        return pool(k, v, alpha, omega.sigmoid() + EPSILON, window)

    assert torch.autograd.gradcheck(f, (k, v, alpha, omega), fast_mode=s > 10)


def test_gradcheck_rotation() -> None:
    x, last = _leaves((2, 2, 3, 8), (2, 2, 3))
    cos, sin = reference_tables(8, 3, torch.float64)
    assert torch.autograd.gradcheck(lambda x, last: rotate_and_split_neuron(x, cos, sin, last), (x, last))
    assert torch.autograd.gradcheck(lambda x: rotate_and_split_neuron(x, cos, sin, 4.0), (x,))


@pytest.mark.parametrize("g", [1, 2])
def test_gradcheck_attention(g) -> None:
    """q without its last channel, whose gradient is documented to mean nothing; the mask in k's."""
    d, s = 4, 4
    q, k, v, mask = _leaves((1, 2 * g, s, d - 1), (1, 2, s, d - 1), (1, 2, s, d), (1, 2, s))

    def f(q, k, v, mask):
        q = torch.cat((q, q.new_full((*q.shape[:-1], 1), mask_channel(d))), dim=-1)
        log_keep = torch.nn.functional.logsigmoid(mask)
        return dmc_attention(q, torch.cat((k, log_keep[..., None] * mask_unit(d)), dim=-1), v)

    assert torch.autograd.gradcheck(f, (q, k, v, mask))


@pytest.mark.parametrize("window", [3, None])
@pytest.mark.parametrize("relaxed", [True, False], ids=["relaxed", "hard"])
def test_gradcheck_layer(relaxed, window) -> None:
    q, k, v = _leaves((1, 4, 6, 8), (1, 2, 6, 8), (1, 2, 6, 8), seed=2)
    noise = torch.randn(1, 2, 6, dtype=torch.float64) if relaxed else None
    f = lambda q, k, v: layer(q, k, v, bias=0.1, window=window, temperature=0.7, noise=noise)
    assert torch.autograd.gradcheck(f, (q, k, v), fast_mode=True)


# The CUDA paths where there is no CUDA: the kernels' calls against the operators' schemas and shape functions.


@pytest.mark.parametrize("g", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_cuda_backends_fit_their_operators(monkeypatch, dtype, g) -> None:
    monkeypatch.setattr(attention_module, "trouble_with", lambda name: "")
    backend = attention_backend.__wrapped__("cuda", dtype)
    monkeypatch.setattr(attention_module, "attention_backend", lambda *_: backend)
    assert backend.name == ("torch memory-efficient" if dtype == torch.float32 else "torch flash")
    for s in (1, 50, 64):
        q = torch.empty(2, 2 * g, s, 64, dtype=dtype, device="meta", requires_grad=True)
        k = torch.empty(2, 2, s, 64, dtype=dtype, device="meta", requires_grad=True)
        kv = torch.empty(2, 2, s, 128, dtype=dtype, device="meta", requires_grad=True)
        out = dmc_attention(q, k, kv[..., 64:])
        out.backward(torch.empty(s, 2, 2 * g, 64, dtype=dtype, device="meta").permute(1, 2, 0, 3))
        assert q.grad.shape == q.shape == out.shape and k.grad.shape == k.shape and kv.grad.shape == kv.shape
        assert q.grad.dtype == k.grad.dtype == kv.grad.dtype == out.dtype == dtype


def test_fp64_on_cuda_is_refused() -> None:
    with pytest.raises(ValueError, match="float64"):
        attention_backend("cuda", torch.float64)
