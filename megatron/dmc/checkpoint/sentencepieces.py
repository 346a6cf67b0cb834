"""A sentencepiece BPE vocabulary as ``tokenizer.json`` and ``tokenizer.model``, with the same ids for every text.

transformers 5 (5.23.0, ``LlamaTokenizer``) builds its own tokenizer from a ``tokenizer.model``, which takes the first
space of a text for the one that sentencepiece adds: "a" and " a" become one. Llama's published ``tokenizer.json`` puts
a space before every text, as sentencepiece does, and so does the one that is made here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Optional

if TYPE_CHECKING:
    from tokenizers import Tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""Types of pieces, as sentencepiece's model file and GGUF number them."""
_SPACE = "\u2581"


@dataclass(frozen=True)
class Pieces:
    """A vocabulary: one piece, score and type per id."""

    pieces: list[str]
    scores: list[float]
    types: list[int]
    prefix: bool
    """A space is put before every text."""


def from_model_file(content: bytes) -> Optional[Pieces]:
    """Vocabulary of a ``tokenizer.model``; None for one that is no BPE or normalizes text."""
    from sentencepiece import sentencepiece_model_pb2 as proto

    model = proto.ModelProto.FromString(content)
    normalizer = model.normalizer_spec
    changes = normalizer.precompiled_charsmap or normalizer.remove_extra_whitespaces
    if model.trainer_spec.model_type != proto.TrainerSpec.BPE or changes or not normalizer.escape_whitespaces:
        return None
    pieces, scores, types = ([getattr(p, name) for p in model.pieces] for name in ("piece", "score", "type"))
    return Pieces(pieces, scores, types, normalizer.add_dummy_prefix)


def fast_tokenizer(pieces: Pieces) -> Tokenizer:
    """Tokenizer with byte fallback whose merges are taken in the order of the scores of what they give."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    unknown = next((piece for piece, kind in zip(pieces.pieces, pieces.types) if kind == UNKNOWN), None)
    ids = {piece: number for number, piece in enumerate(pieces.pieces)}
    model = models.BPE(ids, _merges(pieces), unk_token=unknown, fuse_unk=True, byte_fallback=BYTE in pieces.types)
    tokenizer = Tokenizer(model)
    spaces = normalizers.Replace(" ", _SPACE)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), spaces]) if pieces.prefix else spaces
    back = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*back, decoders.Strip(" ", 1, 0)] if pieces.prefix else back)
    for piece, kind in zip(pieces.pieces, pieces.types):
        if kind in (UNKNOWN, CONTROL, USER_DEFINED):
            token = AddedToken(piece, normalized=False, special=kind != USER_DEFINED)
            (tokenizer.add_tokens if kind == USER_DEFINED else tokenizer.add_special_tokens)([token])
    return tokenizer


def begin_and_end(
    tokenizer: Tokenizer, bos: Optional[tuple[str, int]] = None, eos: Optional[tuple[str, int]] = None
) -> None:
    """Let every text begin with ``bos`` and end with ``eos``, given as (token, id)."""
    from tokenizers import processors

    if bos or eos:
        parts = [*([bos[0]] if bos else []), "$A", *([eos[0]] if eos else [])]
        tokens = [token for token in (bos, eos) if token]
        tokenizer.post_processor = processors.TemplateProcessing(single=parts, special_tokens=tokens)


def _merges(pieces: Pieces) -> list[tuple[str, str]]:
    """All pairs of pieces that make a piece, best score first; of one piece, those of the lowest ids first."""
    ids = {piece: number for number, piece in enumerate(pieces.pieces) if pieces.types[number] in (NORMAL, UNUSED)}
    found = []
    for piece, number in ids.items():
        pairs = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        pairs = [(ids[a], ids[b], a, b) for a, b in pairs if a in ids and b in ids]
        found += [(-pieces.scores[number], *pair) for pair in sorted(pairs)]
    found.sort(key=lambda merge: merge[0])
    return [(a, b) for *_, a, b in found]


def model_file(pieces: Pieces, special: Mapping[str, int]) -> bytes:
    """Content of a ``tokenizer.model``.

    Args:
        special: ids of "unk", "bos" and "eos", as far as there are such.
    """
    from sentencepiece import sentencepiece_model_pb2 as proto

    model = proto.ModelProto()
    for piece, score, kind in zip(pieces.pieces, pieces.scores, pieces.types):
        model.pieces.add(piece=piece, score=score, type=kind)
    trained = model.trainer_spec
    trained.model_type, trained.vocab_size = proto.TrainerSpec.BPE, len(pieces.pieces)
    trained.byte_fallback, trained.pad_id = BYTE in pieces.types, -1
    for name in ("unk", "bos", "eos"):
        setattr(trained, f"{name}_id", special.get(name, -1))
        if name in special:
            setattr(trained, f"{name}_piece", pieces.pieces[special[name]])
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = pieces.prefix
    model.normalizer_spec.remove_extra_whitespaces = False
    return model.SerializeToString()
