"""Bad input: one line on stderr that names the value and the fix, status 2, nothing written, no process group made.

Checkpoints here are directories of the right form with no weights in them: all of this is refused before they are read.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import tiny
from helpers.processes import subprocess_env

from megatron.dmc.checkpoint.manifest import LATEST, Manifest
from megatron.dmc.config import RunConfig
from megatron.dmc.training import arguments, initialize, retrofit


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny.make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def refused(tmp_path, capsys, monkeypatch):
    """Call the entry point; return its message after checking that nothing else has happened."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(initialize, "initialize", lambda config: pytest.fail("it was not refused"))
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)

    def call(argv, *says, env=None):
        before = content(tmp_path)
        with monkeypatch.context() as patch:
            for name, value in (env or {}).items():
                patch.setenv(name, value)
            status = retrofit.main(list(map(str, argv)))
        out, err = capsys.readouterr()
        assert status == 2 and out == "" and err.startswith("error: ") and err.count("\n") == 1, err
        for part in says:
            assert str(part) in err
        assert content(tmp_path) == before
        assert not torch.distributed.is_initialized()
        return err

    return call


def content(directory):
    return {path: path.read_bytes() if path.is_file() else None for path in sorted(directory.rglob("*"))}


def checkpoint(save, stage, iteration=10, train_iters=10, target_cr=1.0, **sections):
    """A complete one by its looks, under a --save directory."""
    directory = save / f"iter_{iteration:07d}"
    directory.mkdir(parents=True)
    stage_section = {"stage": stage, "train_iters": train_iters}
    if stage in ("retrofit", "finetune"):
        stage_section["target_cr"] = target_cr
    if stage == "retrofit":
        stage_section["start_cr"] = 1.0
    config = RunConfig.from_dict(
        {
            "model": tiny.MODEL,
            "stage": stage_section,
            "optimizer": {"lr": 1e-3},
            "training": {"global_batch_size": 4, "micro_batch_size": 2, "save": str(save)},
            "data": {"seq_length": tiny.SEQ},
            **sections,
        }
    )
    (directory / "config.yaml").write_text(arguments.dump(config))
    (directory / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
    (directory / "__0_0.distcp").write_bytes(b"weights" * 100)
    Manifest(stage, iteration, train_iters, iteration * 4, iteration * 4 * tiny.SEQ, target_cr).write(directory)
    (save / LATEST).write_text(f"{iteration}\n")
    return directory


def pretrain(data, **more):
    return tiny.command(data, "pretrain", **{"train_iters": 4, "save": "run", **more})


# Sizes: all of it is known from WORLD_SIZE, before the processes meet


@pytest.mark.parametrize(
    "world, options, says",
    [
        (
            3,
            dict(tensor_model_parallel_size=3, num_query_groups=4, kv_channels=8),
            ["num_attention_heads 4 is not divisible by tensor_model_parallel_size 3"],
        ),
        (
            4,
            dict(tensor_model_parallel_size=4),
            ["tensor_model_parallel_size 4 exceeds the 2 KV heads", "use at most 2"],
        ),
        (3, dict(pipeline_model_parallel_size=3), ["num_layers 2 is not divisible by the 3 pipeline chunks"]),
        (1, dict(seq_length=65), ["seq_length 65 exceeds max_position_embeddings 64"]),
        (3, dict(tensor_model_parallel_size=2), ["world size 3", "2 x 1"]),
        (1, dict(global_batch_size=3), ["global_batch_size 3", "micro_batch_size 2"]),
        (1, dict(hidden_size=30), ["hidden_size 30", "num_attention_heads 4", "kv_channels"]),
        (1, dict(transformer_impl="transformer_engine"), ["transformer_impl is transformer_engine", "local"]),
        (1, dict(train_iters=None), ["stage pretrain needs train_iters"]),
        (1, dict(save_interval=2, save=None), ["save_interval is 2", "save is not set"]),
    ],
)
def test_wrong_sizes(refused, data, world, options, says):
    if world == 1 and options.get("transformer_impl") and torch.cuda.is_available():
        pytest.skip("Transformer Engine may be there")
    refused(pretrain(data, **options), *says, env={"WORLD_SIZE": str(world), "RANK": "0"})


def test_one_rank_speaks(data, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "1")
    assert retrofit.main(pretrain(data, lr=-1)) == 2 and retrofit.main(["--nonsense"]) == 2
    assert capsys.readouterr() == ("", "")


# Data and tokenizer


def test_data_that_cannot_be_trained_on(refused, data, tmp_path):
    refused(
        pretrain(data, data_path=[tmp_path / "absent"]),
        f"{tmp_path / 'absent'}.bin does not exist",
        "dmc data preprocess",
    )
    for suffix in (".bin", ".idx", ".json"):
        (tmp_path / f"cut{suffix}").write_bytes(Path(f"{data / 'train'}{suffix}").read_bytes())
    os.truncate(tmp_path / "cut.bin", 100)
    refused(pretrain(data, data_path=[tmp_path / "cut"]), "cut.bin has 100 bytes and should have", "truncated")
    (tmp_path / "cut.json").unlink()
    refused(pretrain(data, data_path=[tmp_path / "cut"]), "cut has no cut.json")
    refused(pretrain(data, valid_data_path=[tmp_path / "gone"]), "valid_data_path", "gone.bin does not exist")
    refused(pretrain(data, data_path=[]), "data_path is empty")


def test_tokenizers_that_do_not_fit(refused, data):
    refused(
        pretrain(data, tokenizer=data / "other.model", vocab_size=600), "was made with another tokenizer", "other.model"
    )
    refused(pretrain(data, tokenizer=data / "absent.model"), "absent.model does not exist")
    refused(pretrain(data, tokenizer=None), "tokenizer is not set")
    refused(pretrain(data, tokenizer=data / "train.jsonl"), "not a sentencepiece model")
    refused(pretrain(data, vocab_size=500), "has 512 ids, the model's vocab_size is 500")


# Configuration


def test_configuration_files_and_flags(refused, data, tmp_path):
    refused([*pretrain(data), "--leraning-rate", "1"], "unrecognized arguments: --leraning-rate 1")
    refused(pretrain(data, lr="fast"), "--lr", "'fast'")
    (tmp_path / "c.yaml").write_text("model: {layers: 2}\n")
    refused(["--config", "c.yaml", *pretrain(data)], "unknown configuration key model.layers", "num_layers")
    (tmp_path / "c.yaml").write_text("modell: {num_layers: 2}\n")
    refused(["--config", "c.yaml", *pretrain(data)], "unknown configuration key modell")
    (tmp_path / "c.yaml").write_text("model: [")
    refused(["--config", "c.yaml", *pretrain(data)], "c.yaml cannot be read")
    refused(["--config", "none.yaml", *pretrain(data)], "none.yaml does not exist")


def test_places_that_cannot_be_written(refused, data, tmp_path):
    (tmp_path / "file").write_text("precious")
    refused(pretrain(data, save="file"), "save file", "is not a directory")
    refused(pretrain(data, save="file/below"), "save file/below", "is not a directory")
    if os.geteuid():
        (tmp_path / "closed").mkdir(mode=0o500)
        refused(pretrain(data, save="closed/run"), "cannot be written")


# Checkpoints


@pytest.mark.parametrize(
    "damage, says",
    [
        (lambda c: (c / "manifest.json").unlink(), "manifest.json"),
        (lambda c: (c / "metadata.json").unlink(), "metadata.json"),
        (lambda c: (c / "__0_0.distcp").unlink(), "__0_0.distcp is missing"),
        (lambda c: os.truncate(c / "__0_0.distcp", 99), "__0_0.distcp has 99 bytes and should have 700"),
        (lambda c: (c / "config.yaml").unlink(), "config.yaml is missing"),
        (lambda c: (c / "manifest.json").write_text("{"), "manifest.json is not a version 1"),
        (
            lambda c: (c / "manifest.json").write_text('{"format": "other", "format_version": 1}'),
            "another format or version",
        ),
    ],
)
@pytest.mark.parametrize("older", [False, True], ids=["alone", "with an older one"])
def test_damaged_checkpoints(refused, data, tmp_path, damage, says, older):
    """By --init-from (the directory, or the checkpoint in it), and by --save. Never silently from an older one."""
    damaged = checkpoint(tmp_path / "p", "pretrain", 10)
    damage(damaged)
    refused(tiny.command(data, "zero_out", init_from=damaged, save="z"), says)
    if not older:
        refused(
            tiny.command(data, "zero_out", init_from="p", save="z"), "manifest" if says == "manifest.json" else says
        )
        refused(pretrain(data, train_iters=10, save="p"), says)
        return
    (damaged.parent / LATEST).unlink()
    checkpoint(tmp_path / "p", "pretrain", 5)
    refused(pretrain(data, train_iters=10, save="p"), says, "iter_0000010")
    refused(
        tiny.command(data, "zero_out", init_from="p", save="z"), says if says != "manifest.json" else "iter_0000010"
    )


def test_newest_checkpoint_lost_altogether(refused, data, tmp_path):
    checkpoint(tmp_path / "p", "pretrain", 5)
    (tmp_path / "p" / LATEST).write_text("10\n")
    refused(
        pretrain(data, train_iters=10, save="p"), "iter_0000010 is not a complete checkpoint", "iter_0000005", LATEST
    )


@pytest.mark.parametrize(
    "stage, of, says",
    [
        ("zero_out", "zero_out", "stage zero_out cannot start from"),
        ("zero_out", "retrofit", "it needs import or pretrain"),
        ("retrofit", "pretrain", "which is of stage pretrain; it needs zero_out or retrofit"),
        ("finetune", "zero_out", "which is of stage zero_out; it needs retrofit"),
        ("finetune", "finetune", "it needs retrofit"),
        ("pretrain", "finetune", "it needs import or pretrain"),
    ],
)
def test_wrong_order(refused, data, tmp_path, stage, of, says):
    checkpoint(tmp_path / "from", of, target_cr=2.0 if of in ("retrofit", "finetune") else 1.0)
    more = {"pretrain": dict(train_iters=4), "retrofit": dict(target_cr=2)}.get(stage, {})
    refused(tiny.command(data, stage, init_from="from", save="run", **more), says, "from/iter_0000010")


def test_stages_need_what_they_start_from(refused, data, tmp_path):
    for stage, needs in (
        ("zero_out", "import or pretrain"),
        ("retrofit", "zero_out or retrofit"),
        ("finetune", "retrofit"),
    ):
        more = dict(target_cr=2) if stage == "retrofit" else {}
        refused([*tiny.command(data, stage, save="run", **more)], f"stage {stage} needs --init-from", needs)
    (tmp_path / "empty").mkdir()
    refused(tiny.command(data, "zero_out", init_from="empty", save="run"), "empty holds no complete checkpoint")
    refused(tiny.command(data, "zero_out", init_from="absent", save="run"), "checkpoint absent does not exist")
    checkpoint(tmp_path / "z", "zero_out", 7, 10)
    refused(
        tiny.command(data, "retrofit", init_from="z", save="run", target_cr=2),
        "z/iter_0000007 is unfinished",
        "iteration 7 of 10",
    )
    checkpoint(tmp_path / "z", "zero_out", 10, 10)
    refused(tiny.command(data, "retrofit", init_from="z", save="run"), "stage retrofit needs target_cr")
    refused(tiny.command(data, "retrofit", init_from="z", save="run", target_cr=1), "target_cr 1.0", "already")


def test_another_model(refused, data, tmp_path):
    checkpoint(tmp_path / "p", "pretrain")
    refused(
        tiny.command(data, "zero_out", init_from="p", save="z", hidden_size=64), "model.hidden_size is 64", "with 32"
    )
    # How a model decides is its own from the first stage that compresses.
    checkpoint(tmp_path / "r", "retrofit", target_cr=2.0)
    refused(
        tiny.command(data, "finetune", init_from="r", save="f", decision_bias=4), "dmc.decision_bias is 4.0", "with 5.0"
    )


@pytest.mark.parametrize(
    "change, says",
    [
        (dict(train_iters=20), ["stage.train_iters is 20", "written with 10"]),
        (dict(lr=2e-3), ["optimizer.lr is 0.002", "written with 0.001"]),
        (dict(seed=5), ["training.seed is 5", "written with 1234"]),
        (dict(global_batch_size=8), ["training.global_batch_size is 8", "written with 4"]),
        (dict(seq_length=16), ["data.seq_length is 16", "written with 32"]),
        (dict(bf16=True), ["training.bf16 is True", "written with False"]),
        (dict(loss_weight=2), ["dmc.loss_weight is 2.0", "written with 1.0"]),
        (dict(hidden_size=64), ["model.hidden_size is 64", "trained with 32"]),
    ],
)
def test_resuming_with_other_settings(refused, data, tmp_path, change, says):
    checkpoint(tmp_path / "run", "pretrain", 5)
    refused(pretrain(data, **{"train_iters": 10, **change}), *says)


def test_save_of_another_stage(refused, data, tmp_path):
    checkpoint(tmp_path / "p", "pretrain")
    refused(
        tiny.command(data, "zero_out", init_from="p", save="p"), "--save p holds stage pretrain", "directory of its own"
    )


# What is accepted, and the compression ratios that follow


def test_ratios_follow_from_the_checkpoint(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoint(tmp_path / "z", "zero_out")
    checkpoint(tmp_path / "r", "retrofit", 6, 10, target_cr=1.6)
    config, start = retrofit.prepare(tiny.command(data, "retrofit", init_from="z", save="a", target_cr=2))
    assert (config.stage.start_cr, config.stage.target_cr, start.manifest.stage) == (1.0, 2.0, "zero_out")
    assert not start.resumes
    assert config.model.hidden_size == 32
    config = retrofit.prepare(tiny.command(data, "retrofit", init_from="r", save="a", target_cr=4))[0]
    assert config.stage.start_cr == 1.6  # unfinished, usable at the ratio reached
    config = retrofit.prepare(tiny.command(data, "finetune", init_from="r", save="a"))[0]
    assert config.stage.target_cr == 1.6
    # A run goes on although what it started from is gone.
    checkpoint(tmp_path / "run", "retrofit", 5, 10, target_cr=2.0)
    argv = tiny.command(data, "retrofit", init_from="gone", save="run", target_cr=2, train_iters=10)
    config, start = retrofit.prepare(argv)
    assert config.stage.start_cr == 1.0 and start.manifest.iteration == 5 and start.resumes
    # A checkpoint that was half deleted by an older version does not get in the way of a newer one.
    (tmp_path / "run" / "iter_0000001").mkdir()
    assert retrofit.prepare(argv)[1].manifest.iteration == 5


def test_real_processes(data, tmp_path):
    """Through torchrun two ranks say it once; without it the status is 2."""
    argv = pretrain(data, save=tmp_path / "run", tensor_model_parallel_size=4)
    module = ["-m", "megatron.dmc.training.retrofit", *argv]
    alone = subprocess.run([sys.executable, *module], env=subprocess_env(), capture_output=True, text=True, timeout=120)
    assert alone.returncode == 2 and alone.stdout == "", alone.stderr
    assert alone.stderr.startswith("error: tensor_model_parallel_size 4 exceeds") and alone.stderr.count("\n") == 1
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *module]
    both = subprocess.run(launch, env=subprocess_env(), capture_output=True, text=True, timeout=180)
    assert both.returncode != 0 and both.stderr.count("error: tensor_model_parallel_size 4 exceeds") == 1
    assert "exitcode  : 2" in both.stderr or "exitcode: 2" in both.stderr
    assert not (tmp_path / "run").exists()
