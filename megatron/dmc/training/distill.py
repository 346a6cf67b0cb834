"""The teacher of logit distillation: the same layout's chunks of another checkpoint, beside the model's own."""

from __future__ import annotations

import torch

from megatron.dmc.config import RunConfig
from megatron.dmc.model import Distillation, DMCGPTModel, DMCStep
from megatron.dmc.training import checkpointing
from megatron.dmc.training.model import transformer_config
from megatron.dmc.training.teacher import find_teacher


def attach_teachers(config: RunConfig, students: list[DMCGPTModel]) -> None:
    """Load the checkpoint ``distill_from`` in the run's layout and precision, a chunk beside each of ``students``.
    Collective.

    The teacher has weights and nothing else: no gradients, no optimizer state, no saved activations. Raises
    ``ValueError`` when the checkpoint cannot teach this run.
    """
    path, manifest = find_teacher(config)
    settings, t = transformer_config(config), config.training
    teachers = []
    for student in students:
        teacher = DMCGPTModel(
            settings,
            config.model,
            config.dmc,
            carry=False,
            transformer_impl=t.transformer_impl,
            vp_stage=student.vp_stage,
            pre_process=student.pre_process,
            post_process=student.post_process,
        )
        device = next(student.parameters()).device
        teachers.append(teacher.to(device, torch.bfloat16 if t.bf16 else torch.float32).requires_grad_(False).eval())
    checkpointing.load(path, teachers, verify=t.verify_checkpoints)
    # The original model's last channel is an ordinary one; after zero_out it is out of attention.
    step = DMCStep(compress=False, neuron_scale=0.0 if manifest.stage == "zero_out" else 1.0)
    for student, teacher in zip(students, teachers, strict=True):
        student.distillation = Distillation(teacher, step, t.distill_weight, t.distill_temperature)
