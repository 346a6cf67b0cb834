"""Output layer and distillation loss in one: a few hundred tokens at a time, so that the logits of a whole sequence, of
the student or of the teacher, never exist at once.

The gradient is computed in the forward pass, where the logits are, as in Liger Kernel's fused linear losses
(arXiv 2410.10989, section 3.2). With a frozen output layer it goes through the layer at once and only the hidden
state's gradient is kept: no vocabulary-sized tensor lasts longer than its few hundred tokens. An output layer that is
trained needs the logits' gradient once more in the backward pass, where the weight of each token in the loss is known;
there it is kept in the model's format.
"""

from dataclasses import dataclass
from typing import Any, Optional

import torch
from torch import Tensor, distributed

from megatron.dmc.config import DISTILLED_TOKENS
from megatron.dmc.kernels.cpu_tuning import empty_in_huge_pages


@dataclass(frozen=True)
class Distillation:
    """What the loss of a run consists of: ``(1 - weight) CE + weight T^2 KL(teacher || student)`` per token (Hinton et
    al., arXiv 1503.02531, section 2)."""

    weight: float = 1.0
    """Share of the divergence, in [0, 1]."""
    temperature: float = 1.0
    """T of both softmaxes in the divergence."""


def distillation_loss(
    hidden: Tensor,
    weight: Tensor,
    teacher: Tensor,
    teacher_weight: Tensor,
    labels: Tensor,
    mixture: Distillation,
    group: Optional[Any] = None,
) -> Tensor:
    """Losses of all tokens from the hidden states in front of the output layers.

    Both softmaxes run over all rows of the (padded) vocabulary, as Megatron's own loss does, in fp32.

    Args:
        hidden: the student's, [s, b, h], whole on every tensor-parallel rank. Its gradient is this rank's part: that of
            this rank's rows of the vocabulary.
        weight: of the student's output layer, [V / tp, h], this rank's rows.
        teacher: the teacher's hidden state, of the same shape; no gradient.
        teacher_weight: of the teacher's output layer; no gradient.
        labels: int64 [s, b], global ids.
        group: the tensor-parallel ranks; None: this process has the whole vocabulary.

    Returns:
        fp32 [3, s, b]: the loss, which has the gradient, and for logging its parts CE and KL (at temperature T, nats).
    """
    assert hidden.shape == teacher.shape and labels.shape == hidden.shape[:2]
    losses = _Distill.apply(
        hidden.flatten(0, 1),
        weight,
        teacher.detach().flatten(0, 1),
        teacher_weight.detach(),
        labels.flatten(),
        mixture,
        group,
    )
    return torch.stack(losses).view(3, *labels.shape)


def _reduce(x: Tensor, operation: Any, group: Optional[Any]) -> Tensor:
    if group is not None and group.size() > 1:
        distributed.all_reduce(x, operation, group=group)
    return x


class _Distill(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, teacher, teacher_weight, labels, mixture, group):
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        losses = torch.empty(3, labels.numel(), dtype=wide, device=hidden.device)
        grad = None
        if needs_weight:
            grad = hidden.new_empty(labels.numel(), weight.size(0))
        elif needs_hidden:
            grad = torch.empty_like(hidden, memory_format=torch.contiguous_format)
        # The same memory for all parts, in huge pages: on a CPU, fresh pages cost as much as the arithmetic on them.
        size = (min(DISTILLED_TOKENS, labels.numel()), weight.size(0))
        buffers = empty_in_huge_pages((3, *size), wide, hidden.device)
        narrow = hidden.new_empty(size) if hidden.dtype != wide else None
        for start in range(0, labels.numel(), DISTILLED_TOKENS):
            at = slice(start, start + DISTILLED_TOKENS)
            z, t, spare = buffers[:, : labels[at].numel()]
            for out, x, rows in ((z, hidden, weight), (t, teacher, teacher_weight)):
                product = out if narrow is None else narrow[: len(out)]
                torch.mm(x[at], rows.t(), out=product)
                if narrow is not None:
                    out.copy_(product)
            losses[:, at] = _losses_and_gradient(z, t, spare, labels[at], mixture, group)
            if needs_weight:
                grad[at] = z
            elif needs_hidden:
                torch.mm(z if narrow is None else narrow[: len(z)].copy_(z), weight, out=grad[at])
        ctx.needs_weight = needs_weight
        ctx.save_for_backward(*((grad, hidden, weight) if needs_weight else (grad,)))
        loss, ce, kl = losses
        ctx.mark_non_differentiable(ce, kl)
        return loss, ce, kl

    @staticmethod
    def backward(ctx, upstream, *_):
        grad, *rest = ctx.saved_tensors
        grad = grad * upstream.unsqueeze(-1).to(grad.dtype)
        if not ctx.needs_weight:
            return grad, *[None] * 6
        hidden, weight = rest
        return grad @ weight, grad.t() @ hidden, *[None] * 5


def _losses_and_gradient(
    z: Tensor, t: Tensor, spare: Tensor, labels: Tensor, mixture: Distillation, group: Any
) -> Tensor:
    """Loss, CE and KL of each token, fp32 [3, n]. ``z`` becomes the loss's gradient; ``t`` is overwritten too.

    Args:
        z, t: logits of student and teacher in fp32, [n, V / tp].
        spare: memory of the same size.
        labels: int64 [n], global ids.
    """
    share, temperature = mixture.weight, mixture.temperature
    part, rank = z.size(-1), 0 if group is None else group.rank()
    local = labels - rank * part
    here = (local >= 0) & (local < part)
    local = local.masked_fill(~here, 0).unsqueeze(-1)

    # The largest logit of the student and of the teacher, over the whole vocabulary.
    top = torch.stack((z.amax(dim=-1), t.amax(dim=-1)))
    _reduce(top, distributed.ReduceOp.MAX, group)
    z -= top[0].unsqueeze(-1)
    t -= top[1].unsqueeze(-1)

    # With z and t less their maxima, the sums over the vocabulary of: exp(z), exp(z / T), exp(t / T), exp(t / T)
    # (t - z) / T, and z of the label. One tensor, for one reduction.
    sums = torch.empty(5, labels.numel(), dtype=z.dtype, device=z.device)
    plain_sums, student_sums, teacher_sums, cross, label = sums
    label.copy_(z.gather(-1, local).squeeze(-1).masked_fill_(~here, 0.0))
    plain = None
    if temperature != 1.0:
        plain = z.exp()
        torch.sum(plain, dim=-1, out=plain_sums)
        z.div_(temperature)
        t.div_(temperature)
    difference = torch.sub(t, z, out=spare)
    z.exp_()
    t.exp_()
    torch.sum(z, dim=-1, out=student_sums)
    if plain is None:
        plain_sums.copy_(student_sums)
    torch.sum(t, dim=-1, out=teacher_sums)
    torch.sum(difference.mul_(t), dim=-1, out=cross)
    _reduce(sums, distributed.ReduceOp.SUM, group)  # in place
    ce = plain_sums.log() - label
    kl = cross / teacher_sums - teacher_sums.log() + student_sums.log()

    # d CE / dz = p - onehot; d (T^2 KL) / dz = T (p_T - q_T)
    by_student, by_teacher = (share * temperature / x.unsqueeze(-1) for x in (student_sums, teacher_sums))
    by_label = (1 - share) / plain_sums.unsqueeze(-1)
    if plain is None:
        z.mul_(by_student + by_label)
    else:
        z.mul_(by_student).addcmul_(plain, by_label)
    z.addcmul_(t, by_teacher, value=-1)
    z.scatter_add_(-1, local, here.unsqueeze(-1).to(z.dtype) * (share - 1))
    return torch.stack(((1 - share) * ce + share * temperature**2 * kl, ce, kl))
