"""Runs ``dmc`` commands in forked children: what is slow to import is imported once. One JSON list of arguments per
line of stdin; the child's process id comes first, then its exit status (negative: the signal that ended it).
"""

from __future__ import annotations

import json
import os
import sys

from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast  # noqa: F401

from megatron.dmc.cli import main
from megatron.dmc.kernels import active_backend
from megatron.dmc.serving import batch_run  # noqa: F401

active_backend("cpu")
for line in sys.stdin:
    pid = os.fork()
    if pid == 0:
        os.dup2(2, 1)
        os._exit(main(json.loads(line)))
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
