"""Packages for GPUs that are missing, of an older version, or another project of the same name."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron.dmc.ops import attention, packages


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, str]], None]:
    """``install({"apex/__init__.py": source})`` puts modules before all others for one test."""
    before = dict(sys.modules)

    def write(files: dict[str, str]) -> None:
        for name, source in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(source)
        for name in [name for name in sys.modules if name.split(".")[0] in packages.PACKAGES]:
            del sys.modules[name]
        packages.trouble_with.cache_clear()

    monkeypatch.syspath_prepend(tmp_path)
    yield write
    for name in [name for name in sys.modules if name.split(".")[0] in packages.PACKAGES]:
        del sys.modules[name]
    sys.modules.update(before)
    packages.trouble_with.cache_clear()


INTERFACE = "def _flash_attn_forward(): ...\ndef _flash_attn_backward(): ...\n"
WRONG = {
    # flash-attn-4 4.0 alone: a namespace without __init__.py.
    "flash-attn-4": ("flash_attn", {"flash_attn/cute/__init__.py": ""}, "ModuleNotFoundError.*flash-attn-4"),
    "flash-attn 2.6": (
        "flash_attn",
        {"flash_attn/__init__.py": "__version__ = '2.6.3'", "flash_attn/flash_attn_interface.py": INTERFACE},
        "its version is 2.6.3.*2.7 or later",
    ),
    "flash-attn without a version": (
        "flash_attn",
        {"flash_attn/__init__.py": "", "flash_attn/flash_attn_interface.py": INTERFACE},
        "AttributeError.*__version__",
    ),
    # PyPI's apex 0.9 is a toolkit for web sites.
    "apex of PyPI": ("apex", {"apex/__init__.py": "import a_web_framework"}, "a_web_framework.*NVIDIA's is meant"),
    "apex without its optimizers": ("apex", {"apex/__init__.py": ""}, "apex.optimizers.*another project"),
    "Transformer Engine without its extension": (
        "transformer_engine",
        {
            "transformer_engine/__init__.py": "",
            "transformer_engine/pytorch/__init__.py": "raise RuntimeError('undefined symbol')",
        },
        "RuntimeError: undefined symbol.*against this torch",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_package_is_told_by_name(case: str, install, monkeypatch: pytest.MonkeyPatch) -> None:
    name, files, says = WRONG[case]
    install(files)
    with pytest.raises(AssertionError, match=f"{name} is installed and cannot be used .*{says}.*docs/install.md"):
        raise AssertionError(packages.trouble_with(name))
    assert packages.trouble_with(name) in packages.troubles()
    if name == "flash_attn":  # bf16 training goes on with torch's kernel
        assert attention.attention_backend.__wrapped__("cuda", torch.bfloat16).name == "torch flash"


def test_right_packages_are_used(install) -> None:
    install(
        {
            "flash_attn/__init__.py": "__version__ = '2.8.3.post2'",
            "flash_attn/flash_attn_interface.py": INTERFACE,
            "apex/__init__.py": "",
            "apex/optimizers.py": "class FusedAdam: ...",
            "transformer_engine/__init__.py": "",
            "transformer_engine/pytorch/__init__.py": "class LayerNormLinear: ...",
        }
    )
    assert packages.troubles() == []
    assert attention.attention_backend.__wrapped__("cuda", torch.bfloat16).name == "flash-attn"
    assert [packages.trouble_with(name) for name in packages.PACKAGES] == [None] * 3


def test_missing_packages_are_no_trouble(install, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages.importlib.util, "find_spec", lambda name: None)
    install({})
    assert packages.troubles() == [] and packages.trouble_with("apex") == ""
