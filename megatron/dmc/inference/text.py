"""Tokenizers and text: loading one, and turning tokens into text as they come, with stop strings."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional

from megatron.dmc.checkpoint import mapping
from megatron.dmc.checkpoint.fields import Fields, read_json
from megatron.dmc.checkpoint.formats import gguf
from megatron.dmc.checkpoint.tokenizer_files import TOKENIZER_FILES, load_pretrained
from megatron.dmc.inference.sampling_params import SamplingParams

CONTEXT = 6  # tokens of the prompt that are decoded along: some tokenizers drop a leading space without them
PENDING = 16  # tokens that may wait for the rest of a character


def load_tokenizer(path: str | Path) -> Optional[Any]:
    """Load transformers' tokenizer of a model directory or GGUF file; None where there are no tokenizer files.

    Raises:
        ValueError: it is no directory, transformers cannot load it, or a field of its files has a wrong type.
    """
    path = gguf.small_files(Path(path))
    if not path.is_dir():
        raise ValueError(f"{path} is not a directory; name a Hugging Face directory with a tokenizer")
    if not any((path / name).is_file() for name in TOKENIZER_FILES):
        return None
    from transformers import AutoConfig

    config = None
    if (path / "config.json").is_file():
        content = read_json(path / "config.json")
        Fields(content, "config.json: ").text("model_type")  # transformers does not say which key is wrong
        # An exported directory's model_type is not one that transformers knows: it would ask whether to run the
        # modelling file.
        config = AutoConfig.for_model(mapping.base_config(content)["model_type"]) if "dmc" in content else None
    return load_pretrained(path, config)


def decode(tokenizer: Any, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
    """Text of tokens, as they stand.

    Without ``clean_up_tokenization_spaces``: Llama 3's tokenizer_config.json sets it, and transformers 4 (4.57.6) then
    takes spaces out before punctuation and contractions, so that "a ." becomes "a.". transformers 5 ignores it for BPE.
    """
    return tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False)


class Detokenizer:
    """Text of one completion, token by token.

    ``text`` never ends in half a character and never holds a stop string. :meth:`take` gives what has not been given
    yet, less what may still become a stop string.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int], params: SamplingParams = SamplingParams()) -> None:
        self.tokenizer, self.skip, self.stop = tokenizer, params.skip_special_tokens, tuple(params.stop)
        self.include_stop = params.include_stop_str_in_output
        self.text = ""
        self.stopped: Optional[str] = None
        """Stop string that ended the completion."""
        self._ids = list(prompt[-CONTEXT:])
        self._prefix, self._read = 0, len(self._ids)
        self._given = 0
        self._held = max((len(s) for s in self.stop), default=1) - 1

    def push(self, token: int, check_stop: bool = True) -> None:
        """Append one token; sets ``stopped`` when a stop string is complete."""
        self._ids.append(token)
        before = self._decode(self._prefix, self._read)
        now = self._decode(self._prefix, len(self._ids))
        waiting = now.endswith("\ufffd") and len(self._ids) - self._read < PENDING
        if waiting or len(now) <= len(before):
            return
        self._prefix, self._read = self._read, len(self._ids)
        self._append(now[len(before) :], check_stop)

    def flush(self) -> None:
        """End the text: what is left of half a character is shown as U+FFFD."""
        if self.stopped is None:
            before, now = self._decode(self._prefix, self._read), self._decode(self._prefix, len(self._ids))
            self._append(now[len(before) :], check_stop=False)
            self._prefix, self._read = self._read, len(self._ids)
        self._held = 0

    def take(self) -> str:
        """Return the text that came since the last call."""
        end = max(self._given, len(self.text) - self._held)
        start, self._given = self._given, end
        return self.text[start:end]

    def _decode(self, start: int, stop: int) -> str:
        return decode(self.tokenizer, self._ids[start:stop], self.skip) if start < stop else ""

    def _append(self, more: str, check_stop: bool) -> None:
        old, self.text = len(self.text), self.text + more
        if not check_stop or not self.stop:
            return
        found = []
        for text in self.stop:
            at = self.text.find(text, max(0, old - len(text) + 1))
            if at >= 0:
                found.append((at, text))
        if found:
            at, self.stopped = min(found)
            self.text = self.text[: at + (len(self.stopped) if self.include_stop else 0)]
            self._held = 0
