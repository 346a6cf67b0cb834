"""OpenAPI schema of the server: FastAPI's, with the ranges that parameters have, and a page that shows it."""

import html
from collections.abc import Iterator
from typing import Any

from fastapi import FastAPI

from megatron.dmc.serving.limits import ELEMENTS, STOP_CHARACTERS

_FREQUENCY = {"minimum": -2, "maximum": 2}
_LENGTH = {"minimum": 0}
RANGES: dict[str, dict[str, float]] = {
    "n": {"minimum": 1, "maximum": 128},
    "temperature": {"minimum": 0},
    "top_p": {"exclusiveMinimum": 0, "maximum": 1},
    "top_k": {"minimum": -1, "maximum": 2**31 - 1},
    "min_p": {"minimum": 0, "maximum": 1},
    "repetition_penalty": {"exclusiveMinimum": 0},
    "presence_penalty": _FREQUENCY,
    "frequency_penalty": _FREQUENCY,
    "max_tokens": _LENGTH,
    "max_completion_tokens": _LENGTH,
    "min_tokens": _LENGTH,
    "top_logprobs": _LENGTH,
    "truncate_prompt_tokens": {"minimum": -1},
}
"""Ranges of numbers. The engine checks them, so that every way into it has the same; a test holds both together."""
LOGPROBS = frozenset({"logprobs", "top_logprobs", "prompt_logprobs"})
"""Parameters with --max-logprobs as their maximum, where it is not -1."""


def correct(app: FastAPI, *, keys: bool, max_logprobs: int) -> None:
    """Let the application's schema say what the server takes: ranges, API keys, and 400 instead of FastAPI's 422."""
    fastapi_schema = app.openapi

    def openapi() -> dict[str, Any]:
        schema = fastapi_schema()
        if keys:
            schema["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
            schema["security"] = [{"key": []}]
        for operations in schema["paths"].values():
            for operation in operations.values():
                operation["responses"].pop("422", None)
        for name, model in schema["components"]["schemas"].items():
            if name.endswith("Request"):
                for parameter, field in model.get("properties", {}).items():
                    _bound(parameter, field, max_logprobs)
        return schema

    app.openapi = openapi  # type: ignore[method-assign]


def _bound(name: str, field: dict[str, Any], max_logprobs: int) -> None:
    """Add the limits of a parameter to its type, or to each of its types."""
    for kind in (field, *field.get("anyOf", ()), *field.get("oneOf", ())):
        if kind.get("type") in ("integer", "number"):
            if name in RANGES:
                kind.pop("exclusiveMinimum", None)
                kind |= RANGES[name]
            if name in LOGPROBS:
                kind |= {"minimum": 0} | ({"maximum": max_logprobs} if max_logprobs >= 0 else {})
        elif kind.get("type") == "array" and name in ELEMENTS:
            if name != "prompt" or kind.get("items", {}).get("type") != "integer":
                kind["maxItems"] = ELEMENTS[name]
            if name == "stop":
                kind["items"] |= {"minLength": 1, "maxLength": STOP_CHARACTERS}
        elif kind.get("type") == "object" and name in ELEMENTS:
            kind["maxProperties"] = ELEMENTS[name]


STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem}
code{background:#8882;padding:0 .2em}table{border-collapse:collapse;width:100%}
td,th{border-top:1px solid #8885;padding:.3em .6em;text-align:left;vertical-align:top}summary{cursor:pointer}
:root{color-scheme:light dark}"""


def page(schema: dict[str, Any]) -> str:
    """HTML page of a schema, which loads nothing: a table of parameters for every endpoint."""
    title = html.escape(f"{schema['info']['title']} {schema['info']['version']}")
    sections = "".join(
        _endpoint(method, path, operation, schema)
        for path, operations in schema["paths"].items()
        for method, operation in operations.items()
    )
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>'
        f"<h1>{title}</h1><p>{html.escape(schema['info'].get('description', ''))} "
        f'The schema for programs is <a href="openapi.json">openapi.json</a>.</p>{sections}</html>'
    )


def _endpoint(method: str, path: str, operation: dict[str, Any], schema: dict[str, Any]) -> str:
    content = operation.get("requestBody", {}).get("content", {}).get("application/json", {})
    tables = "".join(_table(model, schema) for model in _models(content.get("schema", {})))
    answers = "".join(
        f"<tr><td>{status}</td><td>{html.escape(answer.get('description', ''))}</td></tr>"
        for status, answer in operation["responses"].items()
    )
    head = f"<h2><code>{method.upper()} {html.escape(path)}</code></h2>"
    return f"{head}{tables}<details><summary>Responses</summary><table>{answers}</table></details>"


def _models(field: Any) -> Iterator[str]:
    """Names of the models that a type is made of."""
    if isinstance(field, dict):
        if "$ref" in field:
            yield field["$ref"].rsplit("/", 1)[-1]
        for part in field.values():
            yield from _models(part)
    elif isinstance(field, list):
        for part in field:
            yield from _models(part)


def _table(name: str, schema: dict[str, Any]) -> str:
    model = schema["components"]["schemas"][name]
    needed = set(model.get("required", ()))
    rows = "".join(
        f"<tr><td><code>{html.escape(parameter)}</code>{' *' if parameter in needed else ''}</td>"
        f"<td>{html.escape(_type(field))}</td><td>{html.escape(field.get('description', ''))}</td></tr>"
        for parameter, field in model.get("properties", {}).items()
    )
    return f"<h3>{html.escape(name)}</h3><table><tr><th>parameter (* needed)<th>type<th>meaning</tr>{rows}</table>"


def _type(field: dict[str, Any]) -> str:
    kinds = field.get("anyOf") or field.get("oneOf") or [field]
    return " or ".join(_kind(kind) for kind in kinds if kind.get("type") != "null")


def _kind(kind: dict[str, Any]) -> str:
    if "$ref" in kind:
        return kind["$ref"].rsplit("/", 1)[-1]
    if kind.get("type") == "array":
        return f"list of {_type(kind.get('items', {}))}"
    low, high = kind.get("minimum", kind.get("exclusiveMinimum")), kind.get("maximum")
    bounds = "" if low is None else f" from {low:g}" + ("" if high is None else f" to {high:g}")
    return str(kind.get("const", kind.get("type", "any"))) + (bounds if high != 2**63 - 1 else "")
