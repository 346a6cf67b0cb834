"""The way of a model: Hugging Face -> import -> zero_out -> retrofit -> export -> transformers, and back in."""

from __future__ import annotations

import io
import json
import random
import shutil
import sys
from pathlib import Path

import pytest
import torch
from damage import kills_and_bytes
from helpers import families, tiny
from helpers.processes import ROOT
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(ROOT / "tools"))
import convert_checkpoint

from megatron.dmc import __version__
from megatron.dmc.checkpoint import convert
from megatron.dmc.checkpoint import manifest as manifests
from megatron.dmc.checkpoint.formats.torch_dist import DistReader
from megatron.dmc.checkpoint.manifest import read_manifest, resolve_checkpoint
from megatron.dmc.evaluation.load import load_checkpoint
from megatron.dmc.evaluation.reference import ReferenceDecoder

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("transformers_state")]
SIZES = dict(hidden_size=32, intermediate_size=64, vocab_size=tiny.VOCABULARY - 1, max_position_embeddings=64)


@pytest.fixture(scope="module")
def lineage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """hf, import, zero_out (TP 2), retrofit (PP 2), out, again: one directory of each step."""
    root = tmp_path_factory.mktemp("lineage")
    data = tiny.make_data(root)
    # One row more than the tokenizer has would be refused as another tokenizer's; one less too.
    families.make("qwen3", root / "hf", **{**SIZES, "vocab_size": tiny.VOCABULARY})
    (root / "hf" / "tokenizer.model").write_bytes((data / "tokenizer.model").read_bytes())
    (root / "hf" / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    convert.import_hf(root / "hf", root / "import")
    common = dict(train_iters=30, lr=1e-2)
    run = tiny.command(
        data, "zero_out", init_from=root / "import", save=root / "zero_out", tensor_model_parallel_size=2, **common
    )
    tiny.run(run, root / "zero_out_run", world=2)
    run = tiny.command(
        data,
        "retrofit",
        init_from=root / "zero_out",
        save=root / "retrofit",
        target_cr=2,
        loss_weight=5,
        decision_bias=0.5,
        pipeline_model_parallel_size=2,
        **common,
    )
    tiny.run(run, root / "retrofit_run", world=2)
    convert.export(root / "retrofit", root / "out")
    convert.import_hf(root / "out", root / "again")
    return root


def test_export_compares_what_it_reads(lineage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A changed byte of the model's tensors is found by the file's name; one of the optimizer's state is not looked at,
    and changes nothing.
    """
    monkeypatch.setattr(manifests, "_SMALL", 0)  # these would be compared whenever the checkpoint is looked at
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(resolve_checkpoint(lineage / "retrofit"), checkpoint)
    stored = DistReader(checkpoint).metadata.storage_data

    def flip(kind: str) -> str:
        info = next(info for index, info in sorted(stored.items(), key=str) if index.fqn.startswith(kind))
        with open(checkpoint / info.relative_path, "r+b") as file:
            file.seek(info.offset + info.length // 2)
            byte = file.read(1)[0]
            file.seek(-1, io.SEEK_CUR)
            file.write(bytes([byte ^ 8]))
        return info.relative_path

    flip("optimizer.")
    convert.export(checkpoint, tmp_path / "out")
    for path in (lineage / "out").glob("*.safetensors"):
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()
    name = flip("decoder.layers.mlp.linear_fc2.weight")
    with pytest.raises(ValueError, match=f"checkpoint is damaged, its checksums differ: {name} "):
        convert.export(checkpoint, tmp_path / "out", overwrite=True)
    manifest = read_manifest(checkpoint)
    manifest.crc32 = {}
    manifest.write(checkpoint)
    with pytest.raises(ValueError, match=f"checkpoint is damaged, tensors in {name} differ from their checksums"):
        convert.export(checkpoint, tmp_path / "out", overwrite=True)


def test_what_is_exported(lineage: Path) -> None:
    config = json.loads((lineage / "out" / "config.json").read_text())
    manifest = read_manifest(resolve_checkpoint(lineage / "retrofit"))
    assert (config["model_type"], config["architectures"]) == ("dmc", ["DMCForCausalLM"])
    assert manifest.lineage == ["import", "zero_out"] and manifest.family == "qwen3"
    assert config["dmc"] == {
        "format_version": 1,
        "base_model_type": "qwen3",
        "decision_bias": 0.5,
        "window": 12,
        "importance_epsilon": 2.0**-7,
        "add_qkv_bias": False,
        "qk_layernorm": True,
        "stage": "retrofit",
        "step": 30,
        "target_cr": manifest.target_cr,
        "measured_cr": manifest.measured_cr,
    }
    plain = json.loads((lineage / "hf" / "config.json").read_text())
    own = ("model_type", "architectures")
    assert {k: v for k, v in config.items() if k in plain and k not in own} == {
        k: v for k, v in plain.items() if k not in own
    }
    for name in ("tokenizer.model", "tokenizer_config.json", "generation_config.json"):
        assert (lineage / "out" / name).read_bytes() == (lineage / "hf" / name).read_bytes()
    layout = [
        json.loads((lineage / d / "model.safetensors.index.json").read_text())["weight_map"] for d in ("hf", "out")
    ]
    assert layout[0] == layout[1]
    card = (lineage / "out" / "README.md").read_text()
    assert f"Exported by megatron.dmc {__version__} from stage retrofit, step 30" in card and "finetune" not in card


def test_transformers_generates_what_the_project_does(lineage: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(lineage / "out", trust_remote_code=True, dtype=torch.float32)
    prompt = torch.randint(3, tiny.VOCABULARY, (1, 20), generator=torch.Generator().manual_seed(3))
    out = model.generate(prompt, max_new_tokens=24, min_new_tokens=24, do_sample=False, return_dict_in_generate=True)
    decoder = ReferenceDecoder(load_checkpoint(lineage / "retrofit"))
    expected = list(decoder.generate(prompt[0].tolist(), 24))
    assert out.sequences[0, 20:].tolist() == expected
    # The last token has been sampled but not read.
    cache = ReferenceDecoder(load_checkpoint(lineage / "retrofit"))
    for token in out.sequences[0, :-1].tolist():
        cache.step(token)
    lengths = out.past_key_values.lengths()[:, 0]
    assert torch.equal(lengths, cache.lengths())
    tokens = out.sequences.size(1) - 1
    assert 1.1 < tokens * lengths.numel() / lengths.sum() < tokens, (
        "this model does not tell heads that merge from others"
    )


def test_it_comes_back_in(lineage: Path) -> None:
    """An exported model is imported with its stage, and exported to the same files."""
    manifest = read_manifest(lineage / "again")
    assert (manifest.stage, manifest.iteration, manifest.finished) == ("retrofit", 30, True)
    convert.export(lineage / "again", lineage / "out2")
    for path in (lineage / "out").glob("*.safetensors"):
        one, two = load_file(path), load_file(lineage / "out2" / path.name)
        assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    assert (lineage / "out" / "config.json").read_bytes() == (lineage / "out2" / "config.json").read_bytes()


@pytest.mark.parametrize(("hf", "load"), [("hf", "import"), ("out", "retrofit"), ("out", "again")])
def test_verify_with_logits(lineage: Path, hf: str, load: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        convert_checkpoint.main(["verify", "--hf", str(lineage / hf), "--load", str(lineage / load), "--logits"]) == 0
    )
    out = capsys.readouterr().out
    assert "identical: " in out and "same most likely token 100.00%" in out


def test_verify_tells_models_apart(lineage: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert convert_checkpoint.main(["verify", "--hf", str(lineage / "hf"), "--load", str(lineage / "retrofit")]) == 2
    assert "DMC model" in capsys.readouterr().err


def test_inspect(lineage: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("out", "retrofit"):
        assert convert_checkpoint.main(["inspect", str(lineage / name)]) == 0
        out = capsys.readouterr().out
        assert "retrofit, step 30" in out and "measured" in out and "qwen3" in out
    assert "import -> zero_out" in out and "tokenizer.model" in out


def test_an_unfinished_zero_out_is_refused(lineage: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tiny.command(
        lineage, "zero_out", init_from=lineage / "import", save=tmp_path / "z", train_iters=4, exit_interval=2
    )
    tiny.run(run, tmp_path / "run")
    assert convert_checkpoint.main(["export", "--load", str(tmp_path / "z"), "--save", str(tmp_path / "out")]) == 2
    assert "middle of zero_out" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_trained_from_scratch(lineage: Path, tmp_path: Path) -> None:
    """A model that never was a Hugging Face directory: its configuration and tokenizer files are made."""
    run = tiny.command(lineage, "pretrain", save=tmp_path / "p", train_iters=2)
    tiny.run(run, tmp_path / "run")
    convert.export(tmp_path / "p", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == "llama" and "dmc" not in config
    from transformers import AutoTokenizer

    from megatron.dmc.training.tokenizer import load_tokenizer

    text = "def read(self, n):\n    return 1\n\n\tx  = 'é'"
    ours = load_tokenizer(lineage / "tokenizer.model")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    for some in (text, " read", "  two spaces", "\n x\n", ""):
        assert theirs(some)["input_ids"] == ours.encode(some)
    assert theirs.eos_token_id == ours.eod_id
    tokens = torch.tensor([ours.encode(text)])
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(tokens).logits
    loaded = load_checkpoint(tmp_path / "p")
    found = loaded.model(tokens, torch.arange(tokens.size(1))[None], step=loaded.step())[..., : tiny.VOCABULARY]
    assert (found - expected).abs().max() < 1e-4


def test_a_changed_byte_of_an_exported_directory_is_found_or_harmless(lineage: Path, tmp_path: Path) -> None:
    """A sample of tests/damage/kills_and_bytes.py."""
    directory = shutil.copytree(lineage / "out", tmp_path / "out")
    counts = kills_and_bytes.damage(random.Random(5), directory, 10, lambda: kills_and_bytes.generated_text(directory))
    assert counts["found by name"] >= 6 and counts.total() == 10
