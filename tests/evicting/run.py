"""The engine with models that evict (DMS), in every source of decisions, window and group size: against the model over
caches of Python lists, and against teacher-forced hard decisions.

    python tests/evicting/run.py --ranks

Each case is a small random model and a prompt that is longer than its window. Log-probabilities of every position
within 1e-4 and the same greedy tokens: with the prompt whole, in chunks of any size and token by token, as a hit of the
prefix cache and a miss, forked in mid-window, preempted, and (--ranks) on two tensor-parallel ranks. Integrity is
checked after every step, and every page is back in the end. Not collected by pytest; tests/inference runs a few of
these.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from helpers.engines import Model, drain, full_logprobs, ids_of, live_slots
from helpers.exported import GROUPS, LAYERS, VOCABULARY

from megatron.dmc.evaluation.teacher_forced import TeacherForced
from megatron.dmc.inference import LLM, SamplingParams

SOURCES = [
    {"source": source, "about": about, "per": per}
    for source, about, per in itertools.product(("key", "query", "adapter"), ("previous", "self"), ("head", "layer"))
    if per == "head" or source == "adapter"
]
WINDOWS, GROUP_SIZES = (1, 2, 5, 16, 33, 64, 128, 256, 512), (1, 2, 3, 4, 8)
NEW = 12  # tokens of an answer
SCORED = SamplingParams(temperature=0, max_tokens=NEW, logprobs=VOCABULARY, prompt_logprobs=VOCABULARY, ignore_eos=True)


def make(directory: Path, number: int) -> tuple[Model, int]:
    """A model that evicts about half of its tokens, and the length of its prompt."""
    source = SOURCES[number % len(SOURCES)]
    window = WINDOWS[number // len(SOURCES) % len(WINDOWS)]
    qk_norm = number % 3 == 1
    settings = {
        "bias": 0.0,
        "window": window,
        "g": GROUP_SIZES[number % len(GROUP_SIZES)],
        "qk_norm": qk_norm,
        "qkv_bias": not qk_norm and number % 4 == 0,
        "seed": number,
        "dms": source,
        "positions": 1024,
    }
    return Model(directory, settings=settings), window + 60 + number % 37


def check(model: Model, length: int, rng: random.Random) -> None:
    prompt = model.prompt(length)
    answer = model.answer(prompt, NEW)
    whole = (*prompt, *answer[:-1])
    wanted = model.logprobs(whole)
    forced = TeacherForced.load(model.path).score(torch.tensor([[*whole, answer[-1]]])).log_prob[0]
    compare(forced, wanted[range(len(whole)), [*whole[1:], answer[-1]]])
    for chunk in (length, rng.randint(2, length), rng.randint(2, 40), 1):
        engine = model.engine(max_num_seqs=1, max_num_batched_tokens=chunk, block_size=rng.choice((16, 32, 64)))
        engine.add_request("a", prompt, SCORED)
        (outputs,) = drain(engine).values()
        assert ids_of(outputs) == answer
        compare(full_logprobs(outputs), wanted)
    shared(model, prompt, rng)
    preempted(model, length)


def compare(got: torch.Tensor, wanted: torch.Tensor) -> None:
    error = float((got - wanted).abs().max())
    assert error <= 1e-4, f"{error:.1e}"


def shared(model: Model, prompt: tuple[int, ...], rng: random.Random) -> None:
    """Several answers of one prompt, then prompts that part from it in its window: all from its snapshots."""
    engine = model.engine(max_num_batched_tokens=rng.randint(8, 300), prefix_cache_min_tokens=4)
    params = SamplingParams(temperature=0, max_tokens=NEW, n=3, ignore_eos=True)
    for cut in (len(prompt), len(prompt), len(prompt) - 7, len(prompt) - rng.randint(1, 40)):
        asked = (*prompt[:cut], *model.prompt(9, cut)) if cut < len(prompt) else prompt
        engine.add_request("a", asked, params)
        found: dict[int, list] = {}
        while engine.has_unfinished():
            for output in engine.step():
                found.setdefault(output.index, []).append(output)
            engine.cache.check_integrity()
            assert engine.cache.live_slots() == live_slots(engine)
        assert all(ids_of(outputs) == model.answer(asked, NEW) for outputs in found.values()) and len(found) == 3
    assert engine.stats().prefix_cache_hits > 0
    drain(engine)


def preempted(model: Model, length: int) -> None:
    """Three prompts in a pool for about one and a half."""
    prompts = [model.prompt(length + seed, seed) for seed in (1, 2, 3)]
    plain = -(-(length + NEW + 3) // 16) + 3
    engine = model.engine(
        num_pages=plain * LAYERS * GROUPS * 3 // 2,
        max_num_seqs=3,
        max_num_batched_tokens=64,
        enable_prefix_caching=False,
    )
    for seed, prompt in enumerate(prompts):
        engine.add_request(str(seed), prompt, SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True))
    found = drain(engine)
    for seed, prompt in enumerate(prompts):
        assert ids_of(found[str(seed), 0]) == model.answer(prompt, NEW)


def on_two_ranks(model: Model, length: int) -> None:
    prompts = [list(model.prompt(n, seed)) for seed, n in enumerate((length, 14, 3, length - 20))]
    worker = Path(__file__).resolve().parent.parent / "inference" / "engine_worker.py"
    settings = {"max_num_batched_tokens": 24, "max_num_seqs": 3, "prefix_cache_min_tokens": 8}
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [sys.executable, *launch, str(worker), model.path, json.dumps(prompts), "2", json.dumps(settings)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    line = next(line for line in done.stdout.splitlines() if line.startswith("ANSWERS "))
    first, second = json.loads(line.removeprefix("ANSWERS "))
    assert first == second and first["free"]
    one = LLM(model.path)
    for prompt, got, slots in zip(prompts, first["tokens"], first["slots"]):
        alone = one.generate(prompt, SamplingParams(temperature=0, max_tokens=24, logprobs=0))[0].outputs[0]
        assert got == alone.token_ids and slots == [list(layer) for layer in alone.cache.slots]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--first", type=int, default=0, help="number of the first model")
    parser.add_argument("--stop", type=int, default=len(SOURCES) * len(WINDOWS), help="number after the last one")
    parser.add_argument(
        "--step", type=int, default=1, help="distance of two; 9 runs every source and every window once"
    )
    parser.add_argument("--ranks", action="store_true", help="each on two tensor-parallel ranks too")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for number in range(args.first, args.stop, args.step):
        began = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            model, length = make(Path(folder) / "model", number)
            check(model, length, random.Random(number))
            if args.ranks:
                on_two_ranks(model, length)
        c = model.exported.decision
        print(
            f"{number}: {c.decision_source}, {c.decision_about}, per {c.decision_per}, window {c.window}, "
            f"g {model.exported.g}, {length} tokens: {time.perf_counter() - began:.0f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
