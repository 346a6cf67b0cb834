"""Packed and quantized linear layers, and the engine that runs on them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers.engines import prompt_scores
from safetensors.torch import save_file

from megatron.dmc.checkpoint.formats import hf
from megatron.dmc.inference import LLM, EngineConfig, SamplingParams, dummy
from megatron.dmc.inference.engine import Engine
from megatron.dmc.inference.model import Model
from megatron.dmc.inference.parallel import TensorParallel
from megatron.dmc.inference.quantization import Quantization, check_quantization, int4_linear, int8_linear
from megatron.dmc.inference.weights import read_info

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "float32",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-5,
    "vocab_size": 100,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "rope_theta": 5e4,
}
LAYERS = {"int8": int8_linear, "int4": lambda weight, bias: int4_linear(weight, 32, bias)}
ERROR = {"int8": 0.012, "int4": 0.12}
"""Largest relative error of a product with normal weights: of rounding them to 255 values, and to 16 in a group of 32
with rows rounded to 255 values in a group.
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Model directory with random weights."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    weights = {name: lazy.read(0, lazy.shape[0]) for name, lazy in dummy.open_directory(tmp_path).tensors.items()}
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    return tmp_path


def _error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


@pytest.mark.parametrize("inputs", [64, 72])
@pytest.mark.parametrize("method", LAYERS)
def test_layers_take_any_number_of_rows(method: str, inputs: int) -> None:
    """x W^T + b within the rounding of the weight, contiguous; x stays as it was, and zero weights stay zero."""
    if method == "int4" and inputs % 32:
        pytest.skip("int4 takes whole groups of inputs")
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(48, inputs, generator=generator).bfloat16(), torch.randn(48, generator=generator)
    weight[3] = 0
    for b in (None, bias.bfloat16()):
        layer = LAYERS[method](weight, b)
        assert layer.nbytes < weight.nbytes
        for rows in (0, 1, 2, 16, 17, 70):
            x = torch.randn(rows, inputs, generator=generator).bfloat16()
            before, want = x.clone(), x.double() @ weight.double().T + (0 if b is None else b.double())
            got = layer(x)
            assert got.shape == want.shape and got.dtype == x.dtype and got.is_contiguous() and torch.equal(x, before)
            assert torch.equal(got[:, 3], want[:, 3].bfloat16())
            assert rows == 0 or _error(got, want) <= ERROR[method]


@pytest.mark.parametrize("method, bound", [("int8", 0.01), ("int4", 0.03)])
def test_an_engine_on_quantized_weights(path: Path, method: str, bound: float) -> None:
    """Smaller, in bfloat16 whatever the files have, and nearly the same log-probabilities, prefilled or decoded."""
    prompt = torch.randint(0, 100, (60,), generator=torch.Generator().manual_seed(1)).tolist()
    settings = {"max_num_seqs": 1, "enable_prefix_caching": False}
    plain = Engine(path, EngineConfig(dtype="bfloat16", **settings))
    want = prompt_scores(plain, prompt)
    for chunk in (512, 1):
        engine = Engine(path, EngineConfig(quantization=method, max_num_batched_tokens=chunk, **settings))
        assert engine.model.dtype == torch.bfloat16 and method in engine.model.forms()
        assert engine.model.nbytes() < plain.model.nbytes()
        assert _error(prompt_scores(engine, prompt), want.double()) <= bound


@pytest.mark.parametrize("method", ["dmc", "dms"])
def test_compressed_models_run_on_quantized_weights(path: Path, method: str) -> None:
    """Merging models, and evicting ones with adapters, which stay as they are."""
    directory = dummy.open_directory(path, 2.0, method)
    engine = Engine(directory, EngineConfig(quantization="int4", max_num_seqs=4))
    assert all((layer.adapter is not None) == (method == "dms") for layer in engine.model.layers)
    for n in range(3):
        engine.add_request(str(n), list(range(20 + n)), SamplingParams(max_tokens=8, ignore_eos=True))
    while engine.has_unfinished():
        assert all(output.error is None for output in engine.step())
        engine.cache.check_integrity()


@pytest.mark.parametrize("quantization", [None, Quantization("int8"), Quantization("int4")])
def test_ranks_hold_parts_of_a_layer(path: Path, quantization: Quantization | None) -> None:
    """Products of two ranks' parts make those of the whole layer: one below the other, or summed."""
    directory, device, dtype = hf.open_directory(path), torch.device("cpu"), torch.bfloat16
    info = read_info(directory)
    plain = Model(directory, info, TensorParallel(), dtype, device).layers[1]
    ranks = [Model(directory, info, TensorParallel(n, 2), dtype, device, quantization).layers[1] for n in range(2)]
    bound = 0.01 if quantization is None else ERROR[quantization.method]
    x, z = torch.randn(3, 64).bfloat16(), torch.randn(3, 128).bfloat16()
    gated = torch.cat([rank.gate_up(x) for rank in ranks], dim=1)
    assert _error(gated, plain.gate_up(x).double()) <= 2 * bound  # a product of two outputs
    parts = [rank.down(part.contiguous()).double() for rank, part in zip(ranks, z.chunk(2, dim=1))]
    assert _error(parts[0] + parts[1], plain.down(z).double()) <= bound


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"quantization": "int3"}, ["quantization is 'int3'", "int8 or int4"]),
        ({"quantization": "int4", "quantization_group_size": 48}, ["quantization_group_size is 48", "32, 64, 128"]),
        (
            {"quantization": "int4", "quantization_group_size": 128},
            ["model.layers.0.self_attn.qkv_proj has 64 inputs", "128", "int8"],
        ),
    ],
)
def test_what_is_refused(path: Path, settings: dict, words: list[str]) -> None:
    with pytest.raises(ValueError) as caught:
        LLM(path, tokenizer=object(), **settings)
    assert all(word in str(caught.value) for word in words), caught.value


def test_gpus_are_refused(path: Path) -> None:
    with pytest.raises(ValueError, match="quantization int8 runs on CPUs, and device is cuda"):
        check_quantization(read_info(hf.open_directory(path)), Quantization("int8"), torch.device("cuda"))
