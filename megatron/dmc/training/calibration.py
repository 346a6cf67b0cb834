"""Calibration: adapters of a frozen model fitted in closed form, to what each token's eviction would cost.

The cost of evicting a token from a KV head is read off a backward pass. Evicting token j adds a mask to its column for
every query beyond the window; the gradient g of the loss with respect to that mask, squared, where the labels are drawn
from the model's own distribution, is an estimate of the diagonal of the Fisher information, which is to second order
how far that distribution moves (Optimal Brain Damage, LeCun et al. 1989, with the Fisher information for the Hessian,
as in arXiv 1801.05787). No mask is applied while this is measured. The text's own labels would measure surprise too;
whether they fit worse is not settled (docs/experiments.md).

An adapter is linear in what it reads, so ``log g^2`` is fitted by ridge regression, whose sums are gathered batch by
batch; nothing is stored of a batch. What all heads predict for further batches is then put in one order, and the
threshold is where the share of tokens that the target allows is kept: a head whose tokens cost little keeps few of
them. There is no gradient descent and no learning rate. How good the fit is depends on the sequences
(docs/experiments.md).

The adapter has no intercept. That of the fit, and the threshold, are made of the fit of a constant, which the hidden
state, RMS-normalised, holds well enough.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Optional

import torch
from megatron.core import parallel_state
from torch import Tensor, distributed

from megatron.dmc.config import RunConfig
from megatron.dmc.model import DMCGPTModel
from megatron.dmc.ops import logistic_noise

RIDGE = 0.02
"""Penalty of the fit, as a share of the mean square of what adapters read, per row."""
FLOOR = 1e-12
"""Least cost that counts, in nats squared: below it a token is worth nothing."""
SHARPNESS = 2.0
"""Logits per nat of predicted log cost. Decisions hardly depend on it (only where the fit of the constant is off); what
the noise of later training can turn does: logits some units from the threshold are decided, those near it are open."""
COUNTING = 8
"""One batch in so many is not fitted to, but finds the threshold."""
CHUNK = 1 << 24
"""Logits that are in fp32 at once while labels are drawn."""
_BINS, _LOW, _HIGH = 1 << 14, -64.0, 64.0
"""Histogram of predicted log costs."""


@dataclass
class _Fit:
    """Normal equations of one layer: sums over rows, fp64. ``heads``: KV heads of this rank, or 1 for the layer."""

    gram: Tensor
    """[h, h], of products of what the adapter reads."""
    cross: Tensor
    """[h, heads], of its products with log costs."""
    ones: Tensor
    """[h], of its products with 1."""
    cost: Optional[Tensor] = None
    """Solution: weights of the predicted log cost, fp32 [heads, h]."""
    one: Optional[Tensor] = None
    """Solution: weights of the constant 1, fp32 [h]."""

    @classmethod
    def empty(cls, width: int, heads: int, device: torch.device) -> _Fit:
        shapes = (width, width), (width, heads), (width,)
        return cls(*(torch.zeros(shape, dtype=torch.float64, device=device) for shape in shapes))

    def add(self, rows: Tensor, log_cost: Tensor) -> None:
        """rows: fp32 [n, h]; log_cost: fp32 [n, heads]."""
        self.gram += rows.T @ rows
        self.cross += rows.T @ log_cost
        self.ones += rows.sum(dim=0)

    def solve(self) -> None:
        """Sum over the data-parallel ranks and solve. Collective."""
        group = parallel_state.get_data_parallel_group()
        for total in (self.gram, self.cross, self.ones):
            distributed.all_reduce(total, group=group)
        penalty = RIDGE * self.gram.diagonal().mean()
        self.gram.diagonal().add_(penalty)
        weights = torch.linalg.solve(self.gram, torch.cat((self.cross, self.ones.unsqueeze(1)), dim=1)).float()
        self.cost, self.one = weights[:, :-1].T.contiguous(), weights[:, -1].contiguous()
        self.gram = self.cross = self.ones = weights.new_empty(0)  # a wide model's take gigabytes


class Calibration:
    """Sums and solutions of the layers of this rank (``DMCStep.calibration``).

    Args:
        config: of the run; ``stage.target_cr`` is the ratio to reach, over all tokens whatever the window holds.
        device: of the model.
    """

    def __init__(self, config: RunConfig, device: torch.device) -> None:
        self.config = config
        self.layers: dict[int, _Fit] = {}
        self.fitted = False
        self._histogram = torch.zeros(_BINS, dtype=torch.float64, device=device)

    def loss(self, model: DMCGPTModel, sample_ids: Tensor, labels: Tensor, hidden: Tensor) -> Tensor:
        """Loss of labels that are drawn from the model's logits, in place of ``labels`` [b, s]: fp32 [b, s]."""
        logits = model.logits(hidden)  # [s, b, V / tp]
        if self.fitted:  # nothing depends on it
            return model.compute_language_model_loss(labels, logits)
        # Layer 0 has no heads: noise that no decision has.
        noise = logistic_noise(
            sample_ids, range(1), labels.size(1), seed=self.config.training.seed, step=0, layer=0
        ).squeeze(1)
        group = model.pg_collection.tp
        drawn = draw_labels(logits, noise, self.config.model.vocab_size, group)
        return model.compute_language_model_loss(drawn, logits)

    def watch(self, layer: int, x: Tensor, mask: Tensor) -> None:
        """Take note of one layer's part of a micro-batch.

        Args:
            layer: its number.
            x: what its adapter's linear layer reads, [s, b, h], all of the sequence.
            mask: column mask of its attention, all zeros, fp32 [b, KV heads of this rank, s]. While the fit is made,
                its gradient is waited for.
        """
        if self.fitted:
            self._count(layer, x)
        elif mask.requires_grad:  # it does not in the forward pass that recomputation runs first
            mask.register_hook(partial(self._add, layer, x))

    def _add(self, layer: int, x: Tensor, gradient: Tensor) -> None:
        # Later tokens have too few queries after them to tell what they are worth.
        half = x.size(0) // 2
        cost = gradient[..., :half].float().square()  # [b, heads, half]
        if self.config.dmc.decision_per == "layer":
            cost = cost.sum(dim=1, keepdim=True)
            distributed.all_reduce(cost, group=parallel_state.get_tensor_model_parallel_group())
        first = int(self.config.dmc.decision_about == "previous")
        rows = x[first : first + half].float().transpose(0, 1).flatten(0, 1)
        if layer not in self.layers:
            self.layers[layer] = _Fit.empty(rows.size(1), cost.size(1), rows.device)
        self.layers[layer].add(rows, (cost + FLOOR).log().transpose(1, 2).flatten(0, 1))

    def solve(self) -> None:
        """Make the fit; from here on batches count for the threshold. Collective."""
        for layer in sorted(self.layers):
            self.layers[layer].solve()
        self.fitted = True

    def _count(self, layer: int, x: Tensor) -> None:
        """Add the thresholds at which each token would just be kept to the histogram."""
        fit, bias = self.layers[layer], self.config.dmc.decision_bias
        assert fit.cost is not None and fit.one is not None
        rows = x.float().flatten(0, 1)
        one = (rows @ fit.one).clamp_min(0.1).unsqueeze(1)
        # logit = bias * (one - 1) - SHARPNESS * (cost - threshold * one), and a token is kept where it is not positive
        threshold = (rows @ fit.cost.T - bias / SHARPNESS * (one - 1)) / one
        bins = ((threshold - _LOW) * (_BINS / (_HIGH - _LOW))).long().clamp(0, _BINS - 1)
        self._histogram += torch.bincount(bins.flatten(), minlength=_BINS)

    def threshold(self) -> tuple[float, float]:
        """Log cost from which on tokens are kept, and the compression ratio on the counted batches. Collective."""
        total = self._histogram.clone()
        distributed.all_reduce(total)
        kept = total.flip(0).cumsum(0).flip(0) / total.sum()  # share of tokens in a bin and those above it
        assert self.config.stage.target_cr is not None
        index = int((kept >= 1 / self.config.stage.target_cr).sum()) - 1
        return _LOW + index * (_HIGH - _LOW) / _BINS, 1 / float(kept[index])

    def weights(self, layer: int, threshold: float) -> Tensor:
        """Weights of a layer's adapter, fp32 [KV heads of the model, h], or [1, h] for the layer. Collective."""
        fit, dmc = self.layers[layer], self.config.dmc
        assert fit.cost is not None and fit.one is not None
        own = (dmc.decision_bias * fit.one - SHARPNESS * (fit.cost - threshold * fit.one)) / dmc.decision_scale
        if dmc.decision_per == "layer":
            return own
        group = parallel_state.get_tensor_model_parallel_group()
        parts = [torch.empty_like(own) for _ in range(group.size())]
        distributed.all_gather(parts, own.contiguous(), group=group)
        return torch.cat(parts)


def draw_labels(logits: Tensor, noise: Tensor, vocab_size: int, group: Optional[Any] = None) -> Tensor:
    """Draw a token at each position from the model's distribution, the same in every tensor-parallel layout.

    Args:
        logits: over this rank's part of the padded vocabulary, [s, b, V / tp]; no row behind ``vocab_size`` counts.
        noise: standard logistic, fp32 [b, s].
        vocab_size: tokens of the vocabulary.
        group: the tensor-parallel ranks; None: this process has the whole vocabulary.

    Returns:
        int64 [b, s].
    """
    part = logits.size(-1)
    rank, ranks = (0, 1) if group is None else (group.rank(), group.size())
    padding = torch.arange(rank * part, (rank + 1) * part, device=logits.device) >= vocab_size
    share = torch.sigmoid(noise.double()).t()  # of the distribution, in the order of the vocabulary: [s, b]
    drawn = torch.empty(logits.shape[:2], dtype=torch.int64, device=logits.device)
    rows = max(1, CHUNK // (part * logits.size(1)))
    for at in (slice(start, start + rows) for start in range(0, logits.size(0), rows)):
        z = logits[at].detach().float().masked_fill(padding, float("-inf"))
        top = z.amax(dim=-1, keepdim=True)
        if ranks > 1:
            distributed.all_reduce(top, distributed.ReduceOp.MAX, group=group)
        below = (z - top).exp_().cumsum(dim=-1, dtype=torch.float64)  # [s, b, V / tp]
        totals = [torch.empty_like(below[..., -1]) for _ in range(ranks)]
        if ranks > 1:
            distributed.all_gather(totals, below[..., -1].contiguous(), group=group)
        else:
            totals = [below[..., -1]]
        before = sum(totals[:rank], torch.zeros_like(totals[0]))
        wanted = share[at] * sum(totals) - before
        index = torch.searchsorted(below, wanted.unsqueeze(-1), right=True)[..., 0]
        here = (wanted >= 0) & (wanted < totals[rank])
        drawn[at] = torch.where(here, rank * part + index, 0)
    if ranks > 1:
        distributed.all_reduce(drawn, group=group)
    return drawn.clamp_max_(vocab_size - 1).t().contiguous()
