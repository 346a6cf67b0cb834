"""A whole training step with DMC against the same step of the plain model.

Both run the product's own Trainer in one process, in turn: data, forward, backward, gradient norm, clipping, Adam. The
plain model is stage ``pretrain``: the same layers with flash attention and Megatron's rotation, no decisions, no
pooling.
Default: 20M parameters, S = 1024, 4 sequences per step, fp32 on CPU, bf16 on CUDA.

Targets (--check): the median of the per-round ratios is at most 1.25. The goal is 1.1.
"""

import tempfile
import time
from pathlib import Path

import torch
from _common import (
    add_device,
    arguments,
    finish,
    interleave,
    quartiles,
    ratio,
    resolve_device,
    run_script,
    spread,
    table,
)
from _data import VOCABULARY, RandomIds, run_config, write_random_dataset

from megatron.dmc.config import StageConfig
from megatron.dmc.training import initialize

TARGET = 1.25


def main() -> None:
    start = time.perf_counter()
    parser = arguments(__doc__)
    add_device(parser)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=384)
    parser.add_argument("--groups", type=int, help="KV heads; default: as many as query heads")
    parser.add_argument("--seq-length", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=60.0, help="of measuring")
    args = parser.parse_args()
    device, dtype = resolve_device(args)

    with tempfile.TemporaryDirectory() as directory:
        prefix = Path(directory) / "data"
        steps = 64
        write_random_dataset(prefix, (steps * args.batch + 2) * args.seq_length, VOCABULARY)
        stages = {
            "plain": StageConfig(stage="pretrain", train_iters=steps),
            "DMC": StageConfig(stage="retrofit", train_iters=steps, target_cr=2.0),
        }
        training = dict(micro_batch_size=args.batch, global_batch_size=args.batch, bf16=dtype == torch.bfloat16)
        runs = {name: run_config(args, stage, prefix, args.seq_length, **training) for name, stage in stages.items()}
        trainers = {}
        initialize.initialize(runs["plain"])
        from megatron.dmc.training.loop import Trainer

        for name, run in runs.items():
            trainer = Trainer(run, RandomIds(VOCABULARY))
            trainers[name] = trainer, trainer.iterators(trainer.train_data, 0)
        times = interleave(
            {name: lambda t=t, i=i: t.train_step(i) for name, (t, i) in trainers.items()},
            device,
            seconds=args.seconds,
            rounds=(7, steps - 4),
        )
        parameters = sum(p.numel() for p in trainers["DMC"][0].models[0].parameters())
        initialize.shutdown()
    got = ratio(times["DMC"], times["plain"])
    tokens = args.batch * args.seq_length
    ms = {name: spread(t) for name, t in times.items()}
    rows = [[name, s["median"], quartiles(s, ".0f"), tokens / s["median"] * 1e3] for name, s in ms.items()]
    print(f"{parameters / 1e6:.1f}M parameters, S {args.seq_length}, {args.batch} sequences per step, {dtype}")
    print(table(["step", "ms", "quartiles", "tokens/s"], rows))
    print(f"DMC / plain: {got['median']:.3f} (quartiles {quartiles(got, '.3f')}, {got['n']} rounds)")
    missed = [f"{got['median']:.3f} x the plain step; the target is {TARGET}"] if got["median"] > TARGET else []
    figures = {"parameters": parameters, "ms": ms, "ratio": got}
    finish(args, "train_step", figures, missed, start)


if __name__ == "__main__":
    run_script(main)
