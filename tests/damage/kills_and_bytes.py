"""Kill -9 and damage at full size: 50 random kills over all stages, 200 random changes of one byte over every file of a
checkpoint, 200 over an exported directory. Every change is found by name or harmless; never another result in silence.

    python tests/damage/kills_and_bytes.py [--seed 1] [--kills 50] [--bytes 200]

Not collected by pytest: some ten minutes on two cores. Samples run in tests/training/test_resume.py and
tests/checkpoint/test_export.py. Exit status 1 when anything else happens, with the change that showed it.
"""

from __future__ import annotations

import argparse
import collections
import os
import random
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
for folder in (ROOT, ROOT / "tests"):
    sys.path.insert(0, str(folder))

import torch  # noqa: E402
from helpers import tiny  # noqa: E402

ITERATIONS = 6
STAGES = ("pretrain", "zero_out", "retrofit", "finetune")


def command(data: Path, stage: str, save: Path, chain: Path) -> list[str]:
    """Command line of a stage, started from the one before it under ``chain``."""
    extra: dict[str, Any] = dict(train_iters=ITERATIONS, save_interval=2, save=save)
    if stage != "pretrain":
        extra["init_from"] = chain / STAGES[STAGES.index(stage) - 1]
    if stage == "retrofit":
        extra["target_cr"] = 2
    return tiny.command(data, stage, **extra)


# Kills


def kill(rng: random.Random, data: Path, chain: Path, scratch: Path, kills: int, seconds: float) -> None:
    """Kill a random stage at ``kills`` random moments, let it finish, and compare every bit with ``chain``'s."""
    stage = rng.choice(STAGES)
    save = scratch / "save"
    argv = command(data, stage, save, chain)
    if rng.random() < 0.5:
        argv.append("--async-save")
    argv += ["--max-starts-without-step", "1000"]
    for _ in range(kills):
        run = tiny.Run(argv, scratch / "run")
        time.sleep(rng.uniform(0, seconds))
        run.kill()
        for checkpoint in save.glob("iter_*"):  # whatever has the name is complete
            assert (checkpoint / "manifest.json").is_file(), checkpoint
    tiny.run(argv, scratch / "run")
    last = f"iter_{ITERATIONS:07d}"
    tiny.assert_same_checkpoint(chain / stage / last, save / last)
    names = sorted(path.name for path in save.iterdir())
    assert names == ["iter_0000002", "iter_0000004", last, "latest_checkpointed_iteration.txt"], names


# Single bytes


def change(rng: random.Random, directory: Path) -> tuple[Path, bytes, str]:
    """Change one byte of one file, every file alike. Returns the file, what it held, and the change in words."""
    path = rng.choice(sorted(p for p in directory.rglob("*") if p.is_file() and p.stat().st_size))
    content = path.read_bytes()
    at, changed = rng.randrange(len(content)), bytearray(content)
    changed[at] = rng.choice([b for b in range(256) if b != content[at]])
    path.write_bytes(changed)
    return path, content, f"{path.relative_to(directory)}: byte {at} from {content[at]:#04x} to {changed[at]:#04x}"


def damage(rng: random.Random, directory: Path, count: int, result: Callable[[], Any]) -> collections.Counter:
    """Change ``count`` single bytes, one after the other, each undone again.

    Args:
        result: what is made of the directory: comparable with ``same``. It raises ``ValueError`` for what it finds.

    Returns:
        How many changes were found and harmless.

    Raises:
        AssertionError: another result, an error of another type (a traceback), or one that does not name the place.
    """
    before, outcomes = result(), collections.Counter()
    for _ in range(count):
        path, content, what = change(rng, directory)
        try:
            after = result()
        except ValueError as error:
            assert any(name in str(error) for name in (path.name, str(directory), "config.json")), (what, str(error))
            assert "\n" not in str(error).strip(), (what, str(error))
            outcomes["found by name"] += 1
        except Exception as error:
            raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error
        else:
            assert same(before, after), f"{what}: another result in silence"
            outcomes["harmless"] += 1
        finally:
            path.write_bytes(content)
    assert same(before, result())
    return outcomes


def same(a: Any, b: Any) -> bool:
    """Equality, of tensors bit by bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    return type(a) is type(b) and a == b


def loaded_checkpoint(save: Path) -> dict:
    """What training and evaluation take from a --save directory: checkpoint, configuration and weights."""
    from megatron.dmc.evaluation.load import load_checkpoint
    from megatron.dmc.training.starting_point import find_starting_point

    start = find_starting_point(str(save), None)
    assert start is not None
    loaded = load_checkpoint(start.path)
    weights = {k: v for k, v in loaded.model.state_dict().items() if isinstance(v, torch.Tensor)}
    return {"path": start.path, "manifest": vars(start.manifest), "config": loaded.config.to_dict(), "weights": weights}


def generated_text(directory: Path) -> list:
    """What the engine makes of an exported directory: tokens, text and log-probabilities."""
    from megatron.dmc.inference import LLM, SamplingParams

    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, logprobs=2)
    (result,) = LLM(str(directory), device="cpu", max_num_seqs=2, num_pages=64).generate(["def main(self):"], params)
    return [
        result.prompt_token_ids,
        result.outputs[0].token_ids,
        result.outputs[0].text,
        str(result.outputs[0].logprobs),
    ]


def make_chain(data: Path, chain: Path) -> float:
    """Run every stage undisturbed. Returns the seconds that the longest has taken."""
    slowest = 0.0
    for stage in STAGES:
        begun = time.monotonic()
        tiny.run(command(data, stage, chain / stage, chain), chain / f"{stage}_run")
        slowest = max(slowest, time.monotonic() - begun)
    return slowest


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--bytes", type=int, default=200)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    from megatron.dmc import cli

    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        (root / "data").mkdir()
        data = tiny.make_data(root / "data")
        seconds = make_chain(data, root / "chain")
        done = runs = 0
        while done < args.kills:
            kills = min(rng.randint(1, 4), args.kills - done)
            (scratch := root / f"kill{runs}").mkdir()
            kill(rng, data, root / "chain", scratch, kills, seconds)
            done, runs = done + kills, runs + 1
        print(f"{done} kills in {runs} runs over {', '.join(STAGES)}: every run ended bit for bit as if undisturbed")
        save = root / "chain" / "finetune"
        assert cli.main(["convert", "export", "--load", str(save), "--save", str(root / "hf")]) == 0
        for older in sorted(save.glob("iter_*"))[:-1]:
            shutil.rmtree(older)
        counts = damage(rng, save, args.bytes, lambda: loaded_checkpoint(save))
        print(f"a checkpoint, {args.bytes} changes of one byte: {dict(counts)}")
        counts = damage(rng, root / "hf", args.bytes, lambda: generated_text(root / "hf"))
        print(f"an exported directory, {args.bytes} changes of one byte: {dict(counts)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
