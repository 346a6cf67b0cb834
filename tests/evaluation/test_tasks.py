"""Tasks: what they ask is what they say, and a model that can look back solves them while one that cannot does not."""

from __future__ import annotations

import json
import math
import random
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import families, lm_eval_tasks
from helpers.serving import make_model
from torch import Tensor

from megatron.dmc.cli.eval import main
from megatron.dmc.evaluation import recall as suite
from megatron.dmc.evaluation import recall_data
from megatron.dmc.evaluation.policies import H2O, Budget, FullCache, StreamingLLM
from megatron.dmc.evaluation.recall import SUITE, IdMaterial, Material, Sample, TextMaterial
from megatron.dmc.evaluation.tasks import Figure, identifiers, perplexity_by_position, repeated_identifiers, windows
from megatron.dmc.evaluation.teacher_forced import Scored, TeacherForced
from megatron.dmc.training.tokenizer import load_tokenizer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent / "examples/dmc"))


class Characters:
    """One id per character: its code."""

    def encode(self, text: str) -> list[int]:
        return [ord(c) for c in text]

    def decode(self, ids) -> str:
        return "".join(map(chr, ids))


class Bytes(Characters):
    """One id per byte of UTF-8: characters in pieces."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids) -> str:
        return bytes(ids).decode(errors="replace")


class Induction:
    """A model in name: it gives the token after the latest place where the last tokens (four at most) stood before, if
    that is at most ``reach`` tokens back.
    """

    def __init__(self, reach: int = 10**9) -> None:
        self.reach = reach

    def predict(self, ids: list[int]) -> int:
        ids = ids[-self.reach :]
        for n in range(4, 0, -1):
            for at in range(len(ids) - n - 1, -1, -1):
                if ids[at : at + n] == ids[-n:]:
                    return ids[at + n]
        return -1

    def score(self, tokens: Tensor, policy=None, batch: int = 8) -> Scored:
        rows = [[self.predict(ids[: t + 1]) == ids[t + 1] for t in range(len(ids) - 1)] for ids in tokens.tolist()]
        correct = torch.tensor(rows)
        return Scored(
            torch.where(correct, 0.0, -5.0), correct, torch.ones(1, len(rows), 1, tokens.size(1), dtype=torch.int32)
        )


@pytest.fixture(scope="module")
def text_material(tmp_path_factory) -> TextMaterial:
    import build_corpus

    from megatron.dmc.training.tokenizer import load_tokenizer

    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    texts = [Path(random.__file__).read_text()]
    build_corpus.train_tokenizer(texts, 512, path)
    tokenizer = load_tokenizer(path)
    return TextMaterial(tokenizer, [tokenizer.encode(text) for text in texts])


@pytest.fixture(params=["ids", "text"])
def material(request) -> Material:
    return IdMaterial(range(200)) if request.param == "ids" else request.getfixturevalue("text_material")


def find(ids: list[int], piece: list[int]) -> list[int]:
    return [at for at in range(len(ids)) if ids[at : at + len(piece)] == piece]


@pytest.mark.parametrize("task", SUITE)
def test_samples_are_what_they_say(material, task) -> None:
    length = 300
    for depth in (0.0, 0.5, 1.0):
        rows, graded = suite.samples_of(task, material, length, depth, 5, seed=1)
        assert rows.shape == (5, length) and torch.equal(
            rows, suite.samples_of(task, material, length, depth, 5, seed=1)[0]
        )
        assert not torch.equal(rows, suite.samples_of(task, material, length, depth, 5, seed=2)[0])
        rng = random.Random(f"{task} {length} {depth} 1")
        for row in rows.tolist():
            sample = SUITE[task](material, rng)
            assert row == suite.place(sample, material, length, depth, rng)
            tail = [*sample.question, *sample.answer]
            assert row[-len(tail) :] == tail and len(sample.answer) == len(graded)
            haystack = row[: -len(tail)]
            places = [find(haystack, piece) for piece in sample.pieces]
            assert all(places)
            room = length - len(tail) - sum(map(len, sample.pieces))
            first = places[0][0] - sum(len(p) for p, at in zip(sample.pieces[1:], places[1:]) if at[0] < places[0][0])
            assert first == round(depth * room)
            if sample.ordered:
                assert [at[0] for at in places] == sorted(at[0] for at in places)


def test_tracking_goes_back_along_the_chain() -> None:
    material = IdMaterial(range(100))
    sample = suite.variable_tracking(material, random.Random(0), hops=2)
    x1, x2, x3 = (piece[1:3] for piece in sample.pieces)
    value = sample.pieces[0][4:6]
    assert [piece[4:6] for piece in sample.pieces] == [value, x1, x2]
    assert sample.question == [0, *x3, 1] and sample.answer == [*x2, 1, *x1, 1, *value]
    assert [i for i, counts in enumerate(sample.graded) if not counts] == [2, 5]


@pytest.mark.parametrize("task", SUITE)
def test_looking_back_solves_them_and_a_window_does_not(material, task) -> None:
    found = suite.recall(Induction(), None, material, tasks=[task], lengths=[200, 260], depths=[0.0, 1.0], samples=4)[
        task
    ]
    values = {(f.task, f.where): f for f in found.figures}
    for length in (200, 260):
        for where, n in ((f"{length} tokens", 8), (f"{length} tokens, depth 0", 4), (f"{length} tokens, depth 1", 4)):
            assert values[f"{task}, exact", where].value == values[f"{task}, tokens", where].value == 1.0
            assert values[f"{task}, exact", where].n == n and values[f"{task}, loss", where].value == 0.0
    short = suite.recall(Induction(reach=100), None, material, tasks=[task], lengths=[260], depths=[0.0], samples=4)[
        task
    ]
    assert short.figures[0].value == 0.0 and short.figures[0].task == f"{task}, exact"
    if task in ("needle", "copying"):  # at the end of the haystack it is in reach
        near = suite.recall(Induction(reach=100), None, material, tasks=[task], lengths=[260], depths=[1.0], samples=4)[
            task
        ]
        assert near.figures[0].value == 1.0


def test_recall_refuses() -> None:
    material = IdMaterial(range(100))
    wrong = {"unknown task": dict(tasks=["x"]), "depth 2": dict(depths=[2.0]), "too short": dict(lengths=[20])}
    for message, change in wrong.items():
        with pytest.raises(ValueError, match=message):
            suite.recall(Induction(), None, material, **{"lengths": [100], "samples": 1, **change})
    with pytest.raises(ValueError, match="too few"):
        IdMaterial([1] * 100)
    with pytest.raises(ValueError, match="no text"):
        TextMaterial(Characters(), [[]])


def test_repeated_identifiers_are_found_with_their_gaps() -> None:
    text = "alpha = beta\nif alpha: x = alpha + betas; for_ = if_ beta(alpha"
    for tokenizer in (Characters(), Bytes()):
        found = repeated_identifiers(torch.tensor([tokenizer.encode(text)]), tokenizer)
        names = [(tokenizer.decode(tokenizer.encode(text)[o.first : o.last + 1]), o.gap) for o in found]
        assert names == [("alpha", 11), ("alpha", 6), ("beta", 41), ("alpha", 26)]
    # Characters of several tokens: the name is all of its tokens, and nothing else.
    tokenizer, text = Bytes(), "größe é größe"
    (o,) = repeated_identifiers(torch.tensor([tokenizer.encode(text)]), tokenizer)
    assert tokenizer.decode(tokenizer.encode(text)[o.first : o.last + 1]) == "größe" and o.gap == len(" é ".encode())


def test_identifiers_are_right_in_full_or_not() -> None:
    tokenizer = Characters()
    near, far = "abc abd abc ", "name" + "." * 40 + "name"
    tokens = torch.tensor([tokenizer.encode(row.ljust(60, "-")) for row in (near, far, "once")])

    class Given:
        def score(self, tokens, policy, batch):
            correct = torch.ones(3, 59, dtype=torch.bool)
            correct[0, 9] = False  # the b of the second abc
            return Scored(correct.float(), correct, torch.ones(1, 3, 1, 60, dtype=torch.int32))

    figures = {f.where: f for f in identifiers(Given(), None, tokens, tokenizer, gaps=(0, 32)).figures}
    assert figures["gap >= 0"].value == 0.0 and figures["gap >= 0"].n == 1 and math.isnan(figures["gap >= 0"].stderr)
    assert figures["gap >= 32"].value == 1.0
    assert figures["all"].value == 0.5 and figures["all"].n == 2 and figures["all"].stderr == pytest.approx(0.5)
    with pytest.raises(ValueError, match="comes twice"):
        identifiers(Given(), None, tokens[2:], tokenizer)


def test_windows_stay_inside_documents() -> None:
    assert windows([[1, 2, 3, 4, 5], [6], [7, 8]], 2).tolist() == [[1, 2], [3, 4], [7, 8]]
    assert windows([[1, 2, 3, 4]], 2, most=1).tolist() == [[1, 2]]
    with pytest.raises(ValueError, match="no document of some.jsonl has 9"):
        windows([[1, 2]], 9, path="some.jsonl")


def test_standard_error_of_the_mean() -> None:
    figure = Figure.mean("t", "all", torch.tensor([1.0, 0.0, 1.0, 1.0]))
    assert figure.value == 0.75 and figure.n == 4 and figure.stderr == pytest.approx(0.25)


def test_tasks_on_a_model(tmp_path) -> None:
    """The whole way, with a policy that matters."""
    families.make("llama3", tmp_path / "model")
    model = TeacherForced.load(tmp_path / "model")
    tokens = torch.randint(131, (6, 100), generator=torch.Generator().manual_seed(0))
    result = perplexity_by_position(model, FullCache(), tokens)
    by_range = {f.where: f for f in result.figures}
    assert list(by_range) == ["all", "1-1", "2-3", "4-7", "8-15", "16-31", "32-63", "64-99"]
    loss = -model.score(tokens).log_prob.double()
    assert by_range["all"].value == pytest.approx(float(loss.mean())) and by_range["all"].n == 6
    assert by_range["64-99"].value == pytest.approx(float(loss[:, 63:99].mean()))
    assert by_range["64-99"].stderr == pytest.approx(float(loss[:, 63:99].mean(dim=1).std() / 6**0.5))
    evicted = perplexity_by_position(model, StreamingLLM(Budget(4, "growing")), tokens, edges=[1, 8, 100])
    whole = perplexity_by_position(model, FullCache(), tokens, edges=[1, 8, 100])
    assert evicted.figures[1].value == pytest.approx(whole.figures[1].value)  # nothing is dropped yet
    assert evicted.figures[2].value != pytest.approx(whole.figures[2].value)
    assert result.compression.at_end == 1 and evicted.compression.at_end == 4
    for edges in ([1, 200], [5, 5], [3], [0, 5]):
        with pytest.raises(ValueError, match="edges"):
            perplexity_by_position(model, None, tokens, edges)
    found = suite.recall(model, H2O(Budget(4)), IdMaterial(range(131)), lengths=[100, 120], depths=[0.5], samples=3)
    assert set(found) == set(SUITE)
    assert all(len(r.figures) == 12 and r.compression.at_end == 4 for r in found.values())


# Text that teaches it


def test_documents_that_teach_recall_ask_what_can_be_told(material, monkeypatch) -> None:
    """Every question of the suite's samples stands in the document with its answer, and its pieces stand before it."""
    made: list[Sample] = []

    def noting(make):
        def noted(material, rng):
            made.append(make(material, rng))
            return made[-1]

        return noted

    for name, make in list(SUITE.items()):
        monkeypatch.setitem(SUITE, name, noting(make))
    rng = random.Random(3)
    for _ in range(10):
        made.clear()
        ids = recall_data.document(material, 400, rng)
        assert made and len(ids) <= 400 + 200
        for sample in made:
            asked = [*sample.question, *sample.answer]
            at = max(i for i in range(len(ids)) if ids[i : i + len(asked)] == asked)
            for piece in sample.pieces:
                assert any(ids[i : i + len(piece)] == piece for i in range(at))


def test_repeats_are_mostly_what_stood_before() -> None:
    rng = random.Random(1)
    for length in (20, 128, 512):
        shares = []
        for _ in range(50):
            ids = recall_data.repeats(range(300, 2000), length, rng)
            assert len(ids) == length and min(ids) >= 300
            pairs = list(zip(ids, ids[1:]))
            shares.append(sum(pair in pairs[:i] for i, pair in enumerate(pairs)) / len(pairs))
        assert sum(shares) / len(shares) > 0.4, length


def test_recall_data_is_a_dataset_that_training_takes(tmp_path, text_material, capsys) -> None:
    import numpy
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    from megatron.dmc.training.data import Sidecar

    tokenizer = text_material.tokenizer
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": Path(random.__file__).read_text()}) + "\n")
    arguments = ["--tokenizer", str(tokenizer.path), "--corpus", str(tmp_path / "text.jsonl"), "--tokens", "3000"]
    assert main(["recall-data", *arguments, "--longest", "128", "--output-prefix", str(tmp_path / "a")]) == 0
    sidecar = Sidecar.read(tmp_path / "a")
    documents = [numpy.array(document) for document in IndexedDataset(str(tmp_path / "a"))]
    assert sidecar.tokens == sum(map(len, documents)) >= 3000 and sidecar.tokenizer_fingerprint == tokenizer.fingerprint
    assert all(document[-1] == tokenizer.eod_id and document.max() < tokenizer.vocab_size for document in documents)
    assert main(["recall-data", *arguments, "--longest", "64", "--output-prefix", str(tmp_path / "b")]) == 2
    assert "error: documents of at most 64" in capsys.readouterr().err and not list(tmp_path.glob("b*"))
    for line in ('{"text": 5}', '{"words": "a"}', "[1]", "no JSON"):
        (tmp_path / "text.jsonl").write_text('{"text": "a"}\n' + line + "\n")
        assert main(["recall-data", *arguments, "--output-prefix", str(tmp_path / "c")]) == 2, line
        assert f"error: {tmp_path}/text.jsonl:2 is no JSON of the form" in capsys.readouterr().err


# lm-eval


class ScoresPairs:
    """A model in name: a token's log-probability depends on it and on the one before."""

    def __init__(self, longest: int = 1000) -> None:
        self.info = SimpleNamespace(model=SimpleNamespace(max_position_embeddings=longest))
        self.seen: list[int] = []

    def score_next(self, tokens: Tensor, labels: Tensor, policy=None, batch: int = 8) -> Scored:
        self.seen += [tokens.size(1)] * len(tokens)
        log_prob = -(tokens * 3 + labels).float() / 100
        return Scored(log_prob, labels % 2 == 0, torch.ones(1, len(tokens), 1, tokens.size(1), dtype=torch.int32))


@pytest.mark.slow
def test_lm_eval_under_a_policy(tmp_path, monkeypatch) -> None:
    pytest.importorskip("lm_eval", reason="needs lm-eval (the extra dev)")
    from megatron.dmc.evaluation.harness import PolicyLM, evaluate

    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    text = Characters()
    text.eod_id, text.bos_id, text.adds_bos, text.decode = 0, None, False, lambda ids: ""
    model = ScoresPairs()
    lm = PolicyLM(model, None, text)
    pairs = lambda ids: -sum(3 * a + b for a, b in zip(ids, ids[1:])) / 100
    found = lm.loglikelihood([SimpleNamespace(args=pair) for pair in (("ab", "cd"), ("a", "zz"), ("", "b"))])
    assert [value for value, _ in found] == pytest.approx([pairs([98, 99, 100]), pairs([97, 122, 122]), pairs([0, 98])])
    assert [greedy for _, greedy in found] == [False, True, True]
    # Windows: every token counts once, the first of all behind the end-of-text token.
    short = PolicyLM(ScoresPairs(8), None, text)
    (rolled,) = short.loglikelihood_rolling([SimpleNamespace(args=("abcdefghijklmnopqrst",))])
    assert rolled == pytest.approx(pairs([0, *map(ord, "abcdefghijklmnopqrst")])) and max(short.model.seen) <= 8
    with pytest.raises(ValueError, match="generate"):
        lm.generate_until([])
    rows = [{"question": "q", "choices": ["a", "zz"], "answer": n % 2} for n in range(6)]  # "a" is always the likelier
    (tmp_path / "data.json").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "choice.yaml").write_text(lm_eval_tasks.CHOICE.format(data=tmp_path / "data.json"))
    (figure,) = evaluate(lm, ["local_choice"], str(tmp_path))
    assert (figure.task, figure.where, figure.value, figure.n) == ("lm-eval local_choice", "acc", 0.5, 6)
    with pytest.raises(ValueError, match="knows no task 'nothing'"):
        evaluate(lm, ["nothing"])


@pytest.mark.slow
def test_lm_eval_gives_what_its_own_hf_model_gives(tmp_path) -> None:
    """On an exported DMC model: BOS or not, texts that hold it, requests and windows longer than the context."""
    pytest.importorskip("lm_eval", reason="needs lm-eval (the extra dev)")
    pytest.importorskip("accelerate", reason="needs accelerate (the extra dev)")
    from lm_eval.models.huggingface import HFLM

    from megatron.dmc.evaluation.harness import PolicyLM

    path = tmp_path / "model"
    make_model(path)
    model, tokenizer = TeacherForced.load(path), load_tokenizer(path)
    assert tokenizer.adds_bos
    longest = model.info.model.max_position_embeddings
    rng, letters = random.Random(1), "abcdefghij ?!"
    text = lambda n: "".join(rng.choices(letters, k=n))
    pairs = [("", "ab c"), ("", "<s>x"), ("a b ", "c"), ("<s>ab", "cd"), (text(5), text(9)), (text(30), text(3))]
    pairs += [(text(longest - 3), text(n)) for n in (2, 3, 4, 9)]
    texts = [text(4), "<s>" + text(8), *(text(n) for n in (longest - 1, longest, longest + 1, 2 * longest + 5))]
    requests = lambda rows: [SimpleNamespace(args=row) for row in rows]
    found = {}
    for adds in (None, False):
        ours = PolicyLM(model, None, tokenizer, 4, add_bos_token=adds)
        theirs = HFLM(
            str(path), dtype="float32", device="cpu", batch_size=4, trust_remote_code=True, add_bos_token=adds
        )
        assert ours.prefix_token_id == theirs.prefix_token_id and ours.longest == theirs.max_length
        assert [ours.tok_encode(t) for t in texts] == [theirs.tok_encode(t) for t in texts]
        found[adds] = ours.loglikelihood(requests(pairs), disable_tqdm=True)
        expected = theirs.loglikelihood(requests(pairs), disable_tqdm=True)
        assert [greedy for _, greedy in found[adds]] == [greedy for _, greedy in expected]
        values = [value for value, _ in found[adds]]
        assert values == pytest.approx([value for value, _ in expected], abs=1e-5)
        rolled = ours.loglikelihood_rolling(requests([(t,) for t in texts]), disable_tqdm=True)
        wanted = theirs.loglikelihood_rolling(requests([(t,) for t in texts]), disable_tqdm=True)
        assert rolled == pytest.approx(wanted, rel=1e-6, abs=1e-5)
    assert found[None][4][0] != pytest.approx(found[False][4][0], abs=1e-2)
    said = PolicyLM(model, None, tokenizer, 4, add_bos_token=True)
    assert said.loglikelihood(requests(pairs), disable_tqdm=True) == found[None]
    tokenizer.bos_id = None
    with pytest.raises(ValueError, match="has no BOS token"):
        PolicyLM(model, None, tokenizer, add_bos_token=True)
