"""All formats, in the order in which a directory is tried. A new one is a module with the functions of ``Format``."""

from pathlib import Path

from megatron.dmc.checkpoint.formats import adapter, gguf, hf, legacy, megatron, torch_dist
from megatron.dmc.checkpoint.formats.base import Format, lines
from megatron.dmc.checkpoint.manifest import resolve_checkpoint

FORMATS: dict[str, Format] = {
    "gguf": gguf,
    "adapter": adapter,
    "hf": hf,
    "torch_dist": torch_dist,
    "legacy": legacy,
    "megatron": megatron,
}


def format_of(path: Path) -> Format:
    """Format of a directory, by the names of its files, or of a file.

    Raises:
        ValueError: no format has it, with what is missing where that can be told.
    """
    for found in FORMATS.values():
        if found.matches(path):
            return found
    if not path.is_dir():
        raise ValueError(f"{path} is neither a directory nor a GGUF file (NAME.gguf)")
    resolve_checkpoint(path)  # raises: says what is missing
    raise ValueError(f"{path} is neither a Hugging Face directory nor a Megatron checkpoint")


def describe(directory: str | Path) -> str:
    """A few lines on what a directory holds, for people who were handed one.

    Raises:
        ValueError: it is of no known format, or is damaged.
    """
    path = Path(directory)
    return lines(format_of(path).describe(path))
