"""Directories and GGUF files with quantized weights: what is read, and the engine over the codes."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import gguf_files
from helpers.dms_models import edit
from helpers.quantized_directories import CONFIG, Kind, as_numbers, log_probs, write
from safetensors.torch import load_file, save_file

from megatron.dmc import cli
from megatron.dmc.checkpoint.codes import CodedTensor
from megatron.dmc.checkpoint.formats import adapter, gguf, hf
from megatron.dmc.checkpoint.formats.gguf.blocks import TYPES
from megatron.dmc.inference import LLM, EngineConfig, SamplingParams, dummy
from megatron.dmc.inference.engine import Engine
from megatron.dmc.inference.linear import OrderedLinear, PanelLinear, StackedLinear
from megatron.dmc.inference.model import Model
from megatron.dmc.inference.parallel import TensorParallel
from megatron.dmc.inference.weights import read_info

KINDS = {
    "int4": Kind("pack-quantized", symmetric=True),
    "int4 with zero points": Kind("pack-quantized", group=64),
    "int4 per output": Kind("pack-quantized", group=None),
    "int8 per output": Kind("pack-quantized", 8, None, symmetric=True),
    "int8, unpacked": Kind("int-quantized", 8, None, symmetric=True),
    "int8, unpacked, with zero points": Kind("int-quantized", 8, 32),
    "int4 in another order": Kind("pack-quantized", ordered=True),
    "GPTQ": Kind("gptq", group=128, symmetric=True),
    "GPTQ with zero points": Kind("gptq"),
    "GPTQ per output": Kind("gptq", group=None),
    "GPTQ int8": Kind("gptq", 8, 64),
    "GPTQ in another order": Kind("gptq", ordered=True),
    "GPTQ version 2": Kind("gptq_v2", group=64, ordered=True),
    "AWQ": Kind("awq", group=64),
}
PROMPT = torch.randint(0, CONFIG["vocab_size"], (60,), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", KINDS)
def test_codes_of_a_directory(name: str, tmp_path: Path) -> None:
    """Weights are what the format says, by rows and as a whole; the engine keeps the codes, and computes with them what
    it computes with the numbers.
    """
    kind = KINDS[name]
    held = write(tmp_path / "m", kind)
    directory = hf.open_directory(tmp_path / "m")
    assert directory.quantization == kind.config()["quant_method"] and "quantization_config" not in directory.config
    assert directory.tensors.keys() == held.keys()
    for key, want in held.items():
        tensor = directory.tensors[key]
        assert tensor.shape == want.shape and tensor.dtype == torch.float16
        assert torch.equal(tensor.read(), want.half())
        assert torch.equal(tensor.read(5, 22), want.half()[5:22]) or tensor.shape[0] < 22
    engine = Engine(directory, EngineConfig(max_num_seqs=1))
    layer = engine.model.layers[0]
    form = OrderedLinear if kind.ordered else PanelLinear
    assert engine.model.dtype == torch.bfloat16 and all(isinstance(linear, form) for linear in layer.linears)
    assert f"int{kind.bits}" in engine.model.forms() and engine.quantization == directory.quantization
    mixed = kind.format.endswith("quantized")
    assert isinstance(engine.model.layers[1].qkv, StackedLinear) == mixed
    want = log_probs(as_numbers(directory), PROMPT)
    error = (log_probs(directory, PROMPT) - want).abs().mean()
    assert error <= (1e-4 if kind.bits == 8 else 0.03), error


@pytest.mark.parametrize("name", ["int4 per output", "int8 per output", "GPTQ int8", "AWQ"])
def test_ranks_hold_parts_of_the_codes(name: str, tmp_path: Path) -> None:
    """Products of two ranks' parts make those of the whole layer: one below the other, or summed."""
    write(tmp_path / "m", KINDS[name])
    directory, device = hf.open_directory(tmp_path / "m"), torch.device("cpu")
    info = read_info(directory)
    whole, *ranks = [
        Model(directory, info, TensorParallel(rank, size), torch.float32, device).layers[0]
        for rank, size in ((0, 1), (0, 2), (1, 2))
    ]
    x, z = torch.randn(3, 128), torch.randn(3, 256)
    gated = torch.cat([rank.gate_up(x) for rank in ranks], dim=1)
    torch.testing.assert_close(gated, whole.gate_up(x), atol=1e-5, rtol=1e-5)
    parts = [rank.down(part.contiguous()) for rank, part in zip(ranks, z.chunk(2, dim=1))]
    torch.testing.assert_close(sum(parts), whole.down(z), atol=1e-2, rtol=1e-2)


def test_ranks_do_not_divide_what_they_cannot(tmp_path: Path) -> None:
    """Inputs in another order, and groups that are cut."""
    for name, kind, size, words in (
        ("a", Kind("gptq", ordered=True), 2, "desc_act"),
        ("b", Kind("gptq", group=64), 1, None),
    ):
        write(tmp_path / name, kind)
        directory = hf.open_directory(tmp_path / name)
        arguments = directory, read_info(directory), TensorParallel(0, size), torch.float32, torch.device("cpu")
        if words is None:
            assert Model(*arguments).layers
        else:
            with pytest.raises(ValueError, match=words):
                Model(*arguments)


def _change(path: Path, **changes: object) -> None:
    settings = json.loads((path / "config.json").read_text())["quantization_config"]
    edit(path, {"quantization_config": settings | changes})


REFUSED = {
    "bits 3": ("GPTQ", {"bits": 3}, "quantization_config.bits is 3; it must be 4 or 8"),
    "Marlin": ("GPTQ", {"checkpoint_format": "marlin"}, "checkpoint_format is 'marlin'"),
    "AWQ for GEMV": ("AWQ", {"version": "gemv"}, "version is 'gemv'"),
    "bitsandbytes": ("AWQ", {"quant_method": "bitsandbytes"}, "quant_method is 'bitsandbytes'"),
    "fp8": ("int4", {"quant_method": "fp8"}, "quant_method is 'fp8'"),
    "fp4": ("int4", {"format": "nvfp4-pack-quantized"}, "format is 'nvfp4-pack-quantized'"),
    "a cache of 8 bits": ("int4", {"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme is"),
    "a rotation": ("int4", {"transform_config": {"config_groups": {}}}, "transform_config is"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_settings_that_are_not_understood_are_refused_by_key(what: str, tmp_path: Path) -> None:
    name, changes, words = REFUSED[what]
    write(tmp_path / "m", KINDS[name])
    _change(tmp_path / "m", **changes)
    with pytest.raises(ValueError) as caught:
        hf.open_directory(tmp_path / "m")
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "weights, activations, words",
    [
        ({"num_bits": 8, "type": "float"}, None, "weights is"),
        ({"num_bits": 6, "strategy": "group"}, None, "num_bits is 6"),
        ({"num_bits": 8, "strategy": "tensor"}, None, "strategy is 'tensor'"),
        ({"num_bits": 8, "strategy": "channel"}, {"num_bits": 8}, "input_activations is"),
    ],
)
def test_schemes_that_are_not_read(weights: dict, activations: dict | None, words: str, tmp_path: Path) -> None:
    write(tmp_path / "m", KINDS["int8 per output"])
    _change(
        tmp_path / "m",
        config_groups={"g": {"targets": ["Linear"], "weights": weights, "input_activations": activations}},
    )
    with pytest.raises(ValueError) as caught:
        hf.open_directory(tmp_path / "m")
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "name, part, words",
    [
        ("GPTQ", "scales", "has no model.layers.0.mlp.down_proj.scales beside it"),
        ("AWQ", "qzeros", "has no model.layers.0.mlp.down_proj.qzeros beside it"),
        ("int4", "weight_scale", "has no weight_scale"),
        ("int4 with zero points", "weight_zero_point", "has no weight_zero_point"),
    ],
)
def test_missing_parts_and_scales_of_nan(name: str, part: str, words: str, tmp_path: Path) -> None:
    write(tmp_path / "m", KINDS[name])
    file = tmp_path / "m" / "model.safetensors"
    tensors = load_file(file)
    tensors[f"model.layers.0.mlp.down_proj.{'scales' if 'scales' in part or 'zeros' in part else 'weight_scale'}"][
        0, 0
    ] = float("nan")
    save_file(tensors, file)
    with pytest.raises(ValueError, match="scales that are NaN"):
        Engine(tmp_path / "m", EngineConfig())
    del tensors[f"model.layers.0.mlp.down_proj.{part}"]
    save_file(tensors, file)
    with pytest.raises(ValueError) as caught:
        hf.open_directory(tmp_path / "m")
    assert words in str(caught.value)


def test_shapes_that_do_not_fit(tmp_path: Path) -> None:
    write(tmp_path / "m", KINDS["GPTQ"])
    file = tmp_path / "m" / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.0.mlp.down_proj.scales"
    save_file({**tensors, name: tensors[name][:, :-1].contiguous()}, file)
    with pytest.raises(ValueError, match="do not fit together: qweight"):
        hf.open_directory(tmp_path / "m")


def test_biases_of_zero_are_left_out(tmp_path: Path) -> None:
    """AutoGPTQ's first versions gave every layer a bias."""
    write(tmp_path / "m", KINDS["GPTQ"])
    file, name = tmp_path / "m" / "model.safetensors", "model.layers.0.mlp.down_proj.bias"
    save_file({**load_file(file), name: torch.zeros(128).half()}, file)
    assert name not in hf.open_directory(tmp_path / "m").tensors
    save_file({**load_file(file), name: torch.ones(128).half()}, file)
    with pytest.raises(ValueError, match="down_proj.bias"):
        Engine(tmp_path / "m", EngineConfig())


def test_quantization_at_load_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "m", KINDS["GPTQ"])
    with pytest.raises(ValueError, match=r"has quantized weights \(gptq\).* leave quantization int8 out"):
        Engine(tmp_path / "m", EngineConfig(quantization="int8"))


def test_import_reads_numbers(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """A checkpoint of what the codes stand for; inspect and import say what the directory has."""
    held = write(tmp_path / "m", KINDS["int4"])
    assert cli.main(["convert", "inspect", str(tmp_path / "m")]) == 0
    assert "13 of compressed-tensors int4 in groups of 32" in capsys.readouterr().out
    assert cli.main(["convert", "import", "--hf", str(tmp_path / "m"), "--save", str(tmp_path / "c")]) == 0
    assert "quantized weights are read as numbers: 13 of" in capsys.readouterr().out
    assert cli.main(["convert", "export", "--load", str(tmp_path / "c"), "--save", str(tmp_path / "plain")]) == 0
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    name = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(load_file(tmp_path / "plain" / "model.safetensors")[name], held[name].half())


def test_compressed_models_run_on_codes(tmp_path: Path) -> None:
    """Evicting ones too, with adapters, which stay as they are; a base that is quantized cannot be compared."""
    write(tmp_path / "m", KINDS["GPTQ"])
    plain = hf.open_directory(tmp_path / "m")
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "config.json").write_text(json.dumps(CONFIG))
    retrofitted = dummy.open_directory(tmp_path / "plain", 2.0, "dms")
    tensors = retrofitted.tensors | plain.tensors
    directory = hf.HFDirectory(plain.path, retrofitted.config, tensors, plain.weight_map, quantization="gptq")
    engine = Engine(directory, EngineConfig(max_num_seqs=4))
    assert all(layer.adapter is not None and isinstance(layer.qkv, PanelLinear) for layer in engine.model.layers)
    for n in range(3):
        engine.add_request(str(n), list(range(20 + n)), SamplingParams(max_tokens=8, ignore_eos=True))
    while engine.has_unfinished():
        assert all(output.error is None for output in engine.step())
        engine.cache.check_integrity()


@pytest.mark.parametrize("kind", TYPES)
def test_blocks_of_a_gguf_file(kind: str) -> None:
    """Numbers of random blocks are the gguf library's, bit for bit."""
    library = pytest.importorskip("gguf")
    random = np.random.default_rng(3)
    rows = random.integers(0, 256, (6, 3 * TYPES[kind].nbytes), dtype=np.uint8)
    halves = rows.reshape(6, 3, -1)[..., :4].view(np.float16)
    halves[..., : 1 if kind in ("Q4_0", "Q5_0", "Q8_0") else 2] = random.normal(0, 1, (6, 3, 1))
    want = library.dequantize(rows, library.GGMLQuantizationType[kind])
    codes, scales = TYPES[kind].read(torch.from_numpy(rows).unflatten(1, (3, -1)))

    class Blocks(CodedTensor):
        name, shape, dtype, layout = kind, want.shape, torch.float32, TYPES[kind].layout

        def _read(self, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
            return codes.flatten(1)[start:stop], scales.flatten(1, 2)[start:stop]

    assert torch.equal(Blocks().read(), torch.from_numpy(want))
    assert int(codes.max()) < 2 ** TYPES[kind].layout.bits


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_1", "Q8_0"])
def test_engine_on_a_gguf_file(kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A file as it is: its codes, its tokenizer, and adapters that were trained on something else are taken with a
    warning.
    """
    pytest.importorskip("gguf")
    (tmp_path / "m").mkdir()
    config = {**CONFIG, "vocab_size": 320}
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    weights = {name: lazy.read() for name, lazy in dummy.open_directory(tmp_path / "m").tensors.items()}
    save_file(weights, tmp_path / "m" / "model.safetensors", {"format": "pt"})
    keys, _ = gguf_files.byte_level(320)
    held = gguf_files.write(tmp_path / "m", tmp_path / "m.gguf", kind, keys)
    directory = adapter.open_directory(tmp_path / "m.gguf")
    assert directory.quantization == "gguf"
    for name, want in held.items():
        assert torch.equal(directory.tensors[name].read(), want.to(directory.tensors[name].dtype))
    llm = LLM(tmp_path / "m.gguf", max_num_seqs=1)
    assert f"GGUF {kind} in groups of 32" in llm.engine.model.forms() and llm.engine.quantization == "gguf"
    (output,) = llm.generate("the cache", SamplingParams(max_tokens=4, ignore_eos=True))
    assert output.error is None and len(output.outputs[0].token_ids) == 4
    prompt = PROMPT[:40]
    error = (log_probs(directory, prompt) - log_probs(as_numbers(directory), prompt)).abs().mean()
    assert error <= (1e-4 if kind[1] != "4" else 0.03), error
    assert gguf.small_files(tmp_path / "m.gguf").is_dir() and gguf.small_files(tmp_path / "m") == tmp_path / "m"


def test_adapters_on_quantized_weights(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Whether they were trained on what the weights were made from cannot be told, which is said."""
    directory = hf.HFDirectory(tmp_path, {}, {}, {}, adapter=tmp_path / "a", quantization="gptq")
    found = adapter.Adapter(tmp_path / "a", {}, None, "some/model", "0" * 64, {})
    with caplog.at_level(logging.WARNING, "megatron.dmc"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(adapter, "open_adapter", lambda path: found)
        adapter.check_base(directory)
    assert "has quantized weights (gptq); whether they were made from some/model" in caplog.text
