"""RMSNorm for the local spec and for the end of the decoder."""

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class RMSNorm(torch.nn.RMSNorm):
    """RMSNorm over the last axis. Unlike megatron-core's wrapped torch norm it works with sequence parallelism."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_) -> None:
        super().__init__(hidden_size, eps, dtype=config.params_dtype)
        # Each rank sees a slice of the sequence: finalize_model_grads sums the gradients of marked parameters.
        self.weight.sequence_parallel = config.sequence_parallel


class RMSNormBesideCarry(RMSNorm):
    """The decoder's final norm: the last sequence row is the carried count, not a hidden state, and passes through."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((super().forward(x[:-1]), x[-1:]))
