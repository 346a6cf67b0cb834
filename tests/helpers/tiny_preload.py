"""What the server of tests/helpers/forked.py imports once for all runs that are forked from it. Imports only: no
thread, no group. A run's garbage collector passes over what they hold, and so leaves its pages shared with the server.
"""

import gc

import megatron.core.dist_checkpointing.strategies.torch  # noqa: F401
import torch.utils.tensorboard  # noqa: F401
import transformers.models.llama.modeling_llama  # noqa: F401

import megatron.dmc.serving.batch_run  # noqa: F401
import megatron.dmc.training.loop  # noqa: F401
import megatron.dmc.training.retrofit  # noqa: F401

gc.freeze()
