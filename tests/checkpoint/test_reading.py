"""Model directories as strangers have them: norms in fp32, licences, sizes that no weights have."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers import families
from safetensors.torch import load_file, save_file

from megatron.dmc import cli
from megatron.dmc.checkpoint import convert
from megatron.dmc.checkpoint.fields import JSON_BYTES, Fields, read_json
from megatron.dmc.checkpoint.formats import hf
from megatron.dmc.inference import LLM

SIDE_FILES = {
    "LICENSE": "text",
    "Notice.txt": "text",
    "USE_POLICY.md": "text",
    "tokenizer_config.json": "{}",
    "additional_chat_templates/tool_use.jinja": "{{ messages }}",
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bf16 model with norms in fp32, and what stands beside the weights on a hub."""
    directory = tmp_path_factory.mktemp("plain") / "hf"
    families.make("llama3.1", directory, shard="1GB")
    tensors = load_file(directory / hf.SINGLE)
    tensors = {name: t.float() * 1.0001 if "norm" in name else t for name, t in tensors.items()}
    save_file(tensors, directory / hf.SINGLE, {"format": "pt"})
    for name, text in SIDE_FILES.items():
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text(text)
    return directory


def test_norms_in_fp32_among_bf16(plain: Path, tmp_path: Path) -> None:
    """Imported and exported bit by bit, and computed in bf16 by the engine: most bytes are, and config.json says it."""
    convert.import_hf(plain, tmp_path / "mg")
    convert.export(tmp_path / "mg", tmp_path / "out")
    before, after = load_file(plain / hf.SINGLE), load_file(tmp_path / "out" / hf.SINGLE)
    assert {t.dtype for t in before.values()} == {torch.float32, torch.bfloat16} and list(before) == list(after)
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype and torch.equal(tensor, after[name]), name
    assert read_json(plain / "config.json") == read_json(tmp_path / "out" / "config.json")
    assert LLM(plain, tokenizer=object()).engine.model.dtype == torch.bfloat16


def test_files_beside_the_weights(plain: Path, tmp_path: Path) -> None:
    """Licences and chat templates go through import, export and ``merge-heads``."""
    convert.import_hf(plain, tmp_path / "mg")
    convert.export(tmp_path / "mg", tmp_path / "out")
    assert (
        cli.main(["convert", "merge-heads", "--hf", str(plain), "--kv-heads", "1", "--save", str(tmp_path / "gqa")])
        == 0
    )
    for directory in (tmp_path / "mg" / "hf", tmp_path / "out", tmp_path / "gqa"):
        assert {name: (directory / name).read_text() for name in SIDE_FILES} == SIDE_FILES


def test_templates_of_a_tokenizer_that_is_named(plain: Path, tmp_path: Path) -> None:
    families.make("llama2", tmp_path / "hf", shard="1GB")
    convert.import_hf(tmp_path / "hf", tmp_path / "mg")
    convert.export(tmp_path / "mg", tmp_path / "out", tokenizer=plain)
    assert (tmp_path / "out" / "additional_chat_templates" / "tool_use.jinja").is_file()
    assert not (tmp_path / "out" / "LICENSE").exists()  # of another model


@pytest.mark.parametrize(
    ("layers", "words"),
    [(10**9, "num_hidden_layers is 1000000000; it must be an integer from 1 to 10000"), (9000, "has 21 tensors")],
)
def test_more_layers_than_tensors(
    plain: Path, tmp_path: Path, layers: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Found before anything is made of as many layers."""
    directory = shutil.copytree(plain, tmp_path / "hf")
    config = read_json(directory / "config.json") | {"num_hidden_layers": layers}
    (directory / "config.json").write_text(json.dumps(config))
    assert cli.main(["convert", "import", "--hf", str(directory), "--save", str(tmp_path / "mg")]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1
    with pytest.raises(ValueError, match=words):
        LLM(directory, tokenizer=object())


def test_a_header_and_an_index_that_no_model_has(plain: Path, tmp_path: Path) -> None:
    """Refused by their sizes. The file of the header is sparse: nothing is in it."""
    for name, size in ((hf.SINGLE, 1 << 30), ("config.json", JSON_BYTES + 1)):
        directory = shutil.copytree(plain, tmp_path / name)
        with (directory / name).open("wb") as file:
            file.write((900_000_000).to_bytes(8, "little"))
            file.truncate(size)
        with pytest.raises(ValueError, match="at most"):
            hf.open_model(directory)


def test_messages_stay_on_one_line() -> None:
    """However long a value or a key is, and whatever is in it."""
    for value in (
        "a\nb" * 10**6,
        [[1] * 50] * 50,
        {str(n): n for n in range(10**5)},
        10**4000,
        float("nan"),
        "\x1b[31m",
    ):
        with pytest.raises(ValueError) as caught:
            Fields({"k\ney" * 1000: value}, "file: ").integer("k\ney" * 1000)
        assert len(str(caught.value)) < 300 and str(caught.value).isprintable()


@pytest.mark.parametrize("text", ["[" * 100_000, "\xff", '{"a": 1', "[]", "1" * 5000, ""])
def test_what_is_no_json_object(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match="config.json") as caught:
        read_json(path)
    assert "\n" not in str(caught.value)
