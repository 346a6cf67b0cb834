"""The jobs of a comparison on a released model: samples, one job per method, kvpress in an environment of its own."""

import shlex
import sys
from pathlib import Path

from megatron.dmc.evaluation.compare.jobs import ROOT, Job, JobGraph
from megatron.dmc.evaluation.released.config import ORIGINAL, THEIRS, ReleasedConfig
from megatron.dmc.evaluation.released.measure import fingerprint

KVPRESS = "examples/dmc/evidence/kvpress_presses.py"
SETTINGS = "released.json"
"""The resolved configuration, under the output, that every job reads."""


def absolute(config: ReleasedConfig) -> ReleasedConfig:
    """Make all paths of a configuration absolute, in place: of the checkout, where they are relative."""
    at = lambda path: str(ROOT / path)
    config.model = at(config.model)
    config.adapters = {name: at(path) for name, path in config.adapters.items()}
    config.text.files = {kind: at(path) for kind, path in config.text.files.items()}
    if config.kvpress_python:
        config.kvpress_python = at(config.kvpress_python)
    return config


def methods(config: ReleasedConfig) -> list[str]:
    """Names of the methods in the order of their rows; those that others follow or are compared with come first."""
    adapters = sorted(config.adapters, key=lambda name: name != config.follow)
    presses = [f"{THEIRS}{name}" for name in (ORIGINAL, *config.presses)] if config.presses else []
    return [ORIGINAL, *adapters, *config.policies, *presses]


def build_graph(config: ReleasedConfig) -> JobGraph:
    """Jobs of a configuration whose paths are absolute. A job depends on the settings that it reads, and on the files
    that the model and its adapters have at this moment.
    """
    graph, output = JobGraph(), Path(config.output)
    module = lambda name, *words: (sys.executable, "-m", f"megatron.dmc.evaluation.released.{name}", *words)
    files, prepared = str(output / SETTINGS), []
    for i, line in enumerate(config.prepare):
        words = shlex.split(line)
        run = (sys.executable,) if words[0].endswith(".py") else ()
        prepared.append(graph.add(Job(f"prepare-{i}", ((*run, *words),), tuple(prepared))))
    tasks = {name: value for name, value in config.to_dict().items() if name in ("text", "recall", "humaneval", "seed")}
    command = module("samples", files, str(output / "samples"))
    inputs = (str(tasks), *(fingerprint(Path(path)) for path in (config.model, *config.text.files.values())))
    samples = graph.add(Job("samples", (command,), tuple(prepared), inputs=inputs))
    original = graph.add(Job(ORIGINAL, (module("measure", files, ORIGINAL),), (samples,), 1.0))
    before = (original,)
    for name in methods(config)[1:]:
        if name.startswith(THEIRS):
            continue
        adapter = config.adapters.get(name)
        inputs = (fingerprint(Path(adapter)),) if adapter else (str(config.follow), f"{config.ratio:g}")
        cost = 4.0 if name in ("H2O", "TOVA") else 1.5
        done = graph.add(Job(name, (module("measure", files, name),), before, cost, inputs=inputs))
        if name == config.follow:
            before = (original, done)
    if config.presses:
        add_presses(config, graph, before)
    return graph


def add_presses(config: ReleasedConfig, graph: JobGraph, before: tuple[str, ...]) -> None:
    """Jobs of kvpress: its environment, the full cache by its code, and the presses."""
    output, python = Path(config.output), config.kvpress_python
    if python is None:
        folder = output / "kvpress"
        make = (sys.executable, KVPRESS, "--make-environment", str(folder))
        before = (*before, graph.add(Job("kvpress", (make,))))
        python = str(folder / "bin/python")
    for name in (ORIGINAL, *config.presses):
        command = (python, str(ROOT / KVPRESS), str(output / SETTINGS), name)
        inputs = (str(config.follow), f"{config.ratio:g}")
        done = graph.add(Job(f"{THEIRS}{name}", (command,), before, 1.0, inputs=inputs))
        if name == ORIGINAL:
            before = (*before, done)
