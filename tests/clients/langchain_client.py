"""langchain-openai: invoke, stream, structured output, a bound tool."""

import os

from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel, Field


class Person(BaseModel):
    """A person."""

    name: bool = Field(description="whether there is a name")
    age: bool


@tool
def weather(rain: bool) -> str:
    """Tells the weather."""
    return "sun"


model = ChatOpenAI(
    model=os.environ["MODEL"], base_url=os.environ["BASE_URL"], temperature=0, max_tokens=200, max_retries=0
)
answer = model.invoke("name?")
assert "".join(chunk.text for chunk in model.stream("name?")) == answer.text
assert isinstance(model.with_structured_output(Person).invoke("who?"), Person)
called = model.bind_tools([weather], tool_choice="required", strict=True).invoke("weather?")
assert called.tool_calls[0]["name"] == "weather", called
print("all well")
