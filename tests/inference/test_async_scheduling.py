"""Asynchronous scheduling: a step is launched before the results of the one before are known, and the outputs are those
of steps one by one.

Random schedules run in both modes in test_engine.py and test_prefix_schedules.py, graphs in test_graphs.py, ranks in
test_inference_api.py.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.engines import GREEDY, Model, all_back, drain, ids_of
from helpers.structured import make_llm

from megatron.dmc.inference import Engine, SamplingParams, StepOutput, StructuredOutputsParams
from megatron.dmc.inference.device_queue import DeviceQueue
from megatron.dmc.inference.model_runner import StepInFlight


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Model]:
    made: dict[str, Model] = {}

    def get(case: str) -> Model:
        if case not in made:
            made[case] = Model(tmp_path_factory.mktemp("model") / "m", case)
        return made[case]

    return get


def told(outputs: list[StepOutput]) -> tuple:
    """What a user sees of a completion, but for log-probabilities and times."""
    last = outputs[-1]
    return ids_of(outputs), last.finish_reason, last.stop_reason, last.error, last.cache


def order_of_steps(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A list that gets "launch" when a step is launched, and "result" when its results are waited for."""
    seen: list[str] = []
    launch, result = engine.runner.launch, StepInFlight.result
    monkeypatch.setattr(engine.runner, "launch", lambda scheduled: (seen.append("launch"), launch(scheduled))[1])
    monkeypatch.setattr(StepInFlight, "result", lambda step: (seen.append("result"), result(step))[1])
    return seen


@pytest.mark.parametrize("case", ["half", "unbounded", "no merging", "adapter, self"])
@pytest.mark.parametrize("caching", [False, True])
def test_the_same_outputs(case: str, caching: bool, models) -> None:
    """Parameters of all kinds side by side, in a pool that forces preemption where nothing is compressed."""
    model = models(case)
    stop = model.answer(model.prompt(33))[4]
    kinds = [
        dict(temperature=0),
        dict(seed=7),
        dict(seed=8, n=3, top_k=9),
        dict(temperature=0, logprobs=3),
        dict(temperature=0, prompt_logprobs=2),
        dict(temperature=0, stop_token_ids=[stop]),
        dict(temperature=0, stop_token_ids=[stop], min_tokens=12),
        dict(seed=9, repetition_penalty=1.3, frequency_penalty=0.5),
        dict(temperature=0, logit_bias={stop: 2.0}),
        dict(temperature=0, max_tokens=0, prompt_logprobs=0),
        dict(temperature=0, max_tokens=1),
    ]
    found = []
    for ahead in (False, True):
        engine = model.engine(
            async_scheduling=ahead,
            enable_prefix_caching=caching,
            num_pages=30,
            max_num_seqs=6,
            max_num_batched_tokens=40,
        )
        for i, kind in enumerate(kinds):
            engine.add_request(str(i), model.prompt(33, i % 2), SamplingParams(**{"max_tokens": 24, **kind}))
        found.append(drain(engine))
        assert engine.stats().preemptions or case != "no merging"
    one_by_one, overlapped = found
    assert one_by_one.keys() == overlapped.keys()
    for key, outputs in one_by_one.items():
        assert told(overlapped[key]) == told(outputs), key
        for name in ("logprobs", "prompt_logprobs"):
            left, right = (
                [entry for output in x[key] for entry in getattr(output, name)] for x in (one_by_one, overlapped)
            )
            assert [entry.token for entry in left] == [entry.token for entry in right]
            assert [entry.logprob for entry in left] == pytest.approx([entry.logprob for entry in right], abs=1e-4)


def test_steps_overlap(models, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next step is launched while one is in flight, until it is known that nothing follows."""
    model = models("half")
    engine = model.engine(async_scheduling=True, enable_prefix_caching=False)
    seen = order_of_steps(engine, monkeypatch)
    engine.add_request("a", model.prompt(9), SamplingParams(temperature=0, max_tokens=5, ignore_eos=True))
    outputs = drain(engine)["a", 0]
    assert ids_of(outputs) == model.answer(model.prompt(9), 5) and engine.stats().steps == 5
    assert seen == ["launch", *["launch", "result"] * 4, "result"]


def test_a_token_after_the_end_is_thrown_away(models) -> None:
    """One step more than without, and nothing that a user sees of it; the prefix cache knows the last token too."""
    model = models("half")
    prompt, answer = model.prompt(30), model.answer(model.prompt(30))
    params = SamplingParams(temperature=0, max_tokens=24, stop_token_ids=[answer[5]], ignore_eos=True)
    end = answer.index(answer[5]) + 1
    ends = []
    for ahead in (False, True):
        engine = model.engine(async_scheduling=ahead, prefix_cache_min_tokens=1)
        engine.add_request("a", prompt, params)
        found = []
        while engine.has_unfinished():
            found += engine.step()
            engine.cache.check_integrity()
        ends.append((told(found), engine.stats().steps))
        engine.add_request("b", [*prompt, *answer[:end], 7], SamplingParams(temperature=0, max_tokens=1))
        (outputs,) = drain(engine).values()
        assert outputs[-1].num_cached_tokens == 30 + end - 1 + ahead
    (one_by_one, steps), (overlapped, steps_ahead) = ends
    assert one_by_one == overlapped and steps_ahead == steps + 1
    assert one_by_one[0] == answer[:end] and one_by_one[1:3] == ("stop", answer[5])


WAITING = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)


@pytest.mark.parametrize(("params", "steps"), [(dict(presence_penalty=0.5), 4), (dict(prompt_logprobs=0), 1)])
def test_steps_that_wait(params: dict, steps: int, models, monkeypatch: pytest.MonkeyPatch) -> None:
    """No step is launched ahead while the host has to know what is in flight."""
    model = models("half")
    engine = model.engine(async_scheduling=True, enable_prefix_caching=False)
    seen = order_of_steps(engine, monkeypatch)
    engine.add_request("a", model.prompt(9), dataclasses.replace(WAITING, **params))
    engine.add_request("b", model.prompt(12), dataclasses.replace(WAITING, max_tokens=6))
    found = drain(engine)
    assert ids_of(found["b", 0]) == model.answer(model.prompt(12), 6) and len(ids_of(found["a", 0])) == 4
    assert seen[: 2 * steps] == ["launch", "result"] * steps and seen[2 * steps :][:2] == ["launch"] * 2


def test_grammars_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("llguidance")
    llm = make_llm(tmp_path / "model", "byte-level", async_scheduling=True, enable_prefix_caching=False)
    seen = order_of_steps(llm.engine, monkeypatch)
    matching = StructuredOutputsParams(regex="[0-9]{4}")
    both = llm.generate(
        ["a", "b"],
        [dataclasses.replace(WAITING, structured_outputs=matching), dataclasses.replace(WAITING, max_tokens=9)],
    )
    assert re.fullmatch("[0-9]{4}", both[0].outputs[0].text) and len(both[1].outputs[0].token_ids) == 9
    assert seen[:6] == ["launch", "result"] * 3 and seen.count("launch") == 9 and seen[-2:] == ["result"] * 2
    all_back(llm.engine)


def test_an_end_by_abort(models) -> None:
    """While a step is in flight, its rows are not given to others, whose tokens are the oracle's."""
    model = models("half")
    engine = model.engine(async_scheduling=True, max_num_seqs=2, max_prefix_snapshots=0, num_pages=40)
    prompts = [model.prompt(n, n) for n in (20, 33, 14)]
    for i, prompt in enumerate(prompts):
        engine.add_request(str(i), prompt, GREEDY)
    found = [output for _ in range(5) for output in engine.step()]
    (last,) = engine.abort("0")
    mine = [output for output in found if output.request_id == "0"]
    assert last.finish_reason == "abort" and ids_of(mine) == model.answer(prompts[0])[: len(ids_of(mine))]
    assert last.cache.tokens == 20 + len(ids_of(mine)) - 1
    engine.cache.check_integrity()
    later = drain(engine)
    assert ("0", 0) not in later
    for name in ("1", "2"):
        got = ids_of([o for o in found if o.request_id == name] + later[name, 0])
        assert got == model.answer(prompts[int(name)])


def test_an_abort_of_all_leaves_nothing(models) -> None:
    model = models("half")
    engine = model.engine(async_scheduling=True)
    for name in "ab":
        engine.add_request(name, model.prompt(20), GREEDY)
    for _ in range(3):
        engine.step()
    engine.abort_all()
    assert not engine.has_unfinished() and engine.step() == []
    all_back(engine)


@pytest.mark.parametrize("seed", [None, 3])
def test_a_step_that_raises_while_another_is_queued(seed: int | None, models, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither runs, both are computed again, and a seeded request has its tokens."""
    model = models("half")
    params = SamplingParams(temperature=0, max_tokens=24) if seed is None else SamplingParams(seed=seed, max_tokens=24)
    wanted, found, failed = {}, {}, []

    def fail(*args) -> None:
        failed.append(1)
        raise RuntimeError("out of memory")

    for ahead in (False, True):
        engine = model.engine(async_scheduling=ahead, max_num_seqs=3)
        for i, n in enumerate((30, 12, 40)):
            engine.add_request(str(i), model.prompt(n), params)
        if not ahead:
            wanted = drain(engine)
            continue
        for _ in range(6):
            for output in engine.step():
                found.setdefault((output.request_id, output.index), []).append(output)
        with monkeypatch.context() as patch:
            patch.setattr(engine.model, "forward", fail)
            with pytest.raises(RuntimeError, match="out of memory"):
                for _ in range(3):
                    for output in engine.step():
                        found.setdefault((output.request_id, output.index), []).append(output)
        assert failed == [1]
        engine.cache.check_integrity()
        assert engine.stats().pages_used == 0 and engine.stats().waiting == 3
        for key, outputs in drain(engine).items():
            found.setdefault(key, []).extend(outputs)
    for key, outputs in wanted.items():
        assert ids_of(found[key]) == ids_of(outputs)


@pytest.mark.parametrize("fails_at", [3, 4, 5])
def test_a_step_that_has_failed_before_the_host_knows(fails_at: int, models, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that the host copies and frees between the failure and its report are copied and freed, so snapshots hold
    what they are thought to hold.
    """
    model = models("half")
    engine = model.engine(async_scheduling=True, prefix_cache_min_tokens=4, max_num_seqs=3, max_num_batched_tokens=24)
    forward, launch, calls = engine.model.forward, engine.runner.launch, []

    def fail_once(*args: object) -> torch.Tensor:
        calls.append(1)
        if len(calls) == fails_at:
            raise RuntimeError("out of memory")
        return forward(*args)

    def launch_and_end(scheduled: list) -> StepInFlight:
        step = launch(scheduled)
        engine.queue.synchronize()
        return step

    monkeypatch.setattr(engine.model, "forward", fail_once)
    monkeypatch.setattr(engine.runner, "launch", launch_and_end)
    prompts = [model.prompt(30), model.prompt(30), model.prompt(41, 2), model.prompt(20, 3)]
    for i, prompt in enumerate(prompts):
        engine.add_request(str(i), prompt, GREEDY)
    found, failures = {str(i): [] for i in range(len(prompts))}, 0
    while engine.has_unfinished():
        try:
            for output in engine.step():
                found[output.request_id].append(output)
        except RuntimeError as error:
            assert str(error) == "out of memory"
            failures += 1
        engine.cache.check_integrity()
    assert failures == 1
    assert [ids_of(outputs) for outputs in found.values()] == [model.answer(prompt) for prompt in prompts]
    all_back(engine)


def test_nan_in_flight(models) -> None:
    """A sequence whose logits are NaN ends alone, although its next step was launched."""
    model = models("half")
    engine = model.engine(async_scheduling=True, num_pages=48, max_num_seqs=3)
    engine.model.embedding.weight[7] = float("nan")
    prompt = tuple(t for t in model.prompt(40) if t != 7)
    engine.add_request("bad", (*prompt[:20], 7, *prompt[20:]), GREEDY)
    engine.add_request("good", prompt, GREEDY)
    found = drain(engine)
    assert found["bad", 0][-1].finish_reason == "error" and "hold NaN or Inf" in found["bad", 0][-1].error
    answer = model.answer(prompt)
    assert ids_of(found["good", 0])[:4] == answer[:4] and (7 in answer or ids_of(found["good", 0]) == answer)


def test_a_queue_keeps_order_and_stops_at_a_failure() -> None:
    for threaded in (False, True):
        queue, seen = DeviceQueue(threaded), []
        queue.order(lambda seen=seen: seen.append(1))
        assert queue.submit(lambda seen=seen: seen.append(torch.is_inference_mode_enabled())).result() is None
        broken = queue.submit(lambda: 1 / 0)
        after = queue.submit(lambda seen=seen: seen.append("not run"))
        queue.order(lambda seen=seen: seen.append("ordered"))
        for future in (broken, after):
            with pytest.raises(ZeroDivisionError):
                future.result()
        queue.reset()
        assert queue.submit(lambda: 5).result() == 5 and seen == [1, threaded, "ordered"]
