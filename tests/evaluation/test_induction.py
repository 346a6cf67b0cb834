"""The induction circuit: it looks back before anything is trained, and what it does not fit is refused."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch

from megatron.dmc.cli.eval import main
from megatron.dmc.config import ModelConfig
from megatron.dmc.evaluation import induction
from megatron.dmc.evaluation.policies import Budget, StreamingLLM
from megatron.dmc.evaluation.teacher_forced import TeacherForced

MODEL = ModelConfig(
    num_layers=3,
    hidden_size=128,
    ffn_hidden_size=64,
    num_attention_heads=4,
    kv_channels=32,
    vocab_size=300,
    max_position_embeddings=256,
    rotary_base=1e6,
    init_method_std=0.02,
)


def repeated(length: int, gap: int, rows: int = 8) -> torch.Tensor:
    """Random ids, others, and the first ones again: int64 [rows, 2 length + gap]."""
    rng = random.Random(length + gap)
    draw = lambda n: rng.sample(range(300), n)  # none twice: what comes next is known
    made = [(draw(length), draw(gap)) for _ in range(rows)]
    return torch.tensor([[*block, *other, *block] for block, other in made])


def without_the_first_head(out):
    """An output projection, whatever form its weight has, that does not see the first head's 32 channels."""
    return lambda x: out(torch.cat((torch.zeros_like(x[:, :32]), x[:, 32:]), dim=1))


@pytest.mark.parametrize("seed", [0, 1])
def test_untrained_it_gives_what_followed_the_same_token(tmp_path, seed) -> None:
    induction.write(tmp_path, MODEL, seed)
    model = TeacherForced.load(tmp_path)
    for length, gap in ((12, 0), (30, 40), (20, 200)):
        correct = model.score(repeated(length, gap)).correct.double()
        assert correct[:, -length + 1 :].mean() > 0.5, (length, gap)
        assert correct[:, : length - 1].mean() < 0.05
    # It is the circuit that does it, and it reads the cache: neither a window nor the same model without the heads can.
    far = repeated(20, 200)
    assert (
        model.score(far, StreamingLLM(Budget(4))).correct[:, -15:].double().mean() < 0.1
    )  # the first four tokens are its sinks
    for layer in model.layers[:2]:
        object.__setattr__(layer, "out", without_the_first_head(layer.out))  # a frozen record
    assert model.score(far).correct[:, -19:].double().mean() < 0.1


@pytest.mark.parametrize(
    "change", [dict(num_layers=1), dict(rotary_base=1e4), dict(add_qkv_bias=True), dict(qk_layernorm=True)]
)
def test_models_without_room_are_refused(change, tmp_path) -> None:
    with pytest.raises(ValueError, match="no room for an induction circuit"):
        induction.write(tmp_path / "model", dataclasses.replace(MODEL, **change), 0)
    with pytest.raises(ValueError, match="untie"):
        induction.write(tmp_path / "model", dataclasses.replace(MODEL, untie_embeddings_and_output_weights=False), 0)
    assert not (tmp_path / "model").exists()


def test_its_command(tmp_path, capsys) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(
        "model: {num_layers: 2, hidden_size: 64, ffn_hidden_size: 64, num_attention_heads: 2, vocab_size: 64, "
        "rotary_base: 1.0e+7, max_position_embeddings: 64}\n"
    )
    assert main(["induction", "--config", str(config), "--save", str(tmp_path / "hf")]) == 0
    assert TeacherForced.load(tmp_path / "hf").info.model.hidden_size == 64
    config.write_text("model: {num_layers: 1}\n")
    assert main(["induction", "--config", str(config), "--save", str(tmp_path / "no")]) == 2
    assert "error: no room" in capsys.readouterr().err
    config.write_text("- 1\n")
    assert main(["induction", "--config", str(config), "--save", str(tmp_path / "no")]) == 2
    assert f"error: configuration file {config} must be a mapping, not list" in capsys.readouterr().err
