"""A file that would run code when it is read is refused in one line, by every command that reads files."""

from __future__ import annotations

import pickle
import shutil
from contextlib import nullcontext, suppress
from pathlib import Path

import pytest
import torch
from helpers import families, tiny
from helpers.corpus import SEQ
from helpers.in_process import build, megatron_in_process, run_config
from helpers.marker import Marker, plant
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorProperties, TensorStorageMetadata

from megatron.dmc import cli
from megatron.dmc.checkpoint import convert
from megatron.dmc.checkpoint.formats.torch_dist.metadata import read_metadata
from megatron.dmc.evaluation.load import load_checkpoint
from megatron.dmc.serving.batch_files import Output
from megatron.dmc.training import checkpointing
from megatron.dmc.training.data import build_datasets

PLACES = ("metadata", "common", "chunk", "bytes")


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("imported")
    families.make("llama2", directory / "hf")
    return convert.import_hf(directory / "hf", directory / "mg")


@pytest.mark.parametrize("place", PLACES)
def test_loading_runs_nothing(imported: Path, tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What --init-from, --distill-from, resuming and the reports load with; and no environment opens it."""
    checkpoint, mark = shutil.copytree(imported, tmp_path / "mg"), tmp_path / "mark"
    plant(checkpoint, place, mark)
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    with megatron_in_process(run_config()), pytest.raises(ValueError) as refused:
        load_checkpoint(checkpoint)
    assert "refused" in str(refused.value) or "does not fit" in str(refused.value)
    assert str(checkpoint) in str(refused.value) and "\n" not in str(refused.value)
    assert not mark.exists()


@pytest.mark.parametrize("place", PLACES)
def test_the_marker_would_be_made(imported: Path, tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the restricted readers the test above fails: the places are places where code is run."""
    if place == "chunk":
        pytest.skip("torch reads the chunks of tensors with weights_only=True on its own")
    checkpoint, mark = shutil.copytree(imported, tmp_path / "mg"), tmp_path / "mark"
    plant(checkpoint, place, mark)
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    monkeypatch.setattr(checkpointing, "weights_only", nullcontext)
    monkeypatch.setattr(checkpointing.mcore_compat, "use_metadata", lambda _: nullcontext())
    monkeypatch.setattr(checkpointing, "read_metadata", lambda path: FileSystemReader(path).read_metadata())
    with megatron_in_process(run_config()), suppress(Exception):
        load_checkpoint(checkpoint)
    assert mark.exists()


@pytest.mark.parametrize("command", ["export", "inspect", "verify"])
def test_conversion_runs_nothing(
    imported: Path, tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint, mark = shutil.copytree(imported, tmp_path / "mg"), tmp_path / "mark"
    plant(checkpoint, "metadata", mark)
    argv = {
        "export": ["--load", checkpoint, "--save", tmp_path / "out"],
        "inspect": [checkpoint],
        "verify": ["--hf", imported.parent / "hf", "--load", checkpoint],
    }[command]
    assert cli.main(["convert", command, *map(str, argv)]) == 2
    assert f"{checkpoint / '.metadata'} is refused" in capsys.readouterr().err
    assert not mark.exists()


@pytest.mark.slow
def test_training_commands_run_nothing(tmp_path: Path) -> None:
    """The whole commands: a stage that starts from, resumes, or is taught by such a checkpoint."""
    data, save, mark = tiny.make_data(tmp_path), tmp_path / "save", tmp_path / "mark"
    tiny.run(tiny.command(data, "pretrain", train_iters=1, save_interval=1, save=save), tmp_path / "pretrain")
    good = save / "iter_0000001"
    bad = {place: plant(shutil.copytree(good, tmp_path / place), place, mark) for place in ("metadata", "bytes")}
    zero_out = dict(train_iters=2, save=tmp_path / "zero_out")
    for argv in (
        tiny.command(data, "zero_out", init_from=bad["bytes"], **zero_out),
        tiny.command(data, "zero_out", init_from=good, distill_from=bad["metadata"], **zero_out),
    ):
        run = tiny.run(argv, tmp_path / "run", status=2)
        assert "error: " in run.output() and "Traceback" not in run.output()
    plant(good, "common", mark)
    run = tiny.run(
        tiny.command(data, "pretrain", train_iters=1, save_interval=1, save=save), tmp_path / "run", status=2
    )
    assert "is refused" in run.output() and "Traceback" not in run.output()
    assert not mark.exists()


def test_a_pickle_in_the_index_cache(config, tokenizer, tmp_path: Path) -> None:
    build_datasets(config, tokenizer, 8, 0)
    arrays = sorted((tmp_path / "cache").rglob("*.npy"))
    assert len(arrays) >= 3
    for array in arrays:
        before = array.read_bytes()
        array.write_bytes(pickle.dumps(Marker(tmp_path / "mark")))
        with pytest.raises(ValueError, match="index cache .* remove it"):
            build_datasets(config, tokenizer, 8, 0)
        array.write_bytes(before)
    assert not (tmp_path / "mark").exists()
    train, _ = build_datasets(config, tokenizer, 8, 0)
    assert train[0]["tokens"].shape == (SEQ,)


def test_a_pickle_as_an_index_or_a_journal(config, tokenizer, corpus: Path, tmp_path: Path) -> None:
    """Neither the index of a dataset nor the output of a batch, which tells what is done, is read as a pickle."""
    for suffix in (".bin", ".idx", ".json"):
        shutil.copy(corpus / f"a{suffix}", tmp_path / f"a{suffix}")
    index = tmp_path / "a.idx"
    index.write_bytes(pickle.dumps(Marker(tmp_path / "mark")).ljust(index.stat().st_size, b"\n"))
    config.data.data_path = [str(tmp_path / "a")]
    with pytest.raises(Exception):  # noqa: B017
        build_datasets(config, tokenizer, 8, 0)
    journal = tmp_path / "journal.jsonl"
    journal.write_bytes(pickle.dumps(Marker(tmp_path / "mark")) + b"\n")
    with pytest.raises(ValueError, match="not a line that dmc batch writes"):
        Output(journal)
    assert not (tmp_path / "mark").exists()


# ------------------------------------------------------------------------------------------------------ .metadata


def metadata_file(directory: Path, change) -> Path:
    entry = TensorStorageMetadata(TensorProperties(dtype=torch.float32), torch.Size((2, 3)), [])
    metadata = Metadata({"a": entry}, storage_data={})
    change(metadata)
    (directory / ".metadata").write_bytes(pickle.dumps(metadata))
    return directory


def test_metadata_of_torch(imported: Path) -> None:
    """Field by field what torch itself reads."""
    theirs = pickle.loads((imported / ".metadata").read_bytes())
    ours = read_metadata(imported)
    assert ours.state_dict_metadata == theirs.state_dict_metadata
    assert {i: (s.relative_path, s.offset, s.length) for i, s in ours.storage_data.items()} == {
        i: (s.relative_path, s.offset, s.length) for i, s in theirs.storage_data.items()
    }
    assert [i.index for i in ours.storage_data] == [i.index for i in theirs.storage_data]


@pytest.mark.parametrize("path", ["../outside", "/etc/hostname", "sub/file", "..", ""])
def test_metadata_names_no_file_outside(tmp_path: Path, path: str) -> None:
    from torch.distributed.checkpoint.filesystem import _StorageInfo

    place = {MetadataIndex("a", (0, 0), 0): _StorageInfo(path, 0, 10)}
    with pytest.raises(ValueError, match="is no file of the checkpoint"):
        read_metadata(metadata_file(tmp_path, lambda m: m.storage_data.update(place)))


@pytest.mark.parametrize("field", ["size", "chunks", "properties"])
@pytest.mark.parametrize("value", [None, "x", -1, [[-1]], [1.5], Metadata({})], ids=repr)
def test_metadata_of_odd_types(tmp_path: Path, field: str, value: object) -> None:
    with pytest.raises(ValueError, match=r"\.metadata is damaged"):
        read_metadata(metadata_file(tmp_path, lambda m: setattr(m.state_dict_metadata["a"], field, value)))


def test_metadata_changes_no_class(tmp_path: Path) -> None:
    """A pickle can set attributes of a class that it names: here of a class that is gone afterwards."""

    (tmp_path / ".metadata").write_bytes(
        # PROTO 4, GLOBAL, the tuple (None, {"poison": "x"}), BUILD, STOP
        b"\x80\x04ctorch.distributed.checkpoint.metadata\nMetadataIndex\n"
        b"N}X\x06\x00\x00\x00poisonX\x01\x00\x00\x00xs\x86b."
    )
    with pytest.raises(ValueError, match=r"\.metadata is damaged"):
        read_metadata(tmp_path)
    assert not hasattr(MetadataIndex, "poison")


def test_a_good_checkpoint_still_loads(imported: Path) -> None:
    with megatron_in_process(run_config()):
        loaded = load_checkpoint(imported)
        other = build(loaded.config)
        checkpointing.load(imported, [other])
    assert torch.equal(loaded.model.embedding.word_embeddings.weight, other.embedding.word_embeddings.weight)
