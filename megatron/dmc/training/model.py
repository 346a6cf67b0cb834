"""Megatron's model, distributed wrapper and optimizer, built from a :class:`RunConfig`."""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.enums import ModelType
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron.dmc import schedule
from megatron.dmc.config import RunConfig
from megatron.dmc.model import DMCGPTModel


def transformer_config(run: RunConfig) -> TransformerConfig:
    """Convert to Megatron's configuration of the model and its layout."""
    m, p, t = run.model, run.parallel, run.training
    cuda = torch.cuda.is_available()
    dtype = torch.bfloat16 if t.bf16 else torch.float32
    recompute = {}
    if p.recompute_granularity == "full":
        recompute = dict(recompute_method=p.recompute_method, recompute_num_layers=p.recompute_num_layers)
    elif p.recompute_granularity == "selective":
        recompute = dict(recompute_modules=p.recompute_modules)
    return TransformerConfig(
        num_layers=m.num_layers,
        hidden_size=m.hidden_size,
        ffn_hidden_size=m.ffn_hidden_size,
        num_attention_heads=m.num_attention_heads,
        num_query_groups=m.kv_heads,
        kv_channels=m.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=m.norm_epsilon,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=m.add_qkv_bias,
        qk_layernorm=m.qk_layernorm,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method_std=m.init_method_std,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=t.bf16,
        tensor_model_parallel_size=p.tensor_model_parallel_size,
        pipeline_model_parallel_size=p.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=p.virtual_pipeline_model_parallel_size,
        sequence_parallel=p.sequence_parallel,
        recompute_granularity=p.recompute_granularity,
        # The language-model loss is a mean over the tokens of the global batch, whatever the micro-batches.
        calculate_per_token_loss=True,
        # The fusions go through torch.compile, which needs a compiler and pays off on GPUs only. Elsewhere the
        # layers have a SwiGLU that keeps as little.
        bias_activation_fusion=cuda,
        use_te_activation_func=not cuda,
        bias_dropout_fusion=cuda,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        gradient_accumulation_fusion=False,
        # Weights are initialised in full and then cut, so that every tensor-parallel size starts alike.
        use_cpu_initialization=not cuda,
        batch_p2p_comm=cuda,
        deallocate_pipeline_outputs=True,
        **recompute,
    )


def build_chunk(run: RunConfig, config: TransformerConfig, *, carry: bool, **stage: Any) -> DMCGPTModel:
    """Build one pipeline chunk. ``stage``: pre_process, post_process and vp_stage."""
    return DMCGPTModel(config, run.model, run.dmc, carry=carry, transformer_impl=run.training.transformer_impl, **stage)


def build_model(run: RunConfig) -> list[DistributedDataParallel]:
    """Build this rank's model chunks (one per virtual pipeline stage), on its device, in Megatron's DDP."""
    config = transformer_config(run)
    p = run.parallel
    vp = p.virtual_pipeline_model_parallel_size
    chunks = []
    for stage in range(vp or 1):
        vp_stage = stage if vp else None
        model = build_chunk(
            run,
            config,
            carry=schedule.compresses(run.stage),
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
            post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
            vp_stage=vp_stage,
        )
        model.model_type = ModelType.encoder_or_decoder
        if run.training.freeze_base:
            model.freeze_base()
        if torch.cuda.is_available():
            model.cuda()
        chunks.append(Float16Module(config, model) if run.training.bf16 else model)
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=p.overlap_grad_reduce,
        overlap_param_gather=p.overlap_param_gather,
        use_distributed_optimizer=p.use_distributed_optimizer,
        check_for_nan_in_grad=True,
    )
    wrapped = [
        # Later chunks are reached last in backward; their buckets cannot overlap with anything of use.
        DistributedDataParallel(config, ddp, chunk, disable_bucketing=i > 0)
        for i, chunk in enumerate(chunks)
    ]
    if parallel_state.get_data_parallel_world_size() > 1:
        for chunk in wrapped:
            chunk.broadcast_params()
    return wrapped


def unwrap(chunk: torch.nn.Module) -> DMCGPTModel:
    """Return the model inside Megatron's wrappers."""
    while not isinstance(chunk, DMCGPTModel):
        chunk = chunk.module
    return chunk


def build_optimizer(run: RunConfig, chunks: list[DistributedDataParallel]) -> MegatronOptimizer:
    """Build Adam over all chunks, and set the hooks by which Megatron's schedules reach gradients and scale."""
    o = run.optimizer
    optimizer = get_megatron_optimizer(
        MegatronOptimizerConfig(
            optimizer="adam",
            lr=o.lr,
            min_lr=o.min_lr,
            weight_decay=o.weight_decay,
            adam_beta1=o.adam_beta1,
            adam_beta2=o.adam_beta2,
            adam_eps=o.adam_eps,
            bf16=run.training.bf16,
            params_dtype=torch.bfloat16 if run.training.bf16 else torch.float32,
            clip_grad=o.clip_grad,
            use_distributed_optimizer=run.parallel.use_distributed_optimizer,
            overlap_param_gather=run.parallel.overlap_param_gather,
        ),
        chunks,
    )
    config = chunks[0].config
    config.grad_scale_func = optimizer.scale_loss
    config.finalize_model_grads_func = finalize_model_grads
    if run.parallel.overlap_grad_reduce:
        config.no_sync_func = [c.no_sync for c in chunks]
        if len(chunks) > 1:
            config.grad_sync_func = [c.start_grad_sync for c in chunks]
        else:
            config.no_sync_func = config.no_sync_func[0]
    if run.parallel.overlap_param_gather and len(chunks) > 1:
        config.param_sync_func = [c.start_param_sync for c in chunks]
    return optimizer


def set_learning_rate(optimizer: MegatronOptimizer, lr: float, weight_decay: float) -> None:
    """Write the step's learning rate into every parameter group; norms and biases have wd_mult 0."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_mult", 1.0)
        group["weight_decay"] = weight_decay * group.get("wd_mult", 1.0)
