"""DMC for Megatron: self-attention as a layer spec, the model that counts kept slots, the compression loss."""

from megatron.dmc.model.adapter import is_adapter
from megatron.dmc.model.attention import DMCSelfAttention, DMCStep, SharedPrefix
from megatron.dmc.model.gpt_model import DMCGPTModel
from megatron.dmc.model.layer import DMCTransformerLayer
from megatron.dmc.model.layer_specs import get_dmc_block_spec, get_dmc_layer_spec, have_transformer_engine
from megatron.dmc.model.loss import compression_loss
