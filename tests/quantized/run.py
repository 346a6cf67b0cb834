"""The engine over a cache of 8 bits under random schedules: against the models over the oracles' caches that round in
Python.

    python tests/quantized/run.py --schedules 100 --ranks

Each schedule is a small random model (plain, DMC or DMS), a type of the cache, and requests with shared prefixes and
several completions in a pool that they do not fit, aborted, preempted and forgotten at random. Completions are the
oracle's up to the first token that another one comes close to, integrity is checked after every step, and every page is
back in the end. --ranks: the models on two tensor-parallel ranks too. Not collected by pytest; tests/inference runs a
few of these.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from helpers.engines import Model, drain, ids_of
from helpers.exported import CASES, DMS_CASES, GROUPS, LAYERS
from helpers.quantized import KV_DTYPES, clear_answer, on_two_ranks

from megatron.dmc.inference import SamplingParams

NEW = 16  # tokens of a completion


def schedule(model: Model, name: str, rng: random.Random) -> int:
    """Run one schedule; returns the number of tokens that were compared."""
    engine = model.engine(
        kv_cache_dtype=name,
        num_pages=LAYERS * GROUPS * rng.randint(9, 14),
        max_num_seqs=rng.randint(1, 6),
        max_num_batched_tokens=rng.randint(6, 64),
        max_prefix_snapshots=rng.randint(0, 4),
        prefix_cache_min_tokens=rng.choice((1, 8, 16)),
        block_size=16,
    )
    asked: dict[str, tuple[int, ...]] = {}
    aborted: set[str] = set()
    found: dict[tuple[str, int], list] = {}

    def take(outputs: list) -> None:
        for output in outputs:
            found.setdefault((output.request_id, output.index), []).append(output)
        engine.cache.check_integrity()

    for _ in range(40):
        action = rng.choice(("add", "step", "step", "step", "preempt", "abort", "reset"))
        if action == "add" and len(asked) < 8:
            request = str(len(asked))
            shared = model.prompt(40)[: rng.choice((0, 16, 33, 40))]
            asked[request] = (*shared, *model.prompt(rng.choice((1, 9, 20)), 50 + rng.randint(0, 1)))
            params = SamplingParams(temperature=0, max_tokens=NEW, n=rng.randint(1, 3), ignore_eos=True)
            engine.add_request(request, asked[request], params, cache_salt=rng.choice("xxy"))
        elif action == "step":
            take([output for _ in range(rng.randint(1, 8)) for output in engine.step()])
        elif action == "preempt" and engine.scheduler.running:
            engine.scheduler.preempt(rng.choice(list(engine.scheduler.running)))
        elif action == "abort" and asked and rng.random() < 0.3:
            request = rng.choice(list(asked))
            take(engine.abort(request))
            aborted.add(request)
        elif action == "reset":
            engine.reset_prefix_cache()
    for key, outputs in drain(engine).items():
        found.setdefault(key, []).extend(outputs)
    compared = 0
    for (request, _), outputs in found.items():
        want, got = clear_answer(model, name, asked[request], NEW), ids_of(outputs)
        assert request in aborted or len(got) == NEW, outputs[-1].error
        length = min(len(want), len(got))
        assert got[:length] == want[:length]
        compared += length
    return compared


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schedules", type=int, default=100, help="number of random schedules")
    parser.add_argument("--first", type=int, default=0, help="number of the first one")
    parser.add_argument("--ranks", action="store_true", help="two tensor-parallel ranks too, once for every model")
    args = parser.parse_args()
    torch.set_num_threads(1)
    cases = [*CASES, *DMS_CASES]
    with tempfile.TemporaryDirectory() as folder:
        models: dict[str, Model] = {}
        for number in range(args.first, args.first + args.schedules):
            began, case, name = time.perf_counter(), cases[number % len(cases)], list(KV_DTYPES)[number // 2 % 2]
            if case not in models:
                models[case] = Model(Path(folder) / str(number), case)
                if args.ranks:
                    on_two_ranks(models[case], name)
            compared = schedule(models[case], name, random.Random(number))
            print(f"{number}: {case}, {name}: {compared} tokens, {time.perf_counter() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
