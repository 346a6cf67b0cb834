"""``python -m megatron.dmc.evaluation.compare``: the command ``dmc compare``."""

import sys

if __name__ == "__main__":
    from megatron.dmc.cli.compare import main

    sys.exit(main())
