"""Sampling: every parameter's effect, the distribution that is drawn from, and wrong values by name."""

from __future__ import annotations

import math
import re

import pytest
import torch
from torch import Tensor

from megatron.dmc.inference import InvalidRequest, SamplingParams
from megatron.dmc.inference.sampler import (
    BLOCK,
    CANDIDATES,
    Sampler,
    SamplerState,
    _top_sorted,
    argmax,
    constrain,
    logprobs,
    truncate,
)

SIZE = 12


def state(
    prompt: tuple[int, ...] = (1, 2),
    answer: tuple[int, ...] = (),
    stop: tuple[int, ...] = (),
    index: int = 0,
    **params: object,
) -> SamplerState:
    made = SamplerState.start(SamplingParams(**params), prompt, stop, SIZE, index)
    for token in answer:
        made.record(token)
    return made


def some_logits(n: int = 1, seed: int = 0) -> Tensor:
    return torch.randn(n, SIZE, generator=torch.Generator().manual_seed(seed)) * 2


def draw(logits: Tensor, n: int = 20_000, seed: int = 1, **params: object) -> Tensor:
    """Frequencies of n draws from one row: fp32 [vocabulary]."""
    tokens = Sampler(seed=seed)(logits.expand(n, -1), [state(**params)] * n)
    return tokens.bincount(minlength=SIZE) / n


def close(frequencies: Tensor, probabilities: Tensor, n: int = 20_000) -> None:
    """Within 4.5 standard deviations of the binomial, everywhere; zero where nothing may be drawn."""
    assert (frequencies[probabilities == 0] == 0).all()
    bound = 4.5 * (probabilities * (1 - probabilities) / n).sqrt() + 1e-4
    assert ((frequencies - probabilities).abs() <= bound).all(), (frequencies, probabilities)


@pytest.fixture(params=["as CPUs draw", "as GPUs draw"])
def way(request, monkeypatch) -> None:
    if request.param == "as GPUs draw":
        monkeypatch.setattr(Sampler, "_by_sum", Sampler._by_noise)


both_ways = pytest.mark.usefixtures("way")


@both_ways
def test_greedy_is_exact_beside_random_rows() -> None:
    logits = some_logits(6)
    states = [state(temperature=0.0 if i % 2 else 5.0, top_p=0.1 if i % 2 else 1.0) for i in range(6)]
    for seed in range(20):
        tokens = Sampler(seed=seed)(logits, states)
        assert torch.equal(tokens[1::2], logits.argmax(-1)[1::2])


@both_ways
@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
def test_temperature(temperature: float) -> None:
    logits = some_logits()
    close(draw(logits, temperature=temperature), torch.softmax(logits[0] / temperature, -1))


@both_ways
def test_a_tiny_temperature_does_not_overflow() -> None:
    logits = some_logits() * 1e4
    assert draw(logits, n=50, temperature=2e-5)[logits.argmax()] == 1


@both_ways
@pytest.mark.parametrize("top_k", [1, 3, 11, 12, 99])
def test_top_k(top_k: int) -> None:
    logits = some_logits()
    kept = logits[0] >= logits[0].sort(descending=True).values[min(top_k, SIZE) - 1]
    close(draw(logits, top_k=top_k), torch.softmax(logits[0].masked_fill(~kept, -math.inf), -1))


@both_ways
@pytest.mark.parametrize("top_p", [1e-6, 0.3, 0.7, 0.999])
def test_top_p(top_p: float) -> None:
    logits = some_logits()
    p, order = torch.softmax(logits[0], -1).sort(descending=True)
    count = int(((p.cumsum(0) - p) < top_p).sum())
    assert p[:count].sum() >= top_p > p[: count - 1].sum() - 1e-9
    wanted = torch.zeros(SIZE)
    wanted[order[:count]] = p[:count] / p[:count].sum()
    close(draw(logits, top_p=top_p), wanted)


@both_ways
def test_min_p() -> None:
    logits = some_logits()
    p = torch.softmax(logits[0], -1)
    wanted = p * (p >= 0.2 * p.max())
    assert 1 < (wanted > 0).sum() < SIZE
    close(draw(logits, min_p=0.2), wanted / wanted.sum())
    assert draw(logits, n=100, min_p=1.0)[p.argmax()] == 1


@both_ways
def test_top_k_then_top_p() -> None:
    """top_p counts within what top_k has left."""
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1] + [0.0] * 8]).log()
    p = truncate(logits, [SamplingParams(top_k=2, top_p=0.5)])
    assert (p > 0).tolist()[0][:4] == [True, False, False, False]  # 0.4 / 0.7 > 0.5
    p = truncate(logits, [SamplingParams(top_k=2, top_p=0.6)])
    assert (p > 0).tolist()[0][:4] == [True, True, False, False]


def test_ties_keep_exactly_top_k() -> None:
    assert (truncate(torch.zeros(1, SIZE), [SamplingParams(top_k=3)]) > 0).sum() == 3


def test_rows_have_their_own_parameters() -> None:
    logits = some_logits(3)
    p = truncate(logits, [SamplingParams(), SamplingParams(top_k=1), SamplingParams(top_p=0.5)])
    assert (p[0] > 0).all() and (p[1] > 0).sum() == 1
    assert torch.equal(p[0], torch.softmax(logits[0], -1))


@pytest.mark.parametrize("size", [BLOCK - 1, BLOCK, 5 * BLOCK, 5 * BLOCK + 3])
def test_sums_of_blocks_choose_what_the_sum_of_all_does(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """Also for the ends of [0, 1), where most tokens are impossible, and where whole blocks are."""
    generator = torch.Generator().manual_seed(0)
    p = torch.rand(400, size, generator=generator) * (torch.rand(400, size, generator=generator) < 0.05)
    p[200:, BLOCK // 2 : 3 * BLOCK] = 0
    p[:, [3, -1]] += 1e-3
    numbers = torch.rand(400, 1, generator=generator, dtype=torch.float64)
    numbers[::5], numbers[1::5] = 0, 1 - 2**-53
    monkeypatch.setattr(Sampler, "_uniform", lambda self, states: numbers)
    got = Sampler()._by_sum(p, [])
    sums = p.cumsum(-1, dtype=torch.float64)
    want = torch.searchsorted(sums, numbers * sums[:, -1:], right=True)[:, 0]
    assert torch.equal(got, want) and (p.gather(1, got[:, None]) > 0).all()


@both_ways
def test_a_seed_draws_the_same_whatever_is_beside_it() -> None:
    logits = some_logits(30, seed=3)

    def run(others: int, seed: int, index: int = 0) -> list[int]:
        sampler = Sampler(seed=others)
        mine, beside = state(seed=seed, index=index), [state() for _ in range(others)]
        return [
            int(sampler(torch.cat((some_logits(others, seed=9), row[None])), [*beside, mine])[-1]) for row in logits
        ]

    assert run(0, 5) == run(3, 5) == run(7, 5)
    assert run(0, 5) != run(0, 6)
    assert run(0, 6) == run(0, 5, index=1)  # answer i of a request has seed + i
    unseeded = [Sampler(seed=s)(logits, [state()] * 30).tolist() for s in (1, 1, 2)]
    assert unseeded[0] == unseeded[1] != unseeded[2]


def test_logit_bias() -> None:
    logits = some_logits()
    changed = constrain(logits, [state(logit_bias={3: 100, 4: -100})])
    assert changed[0, 3] == logits[0, 3] + 100 and changed[0, 4] == logits[0, 4] - 100
    assert torch.equal(changed[0, 5:], logits[0, 5:]) and torch.equal(logits, some_logits())
    assert int(Sampler()(logits, [state(logit_bias={3: 100}, temperature=0)])) == 3


def test_min_tokens_forbids_the_end() -> None:
    logits = torch.zeros(1, SIZE)
    logits[0, 7] = 50
    for answer, wanted in (((), 0), ((1,), 0), ((1, 1), 7)):
        assert int(Sampler()(logits, [state(answer=answer, stop=(7,), min_tokens=2, temperature=0)])) == wanted


def test_penalties() -> None:
    logits = torch.tensor([[2.0, -2.0, 1.0, -1.0, 3.0, 0.5, *[0.0] * 6]])
    common = dict(prompt=(0, 1), answer=(2, 3, 3))
    repeated = constrain(logits, [state(**common, repetition_penalty=2.0)])[0]
    assert repeated[:6].tolist() == [1.0, -4.0, 0.5, -2.0, 3.0, 0.5]  # of the prompt and the answer
    present = constrain(logits, [state(**common, presence_penalty=0.5)])[0]
    assert present[:6].tolist() == [2.0, -2.0, 0.5, -1.5, 3.0, 0.5]  # of the answer only
    frequent = constrain(logits, [state(**common, frequency_penalty=0.5)])[0]
    assert frequent[:6].tolist() == [2.0, -2.0, 0.5, -2.0, 3.0, 0.5]  # as often as it is there
    both = constrain(logits.expand(3, -1), [state(), state(**common, presence_penalty=0.5), state()])
    assert torch.equal(both[0], logits[0]) and torch.equal(both[1], present) and torch.equal(both[2], logits[0])
    assert constrain(logits, [state(**common)]) is logits


def test_logprobs() -> None:
    logits = some_logits(3)
    tokens = torch.tensor([0, 5, int(logits[2].argmax())])
    found = logprobs(logits, tokens, [0, 2, SIZE]).entries()
    scores = torch.log_softmax(logits, -1)
    for row, entry in enumerate(found):
        assert entry.token == tokens[row] and entry.logprob == pytest.approx(float(scores[row, entry.token]))
        assert entry.rank == 1 + int((scores[row] > scores[row, entry.token]).sum())
    assert [len(entry.top) for entry in found] == [0, 2, SIZE] and found[2].rank == 1
    values = [value for _, value in found[2].top]
    assert values == sorted(values, reverse=True) and sum(map(math.exp, values)) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    ("name", "value", "limits"),
    [
        ("n", 0, "at least 1"),
        ("temperature", -0.1, "at least 0"),
        ("temperature", math.nan, "at least 0"),
        ("top_p", 0, "above 0"),
        ("top_p", 1.1, "at most 1"),
        ("top_k", -2, "at least -1"),
        ("top_k", 1.5, "an integer"),
        ("min_p", 2, "at most 1"),
        ("repetition_penalty", 0, "above 0"),
        ("presence_penalty", 3, "at most 2"),
        ("frequency_penalty", -3, "at least -2"),
        ("max_tokens", -1, "at least 0"),
        ("min_tokens", -1, "at least 0"),
        ("logprobs", -1, "at least 0"),
        ("seed", "x", "an integer"),
        ("prompt_logprobs", -1, "at least 0"),
        ("bad_words", [" "], "not empty"),
        ("allowed_token_ids", [-1], "at least 0"),
        ("stop", ["a", ""], "not empty"),
        ("stop_token_ids", [-1], "at least 0"),
        ("logit_bias", {3: 101}, "at most 100"),
        ("logit_bias", {"a": 1}, "an integer"),
        ("temperature", True, "a number"),
    ],
)
def test_wrong_values_are_named(name: str, value: object, limits: str) -> None:
    with pytest.raises(ValueError, match=f"{name}.*{re.escape(limits)}"):
        SamplingParams(**{name: value})


def test_min_tokens_above_max_tokens() -> None:
    with pytest.raises(ValueError, match="min_tokens is 5, more than max_tokens 4"):
        SamplingParams(min_tokens=5, max_tokens=4)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n", 10**5000),
        ("temperature", -(10**400)),
        ("top_p", 10**400),
        ("max_tokens", "1" * 10**6),
        ("min_tokens", 10**5000),
        ("stop", [["x"] * 10**6]),
        ("bad_words", [{"x": ["y"] * 10**6}]),
        ("stop_token_ids", ["x" * 10**6]),
        ("logit_bias", {"x" * 10**6: 1.0}),
        ("logit_bias", {1: "x" * 10**6}),
    ],
    ids=range(10),
)
def test_a_wrong_value_is_shown_in_short(name: str, value: object) -> None:
    with pytest.raises(InvalidRequest) as refused:
        SamplingParams(**{name: value})
    assert refused.value.param == name and name in str(refused.value) and len(str(refused.value)) < 300


def test_a_token_that_no_model_has_is_shown_in_short() -> None:
    with pytest.raises(InvalidRequest, match="the model has 10 tokens") as refused:
        SamplingParams(stop_token_ids=[10**5000]).check_vocabulary(10)
    assert len(str(refused.value)) < 300


@pytest.mark.parametrize("size", [2, 255, 256, 300, 49_152])
def test_argmax_is_the_first_maximum(size: int) -> None:
    """In rows of many equal numbers, at both ends, and where a row holds NaN or nothing but -inf."""
    logits = torch.randn(6, size, generator=torch.Generator().manual_seed(size))
    logits[1] = logits[1].round()
    logits[2, -1] = logits[3, 0] = 9
    logits[4, size // 2] = math.nan
    logits[5] = -math.inf
    assert torch.equal(argmax(logits), torch.from_numpy(logits.numpy().argmax(1)))


@pytest.mark.parametrize("spread", [0.1, 3.0, 8.0])
def test_candidates_leave_what_a_sort_of_all_leaves(spread: float) -> None:
    """Nuclei of a few tokens and of most, any top_k, both; many logits are equal, and the first of them is taken."""
    size, settings = 4 * CANDIDATES + 3, [(0, 0.5), (0, 0.99), (1, 1.0), (50, 1.0), (50, 0.9), (CANDIDATES + 9, 0.9999)]
    for seed in range(4):
        logits = torch.randn(len(settings), size, generator=torch.Generator().manual_seed(seed)) * spread
        logits = logits.bfloat16().float()
        got = truncate(logits, [SamplingParams(top_k=k, top_p=p) for k, p in settings])
        top_k = torch.tensor([[k or size] for k, _ in settings])
        top_p = torch.tensor([[p if p < 1 else math.inf] for _, p in settings])
        want = _top_sorted(logits, top_k, top_p)
        assert torch.equal(got > 0, want > 0)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=0)
