"""Prefix caching under random schedules: always the oracle's tokens, and no page is lost."""

from __future__ import annotations

import pytest
import torch
from helpers.engines import all_back, ids_of, live_slots
from helpers.examples import examples
from helpers.exported import DMS_CASES
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prefix_models import HEADS, make_models

from megatron.dmc.inference import SamplingParams


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory):
    return make_models(tmp_path_factory.mktemp("models"))


PROMPTS = st.tuples(st.sampled_from([0, 16, 33, 40]), st.sampled_from([1, 9, 20]), st.integers(0, 1))
ACTIONS = st.lists(
    st.one_of(
        st.tuples(
            st.just("add"),
            PROMPTS,
            st.integers(1, 4),
            st.sampled_from([1, 8, 40]),
            st.booleans(),
            st.sampled_from("xxy"),
        ),
        st.tuples(st.just("step"), st.integers(1, 30)),
        st.tuples(st.just("abort"), st.integers(0, 30)),
        st.tuples(st.just("reset")),
    ),
    min_size=4,
    max_size=16,
)


@settings(
    max_examples=examples(60),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    case=st.sampled_from(["half", "llama 3", "no merging", "plain", "key", "adapter, self"]),
    actions=ACTIONS,
    rows=st.integers(1, 6),
    snapshots=st.integers(0, 6),
    chunk=st.integers(6, 64),
    pages=st.integers(7, 14),
    least=st.sampled_from([1, 8, 16]),
    ahead=st.booleans(),
)
def test_any_schedule(
    models, case: str, actions: list, rows: int, snapshots: int, chunk: int, pages: int, least: int, ahead: bool
) -> None:
    """Prompts that share prefixes, several answers, aborts and resets in small pools, so that snapshots are forgotten
    and sequences preempted, with and without asynchronous scheduling: always the oracle's tokens, and the host's and
    the device's pictures agree after every step.
    """
    model = models(case)
    heads = 8 if case == "plain" else HEADS
    # Of seven pages a plain sequence fits as it is, one that compresses in two thirds; a window needs two more.
    pages = pages * heads * (2 if case in ("half", "llama 3", "key") else 3) // 3 + 2 * heads * (case in DMS_CASES)
    engine = model.engine(
        num_pages=pages,
        max_num_seqs=rows,
        max_num_batched_tokens=chunk,
        max_prefix_snapshots=snapshots,
        prefix_cache_min_tokens=least,
        async_scheduling=ahead,
    )
    asked, found, aborted = {}, {}, set()

    def take(outputs: list) -> None:
        for output in outputs:
            found.setdefault((output.request_id, output.index), []).append(output)
        engine.cache.check_integrity()
        assert len(engine.scheduler.running) <= rows
        if engine.stats().steps % 8 == 0 and not any(map(engine.cache.in_flight, range(engine.cache.rows))):
            assert engine.cache.live_slots() == live_slots(engine)

    for action in actions:
        if action[0] == "add":
            _, (shared, own, seed), n, more, scored, salt = action
            name, prompt = str(len(asked)), (*model.prompt(40, seed)[:shared], *model.prompt(own, shared + 50))
            asked[name] = (prompt, n, more, scored)
            params = SamplingParams(
                temperature=0, max_tokens=more, n=n, ignore_eos=True, prompt_logprobs=0 if scored else None
            )
            engine.add_request(name, prompt, params, cache_salt=salt)
        elif action[0] == "step":
            for _ in range(action[1]):
                take(engine.step())
        elif action[0] == "reset":
            engine.reset_prefix_cache()
            take([])
        elif str(action[1]) in asked:
            outputs = engine.abort(str(action[1]))
            aborted |= {(output.request_id, output.index) for output in outputs}
            take(outputs)
    while engine.has_unfinished():
        before = engine.stats()
        take(engine.step())
        after = engine.stats()
        assert (after.steps, after.preemptions) != (before.steps, before.preemptions)
    all_back(engine)
    for name, (prompt, n, more, scored) in asked.items():
        wanted = model.answer(prompt, 40)[:more]
        for outputs in (found[name, i] for i in range(n)):
            last, got = outputs[-1], ids_of(outputs)
            assert last.finish_reason == ("abort" if (name, last.index) in aborted else "length"), last.error
            assert got == wanted[: len(got)] if (name, last.index) in aborted else got == wanted
            assert sum(output.finished for output in outputs) == 1
            if scored and got:
                logprobs = [entry.logprob for output in outputs for entry in output.prompt_logprobs]
                assert [entry.token for output in outputs for entry in output.prompt_logprobs] == list(prompt[1:])
                if case != "plain" and len(prompt) > 1:
                    scores = model.logprobs(prompt)[range(len(prompt) - 1), list(prompt[1:])]
                    assert (torch.tensor(logprobs) - scores).abs().max() <= 1e-4
