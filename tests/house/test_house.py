"""The rules of the house: the shared namespace, the direction of dependencies, and what a file may not contain."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from helpers.processes import run_command
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent.parent
PACKAGE = ROOT / "megatron" / "dmc"
UNTRACKED = {".git", ".venv", "build", "dist", "runs", "__pycache__", ".pytest_cache", ".ruff_cache", ".hypothesis"}


def repository_files() -> list[Path]:
    """Files that git tracks, or would with the next ``git add -A``; where git is not, all but the known outputs."""
    command = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        walk = (path for path in ROOT.rglob("*") if not UNTRACKED.intersection(path.relative_to(ROOT).parts))
        return sorted(path for path in walk if path.is_file())
    return sorted(path for path in (ROOT / name for name in listed.split("\0") if name) if path.is_file())


def package_sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


# ---------------------------------------------------------------------------------------------- the shared namespace


def test_namespace_has_no_init() -> None:
    """``megatron/__init__.py`` would hide megatron-core's half of the namespace."""
    assert not (ROOT / "megatron" / "__init__.py").exists()
    assert "megatron/__init__.py" not in {relative(path) for path in repository_files()}


@pytest.mark.parametrize("place", ["repository", "elsewhere"])
def test_both_halves_of_the_namespace_import(place: str, tmp_path: Path) -> None:
    code = (
        "import megatron.core, megatron.dmc, megatron\n"
        "assert getattr(megatron, '__file__', None) is None, megatron.__file__\n"
        "print(megatron.dmc.__file__, megatron.core.__file__, megatron.dmc.__version__, sep='\\n')"
    )
    result = run_command([sys.executable, "-c", code], cwd=ROOT if place == "repository" else tmp_path)
    dmc, core, version = result.stdout.split()[-3:]
    assert Path(dmc).resolve() == PACKAGE / "__init__.py"
    assert not Path(core).resolve().is_relative_to(ROOT / "megatron")
    assert re.fullmatch(r"\d+\.\d+\.\d+", version)


# ------------------------------------------------------------------------------------------ the direction of imports


@dataclass(frozen=True)
class Rule:
    """Imports that an area may have: itself and ``areas`` of this package, no distribution in ``never``, and where
    ``only`` is given, no distribution but these (the standard library is always allowed).
    """

    areas: tuple[str, ...] = ()
    never: tuple[str, ...] = ()
    only: tuple[str, ...] = ()


MEGATRON = ("megatron.core", "megatron.training")
RULES = {
    "": Rule(never=("*",)),  # megatron/dmc/__init__.py
    "config": Rule(never=("torch", *MEGATRON)),
    "environment": Rule(never=MEGATRON),
    "flags": Rule(never=("torch", *MEGATRON)),
    "schedule": Rule(("config",), ("torch", *MEGATRON)),
    "planning": Rule(("config", "schedule"), ("torch", *MEGATRON)),
    "ops": Rule(("config", "schedule"), MEGATRON),
    "kernels": Rule(("config", "schedule", "ops"), MEGATRON),
    "checkpoint": Rule(("config", "environment"), MEGATRON),
    # Copied into exported directories, where this package is not.
    "checkpoint.remote_code": Rule(never=MEGATRON, only=("torch", "transformers")),
    "model": Rule(("config", "schedule", "ops")),
    "training": Rule(("config", "environment", "flags", "schedule", "ops", "kernels", "checkpoint", "model")),
    "inference": Rule(("config", "environment", "flags", "schedule", "ops", "kernels", "checkpoint"), MEGATRON),
    "serving": Rule(("config", "environment", "flags", "checkpoint", "inference"), MEGATRON),
}
RULES["evaluation"] = Rule(tuple(area for area in RULES if area))
RULES["cli"] = Rule(tuple(area for area in RULES if area))
# Imported by vLLM alone: no area above may import it.
RULES["vllm"] = Rule(("config", "kernels", "checkpoint", "inference"), MEGATRON)
# Commands that work where Megatron is not installed.
for command in ("options", "generate", "serve", "batch", "bench", "build"):
    RULES[f"cli.{command}"] = Rule(("cli.options", "flags", "kernels", "inference", "serving"), MEGATRON)


def within(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def is_entry(node: ast.stmt) -> bool:
    """``if __name__ == "__main__":``, a program on top of the module, which no import runs."""
    return isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"


def imported_modules(source: str, module: str, is_package: bool) -> Iterator[tuple[int, str]]:
    """Line and absolute dotted name of everything that ``source`` imports, wherever in the file, by whatever form; what
    a file imports only when it is run as a program is left out.

    ``from a import b`` yields ``a.b``: whether b is a module or a name in one, its prefix tells the area.
    """
    module_code = [statement for statement in ast.parse(source).body if not is_entry(statement)]
    for node in (node for statement in module_code for node in ast.walk(statement)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".")
                keep = len(parts) - node.level + (1 if is_package else 0)
                base = ".".join([*parts[:keep], *filter(None, [base])])
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield node.lineno, node.args[0].value


def area_of(inner: str) -> str | None:
    """The most specific area of a dotted name below ``megatron.dmc``; None when no area holds it."""
    return max((area for area in RULES if area and within(inner, area)), key=len, default=None)


def violations(source: str, module: str, is_package: bool = False) -> list[str]:
    """Imports of ``source``, as ``megatron.dmc.<module>`` (the package itself: ""), that break the rules."""
    area = area_of(module) if module else ""
    if area is None:
        return [f"{module}: belongs to no area; add it to RULES, or move it"]
    rule, found = RULES[area], []
    full = f"megatron.dmc.{module}".rstrip(".")
    for line, name in imported_modules(source, full, is_package):
        where = f"{module or '__init__'}:{line} imports {name}"
        if within(name, "__future__"):
            continue
        if "*" in rule.never or any(within(name, banned) for banned in rule.never):
            found.append(f"{where}: not allowed in {area or 'megatron/dmc/__init__.py'}")
        elif within(name, "megatron.dmc"):
            inner = name.removeprefix("megatron.dmc").lstrip(".")
            # megatron.dmc itself, or its __version__
            root_name = area_of(inner) is None and "." not in inner and not rule.only
            if not root_name and not any(within(inner, allowed) for allowed in (area, *rule.areas)):
                found.append(f"{where}: {area} may import {', '.join((area, *rule.areas))} of megatron.dmc")
        elif within(name, "vllm") and area != "vllm":
            found.append(f"{where}: only megatron.dmc.vllm may import vllm")
        elif rule.only and name.split(".")[0] not in (*rule.only, *sys.stdlib_module_names):
            found.append(f"{where}: {area} may import {', '.join(rule.only)} and the standard library")
    return found


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def test_dependencies_point_one_way() -> None:
    found = [
        problem
        for path in package_sources()
        for problem in violations(path.read_text(encoding="utf-8"), module_name(path), path.name == "__init__.py")
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("", "import json"),
        ("config", "import torch"),
        ("config", "from megatron.dmc.schedule import target_cr"),
        ("schedule", "from megatron.dmc import ops"),
        ("ops.pooling", "import megatron.core"),
        ("ops.pooling", "def f():\n    from megatron.core import parallel_state"),
        ("ops.pooling", "from megatron import core"),
        ("ops.pooling", "from ..model import spec"),
        ("ops.pooling", "import megatron.dmc.kernels as k"),
        ("kernels.loader", "from megatron.dmc.inference import cache"),
        ("model.spec", "from megatron.dmc.training.loop import train"),
        ("model.spec", "from megatron.dmc import checkpoint"),
        ("checkpoint", "from megatron.core import dist_checkpointing"),
        ("checkpoint.mapping", "from megatron.core import dist_checkpointing"),
        ("checkpoint.hf", "from megatron.dmc.model import spec"),
        ("checkpoint.torch_dist", "from megatron.dmc.training import loop"),
        ("checkpoint.remote_code.modeling_dmc", "from megatron.dmc.ops import pool"),
        ("checkpoint.remote_code.modeling_dmc", "from megatron.dmc import __version__"),
        ("checkpoint.remote_code.modeling_dmc", "from ..hf import read"),
        ("checkpoint.remote_code.modeling_dmc", "import numpy"),
        ("training.loop", "import importlib\nimportlib.import_module('megatron.dmc.inference')"),
        ("inference.engine", "from megatron.dmc.model import *"),
        ("inference.engine", "from megatron.core import tensor_parallel"),
        ("serving.server", "from megatron.dmc.training import loop"),
        ("evaluation.quality", "from megatron.dmc.cli import main"),
        ("cli.serve", "from megatron.dmc.training import loop"),
        ("cli.batch", "import megatron.core"),
        ("serving.server", "from vllm import LLM"),
        ("evaluation.quality", "from megatron.dmc.vllm import grants"),
        ("vllm.model", "from megatron.dmc.serving import server"),
        ("helpers", ""),
    ],
)
def test_a_wrong_import_is_caught(module: str, source: str) -> None:
    assert violations(source, module, is_package=module in ("", "checkpoint"))


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("", '"""Nothing."""\nfrom __future__ import annotations\n__version__ = "1"'),
        ("schedule", "from megatron.dmc.config import StageConfig"),
        ("ops.pooling", "import torch\nfrom . import decisions\nfrom .decisions import importance"),
        ("model.spec", "from megatron.core import parallel_state\nfrom megatron.dmc import ops, __version__"),
        ("checkpoint.convert", "from megatron.dmc import environment\nfrom .mapping import views"),
        ("inference.engine", "from megatron.dmc.checkpoint.formats import hf\nfrom megatron.dmc.kernels import *"),
        (
            "checkpoint.remote_code.modeling_dmc",
            "import math\nimport torch\nfrom transformers import Cache\nfrom .configuration_dmc import DMCConfig",
        ),
        ("serving.server", "from ..inference.engine import LLM"),
        ("evaluation.quality", "from megatron.dmc import inference, training\nimport megatron.core"),
        ("cli.main", "from megatron.dmc.serving import server"),
        ("evaluation.report", "if __name__ == '__main__':\n    from megatron.dmc.cli.eval import main"),
        ("vllm.model", "from vllm.config import VllmConfig\nfrom megatron.dmc.inference.attention import Step"),
        ("cli.serve", "from megatron.dmc.cli import options\nfrom megatron.dmc.serving import server"),
    ],
)
def test_a_right_import_is_not_caught(module: str, source: str) -> None:
    assert violations(source, module, is_package=not module) == []


def import_graph() -> dict[str, set[str]]:
    """Every module of the package -> the modules that it names in imports, wherever they stand in the file."""
    paths = {f"megatron.dmc.{module_name(path)}".rstrip("."): path for path in package_sources()}
    graph: dict[str, set[str]] = {module: set() for module in paths}
    for module, path in paths.items():
        for _, name in imported_modules(path.read_text(encoding="utf-8"), module, path.name == "__init__.py"):
            while name and name not in paths:  # a name in a module
                name = name.rpartition(".")[0]
            graph[module] |= {name} - {"", module}
    return graph


def test_no_modules_import_each_other() -> None:
    """No cycle: imports inside functions and for type checkers count too."""
    try:
        TopologicalSorter(import_graph()).prepare()
    except CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


# ------------------------------------------------------------------------------------------------------- every file

# The brackets keep this file from finding itself.
NEEDLES = {
    "a path of one machine": re.compile(r"(?<![\w.}-])/(work|root)[/]|/tmp[/]venv|[p]yenv|/opt[/](wheels|pypi)"),
    "a package index": re.compile(r"[p]ypi\.org/simple|[d]ownload\.pytorch|--(extra-)?index[-]url|--find[-]links"),
}
TEXT = {".py", ".sh", ".md", ".yaml", ".yml", ".toml", ".txt", ".json", ".cfg", ".sbatch"}
TEXT_NAMES = {"Makefile", "Dockerfile", "run"}


def misplaced(text: str) -> list[str]:
    return [
        f"line {number}: {match.group()!r} is {what}"
        for number, line in enumerate(text.splitlines(), 1)
        for what, needle in NEEDLES.items()
        for match in needle.finditer(line)
    ]


def test_no_file_names_a_machine_or_an_index() -> None:
    files = [path for path in repository_files() if path.suffix in TEXT or path.name in TEXT_NAMES]
    assert files
    found = [f"{relative(path)} {hit}" for path in files for hit in misplaced(path.read_text(encoding="utf-8"))]
    assert not found, "\n".join(found)


def test_a_machine_path_is_caught() -> None:
    wrong = [
        "cd /{}work/main",
        "--out=/{}root/x",
        "/tmp/{}venv/bin",
        "p{}yenv local",
        "--index{}-url X",
        "--find{}-links X",
    ]
    assert all(misplaced(line.format("")) for line in wrong)
    assert not misplaced("a/work/b, $SCRATCH/work/, ${HOME}/work/ and chroot/root_dir")


LONGER_THAN_500_LINES: dict[str, str] = {}  # path: the reason why it is one room and not several


@pytest.mark.parametrize("path", package_sources(), ids=relative)
def test_source_file(path: Path) -> None:
    """Every file of the package: Python 3.11 without a syntax warning, with a docstring, and of readable length."""
    source = path.read_text(encoding="utf-8")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tree = ast.parse(source, filename=str(path), feature_version=(3, 11))
        compile(source, str(path), "exec")
    assert ast.get_docstring(tree), f"{relative(path)} has no module docstring"
    lines = source.count("\n")
    assert lines <= 500 or relative(path) in LONGER_THAN_500_LINES, f"{relative(path)} has {lines} lines; split it"


def test_scripts_are_executable() -> None:
    scripts = [path for path in repository_files() if path.suffix == ".sh" or relative(path) == ".ci/run"]
    assert not [relative(path) for path in scripts if not os.access(path, os.X_OK)]


# ---------------------------------------------------------------------------------------------------------- the pins


def constraints() -> list[Requirement]:
    lines = (line.split("#")[0].strip() for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines())
    return [Requirement(line) for line in lines if line]


def setup_requirements() -> list[Requirement]:
    """Requirements in setup.py at run time and for development, read without running it."""
    tree = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
    values = {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id.isupper()
        if isinstance(node.value, (ast.List, ast.Dict))
    }
    extras = values["EXTRAS_REQUIRE"]
    return [Requirement(line) for line in (*values["INSTALL_REQUIRES"], *extras["serve"], *extras["dev"])]


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13", "3.14"])
def test_constraints_pin_one_version_of_each(python: str) -> None:
    pins = [pin for pin in constraints() if pin.marker is None or pin.marker.evaluate({"python_version": python})]
    assert all(re.fullmatch(r"==[\w.]+", str(pin.specifier)) for pin in pins)
    twice = [name for name, count in Counter(canonicalize_name(pin.name) for pin in pins).items() if count > 1]
    assert not twice
    pinned = {canonicalize_name(pin.name): str(pin.specifier).removeprefix("==") for pin in pins}
    for requirement in setup_requirements():
        name = canonicalize_name(requirement.name)
        assert name in pinned, f"{name} is in setup.py and has no pin in constraints.txt"
        assert pinned[name] in requirement.specifier, (
            f"{name} {pinned[name]} is not {requirement.specifier} of setup.py"
        )


def test_modules_of_tests_have_names_of_their_own() -> None:
    """pytest imports test modules, and what lies beside them, by their bare names: of two, one would stay unseen."""
    skipped = {"__init__", "conftest", "run", "check"}  # pytest knows the first two by path; the others are programs
    names = Counter(path.stem for path in (ROOT / "tests").rglob("*.py"))
    assert not [name for name, count in names.items() if count > 1 and name not in skipped]
