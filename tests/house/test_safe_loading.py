"""No source of this repository reads a file in a way that runs what is in it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
SOURCES = [path for folder in ("megatron", "tools", "benchmarks", "examples") for path in (ROOT / folder).rglob("*.py")]
PICKLES = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
READERS = {"load", "loads", "Unpickler", "_Unpickler", "open"}
TORCH_DISTRIBUTED = {"dist_checkpointing", "dcp", "distributed_checkpoint"}
MAY = {
    ("megatron/dmc/checkpoint/formats/torch_dist/metadata.py", "pickle.Unpickler"): "the restricted reader itself",
    ("megatron/dmc/training/mcore_compat.py", "pickle.load"): "an unnamed file that this process has made",
    ("megatron/dmc/training/checkpointing.py", "dist_checkpointing.load"): "within weights_only() and use_metadata()",
}
"""(file, call) -> why it is safe there."""


def constants(call: ast.Call) -> dict[str, object]:
    """Keywords of a call, with their values where these are constants."""
    return {k.arg: k.value.value if isinstance(k.value, ast.Constant) else ... for k in call.keywords if k.arg}


def unsafe_reads(source: str) -> Iterator[tuple[int, str]]:
    """Line and name of every call or base class that may run code from a file."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ClassDef):
            yield from ((node.lineno, name) for name in map(ast.unparse, node.bases) if is_pickle(name))
        if not isinstance(node, ast.Call):
            continue
        name, said = ast.unparse(node.func), constants(node)
        owner, _, method = name.rpartition(".")
        if (
            is_pickle(name)
            or (name == "torch.load" and said.get("weights_only") is not True)
            or (owner in ("numpy", "np") and method == "load" and said.get("allow_pickle", False) is not False)
            or (owner == "yaml" and method in ("load", "load_all", "unsafe_load", "full_load"))
            or (owner.rpartition(".")[2] in TORCH_DISTRIBUTED and method.startswith("load"))
            or said.get("trust_remote_code", False) is not False
            or (method == "from_pretrained" and "Auto" in owner and "trust_remote_code" not in said)
            or name in ("eval", "exec", "builtins.eval", "builtins.exec", "runpy.run_path")
        ):
            yield node.lineno, name


def is_pickle(name: str) -> bool:
    owner, _, method = name.rpartition(".")
    return owner in PICKLES and method in READERS


def imports_of_readers(source: str) -> Iterator[tuple[int, str]]:
    """``from pickle import load`` and the like, which would hide the call's name."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            names = {alias.name for alias in node.names}
            hidden = names & READERS if node.module in PICKLES | {"torch", "numpy", "yaml"} else set()
            yield from ((node.lineno, f"from {node.module} import {name}") for name in hidden)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.asname and alias.asname != "np" and alias.name in PICKLES | {"torch", "numpy", "yaml"}:
                    yield node.lineno, f"import {alias.name} as {alias.asname}"


def test_no_source_reads_files_in_an_unsafe_way() -> None:
    found, used = [], set()
    for path in SOURCES:
        source, name = path.read_text(encoding="utf-8"), path.relative_to(ROOT).as_posix()
        for line, call in (*unsafe_reads(source), *imports_of_readers(source)):
            used.add((name, call))
            if (name, call) not in MAY:
                found.append(f"{name}:{line}: {call}")
    assert not found, "\n".join(found)
    assert used == set(MAY), "an exception that nothing needs any more"


@pytest.mark.parametrize(
    "line",
    [
        "pickle.load(file)",
        "pickle.loads(text)",
        "class Reader(pickle.Unpickler): pass",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.load(path, weights_only=trusted)",
        "numpy.load(path, allow_pickle=True)",
        "np.load(path, allow_pickle=flag)",
        "yaml.load(text, Loader=yaml.Loader)",
        "joblib.load(path)",
        "shelve.open(path)",
        "eval(text)",
        "dist_checkpointing.load(state, path)",
        "torch.distributed.checkpoint.dcp.load(state)",
        "AutoModel.from_pretrained(path, trust_remote_code=is_dmc)",
        "AutoTokenizer.from_pretrained(path)",
        "from pickle import load",
        "from torch import load",
        "import pickle as p",
    ],
)
def test_an_unsafe_read_is_caught(line: str) -> None:
    assert [*unsafe_reads(line), *imports_of_readers(line)]


@pytest.mark.parametrize(
    "line",
    [
        "torch.load(path, weights_only=True)",
        "numpy.load(path)",
        "np.load(path, allow_pickle=False)",
        "yaml.safe_load(text)",
        "json.load(file)",
        "pickle.dumps(value)",
        "model.eval()",
        "AutoTokenizer.from_pretrained(path, trust_remote_code=False)",
    ],
)
def test_a_safe_read_is_not_caught(line: str) -> None:
    assert not [*unsafe_reads(line), *imports_of_readers(line)]
