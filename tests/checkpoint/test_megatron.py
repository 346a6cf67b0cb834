"""``torch_dist`` checkpoints of Megatron-LM, Megatron-Bridge and NeMo, made by megatron-core's own ``save``."""

from __future__ import annotations

import io
import json
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import megatron_format as megatron
import pytest
import torch
import yaml
from helpers.in_process import megatron_in_process, run_config
from helpers.marker import Marker
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex
from transformers import AutoModelForCausalLM

from megatron.dmc import cli
from megatron.dmc.checkpoint import convert, mapping
from megatron.dmc.checkpoint.formats.torch_dist import DistReader
from megatron.dmc.checkpoint.manifest import newest_checkpoint, read_manifest, resolve_checkpoint
from megatron.dmc.config import RunConfig

LLAMA3 = dict(
    rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192
)
CASES: dict[str, dict] = {
    "llama": dict(vocab_size=90),
    "llama3.1-tied": dict(rope_scaling=LLAMA3, rotary_base=500000, untie_embeddings_and_output_weights=False),
    "qwen2": dict(add_qkv_bias=True),
    "qwen3": dict(qk_layernorm=True, kv_channels=24),
}


@pytest.fixture(scope="module", autouse=True)
def one_process() -> Iterator[None]:
    with megatron_in_process(run_config()):
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, RunConfig, torch.Tensor]]:
    """Case -> (directory as --save was, configuration, logits of the stock model)."""
    root, result = tmp_path_factory.mktemp("megatron"), {}
    for case, changes in CASES.items():
        run = run_config(**changes)
        model = megatron.stock_model(run)
        megatron.fill(model)
        scaled = run.model.rope_scaling is not None
        args = megatron.arguments(run.model, use_rope_scaling=scaled, vocab_size=run.model.vocab_size)
        megatron.save(root / case, model, args, extra_state=case == "llama")
        result[case] = root / case, run, megatron.logits(model, tokens())
    return result


def tokens() -> torch.Tensor:
    return torch.randint(90, (2, 40), generator=torch.Generator().manual_seed(3))


def refused(capsys: pytest.CaptureFixture[str], source: Path, *parts: str, argv: tuple[str, ...] = ()) -> None:
    save = source.parent / "refused"
    status = cli.main(["convert", "import", "--megatron", str(source), "--save", str(save), *argv])
    error = capsys.readouterr().err
    assert status == 2 and error.count("\n") == 1 and error.startswith("error: "), error
    assert all(part in error for part in parts), error
    assert not save.exists()


def assert_holds(checkpoint: Path, run: RunConfig) -> None:
    """Every parameter of the imported checkpoint is the whole one that the shards were cut from."""
    reader = DistReader(checkpoint)
    family = mapping.family_of(mapping.to_hf_config(run.model, "float32"))
    for rule in mapping.rules(family, run.model):
        found, shape = reader.get(rule.megatron), rule.megatron_shape(run.model)
        if rule.per_layer:
            layers = [reader.get(rule.megatron, i).read() for i in range(run.model.num_layers)]
            expected = megatron.full_tensor(rule.megatron, (len(layers), *shape))
            assert torch.equal(torch.stack(layers), expected), rule.megatron
        else:
            n = run.model.vocab_size if shape[0] == run.model.padded_vocab_size else shape[0]
            assert torch.equal(found.read(0, n), megatron.full_tensor(rule.megatron, shape)[:n]), rule.megatron


@pytest.mark.parametrize("case", CASES)
def test_import_computes_what_megatron_computes(made, case: str, tmp_path: Path) -> None:
    """Stock GPTModel -> megatron-core's save -> import -> export -> transformers: the same logits."""
    source, run, expected = made[case]
    convert.import_megatron(source, tmp_path / "mg")
    assert_holds(tmp_path / "mg", run)
    convert.export(tmp_path / "mg", tmp_path / "hf")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    found = model(tokens()).logits
    vocab = run.model.vocab_size
    assert found.shape[-1] == vocab and expected.std() > 0.3
    assert (found - expected[..., :vocab]).abs().max() < 1e-4
    manifest = read_manifest(tmp_path / "mg")
    assert (manifest.stage, manifest.iteration, manifest.source) == ("import", 100, "iter_0000100")


@pytest.mark.slow
def test_any_layout_with_its_optimizer(tmp_path: Path) -> None:
    """Tensor x pipeline parallel size 2 x 2, and the distributed optimizer's state beside the weights."""
    run = run_config(num_layers=4, num_attention_heads=8, num_query_groups=4)
    megatron.save_in_processes(tmp_path / "source", run, tp=2, pp=2)
    entries = DistReader(tmp_path / "source" / "iter_0000100").metadata.state_dict_metadata
    assert any(name.startswith("optimizer.") for name in entries)
    assert len(entries["decoder.layers.mlp.linear_fc1.weight"].chunks) == 4 * 2 * 2  # layers, ranks, gate and up
    convert.import_megatron(tmp_path / "source", tmp_path / "mg")
    assert_holds(tmp_path / "mg", run)


def test_names_of_other_layers(made, tmp_path: Path) -> None:
    """Unfused norms, NeMo's prefix, layers one by one, gate and up apart: the same weights."""
    _, run, _ = made["llama"]
    model, args = megatron.stock_model(run), megatron.arguments(run.model, vocab_size=run.model.vocab_size)
    megatron.fill(model)
    unfused = {
        "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
        "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
    }

    def local(key: str) -> str:
        for fused, name in unfused.items():
            key = key.replace(fused, name)
        return key

    ways: dict[str, dict[str, Any]] = {
        "local": dict(rename=local),
        "nemo": dict(rename=lambda key: f"module.{key}"),
        "one by one": dict(non_homogeneous_layers=True),
        "apart": dict(singleton_local_shards=True, non_homogeneous_layers=True),
    }
    for name, way in ways.items():
        source = megatron.save(tmp_path / name, model, args, **way)
        stored = set(DistReader(source).metadata.state_dict_metadata)
        assert {
            "local": "decoder.layers.input_layernorm.weight",
            "nemo": "module.decoder.final_layernorm.weight",
            "one by one": "decoder.layers.1.mlp.linear_fc2.weight",
            "apart": "decoder.layers.1.mlp.linear_fc1.weight_v",
        }[name] in stored, sorted(stored)
        if name == "one by one":
            change_args(tmp_path / name, num_layers=9999)
            with pytest.raises(ValueError, match="holds 2 layers; expected 9999"):
                convert.import_megatron(tmp_path / name, tmp_path / "odd")
            change_args(tmp_path / name, num_layers=2)
        convert.import_megatron(tmp_path / name, tmp_path / f"{name}.mg")
        assert_same_tensors(tmp_path / f"{name}.mg", made["llama"][0], tmp_path)


def assert_same_tensors(checkpoint: Path, source: Path, tmp_path: Path) -> None:
    if not (tmp_path / "expected").exists():
        convert.import_megatron(source, tmp_path / "expected")
    one, two = DistReader(checkpoint), DistReader(tmp_path / "expected")
    assert one.tensors().keys() == two.tensors().keys()
    for name in one.tensors():
        layers = range(2) if name.startswith("decoder.layers.") else [None]
        assert all(torch.equal(one.get(name, i).read(), two.get(name, i).read()) for i in layers), name


def test_common_state_within_the_checkpoint(made, tmp_path: Path) -> None:
    """megatron-core of 2026 keeps what common.pt held as an object of the checkpoint: moved there by hand."""
    source = shutil.copytree(made["llama"][0], tmp_path / "new") / "iter_0000100"
    content = torch.load(source / "common.pt", weights_only=False)
    (source / "common.pt").unlink()
    put_common(source, [content])
    convert.import_megatron(tmp_path / "new", tmp_path / "mg")
    assert_holds(tmp_path / "mg", made["llama"][1])


def put_common(source: Path, content: object) -> None:
    metadata, buffer = pickle.loads((source / ".metadata").read_bytes()), io.BytesIO()
    torch.save(content, buffer)
    (source / "__0_9.distcp").write_bytes(buffer.getvalue())
    name = "common_state/shard_0_1"
    metadata.state_dict_metadata[name] = BytesStorageMetadata()
    metadata.storage_data[MetadataIndex(name)] = _StorageInfo("__0_9.distcp", 0, len(buffer.getvalue()))
    (source / ".metadata").write_bytes(pickle.dumps(metadata))


@pytest.mark.parametrize("nested", [False, True])
def test_run_config_of_megatron_bridge(made, tmp_path: Path, nested: bool) -> None:
    _, run, _ = made["qwen2"]
    model = megatron.stock_model(run)
    megatron.fill(model)
    source = megatron.save(tmp_path / "bridge", model, None)
    (source / "run_config.yaml").write_text(yaml.safe_dump({"model": bridge_settings(run, nested)}))
    said: list[str] = []
    convert.import_megatron(tmp_path / "bridge", tmp_path / "mg", progress=convert.Progress(say=said.append))
    assert_holds(tmp_path / "mg", run)
    # NeMo 2: the same beside the weights.
    (tmp_path / "nemo" / "context").mkdir(parents=True)
    shutil.copytree(source, tmp_path / "nemo" / "weights")
    (tmp_path / "nemo" / "weights" / "run_config.yaml").unlink()
    text = yaml.safe_dump({"config": bridge_settings(run, nested)})
    (tmp_path / "nemo" / "context" / "model.yaml").write_text(text)
    convert.import_megatron(tmp_path / "nemo", tmp_path / "mg2")
    assert_holds(tmp_path / "mg2", run)


def bridge_settings(run: RunConfig, nested: bool) -> dict:
    m = run.model
    layers = dict(
        num_layers=m.num_layers,
        hidden_size=m.hidden_size,
        ffn_hidden_size=m.ffn_hidden_size,
        num_attention_heads=m.num_attention_heads,
        num_query_groups=m.kv_heads,
        kv_channels=m.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=m.norm_epsilon,
        gated_linear_unit=True,
        activation_func={"_target_": "torch.nn.functional.silu", "_call_": False},
        add_bias_linear=False,
        add_qkv_bias=m.add_qkv_bias,
        qk_layernorm=m.qk_layernorm,
        num_moe_experts=None,
        multi_latent_attention=False,
        window_size=None,
    )
    outer = dict(
        vocab_size=m.vocab_size,
        make_vocab_size_divisible_by=m.make_vocab_size_divisible_by,
        seq_length=m.max_position_embeddings,
        share_embeddings_and_output_weights=not m.untie_embeddings_and_output_weights,
        position_embedding_type="rope",
        rotary_base=m.rotary_base,
        rotary_percent=1.0,
        rope_scaling=False,
    )
    return {**outer, "transformer": layers} if nested else {**outer, **layers, "_target_": "x.LlamaModelProvider"}


def change_args(source: Path, **changes: Any) -> None:
    path = source / "iter_0000100" / "common.pt"
    content = torch.load(path, weights_only=False)
    for name, value in changes.items():
        setattr(content["args"], name, value)
        if name.startswith("dmc_") and value is None:
            delattr(content["args"], name)
    torch.save(content, path)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (dict(num_experts=8), "args.num_experts"),
        (dict(multi_latent_attention=True), "args.multi_latent_attention"),
        (dict(position_embedding_type="yarn", use_rotary_position_embeddings=False), "args.position_embedding_type"),
        (dict(position_embedding_type="none", use_rotary_position_embeddings=False), "args.position_embedding_type"),
        (dict(mtp_num_layers=1), "args.mtp_num_layers"),
        (dict(hybrid_layer_pattern="M*-M*-"), "args.hybrid_layer_pattern"),
        (dict(swiglu=False), "args.swiglu"),
        (dict(normalization="LayerNorm"), "args.normalization"),
        (dict(window_size=(128, 0)), "args.window_size"),
        (dict(num_layers=3), "3 layers"),
        (dict(num_layers=9999), "9999 layers"),
        (dict(num_layers="x"), "num_layers"),
        (dict(num_attention_heads=10**9, num_query_groups=10**9), "1000000000 query"),
        (dict(hidden_size=128), "has shape [96, 64]; expected [96, 128]"),
        (dict(add_qkv_bias=True), "lacks decoder.layers.self_attention.linear_qkv.bias"),
        (dict(vocab_size=9999), "9999"),
    ],
)
def test_what_is_not_understood(made, tmp_path: Path, changes: dict, named: str, capsys) -> None:
    source = shutil.copytree(made["llama"][0], tmp_path / "source")
    change_args(source, **changes)
    refused(capsys, source, named)


def test_tensors_of_another_architecture(made, tmp_path: Path, capsys) -> None:
    """The arguments may say nothing of them."""
    _, run, _ = made["llama"]
    model, args = megatron.stock_model(run), megatron.arguments(run.model, vocab_size=run.model.vocab_size)
    megatron.fill(model)
    for i, (old, new) in enumerate(
        {"mlp.linear_fc2.weight": "mlp.experts.linear_fc2.weight", "final_layernorm": "final_norm"}.items()
    ):
        megatron.save(tmp_path / str(i), model, args, rename=lambda key, old=old, new=new: key.replace(old, new))
        refused(capsys, tmp_path / str(i), "lacks", old)


def test_other_formats_and_the_way_to_import_them(made, tmp_path: Path, capsys) -> None:
    source = made["llama"][0]
    convert.import_megatron(source, tmp_path / "mg")
    refused(capsys, tmp_path / "mg", "needs no import")
    broken = shutil.copytree(source, tmp_path / "zarr")
    metadata = broken / "iter_0000100" / "metadata.json"
    metadata.write_text(json.dumps({**json.loads(metadata.read_text()), "sharded_backend": "zarr"}))
    refused(capsys, broken, "sharded_backend", "'zarr'")
    metadata.unlink()
    refused(capsys, broken, "fsdp_dtensor", "not supported")
    args = shutil.copytree(source, tmp_path / "args")
    (args / "iter_0000100" / "common.pt").unlink()
    refused(capsys, args, "does not say which model", "run_config.yaml")
    (tmp_path / "empty").mkdir()
    refused(capsys, tmp_path / "empty", "no torch_dist checkpoint")
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text("{}")
    refused(capsys, tmp_path / "hf", "a Hugging Face directory", "dmc convert import --hf")


def test_every_command_names_the_import(made, tmp_path: Path, capsys) -> None:
    """No command advises to remove a good checkpoint."""
    source = made["llama"][0]
    way = f"dmc convert import --megatron {source}"
    for path in (source, source / "iter_0000100"):
        with pytest.raises(ValueError, match="Megatron-LM, Megatron-Bridge or NeMo wrote") as error:
            resolve_checkpoint(path)
        assert way in str(error.value) and "remove" not in str(error.value)
    with pytest.raises(ValueError, match="give this run a --save of its own") as error:
        newest_checkpoint(source)
    assert way in str(error.value) and "remove" not in str(error.value)
    assert cli.main(["convert", "export", "--load", str(source), "--save", str(tmp_path / "hf")]) == 2
    assert way in capsys.readouterr().err
    argv = ["convert", "import", "--legacy", str(source), "--save", str(tmp_path / "mg")]
    assert cli.main(argv) == 2
    assert way in capsys.readouterr().err
    assert cli.main(["generate", str(source), "--prompt", "x"]) == 2
    error = capsys.readouterr().err
    assert f"{way} --save CHECKPOINT and dmc convert export --load CHECKPOINT" in error
    convert.import_megatron(source, tmp_path / "mg")
    for argv in (["generate", str(tmp_path / "mg"), "--prompt", "x"], ["verify", "--hf", str(tmp_path / "mg")]):
        assert cli.main(argv if argv[0] == "generate" else ["convert", *argv, "--load", str(tmp_path / "mg")]) == 2
        assert f"dmc convert export --load {tmp_path / 'mg'} --save DIR" in capsys.readouterr().err
    assert cli.main(["convert", "inspect", str(source)]) == 0
    said = capsys.readouterr().out
    assert "needs `import --megatron`" in said and "2 layers, hidden 64" in said and "TP 1 x PP 1" in said


@pytest.mark.parametrize("place", ["common.pt", "common_state", "args", ".metadata"])
def test_nothing_in_it_is_run(made, tmp_path: Path, place: str, capsys) -> None:
    source = shutil.copytree(made["llama"][0], tmp_path / "source") / "iter_0000100"
    marker = Marker(tmp_path / "mark")
    if place == "args":
        change_args(source.parent, hidden_size=marker)
    elif place == "common_state":
        (source / "common.pt").unlink()
        put_common(source, [{"args": marker}])
    elif place == ".metadata":
        (source / ".metadata").write_bytes(pickle.dumps(marker))
    else:
        torch.save(marker, source / "common.pt")
    refused(capsys, source.parent, "is refused", "would run code")
    assert not (tmp_path / "mark").exists()
