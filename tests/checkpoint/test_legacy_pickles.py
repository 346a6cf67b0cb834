"""Code in Megatron's older files: refused, or set aside; never run, and nothing of it imported."""

from __future__ import annotations

import builtins
import os
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import legacy_format as megatron
import pytest
import torch
from test_legacy import MODEL, Call, assert_same, imported, refused, variant

from megatron.dmc.checkpoint.formats import legacy
from megatron.dmc.checkpoint.formats.legacy.rank_file import megatron_objects
from megatron.dmc.checkpoint.pickled import load_lazily


@pytest.mark.parametrize(
    "function, named",
    [
        (os.system, "posix.system"),
        (builtins.eval, "builtins.eval"),
        (builtins.exec, "builtins.exec"),
        (builtins.__import__, "builtins.__import__"),
        (torch.load, "torch.serialization.load"),
        (pickle.loads, "pickle.loads"),
    ],
)
@pytest.mark.parametrize("place", ["args", "model", "optimizer", "rng_state"])
def test_code_is_refused(function: Callable, named: str, place: str, tmp_path: Path) -> None:
    _, full = variant()
    marker, call = tmp_path / "was_run", Call(function, f"touch {tmp_path / 'was_run'}")

    def plant(content: dict, t: int, p: int) -> None:
        if (t, p) == (1, 0):
            if place == "args":
                content["args"].hidden_size = call
            else:
                content[place] = call

    source = megatron.write(tmp_path / "old", full, MODEL, tp=2, vocab_size=90, change=plant)
    refused(tmp_path / "old", source / "mp_rank_01" / legacy.FILE, "is refused", "would run code", named)
    assert not marker.exists()


def test_code_disguised_as_megatron(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module of that name is there and would run: it is not even imported."""
    _, full = variant()
    marker, package = tmp_path / "was_run", tmp_path / "path" / "megatron" / "trap"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(f"open({str(marker)!r}, 'w')\ndef run(*args): pass\n")
    monkeypatch.syspath_prepend(str(tmp_path / "path"))

    def run(*args: Any) -> None:
        marker.touch()

    def plant(content: dict, t: int, p: int) -> None:
        content["args"].trap = Call(run, "x")
        content["model"]["decoder.layers.0.trap._extra_state"] = Call(run, "x")

    with megatron.temporary_module("megatron.trap", run):
        run.__qualname__ = "run"
        megatron.write(tmp_path / "old", full, MODEL, vocab_size=90, change=plant)
    imported(tmp_path / "old", tmp_path / "new")
    assert_same(tmp_path / "new", full, MODEL)
    assert not marker.exists() and "megatron.trap" not in sys.modules and megatron.ENUM_MODULE not in sys.modules
    content = load_lazily(tmp_path / "old" / "iter_0000100" / "mp_rank_00" / legacy.FILE, allow=megatron_objects)
    assert repr(content["args"].state["trap"]) == "megatron.trap.run('x')"
    assert repr(content["args"].state["model_type"]) == f"{megatron.ENUM_MODULE}.ModelType(1)"


def test_a_plain_pickle_is_refused(tmp_path: Path) -> None:
    _, full = variant()
    source = megatron.write(tmp_path / "old", full, MODEL, vocab_size=90, optimizer=False)
    path = source / "mp_rank_00" / legacy.FILE
    path.write_bytes(pickle.dumps(Call(os.system, f"touch {tmp_path / 'was_run'}"), protocol=2))
    refused(tmp_path / "old", path, "zip format")
    assert not (tmp_path / "was_run").exists()


@pytest.mark.parametrize(
    "name",
    [
        "os.system",
        "posix.system",
        "megatronx.run",
        "subprocess.Popen",
        "builtins.eval",
        "torch.load",
        "operator.attrgetter",
        "numpy.load",
        "numpy.core.multiarray.fromfile",
    ],
)
def test_what_may_not_stand_in_a_file(name: str) -> None:
    assert not megatron_objects(name)


def test_numpy_1_random_state() -> None:
    assert megatron_objects("numpy.core.multiarray._reconstruct") and megatron_objects(
        "numpy._core.multiarray._reconstruct"
    )
