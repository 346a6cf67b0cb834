"""Models and runs for the tests of prefix caching."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from helpers import families
from helpers.engines import Model
from helpers.exported import GROUPS, LAYERS, VOCABULARY

from megatron.dmc.inference import LLM, Engine, SamplingParams, StepOutput

HEADS = LAYERS * GROUPS
SHORT = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
SCORED = dataclasses.replace(SHORT, logprobs=VOCABULARY)
Outputs = dict[tuple[str, int], list[StepOutput]]


class Plain:
    """A plain Llama, whose answers are those of the engine without prefix caching;
    these equal transformers' elsewhere.
    """

    def __init__(self, directory: Path) -> None:
        families.make("llama2", directory, dtype="float32")
        self.path, self.made = str(directory), LLM(directory, enable_prefix_caching=False)
        self.answers: dict[tuple[int, ...], tuple[int, ...]] = {}

    prompt = Model.prompt
    engine = Model.engine

    def answer(self, prompt: tuple[int, ...], more: int) -> tuple[int, ...]:
        if prompt not in self.answers:
            params = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
            self.answers[prompt] = tuple(self.made.generate(prompt, params)[0].outputs[0].token_ids)
        return self.answers[prompt][:more]


def make_models(root: Path) -> Callable[..., Model | Plain]:
    """Function from a case to its model, which is made when first asked for."""
    made: dict[tuple, Model | Plain] = {}

    def get(case: str, **more: object) -> Model | Plain:
        key = (case, *sorted(more.items()))
        if key not in made:
            directory = root / str(len(made))
            made[key] = Plain(directory) if case == "plain" else Model(directory, case, **more)
        return made[key]

    return get


def run(engine: Engine, *prompts: tuple[int, ...], params: SamplingParams = SHORT, **more: object) -> Outputs:
    """Requests "0", "1", ... together, to the end; integrity is checked after every step."""
    for i, prompt in enumerate(prompts):
        engine.add_request(str(i), prompt, params, **more)
    found: Outputs = {}
    while engine.has_unfinished():
        for output in engine.step():
            found.setdefault((output.request_id, output.index), []).append(output)
        engine.cache.check_integrity()
    return found


def cached(found: Outputs) -> list[int]:
    """Of each request, and on every output of it."""
    numbers = {name: {output.num_cached_tokens for output in outputs} for name, outputs in found.items()}
    assert all(len(each) == 1 for each in numbers.values())
    return [numbers[name].pop() for name in sorted(numbers)]
