"""The page at /, used in headless Chromium: a completion that streams, the map of the cache, keys, light and dark."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import browser
import pytest
from helpers.engines import Model
from helpers.serving import Running, make_model

from megatron.dmc.inference.text import load_tokenizer
from megatron.dmc.serving.app import PAGE

CHROMIUM = browser.find()
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: none is on PATH, and CHROMIUM is not set")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return make_model(tmp_path_factory.mktemp("page") / "m")


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[browser.Browser]:
    with browser.Browser(CHROMIUM, tmp_path_factory.mktemp("profile")) as made:
        yield made


def fill(page: browser.Browser, **fields: object) -> None:
    for name, value in fields.items():
        what = "checked" if isinstance(value, bool) else "value"
        page.run(f"document.getElementById({json.dumps(name)}).{what} = {json.dumps(value)}")


def test_the_page_needs_nothing_else() -> None:
    """No address of another machine, and nothing that is loaded from a file of its own."""
    text = PAGE.read_text(encoding="utf-8")
    assert set(re.findall(r"https?://[^\"' ]+", text)) == {"http://www.w3.org/2000/svg"}  # the name of SVG, not a place
    assert not re.search(r"<(script|img|iframe)[^>]+src=|@import|url\(", text)


@needs_chromium
def test_an_answer_and_its_cache(model: Model, chromium: browser.Browser) -> None:
    with Running(model.path) as server:
        chromium.open(server.url + "/")
        chromium.wait("document.getElementById('health')?.textContent === 'ready'")
        chromium.wait("document.getElementById('model').textContent === 'm · context length 256 · dmc, window 12'")
        fill(chromium, prompt="one two", max_tokens="40", temperature="0", ignore_eos=True)
        chromium.run("document.getElementById('go').click()")
        chromium.wait("document.getElementById('said').textContent.includes('40 generated tokens')")
        tokenizer = load_tokenizer(model.path)
        ids = tokenizer("one two")["input_ids"]
        wanted = tokenizer.decode(model.answer(tuple(ids), 40), skip_special_tokens=True)
        assert chromium.run("document.getElementById('completion').textContent") == "one two" + wanted
        chromium.wait("document.getElementById('tokens').textContent === '46'")  # the last is not in the cache yet
        body = {
            "prompt": "one two",
            "max_tokens": 40,
            "temperature": 0,
            "ignore_eos": True,
            "stream_options": {"include_cache": True},
        }
        use = [event["dmc"] for event in server.events("/v1/completions", body) if "dmc" in event][-1]
        cells = "Array.from(r.cells, c => c.textContent).slice(1)"
        rows = f"Array.from(document.querySelectorAll('#map tbody tr'), r => {cells})"
        assert chromium.run(rows) == [[str(slots) for slots in layer] for layer in use["slots"]]
        assert chromium.run("document.getElementById('ratio').textContent") == f"{use['compression_ratio']:.2f}×"
        colors = chromium.run("Array.from(document.querySelectorAll('#map td'), c => c.style.background)")
        assert len(set(colors)) > 1, "heads that compress differently have different colours"
        assert chromium.run("document.querySelectorAll('#lines polyline').length") == 2
        merged = use["tokens"] * sum(map(len, use["slots"])) - sum(map(sum, use["slots"]))
        assert f": {merged} merged into" in chromium.run("document.getElementById('fate').textContent")
        most = max(map(max, use["slots"]))
        assert (
            chromium.run("document.getElementById('most').textContent") == f"{most} slots, {use['tokens'] / most:.2f}×"
        )
        light = chromium.run("getComputedStyle(document.body).backgroundColor")
        chromium.scheme("dark")
        assert chromium.run("getComputedStyle(document.body).backgroundColor") != light
        chromium.scheme("light")
        chromium.size(400, 800)
        assert chromium.run("document.documentElement.scrollWidth") <= 400, "nothing is beside the screen of a phone"
        chromium.send("Emulation.clearDeviceMetricsOverride")
        # Stopped in the middle: the pages are back.
        fill(chromium, max_tokens="245")
        server.engine.step = slowly(server.engine.step)  # type: ignore[method-assign]
        chromium.run("document.getElementById('go').click()")
        chromium.wait("Number(document.getElementById('tokens').textContent) > 12 && running !== null")
        assert not chromium.run("document.getElementById('stop').disabled")
        chromium.run("document.getElementById('stop').click()")
        chromium.wait("document.getElementById('said').textContent.includes('stopped')")
        server.settle()
        assert all(url.startswith((server.url, "data:", "about:")) for url in chromium.requests), chromium.requests
        assert not chromium.problems


def slowly(step):
    import time

    return lambda: (time.sleep(0.02), step())[1]


@needs_chromium
def test_keys_chat_and_errors(model: Model, chromium: browser.Browser) -> None:
    with Running(model.path, keys=("sk-page",)) as server:
        chromium.open(server.url + "/")
        chromium.wait("document.getElementById('keybox')?.open")
        fill(chromium, key="sk-page", prompt="hi", chat=True, max_tokens="5")
        chromium.run("document.getElementById('key').dispatchEvent(new Event('change'))")
        chromium.wait("document.getElementById('model').textContent.includes('context length')")
        chromium.run(
            "document.getElementById('prompt').dispatchEvent(new KeyboardEvent('keydown', "
            "{key: 'Enter', ctrlKey: true}))"
        )
        chromium.wait("document.getElementById('said').textContent.includes('generated tokens')")
        fill(chromium, max_tokens="9999")
        chromium.run("document.getElementById('go').click()")
        said = chromium.wait(
            "document.getElementById('said').classList.contains('wrong') && document.getElementById('said').textContent"
        )
        assert "max_model_len" in said
        assert (
            chromium.run("document.cookie + localStorage.length + sessionStorage.length") == "00"
        )  # the key is kept nowhere
        server.settle()
