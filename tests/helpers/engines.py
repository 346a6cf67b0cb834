"""Small exported models and what the step-by-step oracle makes of them, for the tests of the inference engine."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Optional

import torch
from helpers.exported import CASES, DMS_CASES, VOCABULARY, Exported, tokens
from torch import Tensor

from megatron.dmc.inference import Engine, EngineConfig, SamplingParams, StepOutput

GREEDY = SamplingParams(temperature=0, max_tokens=24)


class Model:
    """One exported model with prompts of many lengths; the oracle's answers are computed once."""

    def __init__(
        self, directory: Path, case: str = "", measured_cr: float = 4.0, settings: Optional[dict] = None
    ) -> None:
        """The model of a case, or of other ``settings``."""
        settings = settings or {**CASES, **DMS_CASES}[case]
        self.exported, self.path = Exported(directory, **settings), str(directory)
        config = json.loads((directory / "config.json").read_text())
        family = "qwen2" if settings.get("qkv_bias") else "qwen3" if settings.get("qk_norm") else "llama"
        config["dmc"]["base_model_type"], config["dmc"]["measured_cr"] = family, measured_cr
        (directory / "config.json").write_text(json.dumps(config))

    @functools.cache  # noqa: B019
    def prompt(self, n: int, seed: int = 1) -> tuple[int, ...]:
        return tuple(tokens(n, seed))

    @functools.cache  # noqa: B019
    def answer(self, prompt: tuple[int, ...], more: int = 24) -> tuple[int, ...]:
        return tuple(self.exported.oracle().generate(list(prompt), more))

    @functools.cache  # noqa: B019
    def logprobs(self, prompt: tuple[int, ...]) -> Tensor:
        """[tokens, vocabulary]"""
        return torch.log_softmax(self.exported.oracle().run(list(prompt)), dim=-1)

    def engine(self, **settings: object) -> Engine:
        return Engine(self.path, EngineConfig(**settings))


def prompt_scores(engine: Engine, prompt: list[int]) -> Tensor:
    """Log-probabilities of a prompt's tokens but the first."""
    engine.add_request("a", prompt, SamplingParams(max_tokens=1, prompt_logprobs=0))
    outputs = []
    while engine.has_unfinished():
        outputs += engine.step()
    entries = next(output.prompt_logprobs for output in outputs if output.prompt_logprobs)
    return torch.tensor([entry.logprob for entry in entries if entry is not None])


def drain(engine: Engine, check: bool = True) -> dict[tuple[str, int], list[StepOutput]]:
    """Run to the end; outputs by (request, answer). Integrity is checked after every step, and all pages are back."""
    found: dict[tuple[str, int], list[StepOutput]] = {}
    while engine.has_unfinished():
        for output in engine.step():
            found.setdefault((output.request_id, output.index), []).append(output)
        if check:
            engine.cache.check_integrity()
    all_back(engine)
    return found


def all_back(engine: Engine) -> None:
    """Nothing is held but by the prefix cache, and that gives it back."""
    engine.cache.check_integrity()
    assert (engine.cache.available_pages() == engine.cache.num_pages).all() and not engine.cache.live.any()
    engine.reset_prefix_cache()
    engine.cache.check_integrity()
    assert not any(root.children for root in engine.kv_cache_manager.tree._roots.values())
    assert engine.cache.state.free_count() == engine.cache.num_pages
    assert engine.cache.free_rows == engine.cache.rows == engine.sizes.max_num_seqs + engine.sizes.max_prefix_snapshots
    stats = engine.stats()
    assert stats.pages_used == stats.pages_cached == stats.running == stats.waiting == 0


def live_slots(engine: Engine) -> int:
    """Slots that live rows hold by the device's tables, each counted once."""
    state, found = engine.cache.state, set()
    size, columns = state.page_size, state.recent_table.size(3)
    for row in engine.cache.live.nonzero()[0].tolist():
        tables = (x[row].tolist() for x in (state.page_table, state.recent_table, state.lengths, state.segment))
        for heads in zip(*tables):
            for kept, recent, length, seen in zip(*heads):
                found |= {(kept[n // size], n % size) for n in range(length)}
                window = range(max(0, seen - 1 - state.evict_window), seen) if state.evicts else ()
                found |= {(recent[n // size % columns], n % size) for n in window}
    return len(found)


def ids_of(outputs: list[StepOutput]) -> tuple[int, ...]:
    return tuple(token for output in outputs for token in output.tokens)


def full_logprobs(outputs: list[StepOutput]) -> Tensor:
    """Of the prompt's positions but the last, then of the answer's: [positions, vocabulary].
    Asked for with VOCABULARY.
    """
    rows = [entry.top for output in outputs for entry in (*output.prompt_logprobs, *output.logprobs)]
    out = torch.full((len(rows), VOCABULARY), float("nan"))
    for row, top in zip(out, rows):
        for token, value in top:
            row[token] = value
    return out
