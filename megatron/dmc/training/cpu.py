"""Smallest layer that lets megatron-core run on gloo without a GPU. Does nothing where CUDA is available.

megatron-core 0.16.1 to 0.20 names "cuda" in places where it means "the device of this process". These are the places.
"""

from collections.abc import Callable

import torch
from torch.overrides import TorchFunctionMode

from megatron.dmc.kernels.cpu_tuning import keep_freed_memory


class _CudaMeansCpu(TorchFunctionMode):
    """Mode in which ``device="cuda"`` is the CPU, ``.cuda()`` the identity, and ``Tensor.type()`` ``torch.cuda.*``."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        # Every function of PyTorch comes through here, so the usual call, without keywords, must cost little.
        kwargs = dict(kwargs) if kwargs else {}
        if kwargs:
            if "device" in kwargs:
                device = kwargs["device"]
                if isinstance(device, int) or (device is not None and torch.device(device).type == "cuda"):
                    kwargs["device"] = torch.device("cpu")
            kwargs.pop("pin_memory", None)
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            # The optimizers compare type strings with torch.cuda.FloatTensor and its kin.
            return func(*args).replace("torch.", "torch.cuda.")
        return func(*args, **kwargs)


class _NoStream:
    """Stream of a device without streams: every method does nothing."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: None


_mode: _CudaMeansCpu | None = None


def enable() -> None:
    """Patch this process, once; the mode stays on until it ends."""
    global _mode
    if torch.cuda.is_available() or _mode is not None:
        return
    from megatron.core.tensor_parallel import random as mcore_random

    cpu = torch.device("cpu")
    torch.cuda.current_device = lambda: cpu
    torch.cuda.synchronize = lambda device=None: None
    torch.cuda.current_stream = lambda device=None: _NoStream()  # DistributedDataParallel asks for it from 0.19 on
    # Recomputation saves and restores the generator's state; no dropout is used, and decision noise has no state.
    mcore_random._get_cuda_rng_state = lambda *args, **kwargs: None
    mcore_random._set_cuda_rng_state = lambda *args, **kwargs: None
    keep_freed_memory()  # every micro-batch allocates the same activations
    _mode = _CudaMeansCpu()
    _mode.__enter__()
