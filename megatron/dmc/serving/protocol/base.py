"""Basis of all request bodies: strict types, unknown names refused, and values that ask for nothing taken."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Optional

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from megatron.dmc.serving.errors import APIError
from megatron.dmc.serving.protocol import dialect


def _integral(value: Any) -> Any:
    """An integral float such as 16.0 as an integer: JavaScript and Lua know no difference."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _integrals(value: Any) -> Any:
    if isinstance(value, list) and any(type(element) is float for element in value):
        return [_integral(element) for element in value]
    return value


_Int64 = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]
Int = Annotated[_Int64, BeforeValidator(_integral)]
"""Integer of 64 bits; an integral float is taken for one."""
TokenIds = Annotated[list[_Int64], Field(fail_fast=True), BeforeValidator(_integrals)]
"""Token ids. Checking ends at the first wrong one, so that a body of a million wrong ones costs no more."""


class RequestModel(BaseModel):
    """Part of a request body. The docstrings of its fields are their descriptions in the OpenAPI schema."""

    model_config = ConfigDict(
        extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=(), use_attribute_docstrings=True
    )
    unsupported: ClassVar[Mapping[str, dialect.Unsupported]] = dialect.NONE
    """Parameters that other servers have at this place, by name."""
    null_is_a_value: ClassVar[frozenset[str]] = frozenset()
    """Fields in which null differs from leaving the field out."""

    @model_validator(mode="before")
    @classmethod
    def _drop_what_asks_for_nothing(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return {name: value for name, value in data.items() if not cls._asks_for_nothing(name, value)}

    @classmethod
    def _asks_for_nothing(cls, name: str, value: Any) -> bool:
        field = cls.model_fields.get(name)
        if field is None:
            entry = cls.unsupported.get(name)
            return entry is not None and entry.asks_for_nothing(value)
        return value is None and not field.is_required() and name not in cls.null_is_a_value

    def _sent_name(self, param: str) -> str:
        """Name under which the client sent a parameter of the engine."""
        return param

    def as_sent(self, error: APIError) -> APIError:
        """Error whose ``param`` and message name the parameter as the client sent it."""
        if error.param is not None:
            name = self._sent_name(error.param)
            if error.code == "context_length_exceeded":
                error.message = error.message.replace("your prompt has", f"your {name} resulted in")
                error.message = error.message.replace("length of the prompt", f"length of the {name}")
            elif error.message.startswith(error.param):
                error.message = name + error.message.removeprefix(error.param)
            elif name not in error.message:
                error.message = f"{name} is wrong: {error.message}"
            error.param = name
        return error


class ModelField(RequestModel):
    """The name of the model, which every request has."""

    model: Optional[str] = None
    """Name of the served model; it may be left out."""
