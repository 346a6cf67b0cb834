"""Logit distillation: which checkpoint may be the teacher, how it runs beside the student, and the loss.

Every pipeline chunk of the student has the teacher's chunk of the same stage beside it. Between stages the teacher's
rows of the hidden state travel below the student's, in one message. A frozen model is its own teacher: the same chunk
runs twice, the first time with compression off.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Optional

import torch
from torch import Tensor, distributed

from megatron.dmc import schedule
from megatron.dmc.checkpoint.manifest import Manifest, read_manifest, resolve_checkpoint
from megatron.dmc.config import COMPRESSING, ModelConfig, RunConfig
from megatron.dmc.model import DMCGPTModel, DMCStep
from megatron.dmc.training import arguments, checkpointing
from megatron.dmc.training.model import build_chunk, transformer_config, unwrap

CHUNK = 1 << 24
"""Logits that are in fp32 at once, of the student and of the teacher."""
_FREE = ("max_position_embeddings", "init_method_std")
"""Model settings that do not change what the teacher computes on the run's sequences."""


def find_teacher(config: RunConfig) -> tuple[Path, Manifest]:
    """Find the checkpoint that ``distill_from`` names.

    Raises:
        ValueError: there is none, it compresses, it is half-way through zero_out, or it is of another model.
    """
    asked = Path(config.training.distill_from or "")
    path = resolve_checkpoint(asked)
    manifest = read_manifest(path)
    saved = RunConfig.from_dict(arguments.read_saved_config(path))
    if manifest.stage in COMPRESSING or schedule.compresses(saved.stage):
        raise ValueError(
            f"distill_from {path} is of stage {manifest.stage}, which compresses; the teacher is the original model"
        )
    if manifest.stage == "zero_out" and not manifest.finished:
        raise ValueError(f"distill_from {path} stands in the middle of zero_out; name its end, or the original model")
    student, teacher = _settings(config.model), _settings(saved.model)
    for key in sorted(student):
        if student[key] != teacher[key]:
            raise ValueError(
                f"distill_from {path} has model.{key} {teacher[key]!r}, this run {student[key]!r}; the teacher runs "
                "in the same layout and must be of the same model"
            )
    return path, manifest


def _settings(model: ModelConfig) -> dict[str, Any]:
    """Settings that the student and the teacher must share."""
    resolved = dict(num_query_groups=model.kv_heads, kv_channels=model.head_dim)
    return {key: value for key, value in (dataclasses.asdict(model) | resolved).items() if key not in _FREE}


def load_teachers(config: RunConfig, students: list[DMCGPTModel]) -> list[Teacher]:
    """Teachers for ``students``, a chunk for each; none where the run has no teacher, as in calibrate. Collective.

    A frozen model teaches itself. Else the checkpoint ``distill_from`` is loaded in the run's layout and precision; it
    has weights and nothing else: no gradients, no optimizer state, no saved activations. Raises ``ValueError`` when the
    checkpoint cannot teach this run.
    """
    if config.stage.stage == "calibrate":
        return []
    if config.training.freeze_base:
        t, step = config.training, DMCStep(compress=False)
        return [Teacher(student, step, t.distill_weight, t.distill_temperature) for student in students]
    if config.training.distill_from is None:
        return []
    path, manifest = find_teacher(config)
    settings, t = transformer_config(config), config.training
    models = []
    for student in students:
        stage = dict(vp_stage=student.vp_stage, pre_process=student.pre_process, post_process=student.post_process)
        model = build_chunk(config, settings, carry=False, **stage)
        device = next(student.parameters()).device
        models.append(model.to(device, torch.bfloat16 if t.bf16 else torch.float32).requires_grad_(False).eval())
    checkpointing.load(path, models, verify=t.verify_checkpoints)
    # The original model's last channel is an ordinary one; after zero_out it is out of attention.
    step = DMCStep(compress=False, neuron_scale=0.0 if manifest.stage == "zero_out" else 1.0)
    return [Teacher(model, step, t.distill_weight, t.distill_temperature) for model in models]


@dataclass(frozen=True)
class Teacher:
    """One pipeline chunk of the original model. Not a module: neither the optimizer nor the checkpoint knows of it."""

    model: DMCGPTModel
    """The student itself, where its base is frozen."""
    step: DMCStep
    """State that the teacher runs with."""
    weight: float
    temperature: float

    def forward_beside(self, chunk: torch.nn.Module, batch: Mapping[str, Tensor], step: DMCStep) -> Any:
        """Run one micro-batch through the teacher, then through ``chunk``, the student in Megatron's wrappers.

        Args:
            batch: tokens, position_ids and labels, int64 [b, s]; empty on stages that do not need them.
            step: state that the student runs with.

        Returns:
            What ``chunk`` returns: on the last stage with losses fp32 [3, b, s] (:func:`distillation_loss`), on the
            others the hidden state, with the teacher's rows below the student's.
        """
        student, tokens, positions = unwrap(chunk), batch.get("tokens"), batch.get("position_ids")
        received = student.decoder.input_tensor
        if not student.pre_process:
            # s rows of the student, then s of the teacher, each with the carried row after them if it has one
            rows = (received.size(0) + int(student.carry) - int(self.model.carry)) // 2
            self.model.set_input_tensor(received[rows:].detach())
        with torch.no_grad():
            output = self.model(tokens, positions, step=self.step)
        if not student.pre_process:
            student.set_input_tensor(received[:rows])
        if self.model.carry and self.model.post_process:
            output, _ = output
        if not student.post_process:
            return torch.cat((chunk(tokens, positions, step=step), output))
        # The model gives logits as [b, s, vocab / tp] -> [s, b, vocab / tp]
        loss = partial(self._loss, output.transpose(0, 1), student.pg_collection.tp)
        return chunk(tokens, positions, labels=batch["labels"], step=step, loss_function=loss)

    def _loss(self, teacher: Tensor, group: Any, labels: Tensor, logits: Tensor) -> Tensor:
        """labels [b, s], logits [s, b, vocab / tp] -> [3, b, s]."""
        losses = distillation_loss(logits, teacher, labels.t(), self.weight, self.temperature, group)
        return losses.transpose(1, 2).contiguous()  # [3, s, b] -> [3, b, s]


def distillation_loss(
    logits: Tensor,
    teacher: Tensor,
    labels: Tensor,
    weight: float,
    temperature: float = 1.0,
    group: Optional[Any] = None,
) -> Tensor:
    """``(1 - weight) CE + weight T^2 KL(teacher || student)`` per token (Hinton et al., arXiv 1503.02531, section 2).

    Both softmaxes run over all rows of the (padded) vocabulary, as Megatron's own loss does. What is kept for the
    backward pass is the gradient alone, in the dtype of ``logits``; fp32 copies are made of ``CHUNK`` logits at a time.

    Args:
        logits: the student's logits over this rank's part of the vocabulary, [s, b, V / tp], any float dtype.
        teacher: the teacher's logits, same shape; no gradient.
        labels: int64 [s, b], global ids.
        weight: share of the divergence, in [0, 1].
        temperature: T of both softmaxes in the divergence.
        group: the tensor-parallel ranks; None: this process has the whole vocabulary.

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

        # The largest logit of the student and of the teacher, over the whole vocabulary.
        top = torch.stack((logits.amax(dim=-1), teacher.amax(dim=-1))).to(wide)
        top = _reduce(top, distributed.ReduceOp.MAX, group)[..., None]  # [2, s, b, 1]

        def shifted(at: slice) -> tuple[Tensor, Tensor]:
            return logits[at].to(wide) - top[0, at], teacher[at].to(wide) - top[1, at]

        # With z the student's logits and t the teacher's, less their maxima, the sums over the vocabulary of: exp(z),
        # exp(z / T), exp(t / T), exp(t / T) (t - z) / T, and z of the label. One tensor, for one reduction.
        sums = torch.empty(5, *labels.shape, dtype=wide, device=logits.device)
        plain_sums, student_sums, teacher_sums, cross, label = sums
        for at in chunks:
            z, t = shifted(at)
            label[at] = z.gather(-1, local[at])[..., 0].masked_fill_(~here[at], 0.0)
            difference = t.sub(z).div_(temperature)
            plain_sums[at] = z.exp().sum(dim=-1)
            student_sums[at] = z.div_(temperature).exp_().sum(dim=-1)
            weights = t.div_(temperature).exp_()
            teacher_sums[at] = weights.sum(dim=-1)
            cross[at] = weights.mul_(difference).sum(dim=-1)
        _reduce(sums, distributed.ReduceOp.SUM, group)  # in place
        ce = plain_sums.log() - label
        kl = cross / teacher_sums - teacher_sums.log() + student_sums.log()
        loss = (1 - weight) * ce + weight * temperature**2 * kl

        if ctx.needs_input_grad[0]:
            grad = torch.empty_like(logits, memory_format=torch.contiguous_format)
            for at in chunks:
                z, t = shifted(at)
                # d CE / dz = p - onehot; d (T^2 KL) / dz = T (p_T - q_T)
                total = t.div_(temperature).exp_().div_(teacher_sums[at, :, None]).mul_(-weight * temperature)
                total.add_((z / temperature).exp_().div_(student_sums[at, :, None]), alpha=weight * temperature)
                if weight < 1:
                    total.add_(z.exp_().div_(plain_sums[at, :, None]), alpha=1 - weight)
                    total.scatter_add_(-1, local[at], here[at, :, None].to(wide) * (weight - 1))
                grad[at] = total
            ctx.save_for_backward(grad)
        ctx.mark_non_differentiable(ce, kl)
        return loss, ce, kl

    @staticmethod
    def backward(ctx, upstream, *_):
        (grad,) = ctx.saved_tensors
        # Written into a tensor of its own: a product's strides are free where b is 1, and with odd ones matmul repeats
        # a frozen output layer's weight for every token.
        out = torch.empty_like(grad)
        return torch.mul(grad, upstream[..., None].to(grad.dtype), out=out), None, None, None, None, None
