"""The engine over a cache of 8 bits: against the models over the oracles' caches that round in Python."""

from __future__ import annotations

import pytest
import torch
from helpers.engines import Model, all_back, drain, full_logprobs, ids_of
from helpers.exported import GROUPS, LAYERS, VOCABULARY
from helpers.quantized import KV_DTYPES, clear_answer, nearly, on_two_ranks, rounding

from megatron.dmc.inference import EngineConfig, SamplingParams

CASES = ["half", "unbounded", "no merging", "adapter, self"]
on_models = pytest.mark.parametrize(("case", "name"), [*((case, "int8") for case in CASES), ("half", "fp8_e4m3")])


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Model]:
    root = tmp_path_factory.mktemp("models")
    return {case: Model(root / str(i), case) for i, case in enumerate(CASES)}


@on_models
def test_log_probabilities_are_the_oracles(models: dict[str, Model], case: str, name: str) -> None:
    """A whole prompt, and chunks of 7."""
    model = models[case]
    prompt, new = model.prompt(60), 6
    params = SamplingParams(
        temperature=0, max_tokens=new, logprobs=VOCABULARY, prompt_logprobs=VOCABULARY, ignore_eos=True
    )
    for chunk in (64, 7):
        engine = model.engine(kv_cache_dtype=name, num_pages=100, max_num_seqs=1, max_num_batched_tokens=chunk)
        engine.add_request("0", prompt, params)
        outputs = drain(engine)["0", 0]
        ids = (*prompt, *ids_of(outputs))
        oracle = model.exported.oracle(stored=rounding(KV_DTYPES[name]))
        nearly(full_logprobs(outputs), torch.log_softmax(oracle.run(list(ids[:-1])), dim=-1), share=0.02)


@on_models
def test_shared_prefixes_copies_and_preemption(models: dict[str, Model], case: str, name: str) -> None:
    """In a pool that all of it does not fit: always the oracle's tokens, and every page is back."""
    model = models[case]
    engine = model.engine(
        kv_cache_dtype=name,
        num_pages=LAYERS * GROUPS * 10,
        max_num_seqs=6,
        max_num_batched_tokens=32,
        max_prefix_snapshots=3,
        prefix_cache_min_tokens=8,
    )
    shared = model.prompt(33)
    asked = {str(i): (*shared[: 33 - 11 * (i % 3)], *model.prompt(5 + i, 50 + i)) for i in range(5)}
    params = SamplingParams(temperature=0, max_tokens=24, n=2, ignore_eos=True)
    for request, prompt in asked.items():
        engine.add_request(request, prompt, params)
    found = {}
    for step in range(40):
        for output in engine.step():
            found.setdefault((output.request_id, output.index), []).append(output)
        if step in (6, 20):
            engine.scheduler.preempt(engine.scheduler.running[-1])
    for key, outputs in drain(engine).items():
        found.setdefault(key, []).extend(outputs)
    assert engine.stats().preemptions >= 2 and engine.stats().prefix_cache_hits
    compared = 0
    for request, prompt in asked.items():
        want = clear_answer(model, name, prompt, 24)
        compared += len(want)
        for index in range(2):
            assert ids_of(found[request, index])[: len(want)] == want
    assert compared > 30
    all_back(engine)


def test_pages_and_bytes(models: dict[str, Model]) -> None:
    """The same memory holds almost four times the pages of fp32, and outputs tell what a token takes."""
    model = models["half"]
    pages, d = {}, model.exported.d
    for name in ("auto", *KV_DTYPES):
        engine = model.engine(
            kv_cache_dtype=name, kv_cache_memory_bytes=1 << 20, max_num_seqs=128, max_num_batched_tokens=128
        )
        state, slot = engine.cache.state, 2 * (4 * d if name == "auto" else d + 2)
        assert engine.sizes.page_bytes == 16 * slot == 16 * engine.cache.slot_bytes
        tensors = (state.k_pages, state.v_pages, state.k_scales, state.v_scales)
        assert sum(x.nbytes for x in tensors) == engine.sizes.num_pages * engine.sizes.page_bytes
        engine.add_request("0", model.prompt(20), SamplingParams(max_tokens=4, ignore_eos=True))
        (use,) = (output.cache for output in drain(engine)["0", 0] if output.finished)
        assert use.bytes_per_token == pytest.approx(slot * use.total_slots / 23)
        pages[name] = engine.sizes.num_pages
    assert pages["int8"] == pages["fp8_e4m3"]
    assert pages["int8"] / pages["auto"] == pytest.approx((2 * 16 * 4 * d + 8) / (2 * 16 * (d + 2) + 8), rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize(("case", "name"), [("half", "int8"), ("adapter, self", "fp8_e4m3")])
def test_two_ranks(models: dict[str, Model], case: str, name: str) -> None:
    on_two_ranks(models[case], name)


@pytest.mark.slow
def test_two_ranks_on_quantized_weights(models: dict[str, Model]) -> None:
    """The first token's log-probability is that of one rank, within the rounding of bf16."""
    model = models["half"]
    answers = on_two_ranks(model, "int8", quantization="int8")
    engine = model.engine(kv_cache_dtype="int8", quantization="int8")
    engine.add_request("0", model.prompt(50, 0), SamplingParams(temperature=0, max_tokens=1, logprobs=VOCABULARY))
    want = full_logprobs(drain(engine)["0", 0])[0]
    assert abs(float(want[answers["tokens"][0][0]]) - answers["logprobs"][0][0]) <= 0.05


def test_refused_by_name() -> None:
    with pytest.raises(ValueError, match="kv_cache_dtype is 'int4'; use auto, int8, fp8_e4m3"):
        EngineConfig(kv_cache_dtype="int4")
