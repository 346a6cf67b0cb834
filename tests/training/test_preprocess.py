"""Tokenizers and ``dmc data preprocess``. No network, no GPU, a few seconds."""

import gzip
import json
import os
import subprocess
import sys

import numpy
import pytest
from helpers.corpus import ROOT, bytes_of, preprocess, write_jsonl

from megatron.dmc.training import preprocess as preprocessing
from megatron.dmc.training.indexed_writer import Sidecar
from megatron.dmc.training.tokenizer import load_tokenizer

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
    assert (tokenizer.bos_id, tokenizer.eod_id, tokenizer.eod, tokenizer.adds_bos) == (0, 1, 1, False)
    assert tokenizer.vocab_size == backend.get_vocab_size()
    before = tokenizer.fingerprint
    (tmp_path / "chat_template.jinja").write_text("changes no ids")
    assert load_tokenizer(tmp_path).fingerprint == before
    # As Llama 3's tokenizer.json: the post-processor puts BOS before a text, tokenizer_config.json does not say it.
    backend.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.adds_bos and tokenizer.encode("def")[0] != 0


def test_bad_tokenizer_paths(tmp_path):
    (tmp_path / "broken.model").write_text("not a model")
    for path in ("missing", "broken.model", ""):
        with pytest.raises(ValueError, match=str(tmp_path / path)):
            load_tokenizer(tmp_path / path)


# dmc data preprocess


def test_output_is_the_same_for_any_number_of_workers_and_for_gzip(corpus, monkeypatch):
    monkeypatch.setattr(preprocessing, "_CHUNK_BYTES", 2000)
    with gzip.open(corpus / "a.jsonl.gz", "wb") as stream:
        stream.write((corpus / "a.jsonl").read_bytes())
    (corpus / "named-otherwise.jsonl").write_bytes((corpus / "a.jsonl.gz").read_bytes())
    (corpus / "plain.jsonl.gz").write_bytes((corpus / "a.jsonl").read_bytes())
    sources = [("w2", "a.jsonl", "2"), ("gz", "a.jsonl.gz", "1"), ("content", "named-otherwise.jsonl", "1")]
    for prefix, source, workers in [*sources, ("name", "plain.jsonl.gz", "1")]:
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
    (tmp_path / "text.jsonl.gz").write_bytes(b"\x28\xb5\x2f\xfd\x04\x00\x01")
    for name, message in (
        ("text.jsonl.gz", "text.jsonl.gz is zstd-compressed; decompress it first: zstd -d"),
        ("empty.jsonl", "no documents"),
        ("cut.jsonl.gz", "damaged"),
        ("absent.jsonl", "does not exist"),
    ):
        assert preprocess(corpus, str(tmp_path / name), str(tmp_path / "x")) == 2
        error = capsys.readouterr().err
        assert message in error and name in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut.jsonl.gz", "empty.jsonl", "text.jsonl.gz"]


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


# BOS


def test_documents_begin_as_the_tokenizer_begins_a_text(corpus, config, tmp_path, capsys):
    """By default; the sidecar says it, and training warns of data that begins otherwise, or does not say."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    from megatron.dmc.training.data import check_datasets

    settings = {"none": None, "silent": {}, "yes": {"add_bos_token": True}, "no": {"add_bos_token": False}}
    for name, content in settings.items():
        adds, directory = name != "no", tmp_path / name
        directory.mkdir()
        (directory / "tokenizer.model").write_bytes((corpus / "tokenizer.model").read_bytes())
        if content is not None:
            (directory / "tokenizer_config.json").write_text(json.dumps(content))
        tokenizer = load_tokenizer(directory)
        assert tokenizer.adds_bos is adds
        arguments = ["--tokenizer", str(directory), "--workers", "2" if name == "none" else "1"]
        assert preprocess(corpus, "b.jsonl", str(directory / "b"), *arguments) == 0
        said = f"beginning with BOS (id {tokenizer.bos_id})" if adds else "without BOS"
        assert said in capsys.readouterr().out
        indexed = IndexedDataset(str(directory / "b"))
        assert all((document[0] == tokenizer.bos_id) == adds for document in indexed)
        assert Sidecar.read(directory / "b").bos_prepended is adds
        config.data.data_path, config.data.valid_data_path = [str(directory / "b")], []
        assert check_datasets(config, tokenizer) == []
    config.data.data_path = [str(tmp_path / "no" / "b")] * 2
    (warning,) = check_datasets(config, load_tokenizer(tmp_path / "yes"))
    assert "no/b: documents do not begin with BOS, but tokenizer" in warning and "preprocess --prepend-bos" in warning
    config.data.data_path = [str(tmp_path / "yes" / "b")]
    (warning,) = check_datasets(config, load_tokenizer(tmp_path / "no"))
    assert "documents begin with BOS" in warning and "puts no BOS before a text" in warning
    sidecar = json.loads((tmp_path / "yes" / "b.json").read_text())
    del sidecar["bos_prepended"]
    (tmp_path / "yes" / "b.json").write_text(json.dumps(sidecar))
    (warning,) = check_datasets(config, load_tokenizer(tmp_path / "no"))
    assert "b.json does not say whether the documents begin with BOS" in warning
    for content, message in (("[", "is not JSON"), ("[]", "JSON object"), ('{"add_bos_token": 1}', "must be true or")):
        (tmp_path / "no" / "tokenizer_config.json").write_text(content)
        with pytest.raises(ValueError, match=message):
            load_tokenizer(tmp_path / "no")
