"""What clients of OpenAI's and vLLM's servers rely on, one test for each of their habits."""

from __future__ import annotations

from pathlib import Path

import pytest
from batch_lines import command, read, write
from helpers.engines import Model
from helpers.serving import CHAT, COMPLETIONS, GREEDY, IGNORE, TEMPLATE, Running, make_prompts

from megatron.dmc.cli import main
from megatron.dmc.inference.generation_config import default_sampling_params
from megatron.dmc.inference.text import load_tokenizer
from megatron.dmc.serving.chat_template import load_chat_template, wants_parts
from megatron.dmc.serving.prompts import PromptSettings
from megatron.dmc.serving.protocol import ChatCompletionRequest, parse
from megatron.dmc.serving.text_offsets import bytes_of

MESSAGES = {"messages": [{"role": "user", "content": "tell me"}]}


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_usage_in_every_chunk(server: Running, path: str) -> None:
    """guidellm and aiperf always ask for it."""
    body = (MESSAGES if path == CHAT else {"prompt": "tell me"}) | GREEDY | IGNORE
    options = {"include_usage": True, "continuous_usage_stats": True, "include_obfuscation": False}
    events = server.events(path, body | {"stream_options": options})
    counts = [event["usage"]["completion_tokens"] for event in events]
    assert counts == sorted(counts) and counts[0] == (path == COMPLETIONS) and counts[-2] == counts[-1] == 12
    wanted = server.json(path, body)["usage"]
    assert events[-1]["choices"] == [] and events[-1]["usage"]["total_tokens"] == wanted["total_tokens"]
    assert all(event["usage"]["prompt_tokens"] == wanted["prompt_tokens"] for event in events)


# ------------------------------------------------------------------------------------------------------------- lengths


def test_a_completion_is_cut_to_what_is_left_of_the_context(server: Running) -> None:
    """256 tokens, BOS among them."""
    body = {"prompt": "a" * 250, "max_tokens": 10**6, "min_tokens": 20} | IGNORE
    found = server.json(COMPLETIONS, body)
    assert found["usage"]["total_tokens"] == 256 and found["choices"][0]["finish_reason"] == "length"
    long = {"role": "user", "content": "a" * 300}
    for path, prompt, name in (
        (COMPLETIONS, {"prompt": "a" * 256}, "prompt"),
        (CHAT, {"messages": [long]}, "messages"),
    ):
        error = server.json(path, prompt | {"max_tokens": 1}, 400)["error"]
        assert error["message"].startswith("This model's maximum context length is 256 tokens. However, your ")
        assert (error["code"], error["param"]) == ("context_length_exceeded", name) and name in error["message"]


def test_a_prompt_is_truncated(server: Running) -> None:
    def ids(path: str = COMPLETIONS, **more: object) -> list[int]:
        return server.json(path, {"max_tokens": 6, "return_token_ids": True, **more})["choices"][0]["prompt_token_ids"]

    whole = ids(prompt="one two three")
    assert ids(prompt="one two three", truncate_prompt_tokens=5) == whole[-5:]
    assert ids(prompt="one two three", truncate_prompt_tokens=5, truncation_side="right") == whole[:5]
    assert ids(prompt="one two three", truncate_prompt_tokens=500) == whole
    assert len(ids(prompt="a" * 290, truncate_prompt_tokens=-1)) == 250
    assert len(ids(CHAT, **MESSAGES, truncate_prompt_tokens=3)) == 3


# ------------------------------------------------------------------------------------------------------------ sampling


def test_sampling_defaults_of_the_model(model: Model, tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.0, "do_sample": true, "max_new_tokens": 5}')
    assert default_sampling_params(tmp_path) == {"temperature": 0.0, "max_tokens": 5}
    assert default_sampling_params(tmp_path, "vllm") == {} == default_sampling_params(model.path)
    assert default_sampling_params(model.path, str(tmp_path), {"temperature": None, "top_k": 3}) == {
        "max_tokens": 5,
        "top_k": 3,
    }
    for override, message in (({"top_p": 2}, "top_p is 2"), ({"colour": 1}, "colour"), ([1], "must be a JSON object")):
        with pytest.raises(ValueError, match=message):
            default_sampling_params(model.path, "auto", override)
    with pytest.raises(ValueError, match="cannot be read"):
        default_sampling_params(model.path, str(tmp_path / "none"))
    settings = PromptSettings.read(model.path, None, str(tmp_path), {})
    with Running(model.path, prompt_settings=settings) as server:
        greedy = [server.json(path, MESSAGES | IGNORE) for path in (CHAT, CHAT)]
        assert greedy[0]["choices"] == greedy[1]["choices"] and greedy[0]["usage"]["completion_tokens"] == 5
        asked = {"prompt": "a", "temperature": 1.0, "max_tokens": 9} | IGNORE
        assert server.json(COMPLETIONS, asked)["usage"]["completion_tokens"] == 5
        texts = {server.json(COMPLETIONS, asked)["choices"][0]["text"] for _ in range(8)}
        assert len(texts) > 1  # a request that gives a parameter has its own


def test_sampling_defaults_of_a_batch(model: Model, tmp_path: Path) -> None:
    """A line's own value wins, then the command's, then the model's."""
    lines = [{"prompt": "ab", "ignore_eos": True}, {"prompt": "ab", "ignore_eos": True, "max_tokens": 2}]
    override = ["--override-generation-config", '{"temperature": 0, "max_new_tokens": 4}', "--max-tokens", "9"]
    assert main(command(model, write(tmp_path / "in", lines), tmp_path / "out", *override)) == 0
    found = read(tmp_path / "out")
    assert [found[f"line-{n}"]["response"]["body"]["usage"]["completion_tokens"] for n in (1, 2)] == [4, 2]


def test_seed_minus_one_is_none(server: Running) -> None:
    body = {"prompt": "a", "max_tokens": 12} | IGNORE
    texts = {server.json(COMPLETIONS, body | {"seed": -1})["choices"][0]["text"] for _ in range(6)}
    assert len(texts) > 1


def test_allowed_tokens_and_bad_words(server: Running) -> None:
    body = {"prompt": "tell me", "max_tokens": 40, "temperature": 1.0, "seed": 3} | IGNORE
    text = server.json(COMPLETIONS, body | {"allowed_token_ids": [0, 1.0, 2]})["choices"][0]["text"]
    assert len(text) == 40 and set(text) == set("abc")
    few = body | {"allowed_token_ids": [0, 1], "bad_words": ["ab"]}
    text = server.json(COMPLETIONS, few)["choices"][0]["text"]
    assert "ab" not in text and text == "b" * text.count("b") + "a" * text.count("a")
    text = server.json(COMPLETIONS, few | {"bad_words": ["a"], "n": 2})["choices"][1]["text"]
    assert text == "b" * 40
    assert server.json(COMPLETIONS, few | {"bad_words": ["a", "b"]})["choices"][0]["text"]  # no token would be left


def test_log_probabilities_have_a_limit(model: Model) -> None:
    with Running(model.path, max_logprobs=3) as server:
        for path, body, name in (
            (COMPLETIONS, {"prompt": "a", "logprobs": 4}, "logprobs"),
            (COMPLETIONS, {"prompt": "a", "prompt_logprobs": 4}, "prompt_logprobs"),
            (CHAT, MESSAGES | {"logprobs": True, "top_logprobs": 4}, "top_logprobs"),
        ):
            error = server.json(path, body, 400)["error"]
            assert error["param"] == name and error["message"].startswith(f"{name} is 4; it may be at most 3")
        assert server.json(COMPLETIONS, {"prompt": "a", "logprobs": 3})["choices"][0]["logprobs"]


def test_a_salt_keeps_prefixes_apart(model: Model) -> None:
    with Running(model.path) as server:
        body = {"prompt": "one two three " * 5, "max_tokens": 1}

        def cached(**more: object) -> int:
            usage = server.json(COMPLETIONS, body | more)["usage"]
            return usage["prompt_tokens_details"]["cached_tokens"]

        assert cached(cache_salt="one") == 0 < cached(cache_salt="one")
        assert cached(cache_salt="two") == 0 == cached()
        assert server.json(COMPLETIONS, body | {"cache_salt": "x" * 1025}, 400)["error"]["param"] == "cache_salt"


# --------------------------------------------------------------------------------------------------- log-probabilities


@pytest.mark.parametrize("stream", [False, True])
def test_offsets_are_those_of_the_text(server: Running, stream: bool) -> None:
    """BOS is not in the text of a prompt that was given as one; two tokens of one character begin where it does."""
    umlaut = server.json("/tokenize", {"prompt": "\u00fc", "add_special_tokens": False})["tokens"]
    allowed = {"allowed_token_ids": [*umlaut, 0], "seed": 5, "max_tokens": 12}
    body = {"prompt": "a\u00fcb", "echo": True, "logprobs": 0} | allowed | IGNORE
    if stream:
        chunks = [event["choices"][0] for event in server.events(COMPLETIONS, body)]
        text = "".join(chunk["text"] for chunk in chunks)
        offsets = [at for chunk in chunks if chunk["logprobs"] for at in chunk["logprobs"]["text_offset"]]
        tokens = [token for chunk in chunks if chunk["logprobs"] for token in chunk["logprobs"]["tokens"]]
    else:
        choice = server.json(COMPLETIONS, body)["choices"][0]
        text, found = choice["text"], choice["logprobs"]
        offsets, tokens = found["text_offset"], found["tokens"]
    assert offsets[:5] == [0, 0, 1, 1, 2] and tokens[:2] == ["<s>", "a"] and len(offsets) == 17
    assert offsets == sorted(offsets) and offsets[5] == 3
    plain = [(at, token) for at, token in zip(offsets[1:], tokens[1:]) if "\ufffd" not in token]
    assert len(plain) > 3 and all(text[at : at + len(token)] == token for at, token in plain)


def test_offsets_of_a_prompt_of_tokens(server: Running) -> None:
    """Its text has BOS, which is one of its tokens."""
    body = {"prompt": [59, 0, 1], "echo": True, "logprobs": 0, "max_tokens": 1} | IGNORE
    choice = server.json(COMPLETIONS, body)["choices"][0]
    assert choice["text"].startswith("<s>ab") and choice["logprobs"]["text_offset"] == [0, 3, 4, 5]


def test_bytes_of_parts_of_a_character(server: Running) -> None:
    """Together they are the text."""
    umlaut = server.json("/tokenize", {"prompt": "\u00fc", "add_special_tokens": False})["tokens"]
    body = MESSAGES | {"allowed_token_ids": umlaut, "logprobs": True, "top_logprobs": 1, "max_tokens": 6}
    content = server.json(CHAT, body)["choices"][0]["logprobs"]["content"]
    assert {tuple(entry["bytes"]) for entry in content} <= {(0xC3,), (0xBC,)} and len(content) == 6
    assert bytes_of("<0xE4>") == b"\xe4" and bytes_of("\u0120a") == b" a" and bytes_of("\u4e00") is None


def test_log_probabilities_of_a_prompt(server: Running) -> None:
    body = {"prompt": "abc", "max_tokens": 2, "temperature": 0, "prompt_logprobs": 2}
    echo = server.json(COMPLETIONS, body | {"echo": True, "logprobs": 2})["choices"][0]["logprobs"]
    rows = server.json(COMPLETIONS, body)["choices"][0]["prompt_logprobs"]
    assert rows[0] is None and len(rows) == 4
    for token, row, value in zip((0, 1, 2), rows[1:], echo["token_logprobs"][1:]):
        assert row[str(token)]["logprob"] == pytest.approx(value) and row[str(token)]["decoded_token"] == "abc"[token]
        assert sorted(entry["rank"] for entry in row.values())[:2] == [1, 2] and len(row) in (2, 3)
    chat = server.json(CHAT, MESSAGES | {"prompt_logprobs": 0, "max_tokens": 1})
    assert chat["prompt_logprobs"][0] is None and len(chat["prompt_logprobs"]) == chat["usage"]["prompt_tokens"]


# ------------------------------------------------------------------------------------------------------ chat templates

PARTS = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
WALKS = "{% for m in messages %}{% for part in m['content'] %}{{ part.text + '|' }}{% endfor %}{% endfor %}"
BOTH = (
    "{% for m in messages %}{% set content = m.content %}{% if content is string %}{{ 's' + content }}{% else %}"
    "{% for part in content | list %}{{ part.text + '|' }}{% endfor %}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize(
    ("template", "kinds", "of_parts", "of_text"),
    [
        (TEMPLATE, (False, True), "<s>u:one\ntwo;a:", "<s>u:ab;a:"),
        (WALKS, (True, False), "one|two|", "ab|"),
        (BOTH, (True, True), "one|two|", "sab"),
        ("{% generation %}{{ messages[0].content }}{% endgeneration %}", (False, True), "one\ntwo", "ab"),
    ],
)
def test_parts_of_a_message(template: str, kinds: tuple[bool, bool], of_parts: str, of_text: str, model: Model) -> None:
    assert wants_parts(template) == kinds
    tokenizer, seen = load_tokenizer(model.path), []
    prompts = make_prompts(tokenizer, 61, 256, PromptSettings(template))
    prompts.encode = lambda text, add_special_tokens: seen.append(text)
    for content in (PARTS, "ab"):
        prompts.of_chat(parse(ChatCompletionRequest, {"messages": [{"role": "user", "content": content}]}))
    assert seen == [of_parts, of_text]


def test_where_a_chat_template_comes_from(model: Model, tmp_path: Path) -> None:
    (tmp_path / "file.jinja").write_text("{{ messages[0].content }}")
    assert (
        load_chat_template(str(tmp_path / "file.jinja"))
        == "{{ messages[0].content }}"
        == load_chat_template("{{ messages[0].content }}")
    )
    for wrong, message in ((str(tmp_path), "neither a file nor"), ("{% for %}", "line 1")):
        with pytest.raises(ValueError, match=message):
            load_chat_template(wrong)
    own = {"chat_template": "{{ 'x' }}", "add_special_tokens": True}
    for trusted in (False, True):
        with Running(model.path, prompt_settings=PromptSettings("ab", trust_request_chat_template=trusted)) as server:
            plain = MESSAGES | {"max_tokens": 1, "return_token_ids": True}
            assert server.json(CHAT, plain)["choices"][0]["prompt_token_ids"] == [0, 1]
            found = server.json(CHAT, plain | own, 200 if trusted else 400)
            if trusted:
                assert found["choices"][0]["prompt_token_ids"] == [59, 23]
            else:
                assert found["error"]["param"] == "chat_template" and "not supported" in found["error"]["message"]


def test_a_template_gets_documents_and_no_argument_of_its_own(server: Running) -> None:
    for name in ("padding", "tools", "documents", "messages", "tokenizer_kwargs", "tokenize", "add_generation_prompt"):
        body = MESSAGES | {"chat_template_kwargs": {name: 1}}
        error = server.json(CHAT, body, 400)["error"]
        assert error["param"] == "chat_template_kwargs" and repr(name) in error["message"]
    body = MESSAGES | {"chat_template_kwargs": {"enable_thinking": False}, "documents": [{"title": "a", "text": "b"}]}
    assert server.json(CHAT, body | {"max_tokens": 1})["choices"]


# ---------------------------------------------------------------------------------------------------------- the server


def test_several_names_of_one_model(model: Model) -> None:
    with Running(model.path, aliases=("other/name", "third")) as server:
        assert [card["id"] for card in server.json("/v1/models")["data"]] == ["m", "other/name", "third"]
        assert server.json("/v1/models/other/name")["id"] == "other/name"
        for name in ("m", "other/name", "third", "", None):
            found = server.json(COMPLETIONS, {"prompt": "a", "model": name, "max_tokens": 1})
            assert found["model"] == "m"
        assert server.json(COMPLETIONS, {"prompt": "a", "model": "fourth"}, 404)["error"]["param"] == "model"


@pytest.mark.parametrize("is_open", [False, True])
def test_the_tokenizer_without_a_key(model: Model, is_open: bool) -> None:
    """`vllm bench serve` asks without one, and sends prompts of other lengths when it is refused."""
    with Running(model.path, keys=("key",), open_tokenizer=is_open) as server:
        status = 200 if is_open else 401
        assert server.json("/tokenize", {"prompt": "ab"}, status).get("tokens") == ([59, 0, 1] if is_open else None)
        server.json("/detokenize", {"tokens": [0]}, status)
        server.json(COMPLETIONS, {"prompt": "a"}, 401)


def test_a_flag_that_does_not_exist_is_named(capsys: pytest.CaptureFixture) -> None:
    for arguments, named in ((["--typo"], "--typo"), (["--chat-templat=x"], "--chat-templat; did you mean --chat-t")):
        assert main(["serve", *arguments]) == 2
        assert capsys.readouterr().err.startswith(f"error: unrecognized arguments: {named}")


def test_a_batch_line_has_openais_names_only(model: Model, tmp_path: Path) -> None:
    sent = {"role": "assistant", "content": "a", "refusal": None, "annotations": [], "tool_calls": None}
    body = {"messages": [*MESSAGES["messages"], sent, *MESSAGES["messages"]], "tools": [], "store": False} | GREEDY
    good = {"custom_id": "a", "method": "POST", "url": CHAT, "body": body}
    lines = [good, good | {"custom_id": "b", "colour": 1}]
    assert main(command(model, write(tmp_path / "in", lines), tmp_path / "out")) == 0
    found = read(tmp_path / "out")
    assert found["a"]["error"] is None and found["b"]["response"]["body"]["error"]["param"] == "colour"
