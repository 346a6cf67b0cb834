"""``dmc train``: one stage of a retrofit, or pre-training."""

import sys
from collections.abc import Sequence
from typing import Optional

from megatron.dmc import flags


def build_parser() -> flags.Parser:
    from megatron.dmc.training import arguments

    return arguments.build_parser()


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run one stage. Its entry point parses the command line itself, so that one rank alone reports what is wrong."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if {"-h", "--help"} & set(argv):
        build_parser().parse_args(argv)  # prints the help and exits, without torch
    try:
        from megatron.dmc.training import retrofit

        return retrofit.main(argv)
    except ModuleNotFoundError as error:
        print(f"error: dmc train {flags.missing(error)}", file=sys.stderr)
        return 2
