"""Sections ``stage`` and ``optimizer``: what a stage trains to, and how."""

from dataclasses import dataclass
from typing import Literal, Optional

from megatron.dmc.config.checks import not_negative, one_of, positive, require

STAGES = ("pretrain", "zero_out", "calibrate", "retrofit", "finetune")
"""``pretrain`` is plain language modelling (also the control run); the others make a model that compresses, in their
order. Of zero_out and calibrate, a model needs the one that its source of decisions has."""
COMPRESSING = ("calibrate", "retrofit", "finetune")
"""Stages whose models compress."""

_PREDECESSORS: dict[str, tuple[str, ...]] = {
    "pretrain": ("none", "import", "pretrain"),
    "zero_out": ("import", "pretrain"),
    "calibrate": ("import", "pretrain"),
    "retrofit": ("zero_out", "retrofit"),
    "finetune": ("retrofit",),
}


def predecessors(stage: str, adapter: bool) -> tuple[str, ...]:
    """Stages that a stage may be initialised from (``none``: random weights, ``import``: a converted checkpoint).

    adapter: decisions come from an adapter, which takes no channel from attention, so that there is nothing to zero.
    """
    if adapter and stage in ("retrofit", "finetune"):
        return ("import", "pretrain", "calibrate", "retrofit") if stage == "retrofit" else ("calibrate", "retrofit")
    return _PREDECESSORS[stage]


@dataclass
class StageConfig:
    """One stage of the retrofit, or pre-training. Defaults are the authors' for ``retrofit`` to 2x on Llama 2 7B."""

    stage: Literal["pretrain", "zero_out", "calibrate", "retrofit", "finetune"] = "retrofit"
    """Stage to run. pretrain: plain language modelling; then, in this order: zero_out frees the decision neuron,
    retrofit raises the compression ratio, finetune holds it. calibrate fits the adapters of a frozen model to its
    target_cr by a convex problem, in place of zero_out and before, or instead of, the others."""
    train_iters: Optional[int] = None
    """Number of optimizer steps; in calibrate, of global batches that are read. Default: 250 in zero_out, 64 in
    calibrate, |target_cr - start_cr| * iters_per_cr in retrofit, 2000 in finetune; pretrain needs a number."""
    target_cr: Optional[float] = None
    """Compression ratio (tokens / slots) at the end of the stage. Required by calibrate and retrofit. Default in
    finetune: the checkpoint's."""
    start_cr: Optional[float] = None
    """Compression ratio (tokens / slots) at the start of retrofit. Default: the ratio that the checkpoint was trained
    to (1 after zero_out)."""
    iters_per_cr: int = 6000
    """Steps per unit of compression ratio in retrofit, when train_iters is not given."""
    decay_fraction: float = 0.8
    """Fraction of zero_out after which the decision neuron has reached zero."""

    def check(self) -> None:
        one_of(self, "stage", *STAGES)
        positive(self, "iters_per_cr", "train_iters")
        for name in ("target_cr", "start_cr"):
            value = getattr(self, name)
            require(value is None or value >= 1.0, f"{name} is {value}; a compression ratio is at least 1")
        require(0 < self.decay_fraction <= 1, f"decay_fraction is {self.decay_fraction}; it must be in (0, 1]")
        require(self.stage != "pretrain" or self.train_iters is not None, "stage pretrain needs train_iters")
        if self.stage == "retrofit":
            require(self.target_cr is not None, "stage retrofit needs target_cr, e.g. 4")
            require(
                self.target_cr != (self.start_cr or 1.0) or self.train_iters is not None,
                f"target_cr {self.target_cr} is what the model has already been trained to; "
                "give another, or train_iters",
            )
        elif self.stage == "calibrate":
            require(self.target_cr is not None and self.target_cr > 1, "stage calibrate needs target_cr, e.g. 4")
            enough = self.train_iters is None or self.train_iters >= 2
            require(enough, f"train_iters is {self.train_iters}; calibrate reads a batch to fit to and one to count: 2")
        elif self.stage != "finetune":
            compresses = self.target_cr is not None
            require(not compresses, f"stage {self.stage} does not compress; remove target_cr {self.target_cr}")


@dataclass
class OptimizerConfig:
    """Adam with decoupled weight decay (none on norms and biases), and the learning rate's schedule."""

    lr: float = 3e-5
    """Peak learning rate."""
    min_lr: float = 0.0
    """Learning rate at the end of a decaying schedule."""
    lr_decay_style: Literal["constant", "cosine", "linear"] = "constant"
    """Decay of the learning rate after the warmup."""
    lr_warmup_iters: int = 0
    """Number of steps in which the learning rate rises linearly to its peak."""
    adam_beta1: float = 0.9
    """Decay rate of Adam's first moment."""
    adam_beta2: float = 0.95
    """Decay rate of Adam's second moment."""
    adam_eps: float = 1e-8
    """Epsilon of Adam's denominator."""
    weight_decay: float = 0.1
    """Decoupled weight decay."""
    clip_grad: float = 1.0
    """Largest global norm of the gradient; 0 turns clipping off."""

    def check(self) -> None:
        positive(self, "lr", "adam_eps")
        require(0 <= self.min_lr <= self.lr, f"min_lr {self.min_lr} must lie between 0 and lr {self.lr}")
        for name in ("adam_beta1", "adam_beta2"):
            value = getattr(self, name)
            require(0 <= value < 1, f"{name} is {value}; it must be in [0, 1)")
        not_negative(self, "weight_decay", "clip_grad", "lr_warmup_iters")
        one_of(self, "lr_decay_style", "constant", "cosine", "linear")
