"""Prefix caching: hit or miss, the oracle's tokens and log-probabilities; snapshots are never in a sequence's way."""

from __future__ import annotations

import dataclasses

import pytest
from helpers.engines import all_back, full_logprobs, ids_of
from helpers.exported import VOCABULARY
from prefix_models import HEADS, SCORED, SHORT, cached, make_models, run

from megatron.dmc.inference import EngineConfig, SamplingParams


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory):
    return make_models(tmp_path_factory.mktemp("models"))


# ------------------------------------------------------------------------------------------------------------ hit or
# miss


CASES = ["half", "window", "unbounded", "no merging", "one slot", "llama 3", "qwen 3", "query", "adapter, self"]


@pytest.mark.parametrize("chunk", [512, 9])
@pytest.mark.parametrize("case", CASES)
def test_hits_and_misses_have_the_same_logits(case: str, chunk: int, models) -> None:
    """The same prompt, a longer one, ones that part from it, and the next turn of a conversation."""
    model = models(case)
    engine = model.engine(max_num_seqs=2, max_num_batched_tokens=chunk, prefix_cache_min_tokens=8)
    first, other, third = (
        model.prompt(60),
        (*model.prompt(60)[:41], *model.prompt(20, 7)),
        (*model.prompt(60)[:41], 9, 8, 7),
    )
    turn = (*first, *model.answer(first, 6), *model.prompt(11, 3))
    queries = hits = 0
    for prompt, wanted in (
        (first, 0),
        (first, 60),
        ((*first, 5), 60),
        (other, 0),
        (third, 41),
        (turn, 65),
        (turn, len(turn)),
        ((*other, 1), 61),
        (first[:41], 41),
        (first[:20], 0),
        (first[:4], 0),
    ):
        before = engine.stats()
        found = run(engine, prompt, params=SCORED)
        (outputs,) = found.values()
        answer = ids_of(outputs)
        assert answer == model.answer(prompt, 6)
        scores = model.logprobs((*prompt, *answer[:-1]))[len(prompt) - 1 :]
        assert (full_logprobs(outputs) - scores).abs().max() <= 1e-4
        assert cached(found) == [wanted], prompt
        after = engine.stats()
        assert after.prompt_tokens - before.prompt_tokens == len(prompt) - wanted
        queries, hits = queries + len(prompt), hits + wanted
        assert (after.prefix_cache_queries, after.prefix_cache_hits) == (queries, hits)
        oracle = model.exported.oracle()
        oracle.run([*prompt, *answer[:-1]])
        assert outputs[-1].cache.slots == tuple(map(tuple, oracle.lengths().tolist()))
    all_back(engine)


def test_a_plain_model(models) -> None:
    model = models("plain")
    engine = model.engine(max_num_seqs=2, prefix_cache_min_tokens=8)
    first, other = model.prompt(48), (*model.prompt(48)[:32], *model.prompt(20, 7))  # both around page edges
    turn = (*first, *model.answer(first, 6), 4)
    for prompt, wanted in ((first, 0), (first, 48), (other, 0), ((*other, 3), 52), ((*first[:32], 2), 32), (turn, 53)):
        found = run(engine, prompt)
        assert ids_of(found["0", 0]) == model.answer(prompt, 6) and cached(found) == [wanted]
    all_back(engine)


@pytest.mark.parametrize("chunk", [512, 16])
def test_a_prefix_that_many_have_is_read_once(chunk: int, models) -> None:
    """Also by requests that come together: the first stops where they part, and the others wait for it. One that shares
    nothing does not wait."""
    model = models("half")
    engine = model.engine(max_num_seqs=8, max_num_batched_tokens=chunk, prefix_cache_min_tokens=8)
    shared = model.prompt(50)
    prompts = [(*shared, *model.prompt(3, i + 10)) for i in range(6)] + [model.prompt(7, 30)]
    found = run(engine, *prompts)
    for i, prompt in enumerate(prompts):
        assert ids_of(found[str(i), 0]) == model.answer(prompt, 6)
    assert cached(found) == [0, 50, 50, 50, 50, 50, 0]
    assert engine.stats().prompt_tokens == 50 + 6 * 3 + 7
    if chunk == 512:
        assert found["6", 0][-1].timing.first_token < found["1", 0][-1].timing.first_token
    all_back(engine)


@pytest.mark.parametrize(("length", "rows"), [(60, 8), (60, 2), (3, 8), (1, 8)])
def test_answers_of_one_request_share_its_prompt(length: int, rows: int, models) -> None:
    model = models("half")
    engine = model.engine(max_num_seqs=rows)
    prompt = model.prompt(length)
    found = run(engine, prompt, params=dataclasses.replace(SHORT, n=5))
    assert all(ids_of(outputs) == model.answer(prompt, 6) for outputs in found.values()) and len(found) == 5
    assert cached(found) == [0] + 4 * [length] and engine.stats().prompt_tokens == length
    all_back(engine)
    # Drawn ones are those of single requests with seed + i.
    params = SamplingParams(n=4, seed=5, max_tokens=12, ignore_eos=True)
    several = [ids_of(outputs) for _, outputs in sorted(run(engine, prompt, params=params).items())]
    for i, answer in enumerate(several):
        alone = model.engine(enable_prefix_caching=False)
        assert answer == ids_of(run(alone, prompt, params=dataclasses.replace(params, n=1, seed=5 + i))["0", 0])
    assert len(set(several)) == 4


# Pages per head: three full ones once, the fourth in each of four answers, and in the snapshot of the prompt; beside it
# that of the latest four tokens where there is a window.
@pytest.mark.parametrize(("case", "used", "snapshot"), [("no merging", 3 + 4, 1), ("no eviction", 3 + 4 + 4, 2)])
def test_shared_pages_are_counted_once(case: str, used: int, snapshot: int, models) -> None:
    model = models(case)
    engine = model.engine(num_pages=100, max_num_seqs=4, max_prefix_snapshots=4)
    engine.add_request("a", model.prompt(60), dataclasses.replace(SHORT, n=4))
    for _ in range(2):
        engine.step()
        engine.cache.check_integrity()
    stats = engine.stats()
    assert (stats.running, stats.pages_used, stats.pages_cached) == (4, HEADS * used, HEADS * snapshot)
    assert stats.slots_used == HEADS * (48 + 13 + 3 * 12) and stats.tokens_held == 61 + 3 * 60
    assert (
        stats.waste == pytest.approx(1 - stats.slots_used / (16 * stats.pages_used)) and stats.compression_ratio == 1.0
    )
    engine.abort("a")
    all_back(engine)


def test_sharing_makes_room_for_more(models) -> None:
    """Two prompts of 16 pages fill the pool; of four answers to one prompt, three need four pages each."""
    model, most = models("no merging", measured_cr=1.0), []
    for caching in (True, False):
        engine = model.engine(num_pages=2 * 16, max_num_seqs=4, enable_prefix_caching=caching)
        engine.add_request("a", model.prompt(60), dataclasses.replace(SHORT, n=4, max_tokens=3))
        running = []
        while engine.has_unfinished():
            engine.step()
            engine.cache.check_integrity()
            running.append(engine.stats().running)
        most.append(max(running))
        all_back(engine)
    assert most == [4, 1]


# --------------------------------------------------------------------------------------------- snapshots are in no
# one's way


@pytest.mark.parametrize("case", ["half", "no merging"])
@pytest.mark.parametrize("rows", [2, 5])
def test_a_full_cache_changes_nothing_for_others(case: str, rows: int, models) -> None:
    """Requests that share nothing with a cache full of snapshots run as in an engine without them, step by step: no
    refusal, no preemption, no smaller batch, no later token.
    """
    model = models(case)
    options = dict(
        num_pages=9 * HEADS * (1 if case == "no merging" else 2) // 2, max_num_seqs=rows, max_num_batched_tokens=40
    )
    histories = []
    for caching in (True, False):
        engine = model.engine(enable_prefix_caching=caching, prefix_cache_min_tokens=4, **options)
        for seed in range(20, 40):
            run(engine, model.prompt(30, seed))
        before = engine.stats()
        assert caching == (before.pages_cached > 0.8 * before.pages) and before.prefix_cache_hits == 0
        for i, n in enumerate((40, 14, 3, 33, 21, 50)):
            engine.add_request(
                str(i), model.prompt(n, i), SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
            )
        history = []
        while engine.has_unfinished():
            outputs = sorted((o.request_id, o.tokens, o.finish_reason, o.error) for o in engine.step())
            engine.cache.check_integrity()
            stats = engine.stats()
            history.append(
                (outputs, stats.running, stats.waiting, stats.preemptions, stats.pages_used, stats.prompt_tokens)
            )
        histories.append(history)
        all_back(engine)
    assert histories[0] == histories[1]
    assert case == "half" or history[-1][3] > 0


def test_the_least_recently_used_goes_first(models) -> None:
    model = models("half")
    engine = model.engine(max_num_seqs=1, max_prefix_snapshots=3)
    one_token = dataclasses.replace(SHORT, max_tokens=1)  # leaves one snapshot each
    a, b, c, d = (model.prompt(40, seed) for seed in range(4))

    def hit(prompt: tuple[int, ...]) -> bool:
        return cached(run(engine, prompt, params=one_token)) == [40]

    # Rows for three, and a row to run in.
    assert not any(map(hit, (a, b, c)))
    assert hit(a) and hit(c) and not hit(d)  # b goes
    assert hit(a) and hit(c) and hit(d)
    assert not hit(b) and not hit(a)  # a goes, c goes
    assert hit(d) and hit(b)
    all_back(engine)
    # Use counts from when a sequence starts: the prompt that is being answered is not forgotten for another one.
    engine = model.engine(max_num_seqs=2, max_prefix_snapshots=2)
    assert not any(map(hit, (a, b)))
    engine.add_request("long", a, dataclasses.replace(SHORT, max_tokens=30))
    engine.step()
    assert not hit(c)
    engine.abort("long")
    assert hit(a) and hit(c) and not hit(b)
    all_back(engine)


@pytest.mark.parametrize("case", ["no merging", "plain"])
def test_a_snapshot_that_cannot_be_copied_is_used_up(case: str, models) -> None:
    """Two pages are free beside those of the snapshot: going on needs no more, a copy would. Some of its pages were
    shared, with a snapshot of the prompt that had to go.
    """
    model = models(case)
    heads = HEADS if case == "no merging" else 8
    engine = model.engine(num_pages=5 * heads + 2, max_num_seqs=2)
    first = model.prompt(60)
    answer = ids_of(run(engine, first)["0", 0])
    assert engine.stats().pages_cached == 5 * heads and engine.kv_cache_manager.tree.num_snapshots == 1
    prompt = (*first, *answer, 5)
    engine.add_request("a", prompt, SHORT)
    (output,) = engine.step()
    engine.cache.check_integrity()
    stats = engine.stats()
    assert (output.num_cached_tokens, stats.pages_cached, stats.pages_used) == (65, 0, 5 * heads)
    got = output.tokens + tuple(token for _ in range(3) for output in engine.step() for token in output.tokens)
    assert len(got) == 4 and got == model.answer(prompt, 4)
    engine.abort("a")
    all_back(engine)


def test_a_preempted_sequence_finds_its_prompt(models) -> None:
    model = models("no merging")
    params = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
    read = []
    for caching in (True, False):
        engine = model.engine(
            num_pages=HEADS * 9, max_num_seqs=2, prefix_cache_min_tokens=8, enable_prefix_caching=caching
        )
        prompts = (model.prompt(20, 1), model.prompt(46, 2))
        found = run(engine, *prompts, params=params)
        for i, prompt in enumerate(prompts):
            assert ids_of(found[str(i), 0]) == model.answer(prompt, 60)
        assert engine.stats().preemptions > 0 and cached(found) == [0, 0]
        read.append(engine.stats().prompt_tokens)
        all_back(engine)
    assert read[0] < read[1]


def test_no_rows_for_snapshots(models) -> None:
    """They live in idle rows, and nothing is lost when there are none."""
    model = models("half")
    engine = model.engine(max_num_seqs=2, max_prefix_snapshots=0)
    prompts = [model.prompt(40, seed) for seed in (1, 2, 1, 2, 1)]
    found = run(engine, *prompts)
    for i, prompt in enumerate(prompts):
        assert ids_of(found[str(i), 0]) == model.answer(prompt, 6)
    assert cached(run(engine, prompts[0])) == [40]
    all_back(engine)


# --------------------------------------------------------------------------------------------------- what may not be
# shared


def test_prompt_logprobs_are_read(models) -> None:
    """A hit would have none; the answers of one request share them."""
    model = models("half")
    engine = model.engine(max_num_batched_tokens=24, max_num_seqs=4)
    prompt = model.prompt(60)
    run(engine, prompt)
    assert cached(run(engine, prompt)) == [60]
    before = engine.stats()
    found = run(engine, prompt, params=dataclasses.replace(SCORED, n=3, prompt_logprobs=VOCABULARY))
    wanted = model.logprobs((*prompt, *model.answer(prompt, 5)))
    for outputs in found.values():
        assert (full_logprobs(outputs) - wanted).abs().max() <= 1e-4
    assert cached(found) == [0, 60, 60] and engine.stats().prompt_tokens - before.prompt_tokens == 60
    all_back(engine)


def test_salts_keep_requests_apart(models) -> None:
    model = models("half")
    engine, prompt = model.engine(), model.prompt(50)
    for salt, wanted in (("a", 0), ("a", 50), ("b", 0), (None, 0), ("b", 50), (None, 50)):
        found = run(engine, prompt, cache_salt=salt)
        assert cached(found) == [wanted] and ids_of(found["0", 0]) == model.answer(prompt, 6)
    engine.reset_prefix_cache()
    assert cached(run(engine, prompt, cache_salt="c")) == [0]
    assert set(engine.kv_cache_manager.tree._roots) == {"c"}  # nothing remains of a salt that nobody uses
    all_back(engine)


def test_reset_and_off(models) -> None:
    model = models("half")
    engine, off = model.engine(), model.engine(enable_prefix_caching=False)
    prompt = model.prompt(50)
    for name in ("cached", "reset"):
        assert cached(run(engine, prompt)) == [0], name
        engine.reset_prefix_cache()
        engine.cache.check_integrity()
        assert engine.stats().pages_cached == 0
    # In the middle of an answer, which goes on.
    engine.add_request("a", prompt, SHORT)
    outputs = engine.step()
    engine.reset_prefix_cache()
    while engine.has_unfinished():
        outputs += engine.step()
        engine.cache.check_integrity()
    assert ids_of(outputs) == model.answer(prompt, 6)
    for _ in range(2):
        assert cached(run(off, prompt, params=dataclasses.replace(SHORT, n=2))) == [0, 0]
        assert (off.stats().prefix_cache_queries, off.stats().pages_cached) == (0, 0)
    assert off.cache.rows == off.sizes.max_num_seqs and off.kv_cache_manager.nbytes() == 0
    all_back(engine)
    all_back(off)


def test_a_spoiled_state_is_not_kept(models) -> None:
    """Logits that are no numbers end a request; the same prompt is answered once they are."""
    model = models("half")
    engine = model.engine(max_num_batched_tokens=16, max_num_seqs=2)
    prompt = model.prompt(60)
    embedding = engine.model.embedding.weight.clone()
    engine.model.embedding.weight[prompt[45]] = float("nan")
    assert run(engine, prompt)["0", 0][-1].finish_reason == "error"
    engine.model.embedding.weight.copy_(embedding)
    for again, wanted in (((*prompt, 5), 0), (prompt, 0), (prompt, 60)):
        found = run(engine, again)
        assert ids_of(found["0", 0]) == model.answer(again, 6) and cached(found) == [wanted]
    all_back(engine)


def test_a_step_that_raises_spoils_no_snapshot(models, monkeypatch: pytest.MonkeyPatch) -> None:
    model = models("half")
    engine, prompt = model.engine(), model.prompt(60)
    run(engine, prompt)
    forward = engine.model.forward

    def fail(*args) -> None:
        forward(*args)
        raise RuntimeError("out of memory")

    for name in ("a", "b"):
        engine.add_request(name, prompt, SHORT)
    engine.step()  # drawn from the snapshot
    with monkeypatch.context() as patch:
        patch.setattr(engine.model, "forward", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            engine.step()
    engine.cache.check_integrity()
    before = engine.stats().prompt_tokens
    found: dict[str, list[int]] = {"a": [], "b": []}
    while engine.has_unfinished():
        for output in engine.step():
            found[output.request_id] += output.tokens
    assert found["a"] == found["b"] == list(model.answer(prompt, 6))[1:] and engine.stats().prompt_tokens == before
    all_back(engine)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"max_prefix_snapshots": -1}, "max_prefix_snapshots is -1; it must be an integer, at least 0"),
        ({"prefix_cache_min_tokens": 0}, "prefix_cache_min_tokens is 0; it must be an integer, at least 1"),
    ],
)
def test_bad_settings(setting: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EngineConfig(**setting)
