"""Logit distillation: which checkpoint may be the teacher, and how it runs beside the student.

Every pipeline chunk of the student has the teacher's chunk of the same stage beside it. Between stages the teacher's
rows of the hidden state travel below the student's, in one message. A frozen model is its own teacher: the same chunk
runs twice, the first time with compression off. The second pass leaves out the first window + 1 tokens of a sequence:
nothing has been evicted for them, so the first one has had them, and they have no gradient.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region, gather_from_sequence_parallel_region
from torch import Tensor

from megatron.dmc import schedule
from megatron.dmc.checkpoint.manifest import Manifest, read_manifest, resolve_checkpoint
from megatron.dmc.config import COMPRESSING, ModelConfig, RunConfig
from megatron.dmc.model import DMCGPTModel, DMCStep, SharedPrefix
from megatron.dmc.training import arguments, checkpointing
from megatron.dmc.training.distillation_loss import Distillation, distillation_loss
from megatron.dmc.training.model import build_chunk, transformer_config, unwrap

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


def shared_tokens(config: RunConfig) -> int:
    """Tokens at the head of a sequence that a frozen model computes once for teacher and student.

    None under sequence parallelism, where the rows of the other tokens would lie on other ranks than before.
    """
    tokens = config.dmc.window + 1
    possible = config.training.freeze_base and not config.parallel.sequence_parallel
    return tokens if possible and tokens < config.data.seq_length else 0


def load_teachers(config: RunConfig, students: list[DMCGPTModel]) -> list[Teacher]:
    """Teachers for ``students``, a chunk for each; none where the run has no teacher, as in calibrate. Collective.

    A frozen model teaches itself. Else the checkpoint ``distill_from`` is loaded in the run's layout and precision; it
    has weights and nothing else: no gradients, no optimizer state, no saved activations. Raises ``ValueError`` when the
    checkpoint cannot teach this run.
    """
    if config.stage.stage == "calibrate":
        return []
    mixture = Distillation(config.training.distill_weight, config.training.distill_temperature)
    if config.training.freeze_base:
        shared = shared_tokens(config)
        return [Teacher(student, DMCStep(compress=False), mixture, shared) for student in students]
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
    return [Teacher(model, step, mixture) for model in models]


@dataclass(frozen=True)
class Teacher:
    """One pipeline chunk of the original model. Not a module: neither the optimizer nor the checkpoint knows of it."""

    model: DMCGPTModel
    """The student itself, where its base is frozen."""
    step: DMCStep
    """State that the teacher runs with."""
    mixture: Distillation
    shared: int = 0
    """First tokens of a sequence that the student leaves out (:func:`shared_tokens`)."""

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
            # Rows of the student's tokens, then of the teacher's, which are more by the shared ones; each with the
            # carried row after them if it has one.
            rows = (received.size(0) - self.shared + int(student.carry) - int(self.model.carry)) // 2
            self.model.set_input_tensor(received[rows:].detach())
        teacher_step = self.step
        if self.shared:
            prefix = SharedPrefix(self.shared)
            teacher_step, step = (dataclasses.replace(x, prefix=prefix) for x in (teacher_step, step))
        with torch.no_grad():
            output = self.model(tokens, positions, step=teacher_step, head=_hidden_state)
        if tokens is not None:
            tokens, positions = tokens[:, self.shared :], positions[:, self.shared :]
        if not student.pre_process:
            student.set_input_tensor(received[:rows])
        if self.model.carry and self.model.post_process:
            output, _ = output
        if not student.post_process:
            return torch.cat((chunk(tokens, positions, step=step), output))
        return chunk(tokens, positions, step=step, head=partial(self._loss, student, output, batch["labels"].t()))

    def _loss(self, student: DMCGPTModel, teacher: Tensor, labels: Tensor, hidden: Tensor) -> Tensor:
        """Hidden states in front of the output layers [s, b, h] (s / tp under sequence parallelism), the student's
        without the shared tokens, and labels [s, b] -> [3, b, s]."""
        group = student.pg_collection.tp
        if student.config.sequence_parallel:
            # Backward sums the parts of the gradient that the ranks' rows of the vocabulary make, and scatters.
            hidden, teacher = (gather_from_sequence_parallel_region(x, group=group) for x in (hidden, teacher))
        else:
            hidden = copy_to_tensor_model_parallel_region(hidden, group=group)
        weights = student.output_weight(), self.model.output_weight()
        parts = [(hidden, teacher[self.shared :], labels[self.shared :])]
        if self.shared:
            parts.insert(0, (teacher[: self.shared], teacher[: self.shared], labels[: self.shared]))
        losses = [distillation_loss(x, weights[0], t, weights[1], y, self.mixture, group) for x, t, y in parts]
        return torch.cat(losses, dim=1).transpose(1, 2).contiguous()  # [3, s, b] -> [3, b, s]


def _hidden_state(hidden: Tensor) -> Tensor:
    """Head of a teacher, whose logits are computed where the loss is."""
    return hidden
