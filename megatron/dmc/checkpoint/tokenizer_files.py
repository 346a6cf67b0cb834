"""Tokenizer files of a model directory: their names, their types, and transformers' tokenizer of them. No torch."""

from pathlib import Path
from typing import Any, Optional

from megatron.dmc.checkpoint.fields import LARGEST, Fields, read_json
from megatron.dmc.config.checks import one_line

TOKENIZER_FILES = tuple(
    "tokenizer.json tokenizer.model tokenizer_config.json special_tokens_map.json added_tokens.json vocab.json "
    "merges.txt chat_template.jinja chat_template.json tekken.json".split()
)
TEMPLATES = "additional_chat_templates"
"""Directory of a tokenizer's chat templates beside the first (transformers 4.53 and later)."""
_FLAGS = (
    "add_bos_token add_eos_token add_prefix_space clean_up_tokenization_spaces legacy split_special_tokens "
    "use_default_system_prompt from_slow".split()
)
_TEXTS = "tokenizer_class padding_side truncation_side name_or_path".split()
_TOKENS = [f"{name}_token" for name in "bos eos unk pad sep cls mask".split()]


def tokenizer_files(path: Path) -> dict[str, Path]:
    """Name -> path of the tokenizer files in a directory, its chat templates included."""
    names = [*TOKENIZER_FILES, *(f"{TEMPLATES}/{file.name}" for file in sorted((path / TEMPLATES).glob("*.jinja")))]
    return {name: path / name for name in names if (path / name).is_file()}


def sentencepiece_adds_bos(path: Path) -> bool:
    """True unless the tokenizer_config.json beside a sentencepiece model says ``"add_bos_token": false``.

    The model itself cannot say it. Without that file, the Llama family's convention holds: BOS before every text, as in
    Meta's reference code, transformers' LlamaTokenizer and Megatron-LM's Llama2Tokenizer.

    Raises:
        ValueError: the file is no JSON object, or add_bos_token in it is neither true nor false.
    """
    config = path.with_name("tokenizer_config.json")
    return not config.is_file() or Fields(read_json(config), f"{config}: ").flag("add_bos_token") is not False


def load_sentencepiece(path: Path) -> Any:
    """sentencepiece's processor of a model file. Raises ``ValueError`` when the file is none."""
    from sentencepiece import SentencePieceProcessor

    try:
        return SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError) as error:
        raise ValueError(f"tokenizer {path} is not a sentencepiece model: {error}") from error


def load_pretrained(path: Path, config: Optional[Any] = None) -> Any:
    """transformers' tokenizer of a directory, from local files and without code of its own.

    Args:
        config: transformers' configuration of the model; None: that of ``config.json``.

    Raises:
        ValueError: a field of ``tokenizer_config.json`` or ``special_tokens_map.json`` has a wrong type, which
            transformers may take in silence; or transformers cannot load it.
    """
    from transformers import AutoTokenizer

    _check_types(path)
    try:
        return AutoTokenizer.from_pretrained(str(path), config=config, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises many types
        raise ValueError(f"the tokenizer in {path} cannot be loaded: {one_line(error)}") from error


def _check_types(path: Path) -> None:
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (path / name).is_file():
            fields = Fields(read_json(path / name), f"{path / name}: ")
            for key in _TOKENS:
                _check_token(fields, key)
            for key in ("additional_special_tokens", "extra_special_tokens"):
                _check_tokens(fields, key)
            if name == "tokenizer_config.json":
                _check_settings(fields)


def _check_settings(fields: Fields) -> None:
    for key in _FLAGS:
        fields.flag(key)
    for key in _TEXTS:
        fields.text(key)
    fields.number("model_max_length", least=0, most=LARGEST)  # 1e30 stands for no limit
    if isinstance(templates := fields.get("chat_template"), list):
        named = [isinstance(entry, dict) and {"name", "template"} <= entry.keys() for entry in templates]
        if not all(named):
            fields.refuse("chat_template", "a template, or a list of objects with name and template")
    else:
        fields.text("chat_template")
    added = fields.object("added_tokens_decoder")
    for key in added.content if added else ():
        if not key.isdecimal() or not isinstance(added.content[key], dict):
            added.refuse(key, "an object that describes a token, under the token's id")
        added.object(key).needed_text("content")


def _check_token(fields: Fields, key: str) -> None:
    """A special token is a string, or an object with its ``content``."""
    if isinstance(fields.get(key), dict):
        fields.object(key).needed_text("content")
    else:
        fields.text(key)


def _check_tokens(fields: Fields, key: str) -> None:
    """Special tokens are in a list, or in an object under names."""
    tokens = fields.get(key, [])
    if not isinstance(tokens, (list, dict)):
        fields.refuse(key, "a list of tokens")
    named = tokens if isinstance(tokens, dict) else {str(n): token for n, token in enumerate(tokens)}
    for name in named:
        _check_token(Fields(named, f"{fields.where}{key}."), name)
