"""Decision adapter: what KV heads decide by when the base model gives up no channel for it.

RMSNorm and a linear layer on the hidden state before the layer's input norm, one output for each KV head or one for the
layer. Names and initial values are those of NVIDIA's Model-Optimizer (``experimental/dms``): the linear layer starts at
zero, so that every logit is ``-decision_bias`` and nothing is evicted.

The weights are a few thousand per layer. They lie whole on every tensor-parallel rank, also under sequence parallelism:
what the ranks exchange is one number per token and head, never the hidden state.
"""

from typing import Any

import torch
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

NAME = "dms_proj_alpha"
"""Part of the names of all parameters of adapters, and of no others."""


class DecisionProjection(torch.nn.Linear):
    """Linear layer [s, b, h] -> [s, b, outputs] without bias, zero at the start.

    Under sequence parallelism the input has this rank's s / tp rows, the output all of them. Every rank may use other
    outputs: gradients are summed over the ranks.
    """

    def __init__(self, config: TransformerConfig, outputs: int, group: Any) -> None:
        super().__init__(config.hidden_size, outputs, bias=False, dtype=config.params_dtype)
        torch.nn.init.zeros_(self.weight)
        self.group, self.sequence_parallel = group, config.sequence_parallel
        # As for norms: each rank sees a slice of the sequence, and finalize_model_grads sums the gradients.
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        exchange = (
            gather_from_sequence_parallel_region if self.sequence_parallel else copy_to_tensor_model_parallel_region
        )
        return exchange(super().forward(x), group=self.group)

    def gather(self, x: Tensor) -> Tensor:
        """All s rows of the input of :meth:`forward`, on every rank. No gradient."""
        return gather_from_sequence_parallel_region(x, group=self.group) if self.sequence_parallel else x


def is_adapter(name: str) -> bool:
    """True for the name of an adapter's parameter, local or in a checkpoint."""
    return NAME in name
