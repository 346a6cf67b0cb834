"""What the tokenizer_config.json beside a sentencepiece model says about it. No torch."""

import json
from pathlib import Path


def sentencepiece_adds_bos(path: Path) -> bool:
    """True unless the tokenizer_config.json beside a sentencepiece model says ``"add_bos_token": false``.

    The model itself cannot say it. Without that file, the Llama family's convention holds: BOS before every text, as in
    Meta's reference code, transformers' LlamaTokenizer and Megatron-LM's Llama2Tokenizer.

    Raises:
        ValueError: the file is no JSON object, or add_bos_token in it is neither true nor false.
    """
    config = path.with_name("tokenizer_config.json")
    if not config.is_file():
        return True
    try:
        content = json.loads(config.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{config} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{config} must hold a JSON object, not {type(content).__name__}")
    adds = content.get("add_bos_token")
    if adds is not None and not isinstance(adds, bool):
        raise ValueError(f"{config}: add_bos_token is {adds!r}; it must be true or false")
    return adds is not False
