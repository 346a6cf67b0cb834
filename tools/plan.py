#!/usr/bin/env python3
"""``dmc plan`` from a checkout, installed or not."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))
from megatron.dmc.cli.plan import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
