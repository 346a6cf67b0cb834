"""Keys of ``config.json`` that change nothing in a model's numbers, at any value or at some.

Collected from ``PretrainedConfig``, ``GenerationConfig`` and the configuration classes of Llama, Mistral, Qwen 2 and
Qwen 3 in transformers 4.57.6 and 5.23.0, and from the models that their hubs publish (tests/checkpoint/published.py).
Keys that compute are read in :mod:`hf_config`; a key that no table knows is refused by name.
"""

from typing import Any

from megatron.dmc.checkpoint.fields import shown_key
from megatron.dmc.config.checks import shown

INERT = frozenset(
    # names, origins and versions
    "_name_or_path name_or_path _commit_hash transformers_version transformers.js_config finetuning_task prefix "
    "tokenizer_class unsloth_version unsloth_fixed "
    # the type of the weights, which the files say (``model_dtype`` reads it where it is wanted)
    "torch_dtype dtype use_bfloat16 "
    # special tokens: the engine reads EOS (``Fields.token_ids``), the tokenizer knows the others
    "bos_token_id eos_token_id pad_token_id unk_token_id sep_token_id decoder_start_token_id "
    # how transformers runs a model, and what it returns
    "use_cache output_attentions output_hidden_states output_scores output_logits return_dict return_dict_in_generate "
    "return_legacy_cache torchscript chunk_size_feed_forward gradient_checkpointing _attn_implementation "
    "_attn_implementation_autoset _attn_implementation_internal attn_implementation _experts_implementation "
    "_flash_attn_2_enabled _use_flash_attention_2 use_flash_attention use_flash_attn keys_to_ignore_at_inference "
    "tf_legacy_loss is_decoder tie_encoder_decoder cross_attention_hidden_size "
    # tasks other than language modelling, whose architectures are refused
    "id2label label2id num_labels problem_type task_specific_params classifier_dropout "
    # lengths that are limits of a tokenizer or of a training run
    "max_sequence_length model_max_length "
    # defaults of sampling, in whose place a request's own parameters are
    "max_length max_new_tokens do_sample temperature top_p top_k".split()
)
"""Keys that change nothing at any value."""

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "add_cross_attention": (False,),
    "is_encoder_decoder": (False,),
    "is_causal": (True,),
    "is_llama_config": (True,),
    "num_nextn_predict_layers": (0,),
    "partial_rotary_factor": (1.0,),
    "per_layer_config": ({},),
    "pruned_heads": ({},),
    "rope_interleaved": (False,),
    "use_bidirectional_attention": (False,),
    "use_mrope": (False,),
    "use_qk_norm": (False,),
    # generation: what transformers 4 takes from config.json where there is no generation_config.json
    "assistant_confidence_threshold": (0.4,),
    "bad_words_ids": ([],),
    "begin_suppress_tokens": ([],),
    "diversity_penalty": (0.0,),
    "early_stopping": (False,),
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1.0,),
    "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,),
    "guidance_scale": (1.0,),
    "length_penalty": (1.0,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "min_p": (0.0,),
    "no_repeat_ngram_size": (0,),
    "num_beam_groups": (1,),
    "num_beams": (1,),
    "num_return_sequences": (1,),
    "remove_invalid_values": (False,),
    "renormalize_logits": (False, True),
    "repetition_penalty": (1.0,),
    "suppress_tokens": ([],),
    "token_healing": (False,),
    "typical_p": (1.0,),
}
"""Keys that change nothing at these values, or at null. Another value is refused by name."""


def is_one_of(value: Any, values: tuple[Any, ...]) -> bool:
    """Whether ``value`` is among ``values``: 1 is 1.0, and neither is True."""
    return any(value == other and isinstance(value, bool) == isinstance(other, bool) for other in values)


def check_neutral(config: dict) -> None:
    """Raise ``ValueError`` naming a key of :data:`NEUTRAL` that has a value which is not neutral."""
    for key in sorted(NEUTRAL.keys() & config.keys()):
        if config[key] is not None and not is_one_of(config[key], NEUTRAL[key]):
            raise ValueError(
                f"config.json: {key} is {shown(config[key])}; supported: {', '.join(map(repr, NEUTRAL[key]))}"
            )


def named(config: dict, keys: list[str]) -> str:
    """Keys with their values, for a message; the first ten."""
    more = f" and {len(keys) - 10} more" if len(keys) > 10 else ""
    return ", ".join(f"{shown_key(key)} = {shown(config[key])}" for key in keys[:10]) + more
