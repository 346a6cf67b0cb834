"""DMS models of other programs and adapters alone: told apart, imported, exported, never taken for plain ones."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers import dms_models, families
from helpers.dms_models import FASTDMS, edit
from safetensors.torch import load_file, save_file

from megatron.dmc.checkpoint import convert, mapping
from megatron.dmc.checkpoint.adapter_export import export_adapter
from megatron.dmc.checkpoint.convert import Progress
from megatron.dmc.checkpoint.formats import adapter, hf, torch_dist
from megatron.dmc.checkpoint.formats.base import Given
from megatron.dmc.checkpoint.formats.registry import describe
from megatron.dmc.checkpoint.formats.torch_dist import DistReader, read_run_config
from megatron.dmc.checkpoint.frozen_base import base_hash
from megatron.dmc.checkpoint.manifest import read_manifest
from megatron.dmc.checkpoint.megatron_export import export_megatron
from megatron.dmc.checkpoint.verify import verify
from megatron.dmc.cli.convert import main
from megatron.dmc.config import DMCConfig
from megatron.dmc.evaluation.logits import compare_logits
from megatron.dmc.inference import LLM, SamplingParams
from megatron.dmc.inference.config import EngineConfig
from megatron.dmc.inference.weights import read_info


def quiet() -> Progress:
    return Progress(say=lambda text: None)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """nvidia, fastdms, log/final, head, layer: foreign directories; head-base and layer-base: the models below."""
    root = tmp_path_factory.mktemp("dms")
    dms_models.nvidia(root / "nvidia")
    dms_models.fastdms(root / "fastdms")
    (root / "log").mkdir()
    dms_models.fastdms(root / "log" / "final", metadata="training_log.json")
    dms_models.model_optimizer(root / "head")
    dms_models.model_optimizer(root / "layer", case="llama3.1", per="layer")
    families.make("qwen3-untied", root / "head-base", shard="1GB")
    families.make("llama3.1", root / "layer-base")
    return root


def dms(**values: object) -> DMCConfig:
    settings = dict(decision_scale=100.0, decision_bias=5.0, window=8)
    return DMCConfig(method="dms", **(settings | values))


WANTED = {
    "nvidia": dms(decision_source="query"),
    "fastdms": dms(decision_source="query", decision_about="self", window=16),
    "log/final": dms(decision_source="query", decision_about="self", window=16),
    "head": dms(decision_source="adapter"),
    "layer": dms(decision_source="adapter", decision_per="layer"),
}


@pytest.mark.parametrize("name", WANTED)
def test_there_and_back(made: Path, name: str, tmp_path: Path) -> None:
    """A foreign directory is described as it is, imported, exported with every bit, and imported again."""
    convert.import_hf(made / name, tmp_path / "mg", progress=quiet())
    assert read_run_config(tmp_path / "mg").dmc == WANTED[name]
    manifest = read_manifest(tmp_path / "mg")
    assert (manifest.stage, manifest.target_cr) == ("retrofit", 8.0)
    assert "identical" in verify(made / name, tmp_path / "mg", quiet())
    convert.export(tmp_path / "mg", tmp_path / "out", progress=quiet())
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == "dmc" and not any(key.startswith("dms_") for key in config)
    assert mapping.dmc_from_hf_config(config) == WANTED[name]
    theirs, ours = hf.open_directory(made / name), hf.open_directory(tmp_path / "out")
    assert theirs.tensors.keys() == ours.tensors.keys()
    assert all(hf.equal(tensor, ours.tensors[key]) for key, tensor in theirs.tensors.items())
    convert.import_hf(tmp_path / "out", tmp_path / "again", progress=quiet())
    assert "identical" in verify(tmp_path / "out", tmp_path / "mg", quiet())
    assert read_run_config(tmp_path / "again").dmc == WANTED[name]
    for directory in (made / name, tmp_path / "out"):
        assert "same most likely token 100.00%" in compare_logits(directory, tmp_path / "mg")


@pytest.mark.parametrize("name", WANTED)
def test_engine_and_inspect_know_what_it_is(made: Path, name: str) -> None:
    info = read_info(EngineConfig().open_directory(made / name))
    assert info.dmc == WANTED[name] and info.expected_cr == 8.0
    text = describe(made / name)
    assert "dms: marked tokens are evicted" in text and f"{WANTED[name].decision_source}, per" in text
    assert ("about the token itself" if WANTED[name].decision_about == "self" else "about the token before") in text
    assert ("FastDMS" in text) == (WANTED[name].decision_about == "self")


def test_adapters_by_layer_keep_the_row_that_is_read(made: Path, tmp_path: Path) -> None:
    name = "model.layers.1.self_attn.dms_proj_alpha.weight"
    rows = load_file(made / "layer" / "model.safetensors")[name]
    assert rows.shape[0] == families.SIZES["num_key_value_heads"]
    convert.import_hf(made / "layer", tmp_path / "mg", progress=quiet())
    stored = DistReader(tmp_path / "mg").get("decoder.layers.self_attention.dms_proj_alpha.weight", 1)
    assert torch.equal(stored.read(), rows[:1])


def test_the_caller_may_say_what_decisions_are_about(made: Path, tmp_path: Path) -> None:
    assert (
        main(["import", "--hf", str(made / "nvidia"), "--save", str(tmp_path / "mg"), "--decision-about", "self"]) == 0
    )
    assert read_run_config(tmp_path / "mg").dmc.decision_about == "self"
    opened = EngineConfig(decision_about="previous").open_directory(made / "fastdms")
    assert opened.config["dmc"]["decision_about"] == "previous"
    with pytest.raises(ValueError, match="--decision-about self is for DMS models of other programs"):
        hf.open_directory(made / "head-base", Given(decision_about="self"))


@pytest.mark.parametrize(
    "name, keys, message",
    [
        ("nvidia", {"dms_window_size": None}, "dms_window_size is missing"),
        ("nvidia", {"dms_alpha_scale": -100.0}, "dms_alpha_scale is -100.0"),
        ("nvidia", {"dms_disable_eviction": True}, "dms_disable_eviction is True"),
        ("nvidia", {"dms_alpha_per": "layer"}, "dms_alpha_per is 'layer'"),
        ("nvidia", {"dms_sinks": 4}, "dms_sinks is 4"),
        ("nvidia", {"dms_separate_alpha": True}, "lacks 4 tensors.*dms_proj_alpha"),
        ("head", {"dms_separate_alpha": False}, "holds the adapters of a DMS model"),
        ("head", {"dms_separate_alpha": "yes"}, "dms_separate_alpha is 'yes'"),
    ],
)
def test_descriptions_that_are_refused(made: Path, name: str, keys: dict, message: str, tmp_path: Path) -> None:
    shutil.copytree(made / name, tmp_path / "hf")
    edit(tmp_path / "hf", keys)
    for read in (describe, hf.open_model):
        with pytest.raises(ValueError, match=message):
            read(tmp_path / "hf")


def test_adapters_without_a_description_are_no_plain_model(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "head", tmp_path / "hf")
    edit(tmp_path / "hf", {}, tuple(dms_models.MODEL_OPTIMIZER))
    with pytest.raises(ValueError, match="holds the adapters of a DMS model"):
        EngineConfig().open_directory(tmp_path / "hf")


@pytest.mark.parametrize(
    "metadata, message",
    [
        ({**FASTDMS, "alpha_offset": None}, "alpha_offset is missing"),
        ({"config": 3}, "config is 3"),
        ({**FASTDMS, "schema_version": 2, "sidecar": {"path": "w.safetensors"}}, "schema_version is 2"),
        ({**FASTDMS, "borrowed_query_channel": 0}, "borrowed_query_channel is 0"),
    ],
)
def test_metadata_that_is_refused(made: Path, metadata: dict, message: str, tmp_path: Path) -> None:
    shutil.copytree(made / "fastdms", tmp_path / "hf")
    (tmp_path / "hf" / "dms_metadata.json").write_text(json.dumps(metadata))
    with pytest.raises(ValueError, match=message):
        hf.open_directory(tmp_path / "hf")


def test_two_descriptions_need_a_decision(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "nvidia", tmp_path / "hf")
    same = {**FASTDMS, "window_size": 8}
    (tmp_path / "hf" / "dms_metadata.json").write_text(json.dumps(same))
    with pytest.raises(ValueError, match="give --decision-about previous or self"):
        hf.open_directory(tmp_path / "hf")
    found = hf.open_directory(tmp_path / "hf", Given(decision_about="previous"))
    assert mapping.dmc_from_hf_config(found.config) == WANTED["nvidia"]
    (tmp_path / "hf" / "dms_metadata.json").write_text(json.dumps(FASTDMS))
    with pytest.raises(ValueError, match="says window 8 and FastDMS .* says window 16"):
        hf.open_directory(tmp_path / "hf", Given(decision_about="previous"))


def test_a_log_of_another_program_means_nothing(tmp_path: Path) -> None:
    families.make("qwen3", tmp_path / "model")
    log = tmp_path / "training_log.json"
    for content in ('{"config": {"window_size": 4}}', '{"step": 1}\n{"step": 2}', "[]"):
        log.write_text(content)
        assert "dmc" not in hf.open_directory(tmp_path / "model").config
    log.write_text('{"config": {"alpha_offset": 5.0, "window_si')  # a copy that broke off
    with pytest.raises(ValueError, match="may describe a DMS model"):
        hf.open_directory(tmp_path / "model")


# ------------------------------------------------------------------------------------------------- adapters alone


@pytest.fixture(scope="module")
def alone(made: Path) -> Path:
    """Adapters of head and layer, exported from their import: head-adapter, layer-adapter."""
    for name in ("head", "layer"):
        convert.import_hf(made / name, made / f"{name}-mg", progress=quiet())
        export_adapter(made / f"{name}-mg", made / f"{name}-adapter", base_model="maker/base", progress=quiet())
    return made


@pytest.mark.parametrize("name", ["head", "layer"])
def test_adapters_alone_make_the_same_model(alone: Path, name: str, tmp_path: Path) -> None:
    base, adapters = alone / f"{name}-base", alone / f"{name}-adapter"
    assert sorted(p.name for p in adapters.iterdir()) == [
        "README.md",
        "checksums.json",
        "config.json",
        "model.safetensors",
    ]
    served, whole = EngineConfig(adapter=str(adapters)).open_directory(base), hf.open_directory(alone / name)
    with adapter.checking(served):
        pass
    assert served.config["dmc"] == whole.config["dmc"] and served.tensors.keys() == whole.tensors.keys()
    assert all(hf.equal(tensor, served.tensors[key]) for key, tensor in whole.tensors.items())
    convert.import_hf(base, tmp_path / "mg", adapters=adapters, progress=quiet())
    assert "identical" in verify(alone / name, tmp_path / "mg", quiet())
    assert "identical" in verify(base, tmp_path / "mg", quiet(), adapters=adapters)
    assert "same most likely token 100.00%" in compare_logits(base, tmp_path / "mg", adapters)
    with pytest.raises(ValueError, match="does not compute what"):
        compare_logits(base, tmp_path / "mg")
    convert.merge_adapter(base, adapters, tmp_path / "merged", progress=quiet())
    assert "identical" in verify(tmp_path / "merged", tmp_path / "mg", quiet())
    text = describe(adapters)
    assert "maker/base, weights SHA-256" in text and "adapter, per" in text


def test_the_engine_puts_adapters_on_their_base(alone: Path) -> None:
    """A base with its adapters generates what the whole checkpoint does, and evicts; another base is refused."""
    found = []
    for model, adapters in (("head", None), ("head-base", str(alone / "head-adapter"))):
        llm = LLM(alone / model, adapter=adapters, dtype="float32", max_num_seqs=2, enable_prefix_caching=False)
        output = llm.generate([list(range(40))], SamplingParams(max_tokens=8, temperature=0.0))[0].outputs[0]
        found.append((output.token_ids, output.cache.slots))
    assert found[0] == found[1] and 0 < sum(map(sum, found[0][1])) < 47 * 4
    with pytest.raises(ValueError, match="is maker/base, with model_type qwen3, not llama"):
        LLM(alone / "layer-base", adapter=str(alone / "head-adapter"))


def test_the_hash_is_of_the_values(made: Path, tmp_path: Path) -> None:
    """Other shards, another order, a wider type and a second copy of tied embeddings are the same weights."""
    base = hf.open_directory(made / "layer-base")
    digest = adapter.weights_sha256(adapter.base_tensors(base))
    assert len(base.weight_map) > 1 and base.tensors["lm_head.weight"].dtype == torch.bfloat16
    shutil.copytree(made / "layer-base", tmp_path / "hf", ignore=shutil.ignore_patterns("model*"))
    tensors = {name: base.tensors[name].read().float() for name in reversed(base.tensors)}
    save_file(tensors | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}, tmp_path / "hf" / hf.SINGLE)
    assert adapter.weights_sha256(adapter.base_tensors(hf.open_directory(tmp_path / "hf")), threads=1) == digest
    tensors["model.norm.weight"][-1] += 1e-6
    save_file(tensors, tmp_path / "hf" / hf.SINGLE)
    assert adapter.weights_sha256(adapter.base_tensors(hf.open_directory(tmp_path / "hf"))) != digest


def test_a_wrong_base_is_refused(alone: Path, tmp_path: Path) -> None:
    shutil.copytree(alone / "head-base", tmp_path / "tuned")
    tensors = load_file(tmp_path / "tuned" / hf.SINGLE)
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] += 0.5
    save_file(tensors, tmp_path / "tuned" / hf.SINGLE, {"format": "pt"})
    adapters = alone / "head-adapter"
    directory = adapter.open_directory(tmp_path / "tuned", adapters)
    with pytest.raises(ValueError, match="is not the base of .*trained on maker/base with"):
        with adapter.checking(directory):
            pass
    with pytest.raises(ValueError, match="is not the base of"):
        convert.import_hf(tmp_path / "tuned", tmp_path / "mg", adapters=adapters, progress=quiet())
    with pytest.raises(ValueError, match="is not the base of .*--freeze-base"):
        export_adapter(alone / "head-mg", tmp_path / "a", base_model=str(tmp_path / "tuned"), progress=quiet())
    with pytest.raises(ValueError, match="is maker/base, with model_type qwen3, not llama"):
        adapter.open_directory(alone / "layer-base", adapters)
    with pytest.raises(ValueError, match="is a retrofitted model"):
        adapter.open_directory(alone / "head", adapters)
    export_adapter(alone / "head-mg", tmp_path / "a", base_model=str(alone / "head-base"), progress=quiet())
    assert json.loads((tmp_path / "a" / "config.json").read_text())["base_model"] == "head-base"


def test_adapters_are_no_model(alone: Path, made: Path, tmp_path: Path) -> None:
    for read in (hf.open_model, EngineConfig().open_directory):
        with pytest.raises(ValueError, match="holds the adapters of a DMS model and no model; name its base, 'maker"):
            read(alone / "head-adapter")
    with pytest.raises(ValueError, match="a whole model; --adapter names"):
        adapter.open_directory(alone / "head-base", alone / "head-base")
    convert.import_hf(made / "nvidia", tmp_path / "mg", progress=quiet())
    with pytest.raises(ValueError, match="has no adapters .method dms, decisions from query"):
        export_adapter(tmp_path / "mg", tmp_path / "a", progress=quiet())
    with pytest.raises(ValueError, match="adapters need their base's weights"):
        EngineConfig(adapter="x", load_format="dummy")


def test_damaged_adapters(alone: Path, tmp_path: Path) -> None:
    shutil.copytree(alone / "head-adapter", tmp_path / "a")
    edit(tmp_path / "a", {"base_weights_sha256": "0" * 64})
    with pytest.raises(ValueError, match="is damaged, its checksums differ: config.json"):
        adapter.open_adapter(tmp_path / "a")
    (tmp_path / "a" / "checksums.json").unlink()
    edit(tmp_path / "a", {}, ("base_weights_sha256",))
    with pytest.raises(ValueError, match="base_weights_sha256 is missing"):
        adapter.open_adapter(tmp_path / "a")
    edit(tmp_path / "a", {"base_weights_sha256": "0" * 64})
    block = json.loads((tmp_path / "a" / "config.json").read_text())["dmc"]
    edit(tmp_path / "a", {"dmc": {**block, "stage": "zero_out"}})
    with pytest.raises(ValueError, match="dmc.stage is 'zero_out'"):
        adapter.open_adapter(tmp_path / "a")
    edit(tmp_path / "a", {"dmc": block})
    tensors = load_file(tmp_path / "a" / hf.SINGLE)
    lost = "model.layers.1.self_attn.dms_proj_alpha.weight"
    save_file({n: t for n, t in tensors.items() if n != lost}, tmp_path / "a" / hf.SINGLE, {"format": "pt"})
    with pytest.raises(ValueError, match=f"a/{hf.SINGLE} lacks {lost}"):
        adapter.open_adapter(tmp_path / "a")
    edit(tmp_path / "a", {"num_hidden_layers": 10**9})  # found at the first layer that is not there
    with pytest.raises(ValueError, match="lacks model.layers.1."):
        adapter.open_adapter(tmp_path / "a")


@pytest.mark.parametrize(
    ("source", "stage", "wanted"),
    [
        ("adapter", "zero_out", "calibrate, retrofit or finetune with decision_source adapter"),
        ("query", "calibrate", "zero_out, retrofit or finetune with decision_source query"),
        ("key", "import", "zero_out, retrofit or finetune with decision_source key"),
    ],
)
def test_a_stage_that_a_source_of_decisions_has_not_is_refused(
    made: Path, source: str, stage: str, wanted: str
) -> None:
    """No training writes it. Adapters of zero_out would be read and never asked."""
    config = json.loads((made / "head-base" / "config.json").read_text())
    block = mapping.DMCBlock("qwen3", dms(decision_source=source), stage, 1, 4.0, None)
    with pytest.raises(ValueError, match=f"dmc.stage is '{stage}'; it must be {wanted}"):
        mapping.dmc_block(mapping.with_block(config, block))


def test_a_checkpoint_of_adapters_alone(alone: Path, tmp_path: Path) -> None:
    """What --freeze-base saves is exported with the weights of the checkpoint that it names."""
    convert.import_hf(alone / "head-base", tmp_path / "base", progress=quiet())
    source, base = torch_dist.open_model(alone / "head-mg"), read_manifest(tmp_path / "base")
    source.parameters = {key: value for key, value in source.parameters.items() if "dms_" in key[0]}
    (tmp_path / "mg").mkdir()
    with torch_dist.DistWriter(tmp_path / "mg") as writer:
        for (name, layer), tensor in source.parameters.items():
            list(writer.write(name, tensor, layer=(layer, source.run.model.num_layers)))
    shutil.copyfile(alone / "head-mg" / "config.yaml", tmp_path / "mg" / "config.yaml")
    source.manifest.base, source.manifest.base_hash = str(tmp_path / "base"), base_hash(base)
    source.manifest.write(tmp_path / "mg", {})
    assert "identical" in verify(alone / "head", tmp_path / "mg", quiet())
    assert "holds adapters alone" in describe(tmp_path / "mg")
    export_adapter(tmp_path / "mg", tmp_path / "a", base_model=str(alone / "head-base"), progress=quiet())
    one, two = adapter.open_adapter(tmp_path / "a"), adapter.open_adapter(alone / "head-adapter")
    assert one.base_sha256 == two.base_sha256 and all(hf.equal(t, two.tensors[n]) for n, t in one.tensors.items())
    shutil.rmtree(tmp_path / "base")
    with pytest.raises(ValueError, match="which is not there"):
        torch_dist.open_model(tmp_path / "mg")


# ------------------------------------------------------------------------------------------------- for Megatron-LM


def test_for_megatron(alone: Path, made: Path, tmp_path: Path) -> None:
    """Adapters are left out, a query channel is zeroed where it can be, and what has no names is refused."""
    export_megatron(alone / "head-mg", tmp_path / "plain", progress=quiet())
    convert.import_megatron(tmp_path / "plain", tmp_path / "again", progress=quiet())
    convert.import_hf(alone / "head-base", tmp_path / "base", progress=quiet())
    one, two = DistReader(tmp_path / "again"), DistReader(tmp_path / "base")
    assert one.tensors().keys() == two.tensors().keys()
    assert all(hf.equal(one.get(name), two.get(name)) for name in one.tensors())
    with pytest.raises(ValueError, match="method dms, for which Megatron's arguments have no names"):
        export_megatron(alone / "head-mg", tmp_path / "kept", keep_decisions=True, progress=quiet())
    convert.import_hf(made / "nvidia", tmp_path / "qk", progress=quiet())
    with pytest.raises(ValueError, match="behind an RMSNorm whose weight all heads share"):
        export_megatron(tmp_path / "qk", tmp_path / "no", progress=quiet())
    convert.import_hf(dms_models.fastdms(tmp_path / "llama", case="llama3"), tmp_path / "fast", progress=quiet())
    export_megatron(tmp_path / "fast", tmp_path / "zeroed", progress=quiet())
    convert.import_megatron(tmp_path / "zeroed", tmp_path / "zeroed-mg", progress=quiet())
    name = "decoder.layers.self_attention.linear_qkv.weight"
    before, after = (DistReader(tmp_path / d).get(name, 0).read() for d in ("fast", "zeroed-mg"))
    d = before.shape[0] // 8  # two groups of two queries, a key and a value
    changed = (before != after).any(dim=1).nonzero().flatten().tolist()
    assert changed == [d - 1, 5 * d - 1] and not after[changed].any()
