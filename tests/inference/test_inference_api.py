"""Around the engine: text and stop strings, answers and log-probabilities, the command line, tensor parallelism."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
import types
from pathlib import Path

import pytest
import torch
from helpers.engines import GREEDY, Model, all_back, drain, ids_of
from helpers.exported import VOCABULARY
from helpers.forked import run_ranks
from helpers.processes import run_command

from megatron.dmc import cli
from megatron.dmc.cli import main
from megatron.dmc.inference import LLM, SamplingParams
from megatron.dmc.inference import text as text_module
from megatron.dmc.inference.input_processor import InputProcessor
from megatron.dmc.inference.parallel import TensorParallel
from megatron.dmc.inference.text import Detokenizer, load_tokenizer
from megatron.dmc.serving.prompts import Prompts

tokenizers = pytest.importorskip("tokenizers")
EOS = 60


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return with_tokenizer(Model(tmp_path_factory.mktemp("model") / "m", "half"))


def with_tokenizer(made: Model) -> Model:
    """The model with a byte-level tokenizer of 61 tokens: some ASCII, two bytes, BOS 59 and EOS 60."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from tokenizers.pre_tokenizers import ByteLevel

    alphabet = sorted(ByteLevel.alphabet())
    special = {"<s>": 59, "</s>": EOS}
    plain = [c for c in alphabet if c.isascii()][: 59 - 3] + ["Ã", "¼", "Ġ"]  # 0xC3 0xBC is an umlaut; a space
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(plain)} | special, [], byte_fallback=False))
    assert len(plain) == 59
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 59)])
    tokenizer.save(str(Path(made.path) / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (Path(made.path) / "tokenizer_config.json").write_text(json.dumps(config))
    return made


# --------------------------------------------------------------------------------------------------------------- text


class Bytes:
    """A tokenizer whose tokens are bytes."""

    eos_token_id = 0

    def decode(self, ids: list[int], skip_special_tokens: bool = True, **_: object) -> str:
        return bytes(ids).decode("utf-8", errors="replace")


def feed(text: str, **options) -> tuple[list[str], Detokenizer]:
    made = Detokenizer(Bytes(), b"prompt: ", SamplingParams(**options))
    pieces = []
    for byte in text.encode():
        made.push(byte)
        pieces.append(made.take())
        if made.stopped is not None:
            break
    made.flush()
    return [*pieces, made.take()], made


def test_no_space_is_taken_out_of_a_text() -> None:
    """A tokenizer that says ``clean_up_tokenization_spaces``, as Llama 3's does, and a transformers that follows."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {character: n for n, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    made = Tokenizer(models.BPE(vocabulary, []))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made,
        clean_up_tokenization_spaces=True,
        clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output=True,  # as transformers 4 always does
    )
    text = "x , y . z ! I 'm , do n't ? "
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == "x, y. z! I'm, don't? "  # so it would be
    detokenizer = Detokenizer(tokenizer, [])
    for token in ids:
        detokenizer.push(token)
    detokenizer.flush()
    assert detokenizer.text == text
    processor = InputProcessor(tokenizer, len(vocabulary), 64, None, 1.0, "model")
    prompts = Prompts(processor)
    assert prompts.decode(ids) == text and "".join(prompts.pieces(ids)) == text


def test_text_is_made_in_one_place() -> None:
    """No other module of the engine or the server calls a tokenizer's ``decode``, which may clean text up."""
    package = Path(text_module.__file__).parents[1]
    called = re.compile(r"(tokenizer|_needed\(\))\.(batch_)?decode\(")
    paths = [*package.glob("inference/*.py"), *package.glob("serving/**/*.py")]
    assert [path.name for path in paths if called.search(path.read_text())] == ["text.py"]


@pytest.mark.parametrize("text", ["plain", "Grüße, 世界 🙂!", "e\u0301 x", "a\ufffdb"])
def test_text_comes_whole_and_in_order(text: str) -> None:
    pieces, made = feed(text)
    assert "".join(pieces) == made.text == text
    assert all("\ufffd" not in piece for piece in pieces) or "\ufffd" in text


def test_half_a_character_at_the_end() -> None:
    made = Detokenizer(Bytes(), b"")
    made.push("ü".encode()[0])
    assert made.take() == ""
    made.flush()
    assert made.take() == "\ufffd"


def test_bytes_that_never_become_a_character_do_not_wait_for_ever() -> None:
    made = Detokenizer(Bytes(), b"")
    for _ in range(40):
        made.push(0xFC)
    assert len(made.take()) >= 24


@pytest.mark.parametrize(
    ("stop", "include", "wanted", "met"),
    [
        (["END"], False, "one two ", "END"),
        (["END"], True, "one two END", "END"),
        (["two", "one"], False, "", "one"),
        (["zzz"], False, "one two END three", None),
        (["D t", "END"], False, "one two ", "END"),
        (["e"], False, "on", "e"),
    ],
)
def test_stop_strings(stop: list[str], include: bool, wanted: str, met: str | None) -> None:
    """Nothing of a stop string is ever given out, though it comes in pieces."""
    pieces, made = feed("one two END three", stop=stop, include_stop_str_in_output=include)
    assert "".join(pieces) == made.text == wanted and made.stopped == met
    for n in range(len(pieces)):
        assert wanted.startswith("".join(pieces[:n]))


def test_a_tokenizer_that_is_not_there(model: Model, tmp_path: Path) -> None:
    """A directory may have none; what is no directory, such as a name on a hub, is told."""
    assert load_tokenizer(tmp_path) is None
    with pytest.raises(ValueError, match="org/model is not a directory; name a Hugging Face directory"):
        LLM(model.path, tokenizer="org/model")


def test_generate_with_text(model: Model) -> None:
    tokenizer = load_tokenizer(model.path)
    llm = LLM(model.path)
    prompt = ")*+,"
    result = llm.generate(prompt, SamplingParams(temperature=0, max_tokens=20, ignore_eos=True))[0]
    ids = tokenizer(prompt)["input_ids"]
    assert ids[0] == 59 and result.prompt_token_ids == ids and result.prompt == prompt
    completion = result.outputs[0]
    assert tuple(completion.token_ids) == model.answer(tuple(ids), 20)
    assert completion.text == tokenizer.decode(completion.token_ids, skip_special_tokens=True)
    assert completion.finish_reason == "length"
    # Stopped by a string from the middle of it.
    middle = completion.text[7:9]
    stopped = llm.generate(prompt, SamplingParams(temperature=0, max_tokens=20, ignore_eos=True, stop=middle))[
        0
    ].outputs[0]
    assert stopped.text == completion.text[: completion.text.index(middle)]
    assert (stopped.finish_reason, stopped.stop_reason) == ("stop", middle)
    pieces = [out.text for out in llm.stream(prompt, SamplingParams(temperature=0, max_tokens=20, ignore_eos=True))]
    assert len(pieces) == 20 and "".join(pieces) == completion.text
    all_back(llm.engine)


def test_the_tokenizer_of_an_exported_model_asks_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers would ask on the terminal whether to run the modelling file, which no tokenizer needs."""
    import sentencepiece

    (tmp_path / "text").write_text("\n".join(f"hello world def main({i}): return {i * 7}" for i in range(300)))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"),
        model_prefix=str(tmp_path / "tokenizer"),
        vocab_size=60,
        model_type="bpe",
        hard_vocab_limit=False,
        minloglevel=9,
    )
    made = Model(tmp_path / "m", "half")
    (tmp_path / "tokenizer.model").rename(Path(made.path) / "tokenizer.model")
    (Path(made.path) / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "LlamaTokenizer", "add_bos_token": true}'
    )
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question was asked"))
    llm = LLM(made.path)
    result = llm.generate("hello main", SamplingParams(temperature=0, max_tokens=8))[0]
    assert result.prompt_token_ids[0] == llm.engine.tokenizer.bos_token_id
    assert tuple(result.outputs[0].token_ids) == made.answer(tuple(result.prompt_token_ids), 8)
    pieces = [output.text for output in llm.stream("hello main", SamplingParams(temperature=0, max_tokens=8))]
    whole = llm.engine.tokenizer.decode(
        [*result.prompt_token_ids, *result.outputs[0].token_ids], skip_special_tokens=True
    )
    assert "hello main" + "".join(pieces) == whole


def test_a_broken_tokenizer(model: Model, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="the tokenizer in .* cannot be loaded"):
        LLM(model.path, tokenizer=tmp_path)


# ------------------------------------------------------------------------------------------------------------- answers


def test_the_end_of_a_text(model: Model) -> None:
    """EOS from the tokenizer, stop tokens, ignore_eos, min_tokens."""
    llm = LLM(model.path)
    prompt = model.prompt(30)
    answer = model.answer(prompt)
    stop = answer[5]
    first = answer.index(stop)

    def run(**params) -> tuple:
        c = llm.generate(prompt, SamplingParams(temperature=0, max_tokens=24, **params))[0].outputs[0]
        return len(c.token_ids), c.finish_reason, c.stop_reason

    assert run(stop_token_ids=[stop], ignore_eos=True) == (first + 1, "stop", stop)
    assert run(stop_token_ids=[stop], ignore_eos=True, min_tokens=20)[0] >= 20
    assert run(logit_bias={EOS: 100}) == (1, "stop", None)
    assert run(logit_bias={EOS: 100}, ignore_eos=True) == (24, "length", None)
    assert run(logit_bias={EOS: 100}, min_tokens=3) == (4, "stop", None)


def test_the_window_ends_an_answer(model: Model) -> None:
    llm = LLM(model.path, max_model_len=40)
    result = llm.generate(model.prompt(30), SamplingParams(temperature=0, max_tokens=None, ignore_eos=True))[0].outputs[
        0
    ]
    assert (len(result.token_ids), result.finish_reason) == (10, "length")


def test_answers_with_seeds(model: Model) -> None:
    """n answers differ; with a seed they are the same in any company, and answer i is that of seed + i."""
    llm = LLM(model.path, max_num_seqs=8)
    prompt = model.prompt(20)
    params = SamplingParams(n=3, seed=7, max_tokens=12, ignore_eos=True)
    alone = [c.token_ids for c in llm.generate(prompt, params)[0].outputs]
    noise = SamplingParams(max_tokens=30, ignore_eos=True)
    crowd = llm.generate([model.prompt(9), prompt, model.prompt(50)], [noise, params, noise])
    assert [c.token_ids for c in crowd[1].outputs] == alone and len({tuple(a) for a in alone}) == 3
    single = llm.generate(prompt, SamplingParams(seed=8, max_tokens=12, ignore_eos=True))[0].outputs[0]
    assert single.token_ids == alone[1]


def test_seeds_survive_preemption(model: Model) -> None:
    prompts = [model.prompt(14, seed) for seed in range(4)]
    params = SamplingParams(seed=3, max_tokens=40, ignore_eos=True, presence_penalty=0.5)
    wanted = [r.outputs[0].token_ids for r in LLM(model.path).generate(prompts, params)]
    small = LLM(model.path, num_pages=20)
    assert [r.outputs[0].token_ids for r in small.generate(prompts, params)] == wanted
    assert small.engine.stats().preemptions > 0


@pytest.mark.parametrize("chunk", [512, 5])
def test_prompt_logprobs(model: Model, chunk: int) -> None:
    llm = LLM(model.path, max_num_batched_tokens=chunk, max_num_seqs=2)
    prompt = model.prompt(30)
    result = llm.generate(
        [prompt, prompt], SamplingParams(temperature=0, max_tokens=3, prompt_logprobs=2, logprobs=1, n=1)
    )[1]
    scores = model.logprobs((*prompt, *result.outputs[0].token_ids))
    assert [entry.token for entry in result.prompt_logprobs] == list(prompt[1:])
    for at, entry in enumerate(result.prompt_logprobs):
        assert entry.logprob == pytest.approx(float(scores[at, prompt[at + 1]]), abs=1e-4)
        assert [token for token, _ in entry.top] == scores[at].topk(2).indices.tolist()
    for at, entry in enumerate(result.outputs[0].logprobs):
        assert entry.logprob == pytest.approx(float(scores[29 + at].max()), abs=1e-4) and entry.rank == 1


def test_prompt_logprobs_survive_preemption(model: Model) -> None:
    prompts = [model.prompt(14, seed) for seed in range(4)]
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, prompt_logprobs=0)
    small = LLM(model.path, num_pages=20, max_num_batched_tokens=6, max_num_seqs=4)
    results = small.generate(prompts, params)
    assert small.engine.stats().preemptions > 0
    for prompt, result in zip(prompts, results):
        wanted = model.logprobs(prompt)[range(13), prompt[1:]]
        assert (torch.tensor([entry.logprob for entry in result.prompt_logprobs]) - wanted).abs().max() <= 1e-4


def test_an_interrupted_batch_leaves_nothing(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    llm, steps = LLM(model.path), []
    step = llm.engine.step

    def interrupted():
        steps.append(step())
        if len(steps) == 4:
            raise KeyboardInterrupt
        return steps[-1]

    monkeypatch.setattr(llm.engine, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.generate([model.prompt(20), model.prompt(30)], GREEDY)
    all_back(llm.engine)
    assert tuple(llm.generate(model.prompt(20), GREEDY)[0].outputs[0].token_ids) == model.answer(model.prompt(20))


def test_one_parameter_set_for_each_prompt(model: Model) -> None:
    with pytest.raises(ValueError, match="2 prompts and 1 sampling parameters"):
        LLM(model.path).generate([[1], [2]], [GREEDY])


def test_stream_that_is_left_gives_its_pages_back(model: Model) -> None:
    llm = LLM(model.path)
    for output in llm.stream(model.prompt(30), GREEDY):
        assert not output.finished
        break
    all_back(llm.engine)


# -------------------------------------------------------------------------------------------------------- command line


def test_dmc_generate(model: Model, capsys: pytest.CaptureFixture[str]) -> None:
    prompt = ",".join(map(str, model.prompt(30)))
    assert main(["generate", model.path, "--prompt-ids", prompt, "--max-tokens", "9", "--ignore-eos", "--stats"]) == 0
    out = capsys.readouterr().out
    assert "38 tokens; slots and CR by layer and KV head" in out and "30 prompt + 9 new tokens" in out
    whole = (
        LLM(model.path)
        .generate(model.prompt(30), SamplingParams(temperature=0, max_tokens=9, ignore_eos=True))[0]
        .outputs[0]
    )
    assert whole.text in out
    assert main(["generate", model.path, "--prompt", "+,-", "--stream", "--max-tokens", "5"]) == 0
    assert capsys.readouterr().out.startswith("+,-")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "error: there is no prompt"),
        (["--prompt", "+", "--top-p", "2"], "error: top_p is 2.0; it must be a number above 0 and at most 1"),
        (["--prompt", "+", "--prompt", "-", "--stream"], "error: --stream shows one completion"),
        (["--prompt-ids", "1,99"], "error: token 1 of the prompt is 99"),
        (["--prompt-ids", "1", "--max-model-len", "10000"], "error: max_model_len is 10000"),
    ],
)
def test_dmc_generate_says_what_is_wrong(options: list[str], message: str, model: Model, capsys) -> None:
    assert main(["generate", model.path, *options]) == 2
    err = capsys.readouterr().err
    assert err.startswith(message) and err.count("\n") == 1


def test_a_command_is_a_module_and_an_entry(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hello = types.ModuleType("megatron.dmc.cli.hello")
    hello.main = lambda argv: print("hello", *argv) or 0
    monkeypatch.setitem(sys.modules, hello.__name__, hello)
    monkeypatch.setitem(cli.COMMANDS, "hello", "says hello")
    assert main(["hello", "you"]) == 0
    assert capsys.readouterr().out == "hello you\n"
    assert main(["unknown"]) == 2


def test_the_command_needs_no_megatron_core(model: Model) -> None:
    code = (
        "import sys; from megatron.dmc.cli import main; "
        f"status = main(['generate', {model.path!r}, '--prompt-ids', '1,2', '--max-tokens', '2']); "
        "assert not [m for m in sys.modules if m.startswith('megatron.core')]; sys.exit(status)"
    )
    run_command([sys.executable, "-c", code])


# -------------------------------------------------------------------------------------------------- tensor parallelism


@pytest.mark.slow
@pytest.mark.parametrize(("pages", "ahead"), [(None, False), (8, False), (8, True)])
def test_two_ranks_say_the_same(pages: int | None, ahead: bool, model: Model, tmp_path: Path) -> None:
    """Ranks hold one KV head of each layer, which merge differently; with few pages the tighter rank rules, also over
    what the prefix cache keeps, and over steps that are scheduled ahead.
    """
    two_ranks(model, pages, tmp_path, async_scheduling=ahead)


@pytest.mark.slow
def test_two_ranks_evict_the_same(tmp_path: Path) -> None:
    """Each rank has the rows of the adapters for its KV head. (tests/evicting has the other sources of decisions.)"""
    two_ranks(with_tokenizer(Model(tmp_path / "model", "adapter")), 12, tmp_path)


def two_ranks(model: Model, pages: int | None, tmp_path: Path, **more: object) -> None:
    """Two ranks, and one that has all heads: the same tokens, slots and log-probabilities."""
    prompts = [list(model.prompt(n, seed)) for seed, n in enumerate((14, 40, 3, 17))]
    settings = {"max_num_batched_tokens": 24, "max_num_seqs": 3, "prefix_cache_min_tokens": 8, **more}
    settings |= {"num_pages": pages} if pages else {}
    arguments = (model.path, json.dumps(prompts), 2, json.dumps(settings))
    said = run_ranks(Path(__file__).with_name("engine_worker.py"), 2, arguments, tmp_path)
    line = next(line for line in said.splitlines() if line.startswith("ANSWERS "))
    first, second = json.loads(line.removeprefix("ANSWERS "))
    assert first == second and first["free"]
    if importlib.util.find_spec("llguidance"):
        texts = [text for texts in first["structured"] for text in texts]
        assert len(texts) == 2 * len(prompts) and all(re.fullmatch("[0-9]{3,8}[A-F]", text) for text in texts)
    one = LLM(model.path)
    for prompt, got, scores, slots in zip(prompts, first["tokens"], first["logprobs"], first["slots"]):
        whole = one.generate(prompt, SamplingParams(temperature=0, max_tokens=24, logprobs=0))[0].outputs[0]
        assert got == whole.token_ids and slots == [list(layer) for layer in whole.cache.slots]
        assert max(abs(a - b.logprob) for a, b in zip(scores, whole.logprobs)) <= 1e-4
    assert bool(first["preemptions"]) == bool(pages)
    plain = LLM(model.path, enable_prefix_caching=False)
    for prompt, answers in zip(first["longer"], first["again"]):
        assert answers == 2 * [
            plain.generate(prompt, SamplingParams(temperature=0, max_tokens=24))[0].outputs[0].token_ids
        ]
    assert first["hits"] > sum(first["cached"]) > 0


def test_more_ranks_than_heads_are_refused(model: Model) -> None:
    engine = LLM(model.path).engine
    with pytest.raises(ValueError, match="tensor parallelism 4 does not divide num_key_value_heads 2"):
        TensorParallel(0, 4).check(engine.info.model)


def test_engine_outputs_of_many_requests(model: Model) -> None:
    """The step API: outputs are named, one token each, and the last one has cache and times."""
    engine = model.engine(max_num_seqs=3)
    for name in "abcd":
        engine.add_request(
            name, model.prompt(10 + ord(name) % 7), SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
        )
    found = drain(engine)
    assert {name for name, _ in found} == set("abcd")
    for (name, index), outputs in found.items():
        assert index == 0 and [len(o.tokens) for o in outputs] == [1] * 5
        assert ids_of(outputs) == model.answer(model.prompt(10 + ord(name) % 7), 5)
        last = outputs[-1]
        assert last.finished and not any(o.finished for o in outputs[:-1])
        assert last.timing.queued <= last.timing.first_token <= last.timing.total
        assert last.cache.tokens == 14 + ord(name) % 7 and VOCABULARY > last.cache.compression_ratio > 1
