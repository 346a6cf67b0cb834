#!/usr/bin/env python3
"""Let a chat model hold conversations with itself, for the distillation of its compressed form.

    python examples/dmc/smollm2/make_chats.py SmolLM2-135M-Instruct --conversations 400 --output chats.jsonl

Every conversation takes a topic, asks several questions about it, one after the other, and samples the model's answers
with the engine. Each line of the file is one conversation as the model's chat template writes it:
``{"text": ..., "source": model, "kind": "chat"}``. The answers are what the model itself says, so that a teacher of the
same weights finds them likely; nothing else is claimed of them.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path

TOPICS = """
how a refrigerator works; baking bread at home; the water cycle; learning to play the guitar; the causes of inflation;
planning a vegetable garden; the history of the printing press; training for a first marathon; how vaccines work;
writing a cover letter; the difference between weather and climate; choosing a bicycle; the life of bees;
how airplanes fly; a birthday party for children; recycling plastic; the French Revolution; sorting algorithms;
the solar system; public speaking; how batteries store energy; the Great Barrier Reef; moving to a new city;
keeping houseplants alive; how elections work; the rules of chess; making coffee; volcanoes; a healthy breakfast;
learning a foreign language; how computers represent numbers; the Roman Empire; repairing a flat tire; photosynthesis;
budget travel in Europe; the human heart; writing a short story; training a puppy; how bridges carry loads; tea;
the industrial revolution; relational databases; time management for students; how glass is made; camping in the rain;
the invention of the telephone; probability and dice; renewable energy; a job interview; the Amazon rainforest; sleep;
how compilers work; painting a room; the immune system; a neighbourhood library; earthquakes; choosing a laptop; cheese;
the history of mathematics; swimming; how maps are made; volunteering; the digestive system; public transport; poetry;
a Python program that counts words; unit tests; version control; recursion; hash tables; regular expressions; threads;
the stock market; antibiotics; jazz; origami; the moon landing; coral; a science fair project; electric cars; gravity;
writing clear e-mail; conflict between colleagues; museums; pasta sauce; the Silk Road; clouds; first aid; owls; rivers
"""
OPENINGS = (
    "Can you explain {}?",
    "What should a beginner know about {}?",
    "Write a short introduction to {}.",
    "I have to give a talk about {}. What are the main points?",
    "Give me five facts about {}.",
    "Write a short story that has to do with {}.",
)
FOLLOW_UPS = (
    "Can you give an example?",
    "Summarize that in two sentences.",
    "What do people often get wrong about it?",
    "Why does that matter?",
    "Explain the second point in more detail.",
    "Rewrite your answer for a ten-year-old child.",
    "What would you recommend as a next step?",
    "Turn that into a list of steps.",
    "How was this done a hundred years ago?",
    "What question should I ask an expert about it?",
)


def converse(model: Path, conversations: int, turns: int, max_tokens: int, seed: int, dtype: str) -> list[str]:
    """Texts of conversations in the model's chat template."""
    from megatron.dmc.inference import LLM, SamplingParams
    from megatron.dmc.inference.text import load_tokenizer

    tokenizer = load_tokenizer(model)
    llm = LLM(model, tokenizer=tokenizer, dtype=dtype, max_num_seqs=32, max_model_len=2048)
    topics = [" ".join(topic.split()) for topic in TOPICS.split(";")]
    randomness = random.Random(seed)
    chats: list[list[dict]] = [[] for _ in range(conversations)]
    for turn in range(turns):
        for i, chat in enumerate(chats):
            question = randomness.choice(FOLLOW_UPS if turn else OPENINGS).format(topics[i % len(topics)])
            chat.append({"role": "user", "content": question})
        prompts = [
            tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=False)
            for chat in chats
        ]
        params = SamplingParams(temperature=0.8, top_p=0.95, max_tokens=max_tokens, seed=seed + turn)
        for chat, result in zip(chats, llm.generate(prompts, params), strict=True):
            chat.append({"role": "assistant", "content": result.outputs[0].text.strip()})
    return [tokenizer.apply_chat_template(chat, tokenize=False) for chat in chats]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="Hugging Face directory of a chat model")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="JSONL file to write")
    for name, default, text in (
        ("conversations", 400, "conversations to hold"),
        ("turns", 4, "questions and answers in each"),
        ("max-tokens", 256, "tokens of the longest answer"),
        ("seed", 1, "seed of questions and sampling"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"{text} (default: %(default)s)")
    parser.add_argument(
        "--dtype", default="auto", help="type of weights and activations; float32 is faster on CPUs without bf16"
    )
    args = parser.parse_args()
    texts = converse(args.model, args.conversations, args.turns, args.max_tokens, args.seed, args.dtype)
    args.output.write_text(
        "".join(json.dumps({"text": text, "source": args.model.name, "kind": "chat"}) + "\n" for text in texts)
    )
    print(f"{args.output}: {len(texts)} conversations, {sum(map(len, texts)):,} characters")
    return 0


if __name__ == "__main__":
    sys.exit(main())
