"""Calibration of adapters: costs by finite differences, the fit by another optimizer, the threshold by counting."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from helpers.in_process import VOCAB, build, megatron_in_process, run_config
from megatron.core import parallel_state
from scipy.optimize import minimize

from megatron.dmc.config import RunConfig
from megatron.dmc.model import DMCGPTModel, DMCStep
from megatron.dmc.training import calibration
from megatron.dmc.training.calibration import Calibration, draw_labels

S, B, WINDOW, HEADS, WIDTH = 40, 4, 3, 2, 64


@pytest.fixture(scope="module", autouse=True)
def megatron():
    with megatron_in_process(run_config()):
        yield


def settings(about: str = "self", per: str = "head", **stage) -> RunConfig:
    dmc = dict(
        method="dms",
        window=WINDOW,
        decision_source="adapter",
        decision_about=about,
        decision_per=per,
        decision_scale=10.0,
        decision_bias=2.0,
    )
    config = run_config(dmc=dmc)
    config.stage.stage, config.stage.target_cr = "calibrate", stage.get("target_cr", 3.0)
    return config


def model_of(config: RunConfig) -> DMCGPTModel:
    model = build(config, carry=True).double()
    with torch.no_grad():  # a trained model's hidden states hold a constant, which stands for the adapter's intercept
        model.embedding.word_embeddings.weight[:, 0] += 0.75
    model.freeze_base()
    return model


def batch(seed: int) -> torch.Tensor:
    return torch.randint(VOCAB, (B, S + 1), generator=torch.Generator().manual_seed(seed))


def loss(model: DMCGPTModel, tokens: torch.Tensor, watcher) -> torch.Tensor:
    """Summed over tokens and sequences, as training has it before the division at the end of a batch."""
    positions = torch.arange(S).expand(B, -1)
    step = DMCStep(sample_ids=torch.arange(B), calibration=watcher)
    return model(tokens[:, :-1], positions, tokens[:, 1:], step=step)[0].double().sum()


def data_parallel():
    return parallel_state.get_data_parallel_group()


class Nudge:
    """Adds to one element of one layer's mask."""

    def __init__(self, layer: int, where: tuple[int, int, int], by: float) -> None:
        self.layer, self.where, self.by = layer, where, by

    def watch(self, layer, x, mask):
        if layer == self.layer:
            mask[self.where] += self.by


class Recorder(Calibration):
    """Keeps what the adapters of each layer read: [s, b, h] for each micro-batch."""

    def __init__(self, *args) -> None:
        super().__init__(*args)
        self.seen: dict[int, list[torch.Tensor]] = {}

    def watch(self, layer, x, mask):
        super().watch(layer, x, mask)
        self.seen.setdefault(layer, []).append(x)


def costs(model: DMCGPTModel, tokens: torch.Tensor, layer: int, where: tuple[int, int, int]) -> float:
    """Squared derivative of the loss, by central differences."""
    with torch.no_grad():
        up, down = (loss(model, tokens, Nudge(layer, where, by)) for by in (1e-2, -1e-2))
    return float((up - down) / 2e-2) ** 2


def test_costs_are_squared_derivatives_of_the_loss(monkeypatch):
    """By finite differences, for tokens of either half, heads and layers; the second half is not fitted to."""
    config = settings()
    model, tokens, found = model_of(config), batch(1), {}
    monkeypatch.setattr(calibration._Fit, "add", lambda self, rows, costs: found.setdefault(id(self), []).append(costs))
    watcher = Calibration(config, torch.device("cpu"))
    loss(model, tokens, watcher).backward()
    assert sorted(watcher.layers) == [1, 2]
    for layer, where in ((1, (0, 0, 0)), (1, (2, 1, 7)), (2, (1, 0, 19)), (2, (3, 1, 12))):
        sequence, head, token = where
        (cost,) = found[id(watcher.layers[layer])]
        assert cost.shape == (B * (S // 2), HEADS)
        want = costs(model, tokens, layer, where)
        assert float(cost[sequence * (S // 2) + token, head]) == pytest.approx(want, rel=0.02, abs=1e-12)


def test_the_last_tokens_cost_nothing():
    """No query is beyond the window of the last window + 1 tokens."""
    model, tokens = model_of(settings()), batch(1)
    assert costs(model, tokens, 1, (0, 0, S - WINDOW - 1)) == 0 < costs(model, tokens, 1, (0, 0, S - WINDOW - 2))


@pytest.mark.parametrize("about, per", [("self", "head"), ("previous", "head"), ("previous", "layer")])
def test_adapters_keep_what_they_predict_to_cost_most(about, per):
    """The fit is to what the adapters read, and decisions made with its weights keep the asked share."""
    config = settings(about, per)
    model, watcher = model_of(config), Recorder(config, torch.device("cpu"))
    for seed in (1, 2):
        loss(model, batch(seed), watcher).backward()
    first = int(about == "previous")
    stored = {layer: (torch.cat(fit.rows), torch.cat(fit.costs)) for layer, fit in watcher.layers.items()}
    watcher.solve()
    for layer, (rows, found) in stored.items():
        inputs = [x[first : first + S // 2].transpose(0, 1).reshape(-1, WIDTH) for x in watcher.seen[layer]]
        assert torch.equal(rows, torch.cat(inputs))
        assert found.shape == (len(rows), HEADS if per == "head" else 1)
        fit = watcher.layers[layer]
        assert not fit.rows and not fit.costs
        cost, one = calibration.fit_costs(rows, (found + calibration.FLOOR).log(), data_parallel())
        assert torch.equal(fit.cost, cost.T.float()) and torch.equal(fit.one, one.float())

    with torch.no_grad():
        loss(model, batch(3), watcher)
        threshold, ratio = watcher.threshold()
        assert ratio == pytest.approx(3.0, rel=0.02)
        for layer in model.attention_layers():
            layer.dms_proj_alpha.weight.copy_(watcher.weights(layer.layer_number, threshold))
        step = DMCStep()
        model.eval()(batch(3)[:, :-1], torch.arange(S).expand(B, -1), step=step)
    # Heads that cost less keep less; together they keep what was counted. Only the first token is decided by nobody.
    kept = torch.stack([step.kept[i] for i in (1, 2)])
    slack = 2 * HEADS * B * (about == "previous") + 8
    assert abs(int(kept.sum()) - 2 * HEADS * B * S / ratio) <= slack
    assert len(set(kept.sum(dim=1).flatten().tolist())) > 1


def test_the_fit_is_the_least_deviance(monkeypatch):
    """As BFGS of scipy finds it, in one chunk of rows and in several, with costs beyond the cap among them."""
    noise = torch.Generator().manual_seed(1)
    rows = torch.randn(300, 5, generator=noise)
    rows[:, 0] = 1.0
    truth = torch.tensor([[-9.0, -5.0], [1.0, 0.0], [0.0, 2.0], [0.5, 0.5], [0.0, -1.0]])
    log_costs = rows @ truth + torch.randn(300, 2, generator=noise).square().log()
    log_costs[7] += 20.0
    x, z = rows.double().numpy(), log_costs.double().numpy()
    penalty = calibration.RIDGE * np.square(x).sum(axis=0).mean()

    def deviance(weights: np.ndarray, head: int) -> float:
        excess = z[:, head] - x @ weights
        capped = np.minimum(excess, math.log(calibration.CAP))
        return float((np.exp(capped) * (1 + excess - capped) + x @ weights).sum() + penalty / 2 * (weights**2).sum())

    for chunk in (8192, 64):
        monkeypatch.setattr(calibration, "_ROWS", chunk)
        cost, one = calibration.fit_costs(rows, log_costs, data_parallel())
        for head in range(2):
            want = minimize(deviance, np.zeros(5), args=(head,), method="BFGS", tol=1e-8)
            assert np.abs(want.x - cost[:, head].numpy()).max() < 2e-3
            assert deviance(cost[:, head].numpy(), head) <= want.fun + 1e-4
        assert float((rows.double() @ one - 1).abs().max()) < 0.05


def test_the_mean_of_a_cost_is_predicted_not_that_of_its_logarithm():
    """Two kinds of token of the same mean log cost: those of which one in ten costs much are the dearer ones."""
    kind = torch.arange(2000) % 2
    rare = torch.arange(2000) % 20 == 1
    rows = torch.stack((torch.ones(2000), kind - 0.5), dim=1)
    log_costs = torch.where(kind == 0, -6.0, torch.where(rare, 3.0, -7.0)).unsqueeze(1)
    assert log_costs[kind == 0].mean() == log_costs[kind == 1].mean()
    cost, _ = calibration.fit_costs(rows, log_costs, data_parallel())
    predicted = (rows.double() @ cost)[:2, 0]
    assert float(predicted[0]) == pytest.approx(-6.0, abs=0.3)
    assert float(predicted[1]) == pytest.approx(math.log(0.1 * math.exp(3.0)), abs=0.3)


@pytest.mark.parametrize("broken", ["rows", "costs"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_no_fit_is_made_to_what_is_not_finite(broken, value):
    """Weights would be NaN, and the checkpoint complete."""
    rows, log_costs = torch.ones(9, 3), torch.zeros(9, 2)
    (rows if broken == "rows" else log_costs)[4, 1] = value
    with pytest.raises(RuntimeError, match="hold inf or nan; nothing was fitted"):
        calibration.fit_costs(rows, log_costs, data_parallel())


def test_labels_are_drawn_from_the_distribution():
    """The order of the noise is that of the vocabulary, padding is never drawn, and shares are the probabilities."""
    logits = torch.tensor([0.0, 2.0, -1.0, 1.0, 50.0]).expand(4000, 1, 5)  # the last row is padding
    noise = torch.logit((torch.arange(4000) + 0.5) / 4000)[None]
    drawn = draw_labels(logits, noise, vocab_size=4)
    assert drawn.shape == (1, 4000) and bool((drawn.diff() >= 0).all())
    shares = torch.bincount(drawn[0], minlength=5) / 4000
    want = torch.cat((logits[0, 0, :4].softmax(dim=0), torch.zeros(1)))
    assert torch.allclose(shares, want, atol=1e-3)
