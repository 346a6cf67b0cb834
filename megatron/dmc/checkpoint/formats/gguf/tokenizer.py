"""Tokenizer, chat template and special tokens of a GGUF file as the files of a Hugging Face directory.

Byte-level BPE (``gpt2``) becomes a ``tokenizer.json``, a sentencepiece vocabulary (``llama``) that and a
``tokenizer.model``.
A GGUF file names the rule that cuts text before BPE (``tokenizer.ggml.pre``) and does not hold it, so the rules of the
supported families stand here, as their published ``tokenizer.json`` files have them.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Optional

from megatron.dmc.checkpoint.formats.gguf.metadata import Metadata
from megatron.dmc.checkpoint.sentencepieces import (
    CONTROL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    Pieces,
    begin_and_end,
    fast_tokenizer,
    model_file,
)

_TOKENS = "tokenizer.ggml."
_KNOWN = set(
    "model pre tokens token_type scores merges add_space_prefix add_bos_token add_eos_token add_sep_token bos_token_id "
    "eos_token_id unknown_token_id padding_token_id eot_token_id eom_token_id seperator_token_id mask_token_id "
    "cls_token_id remove_extra_whitespaces precompiled_charsmap token_type_count".split()
)
_SPECIAL = {"bos": "bos_token_id", "eos": "eos_token_id", "unk": "unknown_token_id", "pad": "padding_token_id"}
_LLAMA3_CUT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEKKEN_CUT = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class Cut:
    """How a family cuts text into words before BPE."""

    pattern: Optional[str] = None
    """Regular expression whose matches are the words. None: GPT-2's own."""
    digits: bool = False
    """Every digit stands alone."""
    nfc: bool = False
    """Text is normalized to NFC first."""
    whole_words: bool = False
    """A word that is a token is taken whole, whatever the merges say."""
    bos: bool = False
    """A prompt begins with BOS where the file does not say."""


CUTS = {
    "gpt-2": Cut(),
    "smollm": Cut(digits=True),
    "llama-bpe": Cut(_LLAMA3_CUT, whole_words=True, bos=True),
    "qwen2": Cut(_LLAMA3_CUT.replace(r"\p{N}{1,3}", r"\p{N}"), nfc=True),
    "tekken": Cut(_TEKKEN_CUT, whole_words=True, bos=True),
}
"""``tokenizer.ggml.pre`` -> rule. Sources: tokenizer.json of GPT-2, SmolLM2, Llama 3.1, Qwen 2.5 and Mistral Nemo."""


def kind(metadata: Metadata) -> str:
    """Tokenizer in a few words, for a description."""
    name, pre = metadata.text(_TOKENS + "model", ""), metadata.text(_TOKENS + "pre", "")
    return name and f"{name}{f' ({pre})' if pre else ''}, {len(metadata.items(_TOKENS + 'tokens'))} tokens"


def files(metadata: Metadata, config: dict[str, Any]) -> dict[str, bytes]:
    """Tokenizer files and ``generation_config.json``, name -> content; enters the special tokens into ``config`` too.

    Raises:
        ValueError: a tokenizer, a rule or a key that is not understood, by its name.
    """
    for key in metadata.keys():
        if key.startswith(_TOKENS) and key.removeprefix(_TOKENS) not in _KNOWN:
            raise ValueError(f"{metadata.path}: {key} is not understood")
    model = metadata.text(_TOKENS + "model")
    if model not in _MODELS:
        raise ValueError(f"{metadata.path}: tokenizer.ggml.model is {model!r}; supported: {', '.join(_MODELS)}")
    vocabulary = _Vocabulary(metadata, config["vocab_size"])
    content, settings = _MODELS[model](metadata, vocabulary)
    settings |= {f"{name}_token": vocabulary.tokens[number] for name, number in vocabulary.special.items()}
    settings |= {"clean_up_tokenization_spaces": False, "model_max_length": config["max_position_embeddings"]}
    if template := _chat_template(metadata):
        settings["chat_template"] = template
    ends = _ends(metadata, vocabulary)
    generation = {f"{name}_token_id": vocabulary.special[name] for name in ("bos", "pad") if name in vocabulary.special}
    if ends:
        generation["eos_token_id"] = ends if len(ends) > 1 else ends[0]
    config |= generation
    return {
        **content,
        "tokenizer_config.json": json.dumps(settings, indent=2, ensure_ascii=False).encode(),
        "generation_config.json": json.dumps(generation, indent=2).encode(),
    }


class _Vocabulary:
    """Tokens, their types and the numbers of the special ones, checked against each other."""

    def __init__(self, metadata: Metadata, rows: int) -> None:
        self.metadata = metadata
        self.tokens: list[str] = metadata.items(_TOKENS + "tokens")
        if not self.tokens or len(self.tokens) > rows or not all(isinstance(token, str) for token in self.tokens):
            raise ValueError(
                f"{metadata.path}: tokenizer.ggml.tokens has {len(self.tokens)} entries; the embedding has {rows} rows"
            )
        self.types = self._beside("token_type", int) if _TOKENS + "token_type" in metadata else [1] * len(self.tokens)
        self.special = {name: self.number(key) for name, key in _SPECIAL.items() if _TOKENS + key in metadata}

    def _beside(self, key: str, kind: type) -> list:
        """A list with one value for each token."""
        values = self.metadata.items(_TOKENS + key)
        if len(values) != len(self.tokens) or not all(isinstance(value, kind) for value in values):
            raise ValueError(f"{self.metadata.path}: {_TOKENS}{key} does not hold one number for each token")
        return values

    def scores(self) -> list[float]:
        return self._beside("scores", float)

    def token(self, name: str) -> tuple[str, int]:
        """(token, id) of "bos" or "eos"."""
        return self.tokens[self.special[name]], self.special[name]

    def number(self, key: str) -> int:
        """Number of a special token."""
        number = self.metadata.integer(_TOKENS + key)
        if not 0 <= number < len(self.tokens):
            raise ValueError(f"{self.metadata.path}: {_TOKENS}{key} is {number}; there are {len(self.tokens)} tokens")
        return number


def _byte_level(metadata: Metadata, vocabulary: _Vocabulary) -> tuple[dict[str, bytes], dict[str, Any]]:
    """``tokenizer.json`` of a byte-level BPE, and its settings."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    name = metadata.text(_TOKENS + "pre")
    if name not in CUTS:
        raise ValueError(f"{metadata.path}: tokenizer.ggml.pre is {name!r}; supported: {', '.join(CUTS)}")
    cut = CUTS[name]
    known = {token: i for i, token in enumerate(vocabulary.tokens) if vocabulary.types[i] != UNUSED}
    merges = [tuple(merge.split(" ")) for merge in metadata.items(_TOKENS + "merges")]
    try:
        tokenizer = Tokenizer(models.BPE(known, merges, ignore_merges=cut.whole_words))
    except Exception as error:  # the library raises Exception itself
        raise ValueError(f"{metadata.path}: tokenizer.ggml.merges does not fit the tokens: {error}") from error
    if cut.nfc:
        tokenizer.normalizer = normalizers.NFC()
    first: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if cut.digits else []
    if cut.pattern:
        first = [pre_tokenizers.Split(Regex(cut.pattern), "isolated")]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=cut.pattern is None)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*first, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    for number, kind in enumerate(vocabulary.types):
        if kind in (UNKNOWN, CONTROL, USER_DEFINED):
            token = AddedToken(vocabulary.tokens[number], normalized=False, special=kind != USER_DEFINED)
            (tokenizer.add_tokens if kind == USER_DEFINED else tokenizer.add_special_tokens)([token])
    add = _added(metadata, vocabulary, cut.bos)
    begin_and_end(tokenizer, **{x: vocabulary.token(x) for x in ("bos", "eos") if add[f"add_{x}_token"]})
    return {"tokenizer.json": tokenizer.to_str().encode()}, {"tokenizer_class": "PreTrainedTokenizerFast", **add}


def _sentencepiece(metadata: Metadata, vocabulary: _Vocabulary) -> tuple[dict[str, bytes], dict[str, Any]]:
    """``tokenizer.json`` and ``tokenizer.model`` of a sentencepiece BPE, and its settings."""
    pieces = Pieces(
        vocabulary.tokens, vocabulary.scores(), vocabulary.types, metadata.flag(_TOKENS + "add_space_prefix", True)
    )
    if metadata.flag(_TOKENS + "remove_extra_whitespaces", False):
        raise ValueError(f"{metadata.path}: tokenizer.ggml.remove_extra_whitespaces = True is not supported")
    tokenizer = fast_tokenizer(pieces)
    add = _added(metadata, vocabulary, bos=True)
    begin_and_end(tokenizer, **{x: vocabulary.token(x) for x in ("bos", "eos") if add[f"add_{x}_token"]})
    content = {"tokenizer.json": tokenizer.to_str().encode(), "tokenizer.model": model_file(pieces, vocabulary.special)}
    return content, {"tokenizer_class": "PreTrainedTokenizerFast", **add}


_MODELS: dict[str, Callable[[Metadata, _Vocabulary], tuple[dict[str, bytes], dict[str, Any]]]] = {
    "gpt2": _byte_level,
    "llama": _sentencepiece,
}


def _added(metadata: Metadata, vocabulary: _Vocabulary, bos: bool) -> dict[str, bool]:
    """Whether a prompt begins with BOS and ends with EOS."""
    added = {
        "add_bos_token": metadata.flag(_TOKENS + "add_bos_token", bos),
        "add_eos_token": metadata.flag(_TOKENS + "add_eos_token", False),
    }
    for name in ("bos", "eos"):
        if added[f"add_{name}_token"] and name not in vocabulary.special:
            raise ValueError(f"{metadata.path}: tokenizer.ggml.add_{name}_token without a {name}_token_id")
    return added


def _ends(metadata: Metadata, vocabulary: _Vocabulary) -> list[int]:
    """Tokens that end a completion: of a text, and of a turn or message where these are others."""
    keys = [key for key in ("eos_token_id", "eot_token_id", "eom_token_id") if _TOKENS + key in metadata]
    return list(dict.fromkeys(vocabulary.number(key) for key in keys))


def _chat_template(metadata: Metadata) -> str | list[dict[str, str]]:
    """``chat_template`` of tokenizer_config.json: text, or a list when the file has several."""
    default, prefix = metadata.text("tokenizer.chat_template", ""), "tokenizer.chat_template."
    named = {key.removeprefix(prefix): metadata.text(key) for key in metadata.keys() if key.startswith(prefix)}
    if not named:
        return default
    return [{"name": name, "template": text} for name, text in {"default": default, **named}.items() if text]
