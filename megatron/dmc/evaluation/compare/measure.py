"""Measure one row of a comparison: a Hugging Face directory under one cache policy, on all tasks.

    python -m megatron.dmc.evaluation.compare.measure SPEC OUTPUT.json

SPEC is JSON, as :mod:`megatron.dmc.evaluation.compare.methods` writes it. Each row has a process of its own, so that
rows are measured side by side.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any, Optional

import torch

from megatron.dmc.evaluation import policies
from megatron.dmc.evaluation.compare import jobs
from megatron.dmc.evaluation.policies import Budget, CachePolicy
from megatron.dmc.evaluation.recall import SUITE, TextMaterial, recall
from megatron.dmc.evaluation.tasks import identifiers, perplexity_by_position, windows
from megatron.dmc.evaluation.teacher_forced import TeacherForced
from megatron.dmc.training.jsonl import read_texts
from megatron.dmc.training.tokenizer import load_tokenizer


def policy_of(name: Optional[str], ratio: float) -> Optional[CachePolicy]:
    """Eviction policy by its name, or None for no name.

    Its budget grows with the text, so that the ratio holds at every position, as a trained model's does.
    """
    return None if name is None else getattr(policies, name)(Budget(ratio, "growing"))


def edges(length: int) -> list[int]:
    """Edges of the ranges of positions whose loss is reported; the last range is the second half."""
    return [1, *(length >> n for n in (3, 2, 1)), length]


def measure(spec: dict[str, Any]) -> dict[str, Any]:
    """Measure a model under a policy; returns figures and compression, ready for JSON.

    Args:
        spec: model, policy, ratio, valid (JSONL), tokenizer, length, seed, tasks (:class:`MeasureConfig`).

    Raises:
        ValueError: text that is too short, or a model that the policy does not fit.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = TeacherForced.load(spec["model"], device=device)
    policy = policy_of(spec["policy"], spec["ratio"])
    tokenizer, tasks = load_tokenizer(spec["tokenizer"]), spec["tasks"]
    documents = [tokenizer.encode(text) for text in read_texts(spec["valid"])]
    tokens = windows(documents, spec["length"], tasks["windows"], spec["valid"])
    material, batch = TextMaterial(tokenizer, documents), tasks["batch"]
    samples = {name: tasks[f"recall_{name}"] for name in ("lengths", "depths", "samples")}
    results = {
        "loss": perplexity_by_position(model, policy, tokens, edges(spec["length"]), batch=batch),
        "identifiers": identifiers(model, policy, tokens, tokenizer, batch=batch),
        **recall(model, policy, material, **samples, seed=spec["seed"], batch=batch),
    }
    figures = [figure for result in results.values() for figure in result.figures]
    if tasks["lm_eval_tasks"]:
        from megatron.dmc.evaluation import harness  # lm-eval is an extra

        lm = harness.PolicyLM(model, policy, tokenizer, batch, tasks.get("lm_eval_add_bos_token"))
        figures += harness.evaluate(lm, tasks["lm_eval_tasks"], tasks.get("lm_eval_include"))
    compression = results["loss"].compression
    return {
        "policy": str(policy or model.own_policy()),
        "figures": [dataclasses.asdict(figure) for figure in figures],
        "compression": {
            **dataclasses.asdict(compression),
            "by_head": compression.by_head.tolist(),
            "by_position": compression.by_position.tolist(),
        },
        "recall_compression": {name: results[name].compression.at_end for name in SUITE},
    }


if __name__ == "__main__":
    jobs.run(lambda spec, output: jobs.write_json(Path(output), measure(json.loads(spec))))
