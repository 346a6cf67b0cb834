"""A model of method dms behind the server: what its responses, metrics and model card say of the cache."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.serving import COMPLETIONS, IGNORE, Running, make_model, samples


def test_usage_metrics_and_card_of_a_model_that_evicts(tmp_path: Path) -> None:
    model = make_model(tmp_path / "m", "adapter")
    prompt = [5, 9, 2, 40, 7]
    oracle = model.exported.oracle()
    oracle.generate(prompt, 29)  # the last token that is sampled is not in the cache
    held = oracle.lengths()
    slots, ratio = int(held.sum()), 34 * held.numel() / int(held.sum())
    body = {"prompt": prompt, "max_tokens": 30, "temperature": 0, **IGNORE}
    with Running(model.path) as server:
        (card,) = server.json("/v1/models")["data"]
        assert card["compression"]["method"] == "dms" and card["compression"]["decision_source"] == "adapter"
        assert card["compression"]["window"] == 4
        usage = server.json(COMPLETIONS, body)["usage"]
        dmc = usage["dmc"]
        assert (dmc["slots"], dmc["compression_ratio"]) == (slots, pytest.approx(ratio)) and ratio > 1.2
        events = server.events(COMPLETIONS, body | {"stream": True, "stream_options": {"include_cache": True}})
        last = [event["dmc"] for event in events if "dmc" in event][-1]
        assert last["tokens"] == 33 and all(6 < n <= 33 for layer in last["slots"] for n in layer)
        server.settle()
        counted = samples(server.ask("/metrics")[2])
        taken = [value for name, value in counted.items() if "cache_slots_total" in str(name)]
        assert sum(taken) == 2 * slots
