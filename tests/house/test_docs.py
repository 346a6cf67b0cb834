"""What the documents quote is what the programs say: error messages, flags and files."""

import ast
import re
from pathlib import Path

import pytest
from helpers import commands

ROOT = Path(__file__).resolve().parent.parent.parent
SOURCES = [*(ROOT / "megatron").rglob("*.py"), *(ROOT / "examples" / "dmc" / "slurm").iterdir()]


def templates() -> list[set[str]]:
    """The words of every string literal (f-strings without what is filled in) and of every line of the
    shell scripts.
    """
    found = []
    for path in SOURCES:
        if path.suffix == ".py":
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.JoinedStr):
                    parts = [part.value for part in node.values if isinstance(part, ast.Constant)]
                    found.append(words(" ".join(parts)))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(words(node.value))
        else:
            found += [words(line) for line in path.read_text().splitlines()]
    return found


def words(text: str) -> set[str]:
    return set(re.findall(r"[a-z]{3,}", text))


def quoted(page: str) -> list[str]:
    """The messages in the first column of a page's tables."""
    rows = [line for line in (ROOT / "docs" / page).read_text().splitlines() if line.startswith("| `")]
    return [message for row in rows for message in re.findall(r"`([^`]+)`", row.split(" | ")[0])]


@pytest.mark.parametrize("page", ["troubleshooting.md", "cluster.md"])
def test_messages_are_those_of_the_programs(page):
    """Three fifths of a message's words stand in one string of the program; the rest is what is filled in."""
    first = ("error:", "WARNING:", "leaving", "armed", "refused", "training ended", "unfinished")
    ours = [message for message in quoted(page) if message.startswith(first)]
    assert len(ours) >= 3
    known = templates()
    for message in ours:
        said = words(message.removeprefix("error:"))
        best = max(len(said & template) for template in known)
        assert said and best >= 0.6 * len(said), (message, best, len(said))


@pytest.mark.parametrize("page", ["training.md", "cluster.md", "troubleshooting.md"])
def test_flags_and_files_exist(page):
    text = (ROOT / "docs" / page).read_text()
    known = {flag for _, parser in commands.parsers() for flag in parser._option_string_actions}
    programs = [*SOURCES, *(ROOT / "tools").iterdir(), *(ROOT / "benchmarks").glob("*.py")]
    scripts = " ".join(path.read_text() for path in programs if path.is_file())
    words = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+[a-z]", text))
    # of sbatch, srun, containers, docker and torchrun
    others = {
        "--time",
        "--nodes",
        "--gpus-per-node",
        "--cpus-per-task",
        "--exclusive",
        "--dependency",
        "--array",
        "--signal",
        "--container-image",
        "--container-mounts",
        "--nv",
        "--bind",
        "--gpus",
        "--target",
        "--nproc-per-node",
        "--no-python",
        "--flag",
    }
    # An option of a program's parser, or a case of a shell script's.
    odd = sorted(word for word in words - known - others if f'"{word}"' not in scripts and f" {word}) " not in scripts)
    assert words & known or page == "cluster.md"
    assert not odd, odd
    for path in re.findall(r"\]\(([^)#]+)", text):
        assert path.startswith("http") or (ROOT / "docs" / path).exists(), path
    for path in re.findall(r"`((?:tests|tools|examples|megatron)/[\w/.]+)", text):
        assert (ROOT / path).exists(), path


def test_the_picture_shows_what_may_be_imported():
    """Every package has a box, and every arrow is an import that the rules of the house allow."""
    from test_house import RULES, within

    space: dict = {"__name__": "architecture"}
    exec((ROOT / "docs" / "evidence" / "architecture.py").read_text(), space)
    shown = {name for names in space["PACKAGES"] for name in names.split(", ")}
    assert shown == {area for area in RULES if area and "." not in area}
    assert len(space["IMPORTS"]) > 8
    for who, whom in space["IMPORTS"]:
        assert any(within(whom, area) for area in RULES[who].areas), (who, whom)
        back = RULES[whom].areas if whom in RULES else ()
        assert who not in back, f"{who} and {whom} may import each other"


def test_the_places_in_the_architecture_exist():
    """Every file of the table "Where things are" is there, and holds the names that stand behind it."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    table = text[text.index("## Where things are") : text.index("## How it works")]
    places = 0
    for row in (line.split(" | ")[1] for line in table.splitlines() if line.startswith("| ") and " | " in line):
        source = ""
        for word in re.findall(r"`([^`]+)`", row):
            path = ROOT / "megatron" / "dmc" / word
            if "/" in word or word.endswith(".py"):
                assert path.exists(), word
                places += 1
                source = path.read_text() if path.is_file() else ""
            elif f"{word}`" + " in `" not in row:
                assert re.search(rf"(def|class) {word}\b|^{word}\b", source, re.MULTILINE), (word, row)
    assert places > 25
