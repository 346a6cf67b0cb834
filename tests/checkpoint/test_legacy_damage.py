"""Megatron's older ``mp_rank_*`` files that are not as they should be: refused by name, and nothing is written."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import legacy_format as megatron
import pytest
import torch
from test_legacy import MODEL, assert_same, change, imported, refused, variant

from megatron.dmc.checkpoint.formats import legacy
from megatron.dmc.checkpoint.formats.torch_dist import read_run_config


@pytest.mark.parametrize(
    "name, value, expected",
    [
        ("normalization", "LayerNorm", "'RMSNorm'"),
        ("swiglu", False, "True"),
        ("rotary_percent", 0.5, "1.0"),
        ("rotary_interleaved", True, "off"),
        ("rotary_seq_len_interpolation_factor", 2, "off"),
        ("add_bias_linear", True, "False"),
        ("apply_layernorm_1p", True, "off"),
        ("num_experts", 8, "off"),
        ("multi_latent_attention", True, "off"),
        ("window_size", (128, 0), "off"),
        ("hidden_size", None, "is missing"),
        ("hidden_size", "32", "of type int"),
        ("num_attention_heads", 3, ""),
    ],
)
def test_models_that_ours_is_not(name: str, value: Any, expected: str, tmp_path: Path) -> None:
    _, full = variant()
    megatron.write(tmp_path / "old", full, MODEL, optimizer=False, **{name: value})
    refused(tmp_path / "old", legacy.FILE, "args", name, "" if value is None else value, expected)


def test_position_embeddings_and_scaling(tmp_path: Path) -> None:
    _, full = variant()
    other = dict(position_embedding_type="learned_absolute", use_rotary_position_embeddings=False)
    megatron.write(tmp_path / "old", full, MODEL, optimizer=False, **other)
    refused(tmp_path / "old", "args.position_embedding_type is 'learned_absolute'", "expected 'rope'")
    megatron.write(tmp_path / "scaled", full, MODEL, optimizer=False, use_rope_scaling=True)
    imported(tmp_path / "scaled", tmp_path / "new")
    assert read_run_config(tmp_path / "new").model.rope_scaling == dict(
        rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192
    )


FC2, QKV = "decoder.layers.1.mlp.linear_fc2.weight", "decoder.layers.0.self_attention.linear_qkv.weight"


@pytest.mark.parametrize(
    "how, words",
    [
        (lambda c: c["model"].pop(FC2), ["mp_rank_01_001", "layer 3", "lacks decoder.layers.N.mlp.linear_fc2.weight"]),
        (
            lambda c: c["model"].update({FC2: torch.zeros(32, 23).bfloat16()}),
            ["layers.1.mlp.linear_fc2.weight", "mp_rank_01_001", "[32, 23]", "expected [32, 24]"],
        ),
        (
            lambda c: c["model"].update({FC2: torch.zeros(32, 24)}),
            [FC2, "mp_rank_01_001", "torch.float32", "torch.bfloat16"],
        ),
        (lambda c: c["model"].update({FC2: "x"}), [FC2, "mp_rank_01_001", "'x'", "expected a dense tensor"]),
        (
            lambda c: c["model"].update({FC2: torch.zeros(24, 32).bfloat16().T}),
            [FC2, "mp_rank_01_001", "a dense tensor"],
        ),
        (
            lambda c: c["model"].update({"decoder.layers.1.mlp.router.weight": torch.zeros(2)}),
            ["router.weight", "mp_rank_01_001", "expected none"],
        ),
        (
            lambda c: [c["model"].pop(k) for k in list(c["model"]) if ".layers.1." in k],
            ["has 3 layers in tensor rank 1", "1 in mp_rank_01_001", "expected 4"],
        ),
        (
            lambda c: [c["model"].pop(k) for k in list(c["model"]) if ".layers.0." in k],
            ["mp_rank_01_001", "layers [1]", "no gap"],
        ),
        (
            lambda c: c["model"]["decoder.final_layernorm.weight"].mul_(2),
            [
                "decoder.final_layernorm.weight",
                "mp_rank_01_001",
                "differs from",
                "the same values in every tensor rank",
            ],
        ),
        (lambda c: c.update(iteration=99), ["mp_rank_01_001", "iteration 99", "iteration 100"]),
        (lambda c: setattr(c["args"], "tensor_model_parallel_size", 4), ["mp_rank_01_001", "(4, 2, 1)", "(2, 2, 1)"]),
        (lambda c: c.update(checkpoint_version=2.0), ["mp_rank_01_001", "checkpoint_version is 2.0", "expected 3.0"]),
        (lambda c: setattr(c["args"], "swiglu", torch.ones(1)), ["mp_rank_01_001", "args.swiglu is a tensor"]),
        (lambda c: c.pop("args"), ["mp_rank_01_001", "expected a dict with args"]),
        (lambda c: c.update(model0=c.pop("model")), ["mp_rank_01_001", "holds model0", "expected model "]),
        (
            lambda c: c.update(model={"language_model": {"encoder": {}}}),
            ["mp_rank_01_001", "Megatron Core's names", "tools/"],
        ),
    ],
)
def test_damaged_content(how: Callable[[dict], Any], words: list[str], tmp_path: Path) -> None:
    _, full = variant()
    megatron.write(tmp_path / "old", full, MODEL, tp=2, pp=2, optimizer=False, vocab_size=90)
    change(tmp_path / "old", how)
    refused(tmp_path / "old", *words)


def test_the_file_that_lacks_something_is_named(tmp_path: Path) -> None:
    _, full = variant()
    source = megatron.write(tmp_path / "old", full, MODEL, tp=2, pp=2, optimizer=False, vocab_size=90)
    change(tmp_path / "old", lambda c: c["model"].pop(FC2), "mp_rank_00_001")
    refused(
        tmp_path / "old",
        f"{source / 'mp_rank_00_001' / legacy.FILE}: layer 3 lacks decoder.layers.N.mlp.linear_fc2.weight",
    )
    change(tmp_path / "old", lambda c: c["model"].pop("embedding.word_embeddings.weight"), "mp_rank_01_000")
    refused(tmp_path / "old", source, "embedding.word_embeddings.weight in 1 tensor ranks", "expected it in 2")


def test_tied_copy_differs(tmp_path: Path) -> None:
    model, full = variant(untie_embeddings_and_output_weights=False)
    megatron.write(tmp_path / "old", full, model, tp=2, pp=2, optimizer=False, vocab_size=90)
    change(tmp_path / "old", lambda c: c["model"]["output_layer.weight"].mul_(2))
    refused(
        tmp_path / "old",
        "output_layer.weight",
        "mp_rank_01_001",
        "differs from embedding.word_embeddings.weight",
        "a copy",
    )


def test_damaged_files(tmp_path: Path) -> None:
    _, full = variant()
    source = megatron.write(tmp_path / "old", full, MODEL, tp=2, pp=2, vocab_size=90)
    path = source / "mp_rank_01_000" / legacy.FILE
    whole = path.read_bytes()
    path.write_bytes(whole[:-1000])
    refused(tmp_path / "old", path, "cannot be read", "copy it again")
    path.write_bytes(b"")
    refused(tmp_path / "old", path, "zip format")
    for at in range(
        0, len(whole), len(whole) // 20
    ):  # a flipped byte: refused, or it lies in a tensor; never another error
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 255]) + whole[at + 1 :])
        try:
            imported(source, tmp_path / "new", overwrite=True)
        except ValueError as error:
            assert str(path) in str(error)
    torch.save({"model": {}}, path, _use_new_zipfile_serialization=False)
    refused(tmp_path / "old", path, "zip format", "PyTorch 1.6")
    path.unlink()
    refused(tmp_path / "old", path, "is missing")
    path.parent.rmdir()
    refused(tmp_path / "old", path, "is missing (1 of 4 files are)", "2 x 2", "mp_rank_01_001")
    path.parent.mkdir()
    path.write_bytes(whole)
    (source / "mp_rank_02_000").mkdir()
    refused(tmp_path / "old", source / "mp_rank_02_000", "one too many", "2 x 2")
    os.rename(source / "mp_rank_02_000", source / "mp_rank_01_000_000")
    refused(tmp_path / "old", source / "mp_rank_01_000_000", "expert parallelism")
    os.rename(source / "mp_rank_01_000_000", source / "mp_rank_00")
    refused(tmp_path / "old", source / "mp_rank_00_000", "the same rank")


def test_save_exists(tmp_path: Path) -> None:
    _, full = variant()
    megatron.write(tmp_path / "old", full, MODEL, vocab_size=90, optimizer=False)
    imported(tmp_path / "old", tmp_path / "new")
    with pytest.raises(ValueError, match="exists; give --overwrite"):
        imported(tmp_path / "old", tmp_path / "new")
    imported(tmp_path / "old", tmp_path / "new", overwrite=True)
    assert_same(tmp_path / "new", full, MODEL)
