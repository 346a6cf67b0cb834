"""Typed reading of JSON files that others wrote: type and range of every field are checked here. No torch.

A field that is null counts as left out, as transformers takes it.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional, Self

from megatron.dmc.config.checks import one_line, shown

JSON_BYTES = 64 << 20
"""Size of the largest JSON file that is read. An index of 100,000 tensors has 10 MB."""
INT32 = 2**31 - 1
LARGEST = 1e300
"""Largest number that counts as finite."""


def read_json(path: Path) -> dict:
    """A JSON object. Raises ``ValueError`` with the file's name when it is none, or when the file is too large."""
    try:
        size = path.stat().st_size
        if size > JSON_BYTES:
            raise ValueError(f"{path} has {size:,} bytes; at most {JSON_BYTES:,} are read")
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not JSON: byte {error.start} is not UTF-8") from error
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {one_line(error)}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, not {shown(content)}")
    return content


@dataclass(frozen=True)
class Fields:
    """A JSON object whose fields are read by type. Every method raises ``ValueError`` naming file, key and value."""

    content: Mapping[str, Any]
    where: str
    """Prefix of messages, such as ``"config.json: "`` or ``"config.json: dmc."``."""

    def get(self, key: str, default: Any = None) -> Any:
        """The value as it is, or ``default`` when it is left out."""
        value = self.content.get(key)
        return default if value is None else value

    def integer(self, key: str, default: Any = None, least: int = 0, most: int = INT32) -> Any:
        """Integer in ``least`` ... ``most``. One that is written as 16.0 is taken."""
        value = self.get(key, default)
        if isinstance(value, float) and math.isfinite(value) and value == int(value):
            value = int(value)
        if value is not None and (type(value) is not int or not least <= value <= most):
            self.refuse(key, f"an integer from {least} to {most}")
        return value

    def number(
        self, key: str, default: Any = None, least: float = -LARGEST, most: float = LARGEST, above: float = -math.inf
    ) -> Any:
        """Number in ``least`` ... ``most`` and more than ``above``, as float."""
        value = self.get(key, default)
        if value is not None and (type(value) not in (int, float) or not (least <= value <= most and value > above)):
            bound = f" above {above:g}" if above > -math.inf else f" of at least {least:g}" if least > -LARGEST else ""
            self.refuse(key, f"a number{bound}" + (f" and at most {most:g}" if most < LARGEST else ""))
        return None if value is None else float(value)

    def flag(self, key: str, default: Optional[bool] = None) -> Any:
        """True or False."""
        value = self.get(key, default)
        if value is not None and type(value) is not bool:
            self.refuse(key, "true or false")
        return value

    def text(self, key: str, default: Optional[str] = None) -> Any:
        """String."""
        value = self.get(key, default)
        if value is not None and not isinstance(value, str):
            self.refuse(key, "a string")
        return value

    def needed_text(self, key: str) -> str:
        """String that must be there."""
        value = self.text(key)
        if value is None:
            self.refuse(key, "a string")
        return value

    def texts(self, key: str) -> Optional[list[str]]:
        """List of strings."""
        value = self.get(key)
        if value is not None and not (isinstance(value, list) and all(isinstance(item, str) for item in value)):
            self.refuse(key, "a list of strings")
        return value

    def object(self, key: str) -> Optional[Self]:
        """Object, whose fields are read in turn."""
        value = self.get(key)
        if value is not None and not isinstance(value, dict):
            self.refuse(key, "an object")
        return None if value is None else Fields(value, f"{self.where}{key}.")

    def token_ids(self, key: str, vocab_size: int) -> list[int]:
        """Token ids, from one id or a list of them; -1 stands for none, as in the first Llama models."""
        value = self.get(key, [])
        ids = value if isinstance(value, list) else [value]
        if any(type(token) is not int or not -1 <= token < vocab_size for token in ids):
            self.refuse(key, f"a token id below {vocab_size}, the vocabulary's size, or a list of such ids")
        return [token for token in ids if token >= 0]

    def only(self, known: Sequence[str]) -> None:
        """Refuse keys that are not in ``known``, unless they are null."""
        odd = sorted(key for key, value in self.content.items() if key not in known and value is not None)
        if odd:
            self.refuse(odd[0], f"left out; known here: {', '.join(sorted(known))}")

    def refuse(self, key: str, wanted: str) -> None:
        """Raise ``ValueError`` for the value of ``key``."""
        raise ValueError(f"{self.where}{shown_key(key)} is {shown(self.content.get(key))}; it must be {wanted}")


def shown_key(key: str) -> str:
    """A key as messages show it: on one line, and cut after 60 characters."""
    return shown(key)[1:-1]
