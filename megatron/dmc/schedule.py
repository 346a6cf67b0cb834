"""Schedules of the target CR, the decision neuron and the learning rate, as pure functions of the stage and the step.

There is no state, so resuming needs none. ``step`` counts finished optimizer steps of the stage: the first step runs
at ``step = 0``.
"""

import math

from megatron.dmc.config import COMPRESSING, OptimizerConfig, StageConfig


def train_iters(stage: StageConfig) -> int:
    """Number of optimizer steps of the stage (the authors' lengths where ``train_iters`` is not given)."""
    if stage.train_iters is not None:
        return stage.train_iters
    if stage.stage == "retrofit":
        assert stage.target_cr is not None
        return max(1, round(abs(stage.target_cr - (stage.start_cr or 1.0)) * stage.iters_per_cr))
    return {"zero_out": 250, "calibrate": 64, "finetune": 2000}[stage.stage]


def compresses(stage: StageConfig) -> bool:
    """True for the stages whose models compress."""
    return stage.stage in COMPRESSING


def target_cr(stage: StageConfig, step: int) -> float:
    """Compression ratio to reach at ``step``: linear from start to target in retrofit, then constant.

    The last step of retrofit (``step = train_iters - 1``) runs at the target itself.
    """
    if not compresses(stage):
        return 1.0
    assert stage.target_cr is not None
    if stage.stage != "retrofit":
        return stage.target_cr
    start = stage.start_cr or 1.0
    return start + (stage.target_cr - start) * min(1.0, (step + 1) / train_iters(stage))


def neuron_scale(stage: StageConfig, step: int) -> float:
    """Factor on the decision neuron's channel of q and k: 1 -> 0 over the first part of zero_out, else 1 or 0.

    ``max(0, 1 - t / (decay_fraction * T))`` of the authors' release. In the compressing stages the channel is out of
    attention for good (0); in pre-training it is an ordinary channel (1).
    """
    if stage.stage == "pretrain":
        return 1.0
    if stage.stage == "zero_out":
        return max(0.0, 1.0 - step / (stage.decay_fraction * train_iters(stage)))
    return 0.0


def learning_rate(stage: StageConfig, optimizer: OptimizerConfig, step: int) -> float:
    """Learning rate at ``step``: linear warm-up, then constant, cosine or linear down to ``min_lr`` at the end."""
    o, total = optimizer, train_iters(stage)
    if step < o.lr_warmup_iters:
        return o.lr * (step + 1) / o.lr_warmup_iters
    if o.lr_decay_style == "constant":
        return o.lr
    done = min(1.0, (step - o.lr_warmup_iters) / max(1, total - o.lr_warmup_iters))
    left = 0.5 * (1.0 + math.cos(math.pi * done)) if o.lr_decay_style == "cosine" else 1.0 - done
    return o.min_lr + (o.lr - o.min_lr) * left
