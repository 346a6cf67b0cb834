"""Every flag of every command is explained by itself, and every ``--help`` ends with commands that are taken."""

from __future__ import annotations

import argparse
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Optional

import pytest
from helpers import commands
from helpers.processes import run_command, subprocess_env

from megatron.dmc import cli, flags

PARSERS = dict(commands.parsers())
OPTIONS = [(words, action) for words, parser in PARSERS.items() for action in commands.options(parser)]
LEANING = re.compile(
    r"(the same|see above|as above|likewise|ditto|it|this|that|these|those|of|by|in|on|from|what|which)\b", re.I
)
"""Words that a sentence begins with when it leans on another one."""


@pytest.mark.parametrize(
    ("words", "action"), OPTIONS, ids=[f"{words} {'/'.join(a.option_strings) or a.dest}" for words, a in OPTIONS]
)
def test_every_flag_is_explained_by_itself(words: str, action: argparse.Action) -> None:
    text = action.help or ""
    sentence = re.sub(r"\(?[Dd]efault:.*", "", text, flags=re.DOTALL).strip()
    assert len(sentence.split()) >= 3, f"{text!r} does not say what it is"
    assert re.match(r"[A-Z&]", sentence), f"{text!r} does not begin with a capital"
    assert not LEANING.match(sentence), f"{text!r} leans on another sentence"
    assert sentence.endswith((".", ":")) or "(default: " in text, f"{text!r} is no sentence"


@pytest.mark.parametrize(("words", "action"), OPTIONS, ids=[f"{w} {a.dest}" for w, a in OPTIONS])
def test_every_flag_says_its_default(words: str, action: argparse.Action) -> None:
    """Required ones, switches that are off, and flags that may be given several times have none to say."""
    switch = isinstance(action, argparse._StoreTrueAction | argparse._VersionAction)
    several = action.nargs in ("*", "+") or isinstance(action, argparse._AppendAction)
    if not (action.required or switch or several or action.default is None):
        assert re.search("default|required", action.help, re.I), action.help


def test_every_command_is_there() -> None:
    wanted = "train convert data plan eval compare generate serve batch bench build"
    assert list(cli.COMMANDS) == wanted.split() and len(OPTIONS) > 340
    described = [parser for parser in PARSERS.values() if parser.description and parser.description[0].isupper()]
    assert len(described) == len(PARSERS)


@pytest.mark.parametrize("words", PARSERS)
def test_examples_are_taken_by_the_command(words: str) -> None:
    shown = PARSERS[words].format_help().partition("\nexamples:\n")[2].splitlines()
    assert shown and all(line.startswith("  ") for line in shown), "no examples in --help"
    for line in shown:
        assert f" {words} " in f" {line.strip()} ", line
        typed = shlex.split(line[line.index(words) :], comments=True)
        cli.build_parser(typed[1]).parse_args(typed[2:])


# The overview, what a command imports, and what is said where something is missing


def test_the_overview_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["--help"])
    shown = capsys.readouterr().out
    assert end.value.code == 0 and all(f"    {name} " in shown for name in cli.COMMANDS)
    for argv, said in (([], "required: COMMAND"), (["trian"], "'trian'"), (["--versoin"], "required: COMMAND")):
        assert cli.main(argv) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and said in error and error.count("\n") == 1


WEB = "fastapi pydantic uvicorn"


@pytest.mark.parametrize(
    ("command", "absent"),
    [
        *((name, f"megatron.core {WEB}") for name in ("serve", "batch", "generate", "bench")),
        ("build", "megatron.core torch"),
        ("train", f"torch {WEB}"),
        *((name, "torch") for name in ("plan", "data", "convert", "eval", "compare")),
    ],
)
def test_help_needs_no_more_than_it_must(command: str, absent: str) -> None:
    code = f"import sys\nfor name in {absent.split()}: sys.modules[name] = None\n"
    code += f"from megatron.dmc.cli import main\nmain([{command!r}, '--help'])"
    assert "examples:" in run_command([sys.executable, "-c", code]).stdout


@pytest.mark.parametrize(
    ("argv", "absent", "said"),
    [
        (["serve", "m"], "fastapi", "dmc serve needs the package fastapi: pip install 'megatron-dmc[serve]'"),
        (["batch", "-i", "i", "-o", "o", "--model", "m"], "pydantic", "pip install 'megatron-dmc[serve]'"),
        (["bench", "serve"], "httpx2", "dmc bench needs the package httpx2: pip install 'megatron-dmc[serve]'"),
        (["train", "--lr", "1"], "torch", "dmc train needs the package torch: pip install 'megatron-dmc'"),
    ],
)
def test_a_missing_package_is_named_with_the_command_that_installs_it(argv: list[str], absent: str, said: str) -> None:
    code = f"import sys\nsys.modules[{absent!r}] = None\nfrom megatron.dmc.cli import main\nsys.exit(main({argv}))"
    result = subprocess.run([sys.executable, "-c", code], env=subprocess_env(), capture_output=True, text=True)
    error = result.stderr.strip().splitlines()[-1]
    assert result.returncode == 2 and error.startswith("error: ") and said in error, result.stderr


# Flags from dataclasses


@dataclass
class Inner:
    count: int = 3
    """Number of things,
    in all."""
    name: Optional[str] = None
    """Name of the thing. Default: none."""


@dataclass
class Outer(Inner):
    source: str = field(default="x", metadata={"flags": ("-s", "--source"), "metavar": "FILE"})
    """File of things, 100% of them."""
    kind: Literal["a", "b"] = "a"
    """Kind of the thing."""
    fast: bool = False
    """Hurry up, with ``speed``."""
    sizes: list[int] = field(default_factory=list)
    """Sizes of the things."""


def parser_of(**settings: object) -> flags.Parser:
    parser = flags.Parser(prog="p")
    flags.add_fields(parser, Outer, **settings)
    return parser


def test_fields_become_flags() -> None:
    parser = parser_of(defaults={"count": 5})
    assert flags.read(Outer, parser.parse_args([])) == Outer(count=5)
    argv = "--count 7 --name n -s f --kind b --fast --sizes 1 2".split()
    assert flags.read(Outer, parser.parse_args(argv)) == Outer(7, "n", "f", "b", True, [1, 2])
    assert not parser.parse_args(["--no-fast"]).fast
    shown = " ".join(parser.format_help().split())
    for text in (
        "--count COUNT Number of things, in all. (default: 5)",
        "--name NAME Name of the thing. Default: none.",
        "File of things, 100% of them. (default: x)",
        "--fast, --no-fast Hurry up, with speed. (default: False)",
    ):
        assert text in shown


def test_none_is_a_word_only_where_it_is_asked_for() -> None:
    assert parser_of().parse_args(["--name", "none"]).name == "none"
    assert parser_of(none=True).parse_args(["--name", "none"]).name is None
    with pytest.raises(ValueError, match="invalid int value: 'none'; p --help lists all flags"):
        parser_of(none=True).parse_args(["--count", "none"])


def test_flags_are_not_abbreviated() -> None:
    with pytest.raises(ValueError, match="unrecognized arguments: --coun"):
        parser_of().parse_args(["--coun", "7"])


@pytest.mark.parametrize(
    ("parse", "good", "bad"),
    [
        (flags.number(int, 1), {"1": 1, "7": 7}, ["0", "-1"]),
        (flags.number(float, 0, above=True), {"0.5": 0.5, "inf": float("inf")}, ["0", "nan"]),
        (flags.number(float, 0, finite=True), {"0": 0.0}, ["inf", "-1", "nan"]),
        (flags.numbers(int, 1), {"1,4": [1, 4], "3": [3]}, ["1,x", "0,1", ""]),
    ],
)
def test_parsers_of_numbers(parse, good: dict, bad: list[str]) -> None:
    assert {text: parse(text) for text in good} == good
    for text in bad:
        with pytest.raises(argparse.ArgumentTypeError, match="number"):
            parse(text)


@pytest.mark.parametrize(
    "command, expected, says",
    [
        ("{python} -m megatron.dmc.cli plan --help | true", 0, ""),
        ("{python} -c '{code}' | true", 141, ""),
        ("{python} -c '{code}' >/dev/full", 2, "error: stdout cannot be written: No space left on device"),
    ],
    ids=["help", "pipe", "full"],
)
def test_a_stdout_that_takes_no_more_is_no_traceback(command: str, expected: int, says: str) -> None:
    code = """
import sys, time
from megatron.dmc import flags
def run(args):
    time.sleep(0.3)
    print("a line that stays in the buffer until the end")
    return 0
parser = flags.Parser(prog="dmc")
parser.set_defaults(run=run)
sys.exit(flags.run(parser, []))
"""
    line = f"set -o pipefail; {command.format(python=sys.executable, code=code)}"
    result = subprocess.run(["bash", "-c", line], env=subprocess_env(), capture_output=True, text=True, timeout=60)
    assert result.returncode == expected and result.stderr.strip() == says, result.stderr


NOWHERE = "x" * 300
"""A name that no file system takes: the system says so, whatever is asked of it."""


@pytest.mark.parametrize(
    "command",
    [
        f"generate {NOWHERE} --prompt a",
        f"serve {NOWHERE}",
        f"batch -i {NOWHERE} -o out --model m",
        f"bench throughput {NOWHERE}",
        f"convert inspect {NOWHERE}",
        f"convert import --hf {NOWHERE} --save out",
        f"convert import --gguf {NOWHERE} --save out",
        f"convert export --load {NOWHERE} --save out",
        f"convert verify --hf {NOWHERE}",
        f"data describe {NOWHERE} --tokenizer t",
        f"eval fidelity {NOWHERE} --data t.txt",
        f"compare {NOWHERE}",
        f"plan {NOWHERE}",
        f"train --config {NOWHERE}",
        f"train --stage pretrain --train-iters 1 --save {NOWHERE} --tokenizer t --data-path d",
    ],
)
def test_what_the_system_says_of_a_file_is_one_line(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(command.split()) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and len(err) < 1000
    assert "File name too long" in err


def test_a_file_to_write_is_tried_before_the_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is left of the trial, and what was there stays."""
    assert flags.new_file(str(tmp_path / "new" / "a.json")) == tmp_path / "new" / "a.json"
    assert not list((tmp_path / "new").iterdir())
    (tmp_path / "old").write_text("{}")
    assert flags.new_file(str(tmp_path / "old")).read_text() == "{}"
    for wrong, why in (("/dev/null/x", "File exists"), (str(tmp_path), "Is a directory")):
        with pytest.raises(argparse.ArgumentTypeError, match=f"{wrong} cannot be written: {why}"):
            flags.new_file(wrong)
    for command in ("plan llama2-7b --json", "eval fidelity m --data t --json", "bench throughput m --output-json"):
        assert cli.main([*command.split(), str(tmp_path)]) == 2
        assert f"{tmp_path} cannot be written: Is a directory" in capsys.readouterr().err
