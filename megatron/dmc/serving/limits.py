"""Number of elements that a request may have, in a body of HTTP and in a line of a batch, checked before its types are:
a wrong element costs pydantic some 4 KB and 0.1 ms for its error, so a body of a megabyte could take seconds and
gigabytes. A list of token ids costs 0.2 us for each.
"""

from typing import Any

from megatron.dmc.serving.errors import invalid

ELEMENTS = {
    "input": 4096,
    "messages": 4096,
    "prompt": 1024,
    "stop": 64,
    "stop_token_ids": 1024,
    "logit_bias": 1024,
    "bad_words": 256,
    "tools": 128,
}
"""Most elements of a parameter. A prompt of token ids is bounded by the context length instead."""
STOP_CHARACTERS = 1024
"""Most characters of a stop string."""
MEMBERS, PARTS = 256, 1024
"""Most members of an object with parameters, and most elements of a list inside a message."""
TOKENS = frozenset({"tokens", "allowed_token_ids"})
"""Lists of token ids, which cost little: the size of the body bounds them."""
CONTEXT = frozenset({"prompt", "tokens"})
"""Lists of token ids that a context must hold."""
FREE = frozenset(
    {
        "chat_template_kwargs",
        "documents",
        "guided_json",
        "metadata",
        "response_format",
        "structured_outputs",
        "text",
        "tools",
    }
)
"""Parameters with JSON of the client's own inside, which is not looked into."""


def check(body: Any, max_model_len: int) -> None:
    """Raise :class:`APIError` (400) for decoded JSON with more elements than a parameter may have, or a prompt of more
    token ids than the context length that is not to be truncated.
    """
    if not isinstance(body, dict):
        return
    _bound(body, MEMBERS, "the body")
    for name, value in body.items():
        if isinstance(value, (list, dict)) and _is_tokens(name, value):
            if len(value) > max_model_len and name in CONTEXT and body.get("truncate_prompt_tokens") is None:
                message = f"This model's maximum context length is {max_model_len} tokens. However, {name} has"
                raise invalid(f"{message} {len(value)} token ids.", name, "context_length_exceeded")
        elif isinstance(value, (list, dict)):
            _bound(value, ELEMENTS.get(name, PARTS if isinstance(value, list) else MEMBERS), name)
            if name not in FREE:
                _check_inside(name, value)


def _is_tokens(name: str, value: Any) -> bool:
    if name == "prompt":
        return isinstance(value, list) and bool(value) and isinstance(value[0], (int, float))
    return name in TOKENS


def _check_inside(name: str, value: Any) -> None:
    """Bound the elements of a parameter's elements: messages with their parts, stop strings."""
    for index, element in enumerate(value if isinstance(value, list) else value.values()):
        if isinstance(element, dict):
            _bound(element, MEMBERS, f"{name}[{index}]")
            for inner, part in element.items():
                if isinstance(part, (list, dict)):
                    _bound(part, PARTS, f"{name}[{index}].{inner[:100]}")
                    for deepest in part if isinstance(part, list) else ():
                        if isinstance(deepest, dict):
                            _bound(deepest, MEMBERS, f"{name}[{index}].{inner[:100]}")
        elif name == "stop" and isinstance(element, str) and len(element) > STOP_CHARACTERS:
            raise invalid(f"stop has a string of {len(element)} characters; {STOP_CHARACTERS} are allowed", "stop")


def _bound(value: Any, most: int, name: str) -> None:
    if len(value) > most:
        name = name[:200]
        message = f"{name} has {len(value)} elements; at most {most} are allowed"
        raise invalid(message, None if name == "the body" else name, "too_many_elements")
