"""Compare a checkpoint's logits with those that transformers computes from a Hugging Face directory."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.dmc.checkpoint.formats import adapter, hf
from megatron.dmc.checkpoint.formats.base import Given
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


def _reference(directory: hf.HFDirectory) -> torch.nn.Module:
    """The directory's model in fp32, by transformers with its own code or with this package's modelling file."""
    from transformers import AutoModelForCausalLM

    from megatron.dmc.checkpoint.remote_code.modeling_dmc import DMCForCausalLM

    # This package's own modelling file, not the copy in the directory: that could be anybody's.
    model_class = DMCForCausalLM if "dmc" in directory.config else AutoModelForCausalLM
    place: Optional[Path] = directory.path
    options: dict[str, Any] = dict(dtype=torch.float32, local_files_only=True)
    if directory.foreign is not None or directory.adapter is not None:
        # Another program's description, or adapters beside the model: the modelling file reads a ``dmc`` block.
        place, options["config"] = None, DMCForCausalLM.config_class.from_dict(directory.config)
        options["state_dict"] = {name: tensor.read() for name, tensor in directory.tensors.items()}
    return model_class.from_pretrained(place, trust_remote_code=False, **options)


@torch.no_grad()
def compare_logits(
    source: str | Path, load: str | Path, adapters: Optional[str | Path] = None, given: Given = Given()
) -> str:
    """Run both models in fp32 over fixed prompts and describe the difference. Both must fit into memory.

    Args:
        source: Hugging Face directory: a plain model, one of this package, or another program's DMS model.
        load: checkpoint.
        adapters: directory of DMS adapters for ``source``.
        given: what the caller says of another program's model.

    Raises:
        ValueError: the difference is more than rounding (``TOLERANCE``), or ``source`` cannot be loaded.
    """
    source = Path(source)
    directory = adapter.open_directory(source, adapters, given)
    try:
        reference = _reference(directory)
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
