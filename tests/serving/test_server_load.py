"""Many clients on a pool that is far too small, requests made up from the schema, and lm-eval: nothing is lost, nothing
breaks.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import hypothesis
import pytest
import schemathesis
from helpers import lm_eval_tasks
from helpers.engines import Model
from helpers.processes import ROOT
from helpers.serving import Running, make_model
from schemathesis import GenerationMode, checks
from schemathesis.specs.openapi import checks as openapi_checks

from megatron.dmc.inference.text import load_tokenizer
from megatron.dmc.serving.async_engine import Limits

sys.path.insert(0, str(ROOT / "benchmarks"))

from _http import Outcome, load  # noqa: E402

EXAMPLES = int(os.environ.get("DMC_SCHEMA_EXAMPLES", "25"))
REQUESTS = int(os.environ.get("DMC_LOAD_REQUESTS", "240"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return make_model(tmp_path_factory.mktemp("load") / "m")


@pytest.mark.slow
def test_load(model: Model) -> None:
    """64 clients; streams and not, structured and plain; some leave. Each request is answered as if it were alone, or
    refused, and nothing stays behind.

    Memory: what one round leaves behind, the next one would leave behind too. Full size: DMC_LOAD_REQUESTS=2000.
    """
    prompts = [model.prompt(5 + 7 * n, n) for n in range(8)]
    lone = [model.answer(prompt, 40) for prompt in prompts]
    total, objects = Outcome(), []
    with Running(
        model.path, limits=Limits(48, 2000), num_pages=44, max_num_seqs=16, max_num_batched_tokens=48
    ) as server:
        for n in range(4):
            found = asyncio.run(
                load(server.port, prompts, lone, requests=REQUESTS // 4, seed=n, choices=("abc", "de,f", "g"))
            )
            total.counts.update(found.counts)
            total.wrong += found.wrong
            server.settle()
            gc.collect()
            objects.append(len(gc.get_objects()))
        preemptions = server.engine.stats().preemptions
    assert not total.wrong, total.wrong[:5]
    assert sum(total.counts.values()) == REQUESTS // 4 * 4 and total.counts["answered"] > REQUESTS / 4, total.counts
    assert preemptions > 0 and total.counts["refused"] > 0, (total.counts, preemptions)
    assert min(total.counts["structured"], total.counts["left"]) > REQUESTS / 20, total.counts
    assert objects[3] - objects[1] < 2 * REQUESTS // 4, f"each request leaves objects behind: {objects}"


# ----------------------------------------------------------------------------------------------------------
# schemathesis


@pytest.fixture(scope="module")
def server(model: Model) -> Iterator[Running]:
    with Running(model.path, max_model_len=64) as running:
        yield running
        running.settle()


def _try(strategy: hypothesis.strategies.SearchStrategy, wanted: list) -> set[int]:
    seen: set[int] = set()

    @hypothesis.given(case=strategy)
    @hypothesis.settings(
        max_examples=EXAMPLES,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    def check(case: schemathesis.Case) -> None:
        response = case.call()
        case.validate_response(response, checks=wanted)
        if response.status_code >= 400:
            assert set(response.json()["error"]) == {"message", "type", "param", "code"}
        seen.add(response.status_code)

    check()
    return seen


@pytest.mark.slow
def test_requests_made_up_from_the_schema(server: Running) -> None:
    """Whatever the schema allows, or nearly allows: documented answers of the documented shape, and no 5xx."""
    schema = schemathesis.openapi.from_url(server.url + "/openapi.json")
    wanted = [
        checks.not_a_server_error,
        openapi_checks.status_code_conformance,
        openapi_checks.content_type_conformance,
        openapi_checks.response_schema_conformance,
    ]
    statuses: dict[str, set[int]] = {}
    for operation in (result.ok() for result in schema.get_all_operations()):
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
            # What has no parameters cannot be asked wrongly.
            with suppress(hypothesis.errors.Unsatisfiable):
                statuses.setdefault(operation.label, set()).update(
                    _try(operation.as_strategy(generation_mode=mode), wanted)
                )
    assert {200, 400} <= statuses["POST /v1/completions"], statuses
    assert not [found for found in statuses.values() for status in found if status >= 500], statuses


# ----------------------------------------------------------------------------------------------------------------
# lm-eval


@pytest.mark.slow
def test_lm_eval(server: Running, model: Model, tmp_path: Path) -> None:
    """``local-completions`` on tasks of local data, unchanged: its log-likelihoods are those of the model."""
    pytest.importorskip("lm_eval", reason="needs lm-eval (the extra dev)")
    rows = [
        {"question": f"{a} and {b} ", "choices": ["yes", "no no"], "answer": n % 2}
        for n, (a, b) in enumerate(zip("abcdef", "ghijkl"))
    ]
    (tmp_path / "data.json").write_text("\n".join(map(json.dumps, rows)))
    for name, text in (("choice", lm_eval_tasks.CHOICE), ("text", lm_eval_tasks.TEXT)):
        (tmp_path / f"{name}.yaml").write_text(text.format(data=tmp_path / "data.json"))
    code = "import sys; from lm_eval.__main__ import cli_evaluate; cli_evaluate()"
    arguments = f"model=m,base_url={server.url}/v1/completions,tokenizer={model.path},num_concurrent=2,max_length=60"
    command = [sys.executable, "-c", code, "--model", "local-completions", "--model_args", arguments, "--log_samples"]
    command += [
        "--tasks",
        "local_choice,local_text",
        "--include_path",
        str(tmp_path),
        "--output_path",
        str(tmp_path / "out"),
    ]
    env = {
        **os.environ,
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    ran = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr[-3000:]
    tokenizer = load_tokenizer(model.path)

    def likelihood(context: list[int], text: str) -> float:
        """Of what of ``text`` is behind the context."""
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        whole = tuple(ids if ids[: len(context)] == context else [*context, *ids])
        return sum(
            float(model.logprobs(whole)[at, token]) for at, token in enumerate(whole[1:]) if at + 1 >= len(context)
        )

    def samples(task: str) -> list[dict]:
        return [
            json.loads(line) for path in (tmp_path / "out").rglob(f"samples_{task}_*.jsonl") for line in path.open()
        ]

    choices, texts = samples("local_choice"), samples("local_text")
    assert len(choices) == len(texts) == len(rows)
    for sample in choices:
        question = sample["doc"]["question"]
        context = tokenizer(question.rstrip(), add_special_tokens=False)["input_ids"]
        wanted = [likelihood(context, question + choice) for choice in sample["doc"]["choices"]]
        assert [float(value) for value, _ in sample["filtered_resps"]] == pytest.approx(wanted, abs=1e-3)
    for sample in texts:
        found = sample["filtered_resps"][0]
        assert float(found[0] if isinstance(found, list) else found) == pytest.approx(
            likelihood([59], sample["doc"]["question"]), abs=1e-3
        )
