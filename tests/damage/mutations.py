"""Seeded mutations of the JSON files that a model, a checkpoint or a dataset has, and the commands that read them.

A mutation must end in one line on stderr and status 2 within seconds, or be harmless: the command then does what it did
before, or reads a value of the same type as a value (a model with another ``rope_theta`` is another model).
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import io
import json
import random
import shutil
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import yaml
from helpers import exported, families, tiny
from helpers.exported import Exported

from megatron.dmc import cli

HF_FILES = ("config.json", "shards.json")
DEFAULTED = (
    "rope_theta rope_scaling rope_parameters max_position_embeddings tie_word_embeddings rms_norm_eps head_dim "
    "temperature top_p top_k max_new_tokens do_sample eos_token_id"
).split()
"""Keys that have defaults, of config.json and of generation_config.json: without one a file is another model's."""
SHOWN = ("source", "versions")
"""Keys of a manifest that are shown and no more: where a checkpoint came from, and with what."""
NULLABLE = (*DEFAULTED, "source")
"""Keys at which null is a value that training writes (a run from random weights has no source), or the default."""
SECONDS = 5.0
"""Time that a mutated file may take to be refused."""
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 3, 2.5, 10**9, 10**13, -(10**13), 10**30, 1e300, -0.0, 1e-300),
    *(float("nan"), float("inf"), float("-inf"), "", "x", "llama", "a\nb", "x" * 100_000, "../../x", "\ud800"),
    *(
        [],
        [[]],
        [[1]],
        [None],
        ["x"],
        [1, 2, 3],
        list(range(20_000)),
        {},
        {"a": 1},
        {"": None},
        {"x": {"y": {"z": []}}},
    ),
)
"""Values that a field is replaced by."""
BYTES: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "empty": lambda data, rng: b"",
    "cut": lambda data, rng: data[: rng.randrange(len(data))],
    "not UTF-8": lambda data, rng: data[: len(data) // 2] + b"\xff\xfe" + data[len(data) // 2 :],
    "another bracket": lambda data, rng: data.replace(b"{", b"[", 1),
    "nested 100,000 times": lambda data, rng: b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "an integer of 10,000 digits": lambda data, rng: data.replace(b":", b": " + b"9" * 10_000 + b', "x":', 1),
    "a list": lambda data, rng: b"[" + data + b"]",
    "null": lambda data, rng: b"null",
}


@dataclass(frozen=True)
class Mutation:
    """Content of a file after one change."""

    what: str
    data: bytes
    same_type: bool
    """A value was replaced by another one of its type, or by its default."""


def replaced(data: bytes, path: str, value: Any) -> Mutation:
    """One change, of the value at a dotted ``path``."""
    document = json.loads(data)
    place = document
    *folders, key = path.split(".")
    for folder in folders:
        place = place[folder]
    place[key] = value
    return _mutation(f"{path} = {json.dumps(value)[:60]}", document, False)


def mutations(data: bytes, rng: random.Random) -> Iterator[Mutation]:
    """Changes of a JSON file, without end: mostly of a value, else of a key or of the bytes."""
    document = yaml.safe_load(data) if data[:1] != b"{" else json.loads(data)
    while True:
        kind = rng.random()
        if kind < 0.1:
            name = rng.choice(list(BYTES))
            yield Mutation(name, BYTES[name](data, rng), False)
            continue
        changed = copy.deepcopy(document)
        place, key, where = _choose(changed, rng)
        if kind < 0.2:
            del place[key]
            harmless = key in (*DEFAULTED, *SHOWN) or where.startswith("versions.")
            yield _mutation(f"{where} is missing", changed, harmless)
        elif kind < 0.25 and isinstance(place, dict):
            place[rng.choice(("", "unknown", "a\nb"))] = place.pop(key)
            yield _mutation(f"{where} has another key", changed, key in DEFAULTED)
        else:
            before, place[key] = place[key], rng.choice(VALUES)
            same = _type(before) == _type(place[key]) or (place[key] is None and key in NULLABLE)
            same |= key == "eos_token_id" and place[key] in (-1, 1, 3)  # one id in place of a list
            yield _mutation(f"{where} = {json.dumps(place[key])[:60]}", changed, same)


def _choose(document: Any, rng: random.Random) -> tuple[Any, Any, str]:
    """A place in a document: (container, key, dotted name). Outer ones are as likely as all inside of them."""
    place, key, where = document, rng.choice(list(document)), []
    while True:
        where.append(str(key))
        inner = place[key]
        if not isinstance(inner, (dict, list)) or not inner or rng.random() < 0.5:
            return place, key, ".".join(where)[:80]
        place, key = inner, rng.choice(list(inner) if isinstance(inner, dict) else range(len(inner)))


def _type(value: Any) -> type:
    return float if type(value) is int else type(value)


def _mutation(what: str, document: Any, same_type: bool) -> Mutation:
    return Mutation(what, json.dumps(document, indent=1).encode("utf-8", "surrogatepass"), same_type)


# -------------------------------------------------------------------------------------------------------- the commands


class _Ready(Exception):
    """Megatron would be initialized now: all files were read."""


def _stop(config: Any, *_: object) -> None:
    raise _Ready(json.dumps(config.to_dict(), sort_keys=True))


def _stop_serving(engine: Any, settings: Any, http: Any, prompt_settings: Any, *_: object) -> None:
    raise _Ready(f"{engine.info} {prompt_settings.default_sampling_params}")


@dataclass
class Outcome:
    """What a command did."""

    status: Any
    """Exit status, or the traceback."""
    error: str
    result: str
    """Digest of what it printed or wrote."""
    seconds: float

    def fault(self, before: Outcome, mutation: Mutation) -> str:
        """What is wrong with it; empty when nothing is."""
        if self.seconds > SECONDS:
            return f"took {self.seconds:.1f} s"
        if self.status == 2:
            lines = self.error.strip().splitlines()
            alright = len(lines) == 1 and lines[0].startswith("error: ") and len(lines[0]) < 1000
            return "" if alright else f"{len(lines)} lines of {len(self.error)} characters: {self.error[:300]}"
        if self.status != 0:
            return f"ended with {self.status}"
        return "" if mutation.same_type or self.result == before.result else "taken, with another result"


def run(argv: Sequence[object], out: Path) -> Outcome:
    """Run a command in this process, up to the point where Megatron would start or a server has loaded its model.
    ``out`` is removed.
    """
    stdout, stderr, began = io.StringIO(), io.StringIO(), time.monotonic()
    status: Any
    with (
        contextlib.redirect_stdout(stdout),
        contextlib.redirect_stderr(stderr),
        mock.patch("megatron.dmc.training.initialize.initialize", _stop),
        mock.patch("megatron.dmc.serving.server.serve", _stop_serving),
    ):
        try:
            status = cli.main([str(arg) for arg in argv])
        except _Ready as ready:
            status = 0
            stdout.write(str(ready))
        except SystemExit as end:
            status = end.code
        except BaseException:
            status = traceback.format_exc(limit=-3)
    seconds = time.monotonic() - began
    digest = hashlib.sha256(b"" if out.exists() else stdout.getvalue().encode("utf-8", "replace"))
    for path in sorted(path for path in out.rglob("*") if path.is_file()):
        if path.name not in ("manifest.json", "README.md", "shards.json"):  # these have paths, dates and layouts
            digest.update(path.read_bytes() if path.suffix != ".json" else b"")
    shutil.rmtree(out, ignore_errors=True)
    return Outcome(status, stderr.getvalue(), digest.hexdigest(), seconds)


@dataclass(frozen=True)
class Target:
    """A file to damage, and the commands that read it. ``{out}`` in a command is a directory that it writes."""

    file: Path
    commands: tuple[tuple[object, ...], ...]

    def check(self, mutation: Mutation, before: list[Outcome], out: Path) -> list[str]:
        """Faults of all commands on the mutated file, which is restored."""
        original, faults = self.file.read_bytes(), []
        self.file.write_bytes(mutation.data)
        try:
            for command, outcome in zip(self.commands, before, strict=True):
                fault = self.run(command, out).fault(outcome, mutation)
                if fault:
                    faults.append(f"{self.file.name}: {mutation.what}: {' '.join(map(str, command[:2]))}: {fault}")
        finally:
            self.file.write_bytes(original)
        return faults

    def before(self, out: Path) -> list[Outcome]:
        """Outcomes without a mutation. Raises ``AssertionError`` when there is a failure among them."""
        found = [self.run(command, out) for command in self.commands]
        for command, outcome in zip(self.commands, found, strict=True):
            assert outcome.status == 0, f"{command}: {outcome.status} {outcome.error}"
        return found

    @staticmethod
    def run(command: Sequence[object], out: Path) -> Outcome:
        return run([str(arg).replace("{out}", str(out)) for arg in command], out)


_SMALL = ("--max-num-seqs", 2, "--kv-cache-memory-bytes", 4_000_000)


def _generate(directory: Path, prompt: Sequence[str]) -> tuple[object, ...]:
    return ("generate", directory, *prompt, "--max-tokens", 4, *_SMALL)


def _import(directory: Path) -> tuple[object, ...]:
    return ("convert", "import", "--hf", directory, "--save", "{out}")


def model_targets(directory: Path) -> list[Target]:
    """A plain directory in shards, with a tokenizer, and one exported with a ``dmc`` block."""
    plain, dmc = directory / "plain", directory / "dmc"
    families.make("llama3.1", plain, shard="60KB")
    _tokenizer(plain)
    sampling = {"bos_token_id": 0, "eos_token_id": [1, 5], "do_sample": True, "temperature": 0.6, "top_p": 0.9}
    (plain / "generation_config.json").write_text(json.dumps({**sampling, "top_k": 50, "max_new_tokens": 64}))
    Exported(dmc, **exported.CASES["half"])
    serve = ("serve", plain, "--host", "127.0.0.1", "--port", 0, "--log-level", "error", *_SMALL)
    of_plain = (_import(plain), _generate(plain, ("--prompt", "a b")), ("convert", "inspect", plain), serve)
    of_dmc = (_import(dmc), _generate(dmc, ("--prompt-ids", "1,2,3")), ("convert", "inspect", dmc))
    text = (_generate(plain, ("--prompt", "a b")), serve)
    names = ("config.json", "generation_config.json", "model.safetensors.index.json")
    return [
        Target(dmc / "config.json", of_dmc),
        *(Target(plain / name, of_plain) for name in names),
        *(Target(plain / name, text) for name in ("tokenizer_config.json", "special_tokens_map.json")),
    ]


def _tokenizer(directory: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[:100]
    vocabulary = {token: n for n, token in enumerate(["<s>", "</s>", *alphabet])}
    made = Tokenizer(models.BPE(vocabulary, []))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.add_special_tokens(["<s>", "</s>"])
    made.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": False,
        "added_tokens_decoder": {"0": {"content": "<s>", "special": True}, "1": {"content": "</s>", "special": True}},
        "bos_token": "<s>",
        "eos_token": {"__type": "AddedToken", "content": "</s>", "lstrip": False, "normalized": False},
        "chat_template": "{% for message in messages %}{{ message.content }}{% endfor %}",
        "clean_up_tokenization_spaces": True,
        "model_max_length": 128,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    (directory / "special_tokens_map.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))


def training_targets(directory: Path) -> list[Target]:
    """A checkpoint of a plain model, and the dataset that it could be trained on."""
    data = directory / "data"
    data.mkdir()
    tiny.make_data(data)
    sizes = dict(vocab_size=tiny.VOCABULARY, max_position_embeddings=64)
    families.make("llama2", directory / "hf", **sizes)
    checkpoint = directory / "checkpoint"
    assert cli.main(["convert", "import", "--hf", str(directory / "hf"), "--save", str(checkpoint)]) == 0
    older = shutil.copytree(checkpoint, directory / "older")  # without checksums: types and ranges alone must do
    manifest = json.loads((older / "manifest.json").read_text())
    del manifest["manifest_crc32"]
    manifest["crc32"] = {}
    (older / "manifest.json").write_text(json.dumps(manifest))
    train = _of_checkpoint(checkpoint, data)[0]
    return [
        Target(checkpoint / "manifest.json", _of_checkpoint(checkpoint, data)),
        *(Target(older / name, _of_checkpoint(older, data)) for name in ("manifest.json", "config.yaml")),
        *(Target(checkpoint / "hf" / name, _of_checkpoint(checkpoint, data)) for name in HF_FILES),
        Target(data / "train.json", (train,)),
    ]


def _of_checkpoint(checkpoint: Path, data: Path) -> tuple[tuple[object, ...], ...]:
    """Training, export, evaluation and ``inspect``."""
    report = ("eval", "report", "--tokenizer", data / "tokenizer.model", "--data", data / "valid")
    return (
        ("train", *tiny.command(data, "zero_out", init_from=checkpoint, train_iters=4)),
        ("convert", "export", "--load", checkpoint, "--save", "{out}"),
        (*report, "--output", "{out}", "--row", f"a={checkpoint}"),
        ("convert", "inspect", checkpoint),
    )
