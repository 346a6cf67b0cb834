"""Checkpoints of every stage for a plain Megatron-LM script: a stock GPTModel loads them by megatron-core alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import megatron_format as megatron
import pytest
import torch
import yaml
from helpers.in_process import megatron_in_process, run_config
from megatron.core.models.gpt import GPTModel
from test_megatron import CASES, assert_same_tensors, change_args, tokens
from transformers import AutoModelForCausalLM

from megatron.dmc import cli
from megatron.dmc.checkpoint import convert
from megatron.dmc.checkpoint.formats import hf
from megatron.dmc.checkpoint.manifest import read_manifest
from megatron.dmc.checkpoint.megatron_export import RELEASE, export_megatron
from megatron.dmc.config import RunConfig
from megatron.dmc.evaluation.load import load_checkpoint
from megatron.dmc.model import DMCStep, get_dmc_layer_spec
from megatron.dmc.training.model import transformer_config

DMC = dict(dmc_init_val=0.0, dmc_window_size=5, dmc_temp=0.1, dmc_cr=4.0, dmc_finetune=True)


@pytest.fixture(scope="module", autouse=True)
def one_process() -> Iterator[None]:
    with megatron_in_process(run_config()):
        yield


def run_of(case: str) -> RunConfig:
    return run_config(**{**CASES[case], "num_layers": 2})


def checkpoint(directory: Path, case: str, **args: object) -> tuple[Path, torch.Tensor]:
    """A checkpoint, and what a stock model computes with its weights as they are."""
    run = run_of(case)
    model = megatron.stock_model(run)
    megatron.fill(model)
    said = megatron.arguments(
        run.model, vocab_size=run.model.vocab_size, use_rope_scaling=run.model.rope_scaling is not None
    )
    megatron.save(directory / "theirs", model, said)
    if args:
        change_args(directory / "theirs", **args)
    return convert.import_megatron(directory / "theirs", directory / "mg"), megatron.logits(model, tokens())


@torch.no_grad()
def ours(path: Path, **step: object) -> torch.Tensor:
    """Logits of this package's model: [b, s, vocabulary]."""
    loaded = load_checkpoint(path)
    positions = torch.arange(tokens().shape[1])[None].expand_as(tokens())
    found = loaded.model(tokens(), positions, step=DMCStep(**step) if step else loaded.step())
    return found[0] if isinstance(found, tuple) else found


@pytest.mark.parametrize("case", ["llama3.1-tied", "qwen3"])
def test_a_plain_model(tmp_path: Path, case: str) -> None:
    source, expected = checkpoint(tmp_path, case)
    said: list[str] = []
    export_megatron(source, tmp_path / "out", progress=convert.Progress(say=said.append))
    assert (tmp_path / "out" / "latest_checkpointed_iteration.txt").read_text() == RELEASE
    run = run_of(case)
    model = megatron.stock_model(run)
    beside = megatron.load(model, tmp_path / "out" / RELEASE)
    vocab = run.model.vocab_size
    assert torch.equal(megatron.logits(model, tokens())[..., :vocab], expected[..., :vocab])
    assert (beside["checkpoint_version"], beside["args"].num_layers, beside["args"].swiglu) == (3.0, 2, True)
    assert not any("decision" in line for line in said)
    convert.import_megatron(tmp_path / "out", tmp_path / "again")
    assert_same_tensors(tmp_path / "again", tmp_path / "theirs", tmp_path)


@pytest.mark.parametrize("case", ["qwen2", "qwen3"])
def test_a_retrofitted_model_is_an_ordinary_one(tmp_path: Path, case: str) -> None:
    """The stock model equals transformers' with channel D-1 of queries and keys taken out by hand."""
    source, raw = checkpoint(tmp_path, case, **DMC)
    assert read_manifest(source).stage == "finetune"
    export_megatron(source, tmp_path / "out")
    model = megatron.stock_model(run_of(case))
    megatron.load(model, tmp_path / "out" / RELEASE)
    found = megatron.logits(model, tokens())
    vocab = run_of(case).model.vocab_size
    plain = convert.import_megatron(tmp_path / "out", tmp_path / "plain")
    assert read_manifest(plain).stage == "import"
    # The weights as they were, in a plain Hugging Face model whose channel is then silenced.
    change_args(tmp_path / "theirs", **dict.fromkeys(DMC))
    convert.import_megatron(tmp_path / "theirs", tmp_path / "raw")
    convert.export(tmp_path / "raw", tmp_path / "hf")
    reference = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    silence(reference, run_of(case))
    with torch.no_grad():
        expected = reference(tokens()).logits
    assert (found[..., :vocab] - expected).abs().max() < 1e-4
    assert (raw[..., :vocab] - expected).abs().max() > 1e-2


@torch.no_grad()
def silence(model: torch.nn.Module, run: RunConfig) -> None:
    d = run.model.head_dim
    for layer in model.model.layers:
        attention = layer.self_attn
        if run.model.qk_layernorm:
            attention.q_norm.weight[-1] = attention.k_norm.weight[-1] = 0
            continue
        for projection in (attention.q_proj, attention.k_proj):
            projection.weight[d - 1 :: d] = 0
            if projection.bias is not None:
                projection.bias[d - 1 :: d] = 0


def test_how_close_it_is_to_the_retrofitted_model(tmp_path: Path) -> None:
    """The rotation refills the channel in Megatron's attention, by a sine that is small for short sequences."""
    source, raw = checkpoint(tmp_path, "llama", **DMC)
    export_megatron(source, tmp_path / "out")
    model = megatron.stock_model(run_of("llama"))
    megatron.load(model, tmp_path / "out" / RELEASE)
    found, uncompressed = megatron.logits(model, tokens()), ours(source, compress=False, neuron_scale=0.0)
    near, far = (float((x - uncompressed)[..., :90].abs().max()) for x in (found, raw))
    assert 0 < near < 1e-3 < 0.1 < far, (near, far)


def test_decisions_are_kept_for_a_model_with_these_layers(tmp_path: Path) -> None:
    case = "qwen3"
    source, _ = checkpoint(tmp_path, case, **DMC)
    expected = ours(source)
    export_megatron(source, tmp_path / "out", keep_decisions=True)
    run = run_of(case)
    run.dmc = load_checkpoint(source).config.dmc
    config = transformer_config(run)
    model = GPTModel(
        config=config,
        transformer_layer_spec=get_dmc_layer_spec(config, run.dmc, "local"),
        vocab_size=run.model.padded_vocab_size,
        max_sequence_length=run.model.max_position_embeddings,
        share_embeddings_and_output_weights=False,
        position_embedding_type="rope",
        rotary_base=run.model.rotary_base,
    ).eval()
    megatron.load(model, tmp_path / "out" / RELEASE)
    vocab = run.model.vocab_size
    assert torch.equal(megatron.logits(model, tokens())[..., :vocab], expected[..., :vocab])
    plain = ours(source, compress=False, neuron_scale=0.0)
    assert (plain - expected)[..., :vocab].abs().max() > 1e-3  # tokens are merged
    again = convert.import_megatron(tmp_path / "out", tmp_path / "again")
    one, two = read_manifest(source), read_manifest(again)
    assert (one.stage, one.target_cr, one.iteration) == (two.stage, two.target_cr, two.iteration)
    assert load_checkpoint(again).config.dmc == run.dmc
    assert_same_tensors(again, tmp_path / "theirs", tmp_path)


def test_what_has_no_argument(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, _ = checkpoint(tmp_path, "llama")
    config = yaml.safe_load((source / "config.yaml").read_text())
    scaling = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
    config["model"]["rope_scaling"] = {**scaling, "original_max_position_embeddings": 4096}
    manifest = read_manifest(source)
    (source / "config.yaml").write_text(yaml.safe_dump(config))
    manifest.write(source, {})
    argv = ["convert", "export", "--megatron", "--load", str(source), "--save", str(tmp_path / "out")]
    assert cli.main(argv) == 2
    assert "original_max_position_embeddings 4096" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert cli.main([*argv, "--tokenizer", "x"]) == 2
    assert cli.main([argv[0], argv[1], *argv[3:], "--keep-decisions"]) == 2
    assert "--keep-decisions goes with --megatron" in capsys.readouterr().err


def test_it_is_told_from_our_own(tmp_path: Path) -> None:
    source, _ = checkpoint(tmp_path, "llama")
    export_megatron(source, tmp_path / "out")
    with pytest.raises(ValueError, match="dmc convert import --megatron"):
        convert.export(tmp_path / "out", tmp_path / "hf")
    assert hf.matches(tmp_path / "out") is False
