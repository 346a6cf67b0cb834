#!/usr/bin/env python3
"""kvpress' own code in the comparison on a released model: does it compute what its presses are said to?

    tests/presses/run.py [--python PYTHON] [--environment DIR]

A tiny random Llama and random tokens; examples/dmc/evidence/kvpress_presses.py measures the full cache and every press
in an environment with kvpress. --python: an interpreter that has it; without it an environment is made in DIR, or in a
temporary folder.
Then, computed by this package:

- the full cache has the same losses;
- StreamingLLM and TOVA have the losses, divergences and compression of the tokens that they are defined to keep;
- every press has the compression that was asked for, and another distance to the original than a second one;
- pieces of five tokens and all at once give the same figures.

Exit status 1 when something differs.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from megatron.dmc.evaluation.policies import Attended, FullCache, Projections, _Masked  # noqa: E402
from megatron.dmc.evaluation.released.config import PRESSES  # noqa: E402
from megatron.dmc.evaluation.released.measure import predictions  # noqa: E402
from megatron.dmc.evaluation.released.samples import Sample, Task  # noqa: E402
from megatron.dmc.evaluation.teacher_forced import TeacherForced  # noqa: E402

SCRIPT = ROOT / "examples/dmc/evidence/kvpress_presses.py"
RATIO, CONTEXT, MORE, TOLERANCE = 3.0, 96, 40, 2e-4
KEPT = math.ceil(CONTEXT / RATIO)


class Press(_Masked):
    """A context that attends to all of itself, and tokens after it that see ``KEPT`` of its tokens."""

    name = "press"

    def __init__(self, rule: str) -> None:
        self.rule = rule

    def attend(self, x: Projections) -> Attended:
        b, ng, s, d = x.k.shape
        at = x.positions()
        kept = torch.zeros(b, ng, s, dtype=torch.bool)
        if self.rule == "StreamingLLM":
            kept[..., :4] = kept[..., CONTEXT - KEPT + 4 : CONTEXT] = True
        else:  # TOVA: what the last query attends to most, by the mean over heads, and itself
            q = x.rotated_queries(x.q, at)[:, :, CONTEXT - 1]
            k = x.rotated_keys()[:, :, :CONTEXT].repeat_interleave(q.size(1) // ng, dim=1)
            weights = ((k @ q[..., None])[..., 0] / d**0.5).softmax(-1).mean(1)
            weights[..., CONTEXT - 1] = 2
            kept.scatter_(-1, weights.topk(KEPT).indices[:, None].expand(b, ng, -1), True)
        self._kept = kept
        return self._attend(x, (kept.sum(-1, keepdim=True) + at - CONTEXT + 1).expand(b, ng, s))

    def _visible(self, x: Projections, age: Tensor, start: int, stop: int) -> Tensor:
        at = x.positions()
        later = at[start:stop, None] >= CONTEXT
        return ~later | (at[:stop] >= CONTEXT) | self._kept[:, :, None, None, :stop]


def make_model(folder: Path) -> None:
    import transformers
    from helpers import families
    from tokenizers import Tokenizer as FastTokenizer
    from tokenizers import models, pre_tokenizers

    families.make("llama3.2", folder, shard="1GB", max_position_embeddings=1024)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())[:130]
    fast = FastTokenizer(models.BPE({"<|end|>": 0, **{letter: i for i, letter in enumerate(letters, 1)}}, []))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    transformers.PreTrainedTokenizerFast(tokenizer_object=fast, eos_token="<|end|>").save_pretrained(folder)


def check(python: Path, folder: Path) -> bool:
    """Measure and compare; prints a line for each comparison. True when all agree."""
    make_model(folder / "model")
    ids = torch.randint(1, 131, (3, CONTEXT + MORE), generator=torch.Generator().manual_seed(0)).tolist()
    samples = [Sample(row[:CONTEXT], row[CONTEXT:], 1 + i) for i, row in enumerate(ids)]
    task = Task("context", "prose", CONTEXT, samples)
    task.save(folder / "samples")
    config = dict(model=str(folder / "model"), output=str(folder), follow=None, ratio=RATIO)
    (folder / "released.json").write_text(json.dumps(config))
    cells = {}
    for name, piece in [("original", None), *((press, None) for press in PRESSES), ("SnapKV", 5)]:
        command = [str(python), str(SCRIPT), str(folder / "released.json"), name]
        command += ["--piece", str(piece)] if piece else []
        subprocess.run(command, check=True, timeout=1800)
        cells[name, piece] = json.loads((folder / f"cells/kvpress-{name}/{task.name}.json").read_text())
    good = True

    def close(what: str, found: float, wanted: float, tolerance: float = TOLERANCE) -> None:
        nonlocal good
        fine = abs(found - wanted) <= tolerance
        good &= fine
        print(f"  {what:<60} {found:.5f} {wanted:.5f}{'' if fine else '  DIFFERS'}", flush=True)

    model = TeacherForced.load(folder / "model")
    rules = {"original": FullCache(), "StreamingLLM": Press("StreamingLLM"), "TOVA": Press("TOVA")}
    for i, (row, sample) in enumerate(zip(ids, samples)):
        tokens, first = torch.tensor([row]), CONTEXT + sample.first
        full, _ = model.hidden_states(tokens, FullCache())
        for name, policy in rules.items():
            hidden, slots = model.hidden_states(tokens, policy)
            if name != "original":
                assert (slots[..., CONTEXT - 1] == KEPT).all()
            wanted = predictions(model, hidden[0, first - 1 : -1], full[0, first - 1 : -1], tokens[0, first:])
            for figure in ("loss", "kld"):
                close(f"{name}, sample {i}: {figure}", cells[name, None]["samples"][figure][i], wanted[figure])
    for (name, _), cell in cells.items():
        asked = 1.0 if name == "original" else RATIO
        close(f"{name}: compression", cell["compression"]["ratio"], asked, 0.02 * asked)
    for i in range(len(samples)):
        pieces, whole = (cells["SnapKV", piece]["samples"]["kld"][i] for piece in (5, None))
        close(f"SnapKV, sample {i}: kld in pieces of 5 and at once", pieces, whole)
    distances = {name: cells[name, None]["samples"]["kld"] for name in PRESSES}
    for name in PRESSES:
        alike = [other for other in PRESSES if other != name and distances[other] == distances[name]]
        good &= not alike and min(distances[name]) > 1e-4
        print(f"  {name:<60} {'as ' + alike[0] + '  DIFFERS NOT' if alike else 'differs from the others'}")
    return good


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", type=Path, help="interpreter of an environment with kvpress")
    parser.add_argument("--environment", type=Path, help="where an environment is kept (default: a temporary folder)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        python = args.python
        if python is None:
            folder = (args.environment or Path(temporary) / "environment").absolute()
            python = folder / "bin/python"
            if not python.exists():
                subprocess.run([sys.executable, str(SCRIPT), "--make-environment", str(folder)], check=True)
        good = check(python, Path(temporary))
    print("all agree" if good else "something differs")
    return int(not good)


if __name__ == "__main__":
    sys.exit(main())
