"""Errors of request bodies: which parameter is wrong, under the name by which the client sent it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Optional, get_args

from pydantic import BaseModel, ValidationError

from megatron.dmc.serving.errors import APIError, invalid, shown
from megatron.dmc.serving.protocol.base import RequestModel
from megatron.dmc.serving.protocol.chat import ChatCompletionRequest
from megatron.dmc.serving.protocol.dialect import Unsupported
from megatron.dmc.serving.protocol.generation import CompletionRequest
from megatron.dmc.serving.protocol.responses_api import ResponsesRequest
from megatron.dmc.serving.protocol.tokenizer import DetokenizeRequest, TokenizeChatRequest, TokenizeRequest


def models_in(annotation: Any) -> list[type[RequestModel]]:
    """Request models that a field's type is made of."""
    if isinstance(annotation, type) and issubclass(annotation, RequestModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in models_in(part)]


@dataclass(frozen=True)
class _Names:
    """Names that may stand in an object of a body, those of all request models together."""

    fields: dict[str, _Names] = field(default_factory=dict)
    """Implemented parameters, each with the names inside it."""
    unsupported: dict[str, Unsupported] = field(default_factory=dict)

    @classmethod
    def of(cls, *models: type[RequestModel]) -> _Names:
        fields = {name: field for model in models for name, field in model.model_fields.items()}
        unsupported = {name: entry for model in models for name, entry in model.unsupported.items()}
        return cls({name: cls.of(*models_in(field.annotation)) for name, field in fields.items()}, unsupported)


NAMES = _Names.of(
    CompletionRequest, ChatCompletionRequest, ResponsesRequest, TokenizeRequest, TokenizeChatRequest, DetokenizeRequest
)


def parse(model: type[BaseModel], body: Any) -> Any:
    """Request from decoded JSON. Raises :class:`APIError` (400)."""
    try:
        return model.model_validate(body)
    except ValidationError as error:
        raise of_validation(error.errors(include_url=False, include_context=False)) from None


def of_validation(errors: Sequence[Any]) -> APIError:
    """HTTP 400 for the first of pydantic's errors about a body. A name that is not known comes before all others."""
    found = [(*_parameter(error), error) for error in errors]
    param, entry, first = next((item for item in found if item[2]["type"] == "extra_forbidden"), found[0])
    if first["type"] == "json_invalid" or param is None:
        return invalid("the body is not a JSON object; send one with Content-Type: application/json")
    # A value that may have several types has an error for each; the one that goes deepest has the intended type.
    below = (f"{param}.", f"{param}[")
    within = [item for item in found if item[0] is not None and (item[0] == param or item[0].startswith(below))]
    param, entry, first = max(within, key=lambda item: item[0].count("."))
    value = shown(first["input"])
    if first["type"] == "extra_forbidden":
        if entry is not None:
            message = f"{param} is not supported, and is {value}; {entry.instead}"
            return invalid(message, param, "unsupported_parameter")
        return invalid(f"unknown parameter: {param[:200]!r}", param[:100], "unknown_parameter")
    if first["type"] == "missing":
        return invalid(f"missing parameter: {param!r}", param, "missing_required_parameter")
    if entry is not None and first["input"] in entry.values:
        return invalid(f"{param} {value} is not supported; {entry.instead}", param, "unsupported_value")
    wanted = "; or: ".join(dict.fromkeys(error["msg"] for path, _, error in within if path == param))
    wanted = wanted.replace("Input should be", "it must be")
    return invalid(f"{param} is {value}: {wanted[:400]}", param, "invalid_type")


def _parameter(error: Any) -> tuple[Optional[str], Optional[Unsupported]]:
    """Parameter that an error is about, such as ``messages[0].content``, and its entry among the unsupported ones.
    Elements of lists and maps have no name.

    None: the body as a whole. The name of an unknown parameter may be empty.
    """
    path, entry, index, names = None, None, "", NAMES
    unknown = len(error["loc"]) - 1 if error["type"] == "extra_forbidden" else None
    for at, part in enumerate(error["loc"]):
        if isinstance(part, int):
            index = f"[{part}]"
        elif part in names.fields or at == unknown:  # otherwise "body", or the name of a type
            path = part if path is None else f"{path}{index}.{part}"
            entry = names.unsupported.get(part)
            index, names = "", names.fields.get(part, _Names())
    return path, entry
