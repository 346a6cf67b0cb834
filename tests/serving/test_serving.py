"""Below HTTP: requests and what they ask of the engine, prompts and answers, the engine behind asyncio."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Awaitable, Callable

import pytest
from helpers.engines import Model, all_back
from helpers.processes import run_command
from helpers.serving import make_model, make_prompts

from megatron.dmc.inference import LLM, Engine, EngineConfig, InvalidRequest, Request, SamplingParams
from megatron.dmc.inference.text import load_tokenizer
from megatron.dmc.serving import async_engine
from megatron.dmc.serving.async_engine import AsyncEngine, Limits
from megatron.dmc.serving.errors import APIError
from megatron.dmc.serving.prompts import Prompts
from megatron.dmc.serving.protocol import ChatCompletionRequest, CompletionRequest, parse
from megatron.dmc.serving.responses import Chunks, response

GREEDY = {"temperature": 0, "max_tokens": 12, "ignore_eos": True}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return make_model(tmp_path_factory.mktemp("serving") / "m")


@pytest.fixture(scope="module")
def prompts(model: Model) -> Prompts:
    return make_prompts(load_tokenizer(model.path), 61, 256)


# ----------------------------------------------------------------------------------------------------------- requests


def refused(kind: type, body: object) -> APIError:
    with pytest.raises(APIError) as caught:
        parse(kind, body).sampling_params()
    assert caught.value.status == 400 and set(caught.value.body()["error"]) == {"message", "type", "param", "code"}
    return caught.value


def test_all_sampling_parameters_reach_the_engine() -> None:
    given = dict(
        n=2,
        temperature=0.5,
        top_p=0.9,
        seed=3,
        stop=["a"],
        presence_penalty=0.1,
        frequency_penalty=0.2,
        top_k=4,
        min_p=0.1,
        repetition_penalty=1.1,
        min_tokens=1,
        stop_token_ids=[7],
        ignore_eos=True,
        skip_special_tokens=False,
        include_stop_str_in_output=True,
        max_tokens=9,
    )
    body = {"prompt": "x", "logit_bias": {"5": -1}, "logprobs": 2, "echo": True}
    params = parse(CompletionRequest, given | body).sampling_params()
    assert params == SamplingParams(**given, logit_bias={5: -1}, logprobs=2, prompt_logprobs=2)
    body = {
        "messages": [{"role": "user", "content": "x"}],
        "logprobs": True,
        "top_logprobs": 3,
        "max_completion_tokens": 5,
    }
    assert parse(ChatCompletionRequest, given | body).sampling_params() == SamplingParams(
        **given | dict(max_tokens=5, logprobs=3)
    )
    assert parse(CompletionRequest, {"prompt": "x"}).sampling_params() == SamplingParams()
    assert parse(ChatCompletionRequest, {"messages": body["messages"]}).sampling_params() == SamplingParams(
        max_tokens=None
    )


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"temprature": 1}, "temprature"),
        ({"": 1}, ""),
        ({"temperature": "1"}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"temperature": -1}, "temperature"),
        ({"n": 0}, "n"),
        ({"n": True}, "n"),
        ({"n": 1.5}, "n"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 10**400}, "max_tokens"),
        ({"seed": 2**63}, "seed"),
        ({"stop": [""]}, "stop"),
        ({"stop": 3}, "stop"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 101}}, "logit_bias"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"prompt": None}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"top_k": 2**31}, "top_k"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x"),
        ({"top_k": -2}, "top_k"),
        ({"min_tokens": 99}, "min_tokens"),
        ({"stop_token_ids": [-1]}, "stop_token_ids"),
    ],
)
def test_a_wrong_parameter_is_named(change: dict, param: str) -> None:
    error = refused(CompletionRequest, {"prompt": "x"} | change)
    assert error.param == param, error.message
    json.dumps(error.body(), allow_nan=False)


def test_what_is_not_a_request() -> None:
    for body in (None, [], "x", 3):
        assert "JSON object" in refused(CompletionRequest, body).message
    assert refused(CompletionRequest, {}).param == "prompt"
    assert refused(CompletionRequest, {"prompt": "x", "tool": []}).code == "unknown_parameter"
    assert refused(CompletionRequest, {"prompt": "x", "tools": [{}]}).code == "unsupported_parameter"
    messages = [{"role": "user", "content": "x"}]
    assert refused(ChatCompletionRequest, {"messages": []}).param == "messages"
    assert refused(ChatCompletionRequest, {"messages": messages, "top_logprobs": 2}).param == "top_logprobs"
    image = {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}
    assert refused(ChatCompletionRequest, image).param == "messages[0].content[0].type"


# ------------------------------------------------------------------------------------------------------------ prompts


def test_prompts_in_all_forms(prompts: Prompts) -> None:
    def ids(prompt: object, **more: object) -> list[list[int]]:
        return prompts.of_completion(parse(CompletionRequest, {"prompt": prompt} | more))

    assert ids("ab") == [[59, 0, 1]] and ids("ab", add_special_tokens=False) == [[0, 1]]
    assert ids(["a", "b"]) == [[59, 0], [59, 1]]
    assert ids([3, 4]) == [[3, 4]] and ids([[3, 4], [5]]) == [[3, 4], [5]]
    with pytest.raises(APIError, match="empty list"):
        ids([])
    with pytest.raises(APIError, match="maximum context length is 256 tokens.*5000 characters") as caught:
        ids("a" * 5000)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(APIError, match="surrogate"):
        ids("ab\ud800")
    with pytest.raises(APIError, match="no tokenizer"):
        make_prompts(None, 61, 256).of_completion(parse(CompletionRequest, {"prompt": "a"}))
    with pytest.raises(APIError, match="maximum context length is 256 tokens. However, your prompt has 256") as caught:
        prompts.requests(parse(CompletionRequest, {"prompt": [1] * 256}), SamplingParams(max_tokens=7), "x")
    assert caught.value.param == "prompt"
    made = prompts.requests(parse(CompletionRequest, {"prompt": [[1] * 250, [2]]}), SamplingParams(max_tokens=60), "x")
    assert [request.request_id for request in made] == ["x-0", "x-1"] and made[1].prompt_token_ids == [2]


def test_chat_template(prompts: Prompts) -> None:
    def text(*messages: dict, **more: object) -> str:
        return prompts.decode(prompts.of_chat(parse(ChatCompletionRequest, {"messages": list(messages)} | more)))

    hello = {"role": "user", "content": "hi"}
    assert text(hello) == "<s>u:hi;a:"
    assert text(hello, add_generation_prompt=False) == "<s>u:hi;"
    parts = {"role": "user", "content": [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]}
    assert text({"role": "system", "content": "x"}, parts) == "<s>s:x;u:hi;a:"
    for messages, more, what in (
        ([{"role": "tool", "content": "x"}], {}, "no role tool"),
        ([hello], {"chat_template_kwargs": {"tokenize": True}}, "tokenize"),
        ([hello], {"continue_final_message": True}, "exclude each other"),
    ):
        with pytest.raises(APIError, match=what):
            text(*messages, **more)
    begun = {"role": "assistant", "content": "so"}
    assert text(hello, begun, continue_final_message=True, add_generation_prompt=False) == "<s>u:hi;a:so"


def test_pieces_are_the_text(prompts: Prompts) -> None:
    text = "one two, (three)"
    ids = prompts.encode(text)
    assert "".join(prompts.pieces(ids)) == "<s>" + text and prompts.piece(58) == " "


# ------------------------------------------------------------------------------------------------------------ answers


def test_a_prompt_alone_has_its_logprobs(model: Model) -> None:
    """max_tokens 0: nothing is drawn, the prompt may fill the window, and the pages are back."""
    llm = LLM(model.path, max_model_len=30)
    prompt = model.prompt(30)
    params = SamplingParams(max_tokens=0, prompt_logprobs=1)
    result = llm.generate(prompt, params)[0]
    assert result.error is None and result.outputs[0].token_ids == [] and result.outputs[0].finish_reason == "length"
    assert result.outputs[0].cache.tokens == 30
    scores = model.logprobs(prompt)
    assert [entry.logprob for entry in result.prompt_logprobs] == pytest.approx(
        [float(scores[at, token]) for at, token in enumerate(prompt[1:])], abs=1e-4
    )
    stats = llm.engine.stats()
    assert (stats.prompt_tokens, stats.generation_tokens) == (30, 0)
    for more, sampling_params in ((prompt, SamplingParams(max_tokens=1)), ((*prompt, 1), params)):
        error = llm.generate(more, sampling_params)[0].error
        assert error.startswith("This model's maximum context length is 30 tokens. However, your prompt has")
    all_back(llm.engine)


def answer(model: Model, prompts: Prompts, request: CompletionRequest) -> dict:
    results = LLM(model.path).generate(prompts.of_completion(request), request.sampling_params())
    return response(request, results, "m", prompts)


def test_echo_with_logprobs(model: Model, prompts: Prompts) -> None:
    """As lm-eval asks for them: the scores of the prompt, whether more is generated or not."""
    text = "hello, one two"
    ids = prompts.encode(text)
    for most in (0, 2):
        request = parse(CompletionRequest, GREEDY | {"prompt": text, "max_tokens": most, "echo": True, "logprobs": 1})
        body = answer(model, prompts, request)
        choice, usage = body["choices"][0], body["usage"]
        found = choice["logprobs"]
        scores = model.logprobs((*ids, *model.answer(tuple(ids), most))[: len(ids) + most])
        assert choice["text"].startswith(text) and len(found["tokens"]) == len(ids) + most == len(found["text_offset"])
        assert found["token_logprobs"][0] is None and found["top_logprobs"][0] is None and found["tokens"][0] == "<s>"
        wanted = [float(scores[i, token]) for i, token in enumerate(ids[1:])]
        assert found["token_logprobs"][1 : len(ids)] == pytest.approx(wanted, abs=1e-4)
        for at, top in enumerate(found["top_logprobs"][1 : len(ids)]):
            assert max(top, key=top.get) == prompts.piece(int(scores[at].argmax())) and found["tokens"][at + 1] in top
        assert usage["completion_tokens"] == most and usage["prompt_tokens"] == len(ids)
        assert usage["dmc"]["slots"] > 0 and usage["dmc"]["compression_ratio"] > 1


def test_streamed_chunks_add_up_to_the_answer(model: Model, prompts: Prompts) -> None:
    body = {
        "prompt": ["one two", "three"],
        "n": 2,
        "echo": True,
        "logprobs": 2,
        "seed": 1,
        "temperature": 1.0,
        "stream": True,
    }
    request = parse(CompletionRequest, GREEDY | body | {"stream_options": {"include_usage": True}})
    whole, llm = answer(model, prompts, request), LLM(model.path)
    ids = prompts.of_completion(request)
    chunks = Chunks(request, prompts, ids, "m", "x")
    for i, prompt in enumerate(ids):
        llm.engine.add_request(str(i), prompt, request.sampling_params())
    parts: dict[int, list[dict]] = {}
    while llm.engine.has_unfinished():
        for output in llm.engine.step():
            (chunk,) = chunks.of(int(output.request_id), output)
            assert chunk["usage"] is None
            parts.setdefault(chunk["choices"][0]["index"], []).append(chunk["choices"][0])
    for choice in whole["choices"]:
        found = parts[choice["index"]]
        assert "".join(part["text"] for part in found) == choice["text"]
        assert found[0]["logprobs"]["token_logprobs"][0] is None
        for key, values in choice["logprobs"].items():
            joined = [x for part in found for x in part["logprobs"][key]]
            if key == "token_logprobs":
                joined, values = joined[1:], pytest.approx(values[1:], abs=1e-4)
            assert joined == values or key == "top_logprobs" and len(joined) == len(values)
        assert found[-1]["finish_reason"] == choice["finish_reason"]
    assert chunks.last()[0]["usage"] == whole["usage"]


def test_chat_logprobs(model: Model, prompts: Prompts) -> None:
    body = {
        "messages": [{"role": "user", "content": "hi"}],
        "logprobs": True,
        "top_logprobs": 2,
        "return_token_ids": True,
    }
    request = parse(ChatCompletionRequest, GREEDY | body)
    ids = prompts.of_chat(request)
    result = LLM(model.path).generate(ids, request.sampling_params())[0]
    choice = response(request, [result], "m", prompts)["choices"][0]
    assert choice["token_ids"] == list(model.answer(tuple(ids), 12)) and choice["prompt_token_ids"] == ids
    assert choice["message"] == {"role": "assistant", "content": result.outputs[0].text, "refusal": None}
    entries = choice["logprobs"]["content"]
    assert len(entries) == 12 and all(len(entry["top_logprobs"]) == 2 for entry in entries)
    assert [entry["token"] for entry in entries] == prompts.pieces(choice["token_ids"])
    assert all(entry["bytes"] == list(entry["token"].encode()) for entry in entries if "\ufffd" not in entry["token"])
    assert all(entry["bytes"] is None for entry in entries if "\ufffd" in entry["token"])


# ------------------------------------------------------------------------------------------------- behind asyncio


def on_loop(
    model: Model, test: Callable[[AsyncEngine], Awaitable[None]], limits: Limits | None = None, **settings: object
) -> None:
    engine = Engine(model.path, EngineConfig(**settings))

    async def run() -> None:
        runner = AsyncEngine(engine, limits or Limits())
        try:
            await asyncio.wait_for(test(runner), 60)
        finally:
            await runner.stop()

    asyncio.run(run())


def request(name: str, prompt: tuple[int, ...], most: int = 24, **more: object) -> Request:
    return Request(name, list(prompt), SamplingParams(temperature=0, max_tokens=most, ignore_eos=True), **more)


def test_answers_are_the_engines_own(model: Model) -> None:
    async def test(runner: AsyncEngine) -> None:
        async def one(i: int) -> None:
            prompt = model.prompt(5 + 3 * i, i)
            stream = runner.submit([request(f"{i}", prompt), request(f"{i}+", prompt, 3)])
            first, second = await stream.results()
            assert tuple(first.outputs[0].token_ids) == model.answer(prompt)
            assert tuple(second.outputs[0].token_ids) == model.answer(prompt)[:3]
            stream.close()

        await asyncio.gather(*map(one, range(12)))
        assert runner.unfinished == runner.queued_completions == runner.queued_tokens == 0
        await runner.call(all_back)

    on_loop(model, test, max_num_seqs=4, num_pages=60)


def test_leaving_a_stream_frees_its_pages(model: Model) -> None:
    async def test(runner: AsyncEngine) -> None:
        stream = runner.submit([request("a", model.prompt(9), 240), request("b", model.prompt(8), 240)])
        async for _ in stream:
            break
        assert await runner.call(lambda engine: engine.stats().pages_used) > 0
        stream.close()
        stream.close()
        await runner.call(all_back)
        assert runner.unfinished == runner.queued_completions == 0 and not runner._waiting

    on_loop(model, test)


def test_a_full_queue_refuses(model: Model) -> None:
    async def test(runner: AsyncEngine) -> None:
        running = runner.submit([request("r", model.prompt(9), 200)])
        async for _ in running:
            break
        assert runner.queued_completions == runner.queued_tokens == 0  # it has a row
        first = runner.submit([request("0", model.prompt(10), 2)])
        second = runner.submit([request("1", model.prompt(10), 2)])
        with pytest.raises(APIError, match="2 requests are waiting") as caught:
            runner.reserve(1, 1)
        assert caught.value.status == 503 and caught.value.headers["Retry-After"]
        second.close()
        with pytest.raises(APIError, match="10 prompt tokens are waiting"):
            runner.reserve(1, 16)
        ticket = runner.reserve(1, 15)
        runner.release(ticket)
        with pytest.raises(APIError, match="asks for 3 completions") as caught:
            first.close()
            runner.reserve(3, 1)
        assert caught.value.status == 400
        running.close()
        await runner.call(all_back)
        assert runner.queued_completions == runner.queued_tokens == 0

    on_loop(model, test, Limits(2, 25), max_num_seqs=1)


def test_a_watched_answer_tells_its_slots(model: Model) -> None:
    async def test(runner: AsyncEngine) -> None:
        stream, seen = runner.submit([request("a", model.prompt(20), 12, report_cache=True)]), []
        async for updates in stream:
            seen += [update.output.cache for update in updates if not update.output.finished]
        assert [use.tokens for use in seen] == list(range(20, 31))
        assert all(sum(map(sum, use.slots)) == use.total_slots > 0 for use in seen) and seen[-1].compression_ratio > 1
        stream.close()

    on_loop(model, test)


def test_on_a_cpu_the_next_step_waits_until_the_tokens_have_gone_out(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test(runner: AsyncEngine) -> None:
        stream, steps = runner.submit([request("a", model.prompt(9), 12)]), []
        async for updates in stream:
            steps += [runner.engine.stats().steps for _ in updates]
        assert steps == list(range(1, 13))
        stream.close()

    monkeypatch.setattr(async_engine, "HAND_OVER", 60)
    on_loop(model, test)


def test_one_wrong_request_fails_alone(model: Model) -> None:
    async def test(runner: AsyncEngine) -> None:
        good = runner.submit([request("good", model.prompt(9))])
        with pytest.raises(InvalidRequest, match="token 0 of the prompt is 99"):
            runner.engine.input_processor.process("bad", (99,))
        await runner.call(lambda engine: engine.add(request("bad", model.prompt(8))))
        bad = runner.submit([request("bad", model.prompt(7))])
        with pytest.raises(APIError, match="'bad' is still running") as caught:
            await bad.results()
        bad.close()
        assert caught.value.status == 400
        assert tuple((await good.results())[0].outputs[0].token_ids) == model.answer(model.prompt(9))
        good.close()
        assert runner.queued_completions == 0

    on_loop(model, test)


def test_no_room_for_one_alone(model: Model) -> None:
    async def test(runner: AsyncEngine) -> None:
        stream = runner.submit([request("big", model.prompt(14), 200)])
        with pytest.raises(APIError, match="the cache is full") as caught:
            await stream.results()
        stream.close()
        assert caught.value.status == 500
        await runner.call(all_back)

    on_loop(model, test, num_pages=12)


def test_a_failing_engine_fails_all(
    model: Model, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def test(runner: AsyncEngine) -> None:
        step = runner.engine.step
        streams = [runner.submit([request(str(i), model.prompt(9, i), 100)]) for i in range(3)]
        async for _ in streams[0]:
            break

        def broken() -> list:
            raise RuntimeError("the disc is on fire")

        monkeypatch.setattr(runner.engine, "step", broken)
        for stream in streams:
            with pytest.raises(APIError) as caught:
                await stream.results()
            assert caught.value.status == 500 and "fire" not in caught.value.message
            stream.close()
        monkeypatch.setattr(runner.engine, "step", step)
        for attempt in (lambda: runner.reserve(1, 1), lambda: runner.submit([request("x", (1, 2))])):
            with pytest.raises(APIError) as caught:
                attempt()
            assert caught.value.status == 503
        assert "the disc is on fire" in caplog.text
        with pytest.raises(APIError):
            await runner.call(lambda engine: None)

    on_loop(model, test)


def test_stopping_answers_those_who_wait(model: Model) -> None:
    async def test(runner: AsyncEngine) -> None:
        stream = runner.submit([request("a", model.prompt(9), 200)])
        began = time.monotonic()
        waiting = asyncio.create_task(stream.results())
        await asyncio.sleep(0.02)
        await runner.stop()
        with pytest.raises(APIError) as caught:
            await waiting
        assert caught.value.status == 503 and time.monotonic() - began < 30
        all_back(runner.engine)

    on_loop(model, test)


def test_the_commands_need_nothing_of_the_server(tmp_path) -> None:
    """``dmc generate`` and ``--help`` work without the extra ``serve``."""
    code = (
        "import sys\nfor name in ('fastapi', 'uvicorn', 'prometheus_client', 'pydantic'): sys.modules[name] = None\n"
        "from megatron.dmc.cli import main\nmain(['--help'])"
    )
    shown = run_command([sys.executable, "-c", code]).stdout
    assert "generate" in shown
