"""OpenAI's Agents SDK over its default, the Responses API: an agent that must call a function first."""

import os

from agents import Agent, ModelSettings, Runner, function_tool, set_default_openai_client, set_tracing_disabled
from openai import AsyncOpenAI

set_tracing_disabled(True)
set_default_openai_client(AsyncOpenAI(base_url=os.environ["BASE_URL"], max_retries=0))
asked = []


@function_tool
def weather(rain: bool) -> str:
    """Tells the weather."""
    asked.append(rain)
    return "sun"


agent = Agent(
    name="small",
    instructions="be brief",
    model=os.environ["MODEL"],
    tools=[weather],
    model_settings=ModelSettings(temperature=0, max_tokens=200, tool_choice="required"),
)
result = Runner.run_sync(agent, "weather?", max_turns=4)
assert asked, result
assert len(result.to_input_list()) >= 3
print("all well")
