"""Structured outputs of a request: OpenAI's ``response_format``, vLLM's ``structured_outputs`` and ``guided_*``."""

from typing import Any, ClassVar, Literal, Optional, Union

from megatron.dmc.inference import InvalidRequest, StructuredOutputsParams
from megatron.dmc.serving.errors import APIError, invalid, of_invalid_request
from megatron.dmc.serving.protocol import dialect
from megatron.dmc.serving.protocol.base import RequestModel


class ResponseFormat(RequestModel):
    """Format of the completion."""

    unsupported: ClassVar = dialect.RESPONSE_FORMAT

    type: Literal["text", "json_object", "json_schema"]
    """Kind of format: `text`, `json_object` for any JSON object, or `json_schema` for what a schema describes."""
    json_schema: Optional[dict[str, Any]] = None
    """With type `json_schema`: `name`, `schema`, `description` and `strict`; the schema is always enforced."""

    def constraint(self) -> Optional[StructuredOutputsParams]:
        """What the completion must match. Raises :class:`APIError` for a ``json_schema`` that is none."""
        if self.type == "json_schema":
            return StructuredOutputsParams(json=_schema_of(self.json_schema))
        return StructuredOutputsParams(json_object=True) if self.type == "json_object" else None


def _schema_of(described: Optional[dict[str, Any]]) -> dict[str, Any]:
    """The schema of OpenAI's ``json_schema`` object. Without one, that of any object."""
    name = "response_format.json_schema"
    if described is None:
        raise invalid(f"missing parameter: {name!r}", name, "missing_required_parameter")
    types: dict[str, Any] = {"name": str, "description": str, "schema": dict, "strict": bool}
    for key, value in described.items():
        if key not in types:
            raise invalid(f"unknown parameter: '{name}.{key[:100]}'", f"{name}.{key[:100]}", "unknown_parameter")
        if value is not None and not isinstance(value, types[key]):
            raise invalid(f"{name}.{key} must be of type {types[key].__name__}", f"{name}.{key}", "invalid_type")
    if described.get("name") is None:
        raise invalid(f"missing parameter: '{name}.name'", f"{name}.name", "missing_required_parameter")
    schema = described.get("schema")
    return {"type": "object"} if schema is None else schema


class StructuredFields(RequestModel):
    """Parameters that say what a completion must match; at most one of them."""

    response_format: Optional[ResponseFormat] = None
    """Format of the completion: text, a JSON object, or JSON of a schema."""
    structured_outputs: Optional[dict[str, Any]] = None
    """Constraint on the completion, as in vLLM: `json`, `json_object`, `regex`, `choice` or `grammar`."""
    guided_json: Union[str, dict[str, Any], None] = None
    """Older name of `structured_outputs.json`."""
    guided_regex: Optional[str] = None
    """Older name of `structured_outputs.regex`."""
    guided_choice: Optional[list[str]] = None
    """Older name of `structured_outputs.choice`."""
    guided_grammar: Optional[str] = None
    """Older name of `structured_outputs.grammar`."""
    guided_whitespace_pattern: Optional[str] = None
    """Older name of `structured_outputs.whitespace_pattern`, for `guided_json`."""

    def constraint(self) -> Optional[StructuredOutputsParams]:
        """What the completion must match. Raises :class:`APIError`; :class:`InvalidRequest` by the engine's names."""
        found = self._constraints()
        if len(found) > 1:
            first, second, *_ = found
            raise invalid(f"{first} and {second} exclude each other; give one of them", second)
        return next(iter(found.values()), None)

    def _constraints(self) -> dict[str, StructuredOutputsParams]:
        """All that are given, by the parameter's name."""
        found = {}
        if self.response_format is not None and (wanted := self.response_format.constraint()) is not None:
            found["response_format"] = wanted
        if self.structured_outputs is not None and (wanted := _of_vllm(self.structured_outputs)) is not None:
            found["structured_outputs"] = wanted
        pattern = self.guided_whitespace_pattern
        for kind in ("json", "regex", "choice", "grammar"):
            if (value := getattr(self, f"guided_{kind}")) not in (None, "", []):
                found[f"guided_{kind}"] = StructuredOutputsParams(**{kind: value}, whitespace_pattern=pattern)
        return found

    def as_sent(self, error: APIError) -> APIError:
        """Error whose ``param`` and message name the parameter as the client sent it."""
        param = error.param
        if param is None or param.partition(".")[0] != "structured_outputs":
            return super().as_sent(error)
        error.param = self._sent_constraint(param)
        error.message = error.message.replace(param, error.param, 1)
        return error

    def _sent_constraint(self, param: str) -> str:
        """Name under which the client sent the constraint, or a field of it."""
        kind = param.partition(".")[2]
        for name in (kind,) if kind else ("json", "regex", "choice", "grammar"):
            if getattr(self, f"guided_{name}", None) is not None:
                return f"guided_{name}"
        if self.response_format is not None and self.response_format.type != "text":
            return "response_format.json_schema" if kind == "json" else "response_format"
        return param


def _of_vllm(described: dict[str, Any]) -> Optional[StructuredOutputsParams]:
    """The constraint of a ``structured_outputs`` object; None when all of it asks for nothing."""
    given, asked = {}, False
    for key, value in described.items():
        entry, name = dialect.STRUCTURED_OUTPUTS.get(key), f"structured_outputs.{key[:100]}"
        if entry is None and key not in StructuredOutputsParams.__dataclass_fields__:
            raise invalid(f"unknown parameter: {name!r}", name, "unknown_parameter")
        if entry is not None and not entry.asks_for_nothing(value):
            raise invalid(f"{name} is not supported; {entry.instead}", name, "unsupported_parameter")
        switch = key in ("json_object", "disable_any_whitespace")
        if switch and not (value is None or isinstance(value, bool)):
            raise invalid(f"{name} must be true or false", name, "invalid_type")
        if entry is None and value is not None:
            given[key] = value
            asked = asked or not (switch and not value)
    if not asked:
        return None
    try:
        return StructuredOutputsParams(**given)
    except InvalidRequest as error:
        raise of_invalid_request(error) from None
