"""Megatron's older ``mp_rank_*`` files: every layout becomes the same weights bit by bit, and nothing in
them is run.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import legacy_format as megatron
import pytest
import torch
from helpers.processes import ROOT

sys.path.insert(0, str(ROOT / "tools"))
import convert_checkpoint

from megatron.dmc.checkpoint import convert, tensors
from megatron.dmc.checkpoint.convert import Progress
from megatron.dmc.checkpoint.formats import legacy, torch_dist
from megatron.dmc.checkpoint.formats.registry import describe
from megatron.dmc.checkpoint.formats.torch_dist import DistReader, read_run_config
from megatron.dmc.checkpoint.manifest import read_manifest
from megatron.dmc.config import DMCConfig, ModelConfig

MODEL = ModelConfig(
    num_layers=4,
    hidden_size=32,
    ffn_hidden_size=48,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=8,
    vocab_size=90,
    make_vocab_size_divisible_by=16,
    max_position_embeddings=64,
)
PADDED = 128
"""Not what we pad to: 90 rows are 96 here."""


class Call:
    """Calls a function when it is unpickled."""

    def __init__(self, function: Callable, *args: Any) -> None:
        self.function, self.args = function, args

    def __reduce__(self) -> tuple:
        return self.function, self.args


def imported(source: Path, save: Path, **options: Any) -> str:
    """Import; returns what was said."""
    said: list[str] = []
    assert convert.import_legacy(source, save, progress=Progress(say=said.append), **options) == save
    return "\n".join(said)


def refused(source: Path, *words: object, **options: Any) -> str:
    """The import is refused by one message with ``words`` in it, and nothing is left behind."""
    save = source.parent / "refused"
    with pytest.raises(ValueError) as error:
        convert.import_legacy(source, save, progress=Progress(say=lambda text: None), **options)
    message = str(error.value)
    assert "\n" not in message and [word for word in words if str(word) not in message] == [], message
    assert not [path for path in source.parent.iterdir() if "refused" in path.name]
    return message


def assert_same(save: Path, full: dict[str, torch.Tensor], model: ModelConfig) -> None:
    """Every tensor of the checkpoint, bit by bit; padding is zero."""
    reader, seen = DistReader(save), set()
    for name, tensor in full.items():
        stacked, layer = name, None
        if name.startswith("decoder.layers."):
            _, _, number, rest = name.split(".", 3)
            stacked, layer = f"decoder.layers.{rest}", int(number)
        found = reader.get(stacked, layer).read()
        if name in ("embedding.word_embeddings.weight", "output_layer.weight"):
            assert found.shape[0] == model.padded_vocab_size and not found[model.vocab_size :].any()
            found, tensor = found[: model.vocab_size], tensor[: model.vocab_size]
        assert found.dtype == tensor.dtype and torch.equal(
            found.view(torch.uint8), tensor.contiguous().view(torch.uint8)
        ), name
        seen.add(stacked)
    assert seen == set(reader.tensors())


def variant(**changes: Any) -> tuple[ModelConfig, dict[str, torch.Tensor]]:
    model = dataclasses.replace(MODEL, **changes)
    return model, megatron.full_tensors(model, PADDED)


def change(source: Path, how: Callable[[dict], Any], rank: str = "mp_rank_01_001") -> None:
    """Write one file again, with something else in it."""
    path = source / "iter_0000100" / rank / legacy.FILE
    with megatron.temporary_module(megatron.ENUM_MODULE, megatron.ModelType):
        content = torch.load(path, weights_only=False, map_location="cpu")
    how(content)
    megatron.save_file(content, path)


# ------------------------------------------------------------------------------------------------------------- layouts


@pytest.mark.parametrize("tp, pp, vpp", [(1, 1, 1), (2, 1, 1), (1, 2, 1), (2, 2, 1), (2, 2, 2)])
def test_every_layout(tp: int, pp: int, vpp: int, tmp_path: Path) -> None:
    _, full = variant()
    megatron.write(tmp_path / "old", full, MODEL, tp=tp, pp=pp, vpp=vpp, vocab_size=90)
    said = imported(tmp_path / "old", tmp_path / "new")
    assert_same(tmp_path / "new", full, MODEL)
    manifest = read_manifest(tmp_path / "new")
    assert read_run_config(tmp_path / "new").model == MODEL
    assert (manifest.stage, manifest.iteration, manifest.source, manifest.has_optimizer) == (
        "import",
        100,
        "iter_0000100",
        False,
    )
    assert "stage: import" in said and "38 rows of padding are left out" in said and f"TP {tp} x PP {pp}" in said


@pytest.mark.parametrize(
    "changes",
    [
        dict(num_query_groups=4),
        dict(add_qkv_bias=True, untie_embeddings_and_output_weights=False),
        dict(qk_layernorm=True, kv_channels=16, rotary_base=500000.0, norm_epsilon=1e-6),
    ],
    ids=["mha", "bias-tied", "qk-norm"],
)
@pytest.mark.parametrize("spec, prefix", [("te", ""), ("local", "module.")])
def test_every_model(changes: dict, spec: str, prefix: str, tmp_path: Path) -> None:
    model, full = variant(**changes)
    for tp, pp in ((1, 1), (2, 2)):
        source, save = tmp_path / f"old{tp}", tmp_path / f"new{tp}"
        megatron.write(source, full, model, tp=tp, pp=pp, vocab_size=90, spec=spec, prefix=prefix)
        imported(source, save)
        assert_same(save, full, model)
        assert read_run_config(save).model == model
    assert (tmp_path / "new1" / "__0_0.distcp").read_bytes() == (tmp_path / "new2" / "__0_0.distcp").read_bytes()


def test_uneven_pipeline(tmp_path: Path) -> None:
    """--decoder-first-pipeline-num-layers: what lies in the files counts."""
    _, full = variant()
    source = megatron.write(tmp_path / "old", full, MODEL, pp=2, vocab_size=90)
    for stage, layers in ((0, range(0, 1)), (1, range(1, 4))):
        args = argparse.Namespace(
            **megatron.arguments(MODEL, PADDED, 1, 2, vocab_size=90, decoder_first_pipeline_num_layers=1)
        )
        state = megatron.chunk_state(full, 0, 1, layers, stage == 0, stage == 1, "te")
        content = {"args": args, "checkpoint_version": 3.0, "iteration": 100, "model": state}
        megatron.save_file(content, source / f"mp_rank_00_00{stage}" / legacy.FILE)
    imported(source, tmp_path / "new")
    assert_same(tmp_path / "new", full, MODEL)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_types(dtype: torch.dtype, tmp_path: Path) -> None:
    full = megatron.full_tensors(MODEL, PADDED, dtype)
    megatron.write(tmp_path / "old", full, MODEL, tp=2, vocab_size=90, **megatron.DMC_ARGS)
    imported(tmp_path / "old", tmp_path / "new")
    assert_same(tmp_path / "new", full, MODEL)
    assert read_run_config(tmp_path / "new").dmc.importance_epsilon == torch.finfo(dtype).eps


def test_optimizer_is_never_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, full = variant()
    read, before = [], tensors.FileTensor.read_into
    megatron.write(tmp_path / "old", full, MODEL, tp=2, vocab_size=90)

    def spy(self: tensors.FileTensor, out: torch.Tensor, start: int) -> None:
        read.append(self.name)
        before(self, out, start)

    monkeypatch.setattr(tensors.FileTensor, "read_into", spy)
    imported(tmp_path / "old", tmp_path / "new")
    assert read and not [
        name for name in read if "mp_rank_" in name and not name.startswith(("embedding.", "decoder.", "output_"))
    ]


def test_older_torch(tmp_path: Path) -> None:
    """Before 2.1 there were no records of byte order, version and alignment in the file."""
    _, full = variant()
    path = megatron.write(tmp_path / "old", full, MODEL, vocab_size=90) / "mp_rank_00" / legacy.FILE
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(tmp_path / "rewritten", "w", zipfile.ZIP_STORED) as target:
        for name in source.namelist():
            if name.endswith(("data.pkl", "version")) and "format" not in name or "/data/" in name:
                target.writestr(name, source.read(name))
    os.replace(tmp_path / "rewritten", path)
    imported(tmp_path / "old", tmp_path / "new")
    assert_same(tmp_path / "new", full, MODEL)


def test_nan_is_reported(tmp_path: Path) -> None:
    _, full = variant()
    full["decoder.layers.2.mlp.linear_fc2.weight"][3, 5] = float("nan")
    megatron.write(tmp_path / "old", full, MODEL, tp=2, pp=2, vocab_size=90)
    said = imported(tmp_path / "old", tmp_path / "new")
    assert "warning: 1 tensors hold NaN" in said and "linear_fc2.weight of layer 2" in said
    assert_same(tmp_path / "new", full, MODEL)


def test_where_the_files_are(tmp_path: Path) -> None:
    _, full = variant()
    root = tmp_path / "old"
    first = megatron.write(root, full, MODEL, iteration=7, vocab_size=90, optimizer=False)
    second = megatron.write(root, full, MODEL, iteration=20, vocab_size=90, optimizer=False)
    assert legacy.find_directory(root) == second and legacy.find_directory(first) == first
    (root / "latest_checkpointed_iteration.txt").write_text("release\n")
    refused(root, root / "release" / "mp_rank_00" / legacy.FILE, "is missing", "release")
    os.rename(first, root / "release")
    assert legacy.find_directory(root) == root / "release"
    (root / "latest_checkpointed_iteration.txt").write_text("yesterday")
    refused(root, "latest_checkpointed_iteration.txt", "'yesterday'", "expected release, or the number")
    (root / "latest_checkpointed_iteration.txt").unlink()
    refused(root, "iter_0000020, release", "named")
    os.rename(second, tmp_path / "elsewhere")
    assert legacy.find_directory(root) == root / "release"
    assert legacy.is_legacy(root) and legacy.is_legacy(root / "release") and not legacy.is_legacy(tmp_path)
    refused(tmp_path / "elsewhere" / "mp_rank_00", "is no Megatron checkpoint", "mp_rank_00/model_optim_rng.pt")
    refused(tmp_path / "nowhere", "is not a directory")
    imported(root, tmp_path / "new")
    refused(tmp_path / "new", "is a torch_dist checkpoint", "--init-from")


# ----------------------------------------------------------------------------------------------------------- vocabulary


def test_vocabulary(tmp_path: Path) -> None:
    _, full = variant()
    megatron.write(tmp_path / "old", full, MODEL, optimizer=False)
    assert "128, padding included" in imported(tmp_path / "old", tmp_path / "whole")
    assert read_run_config(tmp_path / "whole").model.vocab_size == 128
    assert_same(tmp_path / "whole", full, dataclasses.replace(MODEL, vocab_size=128))
    imported(tmp_path / "old", tmp_path / "given", vocab_size=90)
    assert_same(tmp_path / "given", full, MODEL)
    refused(tmp_path / "old", "embedding.word_embeddings.weight", "128 rows", "129 (as given)", vocab_size=129)
    megatron.write(tmp_path / "null", full, MODEL, optimizer=False, vocab_size=89, tokenizer_type="NullTokenizer")
    imported(tmp_path / "null", tmp_path / "null.out")
    assert_same(tmp_path / "null.out", full, MODEL)


@pytest.mark.parametrize("tp, rows, size", [(1, 32000, 32000), (4, 32256, 32000), (4, 33024, 33024)])
def test_llama_2_vocabulary(tp: int, rows: int, size: int, tmp_path: Path) -> None:
    """The authors train at tensor parallel size 4, where 32,000 are padded to 32,256; the args do not say 32,000."""
    model = dataclasses.replace(
        MODEL, num_layers=1, hidden_size=8, num_query_groups=4, vocab_size=size, make_vocab_size_divisible_by=128
    )
    full = megatron.full_tensors(model, rows)
    megatron.write(tmp_path / "old", full, model, tp=tp, tokenizer_type="Llama2Tokenizer", optimizer=False)
    imported(tmp_path / "old", tmp_path / "new")
    assert read_run_config(tmp_path / "new").model == model
    assert_same(tmp_path / "new", full, model)


# ------------------------------------------------------------------------------------------------------------------ DMC


def test_released_dmc_model(tmp_path: Path) -> None:
    """Like NVIDIA's releases: stage three, b = 5, W = 12, bf16, multi-head attention; and out again as a DMC model."""
    model, full = variant(num_query_groups=4)
    source = tmp_path / "Llama-DMC-8x"
    megatron.write(source, full, model, vocab_size=90, **megatron.DMC_ARGS)
    said = imported(source, tmp_path / "new")
    assert "stage: finetune (from args), compression ratio 8, decision bias 5, window 12" in said
    manifest, run = read_manifest(tmp_path / "new"), read_run_config(tmp_path / "new")
    assert (manifest.stage, manifest.target_cr, manifest.iteration, manifest.train_iters) == (
        "finetune",
        8.0,
        100,
        2000,
    )
    assert run.dmc == DMCConfig() and (run.stage.stage, run.stage.target_cr) == ("finetune", 8.0) and run.model == model
    convert.export(tmp_path / "new", tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["model_type"] == "dmc" and config["dmc"]["target_cr"] == 8.0 and config["dmc"]["window"] == 12
    assert config["vocab_size"] == 90


def test_dmc_settings(tmp_path: Path) -> None:
    _, full = variant()
    args = {**megatron.DMC_ARGS, "dmc_init_val": 4, "dmc_window_size": 0, "dmc_temp": 0.5, "dmc_surprise": 1}
    megatron.write(tmp_path / "old", full, MODEL, vocab_size=90, optimizer=False, **args)
    said = imported(tmp_path / "old", tmp_path / "new", target_cr=3)
    assert read_run_config(tmp_path / "new").dmc == DMCConfig(decision_bias=4.0, window=None, temperature=0.5)
    assert read_manifest(tmp_path / "new").target_cr == 3
    assert "not understood in args: dmc_surprise = 1" in said and "window unbounded" in said


def test_args_without_dmc(tmp_path: Path) -> None:
    """Were they lost, the caller says what the model is; a name that says it is taken as a hint only."""
    _, full = variant()
    source = tmp_path / "Llama-DMC-4x"
    megatron.write(source, full, MODEL, vocab_size=90, optimizer=False)
    assert "warning: the directory's name says DMC" in imported(source, tmp_path / "plain")
    said = imported(source, tmp_path / "dmc", target_cr=4)
    assert (
        "stage: finetune (since a compression ratio was given), compression ratio 4" in said
        and "as in the published" in said
    )
    assert read_manifest(tmp_path / "dmc").stage == "finetune" and read_manifest(tmp_path / "plain").stage == "import"
    megatron.write(tmp_path / "half", full, MODEL, optimizer=False, dmc_init_val=5.0)
    refused(tmp_path / "half", legacy.FILE, "args.dmc_cr is None", "--target-cr")
    refused(tmp_path / "half", "target_cr is 0.5", target_cr=0.5)


def test_retrofit_in_the_middle(tmp_path: Path) -> None:
    """Stage two raises the ratio step by step: 99 steps of 2000 were done before the last one."""
    _, full = variant()
    args = {**megatron.DMC_ARGS, "dmc_finetune": False, "dmc_cr": 4.0}
    megatron.write(tmp_path / "old", full, MODEL, vocab_size=90, optimizer=False, **args)
    imported(tmp_path / "old", tmp_path / "new")
    manifest = read_manifest(tmp_path / "new")
    assert manifest.stage == "retrofit" and manifest.target_cr == 1 + 3 * 99 / 2000 and not manifest.finished


def zero_neuron(full: dict[str, torch.Tensor], model: ModelConfig) -> None:
    """``save_stage_one_final_model`` of the branch: every query head's and the key head's last row of each group."""
    d = model.head_dim
    for name, tensor in full.items():
        if name.endswith("linear_qkv.weight"):
            tensor.view(model.kv_heads, -1, model.hidden_size)[:, d - 1 : -d : d] = 0


def test_stage_one(tmp_path: Path) -> None:
    _, full = variant()
    args = {**megatron.DMC_ARGS, "dmc_is_stage_one": True, "dmc_finetune": False, "train_iters": 250}
    megatron.write(tmp_path / "early", full, MODEL, tp=2, iteration=250, optimizer=False, **args)
    refused(tmp_path / "early", "linear_qkv.weight", "row 7, a decision neuron (layer 0)", "final_output/")
    refused(tmp_path / "early", "stage one", "does not compress", target_cr=4)
    zero_neuron(full, MODEL)
    megatron.write(tmp_path / "old", full, MODEL, tp=2, pp=2, iteration=1, vocab_size=90, **args)
    imported(tmp_path / "old", tmp_path / "new")
    manifest = read_manifest(tmp_path / "new")
    assert manifest.stage == "zero_out" and manifest.finished and manifest.target_cr == 1.0
    # Exactly the rows that our own stage one zeroes: convert's views tell queries and keys from values.
    found = torch_dist.open_model(tmp_path / "new").tensors
    for layer in range(4):
        q, k, v = (found[f"model.layers.{layer}.self_attn.{x}_proj.weight"].read() for x in "qkv")
        for heads, zero in ((q, True), (k, True), (v, False)):
            last = heads.view(-1, 8, 32)[:, 7]
            assert last.any() != zero and heads.view(-1, 8, 32)[:, :7].any(-1).all()


# ------------------------------------------------------------------------------------------------------- the command
# line


def test_command_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    _, full = variant()
    source, save = tmp_path / "old", tmp_path / "new"
    megatron.write(source, full, MODEL, tp=2, pp=2, **megatron.DMC_ARGS)
    base = ["import", "--legacy", str(source), "--save", str(save)]
    assert convert_checkpoint.main([*base, "--vocab-size", "90", "--target-cr", "6"]) == 0
    assert_same(save, full, MODEL)
    assert read_manifest(save).target_cr == 6
    assert f"wrote {save}" in capfd.readouterr().out
    assert convert_checkpoint.main(base) == 2
    assert capfd.readouterr().err.startswith("error: ")
    text = describe(source)
    assert (
        "TP 2 x PP 2" in text
        and "stage: finetune (from args), compression ratio 8" in text
        and "2 KV heads of 8" in text
    )
    change(source, lambda content: content["args"].__setattr__("swiglu", Call(os.system, "false")), "mp_rank_00_001")
    assert convert_checkpoint.main([*base, "--overwrite"]) == 2
    error = capfd.readouterr().err
    assert error.count("\n") == 1 and "mp_rank_00_001" in error and "posix.system" in error
    assert_same(save, full, MODEL)  # what was there before stays
