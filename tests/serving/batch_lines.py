"""Input lines, output lines and runs for the tests of ``dmc batch``."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

from helpers.engines import Model

from megatron.dmc.inference import Engine
from megatron.dmc.serving.batch import RUN, BatchRunner, Options, Summary
from megatron.dmc.serving.batch_files import Input, Output
from megatron.dmc.serving.prompts import Prompts

GREEDY = {"temperature": 0, "max_tokens": 6, "ignore_eos": True}


def completion(custom_id: str | None, **body: object) -> dict:
    line = {"method": "POST", "url": "/v1/completions", "body": {"prompt": "abc", **GREEDY, **body}}
    return line if custom_id is None else {"custom_id": custom_id, **line}


def write(path: Path, lines: list) -> Path:
    """``lines``: objects, or bytes as they are."""
    path.write_bytes(b"".join(x + b"\n" if isinstance(x, bytes) else json.dumps(x).encode() + b"\n" for x in lines))
    return path


def mixed(count: int) -> list[dict]:
    """Greedy and drawn, both endpoints, several answers, plain lines."""
    draw = random.Random(1)
    lines: list[dict] = []
    for i in range(count):
        prompt = [draw.randrange(58) for _ in range(draw.randrange(3, 40))]
        more = {"max_tokens": draw.randrange(3, 14), "ignore_eos": True}
        kind = i % 4
        if kind == 0:
            lines.append(completion(f"c{i}", prompt=prompt, **more))
        elif kind == 1:
            lines.append(completion(f"s{i}", **{**GREEDY, "prompt": ["ab", "cd"], "n": 2, "temperature": 1.0, **more}))
        elif kind == 2:
            body = {"messages": [{"role": "user", "content": "hello"}], "temperature": 0.7, **more}
            lines.append({"custom_id": f"m{i}", "method": "POST", "url": "/v1/chat/completions", "body": body})
        else:
            lines.append({"prompt": prompt, "temperature": 1.0, **more})
    return lines


def read(path: Path) -> dict[str, dict]:
    """Output lines by custom_id, each there once, less what depends on when it was made."""
    found: dict[str, dict] = {}
    for line in path.read_text().splitlines():
        entry = json.loads(line)
        assert entry.keys() == {"id", "custom_id", "response", "error"} and entry["custom_id"] not in found
        found[entry["custom_id"]] = timeless(entry)
    return found


def timeless(entry: dict) -> dict:
    """Without the time, and what the prefix cache had of earlier lines."""
    body = entry["response"]["body"]
    body.pop("created", None)
    body.get("usage", {}).pop("prompt_tokens_details", None)
    return entry


def command(model: Model, source: Path, out: Path, *more: str) -> list[str]:
    return ["batch", "-i", str(source), "-o", str(out), "--model", model.path, "--disable-tqdm", *more]


def run(engine: Engine, source: Path, out: Path, phase: Callable[[], int] = lambda: RUN, **options: object) -> Summary:
    prompts = Prompts(engine.input_processor)
    output, lines = Output(out), Input(source)
    try:
        return BatchRunner(engine, prompts, output, Options("m", frozenset({"m"}), **options), phase).run(lines)
    finally:
        output.close()
        lines.close()


def strip(line: bytes) -> dict:
    return timeless(json.loads(line))
