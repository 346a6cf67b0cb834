#!/usr/bin/env python3
"""Inputs of the cases, made once and given to both sides: text with a tokenizer, small random models, legacy files.

tests/same_results/inputs.py DIRECTORY
"""

from __future__ import annotations

import json
import os
import random
import sys
from pathlib import Path

import torch
from helpers import exported, families
from helpers.serving import add_tokenizer

ROOT = Path(__file__).resolve().parent.parent.parent
for folder in ("examples/dmc", "tests/checkpoint"):
    sys.path.insert(0, str(ROOT / folder))

import build_corpus  # noqa: E402
import legacy_format  # noqa: E402

from megatron.dmc.config import ModelConfig  # noqa: E402

LEGACY = ModelConfig(
    num_layers=4,
    hidden_size=32,
    ffn_hidden_size=48,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=8,
    vocab_size=90,
    make_vocab_size_divisible_by=16,
    max_position_embeddings=64,
)
ENGINE_MODELS = {"half": "llama", "window": "llama", "unbounded": "llama", "qwen 2": "qwen2", "qwen 3": "qwen3"}


def text(directory: Path) -> None:
    """``train.jsonl``, ``valid.jsonl`` and a sentencepiece tokenizer of 512 tokens."""
    texts = [source for _, source in build_corpus.source_files(Path(os.__file__).parent / "json")]
    build_corpus.train_tokenizer(texts, 512, directory / "tokenizer.model")
    for name, part in (("train", texts[:-1]), ("valid", texts[-1:])):
        (directory / f"{name}.jsonl").write_text("".join(json.dumps({"text": source}) + "\n" for source in part))


def engine_models(directory: Path) -> None:
    """DMC models of several families and windows, and plain ones, all with a tokenizer of 61 tokens."""
    for case, family in ENGINE_MODELS.items():
        path = directory / case.replace(" ", "-")
        exported.Exported(path, **exported.CASES[case])
        config = json.loads((path / "config.json").read_text())
        config["dmc"].update(base_model_type=family, measured_cr=4.0)
        (path / "config.json").write_text(json.dumps(config))
        add_tokenizer(path)
    for case in ("llama3", "qwen3"):
        families.make(case, directory / f"plain-{case}", vocab_size=61, max_position_embeddings=256)
        add_tokenizer(directory / f"plain-{case}")


def batch_lines(path: Path) -> None:
    """Requests of both endpoints: greedy and sampled, several completions, and lines that are refused."""
    rng, lines = random.Random(1), []
    for i in range(24):
        prompt = [rng.randrange(58) for _ in range(rng.randrange(3, 70))]
        body = {"max_tokens": rng.randrange(3, 14), "ignore_eos": True, "temperature": 0}
        chat = i % 4 == 2
        body |= (
            {"messages": [{"role": "user", "content": "hello"}], "temperature": 0.7, "logprobs": True}
            if chat
            else {"prompt": ["ab", "cd"], "n": 2, "temperature": 1.0, "top_p": 0.9}
            if i % 4 == 1
            else {"prompt": prompt, "logprobs": 2}
        )
        url = "/v1/chat/completions" if chat else "/v1/completions"
        lines.append({"custom_id": f"line {i}", "method": "POST", "url": url, "body": body})
    lines.append({"custom_id": "refused", "method": "POST", "url": "/v1/completions", "body": {"prompt": "a", "n": 0}})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def main() -> None:
    directory = Path(sys.argv[1])
    directory.mkdir(parents=True)
    torch.set_num_threads(1)
    text(directory)
    engine_models(directory / "engine")
    for case in ("llama2", "llama3.1", "qwen2", "qwen3", "mistral"):
        families.make(case, directory / "hf" / case)
    tensors = legacy_format.full_tensors(LEGACY, 128)
    for name, layout in (("te", dict(tp=2, pp=2)), ("local", dict(spec="local", vpp=2))):
        legacy_format.write(
            directory / "legacy" / name, tensors, LEGACY, **layout, vocab_size=90, **legacy_format.DMC_ARGS
        )
    batch_lines(directory / "batch.jsonl")


if __name__ == "__main__":
    main()
