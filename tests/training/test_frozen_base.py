"""Adapters on a frozen base: what a checkpoint holds, where it finds the rest, and runs that are killed on the way."""

import json
import shutil
import signal

import pytest
import torch
from helpers import families, tiny

from megatron.dmc.checkpoint import convert
from megatron.dmc.checkpoint.adapter_export import export_adapter
from megatron.dmc.checkpoint.formats import adapter, hf
from megatron.dmc.checkpoint.frozen_base import find_base
from megatron.dmc.checkpoint.manifest import read_manifest
from megatron.dmc.training import retrofit

pytestmark = pytest.mark.slow

ADAPTER = dict(method="dms", decision_source="adapter", decision_scale=100.0, window=4, freeze_base=True, bf16=True)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny.make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def base(data, tmp_path_factory):
    root = tmp_path_factory.mktemp("base")
    tiny.run(tiny.command(data, "pretrain", train_iters=3, save_interval=2, save=root / "base"), root / "run")
    return root / "base" / "iter_0000003"


def command(data, base, save, **more):
    return tiny.command(
        data, "retrofit", train_iters=6, save_interval=2, target_cr=2, init_from=base, save=save, **ADAPTER, **more
    )


@pytest.fixture(scope="module")
def whole(data, base, tmp_path_factory):
    root = tmp_path_factory.mktemp("whole")
    return root / "save", tiny.run(command(data, base, root / "save"), root / "run")


def test_a_checkpoint_holds_adapters_and_names_its_base(base, whole):
    checkpoint = whole[0] / "iter_0000006"
    tensors = tiny.checkpoint_tensors(checkpoint)
    names = {name for name, value in tensors.items() if isinstance(value, torch.Tensor) and value.dim() > 1}
    assert len(names) == 2 * 4 and all("dms_proj_alpha" in name for name in names)  # bf16, fp32 and two moments
    manifest = read_manifest(checkpoint)
    assert find_base(checkpoint, manifest) == base and manifest.lineage == ["pretrain"]
    values = whole[1].values()
    assert all(float.fromhex(values[i]["distill loss"]) >= 0 for i in values)
    assert float.fromhex(values[6]["CR"]) > 1  # the adapters have been trained


def test_a_killed_run_continues_bit_for_bit(data, base, whole, tmp_path):
    argv = command(data, base, tmp_path / "save")
    run = tiny.Run(argv, tmp_path / "run", hang="step:6")
    run.wait_for_hang()
    run.kill()
    resumed = tiny.run(argv, tmp_path / "run")
    assert sorted(resumed.values()) == [3, 4, 5, 6], resumed.output()
    assert all(values == whole[1].values()[i] for i, values in resumed.values().items())
    tiny.assert_same_checkpoint(whole[0] / "iter_0000006", tmp_path / "save" / "iter_0000006")


def test_the_next_stage_finds_the_base_and_refuses_another(data, base, whole, tmp_path):
    argv = tiny.command(
        data, "finetune", train_iters=2, init_from=whole[0], save=tmp_path / "save", freeze_base=True, bf16=True
    )
    config, start = retrofit.prepare(argv)
    assert config.dmc.decision_source == "adapter" and config.stage.target_cr == 2
    tiny.run(argv, tmp_path / "run")
    assert read_manifest(tmp_path / "save" / "iter_0000002").base == str(base)
    moved = shutil.copytree(base, tmp_path / base.name)
    assert find_base(start.path, start.manifest, moved) == moved
    with pytest.raises(ValueError, match="has other weights than those that the adapters"):
        find_base(start.path, start.manifest, base.with_name("iter_0000002"))
    with pytest.raises(ValueError, match="which is not there; put that checkpoint back"):
        find_base(start.path, start.manifest, tmp_path / "nowhere")
    with pytest.raises(ValueError, match="needs zero_out or retrofit"):
        retrofit.prepare(tiny.command(data, "retrofit", target_cr=2, init_from=base, method="dms"))


def test_the_adapters_of_a_run_go_on_the_model_that_was_imported(data, tmp_path):
    """Hugging Face -> import -> adapters trained -> export of both kinds; the base is the original by its hash."""
    families.make("qwen3", tmp_path / "hf", vocab_size=tiny.VOCABULARY)
    convert.import_hf(tmp_path / "hf", tmp_path / "base")
    argv = tiny.command(
        data, "retrofit", train_iters=2, target_cr=2, init_from=tmp_path / "base", save=tmp_path / "save", **ADAPTER
    )
    tiny.run(argv, tmp_path / "run")
    convert.export(tmp_path / "save", tmp_path / "whole")
    export_adapter(tmp_path / "save", tmp_path / "alone", base_model=str(tmp_path / "hf"))
    served = adapter.open_directory(tmp_path / "hf", tmp_path / "alone")
    adapter.check_base(served)
    whole = hf.open_directory(tmp_path / "whole")
    assert whole.config["dmc"] == served.config["dmc"] and whole.config["dmc"]["decision_source"] == "adapter"
    assert whole.tensors.keys() == served.tensors.keys()
    assert all(hf.equal(tensor, served.tensors[name]) for name, tensor in whole.tensors.items())


def test_calibrated_adapters_are_exported_and_trained_on(data, base, tmp_path):
    """In bf16. Started again, a finished calibration has nothing to do."""
    argv = tiny.command(
        data, "calibrate", train_iters=3, target_cr=2, init_from=base, save=tmp_path / "calibrated", **ADAPTER
    )
    tiny.run(argv, tmp_path / "run")
    checkpoint = tmp_path / "calibrated" / "iter_0000003"
    manifest = read_manifest(checkpoint)
    assert (manifest.stage, manifest.base, manifest.has_optimizer) == ("calibrate", str(base), False)
    assert manifest.measured_cr == pytest.approx(2, rel=0.1) and manifest.target_cr == 2
    tensors = tiny.checkpoint_tensors(checkpoint)
    (weights,) = [x for name, x in tensors.items() if name.endswith("dms_proj_alpha.weight")]  # of all layers
    assert all(layer.abs().max() > 0 for layer in weights)
    assert "stage calibrate is finished; nothing to do" in tiny.run(argv, tmp_path / "run").output()

    with pytest.raises(ValueError, match="decision_bias is nan"):
        export_adapter(checkpoint, tmp_path / "alone", decision_bias=float("nan"))
    export_adapter(checkpoint, tmp_path / "alone", decision_bias=7.5)
    config = json.loads((tmp_path / "alone" / "config.json").read_text())["dmc"]
    assert (config["decision_bias"], config["stage"]) == (7.5, "calibrate") and "measured_cr" not in config
    card = (tmp_path / "alone" / "README.md").read_text()
    assert "at the end of training: not measured." in card and "bias 7.5." in card
    more = dict(init_from=checkpoint, save=tmp_path / "trained", freeze_base=True, bf16=True)
    config, _ = retrofit.prepare(tiny.command(data, "finetune", train_iters=2, **more))
    assert config.stage.target_cr == 2 and config.dmc.window == ADAPTER["window"]


def test_a_calibration_that_a_signal_ends_is_told_and_starts_anew(data, base, tmp_path):
    """It has nothing to save before its end, so its status is not that of a run that has."""
    argv = tiny.command(
        data, "calibrate", train_iters=3, target_cr=2, init_from=base, save=tmp_path / "save", **ADAPTER
    )
    run = tiny.Run(argv, tmp_path / "run", hang="pause:3")  # in the second batch
    run.wait_for_hang()
    run.signal(signal.SIGTERM)
    run.join(retrofit.LOST)
    assert "leaving at batch 2 of 3: signal 15; nothing saved" in run.output()
    assert not list((tmp_path / "save").glob("iter_*"))
    tiny.run(argv, tmp_path / "run")
    assert (tmp_path / "save" / "iter_0000003").is_dir()


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(target_cr=None), "stage calibrate needs target_cr"),
        (dict(train_iters=1), "a batch to fit to and one to count"),
        (dict(window=8), "is too short to calibrate a window of 8 tokens"),
        (dict(freeze_base=False), "fits the adapters of a frozen model"),
        (dict(decision_source="query"), "fits the adapters of a frozen model"),
    ],
)
def test_a_calibration_that_cannot_be_is_refused(data, base, tmp_path, changes, words):
    values = dict(train_iters=3, target_cr=2, init_from=base, save=tmp_path / "save", **ADAPTER) | changes
    if "decision_source" in changes:
        values["freeze_base"] = False
    with pytest.raises(ValueError, match=words):
        retrofit.prepare(tiny.command(data, "calibrate", **values))
