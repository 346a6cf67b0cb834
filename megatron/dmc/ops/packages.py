"""Packages that make training on GPUs faster and may be missing, or be another project of the same name."""

import functools
import importlib
import importlib.util
from typing import NamedTuple, Optional


class Package(NamedTuple):
    """A package by its import name, and what of it is used."""

    module: str
    attributes: tuple[str, ...]
    meant: str
    """The right project, for those who have another one."""
    minimum: tuple[int, int] = (0, 0)
    """Version, when older ones cannot be used."""


PACKAGES = {
    "flash_attn": Package(
        "flash_attn.flash_attn_interface",
        ("_flash_attn_forward", "_flash_attn_backward"),
        "flash-attn 2.7 or later is meant; flash-attn-4 is another package that shares its folder",
        (2, 7),
    ),
    "transformer_engine": Package(
        "transformer_engine.pytorch",
        ("LayerNormLinear",),
        "transformer-engine[pytorch] is meant, built against this torch",
    ),
    "apex": Package(
        "apex.optimizers", ("FusedAdam",), "NVIDIA's is meant, built from its sources; PyPI's apex is another project"
    ),
}


@functools.cache
def trouble_with(name: str) -> Optional[str]:
    """Why a package of PACKAGES is not used: None when it is, "" when it is not installed, a sentence otherwise."""
    package = PACKAGES[name]
    if importlib.util.find_spec(name) is None:
        return ""
    try:
        found = importlib.import_module(package.module)
        for attribute in package.attributes:
            getattr(found, attribute)
        version = importlib.import_module(name).__version__ if any(package.minimum) else "0.0"
        old = tuple(int(part) for part in version.split(".")[:2]) < package.minimum
    except Exception as error:  # another project's modules, or a library built against another torch, raise anything
        why = f"{type(error).__name__}: {' '.join(str(error).split())}"
    else:
        if not old:
            return None
        why = f"its version is {version}"
    return f"{name} is installed and cannot be used ({why}): {package.meant}; see docs/install.md"


def troubles() -> list[str]:
    """Sentences on the packages that are installed and cannot be used."""
    return [text for text in map(trouble_with, PACKAGES) if text]
