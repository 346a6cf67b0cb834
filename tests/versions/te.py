#!/usr/bin/env python3
"""Transformer Engine's layer spec over the real Python of Transformer Engine, without a GPU and without its extension.

    tests/versions/te.py [--version 2.20.2]

Installs the wheel ``transformer-engine`` (Python only) with onnxscript, einops and triton, which its modules import,
into a temporary environment over the present one. Its compiled extension ``transformer_engine_torch`` is a stub there
that computes matrix products and RMSNorm with torch; any other function of it fails by name. So Transformer Engine's
own constructors and forward and backward passes run with the arguments that megatron-core and our spec give them, and
the model must compute what the local spec computes. What its kernels do is not tested.
"""

from __future__ import annotations

import argparse
import enum
import os
import subprocess
import sys
import tempfile
import types
import warnings
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
MODELS = {"Llama": {}, "Qwen 2": dict(add_qkv_bias=True), "Qwen 3": dict(qk_layernorm=True)}
TOLERANCE = 1e-5


def run_in_environment(version: str) -> int:
    """Make the environment and run :func:`check` in it."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        python = Path(folder) / "bin" / "python"
        site = next(Path(folder).glob("lib/python3*/site-packages"))
        (site / "below.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")) + "\n")
        install = [python, "-m", "pip", "install", "--quiet"]
        subprocess.run([*install, "--no-deps", f"transformer-engine=={version}"], check=True)
        subprocess.run([*install, "onnxscript", "einops", "triton"], check=True)
        environment = {**os.environ, "NVTE_PROJECT_BUILDING": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        return subprocess.run([python, "-W", "ignore", __file__, "--check"], env=environment, cwd=ROOT).returncode


# The stub


class _Numbered(type):
    """Class whose attributes are made on demand, a number each: an enum whose members do not matter."""

    def __getattr__(cls, name: str) -> int:
        if name.startswith("__"):
            raise AttributeError(name)
        setattr(cls, name, len(vars(cls)))
        return getattr(cls, name)


class _Extension(types.ModuleType):
    """Module in which every name exists: capitalised ones are enums, the others functions that fail by their name."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name[0].isupper():
            value: Any = _Numbered(name, (), {})
        else:

            def value(*_: Any, **__: Any) -> None:
                raise NotImplementedError(f"transformer_engine_torch.{name} was called; the stub does not have it")

        setattr(self, name, value)
        return value


def _rmsnorm_fwd(x, weight, eps, out, quantizer, dtype, sm_margin, zero_centered_gamma):
    assert out is None and quantizer is None and not zero_centered_gamma
    scale = (x.float().square().mean(dim=-1) + eps).rsqrt()
    return (x.float() * scale[:, None] * weight.float()).to(x.dtype), None, scale


def _rmsnorm_bwd(grad, x, scale, weight, sm_margin, zero_centered_gamma):
    assert not zero_centered_gamma
    normed, scaled = x * scale[:, None], grad * weight
    dx = scale[:, None] * (scaled - normed * (scaled * normed).mean(dim=-1, keepdim=True))
    return dx, (grad * normed).sum(dim=0)


def _generic_gemm(
    a, transpose_a, b, transpose_b, out, quantizer, dtype, bias, bias_dtype, gelu, gelu_in, grad, *rest, **_
):
    """op(b) op(a) of row-major matrices, as cuBLAS computes it from column-major ones."""
    _, _, accumulate, _ = rest  # workspace, its size, accumulate, split accumulator
    assert quantizer is None and not gelu
    shape = [] if transpose_b else b.shape[:-1]
    a, b = a.reshape(-1, a.size(-1)), b.reshape(-1, b.size(-1))
    product, bias_grad = (b.t() if transpose_b else b) @ (a.t() if transpose_a else a), None
    product = product.view(*shape, product.size(-1)) if shape else product
    if grad and bias is not None:
        bias_grad = b.sum(dim=0)
    elif bias is not None:
        product = product + bias
    if out is not None:
        product = out.copy_(out + product if accumulate else product)
    return product, bias_grad, None, None


def install_stub() -> None:
    """Let ``transformer_engine.pytorch`` be imported without its extension, and its modules be built without a GPU."""
    import torch

    stub = _Extension("transformer_engine_torch")
    stub.get_cudnn_version = lambda: 91300
    # Their members are compared with those of Python enums at import.
    names = "kByte kInt32 kFloat32 kFloat16 kBFloat16 kFloat8E4M3 kFloat8E5M2 kFloat4E2M1"
    stub.DType = enum.IntEnum("DType", names, start=0)
    names = "NVTE_No_Backend NVTE_F16_arbitrary_seqlen NVTE_FP8"
    stub.NVTE_Fused_Attn_Backend = enum.IntEnum("NVTE_Fused_Attn_Backend", names)
    stub.rmsnorm_fwd, stub.rmsnorm_bwd, stub.generic_gemm = _rmsnorm_fwd, _rmsnorm_bwd, _generic_gemm
    for name in ("layernorm_fwd", "layernorm_bwd"):
        getattr(stub, name)  # `import *` takes the names that are there
    sys.modules["transformer_engine_torch"] = stub
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "could not find the shared object file"
        import transformer_engine.common as common
    common.load_framework_extension = lambda framework: None
    import transformer_engine.pytorch.utils as utils

    utils._empty_tensor = lambda: torch.empty(0)  # on the GPU there
    torch.cuda.is_current_stream_capturing = lambda: False
    torch.cuda.get_device_properties = lambda device=None: types.SimpleNamespace(major=9, minor=0)
    torch.cuda.get_device_capability = lambda device=None: (9, 0)


# The check


def check() -> int:
    """Compare both specs' logits and gradients, for each of ``MODELS``. Returns the exit status."""
    sys.path.insert(0, str(ROOT / "tests"))
    install_stub()
    import torch
    import transformer_engine
    from helpers.in_process import megatron_in_process, run_config
    from megatron.core.extensions.transformer_engine import HAVE_TE
    from torch.overrides import TorchFunctionMode

    from megatron.dmc.model import layer_specs

    assert HAVE_TE, "megatron-core does not see Transformer Engine"
    layer_specs.have_transformer_engine = lambda: True

    class SaysCuda(TorchFunctionMode):
        """Transformer Engine asks every input whether it lies on a GPU."""

        def __torch_function__(self, function, types_, args=(), kwargs=None):
            if function == torch.Tensor.is_cuda.__get__:
                return True
            return function(*args, **(kwargs or {}))

    failed = False
    with megatron_in_process(run_config()):
        torch.cuda.is_available = lambda: True
        with SaysCuda():
            for name, switches in MODELS.items():
                worst = largest_difference(run_config(dict(decision_bias=0.3), **switches))
                failed |= not worst <= TOLERANCE
                print(f"Transformer Engine {transformer_engine.__version__}, {name}: largest difference {worst:.1e}")
    return int(failed)


def largest_difference(run) -> float:
    """Largest difference of logits and gradients between the two specs, relative to the largest value of each."""
    import torch
    from megatron.core.models.gpt import GPTModel

    from megatron.dmc.model import DMCStep, get_dmc_layer_spec
    from megatron.dmc.training.model import transformer_config

    ids = torch.randint(96, (2, 24), generator=torch.Generator().manual_seed(5))
    position_ids, results, weights = torch.arange(24).expand(2, -1), [], {}
    for implementation in ("local", "transformer_engine"):
        config = transformer_config(run)
        config.use_cpu_initialization, config.batch_p2p_comm = True, False
        config.bias_activation_fusion = config.bias_dropout_fusion = False
        spec = get_dmc_layer_spec(config, run.dmc, implementation)
        torch.manual_seed(1)
        model = GPTModel(config, spec, vocab_size=96, max_sequence_length=64, position_embedding_type="rope")
        norms = ("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight")
        norms_of_mlp = ("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight")
        named = {}
        for name, parameter in model.named_parameters():
            for local, fused in (norms, norms_of_mlp):
                name = name.replace(fused, local)
            named[name] = parameter
        with torch.no_grad():
            for name, parameter in named.items():
                if name not in weights:
                    weights[name] = parameter.uniform_(0.5, 1.5) if "norm" in name else parameter.normal_(std=0.15)
                parameter.copy_(weights[name])
        assert set(named) == set(weights), f"parameters differ: {sorted(set(named) ^ set(weights))}"
        step = DMCStep(sample_ids=torch.arange(2), seed=3, step=4)
        arguments = dict(attention_mask=None, extra_block_kwargs={"attention_bias": step})
        logits = model.train()(ids, position_ids, **arguments)
        logits.square().mean().backward()
        results.append({"logits": logits.detach(), **{name: x.grad for name, x in named.items()}})
        kinds = sorted({type(module).__name__ for module in model.modules() if type(module).__name__.startswith("TE")})
        assert bool(kinds) == (implementation == "transformer_engine"), kinds
    return max(float((results[1][x] - y).abs().max() / y.abs().max().clamp_min(1e-9)) for x, y in results[0].items())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", default="2.20.2", help="version of transformer-engine (default: %(default)s)")
    parser.add_argument("--check", action="store_true", help="run in the environment that this script has made")
    args = parser.parse_args()
    sys.exit(check() if args.check else run_in_environment(args.version))
