"""``dmc serve`` with quantized weights and a cache of 8 bits, on one rank and on two."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path

import pytest
from helpers.processes import PATIENCE
from helpers.serving import GREEDY, IGNORE, make_model
from test_server import samples
from test_server_end import post, start


def get(url: str, path: str) -> str:
    with urllib.request.urlopen(url + path, timeout=PATIENCE) as answer:
        return answer.read().decode()


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_quantized_weights_and_cache(tmp_path: Path, ranks: int) -> None:
    """The same completion each time, and the server says what it runs on."""
    model = make_model(tmp_path / "m")
    options = ("--quantization", "int8", "--kv-cache-dtype", "int8", "--tensor-parallel-size", str(ranks))
    process, url = start(model, tmp_path / "log", *options)
    try:
        body = {"prompt": "a long prompt, and more of it", "return_token_ids": True} | GREEDY | IGNORE
        answers = [post(url, body) for _ in range(2)]
        choices = [json.loads(text)["choices"][0] for status, text in answers if status == 200]
        assert len(choices) == 2 and len(choices[0]["token_ids"]) == 12
        assert choices[0]["token_ids"] == choices[1]["token_ids"]
        assert json.loads(get(url, "/v1/models"))["data"][0]["quantization"] == "int8"
        metrics = get(url, "/metrics")
        (slot_bytes,) = (value for name, value in samples(metrics).items() if name.startswith("dmc:cache_slot_bytes"))
        assert slot_bytes == 2 * (model.exported.d + 2) and 'cache_dtype="int8"' in metrics
        process.terminate()
        assert process.wait(PATIENCE) == 0
    finally:
        process.kill()
        process.wait()
