"""Cases of run.py that go through ``vllm serve`` and the openai client, in an environment with vLLM. They are listed by
run.py; check.py runs them.
"""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "enum": ["Paris", "Rome", "Oslo"]},
        "capital": {"type": "boolean"},
        "rivers": {"type": "array", "items": {"type": "string", "enum": ["Seine", "Tiber"]}, "maxItems": 2},
    },
    "required": ["city", "capital", "rivers"],
    "additionalProperties": False,
}
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city",
        "strict": True,  # else vLLM lets the arguments be anything
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "enum": ["Paris", "Rome", "Oslo"]},
                "unit": {"type": "string", "enum": ["C", "F"]},
            },
            "required": ["city", "unit"],
            "additionalProperties": False,
        },
    },
}
METRICS = ("vllm:dmc_compression_ratio", "vllm:dmc_kv_slots", "vllm:kv_cache_usage_perc", "vllm:num_requests_running")


def flags(engine: dict) -> list[str]:
    """Command line of ``vllm serve`` for settings as ``vllm.LLM`` takes them."""
    found = []
    for key, value in engine.items():
        name = "--" + key.replace("_", "-")
        found += [name] if value is True else [name, value if isinstance(value, str) else json.dumps(value)]
    return found


@contextmanager
def server(case: dict) -> Iterator[str]:
    """Address of a ``vllm serve`` that runs. Raises ``RuntimeError``, with its errors, when it does not start."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(Path(sys.executable).with_name("vllm")), "serve", case["model"], "--host", "127.0.0.1"]
    command += ["--port", str(port), "--served-model-name", "model", "--enforce-eager", "--dtype", "float32"]
    environment = {name: value for name, value in os.environ.items() if name != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    with open(f"{case['name']}.log", "w+") as log:
        process = subprocess.Popen(
            [*command, *flags(case["engine"])], stdout=log, stderr=subprocess.STDOUT, env=environment
        )
        url = f"http://127.0.0.1:{port}"
        try:
            while True:
                if process.poll() is not None:
                    log.seek(0)
                    raise RuntimeError("\n".join(line for line in log.read().splitlines() if "Error" in line))
                try:
                    urllib.request.urlopen(f"{url}/health", timeout=10)
                    break
                except (urllib.error.URLError, OSError):
                    time.sleep(1)
            yield url
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()


def metrics(url: str) -> dict[str, float]:
    """Values of METRICS."""
    text = urllib.request.urlopen(f"{url}/metrics", timeout=60).read().decode()
    found = (re.search(rf"^{name}\{{.*\}} (\S+)$", text, re.MULTILINE) for name in METRICS)
    return {name: float(match[1]) for name, match in zip(METRICS, found, strict=True) if match}


def complete(client, request: dict) -> str | None:
    """What is wrong with the answer to a request of token ids; None when nothing is."""
    asked = dict(model="model", prompt=request["prompt"], max_tokens=request["max_tokens"], temperature=0)
    extra = {"ignore_eos": True, "return_token_ids": True}
    if request["abort"]:
        with client.completions.create(**asked, stream=True, extra_body=extra) as stream:
            next(iter(stream))
        return None
    got = client.completions.create(**asked, extra_body=extra).choices[0].token_ids
    return None if got == request["expected"] else f"{len(request['prompt'])} + {request['max_tokens']}: {got}"


def ask_tokens(url: str, client, case: dict) -> dict:
    """All requests of token ids, --at-once at a time. The metrics must move, and end at nothing."""
    seen = []
    with ThreadPoolExecutor(case["at_once"]) as pool:
        answers = [pool.submit(complete, client, request) for request in case["requests"]]
        while not all(answer.done() for answer in answers):
            seen.append(metrics(url))
            time.sleep(0.1)
    wrong = [text for answer in answers if (text := answer.result())]
    last, end = metrics(url), time.monotonic() + 60
    while (last["vllm:num_requests_running"] or last["vllm:kv_cache_usage_perc"]) and time.monotonic() < end:
        time.sleep(0.5)  # metrics are of the last step, and a request that went away ends with the next
        last = metrics(url)
    lost = [last] if last["vllm:num_requests_running"] or last["vllm:kv_cache_usage_perc"] else []
    most = {name: max((values.get(name, 0) for values in seen), default=0) for name in METRICS}
    return {"wrong": wrong, "lost": lost, "most": most}


def ask_chats(client, case: dict) -> dict:
    """Chats, a structured answer and tool calls, whole and streamed."""
    wrong = []
    for chat in case["chats"]:
        asked = dict(model="model", messages=chat["messages"], temperature=0, max_tokens=chat["max_tokens"])
        answer = client.chat.completions.create(**asked).choices[0].message.content
        if chat["expected"] is not None and answer != chat["expected"]:
            wrong.append({"chat": answer, "expected": chat["expected"]})
    messages = case["chats"][0]["messages"]
    asked = dict(model="model", messages=messages, temperature=0, max_tokens=120)
    form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA, "strict": True}}
    answer = client.chat.completions.create(**asked, response_format=form).choices[0]
    structured = {"structured": answer.message.content}
    found = json.loads(answer.message.content) if answer.finish_reason == "stop" else {}
    if set(found) != set(SCHEMA["required"]) or not isinstance(found["capital"], bool):
        wrong.append({"finish_reason": answer.finish_reason, **structured})
    calls = {}
    for choice in ("required", {"type": "function", "function": {"name": "get_weather"}}):
        answer = client.chat.completions.create(**asked, tools=[TOOL], tool_choice=choice).choices[0]
        called = [(call.function.name, call.function.arguments) for call in answer.message.tool_calls or ()]
        kind = choice if isinstance(choice, str) else "by name"
        calls[kind] = called
        good = called and all(name == "get_weather" and set(json.loads(a)) == {"city", "unit"} for name, a in called)
        if not good:
            wrong.append({"tool_choice": kind, "finish_reason": answer.finish_reason, "message": str(answer.message)})
        deltas = [
            delta
            for chunk in client.chat.completions.create(**asked, tools=[TOOL], tool_choice=choice, stream=True)
            for delta in chunk.choices[0].delta.tool_calls or ()
        ]
        streamed = "".join(delta.function.arguments or "" for delta in deltas if delta.index == 0)
        if good and json.loads(streamed) != json.loads(called[0][1]):
            wrong.append({"tool_choice": kind, "streamed": streamed, "whole": called[0][1]})
    return {"wrong": wrong, "lost": [], **structured, "calls": calls}


def check(case: dict) -> dict:
    """Outcome of a case, with the fields of check.py's."""
    from openai import OpenAI

    began = time.time()
    with server(case) as url:
        started = time.time()
        client = OpenAI(base_url=f"{url}/v1", api_key="none", timeout=600, max_retries=0)
        outcome = ask_chats(client, case) if "chats" in case else ask_tokens(url, client, case)
    outcome |= {"requests": len(case["requests"]), "start": round(started - began)}
    return outcome | {"seconds": round(time.time() - began)}
