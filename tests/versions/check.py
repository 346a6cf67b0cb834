"""One version of transformers on one exported directory: every check's outcome as a line of JSON.

    python tests/versions/check.py DIRECTORY

Runs in an environment of its own that has torch, transformers and sentencepiece, and nothing of this project: run.py
beside this file makes it. ``expected.json`` in the directory holds prompts and what the reference decoder says to them.
"""

from __future__ import annotations

import builtins
import copy
import json
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

CHECKS: dict[str, Callable] = {}


def check(name: str) -> Callable[[Callable], Callable]:
    """Register a function of a :class:`Subject` that raises where the version fails; it may return a remark."""

    def register(function: Callable) -> Callable:
        CHECKS[name] = function
        return function

    return register


class Subject:
    """The directory, its model and what is expected of it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.expected = json.loads((directory / "expected.json").read_text())
        self.model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)
        self.prompts, self.answers = self.expected["prompts"], self.expected["completions"]

    def generate(self, ids: list[list[int]], **named) -> torch.Tensor:
        """Greedy completions of left-padded prompts, int64 [b, tokens]."""
        width = max(map(len, ids))
        padded = torch.tensor([[0] * (width - len(row)) + row for row in ids])
        named = {"max_new_tokens": len(self.answers[0]), "do_sample": False, "pad_token_id": 0} | named
        if len(ids) > 1:
            named["attention_mask"] = (padded != 0).long()
        return self.model.generate(padded, **named)[:, width:]


@check("one prompt")
def one_prompt(subject: Subject) -> None:
    for prompt, answer in zip(subject.prompts, subject.answers):
        found = subject.generate([prompt])[0].tolist()
        assert found == answer, f"{found} should be {answer}"


@check("batch")
def batch(subject: Subject) -> None:
    assert subject.generate(subject.prompts).tolist() == subject.answers


@check("without a cache")
def without_a_cache(subject: Subject) -> None:
    assert subject.generate(subject.prompts, use_cache=False).tolist() == subject.answers


@check("chunked prefill, beams")
def chunks_and_beams(subject: Subject) -> None:
    if hasattr(transformers.GenerationConfig(), "prefill_chunk_size"):  # from 4.51 on
        assert subject.generate(subject.prompts[:1], prefill_chunk_size=5).tolist() == subject.answers[:1]
    named = dict(num_beams=3, num_return_sequences=2)
    with_cache, without = (
        subject.generate(subject.prompts, **named),
        subject.generate(subject.prompts, use_cache=False, **named),
    )
    assert torch.equal(with_cache, without)


@check("DMS")
def dms(subject: Subject) -> None:
    """A model of method dms: batch, without a cache, chunked prefill."""
    other = copy.copy(subject)
    other.model = AutoModelForCausalLM.from_pretrained(subject.directory / "dms", trust_remote_code=True)
    other.answers = subject.expected["dms"]
    for function in (batch, without_a_cache, chunks_and_beams):
        function(other)


@check("save and reload")
def save_and_reload(subject: Subject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        subject.model.save_pretrained(folder)
        again = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    ids = torch.tensor(subject.prompts[:1])
    assert torch.equal(again(ids).logits, subject.model(ids).logits)


@check("tokenizer")
def tokenizer(subject: Subject) -> None:
    """Loads without a question when told not to run code, and gives sentencepiece's ids."""
    compare_ids(subject, AutoTokenizer.from_pretrained(subject.directory, trust_remote_code=False))


@check("sentencepiece alone")
def sentencepiece_alone(subject: Subject) -> None:
    compare_ids(subject, AutoTokenizer.from_pretrained(subject.directory / "sentencepiece", trust_remote_code=False))


def compare_ids(subject: Subject, loaded: Callable) -> None:
    for text, ids in subject.expected["texts"].items():
        found = loaded(text, add_special_tokens=False)["input_ids"]
        assert found == ids, f"{text!r} is {found}, should be {ids}"


@check("pipeline")
def run_pipeline(subject: Subject) -> None:
    run = pipeline("text-generation", model=str(subject.directory), trust_remote_code=True)
    text = subject.expected["prompt_text"]
    ids = run.tokenizer(text)["input_ids"]
    named = dict(max_new_tokens=12, do_sample=False)
    wanted = run.tokenizer.decode(subject.generate([ids], **named)[0], skip_special_tokens=True)
    found = run(text, return_full_text=False, **named)[0]["generated_text"]
    # Versions differ in the space between prompt and completion.
    assert found.strip() == wanted.strip(), f"{found!r} should be {wanted!r}"


@check("generate_batch refused")
def generate_batch_refused(subject: Subject) -> str | None:
    if not hasattr(transformers.GenerationMixin, "generate_batch"):
        return "has none"
    refused(lambda: subject.model.generate_batch(subject.prompts, max_new_tokens=3), "continuous batching")


@check("unknown arguments refused")
def unknown_refused(subject: Subject) -> None:
    ids = torch.tensor(subject.prompts[:1])
    refused(lambda: subject.model(ids, block_table=torch.zeros(1, 1)), "block_table")
    refused(lambda: subject.model(ids, cache=transformers.DynamicCache()), "DMCCache")


def refused(call: Callable, message: str) -> None:
    try:
        call()
    except ValueError as error:
        assert message in str(error), error
    else:
        raise AssertionError("not refused")


def no_question(prompt: str = "") -> str:
    raise AssertionError("asked on the terminal whether code may run")


def main() -> int:
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    builtins.input = no_question
    torch.manual_seed(0)
    outcome = {"transformers": transformers.__version__, "torch": torch.__version__}
    try:
        subject = Subject(Path(sys.argv[1]))
    except Exception as error:
        outcome["loading"] = f"{type(error).__name__}: {error}"
    else:
        for name, function in CHECKS.items():
            try:
                outcome[name] = function(subject) or "yes"
            except Exception as error:
                outcome[name] = f"NO ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
    print(json.dumps(outcome))
    return 0


if __name__ == "__main__":
    sys.exit(main())
