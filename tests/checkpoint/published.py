"""Keys and values of ``config.json`` that published models have: facts, without weights.

``TAKEN`` has the number of parameters beside them, in billions, as the hubs show it; ``REFUSED`` the words that the
message must hold.
"""

from __future__ import annotations

_LLAMA = dict(
    architectures=["LlamaForCausalLM"],
    model_type="llama",
    attention_bias=False,
    attention_dropout=0.0,
    bos_token_id=1,
    eos_token_id=2,
    hidden_act="silu",
    initializer_range=0.02,
    pretraining_tp=1,
    rms_norm_eps=1e-5,
    rope_scaling=None,
    rope_theta=10000.0,
    tie_word_embeddings=False,
    torch_dtype="bfloat16",
    transformers_version="4.40.0",
    use_cache=True,
    vocab_size=32000,
)
_MISTRAL = dict(
    architectures=["MistralForCausalLM"],
    model_type="mistral",
    attention_dropout=0.0,
    bos_token_id=1,
    eos_token_id=2,
    hidden_act="silu",
    initializer_range=0.02,
    max_position_embeddings=32768,
    rms_norm_eps=1e-5,
    rope_theta=1e6,
    sliding_window=None,
    tie_word_embeddings=False,
    torch_dtype="bfloat16",
    transformers_version="4.42.0.dev0",
    use_cache=True,
    vocab_size=32768,
)
_QWEN2 = dict(
    architectures=["Qwen2ForCausalLM"],
    model_type="qwen2",
    attention_dropout=0.0,
    bos_token_id=151643,
    eos_token_id=151645,
    hidden_act="silu",
    initializer_range=0.02,
    max_position_embeddings=32768,
    rms_norm_eps=1e-6,
    rope_theta=1e6,
    sliding_window=131072,
    tie_word_embeddings=False,
    torch_dtype="bfloat16",
    transformers_version="4.43.1",
    use_cache=True,
    use_sliding_window=False,
    vocab_size=152064,
)
_QWEN3 = {
    **_QWEN2,
    **dict(
        architectures=["Qwen3ForCausalLM"],
        model_type="qwen3",
        attention_bias=False,
        head_dim=128,
        max_position_embeddings=40960,
        rope_scaling=None,
        sliding_window=None,
        transformers_version="4.51.0",
        vocab_size=151936,
    ),
}


def _sizes(hidden: int, ffn: int, layers: int, heads: int, kv: int, **more: object) -> dict:
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    return {**dict(zip(names, (hidden, ffn, layers, heads, kv))), **more}


def _llama3(scaling: float | None = None, **more: object) -> dict:
    own: dict = dict(vocab_size=128256, bos_token_id=128000, eos_token_id=128001, rope_theta=500000.0)
    own["max_position_embeddings"] = 8192
    if scaling:
        own |= dict(
            max_position_embeddings=131072,
            eos_token_id=[128001, 128008, 128009],
            mlp_bias=False,
            rope_scaling=dict(
                factor=scaling,
                high_freq_factor=4.0,
                low_freq_factor=1.0,
                original_max_position_embeddings=8192,
                rope_type="llama3",
            ),
        )
    return {**_LLAMA, **own, **more}


_7B = {**_LLAMA, **_sizes(4096, 11008, 32, 32, 32, max_position_embeddings=4096, torch_dtype="float16")}
_8B, _70B = _sizes(4096, 14336, 32, 32, 8), _sizes(8192, 28672, 80, 64, 8)
_LLAMA1 = {key: value for key, value in _7B.items() if key not in ("num_key_value_heads", "rope_theta", "rope_scaling")}
_QWEN7B = _sizes(3584, 18944, 28, 28, 4, max_window_layers=28)
_QWEN32B = _sizes(5120, 27648, 64, 40, 8, max_window_layers=64)
_SMOL = dict(vocab_size=49152, bos_token_id=0, eos_token_id=0, tie_word_embeddings=True)
_JS = {"dtype": "q4", "kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}, "use_external_data_format": True}
_QWEN3_8B = {**_QWEN3, **_sizes(4096, 12288, 36, 32, 8, max_window_layers=36)}
_V5_ROPE = {"rope_theta": 1000000, "rope_type": "default"}

TAKEN: dict[str, tuple[float, dict]] = {
    "huggyllama/llama-7b": (
        6.738,
        {**_LLAMA1, "max_position_embeddings": 2048, "max_sequence_length": 2048, "pad_token_id": 0},
    ),
    "openlm-research/open_llama_7b": (6.738, {**_LLAMA1, "max_position_embeddings": 2048, "rms_norm_eps": 1e-6}),
    "meta-llama/Llama-2-7b-hf": (6.738, {**_7B, "_name_or_path": "meta-llama/Llama-2-7b-hf"}),
    "meta-llama/Llama-2-7b-chat-hf": (6.738, {**_7B, "pad_token_id": 0, "max_length": 4096}),
    "meta-llama/Llama-2-13b-hf": (13.016, {**_7B, **_sizes(5120, 13824, 40, 40, 40)}),
    "meta-llama/Llama-2-70b-hf": (68.977, {**_7B, **_70B}),
    "meta-llama/Meta-Llama-3-8B": (8.030, _llama3(**_8B)),
    "meta-llama/Meta-Llama-3-70B-Instruct": (70.554, _llama3(**_70B, eos_token_id=128009)),
    "meta-llama/Llama-3.1-8B-Instruct": (8.030, _llama3(8.0, **_8B)),
    "meta-llama/Llama-3.1-405B": (405.853, _llama3(8.0, **_sizes(16384, 53248, 126, 128, 8))),
    "meta-llama/Llama-3.2-1B": (
        1.236,
        _llama3(32.0, **_sizes(2048, 8192, 16, 32, 8), head_dim=64, tie_word_embeddings=True),
    ),
    "meta-llama/Llama-3.2-3B-Instruct": (
        3.213,
        _llama3(32.0, **_sizes(3072, 8192, 28, 24, 8), head_dim=128, tie_word_embeddings=True),
    ),
    "meta-llama/Llama-3.3-70B-Instruct": (70.554, _llama3(8.0, **_70B)),
    "meta-llama/Llama-Guard-3-8B": (8.030, _llama3(8.0, **_8B, pad_token_id=None)),
    "allenai/Llama-3.1-Tulu-3-8B": (8.030, _llama3(8.0, **_8B, vocab_size=128264, use_cache=False)),
    "NousResearch/Hermes-3-Llama-3.1-8B": (8.030, _llama3(8.0, **_8B, eos_token_id=128040)),
    "nvidia/Llama-3.1-Minitron-4B-Width-Base": (4.513, _llama3(8.0, **_sizes(3072, 9216, 32, 32, 8), head_dim=128)),
    "deepseek-ai/DeepSeek-R1-Distill-Llama-8B": (8.030, _llama3(8.0, **_8B)),
    "codellama/CodeLlama-7b-hf": (
        6.738,
        {**_7B, "vocab_size": 32016, "rope_theta": 1000000, "max_position_embeddings": 16384},
    ),
    "codellama/CodeLlama-34b-hf": (33.744, {**_7B, **_sizes(8192, 22016, 48, 64, 8), "rope_theta": 1000000}),
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": (
        1.100,
        {**_7B, **_sizes(2048, 5632, 22, 32, 4), "max_position_embeddings": 2048},
    ),
    "HuggingFaceTB/SmolLM-135M": (
        0.1345,
        {**_7B, **_SMOL, **_sizes(576, 1536, 30, 9, 3), "max_position_embeddings": 2048},
    ),
    "HuggingFaceTB/SmolLM2-135M": (
        0.1345,
        {
            **{**_7B, **_SMOL, **_sizes(576, 1536, 30, 9, 3), "max_position_embeddings": 8192, "rope_theta": 100000},
            **{"is_llama_config": True, "rope_interleaved": False, "_flash_attn_2_enabled": True},
        },
    ),
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": (
        1.711,
        {
            **{**_7B, **_SMOL, **_sizes(2048, 8192, 24, 32, 32), "max_position_embeddings": 8192, "rope_theta": 130000},
            **{"pad_token_id": 2, "transformers.js_config": _JS},
        },
    ),
    "lmsys/vicuna-7b-v1.5": (6.738, {**_7B, "pad_token_id": 0, "_name_or_path": "vicuna-7b-v1.5"}),
    "01-ai/Yi-6B": (
        6.061,
        {**_7B, **_sizes(4096, 11008, 32, 32, 4), "vocab_size": 64000, "rope_theta": 5000000.0, "pad_token_id": 0},
    ),
    "01-ai/Yi-34B-200K": (
        34.389,
        {
            **{**_7B, **_sizes(7168, 20480, 60, 56, 8), "vocab_size": 64000},
            **{"rope_theta": 10000000.0, "max_position_embeddings": 200000},
        },
    ),
    "deepseek-ai/deepseek-llm-7b-base": (
        6.910,
        {
            **{**_7B, "num_hidden_layers": 30, "vocab_size": 102400, "rms_norm_eps": 1e-6},
            **{"bos_token_id": 100000, "eos_token_id": 100001},
        },
    ),
    "upstage/SOLAR-10.7B-v1.0": (10.732, {**_7B, **_sizes(4096, 14336, 48, 32, 8)}),
    "tiiuae/Falcon3-7B-Base": (
        7.456,
        {
            **{**_7B, **_sizes(3072, 23040, 28, 12, 4), "head_dim": 256, "vocab_size": 131072, "rms_norm_eps": 1e-6},
            **{"rope_theta": 1000042, "max_position_embeddings": 32768, "mlp_bias": False, "eos_token_id": 11},
        },
    ),
    "mistralai/Mistral-7B-Instruct-v0.2": (7.242, {**_MISTRAL, **_8B, "vocab_size": 32000}),
    "mistralai/Mistral-7B-v0.3": (7.248, {**_MISTRAL, **_8B}),
    "mistralai/Mistral-Nemo-Base-2407": (
        12.248,
        {
            **{**_MISTRAL, **_sizes(5120, 14336, 40, 32, 8), "head_dim": 128, "vocab_size": 131072},
            **{"max_position_embeddings": 128000},
        },
    ),
    "mistralai/Mistral-Large-Instruct-2407": (
        122.610,
        {**_MISTRAL, **_sizes(12288, 28672, 88, 96, 8), "max_position_embeddings": 131072},
    ),
    "mistralai/Ministral-8B-Instruct-2410": (
        8.020,
        {
            **{**_MISTRAL, **_sizes(4096, 12288, 36, 32, 8), "head_dim": 128, "vocab_size": 131072},
            **{"sliding_window": 32768, "rope_theta": 100000000.0},
        },
    ),
    "mistralai/Mistral-Small-24B-Instruct-2501": (
        23.572,
        {
            **{**_MISTRAL, **_sizes(5120, 32768, 40, 32, 8), "head_dim": 128, "vocab_size": 131072},
            **{"rope_theta": 100000000.0},
        },
    ),
    "mistralai/Codestral-22B-v0.1": (22.247, {**_MISTRAL, **_sizes(6144, 16384, 56, 48, 8)}),
    "Qwen/Qwen1.5-7B": (
        7.721,
        {
            **{**_QWEN2, **_sizes(4096, 11008, 32, 32, 32), "vocab_size": 151936, "sliding_window": 32768},
            **{"max_window_layers": 28},
        },
    ),
    "Qwen/Qwen2-0.5B": (
        0.494,
        {
            **{**_QWEN2, **_sizes(896, 4864, 24, 14, 2), "vocab_size": 151936, "tie_word_embeddings": True},
            **{"max_position_embeddings": 131072, "max_window_layers": 24, "eos_token_id": 151643},
        },
    ),
    "Qwen/Qwen2-72B-Instruct": (72.706, {**_QWEN2, **_sizes(8192, 29568, 80, 64, 8), "max_window_layers": 80}),
    "Qwen/Qwen2.5-7B": (
        7.616,
        {**_QWEN2, **_QWEN7B, "max_position_embeddings": 131072, "use_mrope": False, "eos_token_id": 151643},
    ),
    "Qwen/Qwen2.5-7B-Instruct": (7.616, {**_QWEN2, **_QWEN7B}),
    "Qwen/Qwen2.5-Coder-32B-Instruct": (32.764, {**_QWEN2, **_QWEN32B}),
    "Qwen/QwQ-32B": (32.764, {**_QWEN2, **_QWEN32B, "sliding_window": 32768, "max_position_embeddings": 40960}),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": (
        1.777,
        {
            **{
                **_QWEN2,
                **_sizes(1536, 8960, 28, 12, 2),
                "vocab_size": 151936,
                "rope_theta": 10000,
                "use_mrope": False,
            },
            **{"max_position_embeddings": 131072, "sliding_window": 4096, "max_window_layers": 21},
        },
    ),
    "Qwen/Qwen3-0.6B": (
        0.596,
        {**_QWEN3, **_sizes(1024, 3072, 28, 16, 8), "max_window_layers": 28, "tie_word_embeddings": True},
    ),
    "Qwen/Qwen3-8B": (8.191, _QWEN3_8B),
    "Qwen/Qwen3-8B, saved by transformers 5": (
        8.191,
        {
            **{
                key: value
                for key, value in _QWEN3_8B.items()
                if key not in ("rope_theta", "rope_scaling", "torch_dtype")
            },
            **{"dtype": "bfloat16", "layer_types": ["full_attention"] * 36, "rope_parameters": _V5_ROPE},
            **{"transformers_version": "5.0.0", "pad_token_id": None},
        },
    ),
    "Qwen/Qwen3-32B": (32.762, {**_QWEN3, **_sizes(5120, 25600, 64, 64, 8), "max_window_layers": 64}),
    "Qwen/Qwen3-4B-Instruct-2507": (
        4.022,
        {
            **{**_QWEN3, **_sizes(2560, 9728, 36, 32, 8), "max_window_layers": 36, "tie_word_embeddings": True},
            **{"max_position_embeddings": 262144, "rope_theta": 5000000},
        },
    ),
}

_LINEAR = {"factor": 4.0, "type": "linear"}
_MISTRAL_V1 = {**_MISTRAL, **_8B, "vocab_size": 32000, "rope_theta": 10000.0, "sliding_window": 4096}
REFUSED: dict[str, tuple[str, dict]] = {
    "lmsys/vicuna-7b-v1.5-16k": ("linear", {**_7B, "rope_scaling": _LINEAR, "max_sequence_length": 16384}),
    "deepseek-ai/deepseek-coder-6.7b-instruct": (
        "linear",
        {**_7B, "rope_scaling": _LINEAR, "rope_theta": 100000, "max_position_embeddings": 16384, "vocab_size": 32256},
    ),
    "togethercomputer/LLaMA-2-7B-32K": (
        "linear",
        {
            **{**_7B, "rope_scaling": {"factor": 8.0, "type": "linear"}, "max_position_embeddings": 32768},
            **{"auto_map": {"AutoModelForCausalLM": "modeling_flash_llama.LlamaForCausalLM"}},
        },
    ),
    "mistralai/Mistral-7B-v0.1": ("sliding_window 4096", _MISTRAL_V1),
    "HuggingFaceH4/zephyr-7b-beta": ("sliding_window 4096", {**_MISTRAL_V1, "pad_token_id": 2}),
    "Qwen/Qwen2.5-7B-Instruct-1M": (
        "dual_chunk_attention_config",
        {
            **{**_QWEN2, **_QWEN7B, "max_position_embeddings": 1010000, "rope_theta": 10000000.0},
            **{"dual_chunk_attention_config": {"chunk_size": 262144, "local_size": 8192}},
        },
    ),
    "TheBloke/Llama-2-7B-Chat-GPTQ": ("quantization_config", {**_7B, "quantization_config": {"bits": 4}}),
    "unsloth/Meta-Llama-3.1-8B-bnb-4bit": (
        "quantization_config",
        _llama3(8.0, **_8B, unsloth_version="2024.9", quantization_config={"load_in_4bit": True}),
    ),
    "Qwen/Qwen3-30B-A3B": ("qwen3_moe", {**_QWEN3, "model_type": "qwen3_moe", "num_experts": 128}),
    "HuggingFaceTB/SmolLM3-3B": ("smollm3", {**_LLAMA, "model_type": "smollm3", "no_rope_layers": [1, 1, 1, 0]}),
}
