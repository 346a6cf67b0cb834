#!/usr/bin/env python3
"""Chat with a model for three turns, to about a thousand tokens, and show what the KV cache holds after each.

    python examples/dmc/smollm2/chat.py SmolLM2-135M-Instruct --adapter adapter-4x-short

Greedy decoding with a repetition penalty of 1.1: without one a model of 135M parameters repeats itself, compressed or
not. The engine finds the turns before in its prefix cache; a server does the same for its clients.
"""

from __future__ import annotations

import argparse
import sys
import textwrap

from megatron.dmc.inference import LLM, RequestOutput, SamplingParams
from megatron.dmc.inference.text import load_tokenizer

QUESTIONS = (
    "I would like to learn to cook at home. How should I begin?",
    "Which tools do I need in my kitchen?",
    "Suggest a simple dinner and tell me how to cook it.",
)


def wrapped(name: str, text: str) -> str:
    """Text with the name of who says it, in lines of up to 100 characters."""
    lines = [part for line in text.strip().splitlines() for part in textwrap.wrap(line, 90) or [""]]
    return "\n".join(f"{name if n == 0 else '':10s}{line}" for n, line in enumerate(lines))


def cache_line(result: RequestOutput) -> str:
    """Line on the KV cache at the end of a turn: slots held, and prompt tokens that were found in it."""
    use, timing = result.outputs[0].cache, result.outputs[0].timing
    assert use is not None and timing is not None and timing.first_token is not None
    n = len(result.outputs[0].token_ids)
    rate = (n - 1) / max(timing.total - timing.first_token, 1e-9)
    return (
        f"{'':10s}[cache: {use.tokens} tokens in {use.total_slots / use.heads:.0f} slots per head, CR "
        f"{use.compression_ratio:.2f}; {result.num_cached_tokens} of {len(result.prompt_token_ids)} prompt tokens "
        f"found in it; {n} new tokens, {rate:.0f}/s]"
    )


def chat(model: str, adapter: str | None, max_tokens: int) -> None:
    """Hold the conversation. Raises ``ValueError`` for a wrong directory."""
    tokenizer = load_tokenizer(model)
    llm = LLM(model, tokenizer=tokenizer, adapter=adapter, dtype="float32", max_num_seqs=1, max_model_len=4096)
    sampling_params = SamplingParams(temperature=0, repetition_penalty=1.1, max_tokens=max_tokens)
    messages: list[dict] = []
    for question in QUESTIONS:
        print("\n" + wrapped("user", question))
        messages.append({"role": "user", "content": question})
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        result = llm.generate([prompt], sampling_params)[0]
        if result.error:
            raise ValueError(result.error)
        messages.append({"role": "assistant", "content": result.outputs[0].text})
        print(wrapped("assistant", result.outputs[0].text) + "\n" + cache_line(result), flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL", help="Hugging Face directory of a chat model")
    parser.add_argument("--adapter", metavar="DIR", help="DMS adapters to put on it")
    parser.add_argument("--max-tokens", type=int, default=400, metavar="N", help="most tokens of an answer")
    args = parser.parse_args()
    try:
        chat(args.model, args.adapter, args.max_tokens)
    except (ValueError, OSError) as error:
        print(f"chat.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
