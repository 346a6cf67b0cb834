"""The comparison: its jobs, that they run once and in order, what the report says; and all of it on a tiny model."""

from __future__ import annotations

import json
import math
import random
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from helpers.processes import ROOT

from megatron.dmc.cli import compare as command
from megatron.dmc.evaluation.compare import summary
from megatron.dmc.evaluation.compare.config import CompareConfig
from megatron.dmc.evaluation.compare.jobs import Job, JobGraph
from megatron.dmc.evaluation.compare.methods import build_graph
from megatron.dmc.evaluation.compare.runner import JobRunner
from megatron.dmc.evaluation.teacher_forced import Compression, TeacherForced

TINY = {
    "seeds": [1],
    "ratios": [2],
    "corpus": {"vocab_size": 512, "recall_tokens": 20000},
    "original": {"iters": 3, "global_batch_size": 2},
    "recipe": {"zero_out_iters": 2, "iters_per_cr": 2, "finetune_iters": 2, "dms_window": 8},
    "measure": {"windows": 2, "recall_lengths": [192], "recall_depths": [0.5], "recall_samples": 2},
    "run": {
        "model": dict(
            num_layers=2,
            hidden_size=64,
            ffn_hidden_size=96,
            num_attention_heads=4,
            kv_channels=32,
            vocab_size=512,
            max_position_embeddings=192,
            init_method_std=0.08,
            rotary_base=1e7,
        ),
        "dmc": {"decision_bias": 0.0},
        "data": {"seq_length": 192},
        "training": dict(micro_batch_size=2, global_batch_size=2, log_interval=1),
    },
}


def load(tmp_path: Path, **changes) -> CompareConfig:
    path = tmp_path / "compare.yaml"
    path.write_text(yaml.safe_dump({**TINY, "output": str(tmp_path / "out"), **changes}))
    return CompareConfig.load(path)


def everything(tmp_path: Path) -> CompareConfig:
    return load(
        tmp_path,
        seeds=[1, 2],
        ratios=[2, 4],
        compound={"gqa_ratio": 2, "ratios": [2, 4]},
        economy={"ratio": 4, "shares": [0.25, 0.5], "methods": ["DMC", "DMC + distillation"]},
    )


# The job graph


def test_every_method_gets_as_many_steps_as_the_control(tmp_path) -> None:
    graph = build_graph(everything(tmp_path))
    rows = {(row.method, row.ratio): row for row in graph.rows if row.seed == 1 and row.table == "main"}
    methods = {
        "full cache",
        "control",
        "DMC",
        "DMC + distillation",
        "DMS + distillation",
        "GQA",
        "H2O",
        "TOVA",
        "StreamingLLM",
    }
    assert {method for method, _ in rows} == methods
    for (method, ratio), row in rows.items():
        assert graph.steps(row.run) == {1: 0, 2: 2 + 2 + 2, 4: 2 + 6 + 2}[ratio], row
        assert method in ("full cache", "control") or row.baseline == rows["control", ratio].run
    shares = [graph.steps(row.run) for row in graph.rows if row.table == "economy" and row.seed == 1]
    assert shares == 2 * [2 + 2 + 1, 2 + 3 + 1]  # a quarter and a half of 6 and 2 steps
    on_top = {row.ratio: row for row in graph.rows if row.table == "compound" and row.seed == 1}
    assert {ratio: graph.steps(row.run) for ratio, row in on_top.items()} == {4: 6 + 6, 8: 6 + 10}
    # The seeds share the text alone.
    assert all("seed2" not in run for row in graph.rows if row.seed == 1 for run in graph.lineage(row.run))


def test_dms_from_every_source(tmp_path) -> None:
    """As many steps each; queries free a channel of their own, adapters are trained alone, from an imported base."""
    methods = ["DMS", "DMS query", "DMS query + distillation", "DMS adapter"]
    graph = build_graph(load(tmp_path, ratios=[2, 4], methods=methods))
    rows = [row for row in graph.rows if row.method in methods]
    assert len(rows) == 8 and all(graph.steps(row.run) == {2: 6, 4: 10}[row.ratio] for row in rows)

    def flags(name: str) -> str:
        return " ".join(graph.jobs[name].commands[-1])

    query = "--method dms --window 8 --decision-source query --decision-scale 100"
    assert all(
        set(query.split()) <= set(flags(f"seed1/{name}").split())
        for name in ("zero_out-query", "dms-query/2x-retrofit")
    )
    assert "--method" not in flags("seed1/dms-query/4x-retrofit") and "query" not in flags("seed1/zero_out")
    for name in ("2x-retrofit", "2x", "4x-retrofit", "4x"):
        assert "--freeze-base" in flags(f"seed1/dms-adapter/{name}") and "--distill" not in flags(
            f"seed1/dms-adapter/{name}"
        )
    lineage = graph.lineage("seed1/dms-adapter/4x")
    assert "seed1/original-base" in lineage and not any("zero_out" in name for name in lineage)


def test_jobs_wait_for_what_they_read(tmp_path) -> None:
    """Every path under the output that a command names, but its own results, was made by a job before it."""
    config = everything(tmp_path)
    graph, output = build_graph(config), str(tmp_path / "out")
    made: dict[str, str] = {f"{output}/run.yaml": "", f"{output}/original.yaml": ""}
    for job in graph.jobs.values():
        before, todo = {job.name}, list(job.after)
        while todo:
            before.add(todo[-1])
            todo += graph.jobs[todo.pop()].after
        for words in job.commands:
            texts = [word for word in words if word.startswith(output)]
            if "compare.measure" in " ".join(words):
                texts += [json.loads(words[-2])["model"]]
            for text in texts:
                maker = made.setdefault(text, job.name)
                assert maker == "" or maker in before, f"{job.name} reads {text} of {maker}"
    assert len({job.commands for job in graph.jobs.values()}) == len(graph.jobs)  # nothing is done twice


def test_a_changed_setting_changes_what_depends_on_it(tmp_path) -> None:
    one, two = (build_graph(load(tmp_path, recipe={"finetune_iters": n})) for n in (2, 3))
    changed = {name for name in one.jobs if one.digest(name) != two.digest(name)}
    assert changed == {
        name
        for name in one.jobs
        if name.startswith(
            (
                "seed1/dmc/2x",
                "seed1/dmc-distillation/2x",
                "seed1/dms-distillation/2x",
                "seed1/gqa/2x",
                "seed1/control/2x",
            )
        )
        and not name.endswith(("-retrofit", "-constant", "-merged"))
    }


@pytest.mark.parametrize(
    "message, changes",
    [
        ("method 'SnapKV' is unknown", {"methods": ["SnapKV"]}),
        ("4 KV heads cannot be merged 3 to one", {"ratios": [3]}),
        ("compound needs GQA", {"methods": ["DMC"], "compound": {}}),
        ("must be among the methods", {"methods": ["DMC"], "economy": {"ratio": 2}}),
        ("between 0 and 1", {"economy": {"ratio": 2, "shares": [1.5]}}),
        ("seeds .* must be different", {"seeds": [1, 1]}),
        ("must ascend", {"ratios": [4, 2]}),
        ("give all three", {"corpus": {"train": "a.jsonl"}}),
        ("exceed max_position_embeddings", {"measure": {"recall_lengths": [500]}}),
        ("unknown configuration key economy.ratios", {"economy": {"ratios": [2]}}),
    ],
)
def test_wrong_configurations_are_refused(message, changes, tmp_path, capsys) -> None:
    with pytest.raises(ValueError, match=message):
        load(tmp_path, **changes)
    assert command.main([str(tmp_path / "compare.yaml")]) == 2
    assert "error: " in capsys.readouterr().err and not (tmp_path / "out").exists()


# The runner


def shell(text: str) -> tuple[str, ...]:
    return ("/bin/sh", "-c", text)


def runner(tmp_path: Path, *jobs: Job) -> JobRunner:
    return JobRunner(JobGraph({job.name: job for job in jobs}), tmp_path, 2)


def test_jobs_run_once_in_order_and_go_on_after_a_failure(tmp_path) -> None:
    log = tmp_path / "log"
    say = lambda word: shell(f"echo {word} >> {log}")
    first = Job("first", (say("a"), say("b")))
    fails = Job("x/fails", (shell(f"test -e {tmp_path}/ready || {{ echo why; exit 3; }}"),), ("first",))
    last = Job("x/last", (say("c"),), ("x/fails",))
    with pytest.raises(RuntimeError, match=r"x/fails ended with status 3.*\nwhy"):
        runner(tmp_path, first, fails, last).run()
    assert log.read_text() == "a\nb\n"
    (tmp_path / "ready").touch()
    runner(tmp_path, first, fails, last).run()
    runner(tmp_path, first, fails, last).run()
    assert log.read_text() == "a\nb\nc\n"
    # Another command: it and what waits for it.
    runner(tmp_path, first, Job("x/fails", (say("d"),), ("first",)), last).run()
    assert log.read_text() == "a\nb\nc\nd\nc\n"


def test_a_training_that_leaves_early_is_not_done_and_its_directory_is_not_taken_for_another(tmp_path, capsys) -> None:
    training = lambda n, at: Job(
        "run", (shell(f"mkdir -p {tmp_path}/run; echo ' iteration   {at}/ {n} '"),), (), 100.0, n
    )
    with pytest.raises(RuntimeError, match="before it was done"):
        runner(tmp_path, training(4, 3)).run()
    short = runner(tmp_path, training(4, 3))
    short.check()
    assert short._tokens_left(training(4, 3)) == 25  # of 100 tokens
    with pytest.raises(ValueError, match="run was trained with other settings"):
        runner(tmp_path, training(5, 5)).check()


# The report


def fake(output: Path, graph: JobGraph) -> None:
    """Measurements with which every number of the table is known."""
    slots = torch.ones(2, 1, 4, 192)
    for i, row in enumerate(graph.rows):
        path = output / f"{row.key}/measured.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        c = Compression.of(
            slots * torch.arange(1, 193) * (row.heads_ratio / row.ratio if row.method != "control" else 1)
        )
        figures = [
            ("loss", "all", 2.0 + 0.1 * row.seed + 0.01 * i),
            ("loss", "96-191", 1.5),
            ("identifiers", "gap >= 128", 0.25),
        ]
        figures += [
            (f"{task}, tokens", "192 tokens", 0.5) for task in ("needle", "multi-key", "variable tracking", "copying")
        ]
        path.write_text(
            json.dumps(
                {
                    "figures": [dict(task=a, where=b, value=c, n=1, stderr=0.0) for a, b, c in figures],
                    "compression": dict(
                        at_end=c.at_end,
                        mean=c.mean,
                        reads=c.reads,
                        by_head=c.by_head.tolist(),
                        by_position=c.by_position.tolist(),
                    ),
                }
            )
        )


def test_tables_are_means_over_seeds_beside_the_control_of_the_same_seed(tmp_path) -> None:
    config = everything(tmp_path)
    graph = build_graph(config)
    fake(tmp_path, graph)
    measured = summary.read(graph, tmp_path)
    text = summary.table(config, measured, "main").splitlines()
    row = next(line for line in text if line.startswith("| DMC | 1/4")).split(" | ")
    mine = [m for m in measured if (m.row.method, m.row.ratio, m.row.table) == ("DMC", 4, "main")]
    controls = {m.row.seed: m for m in measured if (m.row.method, m.row.ratio) == ("control", 4)}
    relatives = [m.perplexity / controls[m.row.seed].perplexity for m in mine]
    assert row[2] == "1/4.00 ± 0.00, 1/4.00"
    assert row[4] == f"{sum(relatives) / 2:.3f} ± {abs(relatives[0] - relatives[1]) / 2:.3f}"
    assert float(row[5].split(" ± ")[0]) == pytest.approx(sum(m.perplexity for m in mine) / 2, abs=0.01)
    gqa = next(line for line in text if line.startswith("| GQA | 1/4")).split(" | ")
    assert gqa[2].startswith("1/4.00")  # a quarter of the heads, each with a slot per token
    compound = summary.table(config, measured, "compound")
    assert "| GQA 2x + DMC 4x | 1/8 | 1/8.00" in compound
    assert math.isnan(measured[0].figure("nothing", "all"))


def test_a_report_can_be_had_at_any_time(tmp_path, capsys) -> None:
    """The report covers what has been measured: all of the first seed's rows but one, and none of the second's."""
    config = everything(tmp_path)
    output = Path(config.output)
    graph = build_graph(config)
    run = [str(tmp_path / "compare.yaml"), "--report"]
    assert command.main(run) == 2 and "no control has been measured" in capsys.readouterr().err
    fake(output, graph)
    for row in graph.rows:
        if row.seed == 2 or row.method == "TOVA":
            (output / f"{row.key}/measured.json").unlink(missing_ok=True)
    for job in graph.jobs.values():
        (output / job.name / "tensorboard").mkdir(parents=True, exist_ok=True)
    assert command.main(run) == 0
    text = (output / "report/report.md").read_text()
    left = sum(row.seed == 1 and row.method != "TOVA" for row in graph.rows)
    assert f"{left} of {len(graph.rows)} rows" in text and "TOVA" not in text and "| H2O | 1/4 |" in text
    assert {path.name for path in (output / "report").iterdir()} == {
        "report.md",
        "report.json",
        "quality.png",
        "cr_by_head.png",
        "cr_by_position.png",
        "curves.png",
        "economy.png",
    }
    for row in graph.rows:  # the controls come first
        if row.method != "control":
            (output / f"{row.key}/measured.json").unlink(missing_ok=True)
    assert command.main(run) == 0


# All of it


@pytest.mark.slow
def test_a_tiny_comparison_from_nothing_to_its_report(tmp_path, monkeypatch, transformers_state, capsys) -> None:
    """Training, conversion, measurement and report by the command, twice: the second time nothing is left to do."""
    monkeypatch.syspath_prepend(ROOT / "examples/dmc")
    import build_corpus

    texts = [Path(module.__file__).read_text() for module in (random, subprocess, statistics)]
    build_corpus.train_tokenizer(texts, 512, tmp_path / "tokenizer.model")
    for name, part in (("train", texts[:2]), ("valid", texts[2:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in part))
    corpus = {name: str(tmp_path / name) for name in ("train.jsonl", "valid.jsonl", "tokenizer.model")}
    corpus = {name.partition(".")[0]: path for name, path in corpus.items()}
    load(tmp_path, methods=["DMS + distillation", "H2O"], corpus={**TINY["corpus"], **corpus})
    assert command.main([str(tmp_path / "compare.yaml")]) == 0, capsys.readouterr().err
    out = tmp_path / "out"
    report = json.loads((out / "report/report.json").read_text())
    rows = {(row["method"], row["ratio"]): row for row in report["rows"]}
    assert set(rows) == {("full cache", 1), ("control", 2), ("DMS + distillation", 2), ("H2O", 2)}
    h2o, dms = rows["H2O", 2], rows["DMS + distillation", 2]
    assert h2o["cache_ratio"] == pytest.approx(2, rel=0.01) and h2o["run"] == rows["control", 2]["run"]
    assert dms["cache_ratio"] > 1.05  # a bias of 0: the first random logits mark some tokens
    assert all(math.isfinite(figure["value"]) for row in rows.values() for figure in row["figures"])
    for name in ("quality", "cr_by_head", "cr_by_position", "curves"):
        assert (out / f"report/{name}.png").stat().st_size > 5000
        assert f"]({name}.png)" in (out / "report/report.md").read_text()
    stamps = {path: path.stat().st_mtime_ns for path in (out / "jobs").rglob("*.json")}
    run = [sys.executable, "-m", "megatron.dmc.evaluation.compare", str(tmp_path / "compare.yaml")]
    again = subprocess.run(run, capture_output=True, text=True, check=True, timeout=120)
    assert "jobs done" not in again.stdout and stamps == {path: path.stat().st_mtime_ns for path in stamps}
    # What the engine and transformers make of it.
    from transformers import AutoModelForCausalLM

    from megatron.dmc.inference import LLM, SamplingParams

    hf = out / "seed1/dms-distillation/2x/hf"
    (result,) = LLM(hf, dtype="float32").generate([[*range(3, 43)]], SamplingParams(max_tokens=1, prompt_logprobs=0))
    ours = sum(entry.logprob for entry in result.prompt_logprobs) / 39
    ids = torch.arange(3, 43)[None]
    loss = AutoModelForCausalLM.from_pretrained(hf, trust_remote_code=True)(ids, labels=ids).loss
    assert float(loss) == pytest.approx(-float(TeacherForced.load(hf).score(ids).log_prob.mean()), rel=1e-4)
    assert float(loss) == pytest.approx(-ours, rel=1e-4)
