"""Datasets that Megatron-LM wrote: described after a look at every id, and trained on."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy
import pytest
import torch
from helpers.corpus import SEQ
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megatron.dmc import cli
from megatron.dmc.config import RunConfig
from megatron.dmc.training import describe as describing
from megatron.dmc.training.data import build_datasets, check_datasets
from megatron.dmc.training.describe import DescribeConfig, describe
from megatron.dmc.training.indexed_writer import Sidecar
from megatron.dmc.training.tokenizer import Tokenizer

LENGTHS = (40, 7, 1, 120, 33)


def documents(tokenizer: Tokenizer, eod: bool = True, bos: bool = False) -> list[list[int]]:
    generator = numpy.random.default_rng(5)
    body = [generator.integers(10, tokenizer.vocab_size, n).tolist() for n in LENGTHS]
    begin, end = [tokenizer.bos_id] * bos, [tokenizer.eod_id] * eod
    return [[*begin, *ids, *end] for ids in body]


def write(prefix: Path, docs: list[list[int]], dtype: type = numpy.int32, **settings: bool) -> str:
    """As Megatron-LM's preprocess_data.py writes a dataset. Returns the prefix."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype, **settings)
    for ids in docs:
        if settings:
            builder.add_item(torch.tensor(ids), mode=1)
            builder.end_document()
        else:
            builder.add_document(torch.tensor(ids), [len(ids)])
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


def described(prefix: str, tokenizer: Tokenizer, **settings: bool) -> str:
    return describe(DescribeConfig(prefix, tokenizer.path, **settings))


@pytest.mark.parametrize("dtype", [numpy.uint16, numpy.int16, numpy.int32, numpy.int64])
def test_describe_and_train(config: RunConfig, tokenizer: Tokenizer, tmp_path: Path, dtype: type) -> None:
    docs = documents(tokenizer)
    prefix = write(tmp_path / "theirs", docs, dtype)
    config.data.data_path = [prefix]
    with pytest.raises(ValueError, match=f"run dmc data describe {prefix} --tokenizer"):
        check_datasets(config, tokenizer)
    report = described(prefix, tokenizer)
    assert f"5 documents, {sum(LENGTHS) + 5} tokens ({dtype.__name__})" in report
    assert tokenizer.decode(docs[0][:24]) in report or repr(tokenizer.decode(docs[0][:24])) in report
    sidecar = Sidecar.read(prefix)
    assert (sidecar.documents, sidecar.tokens, sidecar.dtype) == (5, sum(LENGTHS) + 5, dtype.__name__)
    assert (sidecar.eod_appended, sidecar.bos_prepended, sidecar.described) == (True, False, True)
    warned = check_datasets(config, tokenizer)
    assert any("could not be checked" in line and prefix in line for line in warned)
    train, _ = build_datasets(config, tokenizer, 4, 0)
    stream = {tuple(ids[i : i + 5]) for ids in docs for i in range(len(ids) - 4)}
    sample = train[0]["tokens"].tolist()
    assert len(sample) == SEQ and any(tuple(sample[i : i + 5]) in stream for i in range(SEQ - 4))


def test_the_command(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What preprocess wrote, without its sidecar, is described as what it is."""
    for suffix in (".bin", ".idx"):
        shutil.copy(corpus / f"a{suffix}", tmp_path / f"a{suffix}")
    argv = ["data", "describe", str(tmp_path / "a"), "--tokenizer", str(corpus / "tokenizer.model")]
    assert cli.main(argv) == 0
    assert f"--data-path {tmp_path / 'a'}" in capsys.readouterr().out
    ours, theirs = (json.loads(Path(f"{d / 'a'}.json").read_text()) for d in (corpus, tmp_path))
    assert theirs.pop("described") is True and ours.pop("described") is False
    assert ours == theirs
    assert cli.main(argv) == 2
    assert "exists already; add --overwrite" in capsys.readouterr().err
    assert cli.main([*argv, "--overwrite"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.bin", "a.idx", "a.json"]


def test_beginnings_and_ends(tokenizer: Tokenizer, tmp_path: Path) -> None:
    both = write(tmp_path / "both", documents(tokenizer, bos=True))
    described(both, tokenizer)
    assert (Sidecar.read(both).eod_appended, Sidecar.read(both).bos_prepended) == (True, True)
    mixed = write(tmp_path / "mixed", documents(tokenizer, bos=True)[:2] + documents(tokenizer, eod=False)[2:])
    described(mixed, tokenizer)
    assert (Sidecar.read(mixed).eod_appended, Sidecar.read(mixed).bos_prepended) == (False, None)
    none = write(tmp_path / "none", documents(tokenizer, eod=False))
    assert "warning: no document ends with" in described(none, tokenizer)


def test_several_sequences_a_document(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """--split-sentences: only a document's last sequence ends with EOD."""
    builder = IndexedDatasetBuilder(str(tmp_path / "s.bin"), dtype=numpy.uint16)
    builder.add_document(torch.tensor([11, 12, 13, tokenizer.eod_id]), [2, 2])
    builder.add_document(torch.tensor([14, tokenizer.eod_id]), [2])
    builder.finalize(str(tmp_path / "s.idx"))
    described(str(tmp_path / "s"), tokenizer)
    assert (Sidecar.read(tmp_path / "s").documents, Sidecar.read(tmp_path / "s").eod_appended) == (2, True)


@pytest.mark.parametrize("block", [3, 1 << 20])
def test_every_id_is_looked_at(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    monkeypatch.setattr(describing, "_BLOCK", block)
    for place, document in ((0, 0), (41, 1), (sum(LENGTHS) + 4, 4)):
        for wrong in (tokenizer.vocab_size, -1):
            docs = documents(tokenizer)
            at = place - sum(len(ids) for ids in docs[:document])
            docs[document][at] = wrong
            prefix = write(tmp_path / "odd", docs)
            with pytest.raises(ValueError, match=f"id {wrong}, number {place} of all and in document {document}, is"):
                described(prefix, tokenizer)
            assert not Path(f"{prefix}.json").exists()
    prefix = write(tmp_path / "good", documents(tokenizer))
    assert f"{sum(LENGTHS) + 5} tokens" in described(prefix, tokenizer)


def damage_bin(prefix: str) -> None:
    os.truncate(f"{prefix}.bin", os.path.getsize(f"{prefix}.bin") - 4)


def change_index(place: int, value: bytes):
    def change(prefix: str) -> None:
        with open(f"{prefix}.idx", "r+b") as file:
            file.seek(place)
            file.write(value)

    return change


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_bin, "one of them is damaged"),
        (lambda p: os.truncate(f"{p}.idx", 50), "header says"),
        (lambda p: os.truncate(f"{p}.idx", 5), "is no index"),
        (change_index(0, b"TNTIDX\0\0"), "older TNTIDX"),
        (change_index(9, b"\x02"), "version 2"),
        (change_index(17, b"\x07"), "float32; training needs integers"),
        (change_index(17, b"\x63"), "type 99"),
        (change_index(18, b"\xff" * 8), "header says"),
        (change_index(34, b"\x05\0\0\0"), "sequence 1 does not begin where"),
        (change_index(34, b"\xff\xff\xff\xff"), "sequence 0 does not begin where"),
        (change_index(34 + 12 * 5 + 8, b"\x63"), "not in order"),
        (change_index(34 + 12 * 5 + 40, b"\x04"), "end at sequence 4 of 5"),
        (lambda p: Path(f"{p}.bin").unlink(), "does not exist"),
    ],
)
def test_damage_is_named(tokenizer: Tokenizer, tmp_path: Path, damage, message: str) -> None:
    prefix = write(tmp_path / "x", documents(tokenizer))
    damage(prefix)
    with pytest.raises(ValueError, match=message) as error:
        described(prefix, tokenizer)
    assert prefix in str(error.value) and not Path(f"{prefix}.json").exists()


def test_multimodal_is_refused_by_name(tokenizer: Tokenizer, tmp_path: Path) -> None:
    prefix = write(tmp_path / "m", documents(tokenizer), multimodal=True)
    with pytest.raises(ValueError, match="is multimodal"):
        described(prefix, tokenizer)
