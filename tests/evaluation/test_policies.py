"""Cache policies against slow, obvious implementations; the model around them against transformers and the oracle."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import transformers
from helpers import families
from helpers.exported import CASES, DMS_CASES, Exported, tokens
from slow_caches import SlowCache, SlowH2O, SlowStreaming, SlowTOVA

from megatron.dmc.config import DMCConfig
from megatron.dmc.evaluation import policies
from megatron.dmc.evaluation.policies import DMC, DMS, H2O, TOVA, Budget, FullCache, Projections, StreamingLLM
from megatron.dmc.evaluation.teacher_forced import Compression, TeacherForced
from megatron.dmc.ops import EvictingOracleCache, OracleCache, rotary_frequencies

B, NG, D = 2, 2, 16
INV_FREQ = rotary_frequencies(D, 1e4)
BUDGETS = [Budget(4), Budget(4, "growing"), Budget(1.5, "growing"), Budget(16), Budget(1)]


def random_projections(g: int, s: int, seed: int = 0, neuron: str = "none", factor: float = 1.0) -> Projections:
    """fp64, so that no rounding turns a comparison; scores of some size, so that heads have opinions."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda heads: torch.randn(B, heads, s, D, dtype=torch.float64, generator=generator)
    q, k, v, logits = 1.5 * draw(NG * g), draw(NG), draw(NG), draw(NG)[..., 0]
    return Projections(q, k, v, INV_FREQ, neuron, factor, logits)


def check(policy, slow, x: Projections) -> None:
    """Output and slots after every single token."""
    attended = policy.attend(x)
    assert attended.out.shape == x.q.shape and attended.out.dtype == x.q.dtype
    for t in range(x.k.size(2)):
        decided = (x.logits[:, :, t],) if isinstance(slow, EvictingOracleCache) else ()
        out = slow.step(x.q[:, :, t], x.k[:, :, t], x.v[:, :, t], *decided)
        assert torch.allclose(attended.out[:, :, t], out, atol=2e-5, rtol=0), f"token {t}"
        assert torch.equal(attended.slots[:, :, t], slow.lengths()), f"token {t}"


SLOW = {"H2O": (H2O, SlowH2O), "TOVA": (TOVA, SlowTOVA), "StreamingLLM": (StreamingLLM, SlowStreaming)}


@pytest.mark.parametrize("g, rows", [(1, 7), (2, 7), (2, 64), (4, 7)])  # blocks of rows must not show
@pytest.mark.parametrize("budget", BUDGETS, ids=lambda b: f"{b.ratio:g}-{b.kind}")
@pytest.mark.parametrize("name", SLOW)
def test_eviction_equals_the_slow_cache(name, budget, g, rows, monkeypatch) -> None:
    monkeypatch.setattr(policies, "ROWS", rows)
    fast, slow = SLOW[name]
    s, neuron = (80 if rows == 64 else 41), {1: "none", 2: "all", 4: "query"}[g]
    factor = 1.3 if g == 2 else 1.0  # YaRN's
    x = random_projections(g, s, seed=g, neuron=neuron, factor=factor)
    cache = slow(B, NG, INV_FREQ, budget.slots(s), neuron, factor)
    check(fast(budget), cache, x)
    held = {tuple(head) for row in cache.positions() for head in row}
    if budget.ratio == 1:
        assert held == {tuple(range(s))}
    else:
        # The case is a case: something was dropped, by each head for itself, by the layer, or by age alone.
        assert all(len(head) < s for head in held)
        assert len(held) in {"H2O": (2, 3, 4), "TOVA": (2,), "StreamingLLM": (1,)}[name]


@pytest.mark.parametrize("g, rows", [(1, 7), (2, 64), (4, 7)])
def test_full_cache_and_dmc_equal_the_slow_caches(g, rows, monkeypatch) -> None:
    monkeypatch.setattr(policies, "ROWS", rows)
    x = random_projections(g, 70, seed=g, neuron="all")
    check(FullCache(), SlowCache(B, NG, INV_FREQ, neuron="all"), x)
    for window in (3, None):
        dmc = DMCConfig(decision_bias=0.2, window=window)
        check(
            DMC(dmc), OracleCache(B, NG, INV_FREQ, decision_bias=0.2, epsilon=dmc.importance_epsilon, window=window), x
        )
    for neuron in ("none", "query"):
        other = random_projections(g, 30, seed=g, neuron=neuron)
        check(FullCache(), SlowCache(B, NG, INV_FREQ, neuron=neuron), other)
        with pytest.raises(ValueError, match="a decision from every key"):
            DMC(DMCConfig()).attend(other)
    with pytest.raises(ValueError, match="does not make"):
        DMS(5).attend(dataclasses.replace(x, logits=None))


@pytest.mark.parametrize("about", ["previous", "self"])
@pytest.mark.parametrize("neuron, g, rows", [("none", 1, 7), ("query", 2, 64), ("query", 3, 7), ("all", 4, 7)])
def test_dms_equals_the_oracle(neuron, g, rows, about, monkeypatch) -> None:
    monkeypatch.setattr(policies, "ROWS", rows)
    x = random_projections(g, 70, seed=g, neuron=neuron, factor=1.3)
    for window in (1, 5, 69, 200):
        cache = EvictingOracleCache(
            B, NG, INV_FREQ, window=window, about_self=about == "self", neuron=neuron, factor=1.3
        )
        check(DMS(window, about), cache, x)
        assert (int(cache.lengths().min()) < 70) == (window < 69)


def test_what_nobody_marks_or_drops_is_the_full_cache() -> None:
    x = random_projections(2, 50, neuron="all")
    x = dataclasses.replace(x, logits=torch.full_like(x.logits, -1.0))
    full = FullCache().attend(x)
    same = [DMS(6), DMC(DMCConfig(decision_bias=1e9)), *(kind(Budget(1)) for kind in (H2O, TOVA, StreamingLLM))]
    for policy in same:
        attended = policy.attend(x)
        assert torch.allclose(attended.out, full.out, atol=1e-6) and torch.equal(attended.slots, full.slots), policy
    # Everything is marked: a sliding window.
    window = DMS(6).attend(dataclasses.replace(x, logits=-x.logits))
    assert window.slots[0, 0].tolist() == [min(n, 7) for n in range(1, 51)]


def test_budgets() -> None:
    assert Budget(4).slots(100) == [25] * 101
    growing = Budget(4, "growing").slots(100)
    assert growing[:33] == [8] * 33 and growing[33] == 9 and growing[100] == 25
    assert all(b - a in (0, 1) for a, b in zip(growing, growing[1:]))
    for wrong in (dict(ratio=0.5), dict(ratio=float("nan")), dict(ratio=2, kind="some"), dict(ratio=2, minimum=0)):
        with pytest.raises(ValueError):
            Budget(**wrong)
    with pytest.raises(ValueError, match="no window"):
        StreamingLLM(Budget(2, minimum=4))
    with pytest.raises(ValueError, match="window is 0"):
        DMS(0)


def test_compression_is_measured_over_the_sequence() -> None:
    """Two layers, one sequence, one head, four tokens, by hand."""
    slots = torch.tensor([[[[1, 2, 3, 4]]], [[[1, 1, 2, 2]]]])
    found = Compression.of(slots)
    assert found.at_end == pytest.approx(8 / 6)
    assert found.reads == pytest.approx(20 / 16)
    assert found.mean == pytest.approx(8 / (4 + 1 + 1 / 2 + 2 / 3 + 1 / 2))
    assert found.by_head.tolist() == [[1.0], [2.0]]
    # A fixed budget reaches its ratio at the end only, a growing one all along.
    x = random_projections(1, 400)
    fixed, growing = (Compression.of(H2O(Budget(4, kind)).attend(x).slots[None]) for kind in ("fixed", "growing"))
    assert fixed.at_end == growing.at_end == 4
    assert fixed.reads == pytest.approx(sum(range(1, 401)) / sum(min(n, 100) for n in range(1, 401)))
    assert growing.reads > 3.9 > 2.3 > fixed.reads > fixed.mean


@pytest.mark.parametrize("case", ["llama2", "llama3.1", "llama3.2", "mistral", "qwen2", "qwen2.5-yarn", "qwen3"])
def test_plain_model_computes_what_transformers_does(case, tmp_path) -> None:
    families.make(case, tmp_path / "model")
    # Loaded again: what is in half precision there has its frequencies in it too.
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    model = TeacherForced.load(tmp_path / "model")
    ids = torch.randint(131, (3, 90), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = reference(ids).logits[:, :-1]
    want = torch.log_softmax(logits, dim=-1).gather(-1, ids[:, 1:, None])[..., 0]
    scored = model.score(ids, batch=2)
    assert torch.allclose(scored.log_prob, want, atol=1e-4)
    assert torch.equal(scored.correct, logits.argmax(dim=-1) == ids[:, 1:])
    assert scored.compression().at_end == scored.compression().mean == 1


def slow_policies(exported: Exported, length: int) -> dict:
    """policy -> the slow cache of one layer."""
    d, free, last = exported.inv_freq, Budget(3, "growing"), (exported.decision.neuron, exported.rotary_factor)
    slots = free.slots(length)
    return {
        H2O(free): lambda: SlowH2O(1, 2, d, slots, *last),
        TOVA(free): lambda: SlowTOVA(1, 2, d, slots, *last),
        StreamingLLM(free): lambda: SlowStreaming(1, 2, d, slots, *last),
        FullCache(): lambda: SlowCache(1, 2, d, None, *last),
        None: None,  # the model's own: DMC or DMS
    }


WHOLE = {name: CASES[name] for name in ("window", "every head", "zero_out")}
WHOLE |= DMS_CASES


@pytest.mark.parametrize("case", WHOLE)
def test_whole_models_equal_decoding_step_by_step(case, tmp_path) -> None:
    """Layer by layer over whole sequences, against token by token through the model with slow caches."""
    exported = Exported(tmp_path / "model", **WHOLE[case])
    model = TeacherForced.load(tmp_path / "model")
    length = 36
    rows = torch.tensor([tokens(length, 1), tokens(length, 2)])
    seen = set()
    for policy, cache in slow_policies(exported, length).items():
        scored = model.score(rows, policy)
        for i, ids in enumerate(rows.tolist()):
            oracle = exported.oracle()
            if cache is not None:
                oracle.caches = [cache() for _ in oracle.caches]
            want = torch.log_softmax(oracle.run(ids), dim=-1)[:-1]
            assert torch.allclose(scored.log_prob[i], want.gather(-1, rows[i, 1:, None])[:, 0], atol=1e-4), policy
            assert torch.equal(scored.slots[:, i, :, -1].long(), oracle.lengths()), policy
        seen.add(round(float(scored.log_prob.sum()), 2))
    full = case in ("zero_out", "dms zero_out", "no eviction")
    assert len(seen) == 5 - full  # the policies differ
    assert (type(model.own_policy()) is FullCache) == case.endswith("zero_out")


def test_wrong_input_is_refused(tmp_path) -> None:
    families.make("llama3", tmp_path / "model")
    model = TeacherForced.load(tmp_path / "model")
    wrong = {
        "at least 2": [[1]],
        r"shape \[2\]": [1, 2],
        "129 tokens exceed": [[1] * 129],
        "to 131": [[1, 131]],
        "from -1": [[-1, 3]],
    }
    for message, ids in wrong.items():
        with pytest.raises(ValueError, match=message):
            model.score(torch.tensor(ids))
    with pytest.raises(ValueError, match="a decision from every key"):
        model.score(torch.tensor([[1, 2]]), DMC(DMCConfig()))
    with pytest.raises(ValueError, match="not a directory"):
        TeacherForced.load(tmp_path / "nothing")
