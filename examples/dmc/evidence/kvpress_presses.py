#!/usr/bin/env python3
"""Presses of kvpress, run by its own code, on the samples of a comparison on a released model.

    examples/dmc/evidence/kvpress_presses.py --make-environment DIR
    DIR/bin/python examples/dmc/evidence/kvpress_presses.py CONFIG.json PRESS

The first command makes an environment with kvpress 0.5.5 on top of the calling interpreter's packages: it needs an
older transformers than this repository. The second one, which ``dmc compare`` runs, measures one press, or ``original``
for the full cache, on every task of the protocol "context" and writes cells as
``megatron.dmc.evaluation.released.measure`` does. It imports nothing of this repository.

As in kvpress' pipeline the press compresses the cache of the context, and what follows attends to that cache at its
positions in the text. Under KVzip it comes token by token: kvpress does not remove the keys of single heads but
overwrites them with one that a hyperplane parts from all queries of a call, and for those of many tokens there is none.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any, Optional

KVPRESS = "kvpress==0.5.5"
NAMES = {
    "SnapKV": "SnapKVPress",
    "ExpectedAttention": "ExpectedAttentionPress",
    "KVzip": "KVzipPress",
    "TOVA": "TOVAPress",
    "StreamingLLM": "StreamingLLMPress",
}
ORIGINAL = "original"
MASKING = ("KVzip",)
"""Presses that mask the keys of single heads, under which the tokens after a context come one by one."""


def make_environment(folder: Path) -> None:
    """An environment that adds kvpress, and what it needs in other versions, to this interpreter's packages."""
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "base.pth").write_text(sysconfig.get_path("purelib") + "\n")
    command = [str(folder / "bin/python"), "-m", "pip", "install", "-q", "--disable-pip-version-check", KVPRESS]
    subprocess.run(command, check=True)


def plain_copy(model: Path, folder: Path) -> Path:
    """The model's files without a chat template: KVzip would take the template's first tokens, which these contexts do
    not begin with, off each context.
    """
    for path in model.iterdir():
        if path.is_file() and path.name != "chat_template.jinja":
            (folder / path.name).symlink_to(path.resolve())
    settings = json.loads((model / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (folder / "tokenizer_config.json").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


class Runner:
    """A model in transformers, and a press; None for the full cache."""

    def __init__(self, model: Path, name: str, piece: Optional[int]) -> None:
        import kvpress  # it patches attention before the model is made
        import torch
        from transformers import AutoModelForCausalLM

        self.press_class = None if name == ORIGINAL else getattr(kvpress, NAMES[name])
        local = dict(local_files_only=True, attn_implementation="sdpa")
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, trust_remote_code=False, **local)
        self.model.eval()
        self.masks = name in MASKING
        self.piece = piece or (1 if self.masks else 1 << 20)

    def hidden(self, context: list[int], more: list[int], ratio: float) -> tuple[Any, float]:
        """Hidden states after the final norm at the tokens of ``more`` but the last, [n - 1, h], and slots per head,
        the mean over layers and heads, after the context.

        Args:
            ratio: compression, tokens / slots; kvpress' ``compression_ratio`` is the share that is removed.
        """
        import torch
        from transformers import DynamicCache

        cache, ids = DynamicCache(), torch.tensor([context])
        with torch.no_grad():
            if self.press_class is None or ratio <= 1:
                self.model.model(input_ids=ids, past_key_values=cache)
            else:
                # A press that removes whole slots truncates their number: half a slot more than what it shall keep.
                kept = (math.ceil(len(context) / ratio) + (0 if self.masks else 0.5)) / len(context)
                with self.press_class(compression_ratio=1 - min(kept, 1))(self.model):
                    self.model.model(input_ids=ids, past_key_values=cache)
            slots, parts = self.slots(cache), []
            for start in range(0, len(more) - 1, self.piece):
                ids = torch.tensor([more[start : min(start + self.piece, len(more) - 1)]])
                at = torch.arange(len(context) + start, len(context) + start + ids.size(1))[None]
                out = self.model.model(input_ids=ids, past_key_values=cache, position_ids=at)
                parts.append(out.last_hidden_state[0])
        return torch.cat(parts), slots

    def slots(self, cache: Any) -> float:
        """Slots of a head, the mean over layers and heads. KVzip keeps the tensors and masks single keys."""
        heads = self.model.config.num_key_value_heads
        counts = []
        for layer, kept in zip(self.model.model.layers, cache.layers):
            masked = getattr(layer.self_attn, "masked_key_indices", None)
            counts.append(kept.keys.size(2) - (0 if masked is None else len(masked[0]) / heads))
        return sum(counts) / len(counts)

    def figures(self, hidden: Any, original: Any, labels: list[int]) -> dict[str, float]:
        """Figures of ``megatron.dmc.evaluation.released.measure``."""
        import torch

        with torch.no_grad():
            q, p = (self.model.lm_head(states).float().log_softmax(-1) for states in (hidden, original))
        best, label = q.argmax(-1), torch.tensor(labels)
        accuracy = (best == label).double().mean()
        return {
            "loss": -float(q.gather(1, label[:, None]).double().mean()),
            "accuracy": float(accuracy),
            "exact": float(accuracy == 1),
            "kld": float((p.exp() * (p - q)).sum(-1).double().mean()),
            "agreement": float((best == p.argmax(-1)).double().mean()),
        }


def measure(runner: Runner, task: dict[str, Any], ratio: float, states: Path) -> dict[str, Any]:
    """Figures by sample, and the compression after the contexts.

    Args:
        states: file with the hidden states of the full cache at the scored positions; written where ``ratio`` is 1.
    """
    from safetensors.torch import load_file, save_file

    original = {} if ratio == 1 else load_file(states)
    samples, tokens, slots = [], 0, 0.0
    for i, sample in enumerate(task["samples"]):
        context, more, first = sample["context"], sample["continuation"], sample["first"]
        hidden, held = runner.hidden(context, more, ratio)
        hidden, tokens, slots = hidden[first - 1 :].contiguous(), tokens + len(context), slots + held
        if ratio == 1:
            original[str(i)] = hidden
        samples.append(runner.figures(hidden, original[str(i)], more[first:]))
    if ratio == 1:
        states.parent.mkdir(parents=True, exist_ok=True)
        save_file(original, states)
    columns = {name: [sample[name] for sample in samples] for name in samples[0]}
    return {"samples": columns, "compression": {"ratio": tokens / slots}}


def followed(config: dict[str, Any], output: Path, task: str) -> float:
    """Compression ratio of the method that presses follow, or the configuration's."""
    if config["follow"] is None:
        return config["ratio"]
    cell = output / "cells" / config["follow"].replace(" ", "-") / f"{task}.json"
    return json.loads(cell.read_text())["compression"]["ratio"]


def measure_all(config: dict[str, Any], name: str, piece: Optional[int]) -> None:
    """Measure a press on every task that has no cell of it."""
    import kvpress  # noqa: F401
    import transformers

    output, runner = Path(config["output"]), None
    method = f"kvpress {name}"
    with tempfile.TemporaryDirectory() as temporary:
        model = plain_copy(Path(config["model"]), Path(temporary))
        for source in sorted((output / "samples").glob("context-*.json")):
            cell = output / "cells" / method.replace(" ", "-") / source.name
            states = output / "original" / f"kvpress-{source.stem}.safetensors"
            ratio = 1.0 if name == ORIGINAL else followed(config, output, source.stem)
            parts = [method, ratio, piece, KVPRESS, transformers.__version__, (model / "config.json").read_text()]
            digest = hashlib.sha256(source.read_bytes() + json.dumps(parts).encode()).hexdigest()[:16]
            there = cell.is_file() and json.loads(cell.read_text())["digest"] == digest
            if there and (name != ORIGINAL or states.is_file()):
                continue
            runner = runner or Runner(model, name, piece)
            found = measure(runner, json.loads(source.read_text()), ratio, states)
            cell.parent.mkdir(parents=True, exist_ok=True)
            content = {"method": method, "task": source.stem, "digest": digest, **found}
            cell.with_suffix(".tmp").write_text(json.dumps(content) + "\n")
            os.replace(cell.with_suffix(".tmp"), cell)
            print(f"{method}, {source.stem}: compression {found['compression']['ratio']:.2f}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", type=Path, help="resolved configuration of the comparison, JSON")
    parser.add_argument("press", nargs="?", choices=[ORIGINAL, *NAMES], help="press, or original for the full cache")
    parser.add_argument("--piece", type=int, help="tokens after the context at once (default: all; KVzip: 1)")
    parser.add_argument("--make-environment", type=Path, metavar="DIR", help="make the environment and end")
    args = parser.parse_args()
    if args.make_environment:
        make_environment(args.make_environment)
        return 0
    if args.press is None:
        parser.error("give CONFIG.json and PRESS, or --make-environment DIR")
    measure_all(json.loads(args.config.read_text()), args.press, args.piece)
    return 0


if __name__ == "__main__":
    sys.exit(main())
