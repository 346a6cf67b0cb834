"""Tiny random models whose tokenizers can write JSON, for the tests of structured outputs and tools."""

from __future__ import annotations

import json
from pathlib import Path

from megatron.dmc.inference import LLM

SPECIAL = ["<s>", "</s>", "<|im_end|>", "<tool_call>", "</tool_call>", "[TOOL_CALLS]", "<|python_tag|>"]
PIECES = ['{"', '":', '", "', '"}', "true", "false", "null", "12", "name", "arguments", "the", " the", "  ", "ab"]


def _config(vocabulary: int, bias: float) -> dict:
    return {
        "architectures": ["DMCForCausalLM"],
        "model_type": "dmc",
        "dmc": {
            "format_version": 1,
            "base_model_type": "llama",
            "decision_bias": bias,
            "window": 12,
            "importance_epsilon": 2.0**-7,
            "stage": "finetune",
            "target_cr": 4.0,
            "measured_cr": 4.0,
        },
        "dtype": "float32",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
        "vocab_size": vocabulary,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "eos_token_id": [1, 2],
    }


def byte_level_tokenizer() -> object:
    """Byte-level BPE like those of GPT-2, Llama 3 and Qwen: special tokens, 256 bytes, some longer pieces."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    names = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    merges: list[tuple[str, str]] = []
    for piece in PIECES:
        text = piece.replace(" ", "Ġ")
        for end in range(2, len(text) + 1):
            if text[:end] not in names:
                merges.append((text[: end - 1], text[end - 1]))
                names.append(text[:end])
    tokenizer = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


def sentencepiece_tokenizer() -> object:
    """Llama 2's kind: pieces with U+2581 for a space, and a token for every byte that no piece has."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    names = [*SPECIAL, "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    names += [*'{}[]":,.-+0123456789', *"abcdefghijklmnopqrstuvwxyz", "▁"]
    merges: list[tuple[str, str]] = []
    for piece in PIECES:
        text = piece.replace(" ", "▁")
        for end in range(2, len(text) + 1):
            if text[:end] not in names:
                merges.append((text[: end - 1], text[end - 1]))
                names.append(text[:end])
    vocabulary = {name: i for i, name in enumerate(names)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


TOKENIZERS = {"byte-level": byte_level_tokenizer, "sentencepiece": sentencepiece_tokenizer}


def make_model(directory: Path, kind: str = "byte-level", template: str | None = None, bias: float = 0.0) -> str:
    """A directory without weights (``load_format="dummy"``) with one of ``TOKENIZERS``; ids 1 and 2 end a text.

    The model has some more tokens than its tokenizer, as padded models have: with the byte-level one a multiple of 32,
    as nearly all models have, with the other not.
    """
    directory.mkdir(parents=True)
    tokenizer = TOKENIZERS[kind]()
    tokenizer.save(str(directory / "tokenizer.json"))
    told = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    told |= {"chat_template": template} if template else {}
    (directory / "tokenizer_config.json").write_text(json.dumps(told))
    size = tokenizer.get_vocab_size()
    padded = -(-size // 32) * 32 + (0 if kind == "byte-level" else 13)
    (directory / "config.json").write_text(json.dumps(_config(padded, bias)))
    return str(directory)


def make_llm(directory: Path, kind: str = "byte-level", **settings: object) -> LLM:
    return LLM(make_model(directory, kind), load_format="dummy", **settings)


def closing_bias(llm: LLM) -> dict[int, float]:
    """Biases by which a random model's JSON ends soon: for what closes a value, against blanks."""
    tokenizer, bias = llm.engine.tokenizer, {}
    for token, text in ((i, tokenizer.decode([i])) for i in range(len(tokenizer))):
        if text and set(text) <= set('"]},:') and text != ",":
            bias[token] = 4.0
        elif text.isspace():
            bias[token] = -4.0
    return {**bias, 1: 6.0, 2: 6.0}
