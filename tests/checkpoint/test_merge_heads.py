"""Mean-pooled KV heads: the tensors, the streaming, and a model in which merging must change nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from helpers import (
    exported,
    families,
    tiny,  # noqa: F401  (puts tools/ on the path)
)
from safetensors.torch import load_file

from megatron.dmc.checkpoint.formats import hf
from megatron.dmc.checkpoint.merge_heads import MeanHeads, merge_heads


def read(directory: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


def load(directory: Path):
    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)


@pytest.mark.parametrize(
    "case, heads", [("llama2", 2), ("llama2", 1), ("qwen2", 1), ("llama3.1", 1), ("qwen3", 1), ("mistral", 1)]
)
def test_tensors_are_means_of_groups(case, heads, tmp_path) -> None:
    families.make(case, tmp_path / "from")
    merge_heads(tmp_path / "from", tmp_path / "to", heads)
    before, after = read(tmp_path / "from"), read(tmp_path / "to")
    assert set(before) == set(after)
    config = json.loads((tmp_path / "to/config.json").read_text())
    assert config == json.loads((tmp_path / "from/config.json").read_text()) | {"num_key_value_heads": heads}
    pooled = 0
    for name, tensor in before.items():
        if "k_proj" in name or "v_proj" in name:
            d = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
            want = tensor.float().view(heads, -1, d, *tensor.shape[1:]).mean(dim=1).flatten(0, 1).to(tensor.dtype)
            assert after[name].dtype == tensor.dtype and torch.allclose(after[name], want, rtol=0, atol=1e-7)
            pooled += 1
        else:
            assert torch.equal(after[name], tensor), name
    assert pooled == (8 if case == "qwen2" else 4)
    # The files are laid out as before, and the model loads.
    layout = hf.open_directory(tmp_path / "to").weight_map
    assert layout == hf.open_directory(tmp_path / "from").weight_map
    assert load(tmp_path / "to").config.num_key_value_heads == heads


def test_equal_heads_merge_without_a_trace(tmp_path) -> None:
    """A model whose groups have equal heads computes the same after merging: the groups are the right ones."""
    model = families.make("llama2", tmp_path / "from")
    with torch.no_grad():
        for layer in model.model.layers:
            for projection in (layer.self_attn.k_proj, layer.self_attn.v_proj):
                rows = projection.weight.view(2, 2, -1, projection.weight.size(1))  # 4 KV heads in 2 groups
                rows[:, 1] = rows[:, 0]
    model.save_pretrained(tmp_path / "from", max_shard_size="60KB")
    merge_heads(tmp_path / "from", tmp_path / "to", 2)
    ids = torch.arange(40)[None]
    with torch.no_grad():
        assert torch.allclose(load(tmp_path / "to")(ids).logits, model(ids).logits, atol=1e-5)


def test_any_rows_can_be_read(tmp_path) -> None:
    families.make("llama2", tmp_path / "model")
    base = hf.open_directory(tmp_path / "model").tensors["model.layers.0.self_attn.k_proj.weight"]
    merged, d = MeanHeads(base, 2, 16), 16
    whole = base.read().view(2, 2, d, -1).mean(dim=1).flatten(0, 1)
    for start, stop in ((0, 32), (3, 7), (10, 20), (15, 17), (16, 32), (5, 5)):
        assert torch.allclose(merged.read(start, stop), whole[start:stop], atol=1e-7)


def test_what_cannot_be_merged_is_refused(tmp_path, capsys) -> None:
    import convert_checkpoint

    families.make("llama2", tmp_path / "model")
    exported.Exported(tmp_path / "dmc", **exported.CASES["half"])
    for source, heads, message in (
        ("model", 3, "has 4 KV heads"),
        ("model", 4, "has 4 KV heads"),
        ("model", 0, "has 4 KV heads"),
        ("dmc", 1, "has been retrofitted"),
        ("nothing", 1, "not a directory"),
    ):
        argv = ["merge-heads", "--hf", str(tmp_path / source), "--kv-heads", str(heads), "--save", str(tmp_path / "to")]
        assert convert_checkpoint.main(argv) == 2
        assert message in capsys.readouterr().err and not (tmp_path / "to").exists()
    argv[2], argv[4] = str(tmp_path / "model"), "2"
    assert convert_checkpoint.main(argv) == 0
    assert f"wrote {tmp_path / 'to'}" in capsys.readouterr().out
    assert convert_checkpoint.main(argv) == 2 and "--overwrite" in capsys.readouterr().err
