"""Weights in and out: every family there and back, bit by bit; every layout computes what transformers computes."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import sys
from pathlib import Path

import pytest
import torch
from helpers import families
from helpers.forked import run, run_ranks
from helpers.processes import ROOT
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(ROOT / "tools"))
import convert_checkpoint

from megatron.dmc.checkpoint import convert, mapping
from megatron.dmc.checkpoint.formats import hf
from megatron.dmc.checkpoint.formats.torch_dist import DistReader
from megatron.dmc.checkpoint.manifest import HF_FILES, read_manifest


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """NAME.hf, imported NAME.mg, exported NAME.out and NAME.tokens.pt of every family."""
    directory = tmp_path_factory.mktemp("families")
    for case in families.CASES:
        families.make(case, directory / f"{case}.hf")
        convert.import_hf(directory / f"{case}.hf", directory / f"{case}.mg")
        convert.export(directory / f"{case}.mg", directory / f"{case}.out")
        tokens = torch.randint(families.SIZES["vocab_size"], (2, 48), generator=torch.Generator().manual_seed(1))
        torch.save(tokens, directory / f"{case}.tokens.pt")
    return directory


def contents(directory: Path) -> dict[str, dict[str, torch.Tensor]]:
    return {path.name: load_file(path) for path in sorted(directory.glob("*.safetensors"))}


def assert_same_weights(a: Path, b: Path) -> None:
    """Files, key sets, dtypes, bits."""
    one, two = contents(a), contents(b)
    assert {file: list(tensors) for file, tensors in one.items()} == {
        file: list(tensors) for file, tensors in two.items()
    }
    for file, tensors in one.items():
        for name, tensor in tensors.items():
            assert tensor.dtype == two[file][name].dtype
            assert torch.equal(tensor, two[file][name]), name


@pytest.mark.parametrize("case", families.CASES)
def test_there_and_back(made: Path, case: str) -> None:
    source, out = made / f"{case}.hf", made / f"{case}.out"
    assert len(contents(source)) > 1
    assert_same_weights(source, out)
    index = [json.loads((d / hf.INDEX).read_text())["weight_map"] for d in (source, out)]
    assert index[0] == index[1]
    assert json.loads((source / "config.json").read_text()) == json.loads((out / "config.json").read_text())
    assert (source / "generation_config.json").read_bytes() == (out / "generation_config.json").read_bytes()


@pytest.mark.parametrize("case", ["llama3.1", "qwen2", "qwen3"])
def test_transformers_loads_what_was_exported(made: Path, case: str) -> None:
    tokens = torch.load(made / f"{case}.tokens.pt")
    one, two = (AutoModelForCausalLM.from_pretrained(made / f"{case}.{kind}")(tokens).logits for kind in ("hf", "out"))
    assert torch.equal(one, two)


@pytest.mark.slow
def test_every_layout_computes_what_transformers_computes(made: Path) -> None:
    """Every family cut both ways; one with its own output layer and one without it, with biases, in all layouts."""
    layouts = {case: ["2x2"] for case in families.CASES}
    layouts |= {case: ["1x1", "2x1", "1x2", "2x2"] for case in ("llama2", "qwen2.5-tied")}
    runs = [f"{case}.{layout}" for case, found in layouts.items() for layout in found]
    run_ranks(Path(__file__).with_name("convert_worker.py"), 4, [made, *runs], made, timeout=300)
    for case, found in layouts.items():
        model = AutoModelForCausalLM.from_pretrained(made / f"{case}.hf", dtype=torch.float32)
        expected = model(torch.load(made / f"{case}.tokens.pt")).logits
        assert expected.std() > 0.3
        for layout in found:
            logits = torch.load(made / f"{case}.{layout}.pt")
            assert (logits - expected).abs().max() < 1e-4, f"{case} at {layout}"


@pytest.mark.parametrize("case", ["llama3.1", "llama3.2"])
def test_config_of_transformers_4(made: Path, case: str, tmp_path: Path) -> None:
    shutil.copytree(made / f"{case}.hf", tmp_path / "hf")
    families.as_transformers_4(tmp_path / "hf")
    new, old = (json.loads((d / "config.json").read_text()) for d in (made / f"{case}.hf", tmp_path / "hf"))
    assert "rope_parameters" not in old
    assert mapping.from_hf_config(old) == mapping.from_hf_config(new)
    assert mapping.from_hf_config(old).rope_scaling == families.LLAMA3
    convert.import_hf(tmp_path / "hf", tmp_path / "mg")
    convert.export(tmp_path / "mg", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == old


@pytest.mark.parametrize(
    "longest, rope, wanted, context",
    [  # Qwen 2.5, Qwen 3, Yarn-Llama-2 and the wordings that transformers takes for its defaults
        (32768, {"factor": 4.0}, {"factor": 4.0}, 131072),
        (40960, {"factor": 4.0, "original_max_position_embeddings": 32768}, {"factor": 4.0}, 131072),
        (
            65536,
            {
                "factor": 2.0,
                "original_max_position_embeddings": 32768,
                "finetuned": True,
                "mscale": 0,
                "beta_fast": None,
            },
            {"factor": 2.0},
            65536,
        ),
        (32768, {"factor": 2.0, "truncate": None}, {"factor": 2.0, "truncate": False}, 65536),
    ],
)
def test_published_yarn(made: Path, longest: int, rope: dict, wanted: dict, context: int) -> None:
    config = json.loads((made / "qwen2.hf" / "config.json").read_text())
    del config["rope_parameters"]
    config |= {"max_position_embeddings": longest, "rope_theta": 1e6, "rope_scaling": {"type": "yarn", **rope}}
    model = mapping.from_hf_config(config)
    assert model.rope_scaling == {"rope_type": "yarn", "original_max_position_embeddings": 32768, **wanted}
    assert model.max_position_embeddings == context
    again = mapping.from_hf_config(mapping.to_hf_config(model, "float32"))
    assert (again.rope_scaling, again.max_position_embeddings) == (model.rope_scaling, context)
    assert mapping.changed_config(config, model, "float32") == config


def test_one_file_and_odd_shapes(tmp_path: Path) -> None:
    families.make("qwen3", tmp_path / "hf", shard="1GB", vocab_size=257, num_hidden_layers=3)
    convert.import_hf(tmp_path / "hf", tmp_path / "mg")
    convert.export(tmp_path / "mg", tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").glob("*.safetensors*")] == ["model.safetensors"]
    assert_same_weights(tmp_path / "hf", tmp_path / "out")


def test_pytorch_bin(made: Path, tmp_path: Path) -> None:
    """Weights in ``torch.save`` files, as of 2023, with the buffer that those had; exported as safetensors."""
    source = tmp_path / "hf"
    source.mkdir()
    shutil.copy(made / "llama2.hf" / "config.json", source)
    weight_map = {}
    for file, tensors in contents(made / "llama2.hf").items():
        name = file.replace("model", "pytorch_model").replace(".safetensors", ".bin")
        if not weight_map:
            tensors = {**tensors, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
        torch.save(tensors, source / name)
        weight_map |= {tensor: name for tensor in tensors}
    (source / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    said: list[str] = []
    convert.import_hf(source, tmp_path / "mg", progress=convert.Progress(say=said.append))
    assert any("inv_freq" in line for line in said)
    convert.export(tmp_path / "mg", tmp_path / "out")
    assert_same_weights(made / "llama2.hf", tmp_path / "out")


def test_large_tensors_are_cut(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Chunks for tensor parallelism, of bounded size, over several files, give the same weights."""
    from megatron.dmc.checkpoint.formats.torch_dist import writer

    for name, value in (("CHUNK_BYTES", 3000), ("_SMALL", 256), ("FILE_BYTES", 50_000)):
        monkeypatch.setattr(writer, name, value)
    families.make("qwen2", tmp_path / "hf")
    convert.import_hf(tmp_path / "hf", tmp_path / "mg")
    assert len(list((tmp_path / "mg").glob("*.distcp"))) > 3
    entries = DistReader(tmp_path / "mg").tensors()
    assert len(entries["decoder.layers.mlp.linear_fc2.weight"].chunks) > 2 * 8
    assert len({tuple(c.offsets)[-1] for c in entries["decoder.layers.mlp.linear_fc2.weight"].chunks}) == 8
    convert.export(tmp_path / "mg", tmp_path / "out")
    assert_same_weights(tmp_path / "hf", tmp_path / "out")


def test_manifest_and_side_files(made: Path) -> None:
    manifest = read_manifest(made / "qwen3.mg")
    assert (manifest.stage, manifest.family, manifest.has_optimizer, manifest.target_cr) == (
        "import",
        "qwen3",
        False,
        1.0,
    )
    assert {"config.json", "generation_config.json", "shards.json"} == {
        p.name for p in (made / "qwen3.mg" / HF_FILES).iterdir()
    }
    assert f"{HF_FILES}/config.json" in manifest.files


# ------------------------------------------------------------------------------------------------ the command line


def cli(*args: object, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    status = convert_checkpoint.main([str(arg) for arg in args])
    return (status, *capsys.readouterr())


def test_command_line(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = made / "llama3.2.hf"
    status, out, _ = cli("import", "--hf", source, "--save", tmp_path / "mg", capsys=capsys)
    assert status == 0 and "import" in out and "free on disk" in out and f"wrote {tmp_path / 'mg'}" in out
    status, out, _ = cli("export", "--load", tmp_path / "mg", "--save", tmp_path / "out", capsys=capsys)
    assert status == 0
    status, out, _ = cli("verify", "--hf", source, "--load", tmp_path / "mg", capsys=capsys)
    assert status == 0 and out.startswith("identical: ")
    for directory in (source, tmp_path / "mg", tmp_path / "out"):
        status, out, _ = cli("inspect", directory, capsys=capsys)
        assert status == 0 and "2 layers, hidden 64" in out and "tied embeddings" in out and "llama3 scaling x8" in out
        assert "{}" not in out and ("stage" in out) == (directory == tmp_path / "mg")  # no line without a value


def test_verify_sees_one_bit(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(made / "qwen2.hf", tmp_path / "hf")
    file, tensors = next(iter(contents(tmp_path / "hf").items()))
    name = min(tensors)
    tensors[name].view(torch.int32).view(-1)[-1] ^= 1
    save_file(tensors, tmp_path / "hf" / file)
    status, _, error = cli("verify", "--hf", tmp_path / "hf", "--load", made / "qwen2.mg", capsys=capsys)
    assert status == 2 and "1 of" in error and name in error
    status, _, error = cli("verify", "--hf", made / "qwen3.hf", "--load", made / "qwen2.mg", capsys=capsys)
    assert status == 2 and "config.json" in error


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_act", "gelu"),
        ("attention_bias", True),
        ("mlp_bias", True),
        ("model_type", "gpt2"),
        ("rope_parameters", None),
        ("sliding_window", 16),
        ("num_hidden_layers", None),
        ("hidden_size", "64"),
        ("logit_softcap", 30.0),
        ("quantization_config", {"bits": 4}),
        ("architectures", ["LlamaForSequenceClassification"]),
        ("num_key_value_heads", 3),
    ],
)
def test_a_configuration_that_is_not_understood(
    made: Path, tmp_path: Path, key: str, value: object, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(made / "mistral.hf", tmp_path / "hf")
    path = tmp_path / "hf" / "config.json"
    config = json.loads(path.read_text())
    if key == "rope_parameters":
        key, value = "rope_type", {"rope_type": "longrope", "factor": 4.0, "rope_theta": 1e4}
        config["rope_parameters"] = value
    elif value is None:
        del config[key]
    else:
        config[key] = value
    path.write_text(json.dumps(config))
    status, _, error = cli("import", "--hf", tmp_path / "hf", "--save", tmp_path / "mg", capsys=capsys)
    assert status == 2 and error.startswith("error: config.json: ") and error.count("\n") == 1
    name = {"num_key_value_heads": "num_query_groups"}.get(key, key)
    assert name in error
    assert not (tmp_path / "mg").exists()


def damaged(case: str, source: Path) -> str:
    """Damage a directory; returns what the message must hold."""
    files = sorted(source.glob("*.safetensors"))
    tensors = load_file(files[1])
    name = min(tensors)
    if case == "missing shard":
        files[1].unlink()
        return files[1].name
    if case == "truncated":
        os.truncate(files[1], files[1].stat().st_size - 7)
        return files[1].name
    if case == "empty":
        os.truncate(files[1], 0)
        return files[1].name
    if case == "type":
        tensors[name] = tensors[name].to(torch.int8)
    elif case == "mixed types":
        tensors[name] = tensors[name].bfloat16()
    elif case == "shape":
        tensors[name] = tensors[name][:-1].clone()
    elif case == "missing tensor":
        del tensors[name]
    elif case == "extra tensor":
        tensors["model.layers.7.mlp.gate_proj.weight"] = torch.ones(2, 2)
        name = "model.layers.7.mlp.gate_proj.weight"
    save_file(tensors, files[1])
    if case in ("missing tensor", "extra tensor"):
        index = json.loads((source / hf.INDEX).read_text())
        index["weight_map"] = {k: f.name for f in files for k in load_file(f)}
        (source / hf.INDEX).write_text(json.dumps(index))
    return name


@pytest.mark.parametrize(
    "case", ["missing shard", "truncated", "empty", "type", "mixed types", "shape", "missing tensor", "extra tensor"]
)
def test_damaged_weights(made: Path, tmp_path: Path, case: str, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(made / "llama3.hf", tmp_path / "hf")
    expected = damaged(case, tmp_path / "hf")
    status, _, error = cli("import", "--hf", tmp_path / "hf", "--save", tmp_path / "mg", capsys=capsys)
    assert status == 2 and expected in error and error.count("\n") == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf"]


def test_nan_is_named(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(made / "llama3.hf", tmp_path / "hf")
    file, tensors = next(iter(contents(tmp_path / "hf").items()))
    name = min(tensors)
    tensors[name].view(-1)[3] = float("nan")
    save_file(tensors, tmp_path / "hf" / file)
    status, out, _ = cli("import", "--hf", tmp_path / "hf", "--save", tmp_path / "mg", capsys=capsys)
    assert status == 0 and "warning: 1 tensors hold NaN" in out
    status, out, _ = cli("export", "--load", tmp_path / "mg", "--save", tmp_path / "out", capsys=capsys)
    assert status == 0 and f"NaN or infinite values: {name}" in out
    assert torch.isnan(contents(tmp_path / "out")[file][name].view(-1)[3])


class Evil:
    def __reduce__(self):
        return (os.mkdir, (os.environ["EVIL"],))


@pytest.mark.parametrize("where", ["bin", "metadata", "chunk"])
def test_code_in_a_pickle_is_refused(
    made: Path, tmp_path: Path, where: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EVIL", str(tmp_path / "evil"))
    if where == "bin":
        (tmp_path / "hf").mkdir()
        shutil.copy(made / "llama2.hf" / "config.json", tmp_path / "hf")
        torch.save({"model.norm.weight": Evil()}, tmp_path / "hf" / "pytorch_model.bin")
        status, _, error = cli("import", "--hf", tmp_path / "hf", "--save", tmp_path / "mg", capsys=capsys)
        expected = "pytorch_model.bin"
    else:
        shutil.copytree(made / "llama2.mg", tmp_path / "mg")
        manifest = read_manifest(tmp_path / "mg")
        if where == "metadata":
            size = (tmp_path / "mg" / ".metadata").stat().st_size
            content = pickle.dumps(Evil()).ljust(size, b" ")
            (tmp_path / "mg" / ".metadata").write_bytes(content)
            expected = ".metadata"
        else:
            reader = DistReader(tmp_path / "mg")
            infos = [i for k, i in reader.metadata.storage_data.items() if k.fqn == "embedding.word_embeddings.weight"]
            path = tmp_path / "mg" / infos[0].relative_path
            torch.save(Evil(), tmp_path / "evil.pt")
            evil = (tmp_path / "evil.pt").read_bytes()
            info = infos[0]
            with path.open("r+b") as file:
                file.seek(info.offset)
                file.write(evil)
            info.length = len(evil)
            with (tmp_path / "mg" / ".metadata").open("wb") as file:
                pickle.dump(reader.metadata, file)
            expected = path.name
        manifest.write(tmp_path / "mg", crc32={})  # no checksum gives it away
        status, _, error = cli("export", "--load", tmp_path / "mg", "--save", tmp_path / "out", capsys=capsys)
    assert status == 2 and expected in error and "refused" in error
    assert not (tmp_path / "evil").exists()


# ------------------------------------------------------------------------------------- what exists, and what is killed


def test_an_existing_directory(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "mg"
    arguments = ["import", "--hf", made / "llama3.hf", "--save", target]
    assert cli("import", "--hf", made / "llama2.hf", "--save", target, capsys=capsys)[0] == 0
    before = (target / "manifest.json").read_bytes()
    status, _, error = cli(*arguments, capsys=capsys)
    assert status == 2 and "--overwrite" in error and (target / "manifest.json").read_bytes() == before
    assert cli(*arguments, "--overwrite", capsys=capsys)[0] == 0
    assert (target / "manifest.json").read_bytes() != before
    # A conversion that fails leaves the old one.
    shutil.copytree(made / "llama3.hf", tmp_path / "hf")
    damaged("truncated", tmp_path / "hf")
    before = (target / "manifest.json").read_bytes()
    assert cli("import", "--hf", tmp_path / "hf", "--save", target, "--overwrite", capsys=capsys)[0] == 2
    assert (target / "manifest.json").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf", "mg"]


_KILLED = """
import os, signal, sys
sys.path[:0] = [{tools!r}]
import convert_checkpoint
from megatron.dmc.checkpoint.convert import Progress
blocks = 0
def block(self, name, tensor):
    global blocks
    blocks += 1
    if blocks == 9:
        os.kill(os.getpid(), signal.SIGKILL)
Progress.block = block
sys.exit(convert_checkpoint.main(sys.argv[1:]))
"""


@pytest.mark.parametrize("direction", ["import", "export"])
def test_killed_half_way(made: Path, tmp_path: Path, direction: str, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "target"
    source = ["--hf", made / "qwen2.hf"] if direction == "import" else ["--load", made / "qwen2.mg"]
    arguments = [direction, *source, "--save", target]
    code = _KILLED.format(tools=str(ROOT / "tools"))
    run([sys.executable, "-c", code, *arguments], tmp_path.parent / f"{tmp_path.name}.log", status=-9)
    assert not target.exists() and [p.name for p in tmp_path.iterdir()] == [".tmp_target"]
    assert cli(*arguments, capsys=capsys)[0] == 0
    assert [p.name for p in tmp_path.iterdir()] == ["target"]
    if direction == "export":
        assert_same_weights(made / "qwen2.hf", target)


_FULL = """
import resource, sys
sys.path[:0] = [{tools!r}]
import convert_checkpoint
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
import signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
sys.exit(convert_checkpoint.main(sys.argv[1:]))
"""


@pytest.mark.parametrize("direction", ["import", "export"])
def test_no_room(made: Path, tmp_path: Path, direction: str) -> None:
    """The system refuses to write on: a limit on file sizes stands in for a full disk, both are an OSError of write."""
    families.make("llama2", tmp_path / "hf", shard="1GB")
    convert.import_hf(tmp_path / "hf", tmp_path / "mg")
    source = ["--hf", tmp_path / "hf"] if direction == "import" else ["--load", tmp_path / "mg"]
    arguments = [direction, *source, "--save", tmp_path / "target"]
    code = _FULL.format(tools=str(ROOT / "tools"))
    said = run([sys.executable, "-c", code, *arguments], tmp_path.parent / f"{tmp_path.name}.log", status=2)
    assert "error: writing" in said and "File too large" in said and "Traceback" not in said
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf", "mg"]


def test_too_little_disk(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convert.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 1000))
    with pytest.raises(ValueError, match="make room"):
        convert.import_hf(made / "llama2.hf", tmp_path / "mg")
    assert not list(tmp_path.iterdir())


def test_unreadable_shard(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A shard that shrinks while it is read: the message names file and tensor."""
    shutil.copytree(made / "llama3.hf", tmp_path / "hf")
    directory = hf.open_directory(tmp_path / "hf")
    tensor = directory.tensors["model.norm.weight"]
    os.truncate(tensor.path, tensor.offset + 5)
    with pytest.raises(ValueError, match=r"model\.norm\.weight in .*safetensors.*truncated"):
        tensor.read()
