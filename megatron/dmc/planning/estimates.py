"""Estimates of what training and serving a model with DMC take: parameters, FLOPs, memory, time, by formula.

Nothing here was measured on a GPU at the sizes in question: memory figures are estimates. ``tests/cli/test_plan.py``
holds the parameters to a built model's, and what a layer keeps for its backward pass to what autograd saves. Sources:

- activations: Korthikanti et al. 2022, "Reducing Activation Recomputation in Large Transformer Models" (arXiv
  2205.05198), with its terms counted anew for RMSNorm, SwiGLU, GQA, flash attention without dropout, and DMC's own
  tensors;
- optimizer state: Rajbhandari et al. 2020, "ZeRO" (arXiv 1910.02054), stage 1;
- pipeline bubble: Narayanan et al. 2021 (arXiv 2104.04473), of the interleaved schedule;
- FLOPs: 6 per weight and token plus the causal half of attention, as the training log counts them.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, Optional

from megatron.dmc import schedule
from megatron.dmc.config import DISTILLED_TOKENS, ModelConfig, ParallelConfig, RunConfig, StageConfig

GB = 1e9
SERVING_CRS = (1, 2, 4, 8)
PARTS = ("weights", "gradients", "optimizer", "activations", "DMC's extra", "workspace", "overhead")


class Fit(NamedTuple):
    """Hardware that a plan has to fit into."""

    gpu_memory: float = 80 * GB
    """Memory of one GPU, in bytes."""
    overhead: float = 4 * GB
    """Memory per GPU that no formula covers, in bytes: CUDA context, NCCL, cuBLAS, fragmentation. An assumption."""
    gpus_per_node: int = 8


def powers_of_two(most: int) -> list[int]:
    """1, 2, 4, ... up to ``most``."""
    return [1 << i for i in range(max(most, 1).bit_length())]


# The model


def parameters(model: ModelConfig) -> dict[str, int]:
    """Parameters of the whole model by part, as ``DMCGPTModel`` builds it (vocabulary padded). DMC adds none, DMS at
    most :func:`adapter_parameters`.
    """
    m, d = model, model.head_dim
    qkv = (m.num_attention_heads + 2 * m.kv_heads) * d
    per_layer = {
        "attention": m.hidden_size * qkv + m.num_attention_heads * d * m.hidden_size + (qkv if m.add_qkv_bias else 0),
        "mlp": 3 * m.hidden_size * m.ffn_hidden_size,
        "norms": 2 * m.hidden_size + (2 * d if m.qk_layernorm else 0),
    }
    parts = {name: m.num_layers * count for name, count in per_layer.items()}
    parts["norms"] += m.hidden_size
    parts["embedding"] = m.padded_vocab_size * m.hidden_size
    parts["output"] = parts["embedding"] if m.untie_embeddings_and_output_weights else 0
    return parts


def adapter_parameters(run: RunConfig) -> int:
    """Parameters of all layers' adapters, which lie whole on every tensor-parallel rank: a norm, a row per decision."""
    if run.dmc.decision_source != "adapter":
        return 0
    outputs = 1 if run.dmc.decision_per == "layer" else run.model.kv_heads
    return run.model.num_layers * run.model.hidden_size * (1 + outputs)


def parameters_per_gpu(model: ModelConfig, tp: int, pp: int, rank: int) -> int:
    """Parameters on each GPU of pipeline stage ``rank``. Tensor parallelism splits all weights but the norms'."""
    total, last = parameters(model), rank == pp - 1
    final_norm = model.hidden_size
    count = (total["attention"] + total["mlp"]) // pp // tp + (total["norms"] - final_norm) // pp
    if rank == 0:
        count += total["embedding"] // tp
    if last:
        count += final_norm
        # With tied embeddings the last of several stages has a copy of its own.
        if model.untie_embeddings_and_output_weights or pp > 1:
            count += total["embedding"] // tp
    return count


def flops_per_token(model: ModelConfig, seq_length: int) -> dict[str, float]:
    """Forward and backward FLOPs per token: 6 per weight of a matrix product, and the causal half of attention.

    The sum is what MFU is reckoned by, here and in the training log (DMC's own work is not in it).
    """
    m, total = model, parameters(model)
    qkv_bias = m.num_layers * (m.num_attention_heads + 2 * m.kv_heads) * m.head_dim if m.add_qkv_bias else 0
    return {
        "attention": 6.0 * m.num_layers * m.num_attention_heads * m.head_dim * seq_length,
        "projections": 6.0 * (total["attention"] - qkv_bias),
        "mlp": 6.0 * total["mlp"],
        "output": 6.0 * m.hidden_size * m.padded_vocab_size,
    }


def recomputed_flops(run: RunConfig) -> float:
    """FLOPs per token that recomputation adds: a forward pass (a third of all) of what it drops.

    With a frozen base, also the teacher's forward pass less the weights' gradients: of attention a third, of the rest
    as much as is saved.
    """
    p, flops = run.parallel, flops_per_token(run.model, run.data.seq_length)
    return _recomputed_flops(run, p, flops) + (flops["attention"] / 3 if run.training.freeze_base else 0.0)


def _recomputed_flops(run: RunConfig, p: ParallelConfig, flops: dict[str, float]) -> float:
    if p.recompute_granularity == "selective":
        names = {"core_attn": "attention", "mlp": "mlp"}
        return sum(flops[names[module]] for module in p.recompute_modules) / 3
    if p.recompute_granularity == "full":
        chunks = p.pipeline_model_parallel_size * (p.virtual_pipeline_model_parallel_size or 1)
        share = 1.0
        if p.recompute_method == "block":
            share = min(1.0, p.recompute_num_layers * chunks / run.model.num_layers)
        return share * (flops["attention"] + flops["projections"] + flops["mlp"]) / 3
    return 0.0


# Memory of training


class LayerBytes(NamedTuple):
    """Bytes of one layer and micro-batch on one GPU. All but ``work`` is what autograd keeps for the backward pass."""

    frame: float
    """The residual stream twice, and the norms' outputs, which projections keep that are trained."""
    attention: float
    """Rotated q and k, v, the output (the kernel's and the projection's), its row statistics, the tables of angles."""
    mlp: float
    """The gate and up projections' output, and the down projection's input."""
    dmc: float
    """Tensors of the attention that only the compressing stages keep."""
    boundary: float
    """Input of the layer, which is all that full recomputation keeps."""
    row: float
    """Row of the layer's input that carries the slot count, in the compressing stages."""
    core_input: float
    """Raw q, k, v and the projection's input, kept instead of ``attention`` and ``dmc`` when these are recomputed."""
    mlp_input: float
    """Input of the MLP, kept instead of ``mlp`` when it is recomputed; 0 where it belongs to the ``frame``."""
    work: float
    """Largest short-lived memory, in the backward pass of the attention or of the MLP."""


def layer_bytes(run: RunConfig, compress: bool) -> LayerBytes:
    """Count a layer's tensors: ``DMCSelfAttention``, ``ops/pooling.py``, ``ops/attention.py``, Megatron's MLP.

    With e bytes per element and n = s b tokens, Korthikanti et al.'s 34 s b h becomes 8 s b h for the residual stream
    and the norms, 3 e n ffn for SwiGLU, e n D (3 np + 2 ng) for attention and no s^2 term, each over tp. Assumed are
    the GPU's fused RMSNorm and SwiGLU, which keep their inputs. The output counts twice: it is copied into [s, b, np D]
    for the projection.

    Args:
        compress: retrofit and finetune; otherwise plain attention on DMC's kernels (zero_out), whose view of v keeps
            the whole output of the QKV projection alive.
    """
    m, p = run.model, run.parallel
    tp, b, s = p.tensor_model_parallel_size, run.training.micro_batch_size, run.data.seq_length
    e, n, d, h = 2 if run.training.bf16 else 4, s * b, m.head_dim, m.hidden_size
    heads, groups, ffn = m.num_attention_heads // tp, m.kv_heads // tp, m.ffn_hidden_size // tp
    rows = s // tp if p.sequence_parallel else s
    hidden = e * b * rows * h
    frame = 4 * hidden + 2 * 4 * b * rows
    q, kv, qkv = e * n * heads * d, e * n * groups * d, e * n * (heads + 2 * groups) * d
    raw_q = q if heads > groups else 0  # a copy, except where q's heads lie evenly spaced in the projection's output
    scaled_k = 0 if compress else kv  # zero_out fades the neuron of q and k: k is a copy too then
    core_input, held = qkv + raw_q + q + scaled_k, 0.0
    if m.qk_layernorm:
        held = raw_q + scaled_k + 4 * n * (heads + groups)  # their inputs
        core_input += q + kv + held - raw_q - scaled_k
    attention = held + 2 * q + q + kv + 4 * n * heads + 2 * e * s * d
    window = run.dmc.window
    keeps_qkv = not compress or m.qk_layernorm or window == 1 or run.dmc.evicts
    # v itself; what hangs on to a view of the QKV projection's output holds all of it.
    attention += qkv if keeps_qkv else kv
    dmc, work = 0.0, 5 * q + 4 * kv
    if compress and run.dmc.evicts:
        dmc = 5 * 4 * n * groups  # decisions and mask in fp32
        # In the backward pass, the near part: blocks of rows twice, of what goes in and of the gradients. The far part,
        # with the near part's gradients: its heads have eight channels more where the mask has no channel among them.
        far = work * (1 if run.dmc.neuron == "all" else (d + 8) / d)
        work = max(9 * q + 8 * kv, far + 2 * q + 2 * kv)
    elif compress:
        # Diagonal weights of the attention; alpha, its logits' and mask's terms, importance: fp32 vectors.
        dmc = 2 * 4 * n * heads + 7 * 4 * n * groups
        if window is None:  # triangular blocks of 64 rows, numerators and denominators in fp32
            dmc += n * groups * (12 * (2 * d + 1) + 2 * 4 * 64) + kv + (kv if keeps_qkv else 0)
            work += n * groups * (12 * (2 * d + 1) + 2 * 4 * 64)
        elif window > 1:
            # Raw k and v side by side, pooled k before rotation (it lies beside the pooled v), the band's coefficients.
            dmc += 2 * kv + kv + (kv if keeps_qkv else 0) + 4 * window * n * groups
            band = max(32, 1 << (window - 1).bit_length()) + window - 1
            work += 6 * kv + n * groups * (2 * e * band + 24 * window)
    mlp, mlp_work = 3 * e * n * ffn, e * n * (3 * ffn + 3 * h)
    if run.training.freeze_base:  # projections keep no input
        frame, attention, core_input, mlp = frame - 2 * hidden, attention - q, core_input - q, mlp - e * n * ffn
    if compress and run.dmc.decision_source == "adapter":
        frame += hidden + 4 * b * rows  # its norm's output
        core_input += e * n * groups
    row, mlp_input = e * b * h if compress else 0, hidden if run.training.freeze_base else 0
    return LayerBytes(frame, attention, mlp, dmc, hidden, row, core_input, mlp_input, max(work, mlp_work))


def in_flight(run: RunConfig, gpus: int, rank: int) -> float:
    """Micro-batches whose activations pipeline stage ``rank`` holds at most (in units of all its layers).

    1F1B: pp - rank. Interleaved: (2 (pp - rank - 1) + (v - 1) pp + 1) / v, which on the first stage is Korthikanti et
    al.'s pp (1 + (pp - 1) / (pp v)). Never more than there are.
    """
    pp, v = run.parallel.pipeline_model_parallel_size, run.parallel.virtual_pipeline_model_parallel_size or 1
    count = micro_batches(run, gpus)
    if v == 1:
        return min(pp - rank, count)
    return min(2 * (pp - rank - 1) + (v - 1) * pp + 1, count * v) / v


class KeptActivations(NamedTuple):
    """What a pipeline stage keeps for the backward pass of one micro-batch, in bytes, given the recomputation."""

    layers: int
    """Layers that keep their activations."""
    layer: float
    """What each of these keeps, without DMC's extra."""
    layer_dmc: float
    """DMC's extra in each of these."""
    boundaries: int
    """Inputs of layers that are kept to recompute from."""
    live: float
    """What exists once, while it is recomputed, without DMC's extra."""
    live_dmc: float
    """DMC's extra in that."""


def _kept_activations(run: RunConfig, layer: LayerBytes) -> KeptActivations:
    p = run.parallel
    layers = run.model.num_layers // p.pipeline_model_parallel_size
    whole = layer.frame + layer.attention + layer.mlp
    if p.recompute_granularity == "full":
        chunks = p.virtual_pipeline_model_parallel_size or 1
        again = min(p.recompute_num_layers, layers // chunks)  # layers of each model chunk
        if p.recompute_method == "block":  # the first ones, one at a time
            return KeptActivations(layers - again * chunks, whole, layer.dmc, again * chunks, whole, layer.dmc)
        boundaries = chunks * math.ceil(layers // chunks / again)  # uniform: all, ``again`` at a time
        return KeptActivations(0, whole, layer.dmc, boundaries, again * whole, again * layer.dmc)
    kept, extra, live, live_dmc = whole, layer.dmc, 0.0, 0.0
    if p.recompute_granularity == "selective" and "core_attn" in p.recompute_modules:
        kept, extra = kept - layer.attention + layer.core_input, 0.0
        live, live_dmc = layer.attention, layer.dmc
    if p.recompute_granularity == "selective" and "mlp" in p.recompute_modules:
        kept, live = kept - layer.mlp + layer.mlp_input, live + layer.mlp
    return KeptActivations(layers, kept, extra, 0, live, live_dmc)


def stage_memory(run: RunConfig, gpus: int, rank: int, fit: Fit, compress: bool = True) -> dict[str, float]:
    """Bytes on each GPU of pipeline stage ``rank``, by :data:`PARTS`. A frozen base has weights alone.

    Mixed precision as ``training/model.py`` sets it up: bf16 weights (2 bytes), gradients accumulated in fp32 (4), fp32
    main weights and two Adam moments (12), the latter over DP with the distributed optimizer; fp32 runs: 4, 4, 8.
    """
    m, p, t = run.model, run.parallel, run.training
    tp, pp = p.tensor_model_parallel_size, p.pipeline_model_parallel_size
    e = 2 if t.bf16 else 4
    adapters = adapter_parameters(run) // pp
    count = parameters_per_gpu(m, tp, pp, rank) + adapters
    trained = adapters if t.freeze_base else count
    state = (12 if t.bf16 else 8) * trained / (gpus // (tp * pp) if p.use_distributed_optimizer else 1)

    layer = layer_bytes(run, compress)
    kept, flying = _kept_activations(run, layer), in_flight(run, gpus, rank)
    activations = flying * (kept.layers * kept.layer + kept.boundaries * layer.boundary) + kept.live
    dmc = flying * (kept.layers * (kept.layer_dmc + layer.row) + kept.boundaries * layer.row) + kept.live_dmc

    tokens = t.micro_batch_size * run.data.seq_length
    work = layer.work + (2 * layer.boundary if pp > 1 else 0)
    largest = max(
        m.hidden_size * 2 * m.ffn_hidden_size, m.padded_vocab_size * m.hidden_size if rank in (0, pp - 1) else 0
    )
    if rank == pp - 1:
        logits = tokens * m.padded_vocab_size / tp
        if t.freeze_base:
            # The hidden state's gradient stays for the backward pass. While the loss is made, there are the teacher's
            # hidden state and, of a part of the tokens, logits of student and teacher in both formats and what their
            # softmaxes take.
            activations += 2 * layer.boundary
            part = min(tokens, DISTILLED_TOKENS) * m.padded_vocab_size / tp
            work = max(work, 2 * layer.boundary + (2 * e + 4 * 4) * part)
        else:
            # The softmax in fp32 stays for the backward pass; the logits, then their gradient, in the model's format.
            activations += logits * 4 + layer.frame / 2
            work = max(work, (logits + tokens * m.hidden_size) * e)
    if not t.freeze_base:
        work += e * largest / tp  # a weight's gradient before it is added to the fp32 buffer
    return dict(zip(PARTS, (e * count, 4 * trained, state, activations, dmc, work, fit.overhead)))


def micro_batches(run: RunConfig, gpus: int) -> int:
    """Number of micro-batches per optimizer step and data-parallel rank."""
    p, t = run.parallel, run.training
    dp = gpus // (p.tensor_model_parallel_size * p.pipeline_model_parallel_size)
    return t.global_batch_size // (t.micro_batch_size * dp)


def bubble(run: RunConfig, gpus: int) -> float:
    """Idle time of the pipeline over its ideal time: (pp - 1) / (v m)."""
    pp, v = run.parallel.pipeline_model_parallel_size, run.parallel.virtual_pipeline_model_parallel_size or 1
    return (pp - 1) / (v * micro_batches(run, gpus))


def training_memory(run: RunConfig, gpus: int, fit: Fit) -> dict[str, Any]:
    """Memory by pipeline stage while compressing, the worst stage, and the need of zero_out, which differs (0 with
    adapters, which go without it).
    """
    pp = run.parallel.pipeline_model_parallel_size
    stages = [stage_memory(run, gpus, rank, fit) for rank in range(pp)]
    totals = [sum(parts.values()) for parts in stages]
    zero_out = [0.0]
    if run.dmc.decision_source != "adapter":
        zero_out = [sum(stage_memory(run, gpus, rank, fit, compress=False).values()) for rank in range(pp)]
    worst = max(range(pp), key=lambda rank: totals[rank])
    return {
        "stages": stages,
        "totals": totals,
        "worst_stage": worst,
        "worst": totals[worst],
        "zero_out": max(zero_out),
        "needed": max(max(totals), max(zero_out)),
        "fits": max(*totals, *zero_out) <= fit.gpu_memory,
    }


# Time


def durations(
    run: RunConfig, gpus: int, target_cr: float, peak_flops: float, mfu: float
) -> dict[str, dict[str, float]]:
    """Steps, tokens and days of each stage: model FLOPs over ``gpus * peak * MFU``. The bubble is in the MFU.

    With adapters there is one stage, of the run's own length.

    Args:
        peak_flops: of one GPU, FLOP/s. mfu: fraction of it that goes into the model's FLOPs, end to end.
    """
    per_step = run.training.global_batch_size * run.data.seq_length
    seconds = per_step * sum(flops_per_token(run.model, run.data.seq_length).values()) / (gpus * peak_flops * mfu)
    result = {}
    adapter = run.dmc.decision_source == "adapter"
    for name in ("retrofit",) if adapter else ("zero_out", "retrofit", "finetune"):
        stage = StageConfig(
            stage=name,
            train_iters=run.stage.train_iters if adapter else None,
            target_cr=target_cr if name == "retrofit" else None,
            iters_per_cr=run.stage.iters_per_cr,
        )
        steps = schedule.train_iters(stage)
        result[name] = {"steps": steps, "tokens": steps * per_step, "days": steps * seconds / 86400}
    return result


def plan(run: RunConfig, gpus: int, fit: Fit, target_cr: float, peak_flops: float, mfu: float) -> dict[str, Any]:
    """All figures of the training side, for a layout that has passed ``RunConfig.check``."""
    counts, flops = parameters(run.model), flops_per_token(run.model, run.data.seq_length)
    total = sum(flops.values())
    stages = durations(run, gpus, target_cr, peak_flops, mfu)
    group = run.parallel.tensor_model_parallel_size * run.parallel.pipeline_model_parallel_size
    return {
        "gpus": gpus,
        "dp": gpus // group,
        "config": run.to_dict(),
        "parameters": {**counts, "total": sum(counts.values())},
        "adapter_parameters": adapter_parameters(run),
        "memory": training_memory(run, gpus, fit),
        "tokens_per_step": run.training.global_batch_size * run.data.seq_length,
        "micro_batches": micro_batches(run, gpus),
        "bubble": bubble(run, gpus),
        "flops_per_token": total,
        "hardware_to_model_flops": 1 + recomputed_flops(run) / total,
        "mfu": mfu,
        "peak_flops": peak_flops,
        "tokens_per_second_per_gpu": peak_flops * mfu / total,
        "stages": stages,
        "days": sum(f["days"] for f in stages.values()),
    }


# Serving


def kv_bytes_per_token(model: ModelConfig, cr: float = 1.0) -> float:
    """Bytes of keys and values per token of context at a compression ratio, in bf16: all layers, over all GPUs."""
    return 2 * 2 * model.num_layers * model.kv_heads * model.head_dim / cr


def page_waste(context: int, cr: float, page_size: int) -> float:
    """Share of the cache that half an empty page per (sequence, layer, KV head) adds, at ``context`` tokens."""
    return page_size / 2 / (context / cr)


def serving(
    run: RunConfig, fit: Fit, *, tp: Optional[int], context: int, pages: Sequence[int], utilization: float
) -> dict:
    """Sequences of ``context`` tokens that fit on one group of ``tp`` GPUs beside bf16 weights, by CR and page size.

    Per (sequence, layer, KV head): the slots, half a page, a row of int32 page numbers as long as an uncompressed
    head would need, and (CR > 1) the ring of W raw keys and values in bf16 with their fp32 weights. Under eviction
    instead of the ring: the latest W + 1 tokens in pages of their own, half a page more, and a byte for each of them.

    Raises:
        ValueError: the weights leave no room, or tp does not divide the heads.
    """
    m = run.model
    budget = fit.gpu_memory * utilization
    sizes = [size for size in powers_of_two(m.kv_heads) if m.kv_heads % size == 0 and m.ffn_hidden_size % size == 0]
    weights = {size: 2 * parameters_per_gpu(m, size, 1, 0) for size in sizes}
    if tp is None:  # at least half of the memory for the cache, if that can be
        tp = next((size for size in sizes if weights[size] <= budget / 2), sizes[-1])
    if tp not in weights:
        raise ValueError(f"--serving-tp {tp}: every GPU needs whole KV heads; use one of {', '.join(map(str, sizes))}")
    left = budget - weights[tp]
    if left <= 0:
        enough = next((size for size in sizes if weights[size] < budget), None)
        raise ValueError(
            f"serving on {tp} GPUs: {weights[tp] / GB:.1f} GB of weights each do not fit into {budget / GB:.1f} GB; "
            + (f"use --serving-tp {enough}" if enough else "use GPUs with more memory")
        )
    heads, slot, rows = m.num_layers * m.kv_heads // tp, 4 * m.head_dim, []
    for cr, page in itertools.product(SERVING_CRS, pages):
        table = 4 * math.ceil(context / page) * heads
        ring, slots = (run.dmc.window or 1) * (slot + 4) * heads if cr > 1 else 0, context / cr + page / 2
        if run.dmc.evicts and cr > 1:
            recent = min(context, (run.dmc.window or 1) + 1)
            ring, slots = (recent + 1) * heads, (context - recent) / cr + recent + page
        cache = slots * slot * heads
        rows.append(
            {
                "cr": cr,
                "page_size": page,
                "kv_bytes_per_token": kv_bytes_per_token(m, cr),
                "waste": page_waste(context, cr, page),
                "table_bytes": table * tp,
                "ring_bytes": ring * tp,
                "sequences": int(left // (cache + table + ring)),
            }
        )
    return {"tp": tp, "context": context, "weights": weights[tp], "cache": left, "rows": rows}
