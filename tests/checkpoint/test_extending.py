"""docs/extending.md, done: a family that the package does not know, added by the page's own Python."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from helpers import families
from helpers.engines import drain, ids_of
from helpers.forked import run
from helpers.processes import ROOT
from safetensors.torch import load_file, save_file

from megatron.dmc.checkpoint import convert, mapping
from megatron.dmc.checkpoint.formats.torch_dist import DistReader
from megatron.dmc.checkpoint.manifest import resolve_checkpoint
from megatron.dmc.inference import Engine, EngineConfig, SamplingParams

PAGE = (ROOT / "docs" / "extending.md").read_text()
BLOCKS = "\n".join(re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL))
CASE = re.search(r'`"seed_oss": (dict\(.*?\))`', PAGE)[1]


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch) -> dict:
    """Names that the page's blocks define, with its families in the table."""
    found: dict = {}
    exec(BLOCKS, found)
    for family in (found["family"], found["other_names"]):
        assert family.model_type not in mapping.FAMILIES, "the package has it by now: the page needs another example"
        monkeypatch.setitem(mapping.FAMILIES, family.model_type, family)
    monkeypatch.setitem(families.CASES, "seed_oss", eval(CASE))
    return found


@pytest.mark.slow
def test_the_new_family_is_read_and_served(page: dict, tmp_path: Path) -> None:
    """There and back bit by bit; Megatron's logits are transformers'; so are the engine's tokens."""
    source, checkpoint, out = tmp_path / "hf", tmp_path / "mg", tmp_path / "out"
    model = families.make("seed_oss", source)
    convert.import_hf(source, checkpoint)
    convert.export(checkpoint, out)
    for file in source.glob("*.safetensors"):
        before, after = load_file(file), load_file(out / file.name)
        assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    code = (
        f"import sys; sys.path.insert(0, 'tools')\n{BLOCKS}\nfrom megatron.dmc.checkpoint.mapping import FAMILIES\n"
        "FAMILIES['seed_oss'] = family\nimport convert_checkpoint\nsys.exit(convert_checkpoint.main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, "verify", "--hf", source, "--load", checkpoint, "--logits"]
    said = run(command, tmp_path / "log")
    assert float(re.search(r"largest difference (\S+)", said)[1]) < 1e-4, said
    prompt = torch.randint(families.SIZES["vocab_size"], (1, 20), generator=torch.Generator().manual_seed(2))
    expected = model.generate(prompt, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)[
        0, 20:
    ].tolist()
    engine = Engine(str(source), EngineConfig(dtype="float32"))
    engine.add_request("a", prompt[0].tolist(), SamplingParams(temperature=0, max_tokens=12, ignore_eos=True))
    assert list(ids_of(drain(engine)["a", 0])) == expected


@pytest.mark.parametrize("key, value", [("attention_out_bias", True), ("mlp_bias", True), ("logit_scale", 2.0)])
def test_what_the_table_does_not_allow_is_refused(page: dict, tmp_path: Path, key: str, value: object) -> None:
    families.make("seed_oss", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert mapping.from_hf_config(config).add_qkv_bias and "residual_dropout" in config
    with pytest.raises(ValueError, match=key):
        mapping.from_hf_config({**config, key: value})


def test_other_names_are_enough(page: dict, tmp_path: Path) -> None:
    """Weights under other names become the same checkpoint."""
    llama, other = tmp_path / "llama", tmp_path / "other"
    families.make("llama3", llama, shard="1GB")
    other.mkdir()
    tensors = {page["renamed"](name): tensor for name, tensor in load_file(llama / "model.safetensors").items()}
    assert [sum(part in name for name in tensors) for part in ("ln_1", "ln_2", "layernorm")] == [2, 2, 0]
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    config = json.loads((llama / "config.json").read_text())
    for key in mapping.FAMILIES["llama"].required:  # the example's table does not know them
        config.pop(key, None)
    config |= {"model_type": "other_names", "architectures": ["OtherNamesForCausalLM"]}
    (other / "config.json").write_text(json.dumps(config))
    readers = []
    for directory in (llama, other):
        convert.import_hf(directory, directory.with_suffix(".mg"))
        readers.append(DistReader(resolve_checkpoint(directory.with_suffix(".mg"))))
    names = [set(reader.tensors()) for reader in readers]
    assert names[0] == names[1] and len(names[0]) > 5
    for name, entry in readers[0].tensors().items():
        for layer in range(entry.size[0]) if name.startswith("decoder.layers.") else [None]:
            assert torch.equal(*(reader.get(name, layer).read() for reader in readers)), name
    convert.export(other.with_suffix(".mg"), tmp_path / "out")
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == tensors.keys()


def test_the_pages_places_exist() -> None:
    found = re.findall(r"`((?:tests|tools|megatron|training|model|checkpoint|inference|evaluation)/[\w/.]+)`", PAGE)
    assert len(found) > 10
    for path in found:
        assert (ROOT / path).exists() or (ROOT / "megatron" / "dmc" / path).exists(), path
