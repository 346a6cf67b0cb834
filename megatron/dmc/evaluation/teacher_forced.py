"""Teacher-forced evaluation of a Hugging Face directory under any cache policy.

Evaluation goes layer by layer instead of token by token: a policy's choices in a layer depend on that layer alone. So
all matrix products run over whole sequences, and the result is still that of decoding.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Optional, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.dmc.checkpoint.formats import adapter
from megatron.dmc.evaluation.policies import DMC, DMS, CachePolicy, FullCache, Projections
from megatron.dmc.inference.decoder import Layer
from megatron.dmc.inference.model import Model
from megatron.dmc.inference.parallel import TensorParallel
from megatron.dmc.inference.weights import dtype_of, read_info
from megatron.dmc.ops import attention_factor, decision_logits

LOGITS = 1024  # tokens whose logits are in memory at once


@dataclass
class Compression:
    """Compression ratio of a policy's cache, as tokens / slots over all layers, heads and sequences."""

    at_end: float
    """Ratio after the last token: the memory that a sequence ends with."""
    mean: float
    """Ratio in which every position counts alike: 1 / mean over positions of (slots / tokens)."""
    reads: float
    """Ratio of the tokens and slots summed over positions: the memory traffic of decoding the whole sequence."""
    by_head: Tensor
    """Ratio of each head after the last token: fp64 [layers, KV heads]."""
    by_position: Tensor
    """Ratio after each token: fp64 [s]."""

    @classmethod
    def of(cls, slots: Tensor) -> Self:
        """Ratios of ``slots`` [layers, b, ng, s], held after each token."""
        held = slots.double()
        tokens = torch.arange(1, slots.size(-1) + 1, dtype=torch.float64, device=slots.device)
        return cls(
            at_end=float(tokens[-1] / held[..., -1].mean()),
            mean=float(1 / (held / tokens).mean()),
            reads=float(tokens.mean() / held.mean()),
            by_head=(tokens[-1] / held[..., -1].mean(dim=1)).cpu(),
            by_position=(tokens / held.mean(dim=(0, 1, 2))).cpu(),
        )


@dataclass
class Scored:
    """Predictions of n tokens of each sequence: tokens 1...s-1, or after :meth:`TeacherForced.score_next` 1...s."""

    log_prob: Tensor
    """Log-probability of the token that came, in nats: fp32 [b, n]."""
    correct: Tensor
    """True where that token was the most likely one, which greedy decoding would have given: bool [b, n]."""
    slots: Tensor
    """Slots held after each token: int32 [layers, b, ng, s]."""

    def compression(self) -> Compression:
        return Compression.of(self.slots)

    def __getitem__(self, rows: slice) -> Self:
        return Scored(self.log_prob[rows], self.correct[rows], self.slots[:, rows])

    @classmethod
    def cat(cls, parts: list[Self]) -> Self:
        """Concatenate batches of sequences of one length."""
        names = (("log_prob", 0), ("correct", 0), ("slots", 1))
        return cls(**{name: torch.cat([getattr(part, name) for part in parts], dim=dim) for name, dim in names})


class TeacherForced(Model):
    """A Llama-family model, plain or exported with a ``dmc`` block, whose attention is a policy's."""

    @classmethod
    def load(
        cls,
        path: str | Path,
        dtype: str | torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        adapters: Optional[str | Path] = None,
    ) -> Self:
        """Load a Hugging Face directory, and the ``adapters`` of another one. Raises ``ValueError`` for a wrong one,
        naming key or tensor and the fix.
        """
        directory, where = adapter.open_directory(path, adapters), torch.device(device)
        info = read_info(directory)
        with adapter.checking(directory):
            return cls(directory, info, TensorParallel(), dtype_of(dtype, info, where), where)

    def own_policy(self) -> CachePolicy:
        """The policy that the model was trained for: DMC or DMS after their retrofit, else the full cache."""
        dmc = self.info.dmc
        if self.info.compresses and dmc is not None and self.info.decision_bias == dmc.decision_bias:
            return DMS(dmc.window or 1, dmc.decision_about) if dmc.evicts else DMC(dmc)
        return FullCache()

    @torch.inference_mode()
    def score(self, tokens: Tensor, policy: CachePolicy | None = None, batch: int = 8) -> Scored:
        """Score every token of the sequences by the ones before it, over caches that the policy has compressed.

        Args:
            tokens: int64 [n, s], s at least 2; no padding.
            policy: the cache policy; None: :meth:`own_policy`.
            batch: sequences at once.

        Raises:
            ValueError: ids beyond the vocabulary, sequences beyond the model's context length, or a policy that does
                not fit the model.
        """
        if tokens.dim() != 2 or tokens.size(1) < 2:
            raise ValueError(f"tokens have shape {list(tokens.shape)}; give [sequences, at least 2 tokens]")
        return self.score_next(tokens, tokens[:, 1:], policy, batch)

    @torch.inference_mode()
    def score_next(self, tokens: Tensor, labels: Tensor, policy: CachePolicy | None = None, batch: int = 8) -> Scored:
        """Score the token after each of the sequences' tokens; the last label itself never enters a cache.

        Args:
            tokens: int64 [n, s], no padding.
            labels: int64 [n, s] or, to leave out the last prediction, [n, s - 1].
            policy, batch: see :meth:`score`.

        Raises:
            ValueError: see :meth:`score`.
        """
        self._check(tokens, labels)
        policy = policy or self.own_policy()
        parts = zip(tokens.split(batch), labels.split(batch))
        return Scored.cat([self._score(part.to(self.device), after.to(self.device), policy) for part, after in parts])

    @torch.inference_mode()
    def hidden_states(self, tokens: Tensor, policy: CachePolicy | None = None) -> tuple[Tensor, Tensor]:
        """Hidden states after the final norm, [n, s, h], and the slots held after each token, int32 [layers, n, ng, s].

        Args:
            tokens: int64 [n, s], no padding.
            policy: see :meth:`score`.

        Raises:
            ValueError: see :meth:`score`.
        """
        self._check(tokens, tokens)
        return self._forward(tokens.to(self.device), policy or self.own_policy())

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """Logits of the next token: fp32 [m, vocabulary] of :meth:`hidden_states` [m, h]."""
        return self._logits(hidden)

    def _check(self, tokens: Tensor, labels: Tensor) -> None:
        vocabulary, longest = self.info.model.vocab_size, self.info.model.max_position_embeddings
        if tokens.size(1) > longest:
            raise ValueError(f"sequences of {tokens.size(1)} tokens exceed max_position_embeddings {longest}")
        low, high = (int(f(f(tokens), f(labels))) for f in (torch.min, torch.max))
        if low < 0 or high >= vocabulary:
            raise ValueError(f"token ids run from {low} to {high}; the vocabulary has {vocabulary}")

    def _decision_logits(self, layer: Layer, x: Tensor, q: Tensor, k: Tensor) -> Tensor | None:
        """Decision logits in a layer: fp32 [b, ng, s]; None for a plain model.

        Args:
            x: hidden states before the layer's input norm, [b * s, h].
            q, k: [b, np, s, D] and [b, ng, s, D], before the rotation.
        """
        dmc, (b, ng, s, _) = self.info.dmc, k.shape
        if dmc is None:
            return None
        if layer.adapter is not None:
            y = layer.adapter(x, self.info.model.norm_epsilon).view(b, s, -1).transpose(1, 2).expand(-1, ng, -1)
        else:
            y = (k if dmc.decision_source == "key" else q[:, :: q.size(1) // ng])[..., -1]
        return decision_logits(y, self.info.decision_bias, dmc.decision_scale)

    def _forward(self, tokens: Tensor, policy: CachePolicy) -> tuple[Tensor, Tensor]:
        (b, s), d = tokens.shape, self.head_dim
        x, slots = self._embed(tokens.flatten()), []
        factor = attention_factor(self.info.model.rope_scaling)
        for layer in self.layers:
            # [b * s, heads, D] -> [b, heads, s, D]
            q, k, v = (
                y.view(b, s, -1, d).transpose(1, 2).contiguous()
                for y in self.decoder.split(layer, layer.qkv(self._normed(x, layer.input_norm)))
            )
            neuron = "none" if self.info.dmc is None else self.info.dmc.neuron
            logits = self._decision_logits(layer, x, q, k)
            attended = policy.attend(Projections(q, k, v, self.attention.inv_freq, neuron, factor, logits))
            slots.append(attended.slots.to(torch.int32))
            x = x + layer.out(attended.out.transpose(1, 2).reshape(b * s, -1))
            x = x + layer.down(layer.gate_up(self._normed(x, layer.mlp_norm)))
        return self._normed(x, self.norm).view(b, s, -1), torch.stack(slots)

    def _normed(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, weight.shape, weight, self.info.model.norm_epsilon)

    def _score(self, tokens: Tensor, labels: Tensor, policy: CachePolicy) -> Scored:
        x, slots = self._forward(tokens, policy)
        x = x[:, : labels.size(1)].flatten(0, 1)
        log_prob, correct = [], []
        for rows, after in zip(x.split(LOGITS), labels.flatten().split(LOGITS)):
            logits = self._logits(rows)
            log_prob.append(-F.cross_entropy(logits, after, reduction="none"))
            correct.append(logits.argmax(dim=-1) == after)
        return Scored(torch.cat(log_prob).view_as(labels), torch.cat(correct).view_as(labels), slots)
