"""Configurations of published models: each is taken as it is, or refused for what changes its numbers."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from published import REFUSED, TAKEN

from megatron.dmc.checkpoint import mapping
from megatron.dmc.checkpoint.formats import hf
from megatron.dmc.checkpoint.mapping import config_keys
from megatron.dmc.inference.weights import read_info


@pytest.mark.parametrize("name", TAKEN)
def test_taken(name: str) -> None:
    """What is read has as many parameters as the hub says."""
    billions, config = TAKEN[name]
    model = mapping.from_hf_config(config)
    parameters = sum(math.prod(shape) for shape in mapping.hf_shapes(mapping.family_of(config), model).values())
    assert parameters / 1e9 == pytest.approx(billions, rel=1e-3)
    assert model.max_position_embeddings == config["max_position_embeddings"]
    rope = config.get("rope_parameters", config)
    assert model.rotary_base == rope.get("rope_theta", 10000.0)
    assert (model.rope_scaling or {}).get("factor") == (config.get("rope_scaling") or {}).get("factor")
    again = mapping.to_hf_config(model, "bfloat16")  # nothing that computes was lost
    assert mapping.from_hf_config(again).rope_scaling == model.rope_scaling


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    words, config = REFUSED[name]
    with pytest.raises(ValueError, match=words):
        mapping.from_hf_config(config)


def test_there_are_forty() -> None:
    assert len(TAKEN) >= 40


LLAMA = TAKEN["meta-llama/Llama-2-7b-hf"][1]


@pytest.mark.parametrize("key", sorted(config_keys.NEUTRAL))
def test_a_key_is_taken_where_it_changes_nothing(key: str) -> None:
    """Null and the neutral values are taken, and another one is refused by name, one of another type too."""
    for value in (None, *config_keys.NEUTRAL[key]):
        assert mapping.from_hf_config({**LLAMA, key: value}) == mapping.from_hf_config(LLAMA)
    for other in (17, "x", [1], {"a": 1}):
        with pytest.raises(ValueError, match=f"config.json: {key} is "):
            mapping.from_hf_config({**LLAMA, key: other})


def test_inert_keys_are_taken_at_any_value() -> None:
    text = ("dtype", "torch_dtype")  # the type of the weights is read where it is wanted
    more = {key: {"any": ["thing", 1]} for key in config_keys.INERT if key not in text}
    assert mapping.from_hf_config({**LLAMA, **more}) == mapping.from_hf_config(LLAMA)
    assert not config_keys.INERT & config_keys.NEUTRAL.keys()


def test_what_the_configuration_classes_write_is_known() -> None:
    """No key of the families' configuration classes, as the installed transformers writes them, is unknown."""
    import transformers

    for name in ("Llama", "Mistral", "Qwen2", "Qwen3"):
        config = getattr(transformers, f"{name}Config")(sliding_window=None).to_dict()
        config |= transformers.GenerationConfig().to_dict()
        mapping.from_hf_config({**config, "architectures": [f"{name}ForCausalLM"]})


@pytest.mark.parametrize(
    "values",
    [
        dict(use_sliding_window=True, sliding_window=32768),  # no position is outside of it
        dict(use_sliding_window=True, sliding_window=4096, max_window_layers=28),  # no layer has it
        dict(rope_scaling={"type": "linear", "factor": 1.0}),
        dict(num_hidden_layers=28.0),
    ],
)
def test_settings_that_change_nothing(values: dict) -> None:
    config = TAKEN["Qwen/Qwen2.5-7B-Instruct"][1]
    assert mapping.from_hf_config({**config, **values}) == mapping.from_hf_config(config)


def _directory(path: Path, config: dict, dtypes: dict[str, torch.dtype]) -> hf.HFDirectory:
    def tensor(name: str) -> hf.Lazy:
        size = 100 if name == "large" else 1
        return hf.FileTensor(path / "none", 0, (size,), dtypes[name], name)

    return hf.HFDirectory(path, config, {name: tensor(name) for name in dtypes}, {})


def test_the_type_to_compute_in(tmp_path: Path) -> None:
    """That of config.json; where it says none, that of most bytes, and never of a tensor that is left out."""
    dtypes = {"x.rotary_emb.inv_freq": torch.float32, "norm": torch.float32, "large": torch.bfloat16}
    plain = {key: value for key, value in LLAMA.items() if key != "torch_dtype"}
    for more, expected in (
        ({"torch_dtype": "float16"}, torch.float16),
        ({"dtype": "torch.float32", "torch_dtype": "float16"}, torch.float32),
        ({"torch_dtype": "auto"}, torch.bfloat16),
        ({}, torch.bfloat16),
    ):
        assert read_info(_directory(tmp_path, {**plain, **more}, dtypes)).dtype == expected
    with pytest.raises(ValueError, match="torch_dtype is 'int8'; it must be one of float32"):
        read_info(_directory(tmp_path, {**plain, "torch_dtype": "int8"}, dtypes))


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ({"eos_token_id": [128001, 128008, 128009]}, 128001, (128001, 128008, 128009)),  # Llama 3.1
        ({"eos_token_id": [128001, 128009]}, 128009, (128001, 128009)),
        ({}, [2, 7], (2, 7)),
        ({"eos_token_id": None}, -1, ()),  # of LLaMA 1: none
        (None, 2, (2,)),
    ],
)
def test_end_of_sequence_tokens(tmp_path: Path, generation: dict | None, config: object, expected: tuple) -> None:
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    directory = _directory(tmp_path, _llama3_config() | {"eos_token_id": config}, {"large": torch.bfloat16})
    assert read_info(directory).eos == expected


def _llama3_config() -> dict:
    return TAKEN["meta-llama/Llama-3.1-8B-Instruct"][1]
