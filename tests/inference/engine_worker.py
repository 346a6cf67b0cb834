"""One rank of a tensor-parallel engine, for test_inference_api.py: answers prompts and prints what it got.

python tests/inference/engine_worker.py MODEL PROMPTS.json TP SETTINGS.json
"""

from __future__ import annotations

import json
import sys

import torch
import torch.distributed as dist

from megatron.dmc.inference import LLM, SamplingParams, StructuredOutputsParams


def main() -> None:
    model, prompts, size, settings = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3]), json.loads(sys.argv[4])
    torch.set_num_threads(1)
    llm = LLM(model, tensor_parallel_size=size, **settings)
    results = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=24, logprobs=0))
    random = llm.generate(prompts, SamplingParams(max_tokens=8))  # drawn from the engine's generator
    numbers = SamplingParams(max_tokens=24, n=2, structured_outputs=StructuredOutputsParams(regex="[0-9]{3,8}[A-F]"))
    structured = llm.generate([*prompts, prompts[0]], [numbers] * len(prompts) + [SamplingParams(max_tokens=4)])
    longer = [prompt + more for prompt in prompts for more in ([], [7], [7, 8, 9])]
    again = llm.generate(longer, SamplingParams(temperature=0, max_tokens=24, n=2))
    llm.engine.cache.check_integrity()
    stats = llm.engine.stats()
    llm.engine.reset_prefix_cache()
    llm.engine.cache.check_integrity()
    answer = {
        "tokens": [r.outputs[0].token_ids for r in results],
        "random": [r.outputs[0].token_ids for r in random],
        "structured": [[c.text for c in r.outputs] for r in structured[:-1]],
        "logprobs": [[entry.logprob for entry in r.outputs[0].logprobs] for r in results],
        "again": [[c.token_ids for c in r.outputs] for r in again],
        "longer": longer,
        "hits": stats.prefix_cache_hits,
        "cached": [r.num_cached_tokens for r in again],
        "slots": [r.outputs[0].cache.slots for r in results],
        "preemptions": stats.preemptions,
        "free": llm.engine.cache.state.free_count() == llm.engine.cache.num_pages,
    }
    everyone: list = [None] * size
    dist.all_gather_object(everyone, answer)
    if dist.get_rank() == 0:
        print("ANSWERS " + json.dumps(everyone), flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
