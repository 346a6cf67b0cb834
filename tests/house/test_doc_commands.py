"""Every command in README and docs is one that the programs take: read by their own parsers, run where that needs no
model.

A block of code is either commands, all of which must be known here, or Python, whose imports must work, or one of
OUTPUTS.
"""

from __future__ import annotations

import ast
import contextlib
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.processes import ROOT, run_command

from megatron.dmc import cli
from megatron.dmc.training import arguments

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "examples" / "dmc" / "README.md"]
SLURM = ROOT / "examples" / "dmc" / "slurm"
OUTPUTS = ("11980 lines completed, ", "iteration 20/140 | ", "127.0.0.1:40112 ")  # how blocks of printed lines begin
FOREIGN = {"curl", "lm_eval", "cd", "export", "grep", "mv", "docker", "vllm"}
TOOLS = {"convert_checkpoint.py": ["convert"], "plan.py": ["plan"], "preprocess_data.py": ["data", "preprocess"]}
MODULES = {
    "megatron.dmc.cli": [],
    "megatron.dmc.kernels.build": ["build"],
    "megatron.dmc.evaluation.compare": ["compare"],
    "megatron.dmc.evaluation.report": ["eval", "report"],
    "megatron.dmc.evaluation.generate": ["eval", "generate"],
    "megatron.dmc.evaluation.recall_data": ["eval", "recall-data"],
    "megatron.dmc.evaluation.induction": ["eval", "induction"],
}
"""Older entries, by the ``dmc`` command that they run."""
NUMBERS = dict.fromkeys(("N", "T", "P", "D", "V", "S", "B"), "1") | {
    "KIND": "none",
    "I/N": "0/1",
    "$SLURM_ARRAY_TASK_ID/8": "0/8",
}


def blocks(page: Path) -> list[tuple[str, str]]:
    """(language of the fence, text); "" for indented ones."""
    found: list[tuple[str, list[str]]] = []
    fence = None
    before = ""
    for line in page.read_text().splitlines():
        if line.startswith("```"):
            fence = None if fence is not None else line[3:].strip() or "plain"
            if fence is not None:
                found.append((fence, []))
        elif fence is not None:
            found[-1][1].append(line)
        elif line.startswith("    ") and not re.match(r"\s*([-*]|\d+\.) ", line):
            if not (
                found and found[-1][0] == "" and (before.startswith("    ") or not before.strip()) and found[-1][1]
            ):
                found.append(("", []))
            found[-1][1].extend([""] * bool(found[-1][1] and not before.strip()) + [line[4:]])
        elif line.strip() and found and found[-1][0] == "":
            found.append(("end", []))
        before = line
    whole = [(kind, "\n".join(lines)) for kind, lines in found if lines and kind != "json"]
    parts = []
    for kind, text in whole:  # Python and commands side by side, with a blank line between
        paragraphs = text.split("\n\n")
        python = [n for n in range(1, len(paragraphs)) if is_python(kind, "\n\n".join(paragraphs[:n]))]
        if kind or is_python(kind, text) or not python:
            parts.append((kind, text))
        else:
            parts += [(kind, "\n\n".join(paragraphs[: python[-1]])), (kind, "\n\n".join(paragraphs[python[-1] :]))]
    return parts


def is_python(kind: str, text: str) -> bool:
    if kind == "python":
        return True
    try:
        return any(isinstance(node, (ast.Import, ast.ImportFrom)) for node in ast.parse(text).body)
    except SyntaxError:
        return False


BLOCKS = [(page, kind, text) for page in PAGES for kind, text in blocks(page)]
SHELL = [(page, text) for page, kind, text in BLOCKS if not is_python(kind, text) and not text.startswith(OUTPUTS)]


def commands(text: str) -> list[list[str]]:
    """Words of every command: continued lines joined, comments and variables in front taken off, placeholders filled
    in.
    """
    found = []
    if "\n$ " in f"\n{text}":  # a session: what begins with a $ was typed
        text = "\n".join(line[2:] for line in text.splitlines() if line.startswith("$ "))
    text = text.replace("\\\n", " ").replace("run() {", "").replace('"$@"; }', "").replace(" && ", "\n")
    for line in text.splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        words = shlex.split(re.sub(r"(?<=\s)\[|\](?=\s|$)", " ", line), comments=True)
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0], re.DOTALL):
            words.pop(0)
        words = [NUMBERS.get(word, word) for word in words if word != "&"]
        if words:
            found.append(words[1:] if words[0] == "exec" else words)
    return found


def check(words: list[str]) -> None:
    """Raises when a command is not one that its program takes."""
    words = [word for word in words if word not in ("--flag", "VALUE")]
    name, rest = words[0], [word for word in words[1:] if word != "..."]
    if name == "make":
        assert re.search(rf"^{rest[0]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), words
    elif name == "pip":
        for extra in re.findall(r"\[([\w,]+)\]", " ".join(rest)):
            assert re.search(rf'"{extra}":', (ROOT / "setup.py").read_text()), words
    elif name == "dmc":
        check_dmc(rest)
    elif name in ("run", "..."):
        parse(arguments.build_parser(), rest)
    elif name == "torchrun" or rest[:2] == ["-m", "torch.distributed.run"]:
        check_launch(rest if name == "torchrun" else rest[2:], "..." in words)
    elif name.startswith(("tools/", "benchmarks/", "tests/")) or name == "convert_checkpoint.py":
        check_script(name, rest)
    elif name == "python":
        check_python(rest)
    elif name in ("sbatch", "./retrofit.sh"):
        pass  # test_slurm_commands runs them
    else:
        assert name in FOREIGN, f"{shlex.join(words)}: add the program to this test"


def parse(parser, words: list[str]) -> None:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):  # of --help; errors are ValueError
        parser.parse_args(words)
    for flag, value in zip(words, words[1:]):
        assert flag != "--config" or value == "FILE" or (ROOT / value).is_file(), value


def check_dmc(words: list[str]) -> None:
    if not words or words[0].startswith("-"):
        assert set(words) <= {"--help", "--version"}, words
        return
    assert words[0] in cli.COMMANDS, words
    parse(cli.build_parser(words[0]), words[1:])


def check_launch(words: list[str], shortened: bool) -> None:
    from torch.distributed.run import get_args_parser

    if shortened and not {"-m", "--no-python"} & set(words):
        parse(arguments.build_parser(), words)
        return
    launch = get_args_parser().parse_args(words)
    if launch.no_python:
        check([launch.training_script, *launch.training_script_args])
    elif launch.training_script == "megatron.dmc.cli":
        check_dmc(launch.training_script_args)
    elif launch.module:
        assert launch.training_script == "megatron.dmc.training.retrofit", words
        parse(arguments.build_parser(), launch.training_script_args)


def check_python(words: list[str]) -> None:
    if words[0] == "-m" and words[1] == "pytest":
        assert all((ROOT / word).exists() for word in words[2:]), words
    elif words[:2] == ["-m", "megatron.dmc.training.retrofit"]:
        parse(arguments.build_parser(), words[2:])
    elif words[0] == "-m" and words[1] in MODULES:
        check_dmc([*MODULES[words[1]], *words[2:]])
    elif words[0] == "-m":
        place = ROOT / words[1].replace(".", "/")
        file = place / "__main__.py" if place.is_dir() else place.with_suffix(".py")
        assert file.is_file(), words
        flags_are_known(file.read_text(), words[2:])
    else:
        check_script(words[0], words[1:])


def check_script(name: str, words: list[str]) -> None:
    file = ROOT / (name if "/" in name else f"tools/{name}")
    assert file.is_file(), name
    if file.name in TOOLS and words:
        check_dmc([*TOOLS[file.name], *words])
    else:
        flags_are_known(file.read_text() + (ROOT / "benchmarks" / "_common.py").read_text(), words)


def flags_are_known(source: str, words: list[str]) -> None:
    for word in words:
        assert not word.startswith("--") or word in source, (word, words)
        assert not word.startswith("examples/") or (ROOT / word).exists(), word


@pytest.mark.parametrize(
    "page", PAGES, ids=lambda page: page.name if page.parent != ROOT / "examples" / "dmc" else "examples"
)
def test_commands_are_taken_by_their_programs(page: Path) -> None:
    for where, text in SHELL:
        if where == page:
            for words in commands(text):
                check(words)
    for text in re.findall(r"`((?:tools/|benchmarks/|dmc |python -m |make )[^`]*)`", page.read_text()):
        if " " in text and "|" not in text:  # in the text a command may be shown in part
            try:
                check(commands(text)[0])
            except (AssertionError, ValueError) as error:
                assert "are required" in str(error), text


def test_commands_are_found() -> None:
    """What a page with a mistake would do: the test above is not blind."""
    found = [words for _, text in SHELL for words in commands(text)]
    assert len(found) > 50 and {words[0] for words in found} >= {"dmc", "torchrun", "sbatch", "make", "pip"}
    for wrong in (
        "dmc serve MODEL --prot 8000",
        "make quickstrat",
        "pip install 'x[nothing]'",
        "tools/plan.py x --gpu 8 --tpp 2",
        "torchrun -m megatron.dmc.training.retrofit --stages zero_out",
        "foo --bar",
        "tools/convert_checkpoint.py improt --hf a --save b",
        "torchrun ... --stage zero",
        "python -m megatron.dmc.kernels.build --everything",
        "dmc tarin --stage zero_out",
        "torchrun --no-python dmc train --stages zero_out",
        "torchrun -m megatron.dmc.cli convert improt",
        "torchrun -m megatron.dmc.training.retrofit --config examples/dmc/configs/llama3-7b.yaml",
    ):
        with pytest.raises((AssertionError, ValueError)):
            check(commands(wrong)[0])


@pytest.mark.parametrize(
    "page, kind, text",
    [block for block in BLOCKS if is_python(*block[1:])],
    ids=lambda value: value.name if isinstance(value, Path) else "",
)
def test_python_is_whole_and_imports_what_there_is(page: Path, kind: str, text: str) -> None:
    found = ast.parse(text)
    for node in found.body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            exec(compile(ast.Module([node], []), page.name, "exec"), {})


def test_sessions_print_what_the_page_says() -> None:
    """plan.md's commands, with their output."""
    sessions = [text for page, text in SHELL if text.startswith("$ ")]
    assert len(sessions) == 2
    for text in sessions:
        typed, _, expected = text.partition("\n")
        words = shlex.split(typed[2:])
        result = run_command([sys.executable, "-m", "megatron.dmc.cli", *words[1:]], check=False)
        printed = [line for line in (result.stdout + result.stderr).splitlines() if line]
        assert [line for line in expected.splitlines() if line] == printed, typed


def test_slurm_commands(tmp_path: Path) -> None:
    """cluster.md's blocks, in one shell: sbatch starts the script here, as job 77, and srun writes down what it would
    run.
    """
    text = "\n".join(text for page, text in SHELL if page.name == "cluster.md" and not text.startswith("docker"))
    for name in ("ckpt", "data", "models"):
        (tmp_path / name).mkdir()
        text = re.sub(rf"(?<![\w.])/{name}\b", f"{tmp_path}/{name}", text)
    (tmp_path / "models" / "Llama-2-7b-hf").mkdir()
    (tmp_path / "models" / "Llama-2-7b-hf" / "tokenizer.model").touch()
    (tmp_path / "ckpt" / "llama2-7b").mkdir()
    text = text.replace("/path/to/venv/bin/python", "python").replace("requests.jsonl", f"{tmp_path}/in.jsonl")
    text = text.replace("answers.jsonl", f"{tmp_path}/answers.jsonl")
    log, bin = tmp_path / "log", tmp_path / "bin"
    bin.mkdir()
    array = "SLURM_ARRAY_JOB_ID=70 SLURM_ARRAY_TASK_ID=0 SLURM_ARRAY_TASK_COUNT=8 "
    array += "SLURM_ARRAY_TASK_MIN=0 SLURM_ARRAY_TASK_MAX=7"
    job = f"SLURM_JOB_ID=77 SLURM_NNODES=4 SLURM_GPUS_ON_NODE=8 SLURM_JOB_NODELIST=n SLURM_SUBMIT_DIR=$PWD {array}"
    stand_ins = {
        "sbatch": f'echo "sbatch $*" >>{log}; while [[ $1 == -* ]]; do shift; done\n'
        f'out=$(env {job} bash "$@" 2>&1) || {{ echo "FAILED $*: $out" >>{log}; exit 1; }}\necho 77',
        "srun": f'words="$*"; echo "srun ${{words//[[:cntrl:]]/ }}" >>{log}',
        "scontrol": "echo n1",
        "squeue": "date -d '+1 hour' +%FT%T",
    }
    for name, body in stand_ins.items():
        (bin / name).write_text(f"#!/bin/bash\n{body}\n")
        (bin / name).chmod(0o755)
    shutil.copytree(ROOT / "examples" / "dmc", tmp_path / "repository" / "examples" / "dmc")
    env = {**os.environ, "PATH": f"{bin}:{os.environ['PATH']}"}
    subprocess.run(
        ["bash", "-euc", text], cwd=tmp_path / "repository", env=env, check=True, timeout=60, stdout=subprocess.DEVNULL
    )
    said = log.read_text()
    assert "FAILED" not in said, said
    started = [line for line in said.splitlines() if line.startswith("srun")]
    for part in (
        "convert_checkpoint.py import --hf",
        "convert_checkpoint.py export --load",
        "--stage zero_out",
        "--stage retrofit",
        "--stage finetune",
        "dmc serve",
        "dmc batch",
    ):
        assert any(part in line for line in started), (part, said)
    for line in started:  # and training takes what the scripts give it
        if "megatron.dmc.training.retrofit " in line:
            parse(
                arguments.build_parser(),
                [
                    word
                    for word in shlex.split(line.split("training.retrofit ")[1])
                    if word != "../configs/llama2-7b.yaml"
                ][1:],
            )
        elif " dmc " in line:
            check(
                shlex.split(line[line.rindex(" dmc ") :]) + ["-o", "OUTPUT"] * (" dmc batch " in line)
            )  # -o: the launcher's


def test_error_lines_can_be_taken_out_of_a_batch(tmp_path: Path) -> None:
    text = next(text for page, text in SHELL if page.name == "batch.md" and text.startswith("grep"))
    good, bad = '{"custom_id": "a", "error": null}\n', '{"custom_id": "b", "error": {"code": "x"}}\n'
    (tmp_path / "answers.jsonl").write_text(good + bad + good)
    subprocess.run(["bash", "-euc", text], cwd=tmp_path, check=True)
    assert (tmp_path / "answers.jsonl").read_text() == good * 2
