"""A small model with a tokenizer and a chat template, and what the tests of the serving side share."""

from __future__ import annotations

import json
from pathlib import Path

from engines import Model

EOS = 60
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('no role ' + m.role) }}{% endif %}{{ m.role[0] + ':' + m.content + ';' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'a:' }}{% endif %}"
)


def add_tokenizer(directory: Path, template: str | None = TEMPLATE) -> None:
    """A byte-level tokenizer of 61 tokens: letters and some signs, the two bytes of an umlaut, space, BOS 59 and EOS 60."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    characters = [*"abcdefghijklmnopqrstuvwxyz", *"ABCDEFGHIJ", *"0123456789", *".,:;!?()-+"]
    plain = [*characters, "Ã", "¼", "Ġ"]  # 0xC3 0xBC is an umlaut
    assert len(plain) == 59
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(plain)} | {"<s>": 59, "</s>": EOS}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 59)])
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config | ({"chat_template": template} if template else {})))


def make_model(directory: Path, case: str = "half") -> Model:
    made = Model(directory, case)
    add_tokenizer(directory)
    return made
