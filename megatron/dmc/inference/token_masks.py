"""Tokens that a completion may hold: ``allowed_token_ids``, and the token sequences of ``bad_words``."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def bad_word_ids(tokenizer: Any, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    """Token ids of words, as they stand at the beginning of a text and behind a space."""
    texts = [text for word in words for text in (word.lstrip(), " " + word.lstrip())]
    found = (tuple(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts)
    return tuple(dict.fromkeys(ids for ids in found if ids))


class TokenMask:
    """Which token may come next in one completion."""

    def __init__(
        self, allowed: Sequence[int], bad_words: Sequence[Sequence[int]], device: torch.device | str = "cpu"
    ) -> None:
        """Args:
        allowed: token ids of which the completion consists; empty allows all.
        bad_words: token sequences of which none may be completed.
        """
        self.allowed = torch.tensor(sorted(set(allowed)), dtype=torch.long, device=device)
        self.banned = [ids[0] for ids in bad_words if len(ids) == 1]
        self.sequences = [tuple(ids) for ids in bad_words if len(ids) > 1]
        self._longest = max((len(ids) for ids in self.sequences), default=1) - 1
        self._recent: list[int] = []
        """The completion's last tokens, as many as may begin a bad word."""

    def record(self, token: int) -> None:
        """Append a token of the completion."""
        if self._longest:
            self._recent = [*self._recent, token][-self._longest :]

    def apply(self, logits: Tensor) -> None:
        """Forbid tokens in place: fp32 [vocabulary]. A mask that would leave no token is not applied."""
        masked = logits
        if len(self.allowed):
            masked = torch.full_like(logits, -math.inf)
            masked[self.allowed] = logits[self.allowed]
        recent = tuple(self._recent)
        banned = self.banned + [ids[-1] for ids in self.sequences if recent[1 - len(ids) :] == ids[:-1]]
        if banned:
            masked = masked.clone()
            masked[torch.tensor(banned, device=logits.device)] = -math.inf
        logits.copy_(torch.where(masked.amax() > -math.inf, masked, logits))
