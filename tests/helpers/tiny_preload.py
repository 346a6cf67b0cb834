"""What the server of tests/helpers/forked.py imports once for all runs that are forked from it. Imports only: no
thread, no group.
"""

import megatron.core.dist_checkpointing.strategies.torch  # noqa: F401
import torch.utils.tensorboard  # noqa: F401

import megatron.dmc.training.loop  # noqa: F401
import megatron.dmc.training.retrofit  # noqa: F401
