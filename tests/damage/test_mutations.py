"""Damaged JSON files: some that were once taken or ended in a traceback, and a sample of ``tests/damage/run.py``."""

from __future__ import annotations

import random
from collections.abc import Iterable
from pathlib import Path

import pytest
from mutations import Outcome, Target, model_targets, mutations, replaced

Targets = list[tuple[Target, list[Outcome]]]
REFUSED = [
    ("plain/config.json", "rope_parameters.rope_theta", []),
    ("plain/config.json", "rope_parameters.factor", "8"),
    ("plain/config.json", "tie_word_embeddings", 10**13),
    ("plain/config.json", "num_hidden_layers", 10**9),
    ("plain/config.json", "architectures", 5),
    ("plain/config.json", "model_type", ["llama"]),
    ("plain/config.json", "head_dim", 0),
    ("plain/config.json", "layer_types", "full_attention"),
    ("plain/config.json", "attention_dropout", "x"),
    ("dmc/config.json", "dmc", None),
    ("dmc/config.json", "dmc", {}),
    ("dmc/config.json", "dmc.window", 1e9),
    ("dmc/config.json", "dmc.decision_bias", None),
    ("dmc/config.json", "dmc.measured_cr", [4]),
    ("dmc/config.json", "dmc.step", "x"),
    ("dmc/config.json", "dmc.stage", {}),
    ("dmc/config.json", "dmc.qk_layernorm", True),
    ("plain/model.safetensors.index.json", "weight_map", {}),
    ("plain/model.safetensors.index.json", "weight_map", {"model.norm.weight": 1}),
]
TOKENIZER = [
    ("model_max_length", []),
    ("add_bos_token", "false"),
    ("bos_token", 1),
    ("eos_token", {"x": 1}),
    ("chat_template", [1]),
    ("added_tokens_decoder", {"x": 1}),
]


@pytest.fixture(scope="module")
def targets(tmp_path_factory: pytest.TempPathFactory) -> Targets:
    """Files of two small models, and what the commands do with them as they are."""
    directory = tmp_path_factory.mktemp("models")
    return [(target, target.before(directory / "out")) for target in model_targets(directory)]


def _find(targets: Targets, name: str) -> Target:
    return next(target for target, _ in targets if target.file.as_posix().endswith(name))


def _check_refused(target: Target, key: str, value: object, out: Path, commands: Iterable[tuple]) -> None:
    """On one line that names the key."""
    original = target.file.read_bytes()
    target.file.write_bytes(replaced(original, key, value).data)
    try:
        for command in commands:
            outcome = target.run(command, out / "out")
            assert outcome.status == 2, outcome.status
            assert outcome.error.startswith("error: ") and outcome.error.count("\n") == 1 and len(outcome.error) < 1000
            assert key.split(".")[-1] in outcome.error
    finally:
        target.file.write_bytes(original)


@pytest.mark.parametrize(("file", "key", "value"), REFUSED)
def test_a_wrong_value_is_refused(targets: Targets, tmp_path: Path, file: str, key: str, value: object) -> None:
    """By every command that reads it."""
    target = _find(targets, file)
    _check_refused(target, key, value, tmp_path, target.commands)


@pytest.mark.parametrize("value", [[[1]], "2", 1.5, True, 10**13])
def test_wrong_end_of_sequence_tokens_are_refused(targets: Targets, tmp_path: Path, value: object) -> None:
    """The engine alone reads them."""
    target = _find(targets, "generation_config.json")
    _check_refused(target, "eos_token_id", value, tmp_path, [c for c in target.commands if c[0] == "generate"])


@pytest.mark.parametrize(("key", "value"), TOKENIZER)
def test_wrong_types_of_a_tokenizer_are_refused(targets: Targets, tmp_path: Path, key: str, value: object) -> None:
    target = _find(targets, "tokenizer_config.json")
    _check_refused(target, key, value, tmp_path, target.commands)


def test_a_sample_of_mutations(targets: Targets, tmp_path: Path) -> None:
    """One line and status 2, or no other result than before."""
    faults = []
    for target, before in targets:
        source = mutations(target.file.read_bytes(), random.Random(f"sample {target.file.name}"))
        faults += [fault for _ in range(3) for fault in target.check(next(source), before, tmp_path / "out")]
    assert not faults, "\n".join(faults)
