"""The chain of `make retrofit` at a size of seconds: train, report, plots, generation; and what those refuse."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from helpers import tiny
from helpers.processes import run_command

from megatron.dmc.cli.eval import main
from megatron.dmc.evaluation import quality
from megatron.dmc.evaluation.load import load_checkpoint
from megatron.dmc.evaluation.reference import ReferenceDecoder
from megatron.dmc.training import cpu, initialize


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """original, control and a retrofitted model; decisions with a low bias, so that a few steps make heads merge."""
    out = tmp_path_factory.mktemp("trained")
    tiny.make_data(out)
    common = dict(decision_bias=0.05, valid_data_path=[out / "valid"], eval_iters=1)
    tiny.run(tiny.command(out, "pretrain", train_iters=4, save=out / "original", **common), out / "runs/1")
    tiny.run(
        tiny.command(out, "pretrain", train_iters=2, init_from=out / "original", save=out / "control", **common),
        out / "runs/2",
    )
    tiny.run(
        tiny.command(out, "zero_out", train_iters=2, init_from=out / "original", save=out / "zero", **common),
        out / "runs/3",
    )
    tiny.run(
        tiny.command(
            out,
            "retrofit",
            train_iters=12,
            lr=2e-2,
            loss_weight=5.0,
            target_cr=3.0,
            init_from=out / "zero",
            save=out / "retrofit",
            tensorboard_dir=out / "board/1",
            **{k: v for k, v in common.items() if k != "decision_bias"},
        ),
        out / "runs/4",
    )
    return out


@pytest.fixture(autouse=True)
def _one_process():
    """Megatron's groups and the CPU mode are of the process: leave none behind."""
    yield
    initialize.shutdown()
    if cpu._mode is not None:
        cpu._mode.__exit__(None, None, None)
        cpu._mode = None


def test_report_writes_table_json_and_plots(trained: Path, capsys) -> None:
    rows = ["original=original", "control=control", "DMC=retrofit:control"]
    args = [x for row in rows for x in ("--row", row.replace("=", f"={trained}/"))]
    status = main(
        [
            "report",
            "--tokenizer",
            str(trained / "tokenizer.model"),
            "--data",
            str(trained / "valid"),
            *args,
            "--sequences",
            "8",
            "--curves",
            str(trained / "board/1"),
            "--output",
            str(trained / "report"),
        ]
    )
    assert status == 0, capsys.readouterr().err
    results = {r["name"]: r for r in json.loads((trained / "report/report.json").read_text())}
    assert results["original"]["cr"] == results["control"]["cr"] == 1.0
    dmc = results["DMC"]
    assert dmc["cr"] > 1.05 and dmc["target_cr"] == 3.0
    heads = torch.tensor(dmc["cr_by_head"])
    assert heads.shape == (2, 2)
    # One ratio of two sums: the harmonic mean over heads of equal weight.
    assert dmc["cr"] == pytest.approx(float(1 / (1 / heads).mean()), rel=1e-6)
    assert dmc["perplexity_ratio"] == pytest.approx(dmc["perplexity"] / results["control"]["perplexity"])
    assert dmc["kv_bytes_per_token"] == pytest.approx(results["original"]["kv_bytes_per_token"] / dmc["cr"])
    for picture in ("cr_by_head.png", "curves.png"):
        assert (trained / "report" / picture).read_bytes().startswith(b"\x89PNG")
    assert "| DMC |" in (trained / "report/report.md").read_text()


def test_a_report_on_no_sequences_is_refused(capsys) -> None:
    needed = ["--tokenizer", "t.model", "--data", "valid", "--output", "report", "--row", "a=b"]
    assert main(["report", *needed, "--sequences", "0"]) == 2
    assert "--sequences: 0 is not a number of at least 1" in capsys.readouterr().err


def test_decoding_token_by_token_gives_the_validation_loss(trained: Path) -> None:
    """The oracle's decoder and the teacher-forced evaluation are two programs: losses and slots must agree."""
    from megatron.dmc.training.tokenizer import load_tokenizer

    loaded = load_checkpoint(trained / "retrofit")
    measured = quality.measure(loaded, load_tokenizer(trained / "tokenizer.model"), str(trained / "valid"), 2, batch=1)
    batches = quality._batches(loaded, load_tokenizer(trained / "tokenizer.model"), str(trained / "valid"), 2, 1)
    loss, slots = 0.0, 0
    for _ in range(2):
        item, decoder = next(batches), ReferenceDecoder(loaded)
        for token, label in zip(item["tokens"][0].tolist(), item["labels"][0].tolist(), strict=True):
            loss -= float(torch.log_softmax(decoder.step(token), dim=-1)[label])
        slots += int(decoder.lengths().sum())
    assert measured.tokens == 2 * tiny.SEQ
    # The model's softmax runs over the padded vocabulary; here it has no padding.
    assert tiny.VOCABULARY % tiny.MODEL["make_vocab_size_divisible_by"] == 0
    assert measured.lm_loss == pytest.approx(loss / measured.tokens, rel=1e-5)
    assert measured.cr == pytest.approx(measured.tokens * 4 / slots)


def test_generation_prints_text_and_slots(trained: Path, capsys) -> None:
    argv = [
        "--load",
        str(trained / "retrofit"),
        "--tokenizer",
        str(trained / "tokenizer.model"),
        "--prompt",
        "def main(",
    ]
    assert main(["generate", *argv, "--max-tokens", "6"]) == 0
    greedy = capsys.readouterr().out
    assert greedy.startswith("def main(") and "CR " in greedy.splitlines()[-1]
    assert main(["generate", *argv, "--max-tokens", "6"]) == 0
    assert capsys.readouterr().out == greedy
    assert main(["generate", *argv, "--max-tokens", "6", "--temperature", "1", "--top-p", "0.9", "--seed", "3"]) == 0


@pytest.mark.parametrize(
    "change, message",
    [
        (("--row", "DMC"), "NAME=CHECKPOINT"),
        (("--row", "DMC=nowhere"), "does not exist"),
        (("--row", "DMC=nowhere:control"), "no row before"),
        (("--row", "DMC=nowhere", "--output", __file__), "is not a directory; name another place"),
    ],
)
def test_report_refuses_wrong_rows(trained: Path, capsys, change, message) -> None:
    base = [
        "--tokenizer",
        str(trained / "tokenizer.model"),
        "--data",
        str(trained / "valid"),
        "--output",
        str(trained / "not-written"),
    ]
    assert main(["report", *base, *change]) == 2
    assert message in capsys.readouterr().err
    assert not (trained / "not-written").exists()


def test_generation_refuses_a_model_that_does_not_compress(trained: Path, capsys) -> None:
    argv = ["--tokenizer", str(trained / "tokenizer.model"), "--prompt", "x"]
    assert main(["generate", "--load", str(trained / "original"), *argv]) == 2
    assert "does not compress" in capsys.readouterr().err


def test_top_p_keeps_the_most_likely_tokens(trained: Path) -> None:
    """Sampling from a tiny nucleus is greedy, whatever the seed."""
    loaded = load_checkpoint(trained / "retrofit")
    greedy = list(ReferenceDecoder(loaded).generate([5, 6], 5))
    for seed in range(3):
        assert list(ReferenceDecoder(loaded).generate([5, 6], 5, temperature=1.0, top_p=1e-9, seed=seed)) == greedy
    with pytest.raises(ValueError, match="empty"):
        next(ReferenceDecoder(loaded).generate([], 1))


@pytest.mark.slow
def test_modules_answer_help() -> None:
    for module in ("report", "generate"):
        out = run_command([sys.executable, "-m", f"megatron.dmc.evaluation.{module}", "--help"]).stdout
        assert "--tokenizer" in out
