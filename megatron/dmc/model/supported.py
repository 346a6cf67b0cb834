"""Every option of megatron-core's ``TransformerConfig``, sorted by what a DMC layer makes of it, and the refusals.

The lists cover 0.16.1 to 0.20 (``tests/model/test_supported.py`` fails when the installed version has a field that
nobody has sorted). ``GPT_MODEL_ARGUMENTS`` does the same for the arguments of ``GPTModel`` and its ``forward``.
"""

from dataclasses import MISSING, Field, fields
from typing import Any

from megatron.core.transformer.transformer_config import TransformerConfig

HONOURED = frozenset(
    # the model
    "num_layers hidden_size num_attention_heads num_query_groups ffn_hidden_size kv_channels hidden_dropout "
    "layernorm_epsilon add_bias_linear add_qkv_bias gated_linear_unit activation_func activation_func_fp8_input_store "
    "glu_linear_offset activation_func_clamp_value use_te_activation_func qk_layernorm "
    # layout
    "tensor_model_parallel_size pipeline_model_parallel_size virtual_pipeline_model_parallel_size sequence_parallel "
    "pipeline_model_parallel_comm_backend num_layers_in_first_pipeline_stage num_layers_in_last_pipeline_stage "
    "pipeline_model_parallel_layout account_for_embedding_in_pipeline_split account_for_loss_in_pipeline_split "
    "hetereogenous_dist_checkpoint "
    # weights and precision
    "perform_initialization use_cpu_initialization init_method output_layer_init_method init_method_std "
    "embedding_init_method embedding_init_method_std fp16 bf16 params_dtype "
    # recomputation and offloading around and inside the layers
    "recompute_granularity recompute_method recompute_num_layers recompute_modules distribute_saved_activations "
    "num_microbatches_with_partial_activation_checkpoints cpu_offloading cpu_offloading_num_layers "
    "_cpu_offloading_context cpu_offloading_activations cpu_offloading_weights cpu_offloading_double_buffering "
    "cpu_offloading_retain_pinned_cpu_buffers "
    # megatron-core's linear layers, MLP, embedding and loss
    "gradient_accumulation_fusion bias_activation_fusion bias_dropout_fusion delay_wgrad_compute deterministic_mode "
    "tp_comm_overlap tp_comm_bulk_wgrad tp_comm_bulk_dgrad tp_comm_overlap_ag tp_comm_overlap_rs "
    "tp_comm_overlap_rs_dgrad tp_comm_split_ag tp_comm_atomic_ag tp_comm_split_rs tp_comm_atomic_rs "
    "tp_comm_overlap_disable_qkv tp_comm_overlap_disable_fc1 tp_comm_bootstrap_backend symmetric_ar_type "
    "disable_parameter_transpose_cache clone_scatter_output_in_embedding cross_entropy_loss_fusion "
    "cross_entropy_fusion_impl defer_embedding_wgrad_compute wgrad_deferral_limit mlp_chunks_for_training "
    # the schedules and the optimizer
    "timers finalize_model_grads_func grad_scale_func no_sync_func grad_sync_func param_sync_func pipeline_dtype "
    "variable_seq_lengths overlap_p2p_comm batch_p2p_comm batch_p2p_sync use_ring_exchange_p2p "
    "deallocate_pipeline_outputs overlap_p2p_comm_warmup_flush microbatch_group_size_per_vp_stage "
    "calculate_per_token_loss barrier_with_L1_time".split()
)
"""Fields that do what megatron-core says, in our layers or in its code around them."""

IRRELEVANT = frozenset(
    # Attention has kernels of its own: fp32 softmax, own rotation, never a mask.
    "attention_backend attention_softmax_in_fp32 apply_query_key_layer_scaling masked_softmax_fusion apply_rope_fusion "
    "fused_single_qkv_rope flash_attention_version "
    # Norms are torch's, or Transformer Engine's.
    "persist_layer_norm memory_efficient_layer_norm "
    # No code of 0.16.1 reads it.
    "apply_residual_connection_post_layernorm async_tensor_model_parallel_allreduce moe_extended_tp "
    # Checks, logs, global switches and generators that no layer looks at.
    "test_mode config_logger_dir disable_bf16_reduced_precision_matmul use_te_rng_tracker inference_rng_tracker "
    "transformer_impl use_transformer_engine_op_fuser use_grouped_gemm_for_dense_mlp high_priority_a2a_comm_stream "
    # Inference of megatron-core.
    "flash_decode inference_sampling_seed use_inference_optimized_layers inference_fuse_tp_communication "
    "mlp_chunks_for_prefill nccl_all_reduce_for_prefill inference_disable_triton_nvls_kernels "
    "inference_grouped_gemm_backend inference_moe_disable_fused_quant_kernels inference_cuda_graph_scope "
    "inference_moe_token_dispatcher_type batch_invariant_backend "
    # Of no effect without what is refused below: context parallelism,
    "cp_comm_type hierarchical_context_parallel_sizes max_seqlen_per_dp_cp_rank window_attn_skip_freq "
    # clipping, linear and sparse attention, Mamba, autocast, CUDA graphs, offloading,
    "qk_clip_alpha qk_clip_threshold autocast_dtype offload_modules min_offloaded_tensor_size "
    "fine_grained_offloading_max_inflight_offloads delay_offload_until_cuda_graph delta_offload_bytes_across_pp_ranks "
    "activation_offload_fraction cuda_graph_use_single_mempool cuda_graph_retain_backward_graph "
    "cuda_graph_warmup_steps cuda_graph_scope cuda_graph_modules linear_conv_kernel_dim linear_key_head_dim "
    "linear_value_head_dim linear_num_key_heads linear_num_value_heads gdp_num_householder gdp_cutedsl_kernel "
    "gdp_num_chunk_states_to_recompute mamba_state_dim mamba_head_dim mamba_num_groups mamba_num_heads "
    "use_mamba_mem_eff_path mamba_training_ssm_states_dtype dsa_indexer_n_heads dsa_indexer_head_dim "
    "dsa_indexer_topk dsa_indexer_loss_coeff dsa_indexer_use_sparse_loss dsa_indexer_topk_freq "
    "dsa_indexer_skip_topk_offset dsa_kernel_backend dsa_indexer_rope_interleaved dsa_indexer_rotate_activation "
    "dsa_indexer_scoring_relu dsa_indexer_k_norm_epsilon dsa_indexer_k_norm_fp32 "
    "experimental_attention_variant_loss_scale_func "
    # fp8 and fp4,
    "fp8_recipe fp8_param fp8_quantizer_factory fp8_margin fp8_interval fp8_amax_history_len fp8_amax_compute_algo "
    "fp8_wgrad fp8_dot_product_attention fp8_multi_head_attention fp8_output_proj tp_only_amax_red "
    "first_last_layers_bf16 num_layers_at_start_in_bf16 num_layers_at_end_in_bf16 use_kitchen_attention "
    "kitchen_attention_backend fp4_recipe fp4_param fp4_quantizer_factory "
    # multi-token prediction, muP, hyper-connections, weight sharding,
    "mtp_loss_scaling_factor mtp_standalone mtp_use_repeated_layer mtp_hybrid_override_pattern mtp_grad_scale_func "
    "mtp_detach_heads mtp_hsm mup_width_mult mup_base_hidden_size mup_embedding_mult mup_output_mult "
    "mup_base_head_dim mup_attn_scale_power mhc_num_residual_streams mhc_sinkhorn_iterations mhc_init_gating_factor "
    "mhc_recompute_layer_num gtp_remat_opt_in_modules "
    # mixture of experts.
    "expert_model_parallel_size expert_tensor_parallel_size expert_tensor_parallel_num_weight_shards "
    "expert_gtp_weight_remat_size ep_overlap_early_attn_memory_release use_fused_weighted_squared_relu "
    "overlap_dispatch_backward_with_experts_wgrad use_grouped_gemm_for_shared_expert "
    "moe_shared_expert_intermediate_size moe_shared_expert_gate moe_shared_expert_overlap "
    "moe_shared_expert_glu_interleave_size moe_layer_freq moe_ffn_hidden_size moe_router_load_balancing_type "
    "moe_router_topk moe_enable_routing_replay moe_router_topk_limited_devices moe_router_padding_for_quantization "
    "moe_router_padding_for_fp8 moe_router_num_groups moe_router_group_topk moe_router_pre_softmax "
    "moe_router_topk_scaling_factor moe_router_score_function moe_router_dtype moe_router_enable_expert_bias "
    "moe_router_bias_update_rate moe_router_force_load_balancing moe_router_force_biased "
    "moe_router_quantile_balancing_ema moe_grouped_gemm moe_use_legacy_grouped_gemm moe_use_grouped_tensor "
    "moe_aux_loss_coeff moe_z_loss_coeff moe_input_jitter_eps moe_token_dropping moe_token_dispatcher_type "
    "moe_enable_deepep moe_flex_dispatcher_backend moe_flex_dispatcher_num_sms moe_per_layer_logging "
    "moe_expert_capacity_factor moe_expert_rank_capacity_factor moe_pad_expert_input_to_capacity "
    "moe_pad_experts_for_cuda_graph_inference moe_token_drop_policy moe_layer_recompute moe_permute_fusion "
    "moe_permute_fusion_into_hybridep moe_router_fusion moe_apply_probs_on_input moe_latent_size moe_deepep_num_sms "
    "moe_hybridep_num_sms moe_hybridep_num_sms_preprocessing moe_hybridep_num_blocks_permute "
    "moe_hybridep_num_blocks_unpermute moe_hybridep_pad_uneven_dispatch_inputs moe_mlp_glu_interleave_size "
    "moe_single_grouped_weight moe_single_grouped_bias moe_paged_stash moe_paged_stash_page_size "
    "moe_paged_stash_buffer_size_factor_cuda moe_paged_stash_buffer_size_factor_cpu moe_grad_scale_func "
    "moe_ncclep_static_shape moe_ncclep_zero_copy moe_dispatch_fwd_dtype moe_combine_bwd_dtype".split()
)
"""Fields that change nothing in a DMC model, whatever they are."""

_OFF = (None, False)
REFUSED: dict[str, tuple] = {
    # another model
    "multi_latent_attention": _OFF,
    "num_moe_experts": _OFF,
    "normalization": ("RMSNorm",),
    "layernorm_zero_centered_gamma": _OFF,
    "qk_l2_norm": _OFF,
    "attention_output_gate": _OFF,
    "attention_dropout": (0,),
    "softmax_scale": _OFF,
    "softmax_type": ("vanilla",),
    "window_size": (*_OFF, (-1, -1)),
    "rotary_interleaved": _OFF,
    "no_rope_freq": (*_OFF, []),
    "mrope_section": _OFF,
    "experimental_attention_variant": _OFF,
    "linear_attention_freq": _OFF,
    "is_hybrid_model": _OFF,
    "heterogeneous_block_specs": _OFF,
    "mtp_num_layers": (*_OFF, 0),
    "use_mup": _OFF,
    "enable_mhc_connections": _OFF,
    # another arithmetic
    "fp8": _OFF,
    "fp4": _OFF,
    "use_kitchen": _OFF,
    "quant_recipe": _OFF,
    "enable_autocast": _OFF,
    "fp32_residual_connection": _OFF,
    "fused_residual_rmsnorm": _OFF,
    "batch_invariant_mode": _OFF,
    # attention scores that exist in no memory
    "qk_clip": _OFF,
    "log_max_attention_logit": _OFF,
    # a layout or a schedule that goes around the layer's forward, or was never tried with it
    "context_parallel_size": (1,),
    "hybrid_context_parallel": _OFF,
    "tensor_parallel_num_weight_shards": (*_OFF, 1),
    "gtp_weight_remat_size": (*_OFF, 1),
    "overlap_moe_expert_parallel_comm": _OFF,
    "fine_grained_activation_offloading": _OFF,
    "init_model_with_meta_device": _OFF,
    "enable_cuda_graph": _OFF,
    "external_cuda_graph": _OFF,
    "cuda_graph_impl": (*_OFF, "none"),
}
"""Fields of which a DMC layer computes these values only."""

GPT_MODEL_ARGUMENTS: dict[str, str] = {
    **dict.fromkeys(
        "config transformer_layer_spec vocab_size max_sequence_length pre_process post_process fp16_lm_cross_entropy "
        "logit_dtype parallel_output share_embeddings_and_output_weights rotary_base rope_scaling rope_scaling_factor "
        "scatter_embedding_sequence_parallel seq_len_interpolation_factor pg_collection vp_stage input_ids "
        "position_ids decoder_input labels extra_block_kwargs runtime_gather_output output_processor "
        "output_processor_context".split(),
        "honoured",
    ),
    "padding_mask": "irrelevant: for the router of experts",
    "loss_mask": "irrelevant: for multi-token prediction",
    "is_spec_decode": "irrelevant: for megatron-core's inference",
    "position_embedding_type": "rope and yarn; the others are refused by the layer's forward",
    "rotary_percent": "1; refused by the layer's forward",
    "attention_mask": "None or causal; refused by the layer's forward",
    "packed_seq_params": "refused by the layer's forward",
    "inference_context": "refused by the layer's forward",
    "inference_params": "refused by the layer's forward",
    "mtp_block_spec": "refused by its mtp_num_layers",
}
"""Arguments of ``GPTModel`` and ``GPTModel.forward``, and what becomes of them."""


def check_supported(config: TransformerConfig) -> None:
    """Raise ``ValueError`` naming the first option of ``config`` that asks for what a DMC layer does not compute.

    Fields of subclasses are not looked at. A field of an unknown version of megatron-core has to have its default.
    """
    found = {field.name: field for field in fields(TransformerConfig)}
    for name, allowed in REFUSED.items():
        if name in found and not any(getattr(config, name) == value for value in allowed):
            raise ValueError(
                f"DMC layers do not support {name} {getattr(config, name)!r}; set it to "
                f"{' or '.join(dict.fromkeys(map(repr, allowed)))}"
            )
    for name, field in found.items():
        if name not in HONOURED and name not in IRRELEVANT and name not in REFUSED:
            value = getattr(config, name)
            if value != _default(field):
                raise ValueError(
                    f"DMC layers do not know what {name} {value!r} does: this version of megatron-core is newer than "
                    f"they are; leave it at {_default(field)!r}"
                )
    if config.num_query_groups < config.tensor_model_parallel_size:
        raise ValueError(
            f"DMC layers do not support tensor_model_parallel_size {config.tensor_model_parallel_size} above "
            f"num_query_groups {config.num_query_groups}; use at most {config.num_query_groups}"
        )


def _default(field: Field) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()
