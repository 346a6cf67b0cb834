"""Cost of a checkpoint to training: written at once, and in the background.

The product's own Trainer in one process; each round writes the same state twice, in turn: ``save`` at once (training
waits for all of it), and with async_save, where it waits for two parts: the start (metadata, and the copy of the state:
on the CPU a fork) and the completion (the last metadata, manifest, the name). Between them the steps go on: their time
is given beside that of undisturbed ones. Checksums are taken in both; verifying one is timed too. Default: 118M
parameters, fp32 with Adam's moments, 1.4 GB. The start's and the completion's fixed parts are some 0.15 s here, so
larger checkpoints have a smaller share.

Targets (--check): in the background training waits for less than 10% of the time of a write at once.
"""

import tempfile
import time
from collections import defaultdict
from pathlib import Path

import torch
from _common import add_device, arguments, finish, ratio, resolve_device, run_script, spread, table
from _data import VOCABULARY, RandomIds, run_config, write_random_dataset

from megatron.dmc.checkpoint import checksums, manifest
from megatron.dmc.config import StageConfig
from megatron.dmc.training import initialize

TARGET = 0.1


def main() -> None:
    start = time.perf_counter()
    parser = arguments(__doc__)
    add_device(parser)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--directory", type=Path, help="for checkpoints (default: a temporary one)")
    args = parser.parse_args()
    device, dtype = resolve_device(args)

    with tempfile.TemporaryDirectory(dir=args.directory) as directory:
        prefix, save = Path(directory) / "data", Path(directory) / "save"
        write_random_dataset(prefix, 10002 * 128, VOCABULARY)
        stage, one = StageConfig(stage="pretrain", train_iters=10000), dict(micro_batch_size=1, global_batch_size=1)
        kept = dict(save=str(save), keep_checkpoints=1)
        config = run_config(args, stage, prefix, 128, bf16=dtype == torch.bfloat16, **one, **kept)
        initialize.initialize(config)
        from megatron.dmc.training.loop import Trainer

        trainer = Trainer(config, RandomIds(VOCABULARY))
        trainer.logger.active = False
        iterators = trainer.iterators(trainer.train_data, 0)

        def timed(function, *more) -> float:
            begun = time.perf_counter()
            function(*more)
            return time.perf_counter() - begun

        times: dict[str, list[float]] = defaultdict(list)
        for round_ in range(-1, args.rounds):  # the first one warms up
            now: dict[str, float] = {"a step": timed(trainer.train_step, iterators)}
            trainer.checkpoints.background = False
            now["write at once"] = timed(trainer.save)
            now["a step"] = timed(trainer.train_step, iterators)
            trainer.checkpoints.background = True
            begun, steps, polls = time.perf_counter(), [], []
            now["in the background: start"] = timed(trainer.save)
            while trainer.checkpoints.pending is not None:
                polls.append(timed(trainer.finish_saving, False))
                if trainer.checkpoints.pending is not None:
                    steps.append(timed(trainer.train_step, iterators))
            now["in the background: the write itself"] = time.perf_counter() - begun
            now["in the background: completion"] = sum(polls)
            now["in the background: both"] = now["in the background: start"] + sum(polls)
            if steps:
                now["a step beside a write"] = sum(steps) / len(steps)
            path = manifest.resolve_checkpoint(save)
            known = manifest.read_manifest(path)
            begun = time.perf_counter()
            assert not checksums.damaged(path, known.crc32, known.files)
            now["verifying"] = time.perf_counter() - begun
            if round_ >= 0:
                for name, seconds in now.items():
                    times[name].append(seconds)
        size = sum(known.files.values())
        parameters = sum(p.numel() for p in trainer.models[0].parameters())
        initialize.shutdown()
    got = ratio(times["in the background: both"], times["write at once"])
    seconds = {name: spread(t) for name, t in times.items() if t}
    rows = [[name, s["median"] * 1e3, f"{s['q1'] * 1e3:.0f}-{s['q3'] * 1e3:.0f}"] for name, s in seconds.items()]
    print(f"{parameters / 1e6:.1f}M parameters, {dtype}, a checkpoint of {size / 1e9:.2f} GB")
    print(table(["", "ms", "quartiles"], rows))
    quartiles = f"quartiles {got['q1']:.1%}-{got['q3']:.1%}, {got['n']} rounds"
    print(f"training waits for {got['median']:.1%} of the time of a write at once ({quartiles})")
    missed = [f"{got['median']:.1%} of a write at once; the target is below {TARGET:.0%}"] * (got["median"] >= TARGET)
    figures = {"parameters": parameters, "bytes": size, "seconds": seconds, "ratio": got}
    finish(args, "checkpoint", figures, missed, start)


if __name__ == "__main__":
    run_script(main)
