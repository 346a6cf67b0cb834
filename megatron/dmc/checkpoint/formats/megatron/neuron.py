"""The decision neuron in Megatron's weights: channel D-1 of every query and key head."""

from collections.abc import Mapping

from megatron.dmc.checkpoint.formats.megatron.arguments import wrong
from megatron.dmc.checkpoint.mapping.views import Key
from megatron.dmc.checkpoint.tensors import Lazy
from megatron.dmc.config import ModelConfig

PROJECTIONS = ("linear_qkv.weight", "linear_qkv.bias")
"""Endings of the parameters that have its rows."""


def neuron_rows(model: ModelConfig, first_query_only: bool = False) -> list[int]:
    """Rows of the QKV projection, [ng, g + 2, D] of them: the last of every query head and of the key head, or of the
    first query head of each group.
    """
    d, heads = model.head_dim, model.num_attention_heads // model.kv_heads + 2
    chosen = range(1 if first_query_only else heads - 1)
    return [(group * heads + head + 1) * d - 1 for group in range(model.kv_heads) for head in chosen]


def check_zeroed(parameters: Mapping[Key, Lazy], model: ModelConfig) -> None:
    """Raise ``ValueError`` unless the rows are zero, as zero_out leaves them at its end."""
    rows = neuron_rows(model)
    for (name, layer), tensor in parameters.items():
        for row in rows if name.endswith(PROJECTIONS) else ():
            if tensor.read(row, row + 1).any():
                raise wrong(
                    f"{tensor.name}: row {row}, a decision neuron (layer {layer}),",
                    "is not zero",
                    "the checkpoint that stage one writes at its end, in final_output/",
                )
