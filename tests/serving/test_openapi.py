"""The schema says what the server takes: ranges, numbers of elements; and /docs shows it without other hosts."""

from __future__ import annotations

import re

import pytest
from helpers.serving import CHAT, COMPLETIONS, Running

from megatron.dmc.serving.limits import ELEMENTS

INTEGERS = {"n", "top_k", "min_tokens", "max_tokens", "max_completion_tokens", "logprobs", "top_logprobs"}


def bounds(server: Running, model: str) -> dict[str, dict]:
    """Numbers among the parameters of a request, by name."""
    fields = server.json("/openapi.json")["components"]["schemas"][model]["properties"]
    kinds = {name: [field, *field.get("anyOf", ())] for name, field in fields.items()}
    return {name: kind for name, found in kinds.items() for kind in found if kind.get("type") in ("integer", "number")}


@pytest.mark.parametrize(
    ("path", "request_model", "body"),
    [
        (COMPLETIONS, "CompletionRequest", {"prompt": [1, 2]}),
        (CHAT, "ChatCompletionRequest", {"messages": [{"role": "user", "content": "a"}], "logprobs": True}),
    ],
)
def test_ranges(server: Running, path: str, request_model: str, body: dict) -> None:
    """The ends of every range are taken, and what lies behind them is refused by name."""
    found = bounds(server, request_model)
    assert {"n", "temperature", "top_p", "presence_penalty", "min_p", "top_k"} <= found.keys()
    for name, kind in found.items():
        step = 1 if kind["type"] == "integer" else 1e-6
        low, high = kind.get("minimum"), kind.get("maximum")
        refused = [kind[end] for end in ("exclusiveMinimum",) if end in kind]
        refused += [] if low is None or low == -(2**63) else [low - step]
        refused += [] if high is None or high >= 2**31 - 1 else [high + step]
        for value in refused:
            error = server.json(path, {"max_tokens": 1} | body | {name: value}, 400)["error"]
            assert error["param"] == name, (name, value, error)
        taken = [end for end in (low, high) if end is not None and abs(end) < 2**31]
        for value in taken if name not in ("n", "seed") else [low]:
            server.json(path, {"max_tokens": 1} | body | {name: value})


def test_numbers_of_elements(server: Running) -> None:
    fields = server.json("/openapi.json")["components"]["schemas"]["CompletionRequest"]["properties"]
    assert any(kind.get("maxItems") == ELEMENTS["stop"] for kind in fields["stop"]["anyOf"])
    assert any(kind.get("maxProperties") == ELEMENTS["logit_bias"] for kind in fields["logit_bias"]["anyOf"])


def test_the_page_loads_nothing(server: Running) -> None:
    status, headers, text = server.ask("/docs")
    assert status == 200 and headers["content-type"].startswith("text/html")
    assert not re.search(r"<script|<link|src=|https?://(?!localhost)", text)
    assert {"/v1/chat/completions", "temperature", "number from 0", "stop_token_ids"} <= {
        word for word in ("/v1/chat/completions", "temperature", "number from 0", "stop_token_ids") if word in text
    }
