"""GGUF files: weights, configuration and tokenizer as in the model that they were made from; refusals by name."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import families, gguf_files
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron.dmc import cli
from megatron.dmc.checkpoint import convert, model_card
from megatron.dmc.checkpoint.formats import gguf as gguf_format
from megatron.dmc.checkpoint.formats.base import Given
from megatron.dmc.checkpoint.formats.gguf import tokenizer as gguf_tokenizer

CASES = {"llama2": "Q8_0", "llama3.2": "F16", "mistral": "BF16", "qwen2": "Q4_1", "qwen3": "Q5_0"}
TEXTS = [
    "the keys of the cache",
    " two  spaces",
    "In 1984 there were 12,345 values.",
    "na\u00efve \u65e5\u672c\n\ttab ",
]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """Kind -> (keys of a GGUF file, the tokenizer that they were taken from)."""
    folder = tmp_path_factory.mktemp("tokenizers")
    return {"gpt2": gguf_files.byte_level(300), "llama": gguf_files.sentencepiece(folder)}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama with 300 tokens."""
    directory = tmp_path_factory.mktemp("llama")
    families.make("llama3", directory, vocab_size=300)
    return directory


def divisors(factor: float = 8.0) -> np.ndarray:
    """``rope_freqs.weight`` of Llama 3.1's published scaling for heads of 16 channels and base 5e5, frequency by
    frequency: kept above 4 rotations in 8,192 tokens, divided by the factor below 1, blended in between.
    """
    values = []
    for i in range(8):
        rotations = 8192 / (2 * np.pi * 5e5 ** (2 * i / 16))
        blend = (rotations - 1) / 3
        values.append(1.0 if rotations > 4 else factor if rotations < 1 else 1 / ((1 - blend) / factor + blend))
    return np.array(values)


@pytest.mark.parametrize("case", CASES)
def test_weights_come_back_under_their_names(case: str, tmp_path: Path, tokenizers: dict) -> None:
    keys, _ = tokenizers["gpt2"]
    # A mistral model is written as llama, as llama.cpp's converter does.
    family = {"family": "Llama"} if case == "mistral" else {}
    rope = {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}} if case == "llama3.2" else {}
    families.make(case, tmp_path / "hf", vocab_size=300, **family, **rope, dtype="float32")
    freqs = divisors() if case == "llama3.2" else None
    held = gguf_files.write(tmp_path / "hf", tmp_path / "m.gguf", CASES[case], keys, rope_freqs=freqs)
    convert.import_gguf(tmp_path / "m.gguf", tmp_path / "mg", dtype=torch.float32)
    convert.export(tmp_path / "mg", tmp_path / "out")
    found = gguf_files.weights(tmp_path / "out")
    assert set(found) == set(held)
    for name, weight in held.items():
        assert torch.equal(found[name], weight), name
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    expected = {**scaling, "original_max_position_embeddings": 8192} if case == "llama3.2" else None
    assert config.get("rope_scaling") == expected
    assert config["rms_norm_eps"] == (1e-5 if case == "qwen2" else 1e-6)


def test_yarn_without_a_factor_of_its_own(llama: Path, tmp_path: Path, tokenizers: dict) -> None:
    scaling = {"type": "yarn", "factor": 4.0, "original_context_length": 32, "attn_factor": 1.0}
    extra = {f"llama.rope.scaling.{key}": value for key, value in scaling.items()}
    gguf_files.write(llama, tmp_path / "m.gguf", "F32", tokenizers["gpt2"][0], extra)
    convert.import_gguf(tmp_path / "m.gguf", tmp_path / "mg")
    convert.export(tmp_path / "mg", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["rope_scaling"] == {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}


def test_logits_equal_those_of_transformers_reading_the_original(llama: Path, tmp_path: Path, tokenizers: dict) -> None:
    gguf_files.write(llama, tmp_path / "m.gguf", "F32", tokenizers["gpt2"][0])
    convert.import_gguf(tmp_path / "m.gguf", tmp_path / "mg")
    convert.export(tmp_path / "mg", tmp_path / "out")
    tokens = torch.arange(40).view(2, 20)
    with torch.no_grad():
        original, ours = (AutoModelForCausalLM.from_pretrained(d)(tokens).logits for d in (llama, tmp_path / "out"))
    assert torch.equal(original, ours)


def test_types_of_imported_weights(llama: Path, tmp_path: Path, tokenizers: dict) -> None:
    for stored, dtype in {"F32": torch.float32, "F16": torch.float16, "Q8_0": torch.bfloat16}.items():
        gguf_files.write(llama, tmp_path / "m.gguf", stored, tokenizers["gpt2"][0])
        source = gguf_format.open_model(tmp_path / "m.gguf")
        assert {tensor.dtype for tensor in source.tensors.values()} == {dtype}
        assert source.config["torch_dtype"] == str(dtype).removeprefix("torch.")
    source = gguf_format.open_model(tmp_path / "m.gguf", Given(dtype=torch.float16))
    assert {tensor.dtype for tensor in source.tensors.values()} == {torch.float16}
    assert source.notes == []


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_tokenizer_gives_the_ids_of_the_original(kind: str, llama: Path, tmp_path: Path, tokenizers: dict) -> None:
    keys, original = tokenizers[kind]
    keys = {**keys, "eot_token_id": 5}
    template = {"tokenizer.chat_template": "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}"}
    gguf_files.write(llama, tmp_path / "m.gguf", "F32", keys, template)
    convert.import_gguf(tmp_path / "m.gguf", tmp_path / "mg")
    convert.export(tmp_path / "mg", tmp_path / "out")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in TEXTS:
        expected = original.encode(text).ids if kind == "gpt2" else [1, *original.encode(text)]
        assert loaded(text).input_ids == expected
        assert loaded.decode(expected, skip_special_tokens=True, clean_up_tokenization_spaces=False) == text
    assert (loaded.bos_token_id, loaded.eos_token_id, loaded.unk_token_id) == (1, 2, 0)
    chat = loaded.apply_chat_template([{"role": "user", "content": "keys"}], tokenize=False)
    assert chat == keys["tokens"][1] + "keys"
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [2, 5] and generation["bos_token_id"] == 1


def test_sentencepiece_model_exported_with_a_model(tmp_path: Path, tokenizers: dict) -> None:
    """transformers gives sentencepiece's ids, a space before a text included."""
    _, original = tokenizers["llama"]
    path = tmp_path / "spm.model"
    path.write_bytes(original.serialized_model_proto())
    for name, content in model_card._sentencepiece_files(path, print).items():
        (tmp_path / name).write_bytes(content)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for text in (*TEXTS, "", " ", "   x"):
        assert loaded(text).input_ids == [1, *original.encode(text)], text


def test_bos_of_a_byte_level_tokenizer(llama: Path, tmp_path: Path, tokenizers: dict) -> None:
    """As the file says; where it does not, as the family does (Llama 3 begins with it)."""
    keys, _ = tokenizers["gpt2"]
    for pre, said, bos in (("smollm", True, True), ("llama-bpe", False, False), ("llama-bpe", None, True)):
        own = {**keys, "pre": pre, "add_bos_token": said}
        own = {key: value for key, value in own.items() if value is not None}
        gguf_files.write(llama, tmp_path / "m.gguf", "F32", own)
        content = gguf_format.open_model(tmp_path / "m.gguf").files
        for name, text in content.items():
            (tmp_path / name).write_bytes(text)
        assert (AutoTokenizer.from_pretrained(tmp_path)("the").input_ids[0] == 1) is bos


def test_cuts_of_published_tokenizers() -> None:
    """Words before BPE: runs of at most three digits in Llama 3, single digits in Qwen 2 and SmolLM2."""
    from tokenizers import Regex, pre_tokenizers

    words = {}
    for name in ("llama-bpe", "qwen2", "tekken"):
        split = pre_tokenizers.Split(Regex(gguf_tokenizer.CUTS[name].pattern), "isolated")
        words[name] = [word for word, _ in split.pre_tokenize_str("It's 12345, HelloWorld!\n\n x")]
    assert words["llama-bpe"] == ["It", "'s", " ", "123", "45", ",", " HelloWorld", "!\n\n", " x"]
    assert words["qwen2"] == ["It", "'s", " ", "1", "2", "3", "4", "5", ",", " HelloWorld", "!\n\n", " x"]
    assert words["tekken"] == ["It", "'s", " ", "1", "2", "3", "4", "5", ",", " Hello", "World", "!\n\n", " x"]


REFUSED = {
    "an architecture": ({"general.architecture": "gemma3"}, {}, "general.architecture is 'gemma3'"),
    "experts": ({"llama.expert_count": 8}, {}, "llama.expert_count = 8 is not supported; only 0 is"),
    "a key": ({"llama.attention.scale": 0.5}, {}, "llama.attention.scale = 0.5 is not understood"),
    "a key's type": ({"llama.attention.sliding_window": "x"}, {}, "sliding_window is 'x'; it must be an integer"),
    "a part of a head": (
        {"llama.rope.dimension_count": 8},
        {},
        "rope.dimension_count is 8, other than the 16 channels",
    ),
    "linear scaling": (
        {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0},
        {},
        "rope_type 'linear' is not supported",
    ),
    "YaRN with a factor": (
        {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0, "llama.rope.scaling.attn_factor": 1.5},
        {},
        "rope.scaling.attn_factor = 1.5 is not supported; only 1.0 is",
    ),
    "a part of several": ({"split.count": 3}, {}, "is one part of several"),
    "a tokenizer": ({}, {"model": "rwkv"}, "tokenizer.ggml.model is 'rwkv'; supported: gpt2, llama"),
    "a cut": ({}, {"pre": "viking"}, "tokenizer.ggml.pre is 'viking'; supported: gpt-2, smollm"),
    "a tokenizer's key": ({}, {"suffix_mode": True}, "tokenizer.ggml.suffix_mode is not understood"),
    "a token's number": ({}, {"eos_token_id": 1000}, "eos_token_id is 1000; there are 296 tokens"),
    "more tokens than rows": ({}, {"tokens": ["x"] * 301}, "tokens has 301 entries; the embedding has 300 rows"),
    "types beside": ({}, {"token_type": [1]}, "token_type does not hold one number for each token"),
    "merges": ({}, {"merges": ["nosuchtoken t"]}, "tokenizer.ggml.merges does not fit the tokens"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_not_understood_is_refused_by_name(what: str, llama: Path, tmp_path: Path, tokenizers: dict) -> None:
    extra, changed, message = REFUSED[what]
    path = tmp_path / "m.gguf"
    extra = dict(extra)
    architecture = extra.pop("general.architecture", None)
    gguf_files.write(llama, path, "F32", {**tokenizers["gpt2"][0], **changed}, extra)
    if architecture:
        content = path.read_bytes()
        at = content.index(b"general.architecture") + len(b"general.architecture") + 4
        value = len(architecture).to_bytes(8, "little") + architecture.encode()
        path.write_bytes(content[:at] + value + content[at + 8 + len("llama") :])
    with pytest.raises(ValueError, match=message):
        gguf_format.open_model(path)


def test_tensors_that_are_missing_too_many_or_of_another_scaling(llama: Path, tmp_path: Path, tokenizers: dict) -> None:
    path, keys = tmp_path / "m.gguf", tokenizers["gpt2"][0]
    gguf_files.write(llama, path, "F32", keys, rope_freqs=divisors() * 1.01)
    with pytest.raises(ValueError, match="rope_freqs.weight is not what Llama 3.1's scaling gives"):
        gguf_format.open_model(path)
    gguf_files.write(llama, path, "F32", keys, rope_freqs=divisors())
    content = path.read_bytes()
    path.write_bytes(content.replace(b"blk.0.attn_q.weight", b"blk.0.attn_x.weight"))
    with pytest.raises(ValueError, match="lacks 1 tensors that its configuration asks for: blk.0.attn_q.weight"):
        gguf_format.open_model(path)
    path.write_bytes(content.replace(b"rope_freqs.weight", b"blk.0.attn.extras"))
    with pytest.raises(ValueError, match="has 1 tensors that are not supported for llama: blk.0.attn.extras"):
        gguf_format.open_model(path)


def test_damage_is_one_line(llama: Path, tmp_path: Path, tokenizers: dict, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "m.gguf"
    gguf_files.write(llama, path, "Q8_0", tokenizers["gpt2"][0])
    content = path.read_bytes()
    header = content.index(b"output_norm.weight")
    cuts = [3, 30, header // 2, header, len(content) - 9]
    damaged = [content[:cut] for cut in cuts] + [b"GGML" + content[4:], content[:4] + b"\x07" + content[5:]]
    for number, damage in enumerate(damaged):
        path.write_bytes(damage)
        assert cli.main(["convert", "import", "--gguf", str(path), "--save", str(tmp_path / f"out{number}")]) == 2
        said = capsys.readouterr().err.strip()
        assert str(path) in said and "\n" not in said
        assert not (tmp_path / f"out{number}").exists()


def test_inspect_and_import_by_the_command(
    llama: Path, tmp_path: Path, tokenizers: dict, capsys: pytest.CaptureFixture
) -> None:
    path = tmp_path / "m.gguf"
    gguf_files.write(llama, path, "Q8_0", tokenizers["gpt2"][0], {"general.license": "apache-2.0"})
    assert cli.main(["convert", "inspect", str(path)]) == 0
    said = capsys.readouterr().out
    for text in ("GGUF file, version 3", "llama", "Q8_0, F32", "gpt2 (smollm), 296 tokens", "apache-2.0"):
        assert text in said
    assert cli.main(["convert", "import", "--gguf", str(path), "--save", str(tmp_path / "mg")]) == 0
    assert "read as bfloat16; --dtype for another" in capsys.readouterr().out
    assert cli.main(["convert", "inspect", str(tmp_path / "mg")]) == 0
