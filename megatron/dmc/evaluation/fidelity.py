"""How far the predictions of compressed models are from those of their original, token by token, on the same text.

Everything is teacher-forced, with the decisions that inference takes. Memory beyond the models is that of one forward
pass, plus the logits of :data:`ROWS` positions of two models.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple, Optional, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.dmc.evaluation.policies import CachePolicy, FullCache
from megatron.dmc.evaluation.teacher_forced import Compression, TeacherForced

ROWS = 256  # positions whose logits are in memory at once


class Candidate(NamedTuple):
    """A model under a cache policy, to compare with the original."""

    model: TeacherForced
    policy: Optional[CachePolicy] = None
    """None: the model's own."""


@dataclass(frozen=True)
class Fidelity:
    """Predictions of tokens 1...s-1 of n sequences by a candidate and by the original."""

    log_prob: Tensor
    """Log-probability of the token that came, in nats: fp32 [n, s - 1]."""
    base_log_prob: Tensor
    """The same by the original: fp32 [n, s - 1]."""
    kld: Tensor
    """Kullback-Leibler divergence over the vocabulary, KL(original || candidate), in nats: fp32 [n, s - 1]."""
    agrees: Tensor
    """True where both find the same next token most likely: bool [n, s - 1]."""
    slots: Tensor
    """Slots held after each token by the candidate: int32 [layers, n, KV heads, s]."""

    def compression(self) -> Compression:
        return Compression.of(self.slots)

    @classmethod
    def cat(cls, parts: Sequence[Self]) -> Self:
        """Concatenate sequences of one length."""
        dims = {field.name: int(field.name == "slots") for field in fields(cls)}
        return cls(**{name: torch.cat([getattr(part, name) for part in parts], dim) for name, dim in dims.items()})


@torch.inference_mode()
def fidelity(base: TeacherForced, candidates: Sequence[Candidate], tokens: Tensor) -> list[Fidelity]:
    """Compare candidates with the original, which runs once for all of them; one sequence at a time.

    Args:
        base: the original, which runs with the full cache. A model with adapters is its own original.
        tokens: int64 [n, s], s at least 2; no padding.

    Raises:
        ValueError: a base that has given up channels for its decisions, another vocabulary, or see
            :meth:`TeacherForced.score`.
    """
    if base.info.dmc is not None and base.info.dmc.neuron != "none":
        raise ValueError(
            f"{base.info.path} decides by {base.info.dmc.decision_source} channels, which its attention has lost; "
            "name the original that it was retrofitted from"
        )
    size = base.info.model.vocab_size
    for model, _ in candidates:
        if model.info.model.vocab_size != size:
            raise ValueError(
                f"{model.info.path} has a vocabulary of {model.info.model.vocab_size} and {base.info.path} one of "
                f"{size}; name the model that it was made from"
            )
    if tokens.dim() != 2 or tokens.size(1) < 2:
        raise ValueError(f"tokens have shape {list(tokens.shape)}; give [sequences, at least 2 tokens]")
    parts = [_compare(base, candidates, row) for row in tokens.split(1)]
    return [Fidelity.cat(found) for found in zip(*parts)]


def divergence(q: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    """KL(p || q) in nats, and whether both find the same token most likely, of log-probabilities [m, vocabulary]: fp32
    and bool [m].
    """
    kld = F.kl_div(q, p, reduction="none", log_target=True).sum(dim=-1)
    return kld, q.argmax(dim=-1) == p.argmax(dim=-1)


def _compare(base: TeacherForced, candidates: Sequence[Candidate], tokens: Tensor) -> list[Fidelity]:
    """:func:`fidelity` of one sequence, tokens [1, s]."""
    (first, _), ran = base.hidden_states(tokens, FullCache()), [m.hidden_states(tokens, p) for m, p in candidates]
    predicted, labels = tokens.size(1) - 1, tokens[0, 1:].to(base.device)
    parts: list[list[tuple[Tensor, ...]]] = [[] for _ in candidates]
    for start in range(0, predicted, ROWS):
        rows = slice(start, min(start + ROWS, predicted))
        p, after = base.logits(first[0, rows]).log_softmax(dim=-1), labels[rows, None]
        for found, (model, _), (x, _) in zip(parts, candidates, ran):
            q = model.logits(x[0, rows]).log_softmax(dim=-1)
            found.append((q.gather(1, after)[:, 0], p.gather(1, after)[:, 0], *divergence(q, p)))
    joined = ([torch.cat(column).cpu()[None] for column in zip(*found)] for found in parts)
    return [Fidelity(*columns, slots.cpu()) for columns, (_, slots) in zip(joined, ran)]
