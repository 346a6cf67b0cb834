"""Fixtures of the tests of data: a corpus, its tokenizer and datasets, and a run on them."""

import dataclasses
import os
from pathlib import Path

import pytest
from helpers.corpus import SEQ, preprocess, write_jsonl

from megatron.dmc.config import RunConfig
from megatron.dmc.training.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def texts():
    """Small files of the standard library."""
    import build_corpus  # helpers.corpus has put its folder on the path

    found = [text for _, text in build_corpus.source_files(Path(os.__file__).parent / "json")]
    found += [text for _, text in build_corpus.source_files(Path(os.__file__).parent / "email")]
    assert len(found) > 15
    return found


@pytest.fixture(scope="module")
def corpus(tmp_path_factory, texts):
    """A directory with tokenizer.model, other.model, and datasets a (most documents) and b (the last five)."""
    import build_corpus

    directory = tmp_path_factory.mktemp("corpus")
    build_corpus.train_tokenizer(texts, 512, directory / "tokenizer.model")
    build_corpus.train_tokenizer(texts, 600, directory / "other.model")
    for name, part in (("a", texts[:-5]), ("b", texts[-5:])):
        write_jsonl(directory / f"{name}.jsonl", part)
        assert preprocess(directory, f"{name}.jsonl", name) == 0
    return directory


@pytest.fixture(scope="module")
def tokenizer(corpus):
    return load_tokenizer(corpus / "tokenizer.model")


@pytest.fixture
def config(corpus, tmp_path):
    """A run on dataset a, validated on b, that check_datasets accepts."""
    config = RunConfig()
    config.model.vocab_size = 512
    config.data = dataclasses.replace(
        config.data,
        data_path=[str(corpus / "a")],
        valid_data_path=[str(corpus / "b")],
        seq_length=SEQ,
        data_cache_path=str(tmp_path / "cache"),
    )
    return config
