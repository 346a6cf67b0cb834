"""Manifests and checksums.json: a changed byte is found by the file's name, or changes nothing. No torch."""

import json
import random
import shutil

import pytest

from megatron.dmc.checkpoint import checksums
from megatron.dmc.checkpoint.manifest import Manifest, check_contents, read_manifest, resolve_checkpoint
from megatron.dmc.checkpoint.verify import verify_checksums

LARGE = 3 << 20  # too large to be read for its checksum whenever a checkpoint is looked at


@pytest.fixture
def checkpoint(tmp_path):
    directory = tmp_path / "save" / "iter_0000057"
    (directory / "hf").mkdir(parents=True)
    contents = {"metadata.json": b"{}", "config.yaml": b"model: {}\n", "hf/config.json": b"{}"}
    for name, content in {**contents, "__0_0.distcp": random.Random(1).randbytes(LARGE)}.items():
        (directory / name).write_bytes(content)
    versions = {"torch": "2.13.0", "world_size": "1"}
    made = Manifest("retrofit", 57, 100, 228, 7296, 1.5, 1.43, "zero_out", ["pretrain", "zero_out"], versions)
    made.write(directory, crc32={})
    return directory


def test_every_changed_byte_of_a_manifest_is_found_or_harmless(checkpoint):
    path, rng, harmless = checkpoint / "manifest.json", random.Random(2), 0
    content, whole = path.read_bytes(), read_manifest(checkpoint)
    for at in range(len(content)):
        changed = bytearray(content)
        changed[at] ^= 1 << rng.randrange(8)
        path.write_bytes(changed)
        try:
            assert read_manifest(checkpoint) == whole, (at, bytes(changed[at - 20 : at + 20]))
            harmless += 1
        except ValueError as error:
            assert "manifest.json is not a version 1" in str(error)
    assert harmless < len(content) / 4  # spaces and ends of lines
    path.write_bytes(content.replace(b'"iteration": 57', b'"iteration": 47'))
    with pytest.raises(ValueError, match="its values were changed after it was written .CRC-32"):
        read_manifest(checkpoint)


def test_manifests_of_older_versions_load_and_their_values_are_checked(checkpoint):
    path = checkpoint / "manifest.json"
    whole, content = read_manifest(checkpoint), json.loads(path.read_text())
    del content["manifest_crc32"]

    def write(**values):
        path.write_text(json.dumps(content | values))

    write()
    assert read_manifest(checkpoint) == whole
    for values, message in (
        (
            dict(iteration=47),
            "iter_0000057 holds iteration 47, as its manifest.json says; give it the name iter_0000047",
        ),
        (dict(iteration="x"), "manifest: iteration is 'x'; it must be of type int"),
        (dict(iteration=None), "manifest: iteration is None"),
        (dict(iteration=-5), "manifest: iteration is -5; it must not be negative"),
        (dict(iteration=True), "manifest: iteration is True"),
        (dict(train_iters=[1]), r"manifest: train_iters is \[1\]"),
        (dict(target_cr="high"), "manifest: target_cr is 'high'; it must be a number"),
        (dict(target_cr=0), "manifest: target_cr is 0"),
        (dict(measured_cr=-1), "manifest: measured_cr is -1"),
        (dict(stage="retrofjt"), "manifest: stage 'retrofjt' is unknown"),
        (dict(files=[1]), "manifest: files is"),
        (dict(files={"metadata.json": "2"}), "manifest: files.metadata.json is '2'"),
        (dict(lineage="pretrain"), "manifest: lineage is 'pretrain'; it must be a list"),
        (dict(iterations=57), "manifest: unknown configuration key iterations"),
    ):
        write(**values)
        with pytest.raises(ValueError, match=message):
            read_manifest(checkpoint)
    shutil.copytree(checkpoint, copy := checkpoint.parent.parent / "a-name-of-its-own")
    (copy / "manifest.json").write_text(json.dumps(content | dict(iteration=47)))
    assert read_manifest(copy).iteration == 47


def test_the_note_of_the_newest_checkpoint_is_read_whatever_is_in_it(checkpoint):
    latest = checkpoint.parent / "latest_checkpointed_iteration.txt"
    for content in (b"57\n", b"47\n", b"57"):
        latest.write_bytes(content)
        assert resolve_checkpoint(checkpoint.parent) == checkpoint
    for content in (b"58\n", b"5\xee", "5\u00b2".encode(), b"", b"-7", b"9" * 5000):
        latest.write_bytes(content)
        with pytest.raises(ValueError, match="is not a complete checkpoint.*remove it and latest_checkpointed"):
            resolve_checkpoint(checkpoint.parent)


def flip(path, at, bit=3):
    content = bytearray(path.read_bytes())
    content[at] ^= 1 << bit
    path.write_bytes(content)


def test_changed_files_of_a_checkpoint_are_named(checkpoint):
    assert "undamaged: 4 files" in verify_checksums(checkpoint.parent, is_checkpoint=True)
    flip(checkpoint / "hf" / "config.json", 0)
    with pytest.raises(ValueError, match="is damaged, its checksums differ: hf/config.json"):
        resolve_checkpoint(checkpoint.parent)
    flip(checkpoint / "hf" / "config.json", 0)
    flip(checkpoint / "__0_0.distcp", LARGE // 2)
    manifest = read_manifest(checkpoint)
    with pytest.raises(ValueError, match="__0_0.distcp"):
        check_contents(checkpoint, manifest)
    with pytest.raises(ValueError, match="__0_0.distcp"):
        verify_checksums(checkpoint, is_checkpoint=True)
    manifest.crc32 = {}
    manifest.write(checkpoint)
    with pytest.raises(ValueError, match="has no checksums; compare it with its source"):
        verify_checksums(checkpoint, is_checkpoint=True)


def test_changed_files_of_an_exported_directory_are_named(tmp_path):
    for name in ("config.json", "model.safetensors", "README.md"):
        (tmp_path / name).write_bytes(name.encode() * 10)
    checksums.write_file(tmp_path, {})
    with checksums.checking(tmp_path):
        pass
    assert "undamaged: 2 files" in verify_checksums(tmp_path, is_checkpoint=False)
    (tmp_path / "README.md").write_text("edited")
    (tmp_path / "notes.txt").write_text("new")
    with checksums.checking(tmp_path):
        pass
    for name in ("config.json", "model.safetensors"):
        flip(tmp_path / name, 5)
        loaded = False
        with pytest.raises(ValueError, match=f"checksums differ: {name}.*or remove the lines of files that you"):
            with checksums.checking(tmp_path):
                loaded = True
        assert loaded
        flip(tmp_path / name, 5)
    content, expected = (tmp_path / checksums.FILE).read_bytes(), checksums.read_file(tmp_path)
    for at in range(len(content)):
        flip(tmp_path / checksums.FILE, at, at % 8)
        try:
            with checksums.checking(tmp_path):
                pass
            assert checksums.read_file(tmp_path) == expected
        except ValueError:
            pass
        (tmp_path / checksums.FILE).write_bytes(content)
    for odd in (
        {"a\nb": "00000000"},
        {"../a": "00000000"},
        {"/etc/hostname": "00000000"},
        {"a": "0"},
        {"a": 5},
        [1],
        None,
    ):
        (tmp_path / checksums.FILE).write_text(json.dumps({"crc32": odd}))
        with pytest.raises(ValueError, match="checksums.json is damaged .*; restore it from a copy$"):
            checksums.read_file(tmp_path)
    (tmp_path / checksums.FILE).write_bytes(content)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match="config.json .cannot be read"):
        verify_checksums(tmp_path, is_checkpoint=False)
    (tmp_path / checksums.FILE).unlink()
    with checksums.checking(tmp_path):  # as other people's models
        pass
    with pytest.raises(ValueError, match="has no checksums"):
        verify_checksums(tmp_path, is_checkpoint=False)
