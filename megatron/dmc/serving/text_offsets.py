"""Bytes of tokens, and where each token of a choice begins in its text."""

import codecs
import re
from collections.abc import Callable, Collection, Sequence
from typing import Any, Optional

_PRINTABLE = (*range(33, 127), *range(161, 173), *range(174, 256))
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
BYTE_LEVEL = {chr(byte): byte for byte in _PRINTABLE} | {chr(256 + i): byte for i, byte in enumerate(_OTHERS)}
"""Byte of every character in the tokens of byte-level BPE, which writes unprintable ones from U+0100 on (GPT-2)."""


def bytes_of(token: str) -> Optional[bytes]:
    """Bytes of a token of the vocabulary that is part of a character; None when its form is not known."""
    if match := re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", token):  # byte fallback of sentencepiece
        return bytes.fromhex(match[1])
    return bytes(BYTE_LEVEL[c] for c in token) if token and all(c in BYTE_LEVEL for c in token) else None


def special_ids(tokenizer: Any) -> frozenset[int]:
    """Ids of the tokens that ``skip_special_tokens`` leaves out of a text."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return frozenset(tokenizer.all_special_ids) | {index for index, token in added.items() if token.special}


class TextOffsets:
    """Offset, in characters, of each token of one choice in its text: of the prompt's, for ``echo``, and then of the
    completion's as they come. A token that is not in the text, and a part of a character, has the offset of what is
    next.
    """

    def __init__(self, bytes_of: Callable[[int], bytes], special: Collection[int]) -> None:
        """Args:
        bytes_of: bytes of a token.
        special: tokens that are not in the text of a completion.
        """
        self._bytes_of, self._special = bytes_of, special
        self._offset = 0
        self._partial = b""
        """Bytes of a character that is not whole yet."""

    def of_prompt(self, text: str, ids: Sequence[int], special: Collection[int]) -> list[int]:
        """Offsets of a prompt's tokens.

        Args:
            text: the prompt, before which the choice has no text.
            ids: its tokens.
            special: tokens that need not be in the text, such as a BOS that the tokenizer has added.
        """
        data, at, found = text.encode(errors="surrogatepass"), 0, []
        starts = 0  # characters that begin before ``at``
        for token in ids:
            inside = at < len(data) and data[at] & 0xC0 == 0x80
            found.append(starts - inside)
            piece = self._bytes_of(token)
            if not data.startswith(piece, at):
                if at == 0 and data.startswith(piece.lstrip(b" ")):
                    piece = piece.lstrip(b" ")  # the space that a tokenizer puts before a text
                elif token in special:
                    piece = b""
            end = min(len(data), at + len(piece))
            starts += sum(byte & 0xC0 != 0x80 for byte in data[at:end])
            at = end
        self._offset = len(text)
        return found

    def of_completion(self, ids: Sequence[int]) -> list[int]:
        """Offsets of the completion's next tokens."""
        found = []
        for token in ids:
            piece = b"" if token in self._special else self._bytes_of(token)
            if self._partial and piece and piece[0] & 0xC0 != 0x80:  # the character will never be whole
                self._offset, self._partial = self._offset + 1, b""
            found.append(self._offset)
            decoder = codecs.getincrementaldecoder("utf-8")("replace")
            self._offset += len(decoder.decode(self._partial + piece))
            self._partial = decoder.getstate()[0]
        return found
