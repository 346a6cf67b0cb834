"""What clients of OpenAI's and vLLM's servers rely on, one test for each of their habits."""

from __future__ import annotations

import pytest
from helpers.serving import CHAT, COMPLETIONS, GREEDY, IGNORE, Running

MESSAGES = {"messages": [{"role": "user", "content": "tell me"}]}


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_usage_in_every_chunk(server: Running, path: str) -> None:
    """guidellm and aiperf always ask for it."""
    body = (MESSAGES if path == CHAT else {"prompt": "tell me"}) | GREEDY | IGNORE
    options = {"include_usage": True, "continuous_usage_stats": True, "include_obfuscation": False}
    events = server.events(path, body | {"stream_options": options})
    counts = [event["usage"]["completion_tokens"] for event in events]
    assert counts == sorted(counts) and counts[0] == (path == COMPLETIONS) and counts[-2] == counts[-1] == 12
    wanted = server.json(path, body)["usage"]
    assert events[-1]["choices"] == [] and events[-1]["usage"]["total_tokens"] == wanted["total_tokens"]
    assert all(event["usage"]["prompt_tokens"] == wanted["prompt_tokens"] for event in events)
