#!/usr/bin/env python3
"""What a case computes through the Python interface instead of a command; the result is written as JSON.

    tests/same_results/jobs.py engine CASE INPUTS OUTPUT.json
    tests/same_results/jobs.py transformers OUTPUT.json DIRECTORY ...

Only the public interface is used, by names that both sides have. Floats are written in hexadecimal: all their bits.
"""

from __future__ import annotations

import hashlib
import json
import random
import sys
from pathlib import Path
from typing import Any

import torch


def bits(tensor: torch.Tensor) -> str:
    """A digest of shape, dtype and bytes."""
    tensor = tensor.detach().contiguous().cpu()
    head = f"{tuple(tensor.shape)} {tensor.dtype} "
    return head + hashlib.sha256(tensor.flatten().view(torch.uint8).numpy().tobytes()).hexdigest()[:32]


def position(entry: Any) -> list:
    """The log-probabilities of one position."""
    return [entry.token, entry.logprob.hex(), entry.rank, [[token, value.hex()] for token, value in entry.top]]


def record(results: list) -> list:
    """Everything in the outputs of ``LLM.generate`` but ids, times and the words of errors."""
    return [
        {
            "error": result.error is not None,
            "prompt": list(result.prompt_token_ids),
            "prompt_logprobs": [position(entry) for entry in result.prompt_logprobs or ()],
            "cached": result.num_cached_tokens,
            "outputs": [
                {
                    "tokens": list(output.token_ids),
                    "text": output.text,
                    "finish": [output.finish_reason, output.stop_reason],
                    "logprobs": [position(entry) for entry in output.logprobs or ()],
                    "slots": None if output.cache is None else [list(layer) for layer in output.cache.slots],
                    "cr": None if output.cache is None else output.cache.compression_ratio.hex(),
                }
                for output in result.outputs
            ],
        }
        for result in results
    ]


def prompts(lengths: tuple[int, ...], seed: int = 1) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(1, 58) for _ in range(length)] for length in lengths]


LENGTHS = (1, 5, 31, 32, 64, 150)
EVERY_PARAMETER: list[dict[str, Any]] = [
    dict(),
    dict(temperature=0.7, top_p=0.8),
    dict(top_k=5),
    dict(min_p=0.1),
    dict(top_p=0.9, top_k=20, min_p=0.01, seed=5),
    dict(repetition_penalty=1.3),
    dict(presence_penalty=0.7),
    dict(frequency_penalty=0.4),
    dict(logit_bias={3: 4.0, 7: -100.0}),
    dict(min_tokens=10, stop_token_ids=[4, 5, 6, 7, 8, 9]),
    dict(stop=["a", "b", "?"]),
    dict(stop=["e"], include_stop_str_in_output=True),
    dict(n=3, seed=11),
    dict(n=2, temperature=0.5),
    dict(max_tokens=0, prompt_logprobs=3),
    dict(skip_special_tokens=False),
    dict(temperature=0.0, repetition_penalty=1.2, logprobs=20),
]


def engine(case: str, inputs: Path) -> Any:
    from megatron.dmc.inference import LLM, SamplingParams

    def model(name: str, **settings: Any) -> LLM:
        return LLM(inputs / "engine" / name, **settings)

    def greedy(**more: Any) -> SamplingParams:
        return SamplingParams(**{"temperature": 0, "max_tokens": 24, "ignore_eos": True, "logprobs": 4, **more})

    if case == "greedy":
        wanted = greedy(prompt_logprobs=2)
        names = sorted(path.name for path in (inputs / "engine").iterdir())
        return {name: record(model(name).generate(prompts(LENGTHS), wanted)) for name in names}
    if case == "sampling":
        params = [SamplingParams(**{"max_tokens": 16, "logprobs": 1, **values}) for values in EVERY_PARAMETER]
        texts = ["hello there", *prompts((9, 40, 3) * 5 + (70,), seed=2)]
        return {name: record(model(name, seed=3).generate(texts, params)) for name in ("half", "plain-llama3")}
    if case == "prefix":
        results = {}
        for name in ("half", "unbounded", "plain-qwen3"):
            llm, (stem,) = model(name), prompts((100,), seed=3)
            first = llm.generate([stem, stem[:64]], greedy())
            turns = [stem + first[0].outputs[0].token_ids + [1, 2, 3], stem[:80] + [5], stem, stem[:64] + [9] * 40]
            later = llm.generate(turns, greedy(n=2))
            assert any(result.num_cached_tokens for result in later), "the prefix cache found nothing"
            results[name] = record(first) + record(later)
        return results
    if case == "preemption":
        results = {}
        for name in ("half", "plain-llama3"):
            llm = model(name, num_pages=60, max_num_seqs=8, enable_prefix_caching=False)
            found = llm.generate(prompts((40, 70, 33, 90, 20, 55), seed=4), greedy(max_tokens=60, n=2))
            preemptions = llm.engine.stats().preemptions
            assert preemptions, "no sequence was preempted"
            results[name] = [preemptions, record(found)]
        return results
    if case == "bf16":
        llm = model("window", dtype="bfloat16")
        return record(llm.generate(prompts(LENGTHS), greedy(prompt_logprobs=0)))
    assert case == "chunks", case
    llm = model("window", max_num_batched_tokens=24, max_num_seqs=5, block_size=32)
    return record(llm.generate(prompts((150, 3, 70, 31, 90, 12, 47), seed=6), greedy()))


def in_transformers(directory: Path) -> dict[str, Any]:
    """Logits and a greedy continuation of an exported model with the modelling file that it came with."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True, dtype=torch.float32).eval()
    tokens = torch.tensor(prompts((48, 48), seed=7))
    with torch.no_grad():
        logits = model(tokens).logits
        continued = model.generate(tokens, max_new_tokens=16, do_sample=False, pad_token_id=0)
    return {"logits": bits(logits), "tokens": continued.tolist()}


def main() -> None:
    job, *args = sys.argv[1:]
    if job == "engine":
        case, inputs, output = args
        result = engine(case, Path(inputs))
    else:
        assert job == "transformers", job
        output, *directories = args
        result = {name: in_transformers(Path(name)) for name in directories}
    Path(output).write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
