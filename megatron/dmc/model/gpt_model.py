"""GPTModel with DMC attention, whose last stage also returns the slots that the whole model kept."""

from __future__ import annotations

from typing import Optional

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import reduce_from_tensor_model_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron.dmc.config import DMCConfig, ModelConfig
from megatron.dmc.model.attention import DMCSelfAttention, DMCStep
from megatron.dmc.model.carry import read_count, write_count
from megatron.dmc.model.distill import Distillation, distillation_loss
from megatron.dmc.model.layer_specs import get_dmc_block_spec
from megatron.dmc.ops import rotary_frequencies


class DMCGPTModel(GPTModel):
    """A Llama-family ``GPTModel`` for every stage of the retrofit.

    Args:
        config: Megatron's configuration, from :func:`megatron.dmc.training.model.transformer_config`.
        model: sizes and family switches.
        dmc: bias, window, temperature.
        carry: count slots through the decoder. True for the compressing stages: the hidden state has one row more
            than there are tokens (pass ``seq_length + tp`` to the schedule under sequence parallelism, else + 1), and
            the last stage returns (losses or logits, kept).
        transformer_impl: "auto", "local", "transformer_engine".
    """

    def __init__(
        self,
        config: TransformerConfig,
        model: ModelConfig,
        dmc: DMCConfig,
        *,
        carry: bool,
        transformer_impl: str = "auto",
        pre_process: bool = True,
        post_process: bool = True,
        vp_stage: Optional[int] = None,
        pg_collection: Optional[ProcessGroupCollection] = None,
        parallel_output: bool = True,
    ) -> None:
        super().__init__(
            config=config,
            transformer_layer_spec=get_dmc_block_spec(config, dmc, transformer_impl, carry=carry, vp_stage=vp_stage),
            vocab_size=model.padded_vocab_size,
            max_sequence_length=model.max_position_embeddings,
            pre_process=pre_process,
            post_process=post_process,
            parallel_output=parallel_output,
            share_embeddings_and_output_weights=not model.untie_embeddings_and_output_weights,
            position_embedding_type="rope",
            rotary_base=model.rotary_base,
            pg_collection=pg_collection,
            vp_stage=vp_stage,
        )
        self.carry = carry
        self.distillation: Optional[Distillation] = None
        """Set to train beside a teacher. In training mode the hidden state between stages then has the teacher's rows
        below the student's: pass twice the sequence length, and the carried rows, to the schedule.
        """
        self._teacher_logits: Optional[Tensor] = None
        # megatron-core knows one set of rope-scaling constants; these come from the model's configuration.
        self.rotary_pos_emb.inv_freq = rotary_frequencies(
            model.head_dim, model.rotary_base, model.rope_scaling, device=self.rotary_pos_emb.inv_freq.device
        )

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        labels: Optional[Tensor] = None,
        *,
        step: Optional[DMCStep] = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """One micro-batch through this stage.

        Args:
            input_ids, position_ids, labels: int64 [b, s]; stages that do not need them ignore them.
            step: see :class:`DMCStep`; may be left out in eval mode.

        Returns:
            On the last stage losses fp32 [b, s] with labels, else logits [b, s, vocab / tp]; with ``carry`` a tuple
            of that and the slots kept by the whole model, fp64 [b]. On other stages the hidden state. In training
            beside a teacher the losses are [3, b, s], see :func:`distillation_loss`.
        """
        if not self._distills():
            return self._forward(input_ids, position_ids, labels, step)
        assert self.distillation is not None
        with torch.no_grad():
            beside = self.distillation.teacher(input_ids, position_ids, step=self.distillation.step)
        if not self.post_process:
            return torch.cat((self._forward(input_ids, position_ids, labels, step), beside))
        self._teacher_logits = beside.transpose(0, 1)  # [b, s, vocab / tp] -> [s, b, vocab / tp]
        try:
            return self._forward(input_ids, position_ids, labels, step)
        finally:
            self._teacher_logits = None

    def _distills(self) -> bool:
        return self.distillation is not None and self.training

    def set_input_tensor(self, input_tensor: Tensor | list) -> None:
        """Hidden state of the stage before; see :attr:`distillation`."""
        hidden = input_tensor[0] if isinstance(input_tensor, list) else input_tensor
        if self._distills() and hidden is not None:
            assert self.distillation is not None
            # n rows of the student, the carried row if there is one, n rows of the teacher.
            rows = (hidden.size(0) + int(self.carry)) // 2
            self.distillation.teacher.set_input_tensor(hidden[rows:].detach())
            hidden = hidden[:rows]
        super().set_input_tensor(hidden)

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """labels [b, s], logits [s, b, vocab / tp] -> [b, s], or [3, b, s] beside a teacher."""
        if self._teacher_logits is None:
            return super().compute_language_model_loss(labels, logits)
        assert self.distillation is not None
        d, teacher, self._teacher_logits = self.distillation, self._teacher_logits, None
        losses = distillation_loss(logits, teacher, labels.t(), d.weight, d.temperature, self.pg_collection.tp)
        return losses.transpose(1, 2).contiguous()  # [3, s, b] -> [3, b, s]

    def _forward(self, input_ids: Tensor, position_ids: Tensor, labels: Optional[Tensor], step: Optional[DMCStep]):
        decoder_input = None
        if self.pre_process:
            decoder_input = self.embedding(input_ids=input_ids, position_ids=position_ids)
            if self.carry:
                zero = torch.zeros(decoder_input.size(1), dtype=torch.float64, device=decoder_input.device)
                row = write_count(zero, decoder_input.size(-1), decoder_input.dtype)
                decoder_input = torch.cat((decoder_input, row))
        return super().forward(
            input_ids,
            position_ids,
            attention_mask=None,
            decoder_input=decoder_input,
            labels=labels,
            extra_block_kwargs={"attention_bias": step},
        )

    def _postprocess(self, hidden_states: Tensor, *args, **kwargs):
        if not (self.carry and self.post_process):
            return super()._postprocess(hidden_states, *args, **kwargs)
        # Each tensor-parallel rank has counted its own heads.
        kept = reduce_from_tensor_model_parallel_region(read_count(hidden_states[-1:]), group=self.pg_collection.tp)
        return super()._postprocess(hidden_states[:-1], *args, **kwargs), kept

    def attention_layers(self) -> list[DMCSelfAttention]:
        """Attention modules of this stage, in layer order."""
        return [layer.self_attention for layer in self.decoder.layers]

    def zero_decision_neurons(self) -> None:
        """Take the neuron's weights to exactly 0 in every layer: the end of zero_out."""
        for attention in self.attention_layers():
            attention.zero_decision_neurons()
