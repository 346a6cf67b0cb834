#!/usr/bin/env python3
"""Plan a retrofit and its serving before any GPU is taken: does it fit, how long does it take, what else would do?

    python tools/plan.py llama2-70b --gpus 64 --tp 8 --pp 4
    python tools/plan.py path/to/hf_model --gpus 8 --tp 4 --sequence-length 8192 --recompute selective

The model is a name among ``examples/dmc/configs``, a YAML or JSON file of ours, or a Hugging Face ``config.json`` (or
its directory). What is not given comes from that file. Exit status: 0 the plan fits, 2 it cannot work or does not fit;
the nearest layouts that do are listed.

Everything is arithmetic (``_estimates.py``): memory figures are estimates; formulas and sources are in docs/plan.md. GB
is 1e9 bytes.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Optional

try:
    import megatron.dmc  # noqa: F401
except ImportError:  # run from a checkout that is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from _estimates import GB, PARTS, Fit, bubble, plan, powers_of_two, recomputed_flops, serving, training_memory

from megatron.dmc.config import RunConfig, load_file

CONFIGS = Path(__file__).resolve().parent.parent / "examples" / "dmc" / "configs"
# Layouts


def problem(run: RunConfig, gpus: int, fit: Fit) -> Optional[str]:
    """Why a layout cannot work or does not fit; None when it does."""
    try:
        run.check(gpus)
    except ValueError as error:
        return str(error)
    need = training_memory(run, gpus, fit)["needed"]
    if need > fit.gpu_memory:
        there = fit.gpu_memory / GB
        return f"an estimated {need / GB:.1f} GB per GPU are needed; there are {there:.1f} GB (--gpu-memory-gb)"
    return None


def recomputation(run: RunConfig) -> str:
    """As the flags say it."""
    p = run.parallel
    if p.recompute_granularity == "selective":
        return "selective:" + ",".join(p.recompute_modules)
    return p.recompute_granularity or "none"


RECOMPUTE = {"none": 0, "selective:core_attn": 1, "selective:mlp": 1.5, "selective:core_attn,mlp": 2, "full": 3}


def with_layout(run: RunConfig, **parallel: Any) -> RunConfig:
    """A copy with other layout fields; ``recompute`` as :func:`recomputation` says it, ``micro_batch`` in sequences."""
    recompute, micro_batch = parallel.pop("recompute", None), parallel.pop("micro_batch", None)
    if recompute is not None:
        granularity, _, modules = recompute.partition(":")
        parallel["recompute_granularity"] = None if granularity == "none" else granularity
        if granularity == "selective":
            parallel["recompute_modules"] = (modules or "core_attn").split(",")
    training = (
        dataclasses.replace(run.training, micro_batch_size=micro_batch) if micro_batch is not None else run.training
    )
    return dataclasses.replace(run, parallel=dataclasses.replace(run.parallel, **parallel), training=training)


def _distance(asked: RunConfig, gpus: int, other: RunConfig, other_gpus: int) -> float:
    """Doublings between two layouts; changing GPUs weighs most, then TP and PP, then what can be turned freely."""

    def doublings(a: float, b: float) -> float:
        return abs(math.log2(max(a, 1)) - math.log2(max(b, 1)))

    a, o = asked.parallel, other.parallel
    return (
        4 * doublings(gpus, other_gpus)
        + 2 * doublings(a.tensor_model_parallel_size, o.tensor_model_parallel_size)
        + 2 * doublings(a.pipeline_model_parallel_size, o.pipeline_model_parallel_size)
        + doublings(a.virtual_pipeline_model_parallel_size or 1, o.virtual_pipeline_model_parallel_size or 1)
        + doublings(asked.training.micro_batch_size, other.training.micro_batch_size)
        + abs(RECOMPUTE.get(recomputation(asked), 1) - RECOMPUTE.get(recomputation(other), 1))
        + (a.use_distributed_optimizer != o.use_distributed_optimizer)
    )


def candidates(run: RunConfig, gpus: int, fit: Fit) -> Iterator[RunConfig]:
    """Layouts of ``gpus`` GPUs worth looking at; TP stays within a node, SP goes with it."""
    layers = run.model.num_layers
    micro = sorted({run.training.micro_batch_size, *powers_of_two(run.training.micro_batch_size)})
    for tp in powers_of_two(min(fit.gpus_per_node, run.model.kv_heads)):
        for pp in (n for n in range(1, layers + 1) if layers % n == 0 and gpus % (tp * n) == 0):
            asked_v = run.parallel.virtual_pipeline_model_parallel_size
            chunks = {None, *(v for v in (2, 4, asked_v) if v and v > 1 and pp > 1 and layers % (pp * v) == 0)}
            kinds = {*RECOMPUTE, recomputation(run)}
            shards = {run.parallel.use_distributed_optimizer, True}
            for v, recompute, b, shard in itertools.product(chunks, kinds, micro, shards):
                yield with_layout(
                    run,
                    tensor_model_parallel_size=tp,
                    pipeline_model_parallel_size=pp,
                    virtual_pipeline_model_parallel_size=v,
                    sequence_parallel=tp > 1,
                    use_distributed_optimizer=shard,
                    recompute=recompute,
                    micro_batch=b,
                )


def suggest(run: RunConfig, gpus: int, fit: Fit, count: int = 5) -> list[tuple[RunConfig, int]]:
    """The nearest layouts that work and fit, nearest first:
    on as many GPUs, or if none does, on other numbers of them.
    """
    try:
        with_layout(
            run,
            tensor_model_parallel_size=1,
            pipeline_model_parallel_size=1,
            virtual_pipeline_model_parallel_size=None,
            sequence_parallel=False,
            use_distributed_optimizer=True,
            recompute="none",
            micro_batch=1,
        ).check()
    except ValueError:
        return []  # it is not the layout
    for numbers in (
        [gpus],
        sorted({*powers_of_two(1024), *(fit.gpus_per_node * n for n in (3, 5, 6, 10, 12, 20, 24, 40))}),
    ):
        found: dict[tuple, tuple] = {}  # the nearest of each (GPUs, TP, PP): a list of variants of one would help less
        for number in numbers:
            for other in candidates(run, number, fit) if number > 0 else ():
                p, distance = other.parallel, _distance(run, gpus, other, number)
                key = (number, p.tensor_model_parallel_size, p.pipeline_model_parallel_size)
                # The memory is only reckoned for what could get onto the list.
                if (key not in found or distance <= found[key][0][0]) and problem(other, number, fit) is None:
                    cost = (distance, recomputed_flops(other), bubble(other, number))
                    if key not in found or cost < found[key][0]:
                        found[key] = (cost, other, number)
        if found:
            return [(other, number) for _, other, number in sorted(found.values(), key=lambda entry: entry[0])[:count]]
    return []


def flags(run: RunConfig, gpus: int) -> str:
    """The layout as this tool's arguments."""
    p = run.parallel
    v = p.virtual_pipeline_model_parallel_size
    return (
        f"--gpus {gpus} --tp {p.tensor_model_parallel_size} --pp {p.pipeline_model_parallel_size}"
        + (f" --vp {v}" if v else "")
        + f" --micro-batch {run.training.micro_batch_size} --recompute {recomputation(run)}"
        + ("" if p.use_distributed_optimizer else " --no-distributed-optimizer")
    )


# The command line


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise ValueError(f"{message}; --help lists all flags")


def build_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="plan.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "model", help=f"{', '.join(shipped())}; a configuration file; a Hugging Face config.json or its directory"
    )
    layout = parser.add_argument_group("layout (default: the configuration's)")
    layout.add_argument(
        "--gpus", type=int, help="default: TP x PP x DP when --dp is given, else one node or what TP x PP needs"
    )
    layout.add_argument("--tp", type=int, help="tensor parallel size")
    layout.add_argument("--pp", type=int, help="pipeline parallel size")
    layout.add_argument("--dp", type=int, help="data parallel size")
    layout.add_argument("--vp", type=int, help="model chunks per pipeline stage; with --pp the default is 1")
    layout.add_argument("--sequence-length", type=int, metavar="TOKENS")
    layout.add_argument("--micro-batch", type=int, metavar="SEQUENCES")
    layout.add_argument("--global-batch", type=int, metavar="SEQUENCES")
    layout.add_argument("--recompute", metavar="KIND", help="none, selective, selective:core_attn,mlp, full")
    layout.add_argument(
        "--sequence-parallel", action=argparse.BooleanOptionalAction, help="with --tp the default is on"
    )
    layout.add_argument("--distributed-optimizer", action=argparse.BooleanOptionalAction)
    time = parser.add_argument_group("training")
    time.add_argument(
        "--target-cr", type=float, default=4.0, help="compression ratio of the retrofit (default: %(default)s)"
    )
    time.add_argument(
        "--mfu", type=float, default=0.40, help="model FLOPs over peak FLOPs, end to end (default: %(default)s)"
    )
    time.add_argument(
        "--peak-tflops", type=float, default=989.0, help="of a GPU, dense bf16 (default: %(default)s, H100 SXM)"
    )
    time.add_argument("--gpu-memory-gb", type=float, default=80.0, help="per GPU, 1e9 bytes (default: %(default)s)")
    time.add_argument(
        "--overhead-gb", type=float, default=4.0, help="context, NCCL, fragmentation (default: %(default)s)"
    )
    time.add_argument("--gpus-per-node", type=int, default=8, help="suggested TP stays within (default: %(default)s)")
    serve = parser.add_argument_group("serving")
    serve.add_argument("--serving-tp", type=int, help="default: the least that leaves half of the memory to the cache")
    serve.add_argument("--context", type=int, metavar="TOKENS", help="of a sequence (default: the sequence length)")
    serve.add_argument("--page-size", type=int, nargs="+", default=[16, 64], metavar="SLOTS", help="default: 16 64")
    serve.add_argument(
        "--gpu-memory-utilization", type=float, default=0.9, help="for weights and cache (default: %(default)s)"
    )
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the figures, bytes and fractions")
    return parser


def shipped() -> list[str]:
    return sorted(path.stem for path in CONFIGS.glob("*.yaml"))


def load_model(name: str) -> RunConfig:
    """A shipped name, a configuration file of ours, or a Hugging Face config.json (or directory). Raises
    ``ValueError``.
    """
    path = Path(name)
    if name in shipped():
        return RunConfig.from_dict(load_file(CONFIGS / f"{name}.yaml"))
    if not path.exists():
        raise ValueError(f"model {name} is no file and none of the shipped ones: {', '.join(shipped())}")
    path = path / "config.json" if path.is_dir() else path
    data = load_file(path)
    if path.suffix != ".json" or not isinstance(data, dict) or isinstance(data.get("model"), dict):
        return RunConfig.from_dict(data)
    from megatron.dmc.checkpoint.mapping import from_hf_config

    run = RunConfig(model=from_hf_config(data))
    run.parallel.use_distributed_optimizer = run.training.bf16 = True
    run.data.seq_length = min(run.data.seq_length, run.model.max_position_embeddings)
    return run


def resolve(args: argparse.Namespace) -> tuple[RunConfig, int]:
    """The run and its number of GPUs. Raises ``ValueError`` for values that make no sense in any layout."""
    for name, value in vars(args).items():
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, (int, float)) and not isinstance(number, bool):
                zero = name == "overhead_gb"
                if not (math.isfinite(number) and (number > 0 or (zero and number == 0))):
                    raise ValueError(f"--{name.replace('_', '-')} is {number}; it must be positive")
    for name in ("mfu", "gpu_memory_utilization"):
        if getattr(args, name) > 1:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(args, name)}; it is a fraction, at most 1")
    if args.target_cr <= 1:
        raise ValueError(f"--target-cr is {args.target_cr:g}; a retrofit compresses, so use more than 1")
    run = load_model(args.model)
    layout: dict[str, Any] = {"micro_batch": args.micro_batch}
    if args.recompute is not None:
        kind, colon, modules = args.recompute.partition(":")
        if kind not in ("none", "selective", "full") or (colon and (kind != "selective" or not modules)):
            raise ValueError(
                f"--recompute {args.recompute!r} is unknown; use none, selective, selective:core_attn,mlp or full"
            )
        layout["recompute"] = args.recompute
    if args.tp is not None:
        layout.update(tensor_model_parallel_size=args.tp, sequence_parallel=args.tp > 1)
    if args.pp is not None:
        layout.update(pipeline_model_parallel_size=args.pp, virtual_pipeline_model_parallel_size=None)
    if args.vp is not None:
        layout["virtual_pipeline_model_parallel_size"] = args.vp if args.vp > 1 else None
    if args.sequence_parallel is not None:
        layout["sequence_parallel"] = args.sequence_parallel
    if args.distributed_optimizer is not None:
        layout["use_distributed_optimizer"] = args.distributed_optimizer
        layout["overlap_param_gather"] = run.parallel.overlap_param_gather and args.distributed_optimizer
    run = with_layout(run, **layout)
    run.stage = dataclasses.replace(
        run.stage, stage="retrofit", target_cr=args.target_cr, train_iters=None, start_cr=None
    )
    run.data = dataclasses.replace(run.data, seq_length=args.sequence_length or run.data.seq_length)
    # Checkpoints are not planned, and an interval without a directory would be refused.
    run.training = dataclasses.replace(
        run.training, save_interval=None, global_batch_size=args.global_batch or run.training.global_batch_size
    )
    group = run.parallel.tensor_model_parallel_size * run.parallel.pipeline_model_parallel_size
    gpus = args.gpus or (group * args.dp if args.dp else max(group, args.gpus_per_node))
    if args.dp and gpus != group * args.dp:
        raise ValueError(
            f"--gpus {gpus} is not TP x PP x DP = {group} x {args.dp} = {group * args.dp}; leave one of them out"
        )
    return run, gpus


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Aligned columns, the first to the left, the others to the right."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = [
        "  ".join(cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths)))
        for row in cells
    ]
    return "\n".join("  " + line.rstrip() for line in lines)


def training_report(run: RunConfig, gpus: int, fit: Fit, figures: dict[str, Any]) -> str:
    p, memory = run.parallel, figures["memory"]
    tp, pp = p.tensor_model_parallel_size, p.pipeline_model_parallel_size
    v = p.virtual_pipeline_model_parallel_size or 1
    worst, stages = memory["worst_stage"], memory["stages"]
    shown = sorted({0, 1, worst, pp - 2, pp - 1} & set(range(pp))) if pp > 8 else range(pp)
    rows = [
        [
            f"{rank}{' <- worst' if rank == worst and pp > 1 else ''}",
            *(f"{stages[rank][part] / GB:.1f}" for part in PARTS),
            f"{memory['totals'][rank] / GB:.1f}",
        ]
        for rank in shown
    ]
    times = dict(figures["stages"])
    times["all"] = {key: sum(f[key] for f in times.values()) for key in ("steps", "tokens", "days")}
    stage_rows = [
        [name, f"{f['steps']:,}", f"{f['tokens'] / 1e9:.1f}", f"{f['days']:.1f}"] for name, f in times.items()
    ]
    batch = run.training.global_batch_size
    sharing = "optimizer sharded over DP" if p.use_distributed_optimizer else "optimizer whole on every rank"
    return "\n".join(
        [
            f"model       {figures['parameters']['total'] / 1e9:.2f}B parameters: "
            + ", ".join(
                f"{name} {n / 1e9:.2f}B" for name, n in figures["parameters"].items() if name != "total" and n > 5e6
            ),
            f"layout      {gpus} GPUs = TP {tp}{' with SP' if p.sequence_parallel else ''} x PP {pp}"
            + (f" ({v} chunks each)" if v > 1 else "")
            + f" x DP {figures['dp']}; {sharing}; recomputation {recomputation(run)}",
            f"batch       {batch} sequences x {run.data.seq_length} = {figures['tokens_per_step']:,} tokens/step"
            f"; {figures['micro_batches']} micro-batches of {run.training.micro_batch_size} per rank",
            f"bubble      {figures['bubble']:.3f} of the pipeline's ideal time",
            "\nEstimated memory per GPU, GB, by pipeline stage, in retrofit and finetune "
            f"(zero_out: at most {memory['zero_out'] / GB:.1f})",
            table(["stage", *PARTS, "total"], rows),
            f"  the worst GPU needs {memory['needed'] / GB:.1f} of {fit.gpu_memory / GB:.1f} GB",
            f"\nTime at {figures['mfu']:.0%} MFU of {figures['peak_flops'] / 1e12:g} TFLOP/s per GPU "
            f"({figures['tokens_per_second_per_gpu']:,.0f} tokens/s/GPU; "
            f"hardware FLOPs {figures['hardware_to_model_flops']:.2f} x the model's)",
            table(["stage", "steps", "B tokens", "days"], stage_rows),
        ]
    )


def serving_report(s: dict[str, Any]) -> str:
    rows = [
        [
            f"{r['cr']}x",
            r["page_size"],
            f"{r['kv_bytes_per_token'] / 1024:.0f}",
            f"{r['waste']:.1%}",
            f"{r['table_bytes'] / 2**20:.2f}",
            r["sequences"],
        ]
        for r in s["rows"]
    ]
    return (
        f"\nServing on {s['tp']} GPU{'s' * (s['tp'] > 1)} in bf16: {s['weights'] / GB:.1f} GB of weights and "
        f"{s['cache'] / GB:.1f} GB for the cache on each; sequences of {s['context']} tokens\n"
        + table(["CR", "page", "KV KiB/token", "page waste", "page table MiB/seq", "sequences"], rows)
    )


def main(argv: Optional[list[str]] = None) -> int:
    """Run with command-line arguments; returns the exit status."""
    try:
        args = build_parser().parse_args(argv)
        run, gpus = resolve(args)
        fit = Fit(args.gpu_memory_gb * GB, args.overhead_gb * GB, args.gpus_per_node)
        wrong, figures = problem(run, gpus, fit), {}
        try:
            run.check(gpus)
        except ValueError:
            pass
        else:
            figures = plan(run, gpus, fit, args.target_cr, args.peak_tflops * 1e12, args.mfu)
            print(training_report(run, gpus, fit, figures))
            tp = run.parallel.tensor_model_parallel_size
            if tp > fit.gpus_per_node:
                print(f"  note: TP {tp} spans nodes of {fit.gpus_per_node} GPUs, which is slow")
        nearest = suggest(run, gpus, fit) if wrong else []
        if not wrong:
            figures["serving"] = serving(
                run,
                fit,
                tp=args.serving_tp,
                context=args.context or run.data.seq_length,
                pages=args.page_size,
                utilization=args.gpu_memory_utilization,
            )
            print(serving_report(figures["serving"]))
        if args.json and figures:
            figures |= {"fits": not wrong, "nearest": [flags(*other) for other in nearest]}
            args.json.write_text(json.dumps(figures, indent=1) + "\n")
    except (ValueError, OSError) as error:
        print(f"plan.py: error: {error}", file=sys.stderr)
        return 2
    if wrong:
        print(f"plan.py: error: {wrong}", file=sys.stderr)
        for other, number in nearest:
            need = training_memory(other, number, fit)["needed"]
            print(
                f"  works: {flags(other, number)}   ({need / GB:.1f} GB, bubble {bubble(other, number):.2f})",
                file=sys.stderr,
            )
    return 2 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
