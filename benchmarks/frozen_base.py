"""A training step of DMS adapters on a frozen base against a whole retrofit step of DMC on the same model.

All run the product's own Trainer in one process, in turn: data, forward, backward, gradient norm, clipping, Adam. The
adapters are distilled from the frozen model itself, which takes a second forward pass. DMC trains all weights, with the
language-model loss, and once more distilled from a copy of the original model.

Memory beyond weights is what a step needs besides the weights of student and teacher: gradients, optimizer state, and
the largest sum of what is allocated during the step.
Default: the shape of SmolLM2-135M, S = 512, 4 sequences per step, bf16.

Targets (--check): the adapters' step takes at most 0.70 of the time and 0.35 of the memory of the distilled DMC step.
"""

import dataclasses
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
from _common import (
    add_device,
    arguments,
    finish,
    interleave,
    peak_bytes,
    ratio,
    resolve_device,
    run_script,
    spread,
    table,
)
from _data import RandomIds, write_random_dataset

from megatron.dmc.config import DataConfig, DMCConfig, ModelConfig, RunConfig, StageConfig, TrainingConfig
from megatron.dmc.training import initialize

TIME, MEMORY = 0.70, 0.35
ADAPTERS = DMCConfig(method="dms", decision_source="adapter", decision_scale=100.0, window=64)
STEPS = 64


def run_config(args, prefix: Path, bf16: bool) -> RunConfig:
    """The original model; ``dataclasses.replace`` makes the other runs of it."""
    return RunConfig(
        model=ModelConfig(
            num_layers=args.layers,
            hidden_size=args.hidden,
            ffn_hidden_size=args.hidden * 8 // 3,
            num_attention_heads=args.hidden // 64,
            num_query_groups=args.groups,
            kv_channels=64,
            vocab_size=args.vocabulary,
            max_position_embeddings=args.seq_length,
            untie_embeddings_and_output_weights=False,
        ),
        stage=StageConfig(stage="pretrain", train_iters=STEPS),
        data=DataConfig(data_path=[str(prefix)], tokenizer="random", seq_length=args.seq_length),
        training=TrainingConfig(micro_batch_size=args.micro_batch, global_batch_size=args.batch, bf16=bf16),
    )


def state_bytes(trainer) -> int:
    """Bytes of gradients and of the optimizer's state, with its fp32 copies of bf16 weights."""
    buffers = [buffer for chunk in trainer.chunks for buffer in chunk.buffers]
    weights = {p.data_ptr() for model in trainer.models for p in model.parameters()}
    total = sum(buffer.grad_data.nbytes for buffer in buffers)
    for part in getattr(trainer.optimizer, "chained_optimizers", [trainer.optimizer]):
        own = [p for group in part.optimizer.param_groups for p in group["params"] if p.data_ptr() not in weights]
        own += [x for state in part.optimizer.state.values() for x in state.values() if isinstance(x, torch.Tensor)]
        total += sum(x.nbytes for x in own)
    return total


def main() -> None:
    start = time.perf_counter()
    parser = arguments(__doc__)
    add_device(parser)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--groups", type=int, default=3, help="KV heads (default: %(default)s)")
    parser.add_argument("--vocabulary", type=int, default=49152)
    parser.add_argument("--seq-length", type=int, default=512)
    parser.add_argument("--batch", type=int, default=4, help="sequences per step (default: %(default)s)")
    parser.add_argument("--micro-batch", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=60.0, help="of measuring")
    parser.set_defaults(dtype="bfloat16")
    args = parser.parse_args()
    device, dtype = resolve_device(args)

    with tempfile.TemporaryDirectory() as directory:
        prefix, teacher = Path(directory) / "data", Path(directory) / "teacher"
        write_random_dataset(prefix, (STEPS * args.batch + 2) * args.seq_length, args.vocabulary)
        original = run_config(args, prefix, dtype == torch.bfloat16)
        initialize.initialize(original)
        from megatron.dmc.training.loop import Trainer

        settings = original.training
        saving = dataclasses.replace(original, training=dataclasses.replace(settings, save=str(teacher)))
        saver = Trainer(saving, RandomIds(args.vocabulary))
        saver.save()
        del saver
        retrofit = dataclasses.replace(
            original, stage=StageConfig(stage="retrofit", train_iters=STEPS, target_cr=4.0), dmc=DMCConfig()
        )
        taught, frozen = (
            dataclasses.replace(settings, **more) for more in (dict(distill_from=str(teacher)), dict(freeze_base=True))
        )
        runs = {
            "DMC": retrofit,
            "DMC, distilled": dataclasses.replace(retrofit, training=taught),
            "adapters": dataclasses.replace(retrofit, training=frozen, dmc=ADAPTERS),
        }
        trainers = {name: Trainer(run, RandomIds(args.vocabulary)) for name, run in runs.items()}
        steps = {
            name: partial(trainer.train_step, trainer.iterators(trainer.train_data, 0))
            for name, trainer in trainers.items()
        }
        times = interleave(steps, device, seconds=args.seconds, rounds=(3, STEPS - 5))
        memory = {name: state_bytes(trainers[name]) + peak_bytes(step, device) for name, step in steps.items()}
        initialize.shutdown()

    whole, adapters = "DMC, distilled", "adapters"
    got, share = ratio(times[adapters], times[whole]), memory[adapters] / memory[whole]
    tokens = args.batch * args.seq_length
    rows = [
        [name, s["median"], f"{s['q1']:.0f}-{s['q3']:.0f}", tokens / s["median"] * 1e3, memory[name] / 2**20]
        for name, s in ((name, spread(t)) for name, t in times.items())
    ]
    parameters = sum(p.numel() for p in trainers["DMC"].models[0].parameters())
    trained = sum(p.numel() for p in trainers[adapters].models[0].parameters() if p.requires_grad)
    print(
        f"{parameters / 1e6:.1f}M parameters, {trained} in adapters, S {args.seq_length}, {args.batch} sequences per "
        f"step, {dtype}"
    )
    print(table(["step", "ms", "quartiles", "tokens/s", "MiB beyond weights"], rows))
    print(f"adapters / DMC, distilled: time {got['median']:.3f} (quartiles {got['q1']:.3f}-{got['q3']:.3f}), ", end="")
    print(f"memory {share:.3f}; / DMC: {ratio(times[adapters], times['DMC'])['median']:.3f}", end=", ")
    print(f"{memory[adapters] / memory['DMC']:.3f}")
    missed = [
        f"{value:.3f} x the {what} of the distilled DMC step; the target is {most}"
        for value, what, most in ((got["median"], "time", TIME), (share, "memory", MEMORY))
        if value > most
    ]
    figures = {"parameters": parameters, "ms": {n: spread(t) for n, t in times.items()}, "bytes": memory, "ratio": got}
    finish(args, "frozen_base", figures, missed, start)


if __name__ == "__main__":
    run_script(main)
