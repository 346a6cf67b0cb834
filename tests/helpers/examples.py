"""How many examples Hypothesis tries."""

from __future__ import annotations

import os

ALL_EXAMPLES = os.environ.get("DMC_ALL_EXAMPLES", "") not in ("", "0")


def examples(number: int) -> int:
    """Examples of a property whose every example is a whole run of the engine or of the kernels' cache: ``number``
    with DMC_ALL_EXAMPLES=1 in the environment, else a third of them. Each run draws others.
    """
    return number if ALL_EXAMPLES else -(-number // 3)
