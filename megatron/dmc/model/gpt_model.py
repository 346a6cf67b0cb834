"""Megatron's GPTModel with DMC attention; its last stage also returns the slots that the whole model kept."""

from collections.abc import Callable
from functools import partial
from typing import Any, Optional

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import reduce_from_tensor_model_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron.dmc.config import DMCConfig, ModelConfig
from megatron.dmc.model.adapter import is_adapter
from megatron.dmc.model.attention import DMCSelfAttention, DMCStep
from megatron.dmc.model.carry import read_count, write_count
from megatron.dmc.model.layer_specs import get_dmc_block_spec
from megatron.dmc.ops import attention_factor, rotary_frequencies


class DMCGPTModel(GPTModel):
    """A Llama-family ``GPTModel`` for every stage of the retrofit.

    Args:
        config: Megatron's configuration, from :func:`megatron.dmc.training.model.transformer_config`.
        model: sizes and family switches.
        dmc: method of compression, source of its decisions, bias, window, temperature.
        carry: count kept slots through the decoder. True for the compressing stages: the hidden state has one row more
            than there are tokens (pass ``seq_length + tp`` to the schedule under sequence parallelism, else + 1), and
            the last stage returns (losses or logits, kept).
        transformer_impl: "auto", "local", "transformer_engine".
        kwargs: ``GPTModel``'s other arguments, such as pre_process, post_process, pg_collection.
    """

    def __init__(
        self,
        config: TransformerConfig,
        model: ModelConfig,
        dmc: DMCConfig,
        *,
        carry: bool,
        transformer_impl: str = "auto",
        vp_stage: Optional[int] = None,
        **kwargs: Any,
    ) -> None:
        factor = attention_factor(model.rope_scaling)
        super().__init__(
            config=config,
            transformer_layer_spec=get_dmc_block_spec(
                config, dmc, transformer_impl, carry=carry, rotary_factor=factor, vp_stage=vp_stage
            ),
            vocab_size=model.padded_vocab_size,
            max_sequence_length=model.max_position_embeddings,
            share_embeddings_and_output_weights=not model.untie_embeddings_and_output_weights,
            position_embedding_type="rope",
            rotary_base=model.rotary_base,
            vp_stage=vp_stage,
            **kwargs,
        )
        self.carry = carry
        self.base_frozen = False
        # megatron-core knows one set of rope-scaling constants; these come from the model's configuration.
        self.rotary_pos_emb.inv_freq = rotary_frequencies(
            model.head_dim, model.rotary_base, model.rope_scaling, device=self.rotary_pos_emb.inv_freq.device
        )

    def forward(
        self,
        input_ids: Optional[Tensor],
        position_ids: Optional[Tensor],
        labels: Optional[Tensor] = None,
        *,
        step: Optional[DMCStep] = None,
        head: Optional[Callable[[Tensor], Tensor]] = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Run one micro-batch through this stage.

        Args:
            input_ids, position_ids, labels: int64 [b, s]; stages that do not need them ignore them.
            step: see :class:`DMCStep`; may be left out in eval mode.
            head: what the last stage makes of the hidden state in front of the output layer, [s, b, h] ([s / tp, b, h]
                under sequence parallelism). None: cross-entropy, fp32 [b, s], or without labels the logits,
                [b, s, vocab / tp].

        Returns:
            On the last stage what ``head`` returns; with ``carry`` a tuple of that and the slots kept by the whole
            model, fp64 [b]. On other stages the hidden state [s (+ 1), b, h].
        """
        hidden, rotary_pos_emb, *_ = self._preprocess(
            input_ids, position_ids, self._embed(input_ids, position_ids) if self.pre_process else None
        )
        if step is not None and step.compress and step.prefix is not None:
            rotary_pos_emb = self.rotary_pos_emb(rotary_pos_emb.size(0) + step.prefix.tokens)
        # After the first stage the decoder takes its input from set_input_tensor instead.
        hidden = self.decoder(hidden, attention_mask=None, rotary_pos_emb=rotary_pos_emb, attention_bias=step)
        if not self.post_process:
            return hidden
        head = head or partial(self._head, labels)
        if not self.carry:
            return head(hidden)
        # Each tensor-parallel rank has counted its own heads.
        kept = reduce_from_tensor_model_parallel_region(read_count(hidden[-1:]), group=self.pg_collection.tp)
        return head(hidden[:-1]), kept

    def _embed(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        """[b, s] -> [s, b, h], with ``carry`` [s + 1, b, h], whose last row counts 0 slots."""
        hidden = self.embedding(input_ids=input_ids, position_ids=position_ids)
        if self.carry:
            zero = torch.zeros(hidden.size(1), dtype=torch.float64, device=hidden.device)
            hidden = torch.cat((hidden, write_count(zero, hidden.size(-1), hidden.dtype)))
        if self.base_frozen and self.config.recompute_granularity == "full" and torch.is_grad_enabled():
            # Recomputed layers get a gradient through their input alone, and nothing before them is trained.
            hidden.requires_grad_()
        return hidden

    def _head(self, labels: Optional[Tensor], hidden: Tensor) -> Tensor:
        logits = self.logits(hidden)
        if labels is None:
            # [s, b, vocab / tp] -> [b, s, vocab / tp]
            return logits.transpose(0, 1).contiguous()
        return self.compute_language_model_loss(labels, logits)

    def logits(self, hidden: Tensor) -> Tensor:
        """Output layer: [s, b, h] ([s / tp, b, h] under sequence parallelism) -> [s, b, vocab / tp]."""
        weight = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        return self.output_layer(hidden, weight=weight)[0]

    def output_weight(self) -> Tensor:
        """Weight of the output layer, this rank's rows: [vocab / tp, h]."""
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return self.output_layer.weight

    def attention_layers(self) -> list[DMCSelfAttention]:
        """Attention modules of this stage, in layer order."""
        return [layer.self_attention for layer in self.decoder.layers]

    def freeze_base(self) -> None:
        """Let adapters be all that is trained. Comes before Megatron's wrappers, which make room for gradients."""
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(is_adapter(name))
        self.base_frozen = True

    def zero_decision_neurons(self) -> None:
        """Set the decision neuron's weights to exactly 0 in every layer: the end of zero_out."""
        for attention in self.attention_layers():
            attention.zero_decision_neurons()
