"""DMS in a training checkpoint's model: teacher forcing against the step-by-step decoder, every source of decisions."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.in_process import VOCAB, build, device, megatron_in_process, run_config

from megatron.dmc.evaluation.load import Loaded
from megatron.dmc.evaluation.reference import ReferenceDecoder
from megatron.dmc.model import DMCStep, is_adapter

S = 40


@pytest.fixture(scope="module", autouse=True)
def megatron():
    with megatron_in_process(run_config()):
        yield


@pytest.mark.parametrize(
    "decision, window",
    [
        (dict(source="key"), 5),
        (dict(source="key", about="self"), 1),
        (dict(source="query"), 3),
        (dict(source="query", about="self"), 60),
        (dict(source="adapter"), 4),
        (dict(source="adapter", about="self", per="layer"), 7),
    ],
)
@torch.no_grad()
def test_decoding_token_by_token_gives_the_same_logits_and_slots(decision, window, tmp_path: Path) -> None:
    settings = {f"decision_{name}": value for name, value in decision.items()}
    run = run_config(dmc=dict(method="dms", window=window, decision_scale=2.0, decision_bias=0.3, **settings))
    model = build(run)
    for name, parameter in model.named_parameters():
        if is_adapter(name):
            torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(parameter.dim()))
    loaded = Loaded(model, run, manifest=None, path=tmp_path)  # type: ignore[arg-type]
    ids = torch.randint(VOCAB, (1, S), generator=torch.Generator().manual_seed(1)).to(device())
    decoder, step = ReferenceDecoder(loaded), DMCStep()
    want = model(ids, torch.arange(S, device=device())[None], step=step)[0, :, :VOCAB]
    found = torch.stack([decoder.step(token) for token in ids[0].tolist()])
    assert (found - want).abs().max() <= 1e-4
    held = torch.cat([step.held[layer] for layer in sorted(step.held)])
    assert torch.equal(held.cpu(), decoder.lengths()) and (int(held.min()) < S) == (window < S)
