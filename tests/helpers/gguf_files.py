"""GGUF files of small models, written by the ``gguf`` library as llama.cpp's converter lays them out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Optional

import gguf
import numpy as np
import torch
from safetensors.torch import load_file

ARCHITECTURES = {"llama": gguf.MODEL_ARCH.LLAMA, "qwen2": gguf.MODEL_ARCH.QWEN2, "qwen3": gguf.MODEL_ARCH.QWEN3}


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return {k: v for path in sorted(directory.glob("*.safetensors")) for k, v in load_file(path).items()}


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a query or key projection in llama.cpp's order: the halves of every head interleaved."""
    halves = weight.reshape(heads, 2, -1, weight.shape[-1])
    return np.concatenate([np.stack([halves[:, 0, i], halves[:, 1, i]], 1) for i in range(halves.shape[2])], 1).reshape(
        weight.shape
    )


def write(
    directory: Path,
    path: Path,
    quantization: str = "F32",
    tokenizer: Optional[dict[str, Any]] = None,
    extra: Optional[dict[str, Any]] = None,
    rope_freqs: Optional[np.ndarray] = None,
) -> dict[str, torch.Tensor]:
    """Write a Hugging Face directory as a GGUF file.

    Args:
        quantization: type of all matrices but the embedding.
        tokenizer, extra: key -> value; the former's keys without ``tokenizer.ggml.``.

    Returns:
        Hugging Face name -> the weights that the file holds, dequantized to float32.
    """
    config = json.loads((directory / "config.json").read_text())
    arch = config["model_type"]
    names = gguf.get_tensor_name_map(ARCHITECTURES[arch], config["num_hidden_layers"])
    kind = gguf.GGMLQuantizationType[quantization]
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base((config.get("rope_parameters") or config)["rope_theta"])
    if config.get("head_dim"):
        writer.add_key_length(config["head_dim"])
        writer.add_value_length(config["head_dim"])
    for key, value in {f"tokenizer.ggml.{k}": v for k, v in (tokenizer or {}).items()}.items():
        add(writer, key, value)
    for key, value in (extra or {}).items():
        add(writer, key, value)
    held: dict[str, torch.Tensor] = {}
    for name, weight in weights(directory).items():
        values = weight.float().numpy()
        heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
        projection = name.split(".")[-2]
        stored = values
        if arch == "llama" and projection in heads:
            stored = permuted(values, heads[projection])
        used = kind if values.ndim == 2 and "embed" not in name else gguf.GGMLQuantizationType.F32
        data = gguf.quantize(stored, used)
        writer.add_tensor(names.get_name(name, (".weight", ".bias")), data, raw_dtype=used)
        back = gguf.dequantize(gguf.quantize(values, used), used)  # blocks lie within a row: rows may be moved after
        held[name] = torch.from_numpy(np.array(back))
    if rope_freqs is not None:
        writer.add_tensor("rope_freqs.weight", rope_freqs.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return held


def add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    """Enter a value of Python's own type."""
    kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    (writer.add_array if isinstance(value, list) else kinds[type(value)])(key, value)


def byte_level(tokens: int) -> tuple[dict[str, Any], Any]:
    """(keys of a byte-level BPE of ``tokens`` tokens with SmolLM2's cut, the tokenizer that they were taken from)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    original = Tokenizer(models.BPE())
    original.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    original.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=tokens, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    original.train_from_iterator(
        ["the cache of the model holds the keys and the values of the tokens 1234"] * 4, trainer
    )
    state = json.loads(original.to_str())["model"]
    names = sorted(state["vocab"], key=state["vocab"].get)
    keys = dict(
        model="gpt2",
        pre="smollm",
        tokens=names,
        token_type=[3 if name in special else 1 for name in names],
        merges=[" ".join(pair) for pair in state["merges"]],
        bos_token_id=1,
        eos_token_id=2,
        unknown_token_id=0,
        add_bos_token=False,
    )
    return keys, original


def sentencepiece(path: Path) -> tuple[dict[str, Any], Any]:
    """(keys of a sentencepiece BPE with byte fallback, the model that they were taken from, made in ``path``)."""
    import sentencepiece as sp

    sp.SentencePieceTrainer.train(
        sentence_iterator=iter(["the cache of the model holds the keys and the values of the tokens"] * 20),
        model_prefix=str(path / "spm"),
        vocab_size=290,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
        hard_vocab_limit=False,
    )
    model = sp.SentencePieceProcessor(model_file=str(path / "spm.model"))
    ids = range(model.vocab_size())
    kinds = [(model.is_unknown, 2), (model.is_control, 3), (model.is_unused, 5), (model.is_byte, 6)]
    keys = dict(
        model="llama",
        tokens=[model.id_to_piece(i) for i in ids],
        scores=[model.get_score(i) for i in ids],
        token_type=[next((number for test, number in kinds if test(i)), 1) for i in ids],
        bos_token_id=1,
        eos_token_id=2,
        unknown_token_id=0,
    )
    return keys, model
