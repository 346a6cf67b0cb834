"""Structured outputs over HTTP and in batches: each way to ask, on both endpoints, streamed or whole; each refusal."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers.processes import PATIENCE
from helpers.serving import CHAT, COMPLETIONS, TEMPLATE, Running, client, until
from helpers.structured import make_model
from pydantic import BaseModel

from megatron.dmc.cli import main
from megatron.dmc.inference import grammar
from megatron.dmc.serving import protocol

pytest.importorskip("llguidance")
SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["ab", "the"]}, "age": {"type": "integer", "minimum": 10, "maximum": 19}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA, "strict": True}}
LOOSE = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}}
WITHIN = {"seed": 1, "max_tokens": 150}


class Person(BaseModel):
    name: str
    age: int


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    return SimpleNamespace(path=make_model(tmp_path_factory.mktemp("server") / "m", template=TEMPLATE))


@pytest.fixture(scope="module")
def server(model: SimpleNamespace) -> Iterator[Running]:
    with Running(model.path, load_format="dummy") as running:
        yield running


def is_person(text: str) -> bool:
    value = json.loads(text)
    return value.keys() == {"name", "age"} and value["name"] in ("ab", "the") and 10 <= value["age"] <= 19


ASKED = {
    "json_schema": ({"response_format": FORMAT}, is_person),
    "no strict": (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}},
        is_person,
    ),
    "json": ({"structured_outputs": {"json": SCHEMA, "disable_fallback": True, "regex": None}}, is_person),
    "text of json": ({"structured_outputs": {"json": json.dumps(SCHEMA), "disable_any_whitespace": True}}, is_person),
    "regex": ({"structured_outputs": {"regex": "ab[0-9]"}}, lambda text: text[:2] == "ab" and text[2:].isdigit()),
    "choice": ({"structured_outputs": {"choice": ["yes", "no"]}}, ("yes", "no").__contains__),
    "grammar": ({"structured_outputs": {"grammar": 'root ::= "x" "y"'}}, "xy".__eq__),
    "guided_json": ({"guided_json": SCHEMA, "guided_whitespace_pattern": ""}, is_person),
    "guided_regex": ({"guided_regex": "[ab]c"}, ("ac", "bc").__contains__),
    "guided_choice": ({"guided_choice": ["yes"]}, "yes".__eq__),
    "guided_grammar": ({"guided_grammar": 'start: "x"'}, "x".__eq__),
}


def bodies() -> list[tuple[str, dict]]:
    return [(COMPLETIONS, {"prompt": "ab"}), (CHAT, {"messages": [{"role": "user", "content": "ab"}]})]


def text_of(choice: dict) -> str:
    return choice["message"]["content"] if "message" in choice else choice["text"]


@pytest.mark.parametrize("name", ASKED)
def test_every_way_to_ask(server: Running, name: str) -> None:
    more, matches = ASKED[name]
    for path, body in bodies():
        choices = server.json(path, body | WITHIN | more | {"n": 2})["choices"]
        assert {choice["finish_reason"] for choice in choices} == {"stop"}
        assert all(matches(text_of(choice)) for choice in choices), choices


@pytest.mark.parametrize("name", ["json_schema", "regex"])
def test_a_stream_is_the_whole_response(server: Running, name: str) -> None:
    for path, body in bodies():
        body = body | WITHIN | ASKED[name][0]
        pieces = [chunk["choices"][0] for chunk in server.events(path, body)]
        got = "".join(piece["delta"].get("content") or "" if "delta" in piece else piece["text"] for piece in pieces)
        assert got == text_of(server.json(path, body)["choices"][0]) and pieces[-1]["finish_reason"] == "stop"


def test_json_object(server: Running) -> None:
    """Any object: a random model seldom ends one, but what it writes begins one."""
    for path, body in bodies():
        asked = body | {"response_format": {"type": "json_object"}, "max_tokens": 5, "seed": 1}
        assert text_of(server.json(path, asked)["choices"][0]).startswith("{")


def test_openai_client_parses(server: Running) -> None:
    schema = {"name": {"type": "string", "enum": ["ab"]}, "age": {"type": "integer", "enum": [12]}}

    class Narrow(Person):
        model_config = {"json_schema_extra": lambda made: made["properties"].update(schema)}

    made = client(server).chat.completions.parse(
        model="m", messages=[{"role": "user", "content": "ab"}], response_format=Narrow, max_tokens=150, seed=2
    )
    assert made.choices[0].message.parsed == Narrow(name="ab", age=12)


REFUSED = [
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "missing"),
    ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format.json_schema.name", "missing"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "x": 1}}},
        "response_format.json_schema.x",
        "unknown parameter",
    ),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": []}}},
        "response_format.json_schema.schema",
        "must be of type dict",
    ),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"not": {}}}}},
        "response_format.json_schema",
        'cannot be compiled: Unimplemented keys: ["not"]',
    ),
    ({"response_format": {"type": "structural_tag"}}, "response_format.type", "not supported"),
    ({"structured_outputs": {"json": {"not": {}}}}, "structured_outputs.json", "cannot be compiled"),
    ({"structured_outputs": {"regex": "("}}, "structured_outputs.regex", "cannot be compiled"),
    ({"structured_outputs": {"regex": 1}}, "structured_outputs.regex", "must be a string"),
    ({"structured_outputs": {"choice": []}}, "structured_outputs.choice", "at least one"),
    ({"structured_outputs": {"x": 1}}, "structured_outputs.x", "unknown parameter"),
    ({"structured_outputs": {"json_object": 1}}, "structured_outputs.json_object", "must be true or false"),
    ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs.structural_tag", "not supported"),
    ({"structured_outputs": {"regex": "a", "json": {}}}, "structured_outputs", "json and regex; give one"),
    ({"guided_json": {"not": {}}}, "guided_json", "cannot be compiled"),
    ({"guided_grammar": "("}, "guided_grammar", "cannot be compiled"),
    ({"guided_decoding_backend": "x"}, "guided_decoding_backend", "not supported"),
    ({"guided_regex": "a", "guided_choice": ["b"]}, "guided_choice", "exclude each other"),
    ({"response_format": FORMAT, "structured_outputs": {"regex": "a"}}, "structured_outputs", "exclude each other"),
]


@pytest.mark.parametrize(("more", "param", "message"), REFUSED)
def test_refusals_name_the_parameter(server: Running, more: dict, param: str, message: str) -> None:
    for path, body in bodies():
        error = server.json(path, body | more, 400)["error"]
        assert error["param"] == param and message in error["message"] and param in error["message"], error
        status, _, text = server.ask(path, body | more | {"stream": True})
        assert status == 400 and json.loads(text)["error"] == error


def test_what_asks_for_nothing_is_taken(server: Running) -> None:
    nothing = [{"structured_outputs": value} for value in (None, {}, {"json": None, "json_object": False})]
    nothing += [{"guided_json": None, "guided_whitespace_pattern": "x"}, {"response_format": {"type": "text"}}]
    for path, body in bodies():
        body = body | {"temperature": 0, "max_tokens": 4}
        plain = server.json(path, body)["choices"]
        assert all(server.json(path, body | more)["choices"] == plain for more in nothing)


def test_others_go_on_while_a_grammar_is_compiled(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compilation has a thread of its own: a request that waits for it delays neither prompts nor steps."""
    import threading

    compile_, asked, go_on = grammar.GrammarCompiler.compile, threading.Event(), threading.Event()

    def slow(self: grammar.GrammarCompiler, params: object) -> object:
        if threading.current_thread().name.startswith("dmc-grammars"):
            asked.set()
            assert go_on.wait(PATIENCE)
        return compile_(self, params)

    monkeypatch.setattr(grammar.GrammarCompiler, "compile", slow)
    path, body = bodies()[1]
    results = []
    waiting = threading.Thread(target=lambda: results.append(server.json(path, body | WITHIN | ASKED["regex"][0])))
    waiting.start()
    until(asked.is_set)
    assert server.json(path, body | {"max_tokens": 4})["choices"][0]["finish_reason"] and not results
    go_on.set()
    waiting.join(PATIENCE)
    assert results[0]["choices"][0]["finish_reason"] == "stop"


def test_batch(model: SimpleNamespace, tmp_path: Path) -> None:
    good = {"prompt": "ab", "max_tokens": 150, "response_format": FORMAT}
    bad = {"messages": [{"role": "user", "content": "ab"}], "guided_regex": "("}
    (tmp_path / "in").write_text("".join(json.dumps(line) + "\n" for line in (good, bad)))
    arguments = ["-i", str(tmp_path / "in"), "-o", str(tmp_path / "out"), "--model", model.path]
    assert main(["batch", *arguments, "--load-format", "dummy", "--disable-tqdm"]) == 0
    first, second = sorted(map(json.loads, (tmp_path / "out").read_text().splitlines()), key=lambda o: o["custom_id"])
    assert is_person(first["response"]["body"]["choices"][0]["text"])
    assert second["response"]["status_code"] == 400 and "guided_regex cannot be compiled" in str(second["error"])


def test_every_parameter_is_described() -> None:
    assert all(field.description for field in protocol.StructuredFields.model_fields.values())
