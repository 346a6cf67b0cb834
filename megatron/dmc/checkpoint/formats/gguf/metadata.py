"""Keys and values of a GGUF file, typed, and its tensors as the ``gguf`` library gives them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional, TypeVar

if TYPE_CHECKING:
    from gguf import GGUFReader

T = TypeVar("T", int, float, str, bool)
_TYPES = {str: "a string", bool: "a boolean", int: "an integer", float: "a number", list: "a list"}


class Metadata:
    """The header of one GGUF file. Every getter raises ``ValueError`` for a value of another type, by its key."""

    def __init__(self, path: Path, reader: GGUFReader) -> None:
        self.path = path
        self.tensors = {tensor.name: tensor for tensor in reader.tensors}
        """Name -> the library's tensor, whose ``data`` is a view of the file."""
        self.version = int(reader.fields["GGUF.version"].contents())
        self._fields = reader.fields
        self.architecture = self.text("general.architecture")

    def keys(self) -> list[str]:
        return [key for key in self._fields if not key.startswith("GGUF.")]

    def __contains__(self, key: str) -> bool:
        return key in self._fields

    def get(self, key: str) -> Any:
        """The value of a key as Python's own types. Raises ``ValueError`` for a key that is not there."""
        if key not in self._fields:
            raise ValueError(f"{self.path} has no {key}; the file is incomplete")
        try:
            return self._fields[key].contents()
        except (ValueError, IndexError) as error:  # bytes that are no text
            raise ValueError(f"{self.path}: {key} cannot be read: {error}") from error

    def text(self, key: str, default: Optional[str] = None) -> str:
        return self._typed(key, str, default)

    def flag(self, key: str, default: Optional[bool] = None) -> bool:
        return self._typed(key, bool, default)

    def integer(self, key: str, default: Optional[int] = None) -> int:
        return self._typed(key, int, default)

    def number(self, key: str, default: Optional[float] = None) -> float:
        """A float, or an integer as a float."""
        value = default if default is not None and key not in self else self.get(key)
        return float(value) if self._is_integer(value) else self._checked(key, value, float)

    def items(self, key: str) -> list:
        """A list of any length."""
        value = self.get(key)
        # The library gives a list of one element as any other, and an empty one as no list.
        return [] if value is None else self._checked(key, value, list)

    def _typed(self, key: str, kind: type[T], default: Optional[T]) -> T:
        return default if default is not None and key not in self else self._checked(key, self.get(key), kind)

    def _checked(self, key: str, value: Any, kind: type) -> Any:
        if not isinstance(value, kind) or (kind is int and not self._is_integer(value)):
            raise ValueError(f"{self.path}: {key} is {str(value)[:60]!r}; it must be {_TYPES[kind]}")
        return value

    @staticmethod
    def _is_integer(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool)


def open_file(path: Path) -> Metadata:
    """Read the header of a GGUF file; its weights stay in the file.

    Raises:
        ValueError: it is no GGUF file, is truncated or damaged, or is one part of several.
    """
    from gguf import GGUFReader  # an extra

    if not path.is_file():
        raise ValueError(f"{path} is not a file; name a GGUF file")
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ValueError(f"{path} is not a GGUF file: it does not begin with 'GGUF'")
    try:
        metadata = Metadata(path, GGUFReader(path))
    except (ValueError, IndexError, KeyError, TypeError, OverflowError) as error:  # the library reads on unchecked
        raise ValueError(
            f"{path} is not a complete GGUF file ({' '.join(str(error).split())}); copy it again"
        ) from error
    if metadata.integer("split.count", 1) > 1:
        raise ValueError(f"{path} is one part of several; join them first with llama.cpp's llama-gguf-split --merge")
    return metadata
