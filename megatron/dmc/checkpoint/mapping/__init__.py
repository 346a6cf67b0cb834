"""Model families in Hugging Face's and in Megatron's terms: tensor names, shapes and configuration keys, as data.

A family is an entry of :data:`FAMILIES` (docs/extending.md). A key of ``config.json`` that no table knows is refused by
name: an option that is dropped silently gives a model that talks nonsense. No torch is imported but by :mod:`views`.
"""

from megatron.dmc.checkpoint.mapping.families import (
    FAMILIES,
    LLAMA_TENSORS,
    Family,
    adapter_rules,
    hf_shapes,
    in_order,
    is_adapter,
    rules,
    with_adapters,
)
from megatron.dmc.checkpoint.mapping.hf_config import (
    ADAPTER_MODEL_TYPE,
    COMPRESSED_STAGES,
    DMC_ARCHITECTURE,
    DMC_FORMAT_VERSION,
    DMC_MODEL_TYPE,
    DMCBlock,
    base_config,
    block_fields,
    changed_config,
    dmc_block,
    dmc_config,
    dmc_from_hf_config,
    family_of,
    from_hf_config,
    model_dtype,
    to_hf_config,
    with_block,
)
from megatron.dmc.checkpoint.mapping.rules import TensorRule
