"""Perplexity of a checkpoint with hard decisions, and the compression of each head on the same text."""

import dataclasses
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from megatron.dmc.evaluation.load import Loaded
from megatron.dmc.training import initialize
from megatron.dmc.training.data import batch_iterator, build_datasets, check_datasets
from megatron.dmc.training.tokenizer import Tokenizer


@dataclasses.dataclass
class Quality:
    """Loss and compression of one checkpoint on one validation set."""

    tokens: int
    lm_loss: float
    cr: float
    """Tokens / slots over all layers, heads and sequences; under DMS the window's tokens are among the slots."""
    cr_by_head: Tensor
    """Tokens / slots of each head: fp64 [layers, KV heads]."""
    warnings: list[str]
    """What :func:`check_datasets` has found odd about the validation set."""

    @property
    def perplexity(self) -> float:
        return math.exp(self.lm_loss)


def _batches(loaded: Loaded, tokenizer: Tokenizer, prefix: str, sequences: int, batch: int) -> Iterator[dict]:
    config = loaded.config
    _, data = build_datasets(config, tokenizer, 1, sequences)
    return batch_iterator(
        data,
        consumed_samples=0,
        micro_batch_size=batch,
        global_batch_size=batch,
        dp_rank=0,
        dp_size=1,
        device=initialize.device(),
    )


@torch.no_grad()
def measure(loaded: Loaded, tokenizer: Tokenizer, prefix: str, sequences: int, batch: int = 8) -> Quality:
    """Mean loss over the first ``sequences`` (rounded down to whole batches) of the dataset ``prefix``."""
    config, loss, tokens = loaded.config, 0.0, 0
    config.data.data_path, config.data.valid_data_path = [prefix], [prefix]
    warnings = check_datasets(config, tokenizer)
    m = config.model
    held = torch.zeros(m.num_layers, m.kv_heads, dtype=torch.float64)
    batch = min(batch, sequences)
    iterator = _batches(loaded, tokenizer, prefix, sequences // batch * batch, batch)
    for _ in range(sequences // batch):
        item = next(iterator)
        step = loaded.step()
        losses = loaded.model(item["tokens"], item["position_ids"], labels=item["labels"], step=step)
        loss += float((losses.double() * item["loss_mask"]).sum())
        tokens += losses.numel()
        for layer, count in step.held.items():
            held[layer - 1] += count.sum(dim=0).double().cpu()
    if not loaded.compresses:
        held.fill_(tokens)
    return Quality(tokens, loss / tokens, tokens * held.numel() / float(held.sum()), tokens / held, warnings)
