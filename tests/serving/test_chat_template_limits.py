"""Chat templates that loop, or make too much: they are given up, and nobody else waits for them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.engines import Model
from helpers.serving import CHAT, COMPLETIONS, GREEDY, TEMPLATE, Running, add_tokenizer

from megatron.dmc.serving import template_process

LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
GROW = "{% set ns = namespace(x='aaaaaaaa') %}{% for i in range(40) %}{% set ns.x = ns.x + ns.x %}{% endfor %}"


@pytest.fixture(scope="module")
def server(model: Model) -> Iterator[Running]:
    """A model whose template loops, grows or repeats when a message says so."""
    cases = {"loop": LOOP, "grow": GROW, "many": "{{ 'a' * 9000000 }}"}
    hostile = "".join(f"{{% if messages[0].content == '{word}' %}}{text}{{% endif %}}" for word, text in cases.items())
    add_tokenizer(Path(model.path), hostile + TEMPLATE)
    with Running(model.path) as running:
        yield running
        running.settle()


def ask(server: Running, content: str) -> tuple[int, str]:
    body = {"messages": [{"role": "user", "content": content}]} | GREEDY
    status, _, text = server.ask(CHAT, body)
    message = json.loads(text)["error"]["message"] if status != 200 else ""
    return status, message.removeprefix("the messages do not fit the chat template: ")


def test_templates_that_take_too_much(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ask(server, "hi") == (200, "")
    process = template_process.shared()._process
    assert ask(server, "many") == (400, "it makes more than 2097152 characters")
    assert ask(server, "grow") == (400, "it takes more than 1024 MiB")
    assert ask(server, "hi") == (200, "") and template_process.shared()._process is process
    monkeypatch.setattr(template_process, "SECONDS", 0.5)
    assert ask(server, "loop") == (400, "it does not end within 0.5 s")
    assert process is not None and process.returncode is not None, "the process is gone"
    assert server.json(COMPLETIONS, {"prompt": "a"} | GREEDY)
    monkeypatch.undo()
    assert ask(server, "hi") == (200, "")


def test_the_text_is_the_tokenizers_own(server: Running) -> None:
    """Rendered in the other process with the same special tokens and template."""
    tokenizer = server.engine.tokenizer
    messages = [{"role": "system", "content": "a b"}, {"role": "user", "content": "c\ud83d"}]
    for more in ({"add_generation_prompt": True}, {"continue_final_message": True}):
        own = tokenizer.apply_chat_template(messages, tokenize=False, **more)
        assert server.service.prompts.tokenizer.apply_chat_template(messages, tokenize=False, **more) == own
    with pytest.raises(ValueError, match="no role tool"):
        server.service.prompts.tokenizer.apply_chat_template([{"role": "tool", "content": ""}], tokenize=False)
