"""tools/plan.py: its formulas against built models and what autograd saves, the shipped layouts, refusals,
bad input.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from helpers import families, tiny  # tiny puts tools/ on the path
from helpers.in_process import megatron_in_process, run_config

from megatron.dmc.checkpoint import convert
from megatron.dmc.cli import plan
from megatron.dmc.config import RunConfig
from megatron.dmc.model import DMCGPTModel, DMCStep
from megatron.dmc.planning import estimates
from megatron.dmc.planning.layouts import with_layout
from megatron.dmc.training.distillation import Teacher
from megatron.dmc.training.distillation_loss import Distillation
from megatron.dmc.training.metrics import flops_per_token
from megatron.dmc.training.model import transformer_config

sys.path.insert(0, str(tiny.ROOT / "benchmarks"))
from _common import peak_bytes  # noqa: E402

GPUS = {"llama2-7b": 8, "llama2-13b": 8, "llama2-70b": 64, "llama3.1-8b": 8, "llama3.1-70b": 64}
# Of the published checkpoints, which have no padding.
PARAMETERS = {
    "llama2-7b": 6_738_415_616,
    "llama2-13b": 13_015_864_320,
    "llama2-70b": 68_976_648_192,
    "llama3.1-8b": 8_030_261_248,
    "llama3.1-70b": 70_553_706_496,
}
ADAPTERS = {"llama3.1-8b-dms": (8_030_261_248, 32 * 9 * 4096), "qwen3-8b-dms": (8_190_735_360, 36 * 9 * 4096)}
"""Parameters of the published model, and of the adapters on it."""
SMALL = dict(
    num_layers=2,
    hidden_size=128,
    ffn_hidden_size=344,
    num_attention_heads=8,
    num_query_groups=4,
    vocab_size=250,
    max_position_embeddings=512,
)


@pytest.fixture(scope="module", autouse=True)
def megatron():
    """Megatron in this process, and no trace of it for the files after this one."""
    with megatron_in_process(run_config()):
        yield


def small_run(
    parallel: dict | None = None,
    batch: int = 2,
    window: int | None = 12,
    bf16: bool = True,
    seq: int = 128,
    dmc: dict | None = None,
    freeze_base: bool = False,
    **model,
):
    return RunConfig.from_dict(
        {
            "model": {**SMALL, **model},
            "dmc": {"window": window, **(dmc or {})},
            "parallel": parallel or {},
            "data": dict(seq_length=seq),
            "stage": dict(stage="retrofit", target_cr=4.0),
            "training": dict(global_batch_size=batch, micro_batch_size=batch, bf16=bf16, freeze_base=freeze_base),
        }
    )


def shipped_run(name: str, **layout) -> RunConfig:
    return with_layout(plan.load_model(name), **layout)


def memory(run: RunConfig, gpus: int, rank: int = 0, **more) -> dict[str, float]:
    return estimates.stage_memory(run, gpus, rank, estimates.Fit(), **more)


# The shipped configurations


@pytest.mark.parametrize("name", GPUS)
def test_shipped_configurations_fit_80_gb(name, capsys):
    assert sum(estimates.parameters(plan.load_model(name).model).values()) == PARAMETERS[name]
    assert plan.main([name, "--gpus", str(GPUS[name]), "--gpu-memory-gb", "80"]) == 0
    out = capsys.readouterr().out
    assert "the worst GPU needs" in out and "retrofit  18,000" in out


def test_every_shipped_configuration_is_planned():
    assert set(plan.shipped()) == {*GPUS, *ADAPTERS, "retrofit", "smollm2-135m-dms", "smollm2-135m-dmc"}


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters_of_8b_fit_one_gpu_of_80_gb_and_with_recomputation_one_of_32(name, capsys):
    run, (total, adapters) = plan.load_model(name), ADAPTERS[name]
    assert (sum(estimates.parameters(run.model).values()), estimates.adapter_parameters(run)) == (total, adapters)
    assert plan.main([name, "--gpus", "1"]) == 0
    out = capsys.readouterr().out
    assert "M in adapters; the rest is frozen" in out and "zero_out" not in out and "retrofit  1,000" in out
    assert plan.main([name, "--gpus", "1", "--gpu-memory-gb", "48"]) == 2
    assert "--recompute selective:" in capsys.readouterr().err
    assert plan.main([name, "--gpus", "1", "--gpu-memory-gb", "32", "--recompute", "full"]) == 0
    parts = memory(run, 1)
    assert parts["weights"] == 2 * (total + adapters)
    assert (parts["gradients"], parts["optimizer"]) == (4 * adapters, 12 * adapters)


# Formulas against models that are built


@pytest.mark.parametrize(
    "model",
    [
        {},
        dict(untie_embeddings_and_output_weights=False),
        dict(num_query_groups=8),
        dict(num_query_groups=1, num_layers=3),
        dict(add_qkv_bias=True),
        dict(qk_layernorm=True, kv_channels=32),
        dict(vocab_size=1000, make_vocab_size_divisible_by=64),
    ],
    ids=str,
)
def test_parameters_are_those_of_a_built_model(model):
    run = small_run(**model)
    built = DMCGPTModel(transformer_config(run), run.model, run.dmc, carry=True, transformer_impl="local")
    count = sum(p.numel() for p in built.parameters())
    assert sum(estimates.parameters(run.model).values()) == count == estimates.parameters_per_gpu(run.model, 1, 1, 0)


@pytest.mark.parametrize("per", ["head", "layer"])
def test_adapter_parameters_are_those_of_a_built_model(per):
    run = small_run(dmc=dict(method="dms", decision_source="adapter", decision_per=per), freeze_base=True)
    built = DMCGPTModel(transformer_config(run), run.model, run.dmc, carry=True, transformer_impl="local")
    built.freeze_base()
    assert estimates.adapter_parameters(run) == sum(p.numel() for p in built.parameters() if p.requires_grad)


def test_parameters_per_gpu_add_up():
    model = shipped_run("llama3.1-70b").model
    total = sum(estimates.parameters(model).values())
    for tp, pp in ((1, 1), (1, 4), (8, 1), (8, 8)):
        everywhere = tp * sum(estimates.parameters_per_gpu(model, tp, pp, rank) for rank in range(pp))
        assert everywhere == total + (tp - 1) * estimates.parameters(model)["norms"]  # norms are on every TP rank


@pytest.mark.parametrize("name", GPUS)
def test_flops_are_those_of_the_log(name):
    model = plan.load_model(name).model
    assert sum(estimates.flops_per_token(model, 4096).values()) == flops_per_token(model, 4096)


class _FusedNorm(torch.autograd.Function):
    """RMSNorm that keeps what the CUDA kernel keeps: input, weight and one fp32 number per row."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        scale = torch.rsqrt(
            torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32) ** 2 / x.size(-1) + eps
        )
        ctx.save_for_backward(x, weight, scale)
        return (x * scale.to(x.dtype)).mul_(weight)

    @staticmethod
    def backward(ctx, grad):
        return grad.clone(), torch.zeros_like(ctx.saved_tensors[1]), None  # for its memory, not its values


def forward(run: RunConfig, compress: bool, monkeypatch):
    """A model with the GPU's fused norm and SwiGLU, and a function that runs it on one micro-batch."""
    monkeypatch.setattr(F, "rms_norm", lambda x, shape, weight, eps: _FusedNorm.apply(x, weight, eps))
    config = transformer_config(run)
    config.bias_activation_fusion = True
    model = DMCGPTModel(config, run.model, run.dmc, carry=compress, transformer_impl="local")
    if run.training.freeze_base:
        model.freeze_base()
    model = model.bfloat16() if run.training.bf16 else model
    batch, length = run.training.micro_batch_size, run.data.seq_length
    ids = torch.randint(run.model.vocab_size, (batch, length))
    positions = torch.arange(length).expand(batch, -1)

    def call():
        step = DMCStep(compress=compress, sample_ids=torch.arange(batch), neuron_scale=0.5)
        with torch.compiler.set_stance("force_eager"):  # the fusion is wrapped in torch.compile
            return model(ids, positions, labels=ids, step=step)

    return model, call


def saved_bytes(run: RunConfig, compress: bool, monkeypatch) -> int:
    """Bytes of all storages that autograd keeps after a forward pass, parameters left out."""
    model, call = forward(run, compress, monkeypatch)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages, kept = {}, []

    def pack(tensor):
        kept.append(tensor)  # so that no address is used twice
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = call()
    del output
    return sum(size for address, size in storages.items() if address not in weights)


SELECTIVE = dict(recompute_granularity="selective")


@pytest.mark.parametrize("compress", [True, False], ids=["compressing", "zero_out"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(batch=1),
        dict(num_query_groups=8),
        dict(num_query_groups=1),
        dict(qk_layernorm=True),
        dict(bf16=False),
        dict(window=None, seq=256),
        dict(window=1),
        dict(parallel=SELECTIVE),
        dict(parallel=SELECTIVE, qk_layernorm=True),
        dict(parallel={**SELECTIVE, "recompute_modules": ["core_attn", "mlp"]}),
        dict(parallel=dict(recompute_granularity="full")),
    ],
    ids=str,
)
def test_a_layer_keeps_what_is_estimated(options, compress, monkeypatch):
    """Two layers less one. The formulas came out within 0.7% when written; the tolerance leaves room for other
    versions.
    """
    sizes = [saved_bytes(small_run(**{**options, "num_layers": layers}), compress, monkeypatch) for layers in (1, 2)]
    run = small_run(**options)
    layer, p = estimates.layer_bytes(run, compress), run.parallel
    expected = layer.frame + layer.attention + layer.mlp + layer.dmc + layer.row
    if p.recompute_granularity == "full":
        expected = layer.boundary + layer.row
    elif p.recompute_granularity == "selective":
        expected += layer.core_input - layer.attention - layer.dmc
        expected += (layer.mlp_input - layer.mlp) if "mlp" in p.recompute_modules else 0
    assert sizes[1] - sizes[0] == pytest.approx(expected, rel=0.03)


EVICTING = dict(dmc=dict(method="dms", decision_source="adapter"), window=40, freeze_base=True)


@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(num_query_groups=8),
        dict(qk_layernorm=True),
        dict(bf16=False, seq=256),
        dict(freeze_base=False),
        dict(dmc=dict(method="dms"), freeze_base=False),
        dict(parallel=SELECTIVE),
        dict(parallel={**SELECTIVE, "recompute_modules": ["core_attn", "mlp"]}),
        dict(parallel=dict(recompute_granularity="full")),
    ],
    ids=str,
)
def test_an_evicting_layer_keeps_what_is_estimated(options, monkeypatch):
    test_a_layer_keeps_what_is_estimated({**EVICTING, **options}, True, monkeypatch)


@pytest.mark.parametrize("compress", [True, False], ids=["compressing", "zero_out"])
@pytest.mark.parametrize("options", [{}, dict(num_query_groups=8), dict(vocab_size=4096)], ids=str)
def test_peak_memory_of_a_step_stays_below_the_estimate(options, compress, monkeypatch):
    """Forward and backward of one micro-batch on the CPU's allocator: the estimate is an upper bound, and not a loose
    one.
    """
    run = small_run(seq=512, **{"hidden_size": 256, "ffn_hidden_size": 688, **options})
    model, call = forward(run, compress, monkeypatch)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)

    def step():
        output = call()
        (output[0].mean() + 1e-6 * output[1].sum().float() if compress else output.mean()).backward()

    step()
    parts = memory(run, 1, compress=compress)
    peak, estimate = (
        peak_bytes(step, torch.device("cpu")),
        parts["activations"] + parts["DMC's extra"] + parts["workspace"],
    )
    assert peak <= estimate <= 1.6 * peak


@pytest.mark.parametrize("options", [{}, dict(vocab_size=4096)], ids=str)
def test_peak_memory_of_a_step_on_a_frozen_base_stays_below_the_estimate(options, monkeypatch):
    """Teacher, student and divergence. The window is one whose blocks the CPU's kernel does not take in fp32."""
    run = small_run(**{**EVICTING, "window": 256, "seq": 512, "hidden_size": 256, "ffn_hidden_size": 688, **options})
    model, _ = forward(run, True, monkeypatch)
    teacher, length = Teacher(model, DMCStep(compress=False), Distillation()), run.data.seq_length
    ids = torch.randint(run.model.vocab_size, (2, length))
    batch = dict(tokens=ids, labels=ids, position_ids=torch.arange(length).expand(2, -1))

    def step():
        with torch.compiler.set_stance("force_eager"):
            losses, kept = teacher.forward_beside(model, batch, DMCStep(sample_ids=torch.arange(2)))
        (losses[0].mean() + 1e-6 * kept.sum().float()).backward()

    step()
    parts = memory(run, 1)
    peak = peak_bytes(step, torch.device("cpu"))
    estimate = parts["activations"] + parts["DMC's extra"] + parts["workspace"]
    assert peak <= estimate <= 1.6 * peak


# Formulas by hand


def test_model_state_by_hand():
    """bf16 weights 2, fp32 gradients 4, fp32 main weights and moments 12 bytes over DP (ZeRO, table of stage 1)."""
    run = shipped_run("llama2-7b", tensor_model_parallel_size=1, sequence_parallel=False)
    n = PARAMETERS["llama2-7b"]
    parts = memory(run, 8)
    assert (parts["weights"], parts["gradients"], parts["optimizer"]) == (2 * n, 4 * n, 12 * n / 8)
    assert memory(with_layout(run, use_distributed_optimizer=False), 8)["optimizer"] == 12 * n


@pytest.mark.parametrize(("pp", "v"), [(4, 1), (4, 2), (8, 2), (8, 5)])
def test_first_stage_holds_what_korthikanti_says(pp, v):
    run = shipped_run(
        "llama2-70b",
        tensor_model_parallel_size=1,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=v if v > 1 else None,
    )
    assert estimates.in_flight(run, pp, 0) == pytest.approx(pp * (1 + (pp - 1) / (pp * v)) if v > 1 else pp)
    assert estimates.in_flight(run, pp, pp - 1) == (1 if v == 1 else ((v - 1) * pp + 1) / v)
    assert estimates.bubble(run, pp) == (pp - 1) / (v * 1024)


def test_recomputation_and_sequence_parallelism_save_memory():
    def activations(**layout):
        parts = memory(shipped_run("llama2-13b", **layout), 8)
        return parts["activations"] + parts["DMC's extra"]

    kinds = [activations(recompute=kind) for kind in ("none", "selective:core_attn", "selective:core_attn,mlp", "full")]
    assert kinds == sorted(kinds, reverse=True) and kinds[-1] < kinds[0] / 5
    assert activations() < activations(sequence_parallel=False) < activations(tensor_model_parallel_size=2)
    run = shipped_run("llama2-13b", recompute="full")
    assert estimates.recomputed_flops(run) == pytest.approx(
        sum(estimates.flops_per_token(run.model, 4096).values()) / 3, rel=0.02
    )


def test_time_of_the_stages():
    run = plan.load_model("llama2-7b")
    times = estimates.durations(run, 8, 4.0, 1e15, 0.5)
    assert {name: f["steps"] for name, f in times.items()} == {"zero_out": 250, "retrofit": 18000, "finetune": 2000}
    flops = 250 * 1024 * 4096 * flops_per_token(run.model, 4096)
    assert times["zero_out"]["days"] == pytest.approx(flops / (8 * 1e15 * 0.5) / 86400)


def test_serving_by_hand():
    run, fit = plan.load_model("llama2-7b"), estimates.Fit()
    assert estimates.kv_bytes_per_token(run.model) == 512 * 1024
    assert [round(100 * estimates.page_waste(4096, 8, page), 1) for page in (16, 64, 256)] == [1.6, 6.2, 25.0]
    assert estimates.page_waste(1024, 8, 256) == 1.0
    s = estimates.serving(run, fit, tp=None, context=4096, pages=[16, 64], utilization=0.9)
    assert s["tp"] == 1 and s["rows"][0]["table_bytes"] == 2**20  # 32 layers x 32 heads x 256 pages x 4 bytes
    plain, _, _, _, four, *_ = s["rows"]
    assert plain["sequences"] == int((72e9 - s["weights"]) // (512 * 1024 * (4096 + 8) + 2**20))
    assert 3.8 < four["sequences"] / plain["sequences"] < 4
    assert (
        estimates.serving(plan.load_model("llama2-70b"), fit, tp=None, context=4096, pages=[16], utilization=0.9)["tp"]
        == 4
    )


# Refusals


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ("llama2-7b --gpus 8 --tp 3", "not divisible by tensor_model_parallel_size 3"),
        ("llama2-70b --gpus 64 --tp 16", "exceeds the 8 KV heads"),
        ("llama2-13b --gpus 7", "world size 7 is not divisible"),
        ("llama2-13b --gpus 16 --tp 2 --pp 3", "num_layers 40 is not divisible by the 3 pipeline"),
        ("llama2-13b --gpus 8 --tp 1", "per GPU are needed; there are 80.0 GB"),
        ("llama2-7b --gpus 8 --gpu-memory-gb 32", "there are 32.0 GB"),
        ("llama3.1-70b --gpus 8", "world size 8 is not divisible"),
    ],
)
def test_refused_with_layouts_that_work(arguments, why, capsys):
    assert plan.main(arguments.split()) == 2
    first, *rest = capsys.readouterr().err.splitlines()
    assert first.startswith("error: ") and why in first
    assert rest and all(line.startswith("  works: --gpus") for line in rest)
    memory = (
        arguments.split()[arguments.split().index("--gpu-memory-gb") :][:2] if "--gpu-memory-gb" in arguments else []
    )
    for line in rest:
        layout = shlex.split(line.removeprefix("  works: ").split("   (")[0])
        assert plan.main([arguments.split()[0], *layout, *memory]) == 0, line
        assert int(layout[layout.index("--tp") + 1]) <= 8


def test_the_nearest_layout_comes_first(capsys):
    assert plan.main("llama2-7b --gpus 8 --tp 1 --micro-batch 2".split()) == 2
    assert "--gpus 8 --tp 1 --pp 1 --micro-batch 1 --recompute none" in capsys.readouterr().err.splitlines()[1]
    assert plan.main("llama2-7b --gpus 8 --tp 3".split()) == 2
    assert "--gpus 8 --tp 4 --pp 1 --micro-batch 2 --recompute none" in capsys.readouterr().err.splitlines()[1]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("llama9", "none of the shipped ones: llama2-13b"),
        ("llama2-7b --gpus 0", "--gpus is 0; it must be positive"),
        ("llama2-7b --mfu 40", "--mfu is 40.0; it is a fraction"),
        ("llama2-7b --mfu nan", "--mfu is nan"),
        ("llama2-7b --target-cr 1", "--target-cr is 1"),
        ("llama2-7b --recompute some", "--recompute 'some' is unknown"),
        ("llama2-7b --recompute selective:router", "recompute_modules ['router'] are not supported"),
        ("llama2-7b --gpus 16 --tp 4 --dp 2", "--gpus 16 is not TP x PP x DP = 4 x 2 = 8"),
        ("llama2-7b --sequence-length 8192", "seq_length 8192 exceeds max_position_embeddings 4096"),
        ("llama2-7b --serving-tp 3", "--serving-tp 3"),
        ("llama2-70b --gpus 64 --serving-tp 1", "use --serving-tp 2"),
        ("llama2-7b --gpus many", "--help lists all flags"),
        ("llama2-7b --json {tmp}/list.json/place.json", "cannot be written"),
        ("{tmp}/broken.json", "cannot be read"),
        ("{tmp}/list.json", "must be a mapping"),
        ("{tmp}/gpt2.json", "gpt2"),
        ("{tmp}", "has no config.json, and is no checkpoint"),
    ],
)
def test_bad_input_is_one_message(arguments, says, tmp_path, capsys):
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "gpt2.json").write_text('{"model_type": "gpt2", "n_embd": 768}')
    assert plan.main(arguments.format(tmp=tmp_path).split()) == 2
    message = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("  works: ")]
    assert len(message) == 1 and message[0].startswith("error: ") and says in message[0]


# Models from elsewhere, the script as a script


def test_a_hugging_face_config(tmp_path, capsys):
    scaling = dict(
        rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192
    )
    config = dict(
        architectures=["LlamaForCausalLM"],
        model_type="llama",
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
        rms_norm_eps=1e-5,
        max_position_embeddings=131072,
        rope_theta=500000.0,
        rope_scaling=scaling,
        tie_word_embeddings=False,
        hidden_act="silu",
        torch_dtype="bfloat16",
    )
    (tmp_path / "config.json").write_text(json.dumps(config))
    ours = plan.load_model("llama3.1-8b").model
    for name in (tmp_path, tmp_path / "config.json"):
        model = plan.load_model(str(name)).model
        assert (model.rope_scaling, model.rotary_base) == (ours.rope_scaling, ours.rotary_base)
        assert estimates.parameters(model) == estimates.parameters(ours)
    assert plan.main([str(tmp_path), "--gpus", "8", "--tp", "4"]) == 0
    assert "8.03B parameters" in capsys.readouterr().out


def test_a_checkpoint(tmp_path, capsys):
    """What ``dmc convert import`` has written, and a --save directory around it."""
    families.make("llama3.1", tmp_path / "hf")
    convert.import_hf(tmp_path / "hf", tmp_path / "save" / "iter_0000000", progress=convert.Progress(lambda text: None))
    wanted = plan.load_model(str(tmp_path / "hf"))
    for name in ("save", "save/iter_0000000"):
        assert plan.load_model(str(tmp_path / name)) == wanted
    assert plan.main([str(tmp_path / "save"), "--gpus", "1"]) == 0
    assert re.search(r"^model +0\.\d\dM parameters: attention 0\.\d\dM", capsys.readouterr().out)


def test_as_a_script_with_json_and_without_torch(tmp_path):
    """From elsewhere, on a machine that has no torch."""
    target = tmp_path / "plan.json"
    code = (
        "import sys, runpy; tools = sys.argv.pop(1); sys.modules['torch'] = None; sys.path.insert(0, tools); "
        "runpy.run_path(tools + '/plan.py', run_name='__main__')"
    )
    command = [sys.executable, "-c", code, str(tiny.ROOT / "tools"), "llama2-70b", *"--gpus 64 --tp 8 --pp 4".split()]
    subprocess.run([*command, "--json", str(target)], cwd=tmp_path, check=True, capture_output=True)
    figures = json.loads(target.read_text())
    assert figures["fits"] and figures["nearest"] == [] and figures["dp"] == 2 and figures["memory"]["worst_stage"] == 0
    assert figures["config"]["parallel"]["virtual_pipeline_model_parallel_size"] is None
    assert set(figures["memory"]["stages"][0]) == set(estimates.PARTS)
