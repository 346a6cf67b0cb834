"""``dmc bench throughput`` and ``latency``, and models without weights."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import torch
from helpers.engines import Model, all_back
from helpers.exported import GROUPS, LAYERS
from helpers.forked import run_ranks

from megatron.dmc import kernels
from megatron.dmc.cli import main
from megatron.dmc.inference import LLM, Engine, EngineConfig, SamplingParams, bench, dummy
from megatron.dmc.inference.bench import StepProfiler, Workload, iterate

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-5,
    "vocab_size": 512,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model(tmp_path_factory.mktemp("model") / "m", "half")


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with nothing but a plain config.json."""
    path = tmp_path_factory.mktemp("bare")
    (path / "config.json").write_text(json.dumps(CONFIG))
    return path


# ----------------------------------------------------------------------------------------------------- without weights


@pytest.mark.parametrize("ratio", [1, 2, 4, 8])
def test_random_weights_merge_as_often_as_they_are_told(ratio: int, bare: Path) -> None:
    engine = Engine(dummy.open_directory(bare, ratio), EngineConfig(max_num_seqs=4))
    work = Workload(bench.random_prompts([400] * 4, 512, torch_generator()), [40] * 4)
    use = iterate(engine, work).uses
    found = sum(u.tokens * u.heads for u in use) / sum(u.total_slots for u in use)
    assert found == pytest.approx(ratio, rel=0 if ratio == 1 else 0.1)
    assert engine.info.compresses == (ratio > 1)


@pytest.mark.parametrize("method", ["dms", None])
def test_random_weights_evict_as_often_as_they_are_told(method: str | None, bare: Path, tmp_path: Path) -> None:
    """By a method of one's choice, or by that of the directory: of tokens beyond the window, three of four."""
    path, window, settings = bare, 256, EngineConfig(max_num_seqs=4)
    if method is None:
        dms, window = dict(source="query", scale=100.0), 64
        path = Model(tmp_path / "model", settings=dict(bias=0.0, window=window, dms=dms, positions=512)).path
    engine = Engine(dummy.open_directory(path, 4, method), settings)
    vocabulary = engine.info.model.vocab_size
    use = iterate(engine, Workload(bench.random_prompts([400] * 4, vocabulary, torch_generator()), [40] * 4)).uses
    tokens = sum((u.tokens - window - 1) * u.heads for u in use)
    assert tokens / sum(u.total_slots - (window + 1) * u.heads for u in use) == pytest.approx(4, rel=0.15)
    assert engine.info.dmc.evicts and engine.info.expected_cr == 4


def torch_generator():
    import numpy as np

    return np.random.default_rng(1)


def test_random_weights_are_the_same_every_time_and_keep_the_scale(bare: Path) -> None:
    one, two = (LLM(bare, load_format="dummy") for _ in range(2))
    prompt, params = list(range(40)), SamplingParams(temperature=0, max_tokens=5, logprobs=0)
    first, second = (llm.generate(prompt, params)[0].outputs[0] for llm in (one, two))
    assert first.token_ids == second.token_ids and first.logprobs == second.logprobs
    assert all(math.isfinite(entry.logprob) and entry.logprob < -0.1 for entry in first.logprobs)
    assert one.engine.model.layers[0].input_norm.eq(1).all()


def test_an_exported_config_can_be_measured_at_another_ratio(model: Model) -> None:
    """Its own weights are not read; at 1 it is a plain model again."""
    assert dummy.open_directory(model.path, 1).config["model_type"] == "llama"
    made = dummy.open_directory(model.path, 3)
    assert made.config["dmc"]["measured_cr"] == 3 and made.config["dmc"]["window"] == 12
    assert Engine(made).info.expected_cr == 3
    for ratio in (0.5, float("nan")):
        with pytest.raises(ValueError, match="compression_ratio is"):
            dummy.open_directory(model.path, ratio)


def test_a_load_format_that_is_not_there(bare: Path) -> None:
    with pytest.raises(ValueError, match="load_format is 'lazy'; use auto or dummy"):
        EngineConfig(load_format="lazy")
    with pytest.raises(ValueError, match="holds no weights"):
        Engine(bare)


# ------------------------------------------------------------------------------------------------------------ measuring


def test_an_iteration_counts_what_the_engine_did(model: Model) -> None:
    engine = model.engine(max_num_seqs=3, num_pages=40)
    work = Workload([list(model.prompt(n)) for n in (20, 7, 33, 12)], [9, 3, 12, 5], n=2)
    watch = StepProfiler(work, steps=3)
    found = iterate(engine, work, watch)
    all_back(engine)
    assert found.prompt_tokens == 72 and found.output_tokens == 2 * 29 == engine.stats().generation_tokens
    assert len(found.uses) == len(found.finished) == 8 and max(found.batch) == 3
    assert found.elapsed == pytest.approx(sum(found.step_seconds), rel=0.5) and 0 < found.first_token <= found.elapsed
    assert {o.cache.tokens for o in found.finished if o.request_id == "2"} == {33 + 12 - 1}
    assert found.preemptions == engine.stats().preemptions
    assert 0 < watch.peak_pages <= 40
    # Methods that were watched are the engine's own again.
    assert (
        not {"schedule"} & set(vars(engine.scheduler))
        and "forward" not in vars(engine.model)
        and "sample" not in vars(engine.runner)
    )
    figures = bench.cache_figures(engine, work, [found])
    slots = sum(sum(map(sum, use.slots)) for use in found.uses)
    assert figures["compression_ratio"] == pytest.approx(sum(u.tokens for u in found.uses) * LAYERS * GROUPS / slots)
    assert figures["page_waste"] == pytest.approx(1 - slots / (16 * sum(use.pages for use in found.uses)))
    assert figures["batch_limited_by"] == "max_num_seqs" and figures["peak_batch_size"] == 3
    assert figures["max_batch_size"] == int(40 // (sum(u.pages for u in found.uses) / 8))


def test_the_parts_of_a_step(model: Model) -> None:
    """Every part that this model has is seen, and the parts add up to the steps that were watched."""
    engine, work = model.engine(), Workload([list(model.prompt(40))] * 4, [30] * 4)
    watch = StepProfiler(work, steps=5)
    iterate(engine, work, watch)
    parts = watch.parts
    assert all(parts[name] > 0 for name in ("schedule", "append", "attention", "linear", "other", "sampling", "host"))
    assert parts["communication"] == 0
    assert sum(parts.values()) == pytest.approx(watch._wall / watch._seen) and watch._seen == 5


def test_parts_of_made_up_events() -> None:
    """What lies in a part is not counted again, and ops outside of the forward pass are the host's."""

    class Event:
        def __init__(self, name: str, us: float, parent: Event | None = None) -> None:
            self.name, self.cpu_time_total, self.cpu_parent = name, us, parent

    forward = Event("dmc.forward", 100)
    linear, append = Event("aten::linear", 30, forward), Event("dmc::append", 20, forward)
    wrapper = Event("aten::something", 25, forward)
    events = [
        Event("dmc.schedule", 5),
        forward,
        linear,
        Event("aten::mm", 28, linear),
        append,
        Event("aten::mm", 4, append),
        wrapper,
        Event("dmc::decode_attention", 15, wrapper),
        Event("dmc.sampling", 9),
        Event("aten::mm", 50),
    ]
    events.append(Event("aten::mm", 2, events[-2]))
    found = {name: round(1e6 * seconds, 6) for name, seconds in bench._cpu_parts(events).items()}
    assert found == {
        "schedule": 5,
        "append": 20,
        "attention": 15,
        "linear": 30,
        "communication": 0,
        "sampling": 9,
        "other": 35,
    }


def test_gpu_parts_of_made_up_events() -> None:
    """By the op that launched a kernel, or else by its name; what stands on the time line besides is no kernel."""

    class Kernel:
        def __init__(self, name: str, duration: float) -> None:
            self.name, self.duration = name, duration

    class Event:
        def __init__(self, name: str, us: float = 0, parent: Event | None = None, kernels: tuple = ()) -> None:
            self.name, self.device_time_total, self.kernels, self.cpu_parent = name, us, kernels, parent
            self.device_type = torch.autograd.DeviceType.CUDA if us else torch.autograd.DeviceType.CPU

    sampling, forward = Event("dmc.sampling"), Event("dmc.forward")
    append = Event("dmc::append", parent=forward)
    events = [
        Event("dmc::append", 99),
        Event("dmc.forward", 500),
        Event("decide(dmc::CudaAppend)", 10),
        Event("::attend<T>", 20),
        Event("nvjet_hsh_128x64", 40),
        Event("ampere_sgemm_32", 5),
        Event("elementwise", 8),
        Event("argmax", 4),
        sampling,
        forward,
        append,
        Event("aten::argmax", parent=sampling, kernels=(Kernel("argmax", 4),)),
        Event("aten::add", parent=append, kernels=(Kernel("elementwise", 3),)),
        Event("aten::mul", parent=forward, kernels=(Kernel("elementwise", 2),)),
        Event("aten::mm", parent=forward, kernels=(Kernel("ampere_sgemm_32", 5),)),
    ]
    found = {name: round(1e6 * seconds, 6) for name, seconds in bench._gpu_parts(events).items()}
    assert found == {"append": 13, "attention": 20, "linear": 45, "communication": 0, "sampling": 4, "other": 5}


def test_our_own_kernels_are_told_by_their_names() -> None:
    """As a demangled name shows them, which is all that there is of a kernel in a CUDA graph."""
    found: dict[str, str] = {}
    for file in ("append", "decode", "prefill", "pages"):
        source = (Path(kernels.__file__).parent / "csrc" / f"cuda_{file}.cu").read_text()
        for name, kind in re.findall(r"__global__ [^{]*?(\w+)\(const (\w+) \w+\) \{", source):
            space = "dmc" if kind.startswith("Cuda") else "(anonymous namespace)"
            found[f"{file}: {name}"] = bench.part_of_kernel(f"void (anonymous namespace)::{name}({space}::{kind})")
        assert len([name for name in found if name.startswith(file)]) == source.count("__global__")
    wanted = {"append": "append", "decode": "attention", "prefill": "attention", "pages": "other"}
    assert len(found) >= 8 and all(part == wanted[name.split(":")[0]] for name, part in found.items()), found


@pytest.mark.gpu
def test_the_parts_of_a_step_on_a_gpu(bare: Path) -> None:
    engine = Engine(dummy.open_directory(bare, 4), EngineConfig(device="cuda", max_num_seqs=4))
    watch = StepProfiler(work := Workload(bench.random_prompts([40] * 4, 512, torch_generator()), [30] * 4), steps=5)
    iterate(engine, work)
    iterate(engine, work, watch)
    assert sum(watch.parts.values()) == pytest.approx(watch._wall / watch._seen, rel=0.05)
    assert all(watch.parts[name] > 0 for name in ("append", "attention", "linear", "sampling", "other"))


def test_a_request_that_fails_ends_the_measurement(model: Model) -> None:
    engine = model.engine(num_pages=LAYERS * GROUPS)
    with pytest.raises(ValueError, match="a request failed: the cache is full"):
        iterate(engine, Workload([list(model.prompt(14))], [60]))
    all_back(engine)


# --------------------------------------------------------------------------------------------------------- command line


def test_bench_throughput_of_several_models(bare: Path, tmp_path: Path, capsys) -> None:
    """One memory for all; the one that merges holds more; ratios are of the same rounds."""
    out = tmp_path / "deep" / "t.json"
    options = "--load-format dummy --compression-ratio 1,4 --input-len 60,150 --output-len 6 --num-prompts 8"
    options += " --kv-cache-memory-bytes 900000 --max-num-seqs 8 --num-iters 2 --random-range-ratio 0.2"
    assert main(["bench", "throughput", str(bare), *options.split(), "--output-json", str(out)]) == 0
    text = capsys.readouterr().out
    assert "where the time of a step goes" in text and "x first" in text and f"{bare.name} CR 4" in text
    figures = json.loads(out.read_text())
    rows = figures["results"]
    assert [(r["name"], r["case"]["input_len"]) for r in rows] == [
        (f"{bare.name} CR {c}", n) for n in (60, 150) for c in (1, 4)
    ]
    assert {
        "elapsed_time",
        "num_requests",
        "total_num_tokens",
        "requests_per_second",
        "tokens_per_second",
    } < figures.keys()
    plain, dmc = rows[2:]
    assert plain["kv_cache_memory_bytes"] == pytest.approx(dmc["kv_cache_memory_bytes"], rel=0.02)
    assert plain["compression_ratio"] == 1 and 3 < dmc["compression_ratio"] < 5
    assert dmc["max_batch_size_ratio"] == dmc["max_batch_size"] / plain["max_batch_size"] > 2
    assert plain["batch_limited_by"] == "memory" and dmc["batch_limited_by"] == "num_prompts"
    assert (
        plain["total_num_tokens"]
        == dmc["total_num_tokens"]
        == plain["total_prompt_tokens"] + plain["total_output_tokens"]
    )
    ratios = sorted(a / b for a, b in zip(plain["elapsed_times"], dmc["elapsed_times"]))
    assert [dmc["speedup"][k] for k in ("min", "max")] == ratios
    assert plain["tokens_per_second"] == pytest.approx(plain["total_num_tokens"] / plain["elapsed_time"])


def test_bench_throughput_of_a_dataset(model: Model, tmp_path: Path, capsys) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": [1, 2, 3]}\n\n{"prompt": [4, 5, 6, 7, 8, 9]}\n')
    paths = ["--dataset-path", str(tmp_path / "p.jsonl"), "--output-json", str(tmp_path / "o.json")]
    options = "--num-prompts 3 --num-iters 1 --num-iters-warmup 0 --output-len 4".split()
    for more, tokens in ((), 3 + 6 + 3), (("--input-len", "4"), 3 + 4 + 3):
        assert main(["bench", "throughput", model.path, *paths, *options, *more]) == 0
        found = json.loads((tmp_path / "o.json").read_text())
        assert (found["total_prompt_tokens"], found["total_output_tokens"], found["step_parts_ms"]) == (
            tokens,
            12,
            None,
        )
    text = capsys.readouterr().out
    assert "Throughput: " in text and "Total num prompt tokens:  12\nTotal num output tokens:  12\n" in text


def test_bench_latency(model: Model, tmp_path: Path, capsys) -> None:
    out = tmp_path / "l.json"
    options = "--input-len 20 --output-len 5 --batch-size 3 --num-iters-warmup 0 --num-iters 4"
    assert main(["bench", "latency", model.path, *options.split(), "--output-json", str(out)]) == 0
    figures = json.loads(out.read_text())
    assert len(figures["latencies"]) == 4 and figures["percentiles"].keys() == {"10", "25", "50", "75", "90", "99"}
    assert figures["avg_latency"] == pytest.approx(sum(figures["latencies"]) / 4)
    assert figures["peak_batch_size"] == 3 and figures["first_token"]["max"] < max(figures["latencies"])
    text = capsys.readouterr().out
    assert f"Avg latency: {figures['avg_latency']} seconds" in text and "99% percentile latency: " in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["throughput", "--compression-ratio", "2"], "--compression-ratio goes with --load-format dummy"),
        (["throughput", "--dataset-name", "custom"], "--dataset-name custom needs --dataset-path"),
        (["throughput", "--dataset-path", "{tmp}/none"], "none cannot be read"),
        (["throughput", "--dataset-path", "{tmp}/bad"], 'bad, line 2 has no "prompt"'),
        (["throughput", "--dataset-path", "{tmp}/empty"], "empty holds no prompts"),
        (["throughput", "--random-range-ratio", "1"], "random_range_ratio is 1.0"),
        (["latency", "--input-len", "250"], "prompt and completion have up to 378 tokens; max_model_len is 256"),
    ],
)
def test_bench_says_what_is_wrong(options: list[str], message: str, model: Model, tmp_path: Path, capsys) -> None:
    (tmp_path / "bad").write_text('{"prompt": "x"}\n{"text": "y"}\n')
    (tmp_path / "empty").write_text("\n")
    assert main(["bench", options[0], model.path, *(option.format(tmp=tmp_path) for option in options[1:])]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and message in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "options", [["throughput", "m", "--num-iters", "0"], ["latency", "m", "--batch-size", "1,x"], []]
)
def test_bench_refuses_options_that_are_no_numbers(options: list[str], capsys) -> None:
    assert main(["bench", *options]) == 2


@pytest.mark.slow
def test_bench_on_two_ranks(bare: Path, tmp_path: Path) -> None:
    """All ranks work, one speaks; the time that they wait for each other is a part of a step."""
    out = tmp_path / "o.json"
    options = "--load-format dummy --compression-ratio 1,4 --tensor-parallel-size 2 --num-iters-warmup 1 --num-iters 1"
    arguments = ["bench", "latency", str(bare), *options.split(), "--input-len", "40", "--output-len", "8"]
    arguments += ["--output-json", str(out)]
    assert run_ranks("megatron.dmc.cli", 2, arguments, tmp_path).count("x first") == 1
    plain, dmc = json.loads(out.read_text())["results"]
    assert plain["compression_ratio"] == 1 and dmc["compression_ratio"] > 2
    assert plain["step_parts_ms"]["communication"] > 0 and plain["num_pages"] % 2 == 0
