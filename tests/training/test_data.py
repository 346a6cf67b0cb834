"""Datasets: what is refused, samples, blends, the index cache. No network, no GPU, a few seconds."""

import multiprocessing
import os
from pathlib import Path

import numpy
import pytest
import torch
from helpers.corpus import SEQ, SUFFIXES, bytes_of, preprocess

from megatron.dmc.training.data import build_datasets, check_datasets, parse_blend
from megatron.dmc.training.indexed_writer import Sidecar
from megatron.dmc.training.tokenizer import load_tokenizer

# check_datasets


def test_good_data_passes(config, tokenizer):
    check_datasets(config, tokenizer)
    config.data.data_path = ["0.3", config.data.data_path[0], "7", config.data.valid_data_path[0]]
    check_datasets(config, tokenizer)


def test_blends():
    assert parse_blend([]) == ([], None)
    assert parse_blend(["/a", "/b"]) == (["/a", "/b"], None)
    assert parse_blend(["2", "/a", "0.5", "/b"]) == (["/a", "/b"], [2.0, 0.5])
    for wrong in (["2", "/a", "/b"], ["1", "2"], ["/a", "1"], ["0", "/a"], ["-1", "/a"], ["nan", "/a"]):
        with pytest.raises(ValueError, match="weight"):
            parse_blend(wrong)


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda p: Path(f"{p}.bin").unlink(), "x.bin does not exist"),
        (lambda p: Path(f"{p}.idx").unlink(), "x.idx does not exist"),
        (lambda p: Path(f"{p}.json").unlink(), "has no x.json: if other software made it"),
        (lambda p: Path(f"{p}.json").write_text("{}"), "x.json is not a version 1 dataset description"),
        (lambda p: os.truncate(f"{p}.bin", 100), "x.bin has 100 bytes and should have"),
        (lambda p: os.truncate(f"{p}.idx", 100), "x.idx has 100 bytes and should have"),
    ],
)
def test_damaged_data_is_refused(corpus, config, tokenizer, tmp_path, damage, message):
    for suffix, content in zip(SUFFIXES, bytes_of(corpus / "a")):
        (tmp_path / f"x{suffix}").write_bytes(content)
    config.data.valid_data_path = [str(tmp_path / "x")]
    check_datasets(config, tokenizer)
    damage(tmp_path / "x")
    with pytest.raises(ValueError, match="valid_data_path.*" + message if "exist" in message else message):
        check_datasets(config, tokenizer)


def test_data_that_does_not_fit_is_refused(corpus, config, tokenizer):
    with pytest.raises(ValueError, match="another tokenizer"):
        config.model.vocab_size = 600
        check_datasets(config, load_tokenizer(corpus / "other.model"))
    with pytest.raises(ValueError, match="512 ids, the model's vocab_size is 500"):
        config.model.vocab_size = 500
        check_datasets(config, tokenizer)
    config.model.vocab_size = 512
    with pytest.raises(ValueError, match="smaller seq_length"):
        config.data.seq_length = 10**6
        check_datasets(config, tokenizer)
    with pytest.raises(ValueError, match="prefix without .bin"):
        config.data.data_path = [str(corpus / "a.bin")]
        check_datasets(config, tokenizer)
    with pytest.raises(ValueError, match="data_path is empty"):
        config.data.data_path = []
        check_datasets(config, tokenizer)


# build_datasets


def test_samples_are_shifted_pieces_of_the_data(config, tokenizer, corpus):
    tokens = Sidecar.read(corpus / "a").tokens
    train, valid = build_datasets(config, tokenizer, 3 * tokens // SEQ, 5)  # three epochs
    assert len(train) >= 3 * tokens // SEQ and len(valid) >= 5
    stream = " ".join(map(str, numpy.fromfile(corpus / "b.bin", dtype=numpy.uint16)))
    inside = 0
    for i in range(10):
        sample = valid[i]
        assert set(sample) == {"tokens", "labels", "loss_mask", "position_ids"}
        assert sample["tokens"].dtype == torch.int64 and sample["tokens"].shape == (SEQ,)
        assert torch.equal(sample["tokens"][1:], sample["labels"][:-1])
        assert sample["loss_mask"].tolist() == [1.0] * SEQ and sample["position_ids"].tolist() == list(range(SEQ))
        inside += " ".join(map(str, [*sample["tokens"].tolist(), int(sample["labels"][-1])])) in stream
    assert inside >= 8  # the others lie across two documents, which are shuffled
    config.data.valid_data_path = []
    assert build_datasets(config, tokenizer, 0, 5) == (None, None)


@pytest.mark.parametrize("weights", [(), ("1", "3")])
def test_blend_repeats_and_needs_no_process_group(config, tokenizer, corpus, weights):
    paths = [str(corpus / "a"), str(corpus / "b")]
    config.data.data_path = [item for pair in zip(weights, paths) for item in pair] or paths
    tokens = [Sidecar.read(path).tokens for path in paths]
    samples = 2 * sum(tokens) // SEQ
    train, _ = build_datasets(config, tokenizer, samples, 0)
    assert len(train) >= samples and not torch.distributed.is_initialized()
    share = numpy.mean([train[i]["dataset_id"] for i in range(samples)])
    assert share == pytest.approx(0.75 if weights else tokens[1] / sum(tokens), abs=0.01)
    again, _ = build_datasets(config, tokenizer, samples, 0)
    assert all(torch.equal(train[i]["tokens"], again[i]["tokens"]) for i in range(0, samples, 97))


def test_index_cache_is_published_whole_and_follows_the_data(corpus, config, tokenizer, tmp_path, monkeypatch):
    cache, prefix = tmp_path / "cache", str(tmp_path / "x")
    preprocess(corpus, "a.jsonl", prefix)
    config.data.data_path, config.data.valid_data_path = [prefix], []

    import megatron.dmc.training.data as data

    class Interrupted(data.GPTDataset):
        def __init__(self, *args):
            super().__init__(*args)
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(data, "GPTDataset", Interrupted)
        build_datasets(config, tokenizer, 20, 0)
    assert list(cache.iterdir()) == []

    build_datasets(config, tokenizer, 20, 0)
    entries = [path.name for path in cache.iterdir()]
    assert len(entries) == 1 and not entries[0].startswith(".")
    stamps = {path: path.stat().st_mtime_ns for path in cache.rglob("*.npy")}
    build_datasets(config, tokenizer, 20, 0)  # loads
    assert stamps and stamps == {path: path.stat().st_mtime_ns for path in cache.rglob("*.npy")}

    preprocess(corpus, "b.jsonl", prefix, "--overwrite")  # other documents under the same name
    train, _ = build_datasets(config, tokenizer, 20, 0)
    assert len(list(cache.iterdir())) == 2
    assert len(train) == (Sidecar.read(prefix).tokens - 1) // SEQ

    config.data.data_cache_path = str(corpus / "a.jsonl" / "cache")
    with pytest.raises(ValueError, match="cannot be written.*data_cache_path"):
        build_datasets(config, tokenizer, 20, 0)


def _rank(rank, world, store, config, tokenizer, results):
    torch.set_num_threads(1)  # forked: OpenMP must not start threads
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.FileStore(store, world), rank=rank, world_size=world
    )
    train, valid = build_datasets(config, tokenizer, 100, 10)
    results.put((rank, [train[i]["tokens"].sum().item() for i in range(100)] + [len(valid)]))
    torch.distributed.barrier()


@pytest.mark.parametrize("world", [2, 4])
def test_every_rank_gets_the_same_datasets(config, tokenizer, tmp_path, corpus, world):
    config.data.data_path = [str(corpus / "a"), str(corpus / "b")]
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    ranks = [
        context.Process(target=_rank, args=(rank, world, str(tmp_path / "store"), config, tokenizer, results))
        for rank in range(world)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
    assert [process.exitcode for process in ranks] == [0] * world
    got = dict(results.get() for _ in ranks)
    assert all(got[rank] == got[0] for rank in range(world))
    config.data.data_cache_path = str(tmp_path / "other")
    alone = build_datasets(config, tokenizer, 100, 10)[0]
    assert [alone[i]["tokens"].sum().item() for i in range(100)] == got[0][:100]
