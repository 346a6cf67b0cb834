"""Logit distillation: the next token's loss and the divergence from a teacher, in one pass over vocab-
parallel logits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Optional

import torch
from torch import Tensor, distributed

if TYPE_CHECKING:
    from megatron.dmc.model.attention import DMCStep
    from megatron.dmc.model.gpt_model import DMCGPTModel

CHUNK = 1 << 24
"""Logits that are in fp32 at once, of student and of teacher."""


@dataclass(frozen=True)
class Distillation:
    """A teacher beside one chunk of a model: the same stage of the same layout. Not a module, so that neither the
    optimizer nor the checkpoint knows of it.
    """

    teacher: DMCGPTModel
    step: DMCStep
    """With which the teacher runs."""
    weight: float
    temperature: float


def distillation_loss(
    logits: Tensor,
    teacher: Tensor,
    labels: Tensor,
    weight: float,
    temperature: float = 1.0,
    group: Optional[Any] = None,
) -> Tensor:
    """``(1 - weight) CE + weight T^2 KL(teacher || student)`` per token (Hinton et al. 2015, arXiv 1503.02531, section
    2).

    Both softmaxes run over all rows of the (padded) vocabulary, as Megatron's own loss does. What is kept for the
    backward pass is the gradient alone, in the dtype of ``logits``; fp32 copies are made of ``CHUNK`` logits at a time.

    Args:
        logits: of the student, this rank's part of the vocabulary, [s, b, V / tp], any float dtype.
        teacher: of the teacher, the same shape; no gradient.
        labels: int64 [s, b], global ids.
        weight: of the divergence, in [0, 1].
        temperature: T, of both softmaxes in the divergence.
        group: of the tensor-parallel ranks; None: this process has the whole vocabulary.

    Returns:
        fp32 [3, s, b]: the loss, which has the gradient, and for logging its parts CE and KL (at temperature T, nats).
    """
    assert logits.shape == teacher.shape and labels.shape == logits.shape[:2]
    loss, ce, kl = _Distill.apply(logits, teacher.detach(), labels, weight, temperature, group)
    return torch.stack((loss, ce, kl))


def _reduce(x: Tensor, operation: Any, group: Optional[Any]) -> Tensor:
    if group is not None and group.size() > 1:
        distributed.all_reduce(x, operation, group=group)
    return x


class _Distill(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, teacher, labels, weight, temperature, group):
        s, _, part = logits.shape
        wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
        rank = group.rank() if group is not None else 0
        local = labels - rank * part
        here = (local >= 0) & (local < part)
        local = local.masked_fill(~here, 0)[..., None]
        rows = max(1, CHUNK // (part * logits.size(1)))
        chunks = [slice(start, min(start + rows, s)) for start in range(0, s, rows)]

        top = torch.stack((logits.amax(dim=-1), teacher.amax(dim=-1))).to(wide)
        top = _reduce(top, distributed.ReduceOp.MAX, group)[..., None]  # [2, s, b, 1]

        def shifted(at: slice) -> tuple[Tensor, Tensor]:
            return logits[at].to(wide) - top[0, at], teacher[at].to(wide) - top[1, at]

        # Sums over the vocabulary: of exp(z), exp(z / T), exp(t / T), exp(t / T) (t - z) / T, and the label's z.
        sums = torch.empty(5, *labels.shape, dtype=wide, device=logits.device)
        for at in chunks:
            z, t = shifted(at)
            sums[4, at] = z.gather(-1, local[at])[..., 0].masked_fill_(~here[at], 0.0)
            difference = t.sub(z).div_(temperature)
            sums[0, at] = z.exp().sum(dim=-1)
            sums[1, at] = z.div_(temperature).exp_().sum(dim=-1)
            weights = t.div_(temperature).exp_()
            sums[2, at] = weights.sum(dim=-1)
            sums[3, at] = weights.mul_(difference).sum(dim=-1)
        plain, warm, of_teacher, cross, label = _reduce(sums, distributed.ReduceOp.SUM, group)
        ce = plain.log() - label
        kl = cross / of_teacher - of_teacher.log() + warm.log()
        loss = (1 - weight) * ce + weight * temperature**2 * kl

        if ctx.needs_input_grad[0]:
            grad = torch.empty_like(logits, memory_format=torch.contiguous_format)
            for at in chunks:
                z, t = shifted(at)
                # d CE / dz = p - onehot; d (T^2 KL) / dz = T (p_T - q_T)
                total = t.div_(temperature).exp_().div_(of_teacher[at, :, None]).mul_(-weight * temperature)
                total.add_((z / temperature).exp_().div_(warm[at, :, None]), alpha=weight * temperature)
                if weight < 1:
                    total.add_(z.exp_().div_(plain[at, :, None]), alpha=1 - weight)
                    total.scatter_add_(-1, local[at], here[at, :, None].to(wide) * (weight - 1))
                grad[at] = total
            ctx.save_for_backward(grad)
        ctx.mark_non_differentiable(ce, kl)
        return loss, ce, kl

    @staticmethod
    def backward(ctx, upstream, *_):
        (grad,) = ctx.saved_tensors
        return grad * upstream[..., None].to(grad.dtype), None, None, None, None, None
