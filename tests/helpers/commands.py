"""The ``dmc`` commands, with their parsers and flags."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from megatron.dmc import cli, flags


def parsers() -> Iterator[tuple[str, flags.Parser]]:
    """Every command and subcommand, by the words that call it."""
    for name in cli.COMMANDS:
        yield from _below(f"dmc {name}", cli.build_parser(name))


def _below(words: str, parser: flags.Parser) -> Iterator[tuple[str, flags.Parser]]:
    yield words, parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, inner in action.choices.items():
                yield from _below(f"{words} {name}", inner)


def options(parser: flags.Parser) -> list[argparse.Action]:
    """Flags and positional arguments of a parser, but ``--help`` and subcommands."""
    left_out = (argparse._HelpAction, argparse._SubParsersAction)
    return [action for action in parser._actions if not isinstance(action, left_out)]
