"""Compare a checkpoint's logits with those that transformers computes from a Hugging Face directory."""

from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.dmc.checkpoint.formats import dms, hf
from megatron.dmc.evaluation.load import load_checkpoint
from megatron.dmc.inference.text import load_tokenizer

TOLERANCE = 1e-3
"""Largest difference of fp32 logits, relative to the largest logit; rounding gives some 1e-5."""
_TEXT = (
    "The key-value cache of a language model grows with every token that it reads.",
    "def fibonacci(n):\n    a, b = 0, 1\n    while a < n:\n        a, b = b, a + b\n    return a\n",
)


@dataclass
class Difference:
    """Two models' logits over the same tokens."""

    tokens: int
    largest: float
    """Largest absolute difference."""
    scale: float
    """Largest absolute logit."""
    kl: float
    """Mean Kullback-Leibler divergence from the reference, nats per token."""
    agreement: float
    """Share of tokens with the same most likely next token."""

    @classmethod
    def of(cls, reference: Tensor, found: Tensor) -> Self:
        """Difference of two models' logits, [tokens, vocab] each."""
        p, q = F.log_softmax(reference.double(), -1), F.log_softmax(found.double(), -1)
        return cls(
            len(p),
            float((reference - found).abs().max()),
            float(reference.abs().max()),
            float((p.exp() * (p - q)).sum(-1).mean()),
            float((p.argmax(-1) == q.argmax(-1)).double().mean()),
        )

    def __str__(self) -> str:
        return (
            f"logits over {self.tokens} tokens: largest difference {self.largest:.2e} (of {self.scale:.3g}), KL "
            f"{self.kl:.2e} nats per token, same most likely token {self.agreement:.2%}"
        )


def prompts(directory: Path, vocab_size: int, longest: int) -> list[Tensor]:
    """Fixed prompts, int64 [tokens] each: two texts where there is a tokenizer, and random tokens in any case."""
    generator = torch.Generator().manual_seed(0)
    found = [torch.randint(vocab_size, (min(n, longest),), generator=generator) for n in (1, 17, 128)]
    if (tokenizer := load_tokenizer(directory)) is not None:
        texts = [torch.tensor(tokenizer(text)["input_ids"][:longest]) for text in _TEXT]
        found += [ids for ids in texts if len(ids) and int(ids.max()) < vocab_size]
    return found


@torch.no_grad()
def compare_logits(source: str | Path, load: str | Path) -> str:
    """Run both models in fp32 over fixed prompts and describe the difference. Both must fit into memory.

    Raises:
        ValueError: the difference is more than rounding (``TOLERANCE``), or transformers cannot load ``source``.
    """
    from transformers import AutoModelForCausalLM

    from megatron.dmc.checkpoint.remote_code.modeling_dmc import DMCForCausalLM

    source = Path(source)
    config, foreign = dms.canonical_config(source, hf.read_json(source / "config.json"))
    if foreign:
        raise ValueError(
            f"{source} is a DMS model described by {foreign.origin}, which transformers runs with that program's code; "
            "compare logits with what dmc convert export writes"
        )
    is_dmc = "dmc" in config
    try:
        # This package's own modelling file, not the copy in the directory: that could be anybody's.
        model_class = DMCForCausalLM if is_dmc else AutoModelForCausalLM
        reference = model_class.from_pretrained(
            source, dtype=torch.float32, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # transformers raises many types
        raise ValueError(f"transformers cannot load {source}: {' '.join(str(error).split())}") from error
    loaded = load_checkpoint(load)
    device = next(loaded.model.parameters()).device
    vocab = loaded.config.model.vocab_size
    theirs, ours = [], []
    for ids in prompts(source, vocab, loaded.config.model.max_position_embeddings):
        theirs.append(reference(ids[None]).logits[0])
        position = torch.arange(len(ids), device=device)[None]
        logits = loaded.model(ids[None].to(device), position, step=loaded.step())
        logits = logits[0] if isinstance(logits, tuple) else logits
        ours.append(logits[0, :, :vocab].float().cpu())
    difference = Difference.of(torch.cat(theirs), torch.cat(ours))
    if not difference.largest <= TOLERANCE * max(difference.scale, 1e-6):
        raise ValueError(f"{load} does not compute what {source} does: {difference}")
    return str(difference)
