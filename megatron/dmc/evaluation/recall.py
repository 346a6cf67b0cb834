"""Synthetic recall tasks like RULER's (Hsieh et al. 2024, arXiv 2404.06654).

The tasks are needle, multi-key, variable tracking and copying. They are written as assignments, which a model continues
without an instruction: ``name = value`` stands somewhere in a haystack, and ``name =`` at the end. Samples are made of
text with the model's tokenizer (:class:`TextMaterial`), or of bare token ids for a model without one
(:class:`IdMaterial`). All samples of a length have the same number of tokens, so they are scored as one batch.
"""

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Optional

import torch
from torch import Tensor

from megatron.dmc.evaluation.policies import CachePolicy
from megatron.dmc.evaluation.tasks import Figure, Result, answer_figures
from megatron.dmc.evaluation.teacher_forced import Compression, TeacherForced
from megatron.dmc.training.tokenizer import Tokenizer

Ids = list[int]


class Material(ABC):
    """Source of haystack, names and values. All names have the same number of tokens, and so have all values."""

    @abstractmethod
    def filler(self, tokens: int, rng: random.Random) -> Ids:
        """Haystack of ``tokens`` tokens."""

    @abstractmethod
    def names(self, count: int, rng: random.Random) -> list[Ids]:
        """Different names, all of one number of tokens."""

    @abstractmethod
    def values(self, count: int, rng: random.Random) -> list[Ids]:
        """Different values, all of one number of tokens."""

    begin: Ids
    """Tokens before a name that is assigned to."""
    equals: Ids
    """Tokens between name and value; what follows is recalled."""
    end: Ids
    """Tokens after a value."""

    def assignment(self, name: Ids, value: Ids) -> Ids:
        return [*self.begin, *name, *self.equals, *value, *self.end]


class IdMaterial(Material):
    """Material of bare ids: three separators, names and values of two ids each, and a haystack of random ids."""

    def __init__(self, vocabulary: Sequence[int]) -> None:
        """Material from the ids of ``vocabulary``, at least 64; the first three become separators."""
        if len(set(vocabulary)) < 64:
            raise ValueError(f"{len(set(vocabulary))} different ids are too few for names and values; give at least 64")
        (begin, equals, end), ids = vocabulary[:3], list(vocabulary[3:])
        self.begin, self.equals, self.end = [begin], [equals], [end]
        # Apart, so that no filler or value looks like a name.
        self._names, self._values, self._filler = ids[0::3], ids[1::3], ids[2::3]

    def filler(self, tokens: int, rng: random.Random) -> Ids:
        return rng.choices(self._filler, k=tokens)

    def _pairs(self, ids: Ids, count: int, rng: random.Random) -> list[Ids]:
        found: dict[tuple[int, ...], None] = {}
        while len(found) < count:
            found[tuple(rng.choices(ids, k=2))] = None
        return [list(pair) for pair in found]

    def names(self, count: int, rng: random.Random) -> list[Ids]:
        return self._pairs(self._names, count, rng)

    def values(self, count: int, rng: random.Random) -> list[Ids]:
        return self._pairs(self._values, count, rng)


class TextMaterial(Material):
    """Material of text: lines ``name = value`` of five random letters and five random digits, in a corpus' text."""

    def __init__(self, tokenizer: Tokenizer, corpus: Sequence[Sequence[int]]) -> None:
        """Material with a haystack from ``corpus``, documents as ids. Raises ``ValueError`` when there is no text."""
        self.tokenizer, self.corpus = tokenizer, [list(ids) for ids in corpus if len(ids)]
        if not self.corpus:
            raise ValueError("the corpus has no text; the haystack is made of it")
        self.begin, self.equals, self.end = (tokenizer.encode(text) for text in ("\n", " = ", "\n"))
        self._sizes: dict[str, int] = {}

    def filler(self, tokens: int, rng: random.Random) -> Ids:
        out: Ids = []
        while len(out) < tokens:
            ids = rng.choice(self.corpus)
            start = rng.randrange(len(ids))
            out += ids[start : start + tokens - len(out)]
        return out

    def _texts(self, letters: str, count: int, rng: random.Random) -> list[Ids]:
        """Different texts of five letters, all with the commonest number of tokens."""
        sample = lambda source: self.tokenizer.encode("".join(source.choices(letters, k=5)))
        if letters not in self._sizes:
            sizes = [len(sample(random.Random(i))) for i in range(200)]
            self._sizes[letters] = max(set(sizes), key=sizes.count)
        found: dict[tuple[int, ...], None] = {}
        while len(found) < count:
            ids = sample(rng)
            if len(ids) == self._sizes[letters]:
                found[tuple(ids)] = None
        return [list(ids) for ids in found]

    def names(self, count: int, rng: random.Random) -> list[Ids]:
        return self._texts("abcdefghijklmnopqrstuvwxyz", count, rng)

    def values(self, count: int, rng: random.Random) -> list[Ids]:
        return self._texts("0123456789", count, rng)


@dataclass(frozen=True)
class Sample:
    """A recall sample: pieces that are placed in a haystack, and the question after it."""

    pieces: list[Ids]
    """Token ids of each piece. The first one stands at the requested depth, the others anywhere."""
    ordered: bool
    """Keep the order of the pieces, all of them after the first."""
    question: Ids
    answer: Ids
    graded: Optional[list[bool]] = None
    """True for the tokens of the answer that count; None: all count."""


def needle(material: Material, rng: random.Random) -> Sample:
    """One assignment whose value is asked for: RULER's single needle."""
    return multi_key(material, rng, keys=1)


def multi_key(material: Material, rng: random.Random, keys: int = 8) -> Sample:
    """Assignments to ``keys`` different names, of which one value is asked for: RULER's multi-key needle."""
    names, values = material.names(keys, rng), material.values(keys, rng)
    pieces = [material.assignment(*pair) for pair in zip(names, values)]
    return Sample(pieces, False, [*material.begin, *names[0], *material.equals], values[0])


def variable_tracking(material: Material, rng: random.Random, hops: int = 2) -> Sample:
    """A chain of assignments, x1 = value, x2 = x1, x3 = x2, that is asked for backwards: x3 = x2 = x1 = value.

    RULER asks for all names that have the value, which takes an instruction; a chained assignment asks a plain model
    for as much. Its equals signs are given, not asked for.
    """
    names, (value,) = material.names(hops + 1, rng), material.values(1, rng)
    pieces = [material.assignment(name, source) for name, source in zip(names, [value, *names])]
    answer, graded = [], []
    for name in reversed(names[:-1]):
        answer += [*name, *material.equals]
        graded += [True] * len(name) + [False] * len(material.equals)
    return Sample(
        pieces, True, [*material.begin, *names[-1], *material.equals], answer + value, graded + [True] * len(value)
    )


def copying(material: Material, rng: random.Random, lines: int = 4) -> Sample:
    """A block of ``lines`` assignments that comes again: all but its first line are to be repeated word by word."""
    names, values = material.names(lines, rng), material.values(lines, rng)
    block = [material.assignment(*pair) for pair in zip(names, values)]
    return Sample([sum(block, [])], True, block[0], sum(block[1:], []))


SUITE: dict[str, Callable[[Material, random.Random], Sample]] = {
    "needle": needle,
    "multi-key": multi_key,
    "variable tracking": variable_tracking,
    "copying": copying,
}


def place(sample: Sample, material: Material, length: int, depth: float, rng: random.Random) -> Ids:
    """Put a sample's pieces into a haystack, question and answer after it: exactly ``length`` ids.

    Args:
        depth: place of the first piece, from 0, the beginning of the haystack, to 1, its end.

    Raises:
        ValueError: the pieces alone are longer than ``length``.
    """
    room = length - sum(map(len, [*sample.pieces, sample.question, sample.answer]))
    if room < 0:
        raise ValueError(
            f"a sample of {length} tokens is too short: its pieces, question and answer take {length - room}"
        )
    # Tokens of haystack before each piece.
    first = round(depth * room)
    places = [rng.randint(first if sample.ordered else 0, room) for _ in sample.pieces[1:]]
    places = [first, *(sorted(places) if sample.ordered else places)]
    filler, out, used = material.filler(room, rng), [], 0
    # Sorting is stable: pieces at one place keep their order.
    for at, piece in sorted(zip(places, sample.pieces), key=lambda pair: pair[0]):
        out += filler[used:at] + piece
        used = at
    return [*out, *filler[used:], *sample.question, *sample.answer]


def samples_of(
    task: str, material: Material, length: int, depth: float, samples: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Make samples of a task; the same arguments give the same samples.

    Returns:
        The samples, int64 [samples, length], and bool [a], True for those of the last a tokens, the answer, that count.
    """
    rng = random.Random(f"{task} {length} {depth} {seed}")
    rows, graded = [], set()
    for _ in range(samples):
        sample = SUITE[task](material, rng)
        rows.append(place(sample, material, length, depth, rng))
        graded.add(tuple(sample.graded or [True] * len(sample.answer)))
    assert len(graded) == 1  # names and values have one number of tokens
    return torch.tensor(rows), torch.tensor(graded.pop())


def recall(
    model: TeacherForced,
    policy: Optional[CachePolicy],
    material: Material,
    *,
    tasks: Sequence[str] = tuple(SUITE),
    lengths: Sequence[int],
    depths: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
    samples: int = 20,
    seed: int = 0,
    batch: int = 8,
) -> dict[str, Result]:
    """Run every task at every length and depth, ``batch`` sequences at once.

    Returns:
        Results by task, with figures over samples: for each length and depth, and over all depths of a length ("512
        tokens"), the share of answers that are right in full (exact), the share of their tokens, and their loss in
        nats. The compression is that of the longest sequences.

    Raises:
        ValueError: an unknown task, a depth outside [0, 1], or a length that is too short for the task or too long for
            the model.
    """
    if wrong := [task for task in tasks if task not in SUITE]:
        raise ValueError(f"unknown task {wrong[0]!r}; there are {', '.join(SUITE)}")
    if wrong_depths := [depth for depth in depths if not 0 <= depth <= 1]:
        raise ValueError(f"depth {wrong_depths[0]} is outside [0, 1]")
    results = {}
    for task in tasks:
        figures: list[Figure] = []
        compression: Optional[Compression] = None
        for length in sorted(lengths):
            made = [samples_of(task, material, length, depth, samples, seed) for depth in depths]
            graded = made[0][1]
            scored = model.score(torch.cat([rows for rows, _ in made]), policy, batch)
            compression = scored.compression()
            figures += answer_figures(task, f"{length} tokens", scored, graded)
            for i, depth in enumerate(depths):
                part = scored[i * samples : (i + 1) * samples]
                figures += answer_figures(task, f"{length} tokens, depth {depth:g}", part, graded)
        assert compression is not None
        results[task] = Result(figures, compression)
    return results
