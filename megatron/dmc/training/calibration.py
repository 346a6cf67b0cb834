"""Calibration: adapters of a frozen model fitted, by a convex problem, to what each token's eviction would cost.

The cost of evicting a token from a KV head is read off a backward pass. Evicting token j adds a mask to its column for
every query beyond the window; the gradient g of the loss with respect to that mask, squared, where the labels are drawn
from the model's own distribution, is an estimate of the diagonal of the Fisher information, which is to second order
how far that distribution moves (Optimal Brain Damage, LeCun et al. 1989, with the Fisher information for the Hessian,
as in arXiv 1801.05787). No mask is applied while this is measured.

What a token will cost is uncertain when its decision is made, and most of the loss comes from few tokens: those that
are copied, a thousand tokens later, where most tokens like them are not. So an adapter is to predict the mean of the
cost, not the mean of its logarithm. It is linear in what it reads, and the fit is a generalized linear model: gamma
distribution, logarithmic link (McCullagh and Nelder 1989, chapter 8), whose deviance is convex and whose variance
grows with the square of the mean, as that of a squared normal variable does. Ridge regression on log costs is where
it begins; L-BFGS minimizes it.

What all heads predict for further batches is then put in one order, and the threshold is where the share of tokens
that the target allows is kept: a head whose tokens cost little keeps few of them. How good the fit is depends on the
sequences, above all on their length: what is copied over long distances costs nothing in short ones
(docs/experiments.md).

The adapter has no intercept. That of the fit, and the threshold, are made of the fit of a constant, which the hidden
state, RMS-normalised, holds well enough.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
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
CAP = 100.0
"""Multiple of what is predicted for a token from which on its cost counts linearly in its logarithm: one token cannot
draw a fit to itself, and no exponential overflows."""
SHARPNESS = 2.0
"""Logits per nat of predicted log cost. Decisions hardly depend on it (only where the fit of the constant is off); what
the noise of later training can turn does: logits some units from the threshold are decided, those near it are open."""
COUNTING = 8
"""One batch in so many is not fitted to, but finds the threshold."""
CHUNK = 1 << 24
"""Logits that are in fp32 at once while labels are drawn."""
_ROWS = 8192
"""Rows of a fit that are in fp32 at once."""
_BINS, _LOW, _HIGH = 1 << 14, -64.0, 64.0
"""Histogram of predicted log costs."""


@dataclass
class _Fit:
    """Fit of one layer: what its adapter read in n rows, what they cost, and the solution."""

    rows: list[Tensor] = field(default_factory=list)
    """What the adapter read, [rows, h] for each micro-batch, on the CPU."""
    costs: list[Tensor] = field(default_factory=list)
    """Costs of their tokens in nats squared, fp32 [rows, heads], on the CPU; heads: KV heads of this rank, or 1 for the
    layer."""
    cost: Optional[Tensor] = None
    """Solution: weights of the logarithm of the predicted cost, fp32 [heads, h]."""
    one: Optional[Tensor] = None
    """Solution: weights of the constant 1, fp32 [h]."""

    def add(self, rows: Tensor, costs: Tensor) -> None:
        """rows: [n, h]; costs: fp32 [n, heads]."""
        self.rows.append(rows.cpu())
        self.costs.append(costs.cpu())

    def solve(self, device: torch.device) -> None:
        """Fit to the rows of all data-parallel ranks, which are given up. Collective."""
        rows = torch.cat(self.rows).to(device)
        log_costs = (torch.cat(self.costs).to(device) + FLOOR).log()
        self.rows, self.costs = [], []
        cost, one = fit_costs(rows, log_costs, parallel_state.get_data_parallel_group())
        self.cost, self.one = cost.T.float().contiguous(), one.float()


def fit_costs(rows: Tensor, log_costs: Tensor, group: Any) -> tuple[Tensor, Tensor]:
    """Weights that predict the logarithm of the mean cost of a token, and the constant 1, from what an adapter reads.

    The first minimize the deviance of a gamma distribution, ``sum(y / mu + log mu)`` with ``log mu = rows @ weights``,
    where a ``y`` beyond :data:`CAP` times ``mu`` is taken as its tangent in ``log mu``, plus a ridge penalty.

    Args:
        rows: [n, h]; any n, none too.
        log_costs: fp32 [n, heads].
        group: ranks that have other rows of the same heads; every one calls.

    Returns:
        fp64 [h, heads] and [h], the same on all ranks.

    Raises:
        RuntimeError: rows or costs hold inf or NaN; raised on all ranks.
    """

    def total(part: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Sum of ``part`` over all rows, fp64; chunks bound the memory of their copies in fp32."""
        chunks = zip(rows.split(_ROWS), log_costs.split(_ROWS))
        out = sum(part(x.float(), logs).double() for x, logs in chunks)
        distributed.all_reduce(out, group=group)
        return out

    count = total(lambda x, logs: torch.tensor(float(len(x)), device=x.device))
    gram = total(lambda x, logs: x.T @ x)
    products = total(lambda x, logs: x.T @ torch.cat((logs, torch.ones_like(logs[:, :1])), 1))
    if not (gram.isfinite().all() and products.isfinite().all()):
        raise RuntimeError("what the adapters read, or the gradients behind it, hold inf or nan; nothing was fitted")
    penalty = RIDGE * gram.diagonal().mean()
    gram.diagonal().add_(penalty)
    root = torch.linalg.cholesky(gram)  # lower
    both = torch.cholesky_solve(products, root)
    weights, one = both[:, :-1], both[:, -1]

    # In the coordinates root.T @ weights the deviance has about the curvature 1 in all directions.
    scaled = (root.T @ weights / count.sqrt()).contiguous().requires_grad_()
    optimizer = torch.optim.LBFGS([scaled], max_iter=100, tolerance_grad=1e-6, line_search_fn="strong_wolfe")

    def unscaled() -> Tensor:
        return torch.linalg.solve_triangular(root.T, scaled.detach() * count.sqrt(), upper=True)

    def deviance() -> Tensor:
        weights = unscaled()
        w = weights.float()
        # [1 + h, heads]: the deviance of each head, and its slope
        sums = total(lambda x, logs: _deviance(x, x @ w, logs))
        slope = penalty * weights - sums[1:]
        scaled.grad = (torch.linalg.solve_triangular(root, slope, upper=False) / count.sqrt()).contiguous()
        return (sums[0].sum() + penalty / 2 * weights.square().sum()) / count

    optimizer.step(deviance)
    return unscaled(), one


def _deviance(x: Tensor, log_mean: Tensor, log_costs: Tensor) -> Tensor:
    """Gamma deviance of each head [1, heads] above minus its gradient by the weights [h, heads]."""
    excess, cap = log_costs - log_mean, math.log(CAP)
    ratio = excess.clamp_max(cap).exp()
    value = ratio * (1 + (excess - cap).clamp_min(0)) + log_mean
    return torch.cat((value.sum(dim=0, keepdim=True), x.T @ (ratio - 1)))


class Calibration:
    """Rows, costs and solutions of the layers of this rank (``DMCStep.calibration``).

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
        rows = x[first : first + half].transpose(0, 1).flatten(0, 1)
        self.layers.setdefault(layer, _Fit()).add(rows, cost.transpose(1, 2).flatten(0, 1))

    def solve(self) -> None:
        """Make the fit; from here on batches count for the threshold. Collective."""
        for layer in sorted(self.layers):
            self.layers[layer].solve(self._histogram.device)
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
