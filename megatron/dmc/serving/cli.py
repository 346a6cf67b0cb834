"""The ``dmc`` command: all subcommands, each in the module of its own that this one names."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Optional

from megatron.dmc.inference import cli
from megatron.dmc.inference.bench_cli import BENCHES
from megatron.dmc.serving import batch_cli, bench_serve, serve

# Modules that are imported here put off what is slow to import, or in an extra, until their command runs.
COMMANDS = (
    *cli.COMMANDS,
    serve.COMMAND,
    batch_cli.COMMAND,
    cli.group("bench", "measure speed and memory", (*BENCHES, bench_serve.COMMAND)),
)


def main(argv: Optional[Sequence[str]] = None) -> int:
    """See :func:`megatron.dmc.inference.cli.main`."""
    return cli.main(argv, COMMANDS)


if __name__ == "__main__":
    sys.exit(main())
