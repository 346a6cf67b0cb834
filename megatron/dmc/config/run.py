"""The whole configuration of a run, and the checks that need two sections to see."""

import dataclasses
from dataclasses import dataclass, field
from typing import Optional, Self

from megatron.dmc.config.checks import require
from megatron.dmc.config.files import FileConfig, build
from megatron.dmc.config.model import DMCConfig, ModelConfig
from megatron.dmc.config.stage import COMPRESSING, OptimizerConfig, StageConfig
from megatron.dmc.config.training import DataConfig, ParallelConfig, TrainingConfig


@dataclass
class RunConfig(FileConfig):
    """Everything a training run is made of. The resolved one is saved with every checkpoint."""

    model: ModelConfig = field(default_factory=ModelConfig)
    dmc: DMCConfig = field(default_factory=DMCConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    stage: StageConfig = field(default_factory=StageConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)

    def check(self, world_size: Optional[int] = None) -> None:
        """Raise ``ValueError`` for a wrong value or combination. ``world_size``: processes, when known."""
        for section in dataclasses.fields(self):
            getattr(self, section.name).check()
        self._check_adapter()
        self._check_layout()
        self._check_sequence()
        if world_size is not None:
            self._check_world(world_size)

    def _check_adapter(self) -> None:
        source, stage = self.dmc.decision_source, self.stage.stage
        require(
            source != "adapter" or stage in COMPRESSING,
            f"stage {stage} has nothing to do with decision_source adapter, which takes no channel from attention: "
            "start calibrate or retrofit from the imported model",
        )
        self._check_calibrate()
        require(
            source == "adapter" or not self.training.freeze_base,
            f"freeze_base trains adapters only, and decision_source is {source}; set method dms and decision_source "
            "adapter, or train all weights",
        )

        channels = self.model.head_dim
        require(
            not self.dmc.evicts or source == "key" or channels <= 248,
            f"head dimension {channels} with decision_source {source}: attention kernels take 256 channels, eight of "
            "which the mask of marked tokens needs; use decision_source key",
        )

    def _check_calibrate(self) -> None:
        if self.stage.stage != "calibrate":
            return
        require(
            self.dmc.decision_source == "adapter" and self.training.freeze_base,
            "stage calibrate fits the adapters of a frozen model; set method dms, decision_source adapter and "
            "freeze_base",
        )
        length, window = self.data.seq_length, self.dmc.window or 0
        require(
            length >= 4 * (window + 1),
            f"seq_length {length} is too short to calibrate a window of {window} tokens: what a token is worth is "
            f"measured beyond its window; use at least {4 * (window + 1)} tokens",
        )

    def _check_layout(self) -> None:
        m, p = self.model, self.parallel
        tp, chunks = p.tensor_model_parallel_size, self._chunks()
        require(
            tp <= m.kv_heads,
            f"tensor_model_parallel_size {tp} exceeds the {m.kv_heads} KV heads (num_query_groups); a decision belongs "
            f"to one KV head, so use at most {m.kv_heads}",
        )
        for name, value in (
            ("num_attention_heads", m.num_attention_heads),
            ("num_query_groups", m.kv_heads),
            ("ffn_hidden_size", m.ffn_hidden_size),
            ("padded vocabulary", m.padded_vocab_size),
        ):
            require(value % tp == 0, f"{name} {value} is not divisible by tensor_model_parallel_size {tp}")
        require(
            m.num_layers % chunks == 0,
            f"num_layers {m.num_layers} is not divisible by the {chunks} pipeline chunks "
            "(pipeline_model_parallel_size x virtual_pipeline_model_parallel_size)",
        )

    def _check_sequence(self) -> None:
        length, most = self.data.seq_length, self.model.max_position_embeddings
        tp = self.parallel.tensor_model_parallel_size
        require(length <= most, f"seq_length {length} exceeds max_position_embeddings {most}; shorten the sequences")
        require(
            not self.parallel.sequence_parallel or length % tp == 0,
            f"seq_length {length} is not divisible by tensor_model_parallel_size {tp}, which sequence_parallel needs",
        )

    def _check_world(self, world_size: int) -> None:
        p, t = self.parallel, self.training
        tp, pp = p.tensor_model_parallel_size, p.pipeline_model_parallel_size
        require(
            world_size % (tp * pp) == 0,
            f"world size {world_size} is not divisible by tensor x pipeline parallel size {tp} x {pp}",
        )
        dp = world_size // (tp * pp)
        require(
            t.global_batch_size % (t.micro_batch_size * dp) == 0,
            f"global_batch_size {t.global_batch_size} is not divisible by "
            f"micro_batch_size {t.micro_batch_size} x data parallel size {dp}",
        )
        micro_batches = t.global_batch_size // (t.micro_batch_size * dp)
        require(
            self._chunks() == pp or micro_batches % pp == 0,
            f"{micro_batches} micro-batches per step are not divisible by pipeline_model_parallel_size {pp}, "
            "which the interleaved schedule needs",
        )

    def _chunks(self) -> int:
        p = self.parallel
        return p.pipeline_model_parallel_size * (p.virtual_pipeline_model_parallel_size or 1)

    @classmethod
    def from_dict(cls, data: dict) -> Self:
        """Build from nested dicts. Unknown sections and keys raise ``ValueError`` with their names."""
        return build(cls, data)
