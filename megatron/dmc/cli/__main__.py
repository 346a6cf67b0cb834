"""``python -m megatron.dmc.cli``: the ``dmc`` command, for launchers that start modules."""

import sys

from megatron.dmc.cli import main

if __name__ == "__main__":
    sys.exit(main())
