"""OpenAI's Agents SDK over its default, the Responses API: a function that must be called, an answer in a format."""

import os

from agents import Agent, ModelSettings, Runner, function_tool, set_default_openai_client, set_tracing_disabled
from openai import AsyncOpenAI
from pydantic import BaseModel

set_tracing_disabled(True)
set_default_openai_client(AsyncOpenAI(base_url=os.environ["BASE_URL"], max_retries=0))
asked = []


class Person(BaseModel):
    name: bool
    age: bool


@function_tool
def weather(rain: bool) -> str:
    """Tells the weather."""
    asked.append(rain)
    return "sun"


shared = {"name": "small", "instructions": "be brief", "model": os.environ["MODEL"]}
caller = Agent(
    **shared,
    tools=[weather],
    tool_use_behavior="stop_on_first_tool",  # a random model's free text may not end
    model_settings=ModelSettings(temperature=0, max_tokens=200, tool_choice="required"),
)
called = Runner.run_sync(caller, "weather?")
assert asked, called
turns = called.to_input_list()
assert [turn.get("type") for turn in turns[1:]] == ["function_call", "function_call_output"], turns
speaker = Agent(**shared, output_type=Person, model_settings=ModelSettings(temperature=0, max_tokens=200))
answer = Runner.run_sync(speaker, [*turns, {"role": "user", "content": "who?"}])
assert isinstance(answer.final_output, Person)
print("all well")
