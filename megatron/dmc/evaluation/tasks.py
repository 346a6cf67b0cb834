"""Tasks on text of your own, for a model under a cache policy: loss by position, and identifiers that came before.

Every task is a function (model, policy, data) -> figures, each with its number of observations and standard error.
Everything is teacher-forced; "correct" means that greedy decoding would have given the token. Synthetic recall is in
:mod:`megatron.dmc.evaluation.recall`.
"""

import itertools
import keyword
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Optional, Self

import torch
from torch import Tensor

from megatron.dmc.evaluation.policies import CachePolicy
from megatron.dmc.evaluation.teacher_forced import Compression, Scored, TeacherForced
from megatron.dmc.training.tokenizer import Tokenizer


@dataclass(frozen=True)
class Figure:
    """A measured mean with its standard error."""

    task: str
    where: str
    """Part of the data, by positions, gap, length or depth; "all" for the whole."""
    value: float
    n: int
    """Independent observations that the mean is over (see the task)."""
    stderr: float
    """Standard error of the mean; NaN for n = 1."""

    @classmethod
    def mean(cls, task: str, where: str, observations: Tensor) -> Self:
        x, n = observations.double(), observations.numel()
        stderr = float(x.std() / math.sqrt(n)) if n > 1 else math.nan
        return cls(task, where, float(x.mean()), n, stderr)

    def __str__(self) -> str:
        return f"{self.task} ({self.where}): {self.value:.4f} ± {self.stderr:.4f}, n = {self.n}"


@dataclass(frozen=True)
class Result:
    """Figures of a task, and the compression of the cache on the same sequences."""

    figures: list[Figure]
    compression: Compression


def windows(
    documents: Iterable[Sequence[int]], length: int, most: Optional[int] = None, path: str | Path = "the text"
) -> Tensor:
    """Cut documents into sequences of ``length`` tokens: int64 [n, length].

    A sequence never spans two documents; the rest of each document is dropped.

    Args:
        most: greatest number of sequences, after which no further document is read; None: all.
        path: where the documents come from, for the message.

    Raises:
        ValueError: no document is as long.
    """
    cut = (ids[at : at + length] for ids in documents for at in range(0, len(ids) - length + 1, length))
    found = list(itertools.islice(cut, most))
    if not found:
        raise ValueError(f"no document of {path} has {length} tokens; use shorter sequences")
    return torch.tensor(found, dtype=torch.long)


def perplexity_by_position(
    model: TeacherForced,
    policy: Optional[CachePolicy],
    tokens: Tensor,
    edges: Optional[Sequence[int]] = None,
    batch: int = 8,
) -> Result:
    """Mean loss, in nats per token, of positions [edges[i], edges[i + 1]) and of all.

    Args:
        tokens: int64 [n, s].
        edges: ascending positions; None: 1, 2, 4, ... s. Position 0 has no prediction.
        batch: sequences at once.

    Returns:
        Figures over sequences (the tokens of one are not independent); perplexity is exp of the value.

    Raises:
        ValueError: edges that are not ascending from 1 to s.
    """
    s = tokens.size(1)
    if edges is None:
        edges = [*(1 << i for i in range((s - 1).bit_length())), s]
    if list(edges) != sorted(set(edges)) or len(edges) < 2 or edges[0] < 1 or edges[-1] > s:
        raise ValueError(f"edges {list(edges)} must ascend from at least 1 to at most {s}")
    scored = model.score(tokens, policy, batch)
    loss = -scored.log_prob.double()
    figures = [Figure.mean("loss", "all", loss.mean(dim=1))]
    for a, b in zip(edges, edges[1:]):
        figures.append(Figure.mean("loss", f"{a}-{b - 1}", loss[:, a - 1 : b - 1].mean(dim=1)))
    return Result(figures, scored.compression())


@dataclass(frozen=True)
class Occurrence:
    """An identifier that has been seen earlier in the same sequence."""

    sequence: int
    first: int
    """First of its tokens in the sequence; ``last`` is its last one, included."""
    last: int
    gap: int
    """Tokens between the end of the occurrence before and this one."""


_NAME = re.compile(r"[^\W\d]\w{2,}")  # three characters at least: i and x are everywhere


def _offsets(ids: Sequence[int], tokenizer: Tokenizer) -> tuple[str, list[int]]:
    """Text of ``ids``, and the offset at which each token begins in it (with the text's length at the end)."""
    ends = [0]
    for n in range(1, len(ids) + 1):
        # A character that is not complete yet decodes to U+FFFD.
        ends.append(max(ends[-1], len(tokenizer.decode(ids[:n]).rstrip("\ufffd"))))
    return tokenizer.decode(ids), ends


def repeated_identifiers(tokens: Tensor, tokenizer: Tokenizer) -> list[Occurrence]:
    """Identifiers (Python's, without keywords) that stood in the same sequence before, with the gap since then."""
    found = []
    for i, ids in enumerate(tokens.tolist()):
        text, ends = _offsets(ids, tokenizer)
        seen: dict[str, int] = {}
        begin, end = 0, 0  # tokens; names come in order
        for match in _NAME.finditer(text):
            if keyword.iskeyword(match.group()):
                continue
            while begin + 1 < len(ids) and ends[begin + 1] <= match.start():
                begin += 1
            end = max(begin, end)
            while end + 1 < len(ids) and ends[end + 1] < match.end():
                end += 1
            before = seen.get(match.group())
            if before is not None and before < begin:
                found.append(Occurrence(i, begin, end, begin - before - 1))
            seen[match.group()] = end
    return found


def identifiers(
    model: TeacherForced,
    policy: Optional[CachePolicy],
    tokens: Tensor,
    tokenizer: Tokenizer,
    gaps: Sequence[int] = (0, 32, 128),
    batch: int = 8,
) -> Result:
    """Share of repeated identifiers that greedy decoding would have given in full, by how long ago they were last seen.

    Args:
        tokens: int64 [n, s], sequences of the corpus.
        tokenizer: the one that made ``tokens``.
        gaps: lower edges, ascending; a gap belongs to the highest edge that it reaches.
        batch: sequences at once.

    Returns:
        Figures over sequences (each counts by the share of its occurrences), named by their least gap.

    Raises:
        ValueError: no identifier comes twice in any sequence.
    """
    occurrences = repeated_identifiers(tokens, tokenizer)
    if not occurrences:
        raise ValueError("no identifier comes twice in a window; use longer windows, or text with identifiers")
    scored = model.score(tokens, policy, batch)
    figures = []
    ranges = [(f"gap >= {a}", a, b) for a, b in zip(gaps, [*gaps[1:], math.inf])]
    for where, lowest, highest in [("all", 0, math.inf), *ranges]:
        right: dict[int, list[bool]] = {}
        for o in occurrences:
            if lowest <= o.gap < highest:
                right.setdefault(o.sequence, []).append(bool(scored.correct[o.sequence, o.first - 1 : o.last].all()))
        if right:
            figures.append(Figure.mean("identifiers", where, torch.tensor([sum(x) / len(x) for x in right.values()])))
    return Result(figures, scored.compression())


def answer_figures(task: str, where: str, scored: Scored, graded: Tensor) -> list[Figure]:
    """Exact match, share of correct tokens, and loss of the answers at the ends of sequences.

    Args:
        graded: bool [a], True for the tokens of the answer that count; the others are given.
    """
    correct, log_prob = (x[:, -len(graded) :][:, graded] for x in (scored.correct, scored.log_prob))
    return [
        Figure.mean(f"{task}, exact", where, correct.all(dim=1)),
        Figure.mean(f"{task}, tokens", where, correct.double().mean(dim=1)),
        Figure.mean(f"{task}, loss", where, (-log_prob.double()).mean(dim=1)),
    ]
