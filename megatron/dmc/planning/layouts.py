"""Layouts of a run over GPUs: whether one works and fits, and the nearest ones that do."""

import dataclasses
import itertools
import math
from collections.abc import Iterator
from typing import Any, Optional

from megatron.dmc.config import RunConfig
from megatron.dmc.planning.estimates import GB, Fit, bubble, powers_of_two, recomputed_flops, training_memory


def problem(run: RunConfig, gpus: int, fit: Fit) -> Optional[str]:
    """Reason why a layout cannot work or does not fit; None when it works and fits."""
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
    """Recomputation of a layout, as the value of ``--recompute``."""
    p = run.parallel
    if p.recompute_granularity == "selective":
        return "selective:" + ",".join(p.recompute_modules)
    return p.recompute_granularity or "none"


RECOMPUTE = {"none": 0, "selective:core_attn": 1, "selective:mlp": 1.5, "selective:core_attn,mlp": 2, "full": 3}


def with_layout(run: RunConfig, **parallel: Any) -> RunConfig:
    """Copy of a run with other layout fields, ``recompute`` (a value of ``--recompute``) and ``micro_batch``."""
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
    """Distance of two layouts in doublings; changing GPUs weighs most, then TP and PP, then what is free to choose."""

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
    """Nearest layouts that work and fit, nearest first; on other numbers of GPUs where none is on as many."""
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


def as_flags(run: RunConfig, gpus: int) -> str:
    """Flags of ``dmc plan`` that ask for this layout."""
    p = run.parallel
    v = p.virtual_pipeline_model_parallel_size
    return (
        f"--gpus {gpus} --tp {p.tensor_model_parallel_size} --pp {p.pipeline_model_parallel_size}"
        + (f" --vp {v}" if v else "")
        + f" --micro-batch {run.training.micro_batch_size} --recompute {recomputation(run)}"
        + ("" if p.use_distributed_optimizer else " --no-distributed-optimizer")
    )
