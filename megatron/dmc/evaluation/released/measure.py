"""Measure one method of a comparison on a released model: one file of figures, a cell, for every task.

    python -m megatron.dmc.evaluation.released.measure CONFIG.json METHOD

A cell that is there and was measured on the same samples with the same files is kept, so a run that was stopped goes
on. The original comes first: it leaves the hidden states from which its predictions are computed again for the others.
"""

import hashlib
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron.dmc.config import build
from megatron.dmc.config import load_file as load_settings
from megatron.dmc.evaluation import policies
from megatron.dmc.evaluation.compare import jobs
from megatron.dmc.evaluation.fidelity import ROWS, divergence
from megatron.dmc.evaluation.policies import CachePolicy, FullCache, SlotTable
from megatron.dmc.evaluation.released.config import ORIGINAL, ReleasedConfig
from megatron.dmc.evaluation.released.samples import Sample, Task
from megatron.dmc.evaluation.teacher_forced import Compression, TeacherForced

FIGURES = ("loss", "accuracy", "exact", "kld", "agreement")
"""Figures of a sample: mean loss in nats, share of tokens that greedy decoding gives and whether it gives all of them,
mean divergence KL(original || method) in nats, and share of tokens where both find the same one most likely."""


@dataclass(frozen=True)
class Layout:
    """Files of a comparison under its output."""

    output: Path

    def tasks(self) -> list[Path]:
        """Sample files, in the order of their making."""
        return sorted((self.output / "samples").glob("*.json"), key=lambda path: (path.stat().st_mtime_ns, path.name))

    def cell(self, method: str, task: str) -> Path:
        return self.output / "cells" / method.replace(" ", "-") / f"{task}.json"

    def hidden(self, task: str) -> Path:
        """Hidden states of the original at the scored positions: fp32 [positions, h] by the index of the sample."""
        return self.output / "original" / f"{task}.safetensors"


def fingerprint(path: Path) -> str:
    """Hash of a model's directory: of its checksums, or of its files' names, sizes and times. Of a file: of its own.
    "absent" where there is neither.
    """
    if not path.exists():
        return "absent"
    checksums = path / "checksums.json"
    if checksums.is_file():
        content = checksums.read_bytes()
    else:
        files = sorted(file for file in path.iterdir() if file.is_file()) if path.is_dir() else [path]
        content = repr([(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]).encode()
    return hashlib.sha256(content).hexdigest()[:16]


def batches(samples: list[Sample], tokens: int) -> Iterator[list[int]]:
    """Indices of consecutive samples of one form, with at most ``tokens`` tokens together, or one sample."""
    form = lambda i: (len(samples[i].context), len(samples[i].continuation), samples[i].first)
    for (before, after, _), group in itertools.groupby(range(len(samples)), key=form):
        most, indices = max(1, tokens // (before + after)), list(group)
        yield from (indices[at : at + most] for at in range(0, len(indices), most))


@torch.inference_mode()
def predictions(model: TeacherForced, hidden: Tensor, original: Tensor, labels: Tensor) -> dict[str, float]:
    """Figures of a sample (:data:`FIGURES`).

    Args:
        hidden: hidden states of the method at the positions before the scored tokens, [n, h].
        original: those of the original, at the same positions.
        labels: the tokens that came, int64 [n].
    """
    parts: dict[str, list[Tensor]] = {name: [] for name in ("loss", "accuracy", "kld", "agreement")}
    for x, y, label in zip(hidden.split(ROWS), original.split(ROWS), labels.split(ROWS)):
        q, p = (model.logits(states).log_softmax(dim=-1) for states in (x, y))
        kld, agrees = divergence(q, p)
        values = (-q.gather(1, label[:, None])[:, 0], q.argmax(dim=-1) == label, kld, agrees)
        for name, value in zip(parts, values):
            parts[name].append(value)
    figures = {name: float(torch.cat(values).double().mean()) for name, values in parts.items()}
    return {**figures, "exact": float(figures["accuracy"] == 1.0)}


class Method:
    """A model under a cache policy, whose budget may follow what another method was seen to hold.

    Args:
        followed: the cell of the method that is followed, for a task; None: ``config.ratio``.
    """

    def __init__(self, config: ReleasedConfig, name: str) -> None:
        self.name, self.adapter = name, config.adapters.get(name)
        self.config, self.layout = config, Layout(Path(config.output))
        self.evicts = name in config.policies
        if not (self.evicts or self.adapter or name == ORIGINAL):
            raise ValueError(f"method {name!r} is not in the configuration")

    def followed(self, task: Task) -> Optional[dict[str, Any]]:
        """Compression of the method that this one follows, on the same task."""
        if not self.evicts or self.config.follow is None:
            return None
        path = self.layout.cell(self.config.follow, task.name)
        if not path.is_file():
            raise ValueError(f"{path} is not there: {self.config.follow!r}, which {self.name} follows, comes first")
        return json.loads(path.read_text())["compression"]

    def policy(self, task: Task, context: int, more: int) -> Optional[CachePolicy]:
        """Policy for sequences of ``context`` and ``more`` tokens; None: the model's own."""
        if self.name == ORIGINAL:
            return FullCache()
        if not self.evicts:
            return None
        followed, rule = self.followed(task), getattr(policies, self.name)
        if task.protocol == "context":
            ratio = followed["ratio"] if followed else self.config.ratio
            return rule(SlotTable.after_context(context, ratio, more))
        if followed:
            return rule(SlotTable.following(followed["by_position"]))
        return rule(policies.Budget(self.config.ratio, "growing"))

    def digest(self, task: Task, source: Path) -> str:
        """Hash of all that a cell depends on."""
        parts = [self.name, fingerprint(Path(self.config.model)), self.evicts and self.config.ratio]
        parts += [self.followed(task), self.adapter and fingerprint(Path(self.adapter))]
        return hashlib.sha256(source.read_bytes() + json.dumps(parts).encode()).hexdigest()[:16]

    def load(self) -> TeacherForced:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return TeacherForced.load(self.config.model, device=device, adapters=self.adapter)

    def measure(self, model: TeacherForced, task: Task) -> dict[str, Any]:
        """Figures by sample and the compression of a task; the original's hidden states are written on the way."""
        path, held = self.layout.hidden(task.name), []
        original = load_file(path) if self.name != ORIGINAL else {}
        figures: dict[int, dict[str, float]] = {}
        for indices in batches(task.samples, self.config.batch_tokens):
            one = task.samples[indices[0]]
            context, first = len(one.context), len(one.context) + one.first
            rows = [task.samples[i].context + task.samples[i].continuation for i in indices]
            tokens = torch.tensor(rows)
            policy = self.policy(task, context, len(one.continuation))
            hidden, slots = model.hidden_states(tokens, policy)
            held.append(slots.cpu() if task.protocol == "whole" else slots[..., context - 1].cpu())
            for row, i in enumerate(indices):
                states, labels = hidden[row, first - 1 : -1], tokens[row, first:].to(hidden.device)
                if self.name == ORIGINAL:
                    original[str(i)] = states.clone().cpu()
                figures[i] = predictions(model, states, original[str(i)].to(hidden.device), labels)
        if self.name == ORIGINAL:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file(original, path)
        samples = {name: [figures[i][name] for i in range(len(task.samples))] for name in FIGURES}
        return {"samples": samples, "compression": compression(task, held)}


def compression(task: Task, held: list[Tensor]) -> dict[str, Any]:
    """Compression of a task's caches: tokens / slots after the text or the context, and for whole texts by position.

    Args:
        held: slots after each token of whole texts, int [layers, b, ng, s], or after contexts, [layers, b, ng].
    """
    if task.protocol == "whole":
        found = Compression.of(torch.cat(held, dim=1))
        by = dict(by_head=found.by_head.tolist(), by_position=found.by_position.tolist())
        return {"ratio": found.at_end, "reads": found.reads, **by}
    slots, tokens = torch.cat(held, dim=1).double(), float(sum(len(s.context) for s in task.samples))
    by_head = tokens / slots.sum(dim=1)
    return {"ratio": tokens / float(slots.mean(dim=(0, 2)).sum()), "by_head": by_head.tolist()}


def measure_all(config: ReleasedConfig, name: str) -> None:
    """Measure a method on every task that has no cell of it."""
    method, layout, model = Method(config, name), Layout(Path(config.output)), None
    for source in layout.tasks():
        task, path = Task.load(source), layout.cell(name, source.stem)
        digest = method.digest(task, source)
        there = path.is_file() and json.loads(path.read_text())["digest"] == digest
        if there and (name != ORIGINAL or layout.hidden(task.name).is_file()):
            continue
        model = model or method.load()
        found = method.measure(model, task)
        jobs.write_json(path, {"method": name, "task": task.name, "digest": digest, **found})
        print(f"{name}, {task.name}: compression {found['compression']['ratio']:.2f}", flush=True)


if __name__ == "__main__":
    jobs.run(lambda config, name: measure_all(build(ReleasedConfig, load_settings(config)), name))
