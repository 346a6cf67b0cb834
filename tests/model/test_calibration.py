"""Calibration of adapters: the costs by finite differences, the fit by least squares, the threshold by counting."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.in_process import VOCAB, build, megatron_in_process, run_config

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
    model.freeze_base()
    return model


def batch(seed: int) -> torch.Tensor:
    return torch.randint(VOCAB, (B, S + 1), generator=torch.Generator().manual_seed(seed))


def loss(model: DMCGPTModel, tokens: torch.Tensor, watcher) -> torch.Tensor:
    """Summed over tokens and sequences, as training has it before the division at the end of a batch."""
    positions = torch.arange(S).expand(B, -1)
    step = DMCStep(sample_ids=torch.arange(B), calibration=watcher)
    return model(tokens[:, :-1], positions, tokens[:, 1:], step=step)[0].double().sum()


class Nudge:
    """Adds to one element of one layer's mask."""

    def __init__(self, layer: int, where: tuple[int, int, int], by: float) -> None:
        self.layer, self.where, self.by = layer, where, by

    def watch(self, layer, x, mask):
        if layer == self.layer:
            mask[self.where] += self.by


class Recorder(Calibration):
    """Keeps what the fit is made of: layer -> rows [n, h] and log costs [n, heads]."""

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
    monkeypatch.setattr(
        calibration._Fit, "add", lambda self, rows, log_cost: found.setdefault(id(self), []).append(log_cost)
    )
    watcher = Calibration(config, torch.device("cpu"))
    loss(model, tokens, watcher).backward()
    assert sorted(watcher.layers) == [1, 2]
    for layer, where in ((1, (0, 0, 0)), (1, (2, 1, 7)), (2, (1, 0, 19)), (2, (3, 1, 12))):
        sequence, head, token = where
        (log_cost,) = found[id(watcher.layers[layer])]
        assert log_cost.shape == (B * (S // 2), HEADS)
        want = math.log(costs(model, tokens, layer, where) + calibration.FLOOR)
        assert float(log_cost[sequence * (S // 2) + token, head]) == pytest.approx(want, abs=0.02)


def test_the_last_tokens_cost_nothing():
    """No query is beyond the window of the last window + 1 tokens."""
    model, tokens = model_of(settings()), batch(1)
    assert costs(model, tokens, 1, (0, 0, S - WINDOW - 1)) == 0 < costs(model, tokens, 1, (0, 0, S - WINDOW - 2))


@pytest.mark.parametrize("about, per", [("self", "head"), ("previous", "head"), ("previous", "layer")])
def test_adapters_keep_what_they_predict_to_cost_most(about, per, monkeypatch):
    """The fit is the ridge regression that lstsq finds, and decisions made with its weights keep the asked share."""
    config = settings(about, per)
    model, watcher = model_of(config), Recorder(config, torch.device("cpu"))
    log_costs: dict[int, list] = {}
    add = calibration._Fit.add
    monkeypatch.setattr(
        calibration._Fit,
        "add",
        lambda self, rows, log_cost: (log_costs.setdefault(id(self), []).append(log_cost), add(self, rows, log_cost)),
    )
    for seed in (1, 2):
        loss(model, batch(seed), watcher).backward()
    fits = dict(watcher.layers)
    watcher.solve()
    first = int(about == "previous")
    for layer, fit in fits.items():
        inputs = [x[first : first + S // 2].transpose(0, 1).reshape(-1, WIDTH).float() for x in watcher.seen[layer]]
        rows, target = torch.cat(inputs).double(), torch.cat(log_costs[id(fit)]).double()
        assert target.size(1) == (HEADS if per == "head" else 1)
        root = (calibration.RIDGE * rows.square().sum(dim=0).mean()).sqrt()
        stacked = torch.cat((rows, root * torch.eye(WIDTH, dtype=torch.float64)))
        zeros = torch.zeros(WIDTH, target.size(1) + 1, dtype=torch.float64)
        targets = torch.cat((torch.cat((target, torch.ones(len(rows), 1).double()), dim=1), zeros))
        want = torch.linalg.lstsq(stacked, targets).solution
        assert torch.allclose(fit.cost.double(), want[:, :-1].T, atol=1e-3)
        assert torch.allclose(fit.one.double(), want[:, -1], atol=1e-4)

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


def test_labels_are_drawn_from_the_distribution():
    """The order of the noise is that of the vocabulary, padding is never drawn, and shares are the probabilities."""
    logits = torch.tensor([0.0, 2.0, -1.0, 1.0, 50.0]).expand(4000, 1, 5)  # the last row is padding
    noise = torch.logit((torch.arange(4000) + 0.5) / 4000)[None]
    drawn = draw_labels(logits, noise, vocab_size=4)
    assert drawn.shape == (1, 4000) and bool((drawn.diff() >= 0).all())
    shares = torch.bincount(drawn[0], minlength=5) / 4000
    want = torch.cat((logits[0, 0, :4].softmax(dim=0), torch.zeros(1)))
    assert torch.allclose(shares, want, atol=1e-3)
