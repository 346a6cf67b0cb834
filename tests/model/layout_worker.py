"""Worker of test_layouts.py: three training steps in each of several layouts, one after the other, in one launch.

    python -m torch.distributed.run --nproc-per-node N tests/model/layout_worker.py DIRECTORY NAME CASE [CASE ...]

DIRECTORY holds the datasets and the common checkpoint (``prepare``, in one process). Rank 0 writes DIRECTORY/NAME.json:
case -> what its three steps gave.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from helpers.in_process import leave_groups
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megatron.dmc.checkpoint.frozen_base import base_hash
from megatron.dmc.checkpoint.manifest import Manifest, read_manifest, resolve_checkpoint
from megatron.dmc.config import RunConfig
from megatron.dmc.model import is_adapter
from megatron.dmc.training import arguments, initialize
from megatron.dmc.training.checkpointing import CheckpointWriter
from megatron.dmc.training.data import Sidecar
from megatron.dmc.training.loop import Trainer
from megatron.dmc.training.model import build_model, unwrap
from megatron.dmc.training.starting_point import StartingPoint

SEQ, VOCAB, STEPS = 48, 100, 3

BASE = {
    "model": dict(
        num_layers=4,
        hidden_size=32,
        ffn_hidden_size=48,
        num_attention_heads=4,
        num_query_groups=2,
        vocab_size=VOCAB,
        make_vocab_size_divisible_by=8,
        max_position_embeddings=64,
        init_method_std=0.15,
    ),
    # The decision neurons hold random weights; with this bias about a third of the tokens merge.
    "dmc": dict(decision_bias=0.3),
    # In every step some of the sequences are beyond the target and some are not.
    "stage": dict(stage="retrofit", train_iters=STEPS, start_cr=1.0, target_cr=4.0),
    "optimizer": dict(lr=1e-3),
    "training": dict(micro_batch_size=1, global_batch_size=4, seed=7, eval_iters=1, transformer_impl="local"),
}


def _layout(**values) -> dict:
    """Overrides by field name -> by section."""
    names = dict(
        tp="tensor_model_parallel_size",
        pp="pipeline_model_parallel_size",
        sp="sequence_parallel",
        vpp="virtual_pipeline_model_parallel_size",
        do="use_distributed_optimizer",
        og="overlap_grad_reduce",
        op="overlap_param_gather",
        recompute="recompute_granularity",
        method="recompute_method",
        layers="recompute_num_layers",
        modules="recompute_modules",
    )
    training = {k: values.pop(k) for k in ("micro_batch_size", "bf16", "distill_from", "freeze_base") if k in values}
    if "distill_from" in training:
        training |= dict(distill_weight=0.7, distill_temperature=2.0)
    return {"parallel": {names[k]: v for k, v in values.items()}, "training": training}


_FULL = dict(recompute="full", method="uniform", layers=1)
_TEACHER = dict(distill_from="teacher")


def _dms(**values) -> dict:
    """Eviction instead of merging."""
    return {**_layout(**values), "dmc": dict(method="dms", window=4)}


def _adapter(per: str = "head", **values) -> dict:
    """Eviction by adapters on a frozen base."""
    dmc = dict(method="dms", window=4, decision_source="adapter", decision_per=per, decision_scale=10.0)
    return {**_layout(freeze_base=True, **values), "dmc": dmc}


def _calibrate(per: str = "head", **values) -> dict:
    """Adapters fitted, not trained. Three batches to fit to, one for the threshold."""
    return {**_adapter(per, **values), "stage": dict(stage="calibrate", train_iters=4, start_cr=None, target_cr=3.0)}


CASES: dict[int, dict[str, dict]] = {
    1: {
        "single": _layout(),
        "again": _layout(),
        "micro-batch 2": _layout(micro_batch_size=2),
        "micro-batch 4": _layout(micro_batch_size=4),
        "recompute uniform 1": _layout(**_FULL),
        "recompute uniform 2": _layout(recompute="full", method="uniform", layers=2),
        "recompute block 3": _layout(recompute="full", method="block", layers=3),
        "recompute core_attn": _layout(recompute="selective", modules=["core_attn"]),
        "recompute mlp": _layout(recompute="selective", modules=["mlp"]),
        "recompute core_attn, mlp": _layout(recompute="selective", modules=["core_attn", "mlp"]),
        "distributed optimizer": _layout(do=True),
        "bf16": _layout(bf16=True),
        "bf16, recompute": _layout(bf16=True, **_FULL),
        "distill": _layout(**_TEACHER),
        "distill, micro-batch 2, recompute": _layout(micro_batch_size=2, **_FULL, **_TEACHER),
        "bf16 distill": _layout(bf16=True, **_TEACHER),
        "dms": _dms(),
        "dms, micro-batch 2, recompute core_attn": _dms(
            micro_batch_size=2, recompute="selective", modules=["core_attn"]
        ),
        "adapter": _adapter(),
        "adapter, micro-batch 2, recompute": _adapter(micro_batch_size=2, **_FULL),
        "calibrate": _calibrate(),
        "calibrate, micro-batch 2, recompute core_attn": _calibrate(
            micro_batch_size=2, recompute="selective", modules=["core_attn"]
        ),
        "calibrate layers": _calibrate("layer"),
    },
    2: {
        "TP2": _layout(tp=2),
        "TP2 SP": _layout(tp=2, sp=True),
        "TP2 SP, recompute": _layout(tp=2, sp=True, **_FULL),
        "TP2 SP, recompute core_attn": _layout(tp=2, sp=True, recompute="selective", modules=["core_attn"]),
        "TP2 SP, micro-batch 2": _layout(tp=2, sp=True, micro_batch_size=2),
        "PP2": _layout(pp=2),
        "PP2, recompute": _layout(pp=2, **_FULL),
        "PP2, micro-batch 2": _layout(pp=2, micro_batch_size=2),
        "PP2 VPP2": _layout(pp=2, vpp=2),
        "PP2 VPP2, recompute": _layout(pp=2, vpp=2, **_FULL),
        "DP2": _layout(),
        "DP2, micro-batch 2": _layout(micro_batch_size=2),
        "DP2, overlap": _layout(og=True),
        "DP2, distributed optimizer": _layout(do=True),
        "DP2, distributed optimizer, overlap": _layout(do=True, og=True),
        "DP2, distributed optimizer, overlap both": _layout(do=True, og=True, op=True),
        "bf16 PP2": _layout(pp=2, bf16=True),
        "bf16 PP2 VPP2": _layout(pp=2, vpp=2, bf16=True),
        "bf16 TP2 SP": _layout(tp=2, sp=True, bf16=True),
        "bf16 DP2, distributed optimizer, overlap both": _layout(do=True, og=True, op=True, bf16=True),
        "distill TP2": _layout(tp=2, **_TEACHER),
        "distill TP2 SP, micro-batch 2": _layout(tp=2, sp=True, micro_batch_size=2, **_TEACHER),
        "distill PP2": _layout(pp=2, **_TEACHER),
        "distill PP2 VPP2, recompute": _layout(pp=2, vpp=2, **_FULL, **_TEACHER),
        "distill DP2, distributed optimizer, overlap both": _layout(do=True, og=True, op=True, **_TEACHER),
        "bf16 distill PP2": _layout(pp=2, bf16=True, **_TEACHER),
        "dms TP2 SP": _dms(tp=2, sp=True),
        "dms PP2, recompute": _dms(pp=2, **_FULL),
        "adapter TP2 SP": _adapter(tp=2, sp=True),
        "adapter PP2 VPP2, recompute": _adapter(pp=2, vpp=2, **_FULL),
        "adapter DP2, distributed optimizer, overlap both": _adapter(do=True, og=True, op=True),
        "calibrate TP2 SP": _calibrate(tp=2, sp=True),
        "calibrate layers TP2": _calibrate("layer", tp=2),
        "calibrate DP2, distributed optimizer, overlap both": _calibrate(do=True, og=True, op=True),
    },
    4: {
        "TP2 PP2": _layout(tp=2, pp=2),
        "TP2 PP2 SP": _layout(tp=2, pp=2, sp=True),
        "TP2 PP2 VPP2 SP, recompute": _layout(tp=2, pp=2, vpp=2, sp=True, **_FULL),
        "TP2 DP2": _layout(tp=2),
        "TP2 DP2 SP, distributed optimizer, overlap both": _layout(tp=2, sp=True, do=True, og=True, op=True),
        "PP2 DP2": _layout(pp=2),
        "PP2 DP2, distributed optimizer": _layout(pp=2, do=True),
        "PP2 VPP2 DP2, distributed optimizer, overlap both": _layout(pp=2, vpp=2, do=True, og=True, op=True),
        "PP4": _layout(pp=4),
        "distill TP2 PP2 VPP2 SP, recompute": _layout(tp=2, pp=2, vpp=2, sp=True, **_FULL, **_TEACHER),
        "distill PP4": _layout(pp=4, **_TEACHER),
        "dms TP2 PP2 SP": _dms(tp=2, pp=2, sp=True),
        "adapter TP2 PP2 VPP2 SP, recompute core_attn": _adapter(
            tp=2, pp=2, vpp=2, sp=True, recompute="selective", modules=["core_attn"]
        ),
        "calibrate TP2 PP2 VPP2 SP, recompute": _calibrate(tp=2, pp=2, vpp=2, sp=True, **_FULL),
    },
}


class FakeTokenizer:
    """Attributes that a dataset needs of a tokenizer."""

    path, vocab_size, bos_id, adds_bos, eod_id, fingerprint = "fake", VOCAB, None, False, 0, "0" * 64
    eod = 0
    unique_identifiers = OrderedDict(fingerprint=fingerprint)


def write_dataset(prefix: Path, documents: int, seed: int) -> None:
    """Random tokens, skewed so that there is something to learn."""
    random = np.random.default_rng(seed)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    tokens = 0
    for _ in range(documents):
        ids = np.minimum(random.geometric(0.05, size=random.integers(20, 90)), VOCAB - 1)
        builder.add_document(torch.from_numpy(np.append(ids, 0)), [ids.size + 1])
        tokens += ids.size + 1
    builder.finalize(f"{prefix}.idx")
    sizes = [os.path.getsize(f"{prefix}.{kind}") for kind in ("bin", "idx")]
    Sidecar(
        "fake", FakeTokenizer.fingerprint, VOCAB, 0, True, False, "uint16", documents, tokens, *sizes, f"{seed:064d}"
    ).write(f"{prefix}.json")


def configuration(directory: Path, name: str, extra: dict) -> RunConfig:
    values = {section: dict(content) for section, content in BASE.items()}
    values["data"] = dict(
        data_path=[str(directory / "train")],
        valid_data_path=[str(directory / "valid")],
        seq_length=SEQ,
        data_cache_path=str(directory / "cache"),
    )
    for section, content in extra.items():
        values.setdefault(section, {}).update(content)
    if "distill_from" in values["training"]:
        values["training"]["distill_from"] = str(directory / values["training"]["distill_from"])
    values["training"]["save"] = str(directory / "saved" / name.replace(" ", "-"))
    return RunConfig.from_dict(values)


def prepare(directory: Path) -> None:
    """The datasets, the checkpoint that every layout starts from, another model, the teacher, and adapters that mark
    some of the tokens, with "start" as their frozen base.
    """
    write_dataset(directory / "train", 60, 1)
    write_dataset(directory / "valid", 20, 2)
    plain = dict(stage="pretrain", start_cr=None, target_cr=None)
    for name, stage, seed in (("start", {}, 7), ("teacher", plain, 8)):
        config = configuration(directory, name, {"stage": stage, "training": dict(seed=seed)})
        initialize.initialize(config)
        chunks = [unwrap(chunk) for chunk in build_model(config)]
        manifest = Manifest("zero_out" if name == "start" else "pretrain", 1, 1, 0, 0, 1.0)
        CheckpointWriter(directory / name, chunks, None, arguments.dump(config)).save(manifest)
        leave_groups()
    base = resolve_checkpoint(directory / "start")
    manifest = Manifest("retrofit", 1, 1, 0, 0, 1.0, base=str(base), base_hash=base_hash(read_manifest(base)))
    config = configuration(directory, "adapted", _adapter())
    initialize.initialize(config)
    chunks = [unwrap(chunk) for chunk in build_model(config)]
    for name, parameter in chunks[0].named_parameters():
        if is_adapter(name) and parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.02, generator=torch.Generator().manual_seed(len(name)))
    CheckpointWriter(directory / "adapted", chunks, None, arguments.dump(config)).save(manifest)
    leave_groups()


def train(directory: Path, name: str, extra: dict) -> dict:
    """Three steps and an evaluation, then a checkpoint."""
    config = configuration(directory, name, extra)
    initialize.initialize(config)
    calibrates = config.stage.stage == "calibrate"
    start = resolve_checkpoint(directory / ("adapted" if config.training.freeze_base and not calibrates else "start"))
    trainer = Trainer(config, FakeTokenizer(), StartingPoint(start, read_manifest(start), resumes=False))
    if calibrates:
        return calibrated(trainer)
    iterators = trainer.iterators(trainer.train_data, 0)
    result: dict = {"lm loss": [], "dmc loss": [], "CR": [], "grad norm": [], "distill loss": [], "kept": []}
    for _ in range(STEPS):
        sums, grad_norm = trainer.train_step(iterators)
        step = sums.reduce(config)
        result["lm loss"].append(step.lm_loss)
        result["dmc loss"].append(step.dmc_loss)
        result["CR"].append(step.cr)
        result["grad norm"].append(grad_norm)
        result["distill loss"].append(step.distill_loss)
        result["kept"].append(step.kept_by_head.tolist())
        assert step.kept_slots == sum(map(sum, result["kept"][-1])), "the carried count is not the layers' count"
    path = trainer.save()
    evaluation = trainer.evaluate()
    result["validation"] = [evaluation.lm_loss, evaluation.cr]
    trainer.close()
    leave_groups()
    result["saved"] = str(path)
    return result


def calibrated(trainer: Trainer) -> dict:
    """The whole stage, and the weights that it gave, by layer."""
    assert trainer.calibrate(SimpleNamespace(reason=lambda device: None), SimpleNamespace(clear=lambda: None))
    model, evaluation = trainer.config.model, trainer.evaluate()
    weights = torch.zeros(model.num_layers, trainer.config.model.kv_heads * model.hidden_size)
    for layer in (layer for chunk in trainer.models for layer in chunk.attention_layers()):
        weight = layer.dms_proj_alpha.weight.detach().flatten()
        weights[layer.layer_number - 1, : weight.numel()] = weight  # as many on every rank of a stage
    torch.distributed.all_reduce(weights)
    p = trainer.config.parallel
    weights /= initialize.world_size() // p.pipeline_model_parallel_size
    trainer.close()
    leave_groups()
    return {
        "CR": trainer.measured_cr,
        "validation": [evaluation.lm_loss, evaluation.cr],
        "weights": weights.tolist(),
        "saved": None,
    }


def evaluate_saved(directory: Path, names: list[str]) -> dict:
    """Validation, in one process, of what other layouts have saved."""
    results = {}
    everything = {name: case for cases in CASES.values() for name, case in cases.items()}
    for name in names:
        config = configuration(directory, name, {"dmc": everything[name].get("dmc", {})})
        initialize.initialize(config)
        path = resolve_checkpoint(Path(config.training.save))
        trainer = Trainer(config, FakeTokenizer(), StartingPoint(path, read_manifest(path), resumes=False))
        evaluation = trainer.evaluate()
        results[name] = {"validation": [evaluation.lm_loss, evaluation.cr]}
        leave_groups()
    return results


def main() -> None:
    directory, name, *names = Path(sys.argv[1]), *sys.argv[2:]
    if name == "reload":
        results = evaluate_saved(directory, names)
    else:
        if not (directory / "start").exists():
            prepare(directory)
        cases = CASES[initialize.world_size()]
        results = {}
        for case in names or cases:
            began = time.monotonic()
            results[case] = train(directory, case, cases[case])
            results[case]["seconds"] = time.monotonic() - began
    if initialize.is_rank_0():
        (directory / f"{name}.json").write_text(json.dumps(results, indent=1))
    initialize.shutdown()


if __name__ == "__main__":
    main()
