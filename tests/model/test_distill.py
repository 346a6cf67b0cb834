"""Logit distillation: the loss against a dense fp32 reference, and what may be a teacher.

Layouts are in test_layouts.py, resuming in test_resume.py.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from megatron.dmc.training import distillation
from megatron.dmc.training.distillation import distillation_loss

S, B, V = 7, 3, 40


def draw(seed: int = 0, dtype=torch.float32) -> tuple:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (4 * torch.randn(S, B, V, generator=generator) + 30 for _ in range(2))
    labels, upstream = torch.randint(V, (S, B), generator=generator), torch.rand(S, B, generator=generator)
    return student.to(dtype), teacher.to(dtype), labels, upstream


def dense(student, teacher, labels, weight, temperature):
    """The definition, in full."""
    ce = F.cross_entropy(student.flatten(0, 1), labels.flatten(), reduction="none").view(S, B)
    p, q = F.log_softmax(teacher / temperature, dim=-1), F.log_softmax(student / temperature, dim=-1)
    kl = (p.exp() * (p - q)).sum(dim=-1)
    return (1 - weight) * ce + weight * temperature**2 * kl, ce, kl


@pytest.mark.parametrize("chunk", [1 << 24, 2 * B * V, 1])
@pytest.mark.parametrize("weight, temperature", [(1.0, 1.0), (0.3, 1.0), (0.7, 2.0), (1.0, 4.0), (0.0, 1.0)])
def test_loss_and_gradient_equal_the_dense_ones(weight, temperature, chunk, monkeypatch) -> None:
    monkeypatch.setattr(distillation, "CHUNK", chunk)
    student, teacher, labels, upstream = draw()
    before = student.clone(), teacher.clone()
    a, b = student.clone().requires_grad_(), student.double().requires_grad_()
    losses = distillation_loss(a, teacher, labels, weight, temperature)
    wanted = dense(b, teacher.double(), labels, weight, temperature)
    for found, want in zip(losses, wanted):
        assert torch.allclose(found.double(), want, rtol=1e-5, atol=1e-5)
    (losses[0] * upstream).sum().backward()
    (wanted[0] * upstream).sum().backward()
    assert torch.allclose(a.grad.double(), b.grad, atol=2e-6)
    assert torch.equal(student, before[0]) and torch.equal(teacher, before[1])  # nothing is written into what came in


def test_only_the_loss_has_a_gradient() -> None:
    student, teacher, labels, _ = draw()
    student, teacher = student.requires_grad_(), teacher.requires_grad_()
    distillation_loss(student, teacher, labels, 0.5)[1:].sum().backward()
    assert teacher.grad is None and (student.grad is None or not student.grad.any())


def test_gradient_in_half_precision_is_kept_in_half_precision() -> None:
    student, teacher, labels, upstream = draw(dtype=torch.bfloat16)
    student.requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append((x.dtype, x.shape)) or x, lambda x: x):
        losses = distillation_loss(student, teacher, labels, 0.7, 2.0)
    assert saved == [(torch.bfloat16, (S, B, V))]  # all that stays until the backward pass
    exact = student.detach().double().requires_grad_()
    wanted = dense(exact, teacher.double(), labels, 0.7, 2.0)
    assert losses.dtype == torch.float32 and torch.allclose(losses[0].double(), wanted[0], rtol=1e-4)
    (losses[0] * upstream).sum().backward()
    (wanted[0] * upstream).sum().backward()
    assert torch.allclose(student.grad.double(), exact.grad, rtol=1e-2, atol=1e-4)


def test_strides_of_the_teacher_do_not_matter() -> None:
    """Megatron gives logits [b, s, V]; they are not copied."""
    student, teacher, labels, _ = draw()
    transposed = teacher.transpose(0, 1).contiguous().transpose(0, 1)
    assert not transposed.is_contiguous()
    assert torch.equal(
        distillation_loss(student, transposed, labels, 0.7), distillation_loss(student, teacher, labels, 0.7)
    )


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
