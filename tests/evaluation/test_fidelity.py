"""A compressed model beside its original: figures against plain PyTorch over slow caches, and the command's files."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path

import pytest
import torch
from helpers import families
from helpers.exported import CASES, DMS_CASES, Exported, tokens
from helpers.serving import add_tokenizer
from safetensors.torch import save_file
from slow_caches import SlowCache

from megatron.dmc.checkpoint import convert
from megatron.dmc.checkpoint.adapter_export import export_adapter
from megatron.dmc.cli.eval import main
from megatron.dmc.evaluation import fidelity as module
from megatron.dmc.evaluation.fidelity import Candidate, fidelity
from megatron.dmc.evaluation.policies import H2O, Budget
from megatron.dmc.evaluation.teacher_forced import TeacherForced


def logits(exported: Exported, ids: list[int], compressed: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits after each token, fp64 [s, vocabulary], and slots [layers, KV heads], one token after the other."""
    oracle = exported.oracle()
    if not compressed:
        oracle.caches = [SlowCache(1, 2, exported.inv_freq, factor=exported.rotary_factor) for _ in oracle.caches]
    return oracle.run(ids).double(), oracle.lengths()


def by_hand(exported: Exported, rows: list[list[int]]) -> dict[str, float]:
    """Figures of an evicting model beside itself with the full cache."""
    sums, slots, n = dict.fromkeys(("base", "own", "kld", "agreement"), 0.0), 0, 0
    for ids in rows:
        (base, _), (own, held) = (logits(exported, ids, compressed) for compressed in (False, True))
        slots += int(held.sum())
        for t, after in enumerate(ids[1:]):
            p, q = (torch.softmax(x[t], dim=-1) for x in (base, own))
            sums["base"] -= math.log(p[after])
            sums["own"] -= math.log(q[after])
            sums["kld"] += float((p * (p / q).log()).sum())
            sums["agreement"] += float(p.argmax() == q.argmax())
            n += 1
    mean = {name: value / n for name, value in sums.items()}
    return {
        "base_perplexity": math.exp(mean["base"]),
        "perplexity": math.exp(mean["own"]),
        "ratio": math.exp(mean["own"] - mean["base"]),
        "kld": mean["kld"],
        "agreement": mean["agreement"],
        "cr": sum(map(len, rows)) * 4 / slots,  # two layers of two KV heads
    }


def command(capsys, *arguments: object) -> str:
    status = main(["fidelity", *map(str, arguments)])
    written = capsys.readouterr()
    assert status == 0, written.err
    return written.out


def test_the_command_gives_what_decoding_step_by_step_gives(tmp_path: Path, capsys, monkeypatch) -> None:
    """A model with its adapters inside, and its base with --adapter."""
    monkeypatch.setattr(module, "ROWS", 7)
    whole, base, adapter = tmp_path / "whole", tmp_path / "base", tmp_path / "adapter"
    exported = Exported(whole, **DMS_CASES["adapter, self"] | dict(bias=0.5, window=4))
    add_tokenizer(whole)
    config = {k: v for k, v in exported.config.items() if k not in ("dmc", "auto_map")}
    base.mkdir()
    (base / "config.json").write_text(
        json.dumps(config | {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]})
    )
    plain = {name: tensor for name, tensor in exported.weights.items() if "dms_proj" not in name}
    save_file(plain, base / "model.safetensors", {"format": "pt"})
    add_tokenizer(base)
    convert.import_hf(whole, tmp_path / "mg")
    export_adapter(tmp_path / "mg", adapter, base_model=str(base))

    text = "thequickbrownfoxjumpsoverthelazydogandruns"
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "b.jsonl").write_text(
        "".join(json.dumps({"text": t}) + "\n" for t in ("short", text[::-1], "more" * 20))
    )
    both = [tmp_path / "a.txt", tmp_path / "b.jsonl", "--lengths", "30,20", "--sequences", "2"]
    capsys.readouterr()
    files = ["--json", tmp_path / "new/f.json", "--heat-map", tmp_path / "h.png"]
    out = command(capsys, base, "--adapter", adapter, *files, "--data", *both)
    found = json.loads((tmp_path / "new/f.json").read_text())["rows"]
    cut = [(r["text"], r["length"], r["sequences"]) for r in found]
    assert cut == [("a.txt", 20, 2), ("a.txt", 30, 1), ("b.jsonl", 20, 2), ("b.jsonl", 30, 2)]
    assert len(out.splitlines()) == 6 and "a.txt" in out
    assert (tmp_path / "h.png").read_bytes().startswith(b"\x89PNG")

    letters = "abcdefghijklmnopqrstuvwxyz"
    ids = lambda part: [59, *map(letters.index, part)]  # BOS first, which this tokenizer adds to every text
    want = by_hand(exported, [ids(text[::-1][:29]), ids(("more" * 20)[:29])])
    assert want["kld"] > 0.01 and want["cr"] > 1.3 and want["agreement"] < 1  # the case is a case
    assert {name: found[3][name] for name in want} == pytest.approx(want, rel=1e-4)
    assert found[3]["kv_bytes_per_token"] == pytest.approx(found[3]["base_kv_bytes_per_token"] / want["cr"])
    assert found[3]["kld_stderr"] > 0 and found[1]["kld_stderr"] is None

    for original in ([], ["--base", base]):
        assert command(capsys, whole, *original, "--data", *both) == out


def test_other_policies_share_one_run_of_the_original(tmp_path: Path, monkeypatch) -> None:
    exported = Exported(tmp_path / "model", **DMS_CASES["adapter"])
    model, ids = TeacherForced.load(tmp_path / "model"), torch.tensor([tokens(24, 1), tokens(24, 2)])
    asked = []
    inner = TeacherForced.hidden_states
    monkeypatch.setattr(
        TeacherForced, "hidden_states", lambda self, x, p=None: asked.append(str(p)) or inner(self, x, p)
    )
    own, h2o = fidelity(model, [Candidate(model), Candidate(model, H2O(Budget(3)))], ids)
    assert asked == ["full", "None", "H2O"] * 2
    for found, policy in ((own, None), (h2o, H2O(Budget(3)))):
        scored = model.score(ids, policy)
        assert torch.allclose(found.log_prob, scored.log_prob, atol=1e-5) and torch.equal(found.slots, scored.slots)
        assert float(found.kld.min()) > -1e-5 and float(found.kld[:, 8:].mean()) > 1e-3
    assert torch.equal(own.base_log_prob, h2o.base_log_prob)
    assert exported.dmc["decision_source"] == "adapter"


def test_what_cannot_be_compared_is_refused(tmp_path: Path, capsys) -> None:
    (tmp_path / "t.txt").write_text("thequick")
    Exported(tmp_path / "key", **CASES["half"])
    families.make("llama3", tmp_path / "plain")
    for name in ("key", "plain"):
        add_tokenizer(tmp_path / name)
    (tmp_path / "latin.txt").write_bytes(b"\xe4\xf6\xfc")
    (tmp_path / "bad.jsonl").write_text('{"text": "the"}\n{"txt": "quick"}\n')
    (tmp_path / "bad.jsonl.gz").write_bytes(gzip.compress(b"{}")[:-9])
    text = ["--data", "t.txt", "--lengths", "4"]
    wrong = {
        "key has given up channels": ["key", *text],
        "plain is a plain model": ["plain", *text],
        "a vocabulary of 61 and": ["key", "--base", "plain", *text],
        "key decides by key channels": ["plain", "--base", "key", *text],
        "no document of {tmp}/t.txt has 511 tokens": ["key", "--base", "plain", "--data", "t.txt"],
        "{tmp}/latin.txt is no UTF-8 text": ["key", "--data", "latin.txt"],
        '{tmp}/bad.jsonl:2 is no JSON of the form {{"text"': ["key", "--data", "bad.jsonl"],
        "{tmp}/bad.jsonl.gz:1: the gzip file is damaged": ["key", "--data", "bad.jsonl.gz"],
        "--heat-map is heads.jpg": ["key", *text, "--heat-map", "heads.jpg"],
        "argument --json: {tmp}/plain cannot be written: Is a directory": ["key", *text, "--json", "plain"],
        "argument --heat-map: /dev/null/x.png cannot": ["key", *text, "--heat-map", "/dev/null/x.png"],
        "nowhere is not a directory": ["nowhere", *text],
        "below 2": ["key", "--data", "t.txt", "--lengths", "1"],
    }
    for message, arguments in wrong.items():
        assert main(["fidelity", *(str(tmp_path / a) if (tmp_path / a).exists() else a for a in arguments)]) == 2
        err = capsys.readouterr().err
        assert message.format(tmp=tmp_path) in err, message
        assert all(err.count(str(tmp_path / name)) <= 1 for name in ("t.txt", "latin.txt", "bad.jsonl")), err
