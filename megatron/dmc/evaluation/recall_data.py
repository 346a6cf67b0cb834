"""Write a training dataset that teaches a small model to look things up in its context.

A small model that has seen a few million tokens of text never learns to look back, and then a sliding window is as good
as the full cache, so that no cache policy can be told from another. Mixed into pre-training, these documents teach what
the recall tasks ask: each has many of their assignments and questions. They share the form of the tasks, but none of
their samples: names, values, haystack and places are random.

    python -m megatron.dmc.evaluation.recall_data --tokenizer tokenizer.model --corpus train.jsonl --tokens 2000000 \\
        --output-prefix data/recall
"""

import random
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from megatron.dmc.evaluation.recall import SUITE, Ids, Material, TextMaterial
from megatron.dmc.training.jsonl import read_texts


def document(material: Material, length: int, rng: random.Random) -> Ids:
    """A document of about ``length`` ids, at most one sample longer.

    It holds the pieces of several samples in any order, with haystack between them. The question and answer of each
    sample stand somewhere after its pieces.
    """
    full = length * rng.uniform(0.3, 0.9)
    events: list[tuple[float, Ids]] = []
    used = 0
    while used < full:
        sample = SUITE[rng.choice(list(SUITE))](material, rng)
        places = [rng.random() for _ in sample.pieces]
        if sample.ordered:
            places.sort()
        events += zip(places, sample.pieces)
        # Beyond 1 now and then: after everything, as in the suite.
        events.append((rng.uniform(max(places), 1.2), [*sample.question, *sample.answer, *material.end]))
        used += sum(map(len, [*sample.pieces, sample.question, sample.answer, material.end]))
    events.sort(key=lambda event: event[0])
    cuts = sorted(rng.randrange(max(1, length - used)) for _ in events)
    out: Ids = []
    for (_, ids), gap in zip(events, (b - a for a, b in zip([0, *cuts], cuts))):
        out += material.filler(gap, rng) + ids
    return out


def repeats(ids: Sequence[int], length: int, rng: random.Random) -> Ids:
    """A document of ``length`` tokens: blocks of random ids, each either new or one that stood before.

    All of a repeated block but its first token can be predicted by looking back. The mechanism is learned from this;
    the recall tasks' own form is too sparse for it.
    """
    blocks: list[Ids] = []
    out: Ids = []
    while len(out) < length:
        if not blocks or rng.random() < 0.4:
            blocks.append(rng.choices(ids, k=rng.randint(3, max(3, length // 4))))
            out += blocks[-1]
        out += rng.choice(blocks)
    return out[:length]


def write(
    prefix: str | Path,
    tokenizer_path: str,
    corpus: str | Path,
    tokens: int,
    *,
    longest: int = 512,
    repeated: float = 0.5,
    seed: int = 0,
) -> int:
    """Write an indexed dataset of documents of ``longest`` / 4 to ``longest`` tokens; returns its number of tokens.

    Args:
        prefix: writes ``prefix.bin``, ``.idx`` and ``.json``.
        corpus: JSONL, ``{"text": ...}`` a line, for the haystack.
        tokens: least number of tokens.
        repeated: share of documents that are :func:`repeats`; 1 where ``longest`` is too short for the recall tasks.

    Raises:
        ValueError: no text, or documents that are too short.
    """
    from megatron.dmc.training.indexed_writer import IndexedWriter, publish
    from megatron.dmc.training.tokenizer import load_tokenizer

    if longest < 16 or (longest < 128 and repeated < 1):
        raise ValueError(f"documents of at most {longest} tokens are too short; use 128, or 16 with repeated 1")
    tokenizer, rng = load_tokenizer(tokenizer_path), random.Random(seed)
    begin = [tokenizer.bos_id] if tokenizer.adds_bos else []
    material = TextMaterial(tokenizer, [tokenizer.encode(text) for text in read_texts(corpus)])
    # The special tokens and bytes at the beginning of a sentencepiece vocabulary are left out.
    ids = range(min(300, tokenizer.vocab_size // 2), tokenizer.vocab_size)
    parent = Path(prefix).absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{Path(prefix).name}.", dir=parent) as directory:
        writer = IndexedWriter(Path(directory), tokenizer, eod_appended=True, bos_prepended=tokenizer.adds_bos)
        while writer.tokens < tokens:
            length = rng.randint(longest // 4, longest)
            made = repeats(ids, length, rng) if rng.random() < repeated else document(material, length, rng)
            writer.add([*begin, *made, tokenizer.eod_id])
        writer.close()
        publish(Path(directory), prefix)
    return writer.tokens


if __name__ == "__main__":
    from megatron.dmc.cli.eval import main

    sys.exit(main(["recall-data", *sys.argv[1:]]))
