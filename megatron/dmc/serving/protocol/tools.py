"""Tools of a chat: their definitions, which of them the model may or must call, and the calls in messages."""

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Optional, Union

from pydantic import Discriminator, Field, Tag

from megatron.dmc.inference import StructuredOutputsParams
from megatron.dmc.serving.errors import invalid
from megatron.dmc.serving.protocol.base import Int, RequestModel


class FunctionDefinition(RequestModel):
    """Function that the model may call."""

    name: str = Field(pattern="^[a-zA-Z0-9_.-]{1,128}$")
    """Name of the function: letters, digits, `_`, `-` and `.`."""
    description: Optional[str] = None
    """Purpose of the function, for the model."""
    parameters: Optional[dict[str, Any]] = None
    """JSON schema of the arguments, an object. Without one the function has no arguments."""
    strict: Optional[bool] = None
    """Accepted and ignored: arguments of `required` and named functions always follow the schema."""


class Tool(RequestModel):
    """Tool that the model may call."""

    type: Literal["function"]
    """Must be `function`."""
    function: FunctionDefinition
    """The function."""


class FunctionName(RequestModel):
    """Name of a function."""

    name: str
    """Name of one of the tools."""


class NamedTool(RequestModel):
    """The one function that the model must call."""

    type: Literal["function"]
    """Must be `function`."""
    function: FunctionName
    """The function."""


ToolChoice = Annotated[
    Union[Annotated[Literal["none", "auto", "required"], Tag("mode")], Annotated[NamedTool, Tag("function")]],
    Discriminator(lambda value: "mode" if isinstance(value, str) else "function"),
]


class CalledFunction(RequestModel):
    """Function that was called."""

    name: str
    """Name of the function."""
    arguments: Optional[str] = None
    """Arguments as JSON."""


class ToolCall(RequestModel):
    """Call of a function in an assistant's message, as the server has sent it."""

    id: Optional[str] = None
    """Name of the call, to which the `tool_call_id` of its result refers."""
    type: Optional[Literal["function"]] = "function"
    """Must be `function`."""
    function: CalledFunction
    """The function and its arguments."""
    index: Optional[Int] = None
    """Number of the call in a stream, which is accepted and ignored."""

    def plain(self) -> dict[str, Any]:
        """Call as a chat template takes it: arguments as an object, where they are one."""
        text = self.function.arguments or "{}"
        try:
            arguments = json.loads(text)
        except (ValueError, RecursionError):
            arguments = text
        call: dict[str, Any] = {"type": "function", "function": {"name": self.function.name, "arguments": arguments}}
        return call if self.id is None else {"id": self.id, **call}


class ToolFields(RequestModel):
    """Tools of a request."""

    tools: Optional[Annotated[list[Tool], Field(fail_fast=True)]] = None
    """Functions that the model may call."""

    def template_tools(self) -> Optional[list[dict[str, Any]]]:
        """Tools as a chat template takes them; None without any."""
        return [tool.model_dump(exclude_none=True) for tool in self.tools] if self.tools else None


class ToolChoiceFields(ToolFields):
    """Tools of a request, and whether the model may or must call them."""

    tool_choice: Optional[ToolChoice] = None
    """Permission to call tools: `none`, `auto` (the default with tools), `required` (at least one), or one."""
    parallel_tool_calls: Optional[bool] = None
    """Permission to call several tools at once, default true."""

    @property
    def tool_mode(self) -> Literal["none", "auto", "required", "named"]:
        """How the model calls tools."""
        choice = self.tool_choice
        if not self.tools or choice == "none":
            return "none"
        return "auto" if choice is None else "named" if isinstance(choice, NamedTool) else choice

    def template_tools(self) -> Optional[list[dict[str, Any]]]:
        """Tools as a chat template takes them; None where none may be called."""
        return None if self.tool_mode == "none" else super().template_tools()

    def check_tools(self) -> None:
        """Raise :class:`APIError` for a choice that the tools do not have."""
        choice = self.tool_choice
        if choice in ("required",) and not self.tools:
            raise invalid("tool_choice is 'required', and there are no tools", "tool_choice")
        if isinstance(choice, NamedTool):
            names = [tool.function.name for tool in self.tools or ()]
            if choice.function.name not in names:
                name = "tool_choice.function.name"
                raise invalid(f"{name} is {choice.function.name[:200]!r}, which is no tool of the request", name)

    def tool_constraint(self) -> Optional[StructuredOutputsParams]:
        """What a completion must match that has to call tools: the arguments of the named function, or a list of
        calls. Raises :class:`InvalidRequest`.
        """
        mode = self.tool_mode
        if mode == "named":
            assert isinstance(self.tool_choice, NamedTool)
            name = self.tool_choice.function.name
            (tool, *_) = [tool for tool in self.tools or () if tool.function.name == name]
            return StructuredOutputsParams(json=_parameters(tool.function))
        if mode != "required":
            return None
        calls = []
        for index, tool in enumerate(self.tools or ()):
            place = f"#/items/anyOf/{index}/properties/parameters"
            properties = {
                "name": {"const": tool.function.name},
                "parameters": _moved(_parameters(tool.function), place),
            }
            call = {"type": "object", "properties": properties, "required": ["name", "parameters"]}
            calls.append({**call, "additionalProperties": False})
        most = {"maxItems": 1} if self.parallel_tool_calls is False else {}
        return StructuredOutputsParams(json={"type": "array", "minItems": 1, **most, "items": {"anyOf": calls}})


def _parameters(function: FunctionDefinition) -> dict[str, Any]:
    """Schema of a function's arguments."""
    return function.parameters or {"type": "object", "properties": {}, "additionalProperties": False}


def _moved(schema: Any, place: str, depth: int = 0) -> Any:
    """A schema with its references to itself changed for a ``place`` within another one."""
    if depth > 200:
        raise invalid("tools are nested too deeply", "tools")
    if isinstance(schema, list):
        return [_moved(part, place, depth + 1) for part in schema]
    if not isinstance(schema, Mapping):
        return schema
    moved = {}
    for key, value in schema.items():
        if key == "$ref" and isinstance(value, str) and (value == "#" or value.startswith("#/")):
            moved[key] = place + value[1:]
        elif key in ("enum", "const", "default", "examples"):
            moved[key] = value
        else:
            moved[key] = _moved(value, place, depth + 1)
    return moved
