"""A checkpoint of any stage as a ``torch_dist`` checkpoint that a plain Megatron-LM script loads with its model.

    DIR/latest_checkpointed_iteration.txt               "release"
    DIR/release/{.metadata,metadata.json,common.pt,__0_0.distcp,...}

A release checkpoint is loaded without optimizer state and begins at iteration 0 (``load_checkpoint`` in
``megatron/training/checkpointing.py`` of github.com/NVIDIA/Megatron-LM, commit d98e8a6). The arguments in ``common.pt``
are those that ``--use-checkpoint-args`` takes over (``load_args_from_checkpoint``).

A model that was retrofitted may have a decision neuron, the last channel of every query and key head, or of the first
query head of each group, which is not part of its attention. Megatron's own attention would take it for an ordinary
channel and compute nonsense, in silence. So the channel is taken out of the weights, unless they are for a model with
this package's layers. Adapters are left out: the model below them is a plain one.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Optional

import torch
from torch import Tensor

from megatron.dmc.checkpoint import mapping
from megatron.dmc.checkpoint.convert import Progress, announce, write_parameters, writing
from megatron.dmc.checkpoint.formats import torch_dist
from megatron.dmc.checkpoint.formats.base import Source
from megatron.dmc.checkpoint.formats.megatron.arguments import PROJECTIONS, neuron_rows
from megatron.dmc.checkpoint.manifest import LATEST
from megatron.dmc.checkpoint.mapping.views import Key
from megatron.dmc.checkpoint.staging import staged
from megatron.dmc.checkpoint.tensors import Lazy
from megatron.dmc.config import ModelConfig

RELEASE = "release"
_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""What ``--use-rope-scaling`` stands for, beside its factor (``RotaryEmbedding._apply_scaling`` of megatron-core)."""


class WithoutRows(Lazy):
    """A tensor with some of its rows set to zero."""

    def __init__(self, base: Lazy, rows: list[int]) -> None:
        self.base, self.rows = base, rows
        self.shape, self.dtype, self.name = base.shape, base.dtype, base.name

    def read_into(self, out: Tensor, start: int) -> None:
        self.base.read_into(out, start)
        out[[row - start for row in self.rows if start <= row < start + out.shape[0]]] = 0


def plain_parameters(source: Source) -> dict[Key, Lazy]:
    """Parameters for attention over all D channels that leaves the decision neuron out, as the stage has left it out.

    Where heads have an RMSNorm the neuron stays part of their root mean square, with which the model was trained, and
    is taken out behind it.

    Raises:
        ValueError: decisions that cannot be taken out of a model like this.
    """
    model, neuron = source.run.model, source.run.dmc.neuron
    if neuron == "none":
        own = {rule.megatron for rule in mapping.rules(source.family, model) if mapping.is_adapter(rule.hf[0])}
        return {key: tensor for key, tensor in source.parameters.items() if key[0] not in own}
    if neuron == "query":
        if model.qk_layernorm:
            raise ValueError(
                f"{source.path} has decisions in a channel of one query head of each group, behind an RMSNorm whose "
                "weight all heads share; Megatron's attention cannot leave that channel out"
            )
        return _without(source.parameters, PROJECTIONS, neuron_rows(model, first_query_only=True))
    if model.qk_layernorm and source.manifest.stage in mapping.COMPRESSED_STAGES:
        ends, rows = ("q_layernorm.weight", "k_layernorm.weight"), [model.head_dim - 1]
    else:
        ends, rows = PROJECTIONS, neuron_rows(model)
    return _without(source.parameters, ends, rows)


def _without(parameters: dict[Key, Lazy], ends: tuple[str, ...], rows: list[int]) -> dict[Key, Lazy]:
    """Parameters, of which those with a name of these ends lose some rows."""
    return {key: WithoutRows(tensor, rows) if key[0].endswith(ends) else tensor for key, tensor in parameters.items()}


def arguments(source: Source, with_decisions: bool) -> argparse.Namespace:
    """The model's settings by Megatron-LM's names, and with decisions the authors' ``dmc_*``.

    Raises:
        ValueError: a setting that Megatron-LM has no argument for, by name.
    """
    m = source.run.model
    grouped = m.kv_heads != m.num_attention_heads
    scaling = _rope_scaling(m)
    dtype = next(iter(source.parameters.values())).dtype
    return argparse.Namespace(
        num_layers=m.num_layers,
        hidden_size=m.hidden_size,
        ffn_hidden_size=m.ffn_hidden_size,
        num_attention_heads=m.num_attention_heads,
        kv_channels=m.head_dim,
        group_query_attention=grouped,
        num_query_groups=m.kv_heads if grouped else 1,
        max_position_embeddings=m.max_position_embeddings,
        seq_length=m.max_position_embeddings,
        position_embedding_type="rope",
        use_rotary_position_embeddings=True,
        add_position_embedding=False,
        rotary_base=int(m.rotary_base) if float(m.rotary_base).is_integer() else m.rotary_base,
        rotary_percent=1.0,
        rotary_interleaved=False,
        use_rope_scaling=scaling is not None,
        rope_scaling_factor=8.0 if scaling is None else scaling,
        normalization="RMSNorm",
        norm_epsilon=m.norm_epsilon,
        apply_layernorm_1p=False,
        swiglu=True,
        squared_relu=False,
        openai_gelu=False,
        add_bias_linear=False,
        add_qkv_bias=m.add_qkv_bias,
        qk_layernorm=m.qk_layernorm,
        untie_embeddings_and_output_weights=m.untie_embeddings_and_output_weights,
        apply_query_key_layer_scaling=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        init_method_std=m.init_method_std,
        multi_latent_attention=False,
        num_experts=None,
        vocab_size=m.vocab_size,
        padded_vocab_size=m.padded_vocab_size,
        make_vocab_size_divisible_by=m.make_vocab_size_divisible_by,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        tensor_model_parallel_size=1,
        pipeline_model_parallel_size=1,
        virtual_pipeline_model_parallel_size=None,
        world_size=1,
        data_parallel_size=1,
        ckpt_format="torch_dist",
        no_save_optim=True,
        no_save_rng=True,
        iteration=0,
        **(_dmc_arguments(source) if with_decisions and source.is_dmc else {}),
    )


def _rope_scaling(model: ModelConfig) -> Optional[float]:
    """Factor of ``--use-rope-scaling``; None without it."""
    scaling = model.rope_scaling
    if scaling is None:
        return None
    odd = [key for key, value in {"rope_type": "llama3", **_ROPE}.items() if scaling.get(key) != value]
    if odd:
        said = ", ".join(f"{key} {scaling.get(key)!r}" for key in odd)
        raise ValueError(
            f"rope_scaling has {said}; Megatron-LM's --use-rope-scaling is Llama 3.1's with {_ROPE} and has no "
            "argument for another"
        )
    return float(scaling["factor"])


def _dmc_arguments(source: Source) -> dict[str, Any]:
    """Arguments of the authors' Megatron-LM branch, by which an import knows stage and compression ratio."""
    dmc, manifest = source.run.dmc, source.manifest
    if dmc.method != "dmc":
        raise ValueError(f"{source.path} is of method {dmc.method}, for which Megatron's arguments have no names")
    return dict(
        dmc_init_val=dmc.decision_bias,
        dmc_window_size=dmc.window or 0,
        dmc_temp=dmc.temperature,
        dmc_importance_epsilon=dmc.importance_epsilon,
        dmc_cr=manifest.target_cr,
        dmc_is_stage_one=manifest.stage == "zero_out",
        dmc_finetune=manifest.stage != "retrofit",
        train_iters=manifest.train_iters,
        curr_iteration=manifest.train_iters,
        consumed_train_samples=manifest.consumed_samples,
    )


def extra_states(model: ModelConfig) -> Iterator[str]:
    """Unique keys of the extra state that Megatron's layers ask a checkpoint for, empty as it is without FP8.

    megatron-core's ``load`` refuses a checkpoint that lacks one, unless it is told another ``strict`` (0.16.1). Its
    local layers ask for those of the four projections, Transformer Engine's for those of attention and norms too; what
    a model does not ask for is left where it is.
    """
    attention = ["linear_qkv", "linear_proj", "core_attention"]
    attention += ["q_layernorm", "k_layernorm"] if model.qk_layernorm else []
    modules = [*(f"self_attention.{name}" for name in attention), "mlp.linear_fc1", "mlp.linear_fc2"]
    for layer in range(model.num_layers):
        yield from (f"decoder.layers.{name}._extra_state/shard_{layer}_{model.num_layers}" for name in modules)
    yield "decoder.final_layernorm._extra_state/shard_0_1"


def export_megatron(
    load: str | Path,
    save: str | Path,
    *,
    keep_decisions: bool = False,
    overwrite: bool = False,
    progress: Optional[Progress] = None,
) -> Path:
    """Write a checkpoint of any stage and layout for Megatron-LM.

    Args:
        keep_decisions: keep every bit of the weights, the decision neuron's too: for a model whose layers come from
            :func:`megatron.dmc.model.get_dmc_layer_spec`. Else the model is an ordinary one, which compresses nothing.

    Raises:
        ValueError: see :func:`torch_dist.open_model` and :func:`arguments`; or ``save`` exists and ``overwrite`` is
            False.
    """
    save, progress = Path(save), progress or Progress()
    source = torch_dist.open_model(Path(load))
    if source.is_dmc and not keep_decisions:
        source.parameters = plain_parameters(source)
        if source.run.dmc.neuron == "none":
            source.family = mapping.FAMILIES[source.family.model_type]
    common = {
        "args": arguments(source, keep_decisions),
        "checkpoint_version": 3.0,
        "iteration": source.manifest.iteration,
    }
    announce(f"export {source.path} ({source.kind}) -> {save}, for Megatron-LM", source.tensors, save, progress)
    with writing(save), staged(save, overwrite) as directory:
        (directory / RELEASE).mkdir()
        with torch_dist.DistWriter(directory / RELEASE, common) as writer:
            write_parameters(writer, source, progress)
            for name in extra_states(source.run.model):
                writer.write_object(name, None)
        (directory / LATEST).write_text(RELEASE)
    progress.warn()
    if source.is_dmc:
        plain = _BASE if source.run.dmc.neuron == "none" else _PLAIN
        progress.say(_KEPT if keep_decisions else plain)
    return save


_BASE = "the adapters are left out: the model that they were trained on, bit by bit, which compresses nothing"
_PLAIN = (
    "the decision neuron is taken out of the weights: an ordinary model, which compresses nothing and differs a little "
    "from the retrofitted one (docs/conversion.md)"
)
_KEPT = "for a model with layers from get_dmc_layer_spec; Megatron's own attention computes nonsense with these weights"
