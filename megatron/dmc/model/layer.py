"""A transformer layer that shows its attention the layer's input, and adds the slot count to the carried row."""

import dataclasses
from typing import Optional

import torch
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from megatron.dmc.model.attention import DMCStep
from megatron.dmc.model.carry import read_count, write_count
from megatron.dmc.model.swiglu import swiglu


class DMCTransformerLayer(TransformerLayer):
    """``TransformerLayer`` on [s, b, h]; with ``carry``, on [s + 1, b, h], whose last row is not a token.

    The row is taken off before the layer and put back after it, so norms, projections and kernels never see it. What
    is left is what an adapter reads (``DMCStep.layer_input``).
    """

    def __init__(self, config, submodules, *args, carry: bool = False, **kwargs) -> None:
        super().__init__(config, submodules, *args, **kwargs)
        self.carry = carry
        if config.use_te_activation_func:  # which for megatron-core's MLP means: one function of all of fc1's output
            self.mlp.activation_func = swiglu

    def forward(self, hidden_states: Tensor, *args, **kwargs) -> tuple[Tensor, Optional[Tensor]]:
        tokens = hidden_states[:-1] if self.carry else hidden_states
        if isinstance(step := kwargs.get("attention_bias"), DMCStep):
            kwargs["attention_bias"] = dataclasses.replace(step, layer_input=tokens)
        output, context = super().forward(tokens, *args, **kwargs)
        if not self.carry:
            return output, context
        count = read_count(hidden_states[-1:]) + self.self_attention.kept_count
        row = write_count(count, output.size(-1), output.dtype)
        return torch.cat((output, row)), context
