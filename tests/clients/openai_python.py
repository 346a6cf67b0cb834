"""openai-python of any version from 1 on: what its users do."""

import os

import openai
from openai import OpenAI
from pydantic import BaseModel

MODEL = os.environ["MODEL"]
SHORT = {"max_tokens": 24, "temperature": 0}
FUNCTION = {
    "name": "weather",
    "description": "tells the weather",
    "parameters": {
        "type": "object",
        "properties": {"city": {"enum": ["ab", "the"]}},
        "required": ["city"],
        "additionalProperties": False,
    },
}


class Person(BaseModel):
    name: bool
    age: bool


def chats(client: OpenAI) -> None:
    """Three turns, each answer sent back as it came; a stream gives the same text."""
    messages: list = [{"role": "system", "content": "be brief"}]
    for text in ("ab", "name the name", "true"):
        messages.append({"role": "user", "content": text})
        answer = client.chat.completions.create(model=MODEL, messages=messages, **SHORT)
        stream = client.chat.completions.create(
            model=MODEL, messages=messages, stream=True, stream_options={"include_usage": True}, **SHORT
        )
        chunks = list(stream)
        streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        assert streamed == answer.choices[0].message.content, (streamed, answer)
        assert chunks[-1].usage.completion_tokens == answer.usage.completion_tokens
        messages.append(answer.choices[0].message)
    assert answer.usage.prompt_tokens_details.cached_tokens > 0


def completions(client: OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt=["ab", "the"], n=2, logprobs=2, seed=1, max_tokens=4)
    assert len(answer.choices) == 4 and len(answer.choices[0].logprobs.token_logprobs) <= 4
    assert MODEL in [model.id for model in client.models.list()]


def structured(client: OpenAI) -> None:
    messages = [{"role": "user", "content": "who?"}]
    parse = getattr(client.chat.completions, "parse", None) or client.beta.chat.completions.parse
    answer = parse(model=MODEL, messages=messages, response_format=Person, temperature=0, max_tokens=200)
    assert isinstance(answer.choices[0].message.parsed, Person)


def tools(client: OpenAI) -> None:
    """A call that is required, its result sent back, an answer; the call streamed."""
    tool = {"type": "function", "function": FUNCTION}
    messages: list = [{"role": "user", "content": "weather?"}]
    asked = dict(model=MODEL, messages=messages, tools=[tool], tool_choice="required", temperature=0, max_tokens=200)
    answer = client.chat.completions.create(**asked)
    (call,) = answer.choices[0].message.tool_calls
    assert call.function.name == "weather" and answer.choices[0].finish_reason == "tool_calls", answer
    arguments = ""
    for chunk in client.chat.completions.create(**asked, stream=True):
        for delta in chunk.choices[0].delta.tool_calls or ():
            arguments += delta.function.arguments or ""
    assert arguments == call.function.arguments, (arguments, call)
    messages += [answer.choices[0].message, {"role": "tool", "tool_call_id": call.id, "content": "sun"}]
    last = client.chat.completions.create(model=MODEL, messages=messages, tools=[tool], tool_choice="none", **SHORT)
    assert last.choices[0].message.tool_calls is None


def responses(client: OpenAI) -> None:
    if not hasattr(client, "responses"):
        return
    asked = dict(model=MODEL, input="name?", instructions="be brief", temperature=0, max_output_tokens=200)
    first = client.responses.create(**asked)
    with client.responses.stream(**asked) as stream:
        last = list(stream)[-1]  # get_final_response() takes no response that max_output_tokens has cut
        assert last.response.output_text == first.output_text and last.type == f"response.{first.status}"
    tool = {"type": "function", **FUNCTION, "strict": True}
    turn: list = [{"role": "user", "content": "weather?"}]
    called = client.responses.create(**{**asked, "input": turn}, tools=[tool], tool_choice="required")
    (call,) = [item for item in called.output if item.type == "function_call"]
    turn += [*called.output, {"type": "function_call_output", "call_id": call.call_id, "output": "sun"}]
    assert client.responses.create(**{**asked, "input": turn}).status in ("completed", "incomplete")
    assert isinstance(client.responses.parse(**asked, text_format=Person).output_parsed, Person)


def errors(client: OpenAI) -> None:
    for body, kind in (
        ({"model": "another"}, openai.NotFoundError),
        ({"temperature": -1}, openai.BadRequestError),
        ({"messages": [{"role": "user", "content": "ab" * 5000}]}, openai.BadRequestError),
    ):
        try:
            client.chat.completions.create(**{"model": MODEL, "messages": [{"role": "user", "content": "x"}], **body})
        except kind as error:
            assert error.param and error.body["message"], error.body
        else:
            raise AssertionError(f"{body} was taken")


def main() -> None:
    with OpenAI(base_url=os.environ["BASE_URL"], max_retries=0) as client:
        for part in (completions, chats, structured, tools, responses, errors):
            part(client)
            print(part.__name__, flush=True)
    print(f"openai {openai.__version__}: all well")


main()
