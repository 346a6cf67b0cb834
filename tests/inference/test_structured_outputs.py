"""Structured outputs: every completion matches, whatever else runs, and no other completion changes."""

from __future__ import annotations

import json
import math
import pickle
import re
import sys
from collections.abc import Callable

import pytest
import torch
from helpers.engines import all_back, drain, ids_of
from helpers.structured import TOKENIZERS, closing_bias, make_llm
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from structured.run import DRAFT, written_schemas

from megatron.dmc.inference import LLM, InvalidRequest, SamplingParams, StructuredOutputsParams, grammar
from megatron.dmc.inference.input_processor import InputProcessor

pytest.importorskip("llguidance")
jsonschema_rs = pytest.importorskip("jsonschema_rs")

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 9}, "age": {"type": "integer", "minimum": 7}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
CHOICES = ["über", "the cat", 'a "b"\n', "🙂"]


def is_person(text: str) -> bool:
    value = json.loads(text)
    return value.keys() == {"name", "age"} and len(value["name"]) <= 9 and value["age"] >= 7


CASES: dict[str, tuple[dict, Callable[[str], object]]] = {
    "json": ({"json": PERSON}, is_person),
    "json as text": ({"json": json.dumps(PERSON), "disable_any_whitespace": True}, is_person),
    "json_object": ({"json_object": True}, lambda text: isinstance(json.loads(text), dict)),
    "anything": ({"json": {}}, lambda text: json.loads(text) is not ...),
    "regex": ({"regex": r"^[a-z]{2,5} \d{1,3}/ü$"}, re.compile("[a-z]{2,5} [0-9]{1,3}/ü").fullmatch),
    "choice": ({"choice": CHOICES}, CHOICES.__contains__),
    "gbnf": ({"grammar": 'root ::= "a" [0-9] | "(" root ")"'}, re.compile(r"\(*a\d\)*").fullmatch),
    "lark": ({"grammar": 'start: "x" start | /[0-9]+/'}, re.compile(r"x*\d+").fullmatch),
}


@pytest.fixture(scope="module")
def llms(tmp_path_factory: pytest.TempPathFactory) -> dict[str, LLM]:
    root = tmp_path_factory.mktemp("models")
    return {kind: make_llm(root / kind, kind, max_num_seqs=6) for kind in TOKENIZERS}


@pytest.fixture(scope="module")
def llm(llms: dict[str, LLM]) -> LLM:
    return llms["byte-level"]


def structured(llm: LLM, constraint: dict, **more: object) -> SamplingParams:
    """Parameters with which a random model ends soon."""
    given = {"max_tokens": 120, "seed": 1, "logit_bias": closing_bias(llm)} | more
    return SamplingParams(structured_outputs=StructuredOutputsParams(**constraint), **given)


def text_of(llm: LLM, constraint: dict, **more: object) -> str:
    return llm.generate([[7, 8, 9]], structured(llm, constraint, **more))[0].outputs[0].text


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_every_completion_matches(kind: str, llms: dict[str, LLM]) -> None:
    """All constraints in one batch, several completions each, with greedy and random sampling beside plain requests;
    plain ones are what they are alone.
    """
    llm, plain = llms[kind], SamplingParams(max_tokens=20, seed=5)
    alone = llm.generate([[4, 5, 6]], plain)[0].outputs[0].token_ids
    for sampling in (
        {"n": 3, "temperature": 1.5},
        {"temperature": 0},
        {"n": 2, "top_k": 20, "repetition_penalty": 1.2},
    ):
        asked = [structured(llm, constraint, **sampling) for constraint, _ in CASES.values()]
        results = llm.generate([[7, 8, 9]] * len(asked) + [[4, 5, 6]] * 2, [*asked, plain, plain])
        assert [result.outputs[0].token_ids for result in results[-2:]] == [alone, alone]
        ended = 0
        for (name, (_, matches)), result in zip(CASES.items(), results):
            assert result.error is None, (name, result.error)
            for completion in result.outputs:
                if completion.finish_reason == "stop":
                    assert matches(completion.text), (name, completion.text)
                    assert completion.token_ids[-1] in (1, 2) and completion.stop_reason is None
                    ended += 1
        assert ended >= len(CASES) // 2
    all_back(llm.engine)


def test_the_same_completions_preempted_cached_or_in_company(llm: LLM, tmp_path) -> None:
    """A pool that is too small, and one request after the other: the same texts."""
    asked = [structured(llm, {"json": PERSON}, n=2, seed=i, max_tokens=60) for i in range(4)]
    prompts = [[3 + i] * (12 + 9 * i) for i in range(4)]
    wanted = [[c.text for c in llm.generate([p], s)[0].outputs] for p, s in zip(prompts, asked)]
    assert [[c.text for c in r.outputs] for r in llm.generate(prompts, asked)] == wanted
    small = make_llm(tmp_path / "small", max_num_seqs=8, num_pages=19, max_num_batched_tokens=16)
    assert [[c.text for c in r.outputs] for r in small.generate(prompts, asked)] == wanted
    assert small.engine.stats().preemptions > 0
    all_back(small.engine)


def test_cached_logits_are_not_masked(llm: LLM) -> None:
    """The prompt of a structured request again, without a constraint: its first token has the model's own odds."""
    prompt, scored = [9, 8, 7] * 14, SamplingParams(temperature=0, max_tokens=1, logprobs=3)
    llm.engine.reset_prefix_cache()
    (wanted,) = llm.generate([prompt], scored)[0].outputs[0].logprobs
    llm.engine.reset_prefix_cache()
    llm.generate([prompt], structured(llm, {"json": PERSON}))
    again = llm.generate([prompt], scored)[0]
    assert again.num_cached_tokens == len(prompt) and again.outputs[0].logprobs[0].top == wanted.top


def test_logprobs_are_those_under_the_mask(llm: LLM) -> None:
    """As in vLLM, where the mask comes before the sampler: forbidden tokens have none, the others sum to 1."""
    size = llm.engine.info.model.vocab_size
    params = SamplingParams(
        temperature=0, max_tokens=3, logprobs=100, structured_outputs=StructuredOutputsParams(regex="[abc][0-9]{2}")
    )
    entries = llm.generate([[7, 8, 9]], params)[0].outputs[0].logprobs
    for entry, allowed in zip(entries, (set("abc"), set("0123456789"))):
        finite = {token: value for token, value in entry.top if value > -math.inf}
        assert {llm.engine.tokenizer.decode([token]) for token in finite} <= allowed | {"ab", "12"}
        assert sum(map(math.exp, finite.values())) == pytest.approx(1, abs=1e-5) and entry.rank == 1
    assert len(entries[0].top) == 100 < size


# --------------------------------------------------------------------------------------------------- where it ends


@pytest.mark.parametrize(
    "more",
    [
        {"min_tokens": 10},
        {"ignore_eos": True},
        {"min_tokens": 10, "ignore_eos": True, "repetition_penalty": 2.0},
        {"logit_bias": {1: -100, 2: -100}},
        {"stop_token_ids": [2]},
        {"temperature": 5.0, "top_k": 1},
    ],
)
def test_it_ends_where_nothing_may_follow(llm: LLM, more: dict) -> None:
    completion = llm.generate([[7, 8]], structured(llm, {"choice": ["ab"]}, **more))[0].outputs[0]
    assert completion.text == "ab" and completion.finish_reason == "stop"


def test_min_tokens_delays_an_end_that_is_optional(llm: LLM) -> None:
    params = structured(llm, {"regex": "[a-z]+"}, min_tokens=8, logit_bias={1: 100, 2: 100})
    completion = llm.generate([[7, 8]], params)[0].outputs[0]
    assert len(completion.token_ids) == 9 and completion.text.isalpha()


def test_stop_strings_and_lengths_cut_as_ever(llm: LLM) -> None:
    cut = llm.generate([[7]], structured(llm, {"choice": ["abcdefg"]}, stop=["de"]))[0].outputs[0]
    assert (cut.text, cut.finish_reason, cut.stop_reason) == ("abc", "stop", "de")
    short = llm.generate([[7]], structured(llm, {"choice": ["xyzxyz"]}, max_tokens=3))[0].outputs[0]
    assert (short.text, short.finish_reason) == ("xyz", "length")
    none = llm.generate([[7]], structured(llm, {"choice": ["xyzxyz"]}, max_tokens=0))[0].outputs[0]
    assert (none.text, none.finish_reason) == ("", "length")


def test_special_tokens_are_never_written(llm: LLM) -> None:
    """A text that is a special token's name is written in plain tokens."""
    params = structured(llm, {"choice": ["<tool_call>"]}, skip_special_tokens=False)
    completion = llm.generate([[7]], params)[0].outputs[0]
    assert completion.text.removesuffix("</s>").removesuffix("<|im_end|>") == "<tool_call>"
    assert len(completion.token_ids) > 5 and completion.finish_reason == "stop"


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("constraint", "message"),
    [
        ({}, "structured_outputs has none of them; give one of json, regex, choice, grammar, json_object"),
        ({"json_object": False}, "structured_outputs has none of them"),
        ({"regex": "a", "choice": ["b"]}, "structured_outputs has regex and choice; give one"),
        ({"regex": 3}, "structured_outputs.regex is int; it must be a string"),
        ({"choice": []}, "structured_outputs.choice must be a list of strings, at least one"),
        ({"choice": "ab"}, "structured_outputs.choice must be a list"),
        ({"choice": ["a", 1]}, "structured_outputs.choice must hold strings only"),
        ({"regex": "a" * 70000}, "structured_outputs.regex has 70000 characters; it may have 65536"),
        ({"grammar": "root ::= " + '"a" ' * 3000}, "structured_outputs.grammar has 12009 characters; it may have 8192"),
        ({"choice": ["a" * 600_000]}, "structured_outputs.choice has 600004 characters; it may have 524288"),
        ({"json": '"' + "a" * 600_000}, "structured_outputs.json has 600001 characters; it may have 524288"),
        ({"json": "{"}, "structured_outputs.json is no JSON: Expecting property name"),
        ({"json": "[]"}, "structured_outputs.json must be a JSON schema, an object"),
        ({"json": {"const": math.inf}}, "structured_outputs.json is no JSON: Out of range float"),
        ({"json": {"const": object()}}, "structured_outputs.json is no JSON: Object of type object"),
        ({"json": "[" * 5000}, "structured_outputs.json is nested too deeply; it may have 64 levels"),
        ({"json": {"const": "\ud800"}}, "structured_outputs.json holds half of a surrogate pair"),
        ({"regex": "a\ud800"}, "structured_outputs.regex holds half of a surrogate pair"),
        ({"json": {"minProperties": 2}}, "structured_outputs.json has minProperties 2 and requires 0"),
        ({"json": {"anyOf": [{"minProperties": 3, "required": ["a"]}]}}, "has minProperties 3 and requires 1"),
        ({"json": {"not": {}}}, 'structured_outputs.json cannot be compiled: Unimplemented keys: ["not"]'),
        ({"json": {"not": {}, "x-guidance": {"lenient": True}}}, "cannot be compiled: Unimplemented keys"),
        ({"json": {"type": "text"}}, "structured_outputs.json cannot be compiled: Invalid type: text"),
        ({"json": {"$ref": "#/$defs/a"}}, "structured_outputs.json cannot be compiled"),
        ({"json": {"enum": []}}, "structured_outputs.json cannot be compiled: Unsatisfiable schema"),
        ({"regex": "a{2"}, "structured_outputs.regex cannot be compiled: .* unclosed counted repetition"),
        ({"regex": "(?=a)a"}, "structured_outputs.regex cannot be compiled: .* look-ahead"),
        ({"grammar": "root ::= nothing"}, "structured_outputs.grammar cannot be compiled"),
        ({"grammar": "start: nothing"}, "structured_outputs.grammar cannot be compiled"),
        ({"grammar": "no grammar"}, "structured_outputs.grammar cannot be compiled"),
        ({"json": {}, "whitespace_pattern": "("}, "structured_outputs.json cannot be compiled"),
    ],
)
def test_what_cannot_be_met_is_refused(llm: LLM, constraint: dict, message: str) -> None:
    with pytest.raises(InvalidRequest, match=re.escape(message) if ".*" not in message else message) as refused:
        llm.engine.add_request("a", [7], SamplingParams(structured_outputs=StructuredOutputsParams(**constraint)))
    assert refused.value.param == re.match(r"structured_outputs(\.\w+)?", str(refused.value))[0]
    assert len(str(refused.value)) < 500
    assert "\n" not in str(refused.value) and not llm.engine.has_unfinished()


def nested(levels: int) -> dict:
    schema: dict = {"type": "integer"}
    for _ in range(levels):
        schema = {"items": schema}
    return schema


def test_the_limits_are_what_is_taken(llm: LLM) -> None:
    """Just within each limit; one schema level more is too deep."""
    llm.engine.input_processor.grammar(structured(llm, {"json": nested(63)}))
    with pytest.raises(InvalidRequest, match="nested too deeply"):
        llm.engine.input_processor.grammar(structured(llm, {"json": nested(64)}))
    named = {"minProperties": 2, "required": ["a", "b"], "properties": {"a": True, "minProperties": {"const": 9}}}
    llm.engine.input_processor.grammar(structured(llm, {"json": named}))


def test_too_complex_is_refused_or_ends_alone(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bounds on the work: at compilation a 400, later the end of that completion and of no other."""
    monkeypatch.setitem(grammar.LIMITS, "max_grammar_size", 20)
    with pytest.raises(InvalidRequest, match="structured_outputs.json cannot be compiled"):
        llm.engine.add_request("a", [7], structured(llm, {"json": {"properties": {"new": {"type": "array"}}}}))
    monkeypatch.setitem(grammar.LIMITS, "max_grammar_size", 100_000)
    monkeypatch.setitem(grammar.LIMITS, "max_lexer_states", 60)
    plain, seeded = (
        SamplingParams(max_tokens=30, seed=1),
        structured(llm, {"regex": "(xy[a-z]{4}zz){9}"}, logit_bias={}),
    )
    wanted = llm.generate([[4, 5]], plain)[0].outputs[0].token_ids
    bad, good = llm.generate([[7], [4, 5]], [seeded, plain])
    assert "the structured output became too complex: " in bad.error and bad.outputs[0].finish_reason == "error"
    assert good.error is None and good.outputs[0].token_ids == wanted
    all_back(llm.engine)


def test_a_vocabulary_that_cannot_write_it(llm: LLM) -> None:
    """Refused when no token begins it; an error that says so when the text comes to such a place."""
    compiler = llm.engine.input_processor.grammars
    narrow = grammar.GrammarCompiler(llm.engine.tokenizer, 50, frozenset({1}))
    begins = llm.engine.tokenizer.encode("0", add_special_tokens=False)[0]
    assert begins < 50 < llm.engine.tokenizer.encode("z", add_special_tokens=False)[0]
    with pytest.raises(InvalidRequest, match="structured_outputs.choice cannot be met: no token of the vocabulary"):
        narrow.compile(StructuredOutputsParams(choice=["zz"]))
    request = llm.engine.input_processor.process("a", [7], structured(llm, {"choice": ["0z"]}))
    state = narrow.compile(StructuredOutputsParams(choice=["0z"])).start()
    state.accept(begins)
    filler = grammar.MaskFiller(50)
    masks = filler.start([None, state]).result()
    _, stuck = masks.apply(torch.zeros(2, 50))
    assert stuck == [1] and state.error == "no token of the vocabulary continues the structured output"
    assert request.grammar is compiler.compile(request.sampling_params.structured_outputs)


@pytest.mark.parametrize(
    ("tokenizer", "eos", "message"),
    [
        (None, {1}, "the model has no tokenizer"),
        (object(), {1}, "a object has no tokenizer.json"),
        ("own", set(), "the tokenizer has no end-of-sequence token"),
        ("own", {10**6}, "the tokenizer has no end-of-sequence token"),
    ],
)
def test_models_that_cannot(llm: LLM, tokenizer: object, eos: set[int], message: str) -> None:
    own = llm.engine.tokenizer if tokenizer == "own" else tokenizer
    with pytest.raises(InvalidRequest, match=f"structured_outputs is not supported: {message}"):
        grammar.GrammarCompiler(own, 300, frozenset(eos)).compile(StructuredOutputsParams(regex="a"))


def test_llguidance_is_optional(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(InvalidRequest, match="llguidance is not installed; pip install"):
        grammar.GrammarCompiler(llm.engine.tokenizer, 300, frozenset({1})).compile(StructuredOutputsParams(regex="a"))


def test_cache_of_grammars_is_bounded(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = grammar.GrammarCompiler(llm.engine.tokenizer, 300, frozenset({1}))
    monkeypatch.setattr(grammar, "MAX_GRAMMARS", 3)
    one, *_ = [compiler.compile(StructuredOutputsParams(regex=letter)) for letter in "abc"]
    assert compiler.compile(StructuredOutputsParams(regex="a")) is one
    compiler.compile(StructuredOutputsParams(regex="d"))
    assert [key[1] for key in compiler._found] == ["c", "a", "d"] and compiler._characters == 3
    monkeypatch.setattr(grammar, "MAX_CACHED_CHARACTERS", 4)
    compiler.compile(StructuredOutputsParams(regex="eee"))
    assert [key[1] for key in compiler._found] == ["d", "eee"]
    compiler.compile(StructuredOutputsParams(regex="fffff"))
    assert not compiler._found and compiler._characters == 0


def test_a_request_travels_without_its_grammar(llm: LLM) -> None:
    request = llm.engine.input_processor.process("a", [7], structured(llm, {"json": PERSON}))
    copy = pickle.loads(pickle.dumps(request))
    assert request.grammar is not None and copy.grammar is None and copy == request
    assert InputProcessor(None, 300, 100, llm.engine.cache, 1.0, "m").grammar(SamplingParams()) is None


# ------------------------------------------------------------------------------------------------ random schedules

ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.sampled_from(["plain", "json", "regex", "gbnf"]), st.integers(1, 3)),
        st.tuples(st.just("step"), st.integers(1, 25)),
        st.tuples(st.just("abort"), st.integers(0, 20)),
    ),
    min_size=3,
    max_size=12,
)


@settings(max_examples=5, deadline=None, suppress_health_check=list(HealthCheck))
@given(actions=ACTIONS, pages=st.integers(18, 40), rows=st.integers(1, 5), chunk=st.integers(5, 40))
def test_any_schedule(llm: LLM, actions: list, pages: int, rows: int, chunk: int) -> None:
    """Structured and plain requests mixed, aborts, small pools: nothing is wrong, lost or leaked."""
    check_schedule(llm, actions, num_pages=pages, max_num_seqs=rows, max_num_batched_tokens=chunk)


def check_schedule(llm: LLM, actions: list, **sizes: int) -> tuple[int, int]:
    """Run a schedule; every completion is what it is alone. Returns (completions compared, preemptions)."""
    small = LLM(llm.engine.info.path, load_format="dummy", tokenizer=llm.engine.tokenizer, **sizes)
    engine, asked, found, aborted = small.engine, {}, {}, set()
    for action in actions:
        if action[0] == "add":
            name, (_, kind, n) = str(len(asked)), action
            prompt = [3 + len(asked) % 5] * (5 + 7 * (len(asked) % 4))
            more = {"n": n, "max_tokens": 30, "seed": len(asked)}
            params = SamplingParams(**more) if kind == "plain" else structured(llm, CASES[kind][0], **more)
            asked[name] = prompt, params, kind
            engine.add_request(name, prompt, params)
        elif action[0] == "step":
            for output in [o for _ in range(action[1]) for o in engine.step()]:
                found.setdefault((output.request_id, output.index), []).append(output)
            engine.cache.check_integrity()
        else:
            aborted.add(str(action[1]))
            engine.abort(str(action[1]))
    for key, outputs in drain(engine).items():
        found.setdefault(key, []).extend(outputs)
    compared = 0
    for name, (prompt, params, kind) in asked.items():
        if name in aborted:
            continue
        for completion in llm.generate([prompt], params)[0].outputs:
            outputs = found[name, completion.index]
            if outputs[-1].finish_reason == "error":  # alone in the cache, and no room
                assert "the cache is full" in outputs[-1].error
                continue
            assert list(ids_of(outputs)) == completion.token_ids
            if kind != "plain" and completion.finish_reason == "stop":
                assert CASES[kind][1](completion.text)
            compared += 1
    return compared, engine.stats().preemptions


# --------------------------------------------------------------------------------------------------------- any schema


@settings(max_examples=4, deadline=None, suppress_health_check=list(HealthCheck))
@given(schemas=st.lists(written_schemas(), min_size=6, max_size=6))
def test_any_schema(llm: LLM, schemas: list[dict]) -> None:
    """A few of what tests/structured/run.py does by the thousand: whatever ends validates."""
    asked = []
    for schema in schemas:
        params = structured(llm, {"json": {"$schema": DRAFT} | schema}, max_tokens=60)
        try:
            llm.engine.input_processor.grammar(params)
        except InvalidRequest:
            continue
        asked.append((schema, params))
    for (schema, _), result in zip(asked, llm.generate([[7, 8]] * len(asked), [params for _, params in asked])):
        assert result.error is None
        completion = result.outputs[0]
        if completion.finish_reason == "stop":
            value = json.loads(completion.text)
            assert jsonschema_rs.Draft7Validator(schema).is_valid(value), (schema, completion.text)
