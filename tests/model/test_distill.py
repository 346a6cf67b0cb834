"""Logit distillation: the loss against a dense fp32 reference, and what may be a teacher.

Layouts are in test_layouts.py, resuming in test_resume.py.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from megatron.dmc.training import distillation_loss as module
from megatron.dmc.training.distillation_loss import Distillation, distillation_loss

S, B, H, V = 7, 3, 16, 40


def draw(dtype=torch.float32) -> tuple:
    """Hidden states and output weights of student and teacher, labels, and the weights of tokens in the loss."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(S, B, H, generator=generator).to(dtype) for _ in range(2))
    weight, other = (torch.randn(V, H, generator=generator).to(dtype) for _ in range(2))
    labels, upstream = torch.randint(V, (S, B), generator=generator), torch.rand(S, B, generator=generator)
    return student, weight, teacher, other, labels, upstream


def dense(student, teacher, labels, weight, temperature):
    """The definition, in full."""
    ce = F.cross_entropy(student.flatten(0, 1), labels.flatten(), reduction="none").view(S, B)
    p, q = F.log_softmax(teacher / temperature, dim=-1), F.log_softmax(student / temperature, dim=-1)
    kl = (p.exp() * (p - q)).sum(dim=-1)
    return (1 - weight) * ce + weight * temperature**2 * kl, ce, kl


def fused(student, weight, teacher, other, labels, mixture):
    """The loss under test. ``other`` is ``weight`` where student and teacher share an output layer."""
    return distillation_loss(student, weight, teacher, other, labels, mixture)


@pytest.mark.parametrize("tokens", [256, 8, 1])
@pytest.mark.parametrize("trained, shared", [(False, True), (False, False), (True, False)])
@pytest.mark.parametrize("mixture", [(1.0, 1.0), (0.3, 1.0), (0.7, 2.0), (1.0, 4.0), (0.0, 1.0)])
def test_loss_and_gradients_equal_the_dense_ones(mixture, trained, shared, tokens, monkeypatch) -> None:
    monkeypatch.setattr(module, "DISTILLED_TOKENS", tokens)
    student, weight, teacher, other, labels, upstream = draw()
    other = weight if shared else other
    wide, wide_weight = student.double().requires_grad_(), weight.double().requires_grad_(trained)
    student.requires_grad_()
    weight.requires_grad_(trained)
    losses = fused(student, weight, teacher, other, labels, Distillation(*mixture))
    wanted = dense(wide @ wide_weight.t(), teacher.double() @ other.detach().double().t(), labels, *mixture)
    for found, want in zip(losses, wanted):
        assert torch.allclose(found.double(), want, rtol=1e-5, atol=1e-5)
    (losses[0] * upstream).sum().backward()
    (wanted[0] * upstream).sum().backward()
    assert torch.allclose(student.grad.double(), wide.grad, atol=2e-5)
    assert not trained or torch.allclose(weight.grad.double(), wide_weight.grad, atol=2e-5)


def test_only_the_loss_has_a_gradient() -> None:
    student, weight, teacher, other, labels, _ = draw()
    student, teacher = student.requires_grad_(), teacher.requires_grad_()
    fused(student, weight, teacher, other, labels, Distillation(0.5))[1:].sum().backward()
    assert teacher.grad is None and (student.grad is None or not student.grad.any())


@pytest.mark.parametrize("trained", [False, True])
def test_what_is_kept_until_the_backward_pass(trained) -> None:
    """Nothing of the vocabulary's size where the output layer is frozen, else the logits' gradient; in bf16."""
    student, weight, teacher, other, labels, upstream = draw(torch.bfloat16)
    student.requires_grad_()
    weight.requires_grad_(trained)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append((x.dtype, x.shape)) or x, lambda x: x):
        losses = fused(student, weight, teacher, other, labels, Distillation(0.7, 2.0))
    shapes = [(S * B, V), (S * B, H), (V, H)] if trained else [(S * B, H)]
    assert saved == [(torch.bfloat16, shape) for shape in shapes]
    wide = student.detach().double().requires_grad_()
    logits = wide @ weight.detach().double().t(), teacher.double() @ other.double().t()
    wanted = dense(*logits, labels, 0.7, 2.0)
    assert losses.dtype == torch.float32 and torch.allclose(losses[0].double(), wanted[0], rtol=5e-2, atol=5e-2)
    (losses[0] * upstream).sum().backward()
    (wanted[0] * upstream).sum().backward()
    assert torch.allclose(student.grad.double(), wide.grad, rtol=5e-2, atol=5e-2)


def test_equal_hidden_states_have_no_divergence() -> None:
    student, weight, _, _, labels, _ = draw()
    _, ce, kl = fused(student, weight, student.clone(), weight, labels, Distillation())
    assert kl.abs().max() < 1e-6 and ce.min() > 0


@pytest.mark.slow
def test_teachers(tmp_path, capsys) -> None:
    """A run beside its own starting point has nothing to learn; what cannot teach is refused before anything is
    written.
    """
    from helpers import tiny

    from megatron.dmc.training import retrofit

    data = tiny.make_data(tmp_path)
    original, zero, other = tmp_path / "original", tmp_path / "zero", tmp_path / "other"
    run = lambda name, *args, **more: tiny.run(tiny.command(data, *args, **more), tmp_path / "runs" / name)
    run("original", "pretrain", train_iters=3, save=original)
    run("zero", "zero_out", train_iters=2, init_from=original, save=zero)
    run("other", "pretrain", train_iters=1, save=other, rotary_base=500.0)
    same = run("same", "pretrain", train_iters=1, init_from=original, distill_from=original)
    (step,) = same.values().values()
    # Cancelled to rounding: the gradients' norm without a teacher is of the order of 1.
    assert abs(float.fromhex(step["distill loss"])) < 1e-6 and float.fromhex(step["grad norm"]) < 1e-4
    assert "distill loss: " in same.output()
    taught = run(
        "taught",
        "retrofit",
        target_cr=2,
        train_iters=2,
        init_from=zero,
        distill_from=original,
        save=tmp_path / "taught",
    )
    assert float.fromhex(taught.values()[1]["distill loss"]) > 1e-4

    (tmp_path / "hf").mkdir()
    (tmp_path / "hf/config.json").write_text("{}")
    new = dict(target_cr=2, train_iters=2, init_from=zero, save=tmp_path / "new")
    old = dict(target_cr=2, train_iters=2, init_from=zero, save=tmp_path / "taught")
    for message, options in {
        "is a Hugging Face directory; dmc convert import --hf": new | dict(distill_from=tmp_path / "hf"),
        "is of stage retrofit, which compresses": new | dict(distill_from=tmp_path / "taught"),
        "has model.rotary_base 500.0, this run 10000.0": new | dict(distill_from=other),
        "does not exist": new | dict(distill_from=tmp_path / "nowhere"),
        "distill_weight is 0.0": new | dict(distill_from=original, distill_weight=0.0),
        "distill_temperature is -1.0": new | dict(distill_from=original, distill_temperature=-1.0),
        "training.distill_from is None": old,
        "training.distill_weight is 0.5": old | dict(distill_from=original, distill_weight=0.5),
    }.items():
        assert retrofit.main(list(map(str, tiny.command(data, "retrofit", **options)))) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
