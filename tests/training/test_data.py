"""Tokenizers, tools/preprocess_data.py, datasets and batches. No network, no GPU, a few seconds."""

import dataclasses
import gzip
import json
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "examples" / "dmc")]  # spawned workers look there too

import build_corpus  # noqa: E402

from megatron.dmc import cli  # noqa: E402
from megatron.dmc.config import RunConfig  # noqa: E402
from megatron.dmc.training import preprocess as preprocessing  # noqa: E402
from megatron.dmc.training.data import Sidecar, batch_iterator, build_datasets, check_datasets, parse_blend  # noqa: E402
from megatron.dmc.training.tokenizer import load_tokenizer  # noqa: E402

SEQ = 32


@pytest.fixture(scope="module")
def texts():
    """Small files of the standard library."""
    found = [text for _, text in build_corpus.source_files(Path(os.__file__).parent / "json")]
    found += [text for _, text in build_corpus.source_files(Path(os.__file__).parent / "email")]
    assert len(found) > 15
    return found


@pytest.fixture(scope="module")
def corpus(tmp_path_factory, texts):
    """A directory with tokenizer.model, other.model, and datasets a (most documents) and b (the last five)."""
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


def write_jsonl(path, texts, key="text"):
    path.write_text("".join(json.dumps({key: text}) + "\n" for text in texts))


def preprocess(directory, source, prefix, *options):
    sources = [source] if isinstance(source, str) else source
    return cli.main(
        [
            "data",
            "preprocess",
            "--input",
            *(str(directory / s) for s in sources),
            "--tokenizer",
            str(directory / "tokenizer.model"),
            "--output-prefix",
            str(directory / prefix),
            "--workers",
            "1",
            *options,
        ]
    )


def bytes_of(prefix):
    return [Path(f"{prefix}{suffix}").read_bytes() for suffix in (".bin", ".idx", ".json")]


class Numbers(torch.utils.data.Dataset):
    """A dataset whose sample i is recognizable."""

    def __init__(self, length):
        self.length = length

    def __len__(self):
        return self.length

    def __getitem__(self, i):
        tokens = torch.full((4,), i)
        return {
            "tokens": tokens,
            "labels": tokens + 1,
            "loss_mask": torch.ones(4),
            "position_ids": torch.arange(4),
            "dataset_id": 0,
        }


def ids_of(batches):
    return [batch["sample_ids"].tolist() for batch in batches]


# Tokenizer


def test_tokenizer_gives_standard_library_text_back_exactly(tokenizer, texts):
    for text in [*texts, "", " ", "\n", "\t\r\n\f x", "  lead and trail  ", "é€😀\x00", "</s><s>"]:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert all(0 <= i < tokenizer.vocab_size for i in ids) and tokenizer.eod_id not in ids
    assert tokenizer.encode("\n        ")[1:] == tokenizer.encode("        ") and len(tokenizer.encode("        ")) == 1


def test_fingerprint_is_of_the_content(corpus, tmp_path, tokenizer):
    copy = tmp_path / "moved" / "tokenizer.model"
    copy.parent.mkdir()
    copy.write_bytes((corpus / "tokenizer.model").read_bytes())
    assert load_tokenizer(copy).fingerprint == load_tokenizer(copy.parent).fingerprint == tokenizer.fingerprint
    assert load_tokenizer(corpus / "other.model").fingerprint != tokenizer.fingerprint


def test_hugging_face_tokenizer(tmp_path):
    tokenizers, transformers = pytest.importorskip("tokenizers"), pytest.importorskip("transformers")
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.train_from_iterator(
        ["def hello(world):\n    return world"] * 3,
        tokenizers.trainers.BpeTrainer(
            vocab_size=270,
            special_tokens=["<s>", "</s>"],
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    transformers.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>").save_pretrained(
        tmp_path
    )
    tokenizer = load_tokenizer(tmp_path)
    text = "  def hello ( é ) :\n\treturn 's"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert (tokenizer.bos_id, tokenizer.eod_id, tokenizer.eod) == (0, 1, 1)
    assert tokenizer.vocab_size == backend.get_vocab_size()
    before = tokenizer.fingerprint
    (tmp_path / "chat_template.jinja").write_text("changes no ids")
    assert load_tokenizer(tmp_path).fingerprint == before


def test_bad_tokenizer_paths(tmp_path):
    (tmp_path / "broken.model").write_text("not a model")
    for path in ("missing", "broken.model", ""):
        with pytest.raises(ValueError, match=str(tmp_path / path)):
            load_tokenizer(tmp_path / path)


# tools/preprocess_data.py


def test_output_is_the_same_for_any_number_of_workers_and_for_gzip(corpus, monkeypatch):
    monkeypatch.setattr(preprocessing, "_CHUNK_BYTES", 2000)
    with gzip.open(corpus / "a.jsonl.gz", "wb") as stream:
        stream.write((corpus / "a.jsonl").read_bytes())
    for prefix, source, workers in (("w2", "a.jsonl", "2"), ("gz", "a.jsonl.gz", "1")):
        assert preprocess(corpus, source, prefix, "--workers", workers) == 0
        assert bytes_of(corpus / prefix) == bytes_of(corpus / "a")


def test_documents_options_and_sidecar(corpus, tokenizer, texts, capsys):
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    write_jsonl(corpus / "c.jsonl", [texts[0], "", texts[1]], key="body")
    assert (
        preprocess(corpus, ["c.jsonl", "c.jsonl"], "c", "--json-key", "body", "--no-append-eod", "--prepend-bos") == 0
    )
    indexed = IndexedDataset(str(corpus / "c"))
    expected = [[tokenizer.bos_id, *tokenizer.encode(text)] for text in (texts[0], texts[1])] * 2
    assert [document.tolist() for document in indexed] == expected and indexed[0].dtype == numpy.uint16
    assert indexed.document_indices.tolist() == [0, 1, 2, 3, 4]
    sidecar = Sidecar.read(corpus / "c")
    assert (sidecar.documents, sidecar.tokens) == (4, sum(map(len, expected)))
    assert sidecar.bos_prepended and not sidecar.eod_appended and sidecar.dtype == "uint16"
    assert f"--data-path {corpus / 'c'}" in capsys.readouterr().out
    with_eod = IndexedDataset(str(corpus / "a"))  # a name: its arrays dangle once the dataset is collected
    assert with_eod[0].tolist() == [*tokenizer.encode(texts[0]), tokenizer.eod_id]


@pytest.mark.parametrize(
    "workers, line, message",
    [
        ("1", '{"text": "cut off', "bad.jsonl:3: not a JSON document"),
        ("2", '{"text": "cut off', "bad.jsonl:3: not a JSON document"),
        ("1", '{"txet": "typo"}', "bad.jsonl:3: no key 'text' (found: txet)"),
        ("1", '["list"]', "bad.jsonl:3: no key 'text' (found: a list)"),
        ("1", '{"text": 5}', "bad.jsonl:3: 'text' is a int, not a string"),
        ("1", '{"text": "\\ud800"}', "bad.jsonl:3: the text cannot be tokenized"),
    ],
)
def test_bad_line_is_named_and_leaves_nothing(corpus, tmp_path, capsys, workers, line, message):
    (tmp_path / "bad.jsonl").write_text('{"text": "good"}\n\n' + line + "\n")
    code = preprocess(corpus, str(tmp_path / "bad.jsonl"), str(tmp_path / "out" / "x"), "--workers", workers)
    assert code == 2 and message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["bad.jsonl"]


def test_bad_files_leave_nothing(corpus, tmp_path, capsys):
    (tmp_path / "empty.jsonl").write_text("\n")
    with gzip.open(tmp_path / "cut.jsonl.gz", "wb") as stream:
        stream.write(os.urandom(10000).hex().encode())
    (tmp_path / "cut.jsonl.gz").write_bytes((tmp_path / "cut.jsonl.gz").read_bytes()[:-100])
    for name, message in (
        ("empty.jsonl", "no documents"),
        ("cut.jsonl.gz", "damaged"),
        ("absent.jsonl", "does not exist"),
    ):
        assert preprocess(corpus, str(tmp_path / name), str(tmp_path / "x")) == 2
        error = capsys.readouterr().err
        assert message in error and name in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut.jsonl.gz", "empty.jsonl"]


def test_existing_output_needs_overwrite(corpus, tmp_path, capsys):
    prefix = str(tmp_path / "x")
    assert preprocess(corpus, "b.jsonl", prefix) == 0
    before = bytes_of(prefix)
    assert preprocess(corpus, "a.jsonl", prefix) == 2 and "--overwrite" in capsys.readouterr().err
    assert bytes_of(prefix) == before
    assert preprocess(corpus, "a.jsonl", prefix, "--overwrite") == 0
    assert bytes_of(prefix) == bytes_of(corpus / "a")
    # A failing run with --overwrite leaves the old dataset as it was.
    (corpus / "bad.jsonl").write_text("{")
    assert preprocess(corpus, "bad.jsonl", prefix, "--overwrite") == 2
    assert bytes_of(prefix) == bytes_of(corpus / "a")


def test_script_runs_from_a_checkout(tmp_path):
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    result = subprocess.run(
        [
            sys.executable,
            str(ROOT / "tools" / "preprocess_data.py"),
            "--input",
            __file__,
            "--tokenizer",
            "nowhere",
            "--output-prefix",
            "x",
        ],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2 and "tokenizer nowhere does not exist" in result.stderr


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
        (lambda p: Path(f"{p}.json").unlink(), "has no x.json: it is incomplete"),
        (lambda p: Path(f"{p}.json").write_text("{}"), "x.json is not a version 1 dataset description"),
        (lambda p: os.truncate(f"{p}.bin", 100), "x.bin has 100 bytes and should have"),
        (lambda p: os.truncate(f"{p}.idx", 100), "x.idx has 100 bytes and should have"),
    ],
)
def test_damaged_data_is_refused(corpus, config, tokenizer, tmp_path, damage, message):
    for suffix, content in zip((".bin", ".idx", ".json"), bytes_of(corpus / "a")):
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


# batch_iterator


@settings(deadline=None, max_examples=40)
@given(
    micro=st.integers(1, 4),
    ranks=st.integers(1, 4),
    accumulation=st.integers(1, 4),
    steps=st.integers(1, 3),
    start=st.integers(0, 50),
    rest=st.integers(0, 5),
)
def test_every_layout_takes_the_same_samples_per_step(micro, ranks, accumulation, steps, start, rest):
    batch = micro * ranks * accumulation
    dataset = Numbers(start + steps * batch + rest % batch)
    taken = [
        ids_of(
            batch_iterator(
                dataset,
                consumed_samples=start,
                micro_batch_size=micro,
                global_batch_size=batch,
                dp_rank=rank,
                dp_size=ranks,
            )
        )
        for rank in range(ranks)
    ]
    for rank in range(ranks):
        assert len(taken[rank]) == steps * accumulation
        for m, rows in enumerate(taken[rank]):  # the documented formula
            step, m = divmod(m, accumulation)
            assert rows == [start + step * batch + m * micro * ranks + rank * micro + j for j in range(micro)]
    for step in range(steps):
        rows = [i for rank in taken for rows in rank[step * accumulation : (step + 1) * accumulation] for i in rows]
        assert sorted(rows) == list(range(start + step * batch, start + (step + 1) * batch))


@pytest.mark.parametrize("workers", [0, 2])
def test_resumed_stream_equals_uninterrupted(workers):
    options = dict(micro_batch_size=2, global_batch_size=8, dp_rank=1, dp_size=2, num_workers=workers)
    state = torch.get_rng_state()
    whole = list(batch_iterator(Numbers(50), consumed_samples=0, **options))
    assert torch.equal(state, torch.get_rng_state())  # else the noise after a resume would differ
    resumed = list(batch_iterator(Numbers(50), consumed_samples=16, **options))
    assert len(whole) == 12 and len(resumed) == 8
    for a, b in zip(whole[4:], resumed):
        assert a.keys() == b.keys() == {"tokens", "labels", "loss_mask", "position_ids", "sample_ids"}
        assert all(torch.equal(a[name], b[name]) for name in a)
    assert whole[0]["tokens"].shape == (2, 4) and torch.equal(whole[0]["tokens"][:, 0], whole[0]["sample_ids"])
    assert [whole[0][name].dtype for name in ("tokens", "loss_mask", "sample_ids")] == [
        torch.int64,
        torch.float32,
        torch.int64,
    ]


def test_stages_without_tokens_get_the_sample_ids():
    options = dict(consumed_samples=4, micro_batch_size=2, global_batch_size=4, dp_rank=0, dp_size=1)
    without = batch_iterator(None, **options)
    for _ in batch_iterator(Numbers(12), **options):
        assert next(without).keys() == {"sample_ids"}
    without = batch_iterator(None, **options)
    assert ids_of(next(without) for _ in range(4)) == ids_of(batch_iterator(Numbers(12), **options))


@pytest.mark.parametrize(
    "wrong", [dict(micro_batch_size=3), dict(dp_rank=2), dict(consumed_samples=-1), dict(dp_size=0)]
)
def test_bad_layout_is_refused_at_once(wrong):
    options = dict(consumed_samples=0, micro_batch_size=2, global_batch_size=8, dp_rank=0, dp_size=2)
    with pytest.raises(ValueError):
        batch_iterator(Numbers(9), **{**options, **wrong})


def test_loader_processes_survive_a_job_signal():
    batches = batch_iterator(
        Numbers(400), consumed_samples=0, micro_batch_size=1, global_batch_size=1, dp_rank=0, dp_size=1, num_workers=1
    )
    assert ids_of([next(batches)]) == [[0]]
    (worker,) = multiprocessing.active_children()
    for number in (signal.SIGUSR1, signal.SIGTERM):  # from a process that is not its parent
        subprocess.run(["kill", f"-{number.name[3:]}", str(worker.pid)], check=True)
    assert ids_of(batches) == [[i] for i in range(1, 400)]
    worker.join(10)
    assert not worker.is_alive()
