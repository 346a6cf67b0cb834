"""A dataset of random ids and a model for it, for measuring (and testing) training where no text is at hand."""

import argparse
import tempfile
from pathlib import Path

import torch

from megatron.dmc.config import DataConfig, ModelConfig, RunConfig, StageConfig, TrainingConfig
from megatron.dmc.training.indexed_writer import IndexedWriter, publish
from megatron.dmc.training.tokenizer import Tokenizer

VOCABULARY = 8192


class RandomIds(Tokenizer):
    """Stands in for a tokenizer whose text nobody reads."""

    path, bos_id, adds_bos, eod_id, fingerprint = "random", None, False, 0, "0" * 64

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def encode(self, text):
        raise AssertionError("there is no text")

    def decode(self, ids):
        raise AssertionError("there is no text")


def write_random_dataset(prefix: Path, tokens: int, vocab_size: int) -> None:
    """One document of uniformly random ids at ``prefix``."""
    with tempfile.TemporaryDirectory(dir=prefix.parent) as folder:
        writer = IndexedWriter(Path(folder), RandomIds(vocab_size), eod_appended=False, bos_prepended=False)
        writer.add(torch.randint(vocab_size, (tokens,)))
        writer.close()
        publish(Path(folder), prefix)


def run_config(args: argparse.Namespace, stage: StageConfig, prefix: Path, seq_length: int, **training) -> RunConfig:
    """Run on such a dataset: a model of --layers and --hidden, and fields of the ``training`` section."""
    model = ModelConfig(
        num_layers=args.layers,
        hidden_size=args.hidden,
        ffn_hidden_size=args.hidden * 8 // 3 // 32 * 32,
        num_attention_heads=args.hidden // 64,
        num_query_groups=getattr(args, "groups", None),
        kv_channels=64,
        vocab_size=VOCABULARY,
        max_position_embeddings=seq_length,
    )
    data = DataConfig(data_path=[str(prefix)], tokenizer="random", seq_length=seq_length)
    return RunConfig(model=model, stage=stage, data=data, training=TrainingConfig(**training))
