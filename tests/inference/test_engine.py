"""The engine against the step-by-step oracle and transformers: the same tokens for any chunking, batch, schedule and
pool.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers import families
from helpers.engines import GREEDY, Model, all_back, drain, full_logprobs, ids_of
from helpers.examples import examples
from helpers.exported import CASES, DMS_CASES, GROUPS, LAYERS, VOCABULARY
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron.dmc import kernels
from megatron.dmc.inference import LLM, Engine, EngineConfig, SamplingParams
from megatron.dmc.kernels.state import REFUSED

HEADS = LAYERS * GROUPS
SCORED = SamplingParams(temperature=0, max_tokens=16, logprobs=VOCABULARY, prompt_logprobs=VOCABULARY)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory):
    """case -> Model, made when first asked for."""
    root, made = tmp_path_factory.mktemp("models"), {}

    def get(case: str, **more: object) -> Model:
        key = (case, *sorted(more.items()))
        if key not in made:
            made[key] = Model(root / str(len(made)), case, **more)
        return made[key]

    return get


# ----------------------------------------------------------------------------------------------------- the same tokens


@pytest.mark.parametrize("case", [*CASES, *DMS_CASES])
def test_logits_and_tokens_equal_the_oracle(case: str, models) -> None:
    """Every position's log-probabilities, of prompt and answer, within 1e-4; prompts read whole and in chunks."""
    model = models(case)
    prompt = model.prompt(70)
    for chunk in (512, 7, 1):
        engine = model.engine(max_num_seqs=1, max_num_batched_tokens=chunk)
        engine.add_request("a", prompt, SCORED)
        (outputs,) = drain(engine, check=False).values()
        answer = ids_of(outputs)
        assert answer == model.answer(prompt, 16)
        wanted = model.logprobs((*prompt, *answer[:-1]))
        assert (full_logprobs(outputs) - wanted).abs().max() <= 1e-4
        use = outputs[-1].cache
        oracle = model.exported.oracle()
        oracle.run([*prompt, *answer[:-1]])
        assert use.slots == tuple(map(tuple, oracle.lengths().tolist())) and use.tokens == 85
        assert use.compression_ratio == pytest.approx(85 * HEADS / int(oracle.lengths().sum()))


@pytest.mark.parametrize("case", ["llama2", "llama3.2", "mistral", "qwen2", "qwen2.5-tied", "qwen2.5-yarn", "qwen3"])
def test_plain_models_equal_transformers(case: str, tmp_path: Path) -> None:
    reference = families.make(case, tmp_path / "model", dtype="float32")
    llm = LLM(tmp_path / "model", max_num_batched_tokens=16, max_num_seqs=4)
    prompts = [
        torch.randint(1, 131, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (1, 3, 40, 64, 17)
    ]
    results = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=20, ignore_eos=True, logprobs=0))
    for prompt, result in zip(prompts, results):
        got = result.outputs[0].token_ids
        ids = torch.tensor([[*prompt, *got]])
        with torch.no_grad():
            logits = reference(ids).logits[0, len(prompt) - 1 : -1]
        assert got == logits.argmax(-1).tolist()
        scores = torch.log_softmax(logits, -1)[range(20), got]
        assert (scores - torch.tensor([entry.logprob for entry in result.outputs[0].logprobs])).abs().max() <= 1e-4
        assert result.outputs[0].cache.compression_ratio == 1.0
    all_back(llm.engine)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_runs(dtype: str, models) -> None:
    """The format rounds, so tokens may differ; the logits stay near those of fp32."""
    model = models("window")
    engine = model.engine(dtype=dtype)
    prompt = model.prompt(40)
    engine.add_request("a", prompt, SamplingParams(temperature=0, max_tokens=4, logprobs=VOCABULARY))
    (outputs,) = drain(engine).values()
    assert engine.cache.state.k_pages.dtype == getattr(torch, dtype)
    # Decisions near the threshold may go the other way, so only the bulk is close.
    assert (full_logprobs(outputs)[0] - model.logprobs(prompt)[-1]).abs().median() < 0.3


@pytest.mark.parametrize("case", ["half", "unbounded", "no merging", "qwen 3", "adapter, self"])
def test_batch_composition_does_not_matter(case: str, models) -> None:
    """Prompts of many lengths at once, more than there are rows, chunks beside decoding: each as if it were alone."""
    model = models(case)
    prompts = [model.prompt(n, seed) for seed, n in enumerate((1, 2, 15, 16, 17, 40, 64, 70, 5, 33))]
    engine = model.engine(max_num_seqs=4, max_num_batched_tokens=24)
    for i, prompt in enumerate(prompts):
        engine.add_request(str(i), prompt, GREEDY)
    found = drain(engine)
    for i, prompt in enumerate(prompts):
        assert ids_of(found[str(i), 0]) == model.answer(prompt)
    stats = engine.stats()
    assert stats.generation_tokens == 240 and stats.prompt_tokens == sum(map(len, prompts))


@pytest.mark.parametrize("case", ["half", "llama 3", "no merging", "query"])
def test_preempted_or_not(case: str, models) -> None:
    """A pool that is too small for all: sequences give their pages back, read their tokens again, and say the same."""
    model = models(case)
    prompts = [model.prompt(n, seed) for seed, n in enumerate((14, 3, 40, 14))]
    pages = {"half": 20, "llama 3": 18, "no merging": 28, "query": 28}[case]
    engine = model.engine(num_pages=pages, max_num_seqs=4, max_num_batched_tokens=200)
    for i, prompt in enumerate(prompts):
        engine.add_request(str(i), prompt, SamplingParams(temperature=0, max_tokens=60))
    found = drain(engine)
    for i, prompt in enumerate(prompts):
        assert ids_of(found[str(i), 0]) == model.answer(prompt, 60)
    assert engine.stats().preemptions > 0
    assert any(out[-1].timing.preemptions for out in found.values())
    assert not found["0", 0][-1].timing.preemptions  # the oldest


LENGTHS = st.sampled_from([1, 12, 15, 16, 31, 40])
ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), LENGTHS, st.integers(1, 4), st.sampled_from([1, 20, 40, 60])),
        st.tuples(st.just("step"), st.integers(1, 30)),
        st.tuples(st.just("abort"), st.integers(0, 30)),
    ),
    min_size=2,
    max_size=12,
)


@settings(
    max_examples=examples(40),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    case=st.sampled_from(["half", "llama 3", "no merging", "adapter"]),
    actions=ACTIONS,
    rows=st.integers(2, 6),
    chunk=st.integers(6, 64),
    pages=st.integers(7 * HEADS, 10 * HEADS),
    ahead=st.booleans(),
)
def test_any_schedule(models, case: str, actions: list, rows: int, chunk: int, pages: int, ahead: bool) -> None:
    """Arrivals, aborts, chunk budgets and pools that force preemption, at random, with and without asynchronous
    scheduling: always the oracle's tokens, never a lost page, and an aborted request stops where it was.
    """
    model = models(case)
    # Merging halves the pages, so two thirds of them are as tight. Evicting does not while the window is full, and any
    # single request has to fit.
    pages = pages * 2 // 3 if case in ("half", "llama 3") else pages
    engine = model.engine(num_pages=pages, max_num_seqs=rows, max_num_batched_tokens=chunk, async_scheduling=ahead)
    asked, found, aborted = {}, {}, set()

    def take(outputs: list) -> None:
        for output in outputs:
            found.setdefault(output.request_id, []).append(output)
        engine.cache.check_integrity()

    for action in actions:
        if action[0] == "add":
            _, n, copies, more = action
            for copy in range(copies):
                name = str(len(asked))
                asked[name] = (model.prompt(n, copy % 2), more)
                engine.add_request(name, asked[name][0], SamplingParams(temperature=0, max_tokens=more))
        elif action[0] == "step":
            for _ in range(action[1]):
                take(engine.step())
        elif str(action[1]) in asked:
            outputs = engine.abort(str(action[1]))
            aborted |= {output.request_id for output in outputs}
            take(outputs)
    while engine.has_unfinished():
        before = engine.stats()
        take(engine.step())
        after = engine.stats()
        assert (after.steps, after.preemptions) != (before.steps, before.preemptions)
    all_back(engine)
    for name, (prompt, more) in asked.items():
        got, wanted = ids_of(found[name]), model.answer(prompt, 60)[:more]
        assert found[name][-1].finish_reason == ("abort" if name in aborted else "length")
        assert got == wanted[: len(got)] if name in aborted else got == wanted
        assert sum(output.finished for output in found[name]) == 1


# ------------------------------------------------------------------------------------------------------ memory and CR


def test_the_same_budget_holds_more_sequences_with_compression() -> None:
    """>= 3.6 times as many of 2k tokens at CR 4, page waste included: counted from pages, and by running both pools
    full.

    Decisions are made to order: the key's neuron follows the token, so that a sequence merges three tokens of four.
    """
    layers, heads, d, tokens = 2, 2, 16, 2048
    bounds, positions = torch.tensor([0, tokens], dtype=torch.int32), torch.arange(tokens, dtype=torch.int32)
    held: dict[int, int] = {}
    for cr in (1, 4):
        # Room for 5 sequences at CR 1.
        state = kernels.make_state(
            num_pages=5 * layers * heads * tokens // 16,
            max_seqs=20,
            num_layers=layers,
            num_kv_heads=heads,
            head_dim=d,
            max_slots=tokens,
            compress=cr > 1,
        )
        neuron = torch.where(torch.arange(tokens) % cr == 0, -1.0, 1.0)
        k = torch.randn(tokens, heads, d, generator=torch.Generator().manual_seed(0))
        # Heads differ, as they do: one opens a slot at tokens 0, 4, 8, ..., the other at 1, 5, 9, ...
        k[..., -1] = torch.stack((neuron, neuron.roll(1)), dim=-1)
        # What a sequence takes: the second head's first token opens a slot that the pattern does not.
        needed = layers * sum(-(-slots // 16) for slots in (tokens // cr, tokens // cr + (cr > 1)))
        rows = torch.arange(20, dtype=torch.int32)
        while state.free_count() >= needed:
            row = held.get(cr, 0)
            for layer in range(layers):
                step = (k, k, k, bounds, rows[row : row + 1], positions, torch.ones(d // 2))
                kernels.append(state, layer, kernels.AppendParams(*step, 0.0, 2.0**-7, 12, cr > 1, partial=False))
            held[cr] = row + 1
        state.check_integrity()
    assert held[4] >= 3.6 * held[1], held


def test_admission_uses_the_compression(models) -> None:
    """The engine itself fills the pool: a merging model runs more sequences at a time than one that never merges."""
    most = {}
    for case in ("half", "no merging"):
        model = models(case)
        engine = model.engine(num_pages=64, max_num_seqs=16, max_num_batched_tokens=128)
        for i in range(16):
            engine.add_request(str(i), model.prompt(63, i % 4), SamplingParams(temperature=0, max_tokens=8))
        most[case] = 0
        while engine.has_unfinished():
            engine.step()
            most[case] = max(most[case], engine.stats().running)
        all_back(engine)
    assert most["no merging"] <= 4 and most["half"] >= 1.5 * most["no merging"], most


@pytest.mark.parametrize("rows", [1, 8, None])
def test_the_cache_keeps_to_its_memory(rows: int | None, models) -> None:
    """Pages, page tables and rings together, and what snapshots take besides."""
    budget = 3_000_000
    engine = models("half").engine(kv_cache_memory_bytes=budget, max_num_seqs=rows)
    state, sizes = engine.cache.state, engine.sizes
    most = sizes.max_num_seqs * state.page_table[0].numel()  # that sequences can ever use
    used = state.nbytes() + engine.kv_cache_manager.nbytes()
    assert used <= budget + 64 and (used > 0.98 * budget or state.num_pages == most)
    assert sizes.max_prefix_snapshots * sizes.row_bytes <= budget / 32
    assert state.lengths.size(0) == sizes.max_num_seqs + sizes.max_prefix_snapshots > sizes.max_num_seqs


def test_stats(models) -> None:
    model = models("half")
    engine = model.engine(num_pages=200)
    engine.add_request("a", model.prompt(63), GREEDY)
    engine.step()
    stats = engine.stats()
    oracle = model.exported.oracle()
    oracle.run(list(model.prompt(63)))
    slots = oracle.lengths()
    pages = int((-(-slots // 16)).sum())
    assert (stats.running, stats.pages, stats.pages_used, stats.slots_used) == (1, 200, pages, int(slots.sum()))
    assert stats.tokens_held == 63 and stats.compression_ratio == pytest.approx(63 * HEADS / int(slots.sum()))
    assert stats.waste == pytest.approx(1 - int(slots.sum()) / (16 * pages))
    engine.abort("a")
    all_back(engine)


# ----------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ([], {}, "the prompt is empty"),
        ([1, 61], {}, "token 1 of the prompt is 61; the model has the tokens 0 to 60"),
        ([-1], {}, "token 0 of the prompt is -1"),
        ([1.5], {}, "token 0 of the prompt is 1.5"),
        ([1] * 256, {}, "However, your prompt has 256 tokens, and no room is left for a completion."),
        ([1] * 200, {}, "the prompt has 200 tokens and would take 52 pages"),
        ("text", {}, "has no tokenizer; give the prompt as token ids"),
        ([1], {"stop": "x"}, "there is no tokenizer; use stop_token_ids"),
        ([1], {"stop_token_ids": [61]}, "stop_token_ids holds token 61; the model has 61 tokens"),
        ([1], {"logit_bias": {70: 1.0}}, "logit_bias holds token 70"),
    ],
)
def test_a_bad_request_fails_alone(prompt, params: dict, message: str, models) -> None:
    model = models("no merging", measured_cr=1.0)
    llm = LLM(model.path, num_pages=40)
    good = model.prompt(20)
    results = llm.generate([good, prompt, good], [GREEDY, SamplingParams(temperature=0, **params), GREEDY])
    assert message in results[1].error and results[1].outputs == []
    for result in (results[0], results[2]):
        assert result.error is None and tuple(result.outputs[0].token_ids) == model.answer(good)
    all_back(llm.engine)


def test_the_same_id_twice_is_refused(models) -> None:
    engine = models("half").engine()
    engine.add_request("a", [1, 2, 3])
    with pytest.raises(ValueError, match="request 'a' is still running"):
        engine.add_request("a", [1, 2, 3])
    assert [output.finish_reason for output in engine.abort("a")] == ["abort"]
    assert engine.abort("a") == [] and engine.step() == []
    all_back(engine)


def test_logits_that_are_no_numbers(models) -> None:
    """A token whose embedding is NaN spoils the requests that have it, and no other: not even on the pages that it
    used.
    """
    model = models("half")
    engine = model.engine(num_pages=48, max_num_seqs=3, max_num_batched_tokens=64)
    engine.model.embedding.weight[7] = float("nan")
    clean = {}
    for i in range(12):
        prompt = tuple(t for t in model.prompt(40, i) if t != 7)
        answer = model.answer(prompt, 12)
        if i % 3 == 1:
            prompt = (*prompt[:20], 7, *prompt[20:])
        elif 7 not in answer:
            clean[str(i)] = answer
        engine.add_request(str(i), prompt, SamplingParams(temperature=0, max_tokens=12))
    found = drain(engine)
    assert len(clean) >= 3
    for name, answer in clean.items():
        assert ids_of(found[name, 0]) == answer
    for name in ("1", "4", "7", "10"):
        *before, output = found[name, 0]
        assert all(empty.tokens == () and not empty.finished for empty in before)  # scheduled, and still in prefill
        assert output.finish_reason == "error" and output.tokens == () and "hold NaN or Inf" in output.error


def test_a_sequence_that_outgrows_the_pool_fails_alone(models) -> None:
    """It was promised to fit by the model's CR and does not merge: the one after it is answered."""
    model = models("no merging")  # its dmc block claims 4
    engine = model.engine(num_pages=3 * HEADS, max_num_seqs=2)
    engine.add_request("long", model.prompt(63), GREEDY)
    engine.add_request("too long", model.prompt(40), GREEDY)
    engine.add_request("short", model.prompt(12), GREEDY)
    found = drain(engine)
    assert "the cache is full: 48 tokens take 192 slots (CR 1.00)" in found["long", 0][-1].error
    got = ids_of(found["too long", 0])
    assert found["too long", 0][-1].finish_reason == "error" and got == model.answer(model.prompt(40))[: len(got)]
    assert ids_of(found["short", 0]) == model.answer(model.prompt(12))


def test_a_refusal_on_the_device_is_not_overlooked(models) -> None:
    """A GPU cannot raise when a head finds no page; it counts, and the step in which the host sees it does."""
    engine = models("half").engine(max_num_seqs=2)
    engine.add_request("a", models("half").prompt(12), GREEDY)
    engine.step()
    engine.cache.state.counters[REFUSED] += 3
    with pytest.raises(RuntimeError, match="3 heads found no page"):
        engine.step()


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_step_that_raises_loses_nothing(when: str, models, monkeypatch: pytest.MonkeyPatch) -> None:
    model = models("half")
    engine = model.engine(max_num_seqs=3, max_num_batched_tokens=24)
    prompts = [model.prompt(n) for n in (30, 12, 40, 7)]
    for i, prompt in enumerate(prompts):
        engine.add_request(str(i), prompt, GREEDY)
    outputs = [output for _ in range(6) for output in engine.step()]
    forward = engine.model.forward

    def fail(*args) -> None:
        if when == "after":
            forward(*args)
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(engine.model, "forward", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            engine.step()
    engine.cache.check_integrity()
    assert engine.stats().pages_used == 0 and engine.stats().waiting == 4
    for (name, _), later in drain(engine).items():
        assert ids_of([o for o in outputs if o.request_id == name] + later) == model.answer(prompts[int(name)])


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"max_model_len": 300}, "max_model_len is 300; the model has 256 positions"),
        ({"num_pages": 3}, "the cache would have 3 pages, and the 4 heads"),
        ({"kv_cache_memory_bytes": 1000}, "give kv_cache_memory_bytes"),
        ({"block_size": 5}, "page_size 5 is not possible"),
        ({"block_size": 0}, "block_size is 0; it must be an integer, at least 1"),
        ({"dtype": "int8"}, "dtype is 'int8'"),
        ({"max_num_seqs": 0}, "max_num_seqs is 0"),
        ({"max_num_seqs": 9, "max_num_batched_tokens": 8}, "max_num_batched_tokens is 8, less than max_num_seqs 9"),
        ({"device": "tpu"}, "device is 'tpu'"),
        ({"gpu_memory_utilization": 0}, "gpu_memory_utilization is 0"),
        ({"tensor_parallel_size": 2}, "tensor_parallel_size is 2, and this process is no rank of a group"),
    ],
)
def test_bad_settings(setting: dict, message: str, models) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        models("half").engine(**setting)


def test_bad_directories(models, tmp_path: Path) -> None:
    import shutil

    source = Path(models("half").path)

    def broken(name: str, change) -> Path:
        directory = tmp_path / name
        shutil.copytree(source, directory)
        config = json.loads((directory / "config.json").read_text())
        change(config, directory)
        (directory / "config.json").write_text(json.dumps(config))
        return directory

    def truncate(_, directory: Path) -> None:
        path = directory / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-1000])

    def poison(_, directory: Path) -> None:
        from safetensors.torch import load_file, save_file

        weights = load_file(directory / "model.safetensors")
        weights["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
        save_file(weights, directory / "model.safetensors")

    for name, change, message in (
        ("no block", lambda c, d: c.pop("dmc"), "has no dmc block"),
        ("newer", lambda c, d: c["dmc"].update(format_version=2), "dmc.format_version is 2"),
        ("block lacks a key", lambda c, d: c["dmc"].pop("window"), "dmc.window is missing"),
        ("block is no object", lambda c, d: c.update(dmc=[4]), r"dmc is \[4\]; it must be an object"),
        ("bias", lambda c, d: c["dmc"].update(decision_bias="x"), "dmc.decision_bias is 'x'; it must be a number"),
        ("window", lambda c, d: c["dmc"].update(window=12.5), "dmc.window is 12.5; it must be an integer"),
        ("stage", lambda c, d: c["dmc"].update(stage="pretrain"), "dmc.stage is 'pretrain'"),
        ("truncated", truncate, "not a complete safetensors file"),
        ("not finite", poison, r"model.layers.1.mlp.up_proj.weight in .* holds NaN"),
        ("heads", lambda c, d: c.update(num_key_value_heads=1), "has shape"),
        (
            "rope",
            lambda c, d: c.update(rope_scaling={"rope_type": "longrope"}),
            "rope_type 'longrope' is not supported",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            Engine(broken(name, change), EngineConfig())
    with pytest.raises(ValueError, match="is not a directory"):
        LLM(tmp_path / "nowhere")
