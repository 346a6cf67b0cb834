"""Tokenizers for preparing data and for training: sentencepiece models and Hugging Face directories behind one class.

Imports neither torch nor Megatron, so that the worker processes of ``dmc data preprocess`` start quickly.
"""

import hashlib
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Optional

from megatron.dmc.checkpoint.tokenizer_files import load_pretrained, load_sentencepiece, sentencepiece_adds_bos

# The files of a Hugging Face directory that decide which text becomes which ids. tokenizer_config.json is left out on
# purpose: chat templates and library versions in it change without the ids changing.
_DEFINING_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "added_tokens.json",
    "tekken.json",
    "tiktoken.model",
)


class Tokenizer(ABC):
    """Text to token ids and back. Made by :func:`load_tokenizer`.

    It serves as ``GPTDatasetConfig.tokenizer`` of megatron-core, which asks for ``vocab_size``, ``eod`` and
    ``unique_identifiers``. It has no ``pad`` on purpose: GPTDataset takes every label that equals ``pad`` out of the
    loss, and in most Llama tokenizers ``pad`` is another name for EOS or ``<unk>``, which the text may well contain.
    Without one GPTDataset uses -1.
    """

    path: str
    """File or directory that it was loaded from."""
    vocab_size: int
    """Number of ids: every id is smaller than this."""
    bos_id: Optional[int]
    """Beginning of sequence; None when the tokenizer has none."""
    adds_bos: bool
    """True when the tokenizer puts BOS before every text by itself, as it will before every prompt at inference."""
    eod_id: int
    """End of document: the tokenizer's EOS."""
    fingerprint: str
    """sha256 over the content of the files that define the tokenizer, in hex; the same wherever they lie."""

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``, without BOS or EOS."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids``; special tokens that have a text form are kept."""

    def resolve_bos(self, prepend_bos: Optional[bool]) -> bool:
        """Whether documents shall begin with BOS: as asked, or for None as the tokenizer does by itself.

        Raises:
            ValueError: BOS is asked for and the tokenizer has none.
        """
        if prepend_bos and self.bos_id is None:
            raise ValueError(f"--prepend-bos: tokenizer {self.path} has no BOS token; leave it out")
        return self.adds_bos if prepend_bos is None else prepend_bos

    @property
    def eod(self) -> int:
        """``eod_id`` under megatron-core's name."""
        return self.eod_id

    @property
    def unique_identifiers(self) -> OrderedDict[str, str]:
        """Part of the key of megatron-core's index cache: the content, not the path."""
        return OrderedDict([("class", "Tokenizer"), ("fingerprint", self.fingerprint)])

    def __repr__(self) -> str:
        return f"Tokenizer({self.path!r}, vocab_size={self.vocab_size}, fingerprint={self.fingerprint[:12]})"


class _SentencePieceTokenizer(Tokenizer):
    def __init__(self, path: Path) -> None:
        self._model = load_sentencepiece(path)
        self.path = str(path)
        self.vocab_size = self._model.get_piece_size()
        # sentencepiece says -1 for a token that the model was trained without.
        bos, eos = self._model.bos_id(), self._model.eos_id()
        self.bos_id = None if bos < 0 else bos
        self.adds_bos = self.bos_id is not None and sentencepiece_adds_bos(path)
        self.eod_id = _require_eos(None if eos < 0 else eos, path)
        self.fingerprint = _hash_files([path], with_names=False)

    def encode(self, text: str) -> list[int]:
        return self._model.encode(text, out_type=int, add_bos=False, add_eos=False)

    def decode(self, ids: Sequence[int]) -> str:
        return self._model.decode([int(i) for i in ids])


class _HuggingFaceTokenizer(Tokenizer):
    def __init__(self, path: Path) -> None:
        files = [path / name for name in _DEFINING_FILES if (path / name).is_file()]
        if not files:
            raise ValueError(
                f"tokenizer directory {path} holds none of {', '.join(_DEFINING_FILES)}; give the directory "
                "of a Hugging Face tokenizer, or a sentencepiece .model file"
            )
        self._model: Any = load_pretrained(path)
        self.path = str(path)
        # Not len(): ids may have gaps when tokens were added by hand.
        self.vocab_size = max(self._model.get_vocab().values()) + 1
        self.bos_id = self._model.bos_token_id
        # Asked, not read: older tokenizers have add_bos_token, newer ones a post-processor in tokenizer.json.
        self.adds_bos = self.bos_id is not None and self._model.encode("a", verbose=False)[:1] == [self.bos_id]
        self.eod_id = _require_eos(self._model.eos_token_id, path)
        self.fingerprint = _hash_files(files, with_names=True)

    def encode(self, text: str) -> list[int]:
        # verbose=False: documents longer than the model's context are normal here and not worth a warning.
        return self._model.encode(text, add_special_tokens=False, verbose=False)

    def decode(self, ids: Sequence[int]) -> str:
        return self._model.decode([int(i) for i in ids], skip_special_tokens=False, clean_up_tokenization_spaces=False)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load a tokenizer from local files; nothing is ever downloaded.

    Args:
        path: a sentencepiece ``.model`` file; a directory with ``tokenizer.model`` and no ``tokenizer.json`` (the same
            file); or the directory of a Hugging Face tokenizer (needs transformers, imported only then).

    Raises:
        ValueError: the path does not exist, is not a tokenizer, or the tokenizer has no EOS token.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(
            f"tokenizer {path} does not exist; give a sentencepiece .model file or a Hugging Face tokenizer directory"
        )
    if path.is_file():
        return _SentencePieceTokenizer(path)
    if (path / "tokenizer.model").is_file() and not (path / "tokenizer.json").is_file():
        return _SentencePieceTokenizer(path / "tokenizer.model")
    return _HuggingFaceTokenizer(path)


def _require_eos(eos: Optional[int], path: Path) -> int:
    if eos is None:
        raise ValueError(f"tokenizer {path} has no end-of-sequence token, which ends every document; set eos_token")
    return eos


def _hash_files(files: Iterable[Path], with_names: bool) -> str:
    """sha256 in hex of the files' content, each framed by its name (optional) and length."""
    digest = hashlib.sha256()
    for file in files:
        content = file.read_bytes()
        name = file.name if with_names else ""
        digest.update(f"{name}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()
