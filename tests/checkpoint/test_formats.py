"""The interface of formats: a module with three functions and a line in the registry are all that a new one takes."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
from helpers import families

from megatron.dmc.checkpoint import convert
from megatron.dmc.checkpoint.formats import hf, registry, torch_dist
from megatron.dmc.checkpoint.formats.base import Row, Source
from megatron.dmc.checkpoint.verify import verify

NEW = Path("weights.new")


@pytest.fixture
def new_format(monkeypatch: pytest.MonkeyPatch) -> None:
    """A format whose directories hold a Hugging Face model in a folder of another name."""
    module = ModuleType("new")

    def matches(path: Path) -> bool:
        return (path / NEW).is_dir()

    def open_model(path: Path, given: object = None) -> Source:
        return hf.open_model(path / NEW)

    def describe(path: Path) -> list[Row]:
        return [("format", "the new one"), ("nothing", "")]

    module.matches, module.open_model, module.describe = matches, open_model, describe
    monkeypatch.setitem(registry.FORMATS, "new", module)


def test_a_new_format_is_described_and_imported(new_format: None, tmp_path: Path) -> None:
    families.make("qwen2", tmp_path / "model" / NEW)
    assert registry.describe(tmp_path / "model") == "format  the new one"
    source = registry.format_of(tmp_path / "model").open_model(tmp_path / "model")
    said: list[str] = []
    progress = convert.Progress(say=said.append)
    assert convert.import_model(source, tmp_path / "checkpoint", progress=progress) == tmp_path / "checkpoint"
    assert registry.format_of(tmp_path / "checkpoint") is torch_dist
    assert verify(tmp_path / "model" / NEW, tmp_path / "checkpoint", progress).startswith("identical: ")


def test_a_directory_of_no_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no complete checkpoint"):
        registry.format_of(tmp_path)
