"""``dmc plan``: memory, time and serving capacity of a retrofit, and the layouts that would fit.

Everything is arithmetic: memory figures are estimates; formulas and sources are in docs/plan.md. GB is 1e9 bytes.
"""

import dataclasses
import json
import math
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

from megatron.dmc import flags
from megatron.dmc.config import RunConfig, load_file
from megatron.dmc.planning.estimates import GB, PARTS, Fit, bubble, plan, serving, training_memory
from megatron.dmc.planning.layouts import as_flags, problem, recomputation, suggest, with_layout


@dataclass
class PlanConfig:
    """Model, layout and hardware of a plan."""

    model: str = field(metadata={"flags": ("model",), "metavar": "MODEL"})
    """Shipped configuration (such as llama2-7b), configuration file, Hugging Face config.json or its directory, or
    directory of a checkpoint."""
    json: Optional[Path] = field(default=None, metadata={"metavar": "FILE", "type": flags.new_file})
    """File to write all figures to, in bytes and fractions."""

    gpus: Optional[int] = field(default=None, metadata={"group": "layout"})
    """Number of GPUs. Default: TP x PP x DP when --dp is given, else one node or what TP x PP needs."""
    tp: Optional[int] = None
    """Tensor parallel size. Default: the configuration's."""
    pp: Optional[int] = None
    """Pipeline parallel size. Default: the configuration's."""
    dp: Optional[int] = None
    """Data parallel size. Default: what --gpus leaves."""
    vp: Optional[int] = None
    """Model chunks per pipeline stage. Default: 1 with --pp, else the configuration's."""
    sequence_length: Optional[int] = field(default=None, metadata={"metavar": "TOKENS"})
    """Tokens per sequence. Default: the configuration's."""
    micro_batch: Optional[int] = field(default=None, metadata={"metavar": "SEQUENCES"})
    """Sequences per forward pass and data-parallel rank. Default: the configuration's."""
    global_batch: Optional[int] = field(default=None, metadata={"metavar": "SEQUENCES"})
    """Sequences per optimizer step, over all ranks. Default: the configuration's."""
    recompute: Optional[str] = field(default=None, metadata={"metavar": "KIND"})
    """Recomputation of activations: none, selective[:core_attn,mlp] or full. Default: the configuration's."""
    sequence_parallel: Optional[bool] = None
    """Split the residual stream over the tensor-parallel ranks. Default: on when --tp is above 1."""
    distributed_optimizer: Optional[bool] = None
    """Shard optimizer state over the data-parallel ranks. Default: the configuration's."""

    target_cr: float = field(default=4.0, metadata={"group": "training"})
    """Compression ratio (tokens / slots) that the retrofit ends at."""
    mfu: float = 0.40
    """Model FLOPs over peak FLOPs, end to end, as a fraction."""
    peak_tflops: float = 989.0
    """Peak of one GPU in dense bf16 TFLOP/s, as an H100 SXM has."""
    gpu_memory_gb: float = 80.0
    """Memory of one GPU, in GB of 1e9 bytes."""
    overhead_gb: float = 4.0
    """Memory per GPU for the CUDA context, NCCL and fragmentation, in GB."""
    gpus_per_node: int = 8
    """GPUs of a node, which suggested tensor parallel sizes stay within."""

    serving_tp: Optional[int] = field(default=None, metadata={"group": "serving"})
    """Tensor parallel size of the server. Default: the least that leaves half of the memory to the cache."""
    context: Optional[int] = field(default=None, metadata={"metavar": "TOKENS"})
    """Tokens of every served sequence. Default: --sequence-length."""
    page_size: list[int] = field(default_factory=lambda: [16, 64], metadata={"nargs": "+", "metavar": "SLOTS"})
    """Slots per page of the KV cache, one table row for each size. Default: 16 64."""
    gpu_memory_utilization: float = 0.9
    """Fraction of a GPU's memory for weights and cache."""


def build_parser() -> flags.Parser:
    parser = flags.Parser(
        prog="dmc plan",
        description="Estimate whether a retrofit fits its GPUs, how long it takes, and what the result serves.\n\n"
        "What is not given comes from the model's configuration. Exit status: 0 the plan fits; 2 it cannot work or\n"
        f"does not fit, and the nearest layouts that do are listed. Shipped: {', '.join(sorted(shipped()))}.",
        examples="""
            dmc plan llama2-70b --gpus 64 --tp 8 --pp 4
            dmc plan path/to/hf_model --gpus 8 --tp 4 --sequence-length 4096 --recompute selective
            """,
    )
    flags.add_fields(parser, PlanConfig)
    parser.set_defaults(run=lambda args: _run(flags.read(PlanConfig, args)))
    return parser


def shipped() -> dict[str, Path]:
    """Shipped configurations by name: those beside the package in a wheel, or the examples of a checkout."""
    here = Path(__file__).resolve()
    folders = here.parents[1] / "configs", here.parents[3] / "examples" / "dmc" / "configs"
    return {path.stem: path for folder in folders for path in sorted(folder.glob("*.yaml"))}


def load_model(name: str) -> RunConfig:
    """Run of a shipped configuration, a configuration file, a Hugging Face config.json or its directory, or a
    checkpoint, of which the model and the method count.

    Raises:
        ValueError: no such model, or a file that cannot be read.
    """
    path = Path(name)
    if name in shipped():
        return RunConfig.from_dict(load_file(shipped()[name]))
    if not path.exists():
        raise ValueError(f"model {name} is no file and none of the shipped ones: {', '.join(sorted(shipped()))}")
    if path.is_dir() and not (path / "config.json").is_file():
        return _of_checkpoint(path)
    path = path / "config.json" if path.is_dir() else path
    data = load_file(path)
    if path.suffix != ".json" or not isinstance(data, dict) or isinstance(data.get("model"), dict):
        return RunConfig.from_dict(data)
    from megatron.dmc.checkpoint.formats import dms
    from megatron.dmc.checkpoint.mapping import from_hf_config

    return _with_defaults(RunConfig(model=from_hf_config(dms.canonical_config(path.parent, data)[0])))


def _of_checkpoint(path: Path) -> RunConfig:
    """Run with the model and the method of a checkpoint, or of the newest one of a --save directory."""
    from megatron.dmc.checkpoint.manifest import resolve_checkpoint

    try:
        saved = RunConfig.from_dict(load_file(resolve_checkpoint(path) / "config.yaml"))
    except ValueError as error:
        raise ValueError(f"{path} has no config.json, and is no checkpoint: {error}") from None
    run = RunConfig(model=saved.model, dmc=saved.dmc)
    run.training.freeze_base = saved.training.freeze_base
    return _with_defaults(run)


def _with_defaults(run: RunConfig) -> RunConfig:
    run.parallel.use_distributed_optimizer = run.training.bf16 = True
    run.data.seq_length = min(run.data.seq_length, run.model.max_position_embeddings)
    return run


def _check_numbers(args: PlanConfig) -> None:
    """Raise ``ValueError`` for a number that makes no sense in any layout."""
    for name, value in dataclasses.asdict(args).items():
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, bool) or not isinstance(number, (int, float)):
                continue
            allowed = number >= 0 if name == "overhead_gb" else number > 0
            if not (math.isfinite(number) and allowed):
                raise ValueError(f"--{name.replace('_', '-')} is {number}; it must be positive")
    for name in ("mfu", "gpu_memory_utilization"):
        if getattr(args, name) > 1:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(args, name)}; it is a fraction, at most 1")
    if args.target_cr <= 1:
        raise ValueError(f"--target-cr is {args.target_cr:g}; a retrofit compresses, so use more than 1")


def _given_layout(args: PlanConfig, run: RunConfig) -> dict[str, Any]:
    """Keywords of :func:`with_layout` for the layout flags that were given."""
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
    return layout


def resolve(args: PlanConfig) -> tuple[RunConfig, int]:
    """Resolve a run and its number of GPUs. Raises ``ValueError`` for values that make no sense in any layout."""
    _check_numbers(args)
    run = load_model(args.model)
    run = with_layout(run, **_given_layout(args, run))
    adapter = run.dmc.decision_source == "adapter"
    run.stage = dataclasses.replace(
        run.stage,
        stage="retrofit",
        target_cr=args.target_cr,
        train_iters=run.stage.train_iters if adapter else None,
        start_cr=None,
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


def _table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    return textwrap.indent(flags.table(header, rows, rule=False), "  ")


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
    digits = 1 if times["all"]["days"] >= 1 else 2
    stage_rows = [
        [name, f"{f['steps']:,}", f"{f['tokens'] / 1e9:.{digits}f}", f"{f['days']:.{digits}f}"]
        for name, f in times.items()
    ]
    counts, batch = figures["parameters"], run.training.global_batch_size
    parts = ", ".join(f"{k} {_count(n)}" for k, n in counts.items() if k != "total" and n > counts["total"] / 1000)
    tensor = f"TP {tp}{' with SP' if p.sequence_parallel else ''}"
    pipeline = f"PP {pp}{f' ({v} chunks each)' if v > 1 else ''}"
    sharing = "optimizer sharded over DP" if p.use_distributed_optimizer else "optimizer whole on every rank"
    trained, zero_out = "", f" (zero_out: at most {memory['zero_out'] / GB:.1f})"
    if adapters := figures["adapter_parameters"]:
        frozen = "; the rest is frozen" if run.training.freeze_base else ""
        trained, zero_out = f"; {adapters / 1e6:.2f}M in adapters{frozen}", ""
    return "\n".join(
        [
            f"model       {_count(counts['total'])} parameters: {parts}{trained}",
            f"layout      {gpus} GPUs = {tensor} x {pipeline} x DP {figures['dp']}; {sharing}; "
            f"recomputation {recomputation(run)}",
            f"batch       {batch} sequences x {run.data.seq_length} = {figures['tokens_per_step']:,} tokens/step"
            f"; {figures['micro_batches']} micro-batches of {run.training.micro_batch_size} per rank",
            f"bubble      {figures['bubble']:.3f} of the pipeline's ideal time",
            f"\nEstimated memory per GPU, GB, by pipeline stage, in retrofit and finetune{zero_out}",
            _table(["stage", *PARTS, "total"], rows),
            f"  the worst GPU needs {memory['needed'] / GB:.1f} of {fit.gpu_memory / GB:.1f} GB",
            f"\nTime at {figures['mfu']:.0%} MFU of {figures['peak_flops'] / 1e12:g} TFLOP/s per GPU "
            f"({figures['tokens_per_second_per_gpu']:,.0f} tokens/s/GPU; "
            f"hardware FLOPs {figures['hardware_to_model_flops']:.2f} x the model's)",
            _table(["stage", "steps", "B tokens", "days"], stage_rows),
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
        + _table(["CR", "page", "KV KiB/token", "page waste", "page table MiB/seq", "sequences"], rows)
    )


main = flags.entry(build_parser)


def _run(args: PlanConfig) -> int:
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
        figures |= {"fits": not wrong, "nearest": [as_flags(*other) for other in nearest]}
        args.json.write_text(json.dumps(figures, indent=1) + "\n")
    if wrong:
        _refuse(wrong, nearest, fit)
    return 2 if wrong else 0


def _count(parameters: float) -> str:
    return f"{parameters / 1e9:.2f}B" if parameters >= 1e8 else f"{parameters / 1e6:.2f}M"


def _refuse(wrong: str, nearest: Sequence[tuple[RunConfig, int]], fit: Fit) -> None:
    print(f"error: {wrong}", file=sys.stderr)
    for other, number in nearest:
        need, idle = training_memory(other, number, fit)["needed"] / GB, bubble(other, number)
        print(f"  works: {as_flags(other, number)}   ({need:.1f} GB, bubble {idle:.2f})", file=sys.stderr)
