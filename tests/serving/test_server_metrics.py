"""Prometheus metrics of the server: names, help and values; the Grafana dashboard."""

from __future__ import annotations

import json
import re
import socket
from concurrent.futures import ThreadPoolExecutor

import pytest
from helpers.engines import Model
from helpers.processes import PATIENCE, ROOT
from helpers.serving import COMPLETIONS, IGNORE, Running, samples, until
from prometheus_client.parser import text_string_to_metric_families

from megatron.dmc.serving.metrics import HELP

# What vLLM's own Grafana dashboards ask for (examples/online_serving of vLLM, late 2025).
DASHBOARD = """
num_requests_running num_requests_waiting num_requests_swapped gpu_cache_usage_perc kv_cache_usage_perc
prompt_tokens_total generation_tokens_total request_success_total num_preemptions_total
e2e_request_latency_seconds_bucket time_per_output_token_seconds_sum inter_token_latency_seconds_bucket
time_to_first_token_seconds_count request_prompt_tokens_bucket request_generation_tokens_bucket
request_queue_time_seconds_sum request_prefill_time_seconds_sum request_decode_time_seconds_sum
request_inference_time_seconds_sum request_max_num_generation_tokens_sum
""".split()


def test_every_metric_has_a_help_sentence(server: Running) -> None:
    """The help text is a sentence of its own that begins with what the number is and names its unit."""
    server.json(COMPLETIONS, {"prompt": "a"})
    families = list(text_string_to_metric_families(server.ask("/metrics")[2]))
    names = {family.name.removeprefix("dmc:") for family in families if not family.name.endswith("_created")}
    names = {name for name in names if not name.startswith("process_")}
    assert names == set(HELP) and len(families) >= len(names)
    for name, text in HELP.items():
        assert re.fullmatch(
            r"(Time from|Time between|Mean time|Number of|Fraction of|Parameter|Compression|State) .+\.", text
        )
        units = {
            "_seconds": "in seconds",
            "_perc": "from 0 to 1",
            "_tokens": "tokens",
            "_pages": "pages",
            "_slots": "slots",
        }
        assert all(unit in text for end, unit in units.items() if name.endswith(end)), (name, text)
        assert not re.search(r"\b(the same|those|answers?|draws?|read|window)\b", text), (name, text)
    assert len(set(HELP.values())) == len(HELP), "no two metrics have the same help"


def test_labels_as_vllms_dashboards_use_them(server: Running) -> None:
    """Every metric of the engine names its model and its engine; those of HTTP and the process have their own names."""
    server.json(COMPLETIONS, {"prompt": "a", "max_tokens": 1})
    server.ask("/v1/models/m")
    server.ask("/nowhere", method="BREW")
    text = server.ask("/metrics")[2]
    found = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    ours = [sample for sample in found if sample.name.startswith("dmc:")]
    assert ours and all((sample.labels["model_name"], sample.labels["engine"]) == ("m", "0") for sample in ours)
    assert {"process_resident_memory_bytes", "process_cpu_seconds_total", "process_open_fds"} <= {s.name for s in found}
    (info,) = (sample for sample in ours if sample.name == "dmc:cache_config_info")
    assert info.value == 1 and info.labels["num_gpu_blocks"] == str(server.engine.cache.num_pages)
    counted = [sample.labels for sample in found if sample.name == "http_requests_total"]
    assert {"handler": "/v1/completions", "method": "POST", "status": "2xx"} in counted
    assert {"handler": "/v1/models/{name:path}", "method": "GET", "status": "2xx"} in counted
    assert {"handler": "none", "method": "other", "status": "4xx"} in counted, "a client may make no label of its own"


def test_the_compression_ratio_while_sequences_run(server: Running) -> None:
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(server.json, COMPLETIONS, {"prompt": "a", "max_tokens": 200, "n": 16} | IGNORE)
        until(lambda: "dmc:compression_ratio{" in server.ask("/metrics")[2] or asked.done())
        assert not asked.done()
        asked.result()


def test_metrics(model: Model) -> None:
    with Running(model.path, metrics_prefix="vllm") as server:
        body = {"prompt": ["one two", "three"], "n": 2, "max_tokens": 5, "seed": 1} | IGNORE
        usage = server.json(COMPLETIONS, body)["usage"]
        server.json(COMPLETIONS, {"prompt": "a", "temperature": "x"}, 400)
        server.json(COMPLETIONS, {"prompt": "abc", "max_tokens": 0})
        found = samples(server.ask("/metrics")[2])
        names = {key.split("[")[0] for key in found}
        assert not [name for name in DASHBOARD if f"vllm:{name}" not in names]

        def value(name: str, **labels: str) -> float:
            return found[f"vllm:{name}{sorted((labels | {'model_name': 'm'}).items())}"]

        assert (
            value("prompt_tokens_total") == 8 + 6 + 4
            and value("generation_tokens_total") == 20 == usage["completion_tokens"]
        )
        assert value("request_success_total", finished_reason="length") == 5 and value("num_requests_running") == 0
        assert value("time_to_first_token_seconds_count") == 4 and value("inter_token_latency_seconds_count") == 16
        assert value("e2e_request_latency_seconds_count") == 5 and value("request_prompt_tokens_sum") == 2 * (8 + 6) + 4
        assert value("request_generation_tokens_sum") == 20 and value("requests_refused_total", status="400") == 1
        layers, heads = server.engine.cache.shape
        states = [value("cache_token_states_total", layer=str(n)) for n in range(layers)]
        slots = [value("cache_slots_total", layer=str(n)) for n in range(layers)]
        assert states == [heads * (2 * (12 + 10) + 4)] * layers and sum(slots) < sum(states)
        assert (
            value("num_pages_free") == value("num_pages") == server.engine.cache.num_pages and value("engine_up") == 1
        )
        assert value("page_waste_perc") == 0 and value("request_num_preemptions_count") == 5
        assert "vllm:compression_ratio" not in names, "an idle server has no compression ratio"
        server.settle()


def test_metrics_of_what_runs(server: Running) -> None:
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE)
    body = json.dumps({"prompt": "a" * 100, "stream": True, "max_tokens": 150, **IGNORE}).encode()
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: x\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    connection.sendall(head.encode() + body)
    connection.recv(300)
    stats = server.call(lambda engine: engine.stats())
    connection.close()
    assert stats.running == 1 and len(stats.layer_compression_ratios) == server.engine.cache.shape[0]
    assert stats.compression_ratio == pytest.approx(
        len(stats.layer_compression_ratios) / sum(1 / r for r in stats.layer_compression_ratios)
    )


def test_the_dashboard_asks_for_metrics_that_exist(server: Running) -> None:
    text = (ROOT / "examples" / "dmc" / "grafana.json").read_text()
    server.json(COMPLETIONS, {"prompt": "a"})
    asked = set(re.findall(r"(?:\$\{prefix\}|dmc):(\w+)", text))
    there = {key.split("[")[0].removeprefix("dmc:") for key in samples(server.ask("/metrics")[2])}
    assert len(asked) > 20 and not asked - there - {"compression_ratio"}  # an idle server has none
    ids = [panel["id"] for panel in json.loads(text)["panels"]]
    assert len(ids) == len(set(ids))
