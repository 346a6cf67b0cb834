"""Structured outputs: what a completion must match, by vLLM's names, and the checks that need no grammar library."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, Optional

from megatron.dmc.inference.errors import InvalidRequest

MAX_SOURCE_CHARACTERS = 512 * 1024
"""Longest JSON schema, and longest list of choices."""
MAX_GRAMMAR_CHARACTERS = 64 * 1024
"""Longest regular expression, and longest grammar in Lark's syntax."""
MAX_GBNF_CHARACTERS = 8 * 1024
"""Longest grammar in GBNF, which is translated to Lark's syntax in time that grows with its square."""
MAX_SCHEMA_DEPTH = 64
"""Most levels of a JSON schema that lie within each other."""
_DATA_KEYWORDS = frozenset({"enum", "const", "default", "examples"})
"""Keywords of JSON Schema whose values are no schemas."""

Kind = Literal["json", "regex", "choice", "grammar"]


def refuse(message: str, field: str = "") -> InvalidRequest:
    """Error about a constraint, or about one ``field`` of it, which the message goes on from."""
    name = f"structured_outputs.{field}" if field else "structured_outputs"
    return InvalidRequest(f"{name} {message}", name)


@dataclass(frozen=True)
class StructuredOutputsParams:
    """What a completion must match: exactly one of the first five fields. Names and meanings are vLLM's.

    Raises :class:`InvalidRequest`. Whether a schema, an expression or a grammar can be compiled is found out by
    :class:`~megatron.dmc.inference.grammar.GrammarCompiler`.
    """

    json: str | Mapping[str, Any] | None = None
    """JSON schema, as a mapping or as text."""
    regex: Optional[str] = None
    """Regular expression that the whole completion matches, in the syntax of Rust's regex crate: no look-around and no
    back-references."""
    choice: Optional[Sequence[str]] = None
    """Texts of which the completion is one."""
    grammar: Optional[str] = None
    """Context-free grammar, in GBNF with the rule ``root`` or in Lark's syntax with the rule ``start``."""
    json_object: Optional[bool] = None
    """Any JSON object."""
    disable_any_whitespace: bool = False
    """Whether JSON is written without whitespace between its tokens. By default there may be up to 40 characters of
    it at a place."""
    whitespace_pattern: Optional[str] = None
    """Regular expression of the whitespace between JSON's tokens."""

    def __post_init__(self) -> None:
        given = [name for name in ("json", "regex", "choice", "grammar") if getattr(self, name) is not None]
        given += ["json_object"] * bool(self.json_object)
        if len(given) != 1:
            found = " and ".join(given) or "none of them"
            raise refuse(f"has {found}; give one of json, regex, choice, grammar, json_object")
        for name in ("regex", "grammar", "whitespace_pattern"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                raise refuse(f"is {type(value).__name__}; it must be a string", name)
        if self.choice is not None:
            object.__setattr__(self, "choice", _checked_choice(self.choice))

    @property
    def kind(self) -> Kind:
        """Which of the constraints was given; ``json_object`` is a schema."""
        if self.regex is not None:
            return "regex"
        if self.choice is not None:
            return "choice"
        return "grammar" if self.grammar is not None else "json"

    @cached_property
    def source(self) -> str:
        """The constraint as text: JSON of a schema or of the choices, an expression, a grammar.

        Raises:
            InvalidRequest: a text that is too long or no Unicode, a schema that is no JSON, nested too deeply, or that
                cannot be guaranteed.
        """
        text = self._source()
        longest = MAX_SOURCE_CHARACTERS if self.kind in ("json", "choice") else MAX_GRAMMAR_CHARACTERS
        if self.kind == "grammar" and "::=" in text:
            longest = MAX_GBNF_CHARACTERS
        if len(text) > longest:
            raise refuse(f"has {len(text)} characters; it may have {longest}", self.kind)
        for part in (text, self.whitespace_pattern or ""):
            try:
                part.encode()
            except UnicodeEncodeError:
                raise refuse("holds half of a surrogate pair", self.kind) from None
        return text

    def _source(self) -> str:
        if self.regex is not None or self.grammar is not None:
            return self.regex if self.regex is not None else self.grammar  # type: ignore[return-value]
        if self.choice is not None:
            return json.dumps(self.choice, ensure_ascii=False)
        return _schema_text({"type": "object"} if self.json_object else self.json)


def _checked_choice(choice: Any) -> tuple[str, ...]:
    if not isinstance(choice, Sequence) or isinstance(choice, str) or not choice:
        raise refuse("must be a list of strings, at least one", "choice")
    if not all(isinstance(text, str) for text in choice):
        raise refuse("must hold strings only", "choice")
    return tuple(choice)


def _schema_text(schema: Any) -> str:
    """JSON of a schema, checked for what compilation does not see."""
    try:
        if isinstance(schema, str):
            if len(schema) > MAX_SOURCE_CHARACTERS:
                raise refuse(f"has {len(schema)} characters; it may have {MAX_SOURCE_CHARACTERS}", "json")
            schema = json.loads(schema)
        if schema is True:
            schema = {}  # the schema of everything
        if not isinstance(schema, Mapping):
            raise refuse("must be a JSON schema, an object", "json")
        for node in _schemas(schema):
            _check_guaranteed(node)
        return json.dumps(schema, allow_nan=False, ensure_ascii=False)
    except InvalidRequest:
        raise
    except RecursionError:
        raise _too_deep() from None
    except (TypeError, ValueError) as error:
        raise refuse(f"is no JSON: {' '.join(str(error).split())[:200]}", "json") from None


def _too_deep() -> InvalidRequest:
    return refuse(f"is nested too deeply; it may have {MAX_SCHEMA_DEPTH} levels", "json")


def _schemas(schema: Any) -> Iterator[Mapping[str, Any]]:
    """All objects of a schema that may be schemas. Raises :class:`InvalidRequest` when they lie too deeply."""
    stack = [(schema, 1)]
    while stack:
        node, depth = stack.pop()
        if not isinstance(node, (Mapping, list, tuple)):
            continue
        if depth > MAX_SCHEMA_DEPTH:
            raise _too_deep()
        if isinstance(node, Mapping):
            yield node
            node = [value for key, value in node.items() if key not in _DATA_KEYWORDS]
        stack += [(value, depth + 1) for value in node]


def _check_guaranteed(schema: Mapping[str, Any]) -> None:
    """Refuse what a grammar takes for enforced and is not: a name that comes twice counts as two properties.

    llguidance 1.9 says so in its notes on JSON Schema: names of properties that the schema does not list may repeat.
    """
    fewest, required = schema.get("minProperties"), schema.get("required")
    named = len(required) if isinstance(required, (list, tuple)) else 0
    if isinstance(fewest, (int, float)) and not isinstance(fewest, bool) and fewest > max(1, named):
        raise refuse(
            f"has minProperties {fewest} and requires {named} properties by name; more than one that has no name "
            "cannot be guaranteed",
            "json",
        )
