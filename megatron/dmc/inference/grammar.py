"""Grammars of structured outputs: compiled once, followed by each completion, made into masks over the vocabulary.

llguidance does the work (MIT; a Rust library with an Earley parser over a lexer of derivatives). It bounds its effort
by counts, not by time, so that every rank of a tensor-parallel group finds the same constraints too complex.
docs/lab_book.md has the comparison with xgrammar.
"""

import json
import re
import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from typing import Any, Optional

import numpy as np
import torch
from torch import Tensor

from megatron.dmc.inference.structured_outputs import StructuredOutputsParams, refuse

LIMITS = {
    "initial_lexer_fuel": 500_000,
    "step_lexer_fuel": 50_000,
    "step_max_items": 20_000,
    "max_lexer_states": 20_000,
    "max_grammar_size": 100_000,
    "precompute_large_lexemes": False,
    "verbose_errors": False,
}
"""Bounds of llguidance on compiling a grammar (about a second) and on one mask (tens of milliseconds at worst)."""
WHITESPACE = r"[\x20\x0A\x0D\x09]{1,40}"
"""Whitespace between JSON's tokens: enough to indent, and no model can write blanks until its tokens are used up."""
MAX_GRAMMARS = 128
MAX_CACHED_CHARACTERS = 4 << 20


class GrammarState:
    """Place of one completion in its grammar."""

    __slots__ = ("error", "matcher", "words")

    def __init__(self, matcher: Any, words: int) -> None:
        self.matcher, self.words = matcher, words
        """llguidance's matcher, and the words of 32 bits of its masks."""
        self.error: Optional[str] = None
        """Reason why the completion cannot go on."""

    def accept(self, token: int) -> None:
        """Follow a token of the completion."""
        self.matcher.consume_token(token)

    def check(self, allows_any: bool) -> bool:
        """Whether the completion can go on, after a mask was made that ``allows_any`` token or none."""
        if self.matcher.is_error():
            self.error = f"the structured output became too complex: {_one_line(self.matcher.get_error())}"
        elif not allows_any:
            self.error = "no token of the vocabulary continues the structured output"
        return self.error is None


class Grammar:
    """Compiled grammar, shared by all requests that ask for it."""

    def __init__(self, matcher: Any, words: int) -> None:
        self._matcher, self._words = matcher, words

    def start(self) -> GrammarState:
        """Place before the first token of a completion."""
        return GrammarState(self._matcher.deep_copy(), self._words)

    def __reduce__(self) -> Any:
        return type(None), ()  # on its way to another rank, which takes the tokens that rank 0 samples


class GrammarCompiler:
    """Compiles constraints for one tokenizer, and keeps those used last. Threads may share it."""

    def __init__(self, tokenizer: Optional[Any], vocab_size: int, eos_token_ids: frozenset[int]) -> None:
        self._tokenizer, self._vocab_size, self._eos = tokenizer, vocab_size, eos_token_ids
        self._found: OrderedDict[tuple[Any, ...], Grammar] = OrderedDict()
        self._characters = 0
        self._lock, self._loading = threading.Lock(), threading.Lock()

    def compile(self, params: StructuredOutputsParams) -> Grammar:
        """The grammar of a constraint. Does not hold the interpreter's lock while it works.

        Raises:
            InvalidRequest: a constraint that cannot be compiled, that is too complex, or that no token can begin; no
                llguidance, or a tokenizer or a model that it cannot work with.
        """
        key = (params.kind, params.source, params.disable_any_whitespace, params.whitespace_pattern)
        with self._lock:
            if (grammar := self._found.get(key)) is not None:
                self._found.move_to_end(key)
                return grammar
        grammar = self._compile(params, key[1])
        with self._lock:
            if key not in self._found:
                self._found[key] = grammar
                self._characters += len(key[1])
            while len(self._found) > MAX_GRAMMARS or self._characters > MAX_CACHED_CHARACTERS:
                (_, source, *_), _ = self._found.popitem(last=False)
                self._characters -= len(source)
        return grammar

    def load(self) -> None:
        """Read the vocabulary now, which takes a second for a large one and holds the interpreter's lock.

        Raises:
            InvalidRequest: no llguidance, or a tokenizer that it cannot work with.
        """
        with self._loading:
            _ = self._llguidance_tokenizer

    def _compile(self, params: StructuredOutputsParams, source: str) -> Grammar:
        name = "json_object" if params.json_object else params.kind
        self.load()
        from llguidance import LLMatcher, LLParserLimits

        try:
            grammar = _grammar_text(params, source)
        except Exception as error:  # the translation of GBNF raises what it likes
            raise refuse(f"cannot be compiled: {_one_line(str(error))}", name) from None
        matcher = LLMatcher(self._llguidance_tokenizer, grammar, log_level=0, limits=LLParserLimits(**LIMITS))
        # The first mask belongs to the compilation: it shows what is too complex, or cannot begin, while it is a 400.
        first = b"" if matcher.is_error() else matcher.compute_bitmask()
        if matcher.is_error():
            raise refuse(f"cannot be compiled: {_one_line(matcher.get_error())}", name)
        if not _allowed(np.frombuffer(first, np.uint8), self._vocab_size).any():
            raise refuse("cannot be met: no token of the vocabulary begins it", name)
        return Grammar(matcher, -(-self._llguidance_tokenizer.vocab_size // 32))

    @cached_property
    def _llguidance_tokenizer(self) -> Any:
        """The vocabulary as a trie of bytes."""
        try:
            import llguidance
        except ImportError:
            raise refuse("is not supported: llguidance is not installed; pip install 'megatron-dmc[serve]'") from None
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        if backend is None:
            kind = type(self._tokenizer).__name__
            raise refuse(
                "is not supported: the model has no tokenizer"
                if self._tokenizer is None
                else f"is not supported: a {kind} has no tokenizer.json"
            )
        size = backend.get_vocab_size(with_added_tokens=True)
        ends = sorted(token for token in self._eos if token < size)
        if not ends:
            raise refuse("is not supported: the tokenizer has no end-of-sequence token")
        try:
            return llguidance.LLTokenizer(
                _plain_tokenizer(backend.to_str()), n_vocab=max(self._vocab_size, size), eos_token=ends
            )
        except BaseException as error:
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":  # Rust's, of no module
                raise
            raise refuse(f"is not supported: llguidance cannot read the tokenizer: {_one_line(str(error))}") from None


def _plain_tokenizer(described: str) -> str:
    """A tokenizer.json whose special tokens have names that no text holds.

    Where a grammar leaves no choice of bytes, llguidance 1.9 allows only the tokens of the tokenizer's own encoding. It
    takes an added token for special when it is marked so or written ``<...>``, encodes its name as that one token, and
    then finds that the token does not match the text. With other names the text is written in plain tokens.
    """
    tokenizer = json.loads(described) | {"padding": None, "truncation": None, "post_processor": None}
    names = {}
    for token in tokenizer["added_tokens"]:
        name = token["content"]
        if token["special"] or (name.startswith("<") and name.endswith(">")):
            names[name] = token["content"] = f"\U0010ffff{token['id']}"
            token["special"] = True
    model = tokenizer["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {names.get(name, name): token for name, token in model["vocab"].items()}
    else:  # Unigram's pairs of a piece and its score
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in model["vocab"]]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    return json.dumps(tokenizer, ensure_ascii=False)


def _grammar_text(params: StructuredOutputsParams, source: str) -> str:
    """The constraint as llguidance takes it. Raises ``ValueError``, and for a grammar in GBNF anything."""
    from llguidance import LLMatcher, grammar_from, regex_to_lark

    if params.kind == "regex":
        # Digits are 0 to 9, as in most engines; those of other scripts match Rust's \d too.
        return LLMatcher.grammar_from_lark(f"start: /{regex_to_lark(source, use_ascii='d')}/")
    if params.kind == "choice":
        return LLMatcher.grammar_from_regex("|".join(re.escape(text) for text in json.loads(source)))
    if params.kind == "grammar":
        return grammar_from("grammar", source)
    options = {
        "whitespace_flexible": not params.disable_any_whitespace,
        "whitespace_pattern": params.whitespace_pattern or (None if params.disable_any_whitespace else WHITESPACE),
        # Whatever a schema asks for in x-guidance: what is written is JSON, and a keyword is enforced or an error.
        "lenient": False,
        "coerce_one_of": False,
        "item_separator": ",",
        "key_separator": ":",
    }
    return LLMatcher.grammar_from_json_schema(source, overrides=options)


def _one_line(message: str) -> str:
    """What a message of llguidance says, without its drawing of the place."""
    lines = [line for line in message.replace("<non-verbose/>", "").splitlines() if not re.match(r"\s*(\d+ )?\|", line)]
    return " ".join(" ".join(lines).split())[:300]


def _allowed(packed: np.ndarray, vocab_size: int) -> np.ndarray:
    """Masks of a bit per token as bytes of 0 and 1: uint8 [..., bytes] -> uint8 [..., vocab_size]."""
    return np.unpackbits(packed, axis=-1, bitorder="little", count=vocab_size)


class TokenMasks:
    """Masks of one step: which tokens may come next, of those rows that have a grammar."""

    def __init__(self, states: list[tuple[int, GrammarState]], allowed: np.ndarray) -> None:
        self.states = states
        self.rows = torch.tensor([row for row, _ in states])
        self.allowed = torch.from_numpy(allowed).view(torch.bool)
        """bool [rows with a grammar, vocabulary]"""

    def apply(self, logits: Tensor) -> tuple[Tensor, list[int]]:
        """Logits of which those that are not allowed are -inf, as a copy: fp32 [n, vocabulary]; and the rows of which
        nothing is allowed.
        """
        rows = self.rows.to(logits.device)
        allowed = self.allowed.to(logits.device, non_blocking=True)
        if len(self.states) == len(logits):
            logits = logits.masked_fill(~allowed, -torch.inf)
        else:
            logits = logits.index_copy(0, rows, logits[rows].masked_fill_(~allowed, -torch.inf))
        some = self.allowed.any(dim=-1).tolist()
        return logits, [row for (row, state), any_ in zip(self.states, some) if not state.check(any_)]


class MaskFiller:
    """Fills the masks of a step on a thread of its own, while the model runs."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._thread: Optional[ThreadPoolExecutor] = None

    def start(self, states: Sequence[Optional[GrammarState]]) -> Optional[Future[TokenMasks]]:
        """Begin with the masks of a step.

        Args:
            states: place in its grammar of each sequence that samples; None for those without a grammar.

        Returns:
            The masks, to be waited for before any of the states is used again; None when no sequence has a grammar.
        """
        rows = [(row, state) for row, state in enumerate(states) if state is not None]
        if not rows:
            return None
        if self._thread is None:
            from llguidance import LLExecutor

            self._executor = LLExecutor()
            self._thread = ThreadPoolExecutor(1, "dmc-masks")
        return self._thread.submit(self._fill, rows)

    def _fill(self, rows: list[tuple[int, GrammarState]]) -> TokenMasks:
        words = rows[0][1].words
        packed = np.empty((len(rows), words), np.int32)
        matchers = [(state.matcher, at) for at, (_, state) in enumerate(rows)]
        self._executor.unsafe_compute_mask_ptr(matchers, packed.ctypes.data, 4 * words, len(rows))
        return TokenMasks(rows, _allowed(packed.view(np.uint8), self._vocab_size))
