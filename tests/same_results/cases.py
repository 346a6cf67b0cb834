"""The cases: commands that both sides run, in order. Later cases read what earlier ones wrote on their own side.

A command runs in the side's directory, and a case writes below a folder of its own name there. So paths are the same on
both sides.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

SIZES = dict(
    num_layers=2,
    hidden_size=32,
    ffn_hidden_size=64,
    num_attention_heads=4,
    num_query_groups=2,
    vocab_size=512,
    make_vocab_size_divisible_by=64,
    max_position_embeddings=256,
    decision_bias=0.05,
)
TRAINING = dict(seq_length=32, micro_batch_size=2, global_batch_size=4, lr=1e-3, log_interval=1, train_iters=4)


@dataclass(frozen=True)
class Command:
    """One program: ``entry`` is a module, a script of the checkout, ``jobs.py``, or ``dmc``."""

    entry: str
    args: Sequence[object]
    ranks: int = 1
    fresh: bool = False
    """Start a script in a new interpreter instead of forking: it starts processes of its own."""

    def words(self, checkout: Path) -> list[str]:
        """What to run and its arguments. The ``dmc`` command is a module that has moved."""
        entry = self.entry
        if entry == "dmc":
            new = (checkout / "megatron/dmc/cli/__main__.py").is_file()
            entry = "megatron.dmc.cli" if new else "megatron.dmc.serving.cli"
        return [entry, *map(str, self.args)]


@dataclass(frozen=True)
class Case:
    """A line of the table. ``commands`` are those of given inputs; the case's folder is named like it."""

    name: str
    commands: Callable[[Path], list[Command]]


def flags(**values: object) -> list[object]:
    """``lr=1e-3`` -> ``--lr 0.001``; True makes a switch, a tuple several values, None leaves the flag out."""
    result: list[object] = []
    for name, value in values.items():
        flag = "--" + name.replace("_", "-")
        if value is True:
            result.append(flag)
        elif isinstance(value, tuple):
            result += [flag, *value]
        elif value is not None:
            result += [flag, value]
    return result


def training(name: str, stage: str, init: str | None = None, ranks: int = 1, runs: int = 1, **more: object) -> Case:
    """One stage; ``runs=2`` stops it half-way and starts it again."""

    def commands(inputs: Path) -> list[Command]:
        values = {
            **(SIZES if init is None else {}),
            **TRAINING,
            "stage": stage,
            "data_path": ("data/train",),
            "valid_data_path": ("data/valid",),
            "eval_iters": 2,
            "tokenizer": inputs / "tokenizer.model",
            "save": f"{name}/save",
            "tensorboard_dir": f"{name}/tensorboard",
            "init_from": init and f"{init}/save",
            **more,
        }
        stopped = [Command("megatron.dmc.training.retrofit", flags(**values, exit_interval=3), ranks)] * (runs - 1)
        return [*stopped, Command("megatron.dmc.training.retrofit", flags(**values), ranks)]

    return Case(name, commands)


def data(inputs: Path) -> list[Command]:
    def command(source: str, name: str, workers: int, *more: str) -> Command:
        args = ["--input", inputs / f"{source}.jsonl", "--tokenizer", inputs / "tokenizer.model"]
        args += ["--output-prefix", f"data/{name}", "--workers", workers, *more]
        return Command("tools/preprocess_data.py", args, fresh=workers > 1)

    return [
        command("train", "train", 1),
        command("valid", "valid", 1),
        command("train", "train-bos", 2, "--prepend-bos", "--no-append-eod"),
    ]


def conversion(name: str) -> Case:
    """A Hugging Face model in, checked, and out again."""

    def commands(inputs: Path) -> list[Command]:
        hf, tool = inputs / "hf" / name, "tools/convert_checkpoint.py"
        return [
            Command(tool, ["import", "--hf", hf, "--save", f"convert-{name}/save"]),
            Command(tool, ["verify", "--hf", hf, "--load", f"convert-{name}/save", "--logits"]),
            Command(tool, ["export", "--load", f"convert-{name}/save", "--save", f"convert-{name}/hf"]),
        ]

    return Case(f"convert-{name}", commands)


def legacy(inputs: Path) -> list[Command]:
    tool = "tools/convert_checkpoint.py"
    commands = []
    for layout in ("te", "local"):
        commands += [
            Command(tool, ["import", "--legacy", inputs / "legacy" / layout, "--save", f"legacy/{layout}"]),
            Command(tool, ["export", "--load", f"legacy/{layout}", "--save", f"legacy/{layout}-hf"]),
        ]
    return commands


def merge_heads(inputs: Path) -> list[Command]:
    args = ["merge-heads", "--hf", inputs / "hf/llama2", "--kv-heads", 2, "--save", "merge-heads/hf"]
    return [Command("tools/convert_checkpoint.py", args)]


def export(inputs: Path) -> list[Command]:
    """Trained checkpoints of several stages as Hugging Face models, and what those compute."""
    stages = ("zero_out", "finetune", "tensor-parallel")
    tool, tokenizer = "tools/convert_checkpoint.py", inputs / "tokenizer.model"
    commands = [
        Command(tool, ["export", "--load", f"{s}/save", "--save", f"export/{s}", "--tokenizer", tokenizer])
        for s in stages
    ]
    return [*commands, Command("jobs.py", ["transformers", "export/computed.json", *(f"export/{s}" for s in stages)])]


def report(inputs: Path) -> list[Command]:
    rows = ["original=pretrain/save", "DMC=finetune/save:original", "distilled=distillation/save:original"]
    rows = [word for row in rows for word in ("--row", row)]
    common = ["--tokenizer", inputs / "tokenizer.model", "--data", "data/valid", "--sequences", 12]
    return [Command("megatron.dmc.evaluation.report", [*common, "--output", "report/out", *rows])]


def measures(inputs: Path) -> list[Command]:
    """One row of the comparison under each cache policy."""
    tasks = dict(windows=2, recall_lengths=[192], recall_depths=[0.5], recall_samples=2, batch=4, lm_eval_tasks=[])
    common = dict(valid=str(inputs / "valid.jsonl"), tokenizer=str(inputs / "tokenizer.model"), length=128, seed=1)
    commands = []
    for policy in (None, "H2O", "TOVA", "StreamingLLM"):
        model = f"export/{'zero_out' if policy else 'finetune'}"
        spec = json.dumps({**common, "model": model, "policy": policy, "ratio": 2.0, "tasks": tasks})
        commands.append(Command("megatron.dmc.evaluation.compare.measure", [spec, f"measures/{policy}.json"]))
    return commands


def engine(name: str) -> Case:
    return Case(
        f"engine-{name}", lambda inputs: [Command("jobs.py", ["engine", name, inputs, f"engine-{name}/result.json"])]
    )


def generate(inputs: Path) -> list[Command]:
    """The command's output, on one rank and on two."""
    model = inputs / "engine/half"
    common = ["generate", model, "--max-tokens", 20, "--ignore-eos"]
    return [
        Command("dmc", [*common, "--prompt", "hello", "--prompt-ids", "1,2,3,4"]),
        Command("dmc", [*common, "--prompt", "hello", "--stream", "--temperature", 0.8, "--seed", 3]),
        Command("dmc", [*common, "--prompt", "hello, two ranks", "--tensor-parallel-size", 2], ranks=2),
    ]


def batch(inputs: Path) -> list[Command]:
    common = ["batch", "-i", inputs / "batch.jsonl", "--model", inputs / "engine/half", "--disable-tqdm"]
    sizes = ["--max-num-seqs", 4, "--max-num-batched-tokens", 64]
    return [
        Command("dmc", [*common, "-o", "batch/all.jsonl"]),
        Command("dmc", [*common, *sizes, "-o", "batch/shard.jsonl", "--shard", "1/2", "--seed", 5]),
    ]


def plan(inputs: Path) -> list[Command]:
    return [
        Command("tools/plan.py", ["llama2-70b", "--gpus", 64, "--json", "plan/70b.json"]),
        Command("tools/plan.py", [inputs / "hf/qwen3", "--gpus", 2, "--json", "plan/qwen3.json"]),
    ]


COMPRESS = dict(target_cr=3.0, lr=2e-2, loss_weight=5.0)
CASES: list[Case] = [
    Case("data", data),
    training("pretrain", "pretrain"),
    training("zero_out", "zero_out", "pretrain"),
    training("retrofit", "retrofit", "zero_out", **COMPRESS, save_interval=2),
    training("resume", "retrofit", "zero_out", runs=2, **COMPRESS, save_interval=2),
    training("finetune", "finetune", "retrofit"),
    training("distillation", "retrofit", "zero_out", **COMPRESS, distill_from="pretrain/save"),
    training("dms", "retrofit", "zero_out", **COMPRESS, method="dms", window=8),
    training("tensor-parallel", "retrofit", "zero_out", 2, **COMPRESS, tensor_model_parallel_size=2),
    training(
        "pipeline-parallel", "retrofit", "zero_out", 2, **COMPRESS, pipeline_model_parallel_size=2, micro_batch_size=1
    ),
    training("bf16", "retrofit", "zero_out", **COMPRESS, bf16=True, recompute_granularity="full"),
    Case("report", report),
    *(conversion(name) for name in ("llama3.1", "qwen2", "qwen3", "mistral")),
    Case("legacy", legacy),
    Case("merge-heads", merge_heads),
    Case("export", export),
    Case("measures", measures),
    *(engine(name) for name in ("greedy", "sampling", "prefix", "preemption", "bf16", "chunks")),
    Case("generate", generate),
    Case("batch", batch),
    Case("plan", plan),
]
