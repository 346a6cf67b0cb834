"""Parsers of tool calls: what each format means, and the same events however the text is cut into pieces."""

from __future__ import annotations

import json
import random

import pytest

from megatron.dmc.serving.tool_calls import PARSERS, Event, NamedParser, RequiredParser, ToolParser

HERMES = '<tool_call>\n{"name": "f", "arguments": {"a": "}\\"]", "b": [1, {"c": {}}]}}\n</tool_call>'
LLAMA = '{"name": "f", "parameters": {"a": "x, y", "b": {"c": null}}}'
F = ("f", '{"a": "}\\"]", "b": [1, {"c": {}}]}')

Case = tuple[str, str, str, list[tuple[str, str]]]
CASES: list[Case] = [
    ("hermes", "plain text < tool", "plain text < tool", []),
    ("hermes", HERMES, "", [F]),
    ("hermes", f" \n{HERMES}\n{HERMES}\n", "", [F, F]),
    ("hermes", f"I look it up.\n{HERMES}", "I look it up.\n", [F]),
    ("hermes", f"I look.{HERMES}\n{HERMES}", "I look.", [F, F]),
    ("hermes", f"{HERMES}\nDone, so far.", "\nDone, so far.", [F]),
    ("hermes", '<tool_call>{"arguments": {"a": 1}, "name": "g"}</tool_call>', "", [("g", '{"a": 1}')]),
    ("hermes", '<tool_call>{"name": "g"}</tool_call>', "", [("g", "{}")]),
    ("hermes", '<tool_call>{"name": "g", "arguments": "{\\"a\\": 1}"}</tool_call>', "", [("g", '{"a": 1}')]),
    ("hermes", '<tool_call>{"name": "g", "arguments": {"a": 1', "", [("g", '{"a": 1')]),
    ("hermes", "<tool_call>no json</tool_call> and text", "<tool_call>no json</tool_call> and text", []),
    ("hermes", '<tool_call>{"x": 1}</tool_call>', '<tool_call>{"x": 1}</tool_call>', []),
    ("hermes", "<tool_call>{no}</tool_call>", "<tool_call>{no}</tool_call>", []),
    ("hermes", "  ", "  ", []),
    ("llama3_json", "It is {warm}.", "It is {warm}.", []),
    ("llama3_json", LLAMA, "", [("f", '{"a": "x, y", "b": {"c": null}}')]),
    ("llama3_json", f"<|python_tag|>{LLAMA}; {LLAMA}", "", [("f", '{"a": "x, y", "b": {"c": null}}')] * 2),
    ("llama3_json", '{"type": "function", "name": "g", "parameters": {}}', "", [("g", "{}")]),
    ("llama3_json", '{"answer": 42}', '{"answer": 42}', []),
    ("llama3_json", '{"answer": 42} or so', '{"answer": 42} or so', []),
    ("mistral", "plain [text] TOOL", "plain [text] TOOL", []),
    (
        "mistral",
        '[TOOL_CALLS][{"name": "f", "arguments": {"a": [1]}}, {"name": "g", "arguments": {}}]',
        "",
        [("f", '{"a": [1]}'), ("g", "{}")],
    ),
    ("mistral", '[TOOL_CALLS] [{"name": "f", "arguments": {"a": 1}, "id": "123456789"}]', "", [("f", '{"a": 1}')]),
    ("mistral", '[TOOL_CALLS]f{"a": 1}[TOOL_CALLS]g[ARGS]{"b": 2}', "", [("f", '{"a": 1}'), ("g", '{"b": 2}')]),
    ("mistral", 'Sure.[TOOL_CALLS]f[CALL_ID]abc123[ARGS]{"a": "]{"}', "Sure.", [("f", '{"a": "]{"}')]),
    (
        "required",
        '[{"name": "f", "parameters": {"a": 1}},\n {"name": "g", "parameters": {}}]',
        "",
        [("f", '{"a": 1}'), ("g", "{}")],
    ),
    ("named", '{"a": 1}', "", [("f", '{"a": 1}')]),
]


def make(kind: str) -> ToolParser:
    return NamedParser("f") if kind == "named" else RequiredParser() if kind == "required" else PARSERS[kind]()


def read(kind: str, pieces: list[str]) -> tuple[str, list[tuple[str, str]]]:
    parser, content, calls = make(kind), "", []
    events = [event for piece in pieces for event in parser.feed(piece)] + parser.finish()
    for event in events:
        assert isinstance(event, Event) and event.text
        if event.kind == "content":
            content += event.text
        elif event.kind == "name":
            calls.append((event.text, ""))
        else:
            calls[-1] = (calls[-1][0], calls[-1][1] + event.text)
    return content, calls


@pytest.mark.parametrize(("kind", "text", "content", "calls"), CASES)
def test_any_pieces_are_the_whole(kind: str, text: str, content: str, calls: list) -> None:
    assert read(kind, [text]) == (content, calls)
    assert read(kind, list(text)) == (content, calls)
    rng = random.Random(text)
    for _ in range(30):
        cuts = sorted(rng.sample(range(len(text) + 1), rng.randint(0, min(6, len(text)))))
        pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)])]
        assert read(kind, pieces) == (content, calls), pieces


def test_arguments_come_as_they_are_written() -> None:
    """The name is told before the arguments are complete, and these in pieces."""
    parser = PARSERS["hermes"]()
    assert parser.feed('<tool_call>{"name": "f", "argu') == [Event("name", "f")]
    assert parser.feed('ments": {"a": "x') == [Event("arguments", '{"a": "x')]
    assert parser.feed('yz"') == [Event("arguments", 'yz"')]
    assert parser.feed("}}</tool_") == [Event("arguments", "}")]
    assert parser.feed("call>") == parser.finish() == []


@pytest.mark.parametrize("kind", [*PARSERS, "required"])
def test_no_text_is_too_much(kind: str) -> None:
    """Any text of the format's characters is read to the end; however it is cut into pieces."""
    rng = random.Random(kind)
    parts = [
        "<tool_call>",
        "</tool_call>",
        "[TOOL_CALLS]",
        "[ARGS]",
        "{",
        "}",
        "[",
        "]",
        '"',
        "name",
        '"name": "f"',
        ":",
    ]
    parts += [",", ";", "\\", "a", " ", "<", '"arguments": {}', "<|python_tag|>"]
    for _ in range(300):
        pieces = rng.choices(parts, k=rng.randint(1, 14))
        assert read(kind, pieces) == read(kind, ["".join(pieces)])
    long = '{"name": "f", "arguments": {"a": "' + "x" * 200_000
    content, calls = read(kind, ["<tool_call>" * (kind == "hermes") + "[TOOL_CALLS]" * (kind == "mistral") + long])
    assert content == "" and len(calls[0][1]) > 200_000
    assert json.loads(calls[0][1] + '"}')
