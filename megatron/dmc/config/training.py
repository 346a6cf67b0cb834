"""Sections ``parallel``, ``data`` and ``training``: layout, datasets, batches, checkpoints and logging."""

from dataclasses import dataclass, field
from typing import Literal, Optional

from megatron.dmc.config.checks import not_negative, positive, require

DISTILLED_TOKENS = 256
"""Tokens whose logits exist at once in the loss of a run with a teacher. Fewer make slow products, since the output
layer's weight is read for each part."""


@dataclass
class ParallelConfig:
    """How the model is laid out over processes. Data parallelism takes what is left of the world size."""

    tensor_model_parallel_size: int = 1
    """Tensor parallel size: ranks that share every layer. At most the number of KV heads."""
    pipeline_model_parallel_size: int = 1
    """Pipeline parallel size: number of stages that the layers are divided into."""
    virtual_pipeline_model_parallel_size: Optional[int] = None
    """Model chunks per pipeline rank (interleaved schedule). Default: one."""
    sequence_parallel: bool = False
    """Split the residual stream over the tensor-parallel ranks, by sequence."""
    context_parallel_size: int = 1
    """Context parallel size. Only 1 is possible: docs/training.md says why, and what to use for long sequences."""
    use_distributed_optimizer: bool = False
    """Shard optimizer state over data-parallel ranks."""
    overlap_grad_reduce: bool = False
    """Reduce gradients during the backward pass."""
    overlap_param_gather: bool = False
    """Gather parameters during the forward pass; needs the distributed optimizer and overlap_grad_reduce."""
    recompute_granularity: Optional[Literal["full", "selective"]] = None
    """Recomputation of activations. full: whole layers; selective: the modules of recompute_modules. Default: none."""
    recompute_method: Literal["uniform", "block"] = "uniform"
    """Layers that full recomputation recomputes. uniform: all, recompute_num_layers at a time; block: the first
    recompute_num_layers of every model chunk."""
    recompute_num_layers: int = 1
    """Number of layers of recompute_method."""
    recompute_modules: list[str] = field(default_factory=lambda: ["core_attn"])
    """Modules for selective recomputation: core_attn (pooling and attention), mlp."""
    distributed_timeout_minutes: int = 30
    """Minutes after which a collective ends the run. They cover what one rank does while the others wait: index files,
    checkpoints."""
    lost_host_seconds: int = 30
    """Seconds without an answer after which a host is lost and the run ends on all the others. 0: hosts are not
    watched."""

    def check(self) -> None:
        positive(self, "tensor_model_parallel_size", "pipeline_model_parallel_size", "recompute_num_layers")
        positive(self, "distributed_timeout_minutes")
        require(
            self.lost_host_seconds == 0 or self.lost_host_seconds >= 5,
            f"lost_host_seconds is {self.lost_host_seconds}; use at least 5, as networks pause for some seconds, "
            "or 0 to watch nothing",
        )
        self._check_pipeline()
        require(
            self.context_parallel_size == 1,
            f"context_parallel_size is {self.context_parallel_size}; DMC's attention cannot be split over the sequence "
            "(docs/training.md, Layouts): use sequence_parallel and recompute_granularity",
        )
        require(
            not self.sequence_parallel or self.tensor_model_parallel_size > 1,
            "sequence_parallel needs tensor_model_parallel_size > 1",
        )
        require(
            not self.overlap_param_gather or (self.use_distributed_optimizer and self.overlap_grad_reduce),
            "overlap_param_gather needs use_distributed_optimizer and overlap_grad_reduce",
        )
        odd = sorted(set(self.recompute_modules) - {"core_attn", "mlp"})
        require(not odd, f"recompute_modules {odd} are not supported; use core_attn, mlp")

    def _check_pipeline(self) -> None:
        chunks = self.virtual_pipeline_model_parallel_size
        require(chunks is None or chunks >= 1, f"virtual_pipeline_model_parallel_size is {chunks}; use at least 1")
        require(
            chunks in (None, 1) or self.pipeline_model_parallel_size > 1,
            f"virtual_pipeline_model_parallel_size {chunks} needs pipeline_model_parallel_size > 1",
        )


@dataclass
class DataConfig:
    """Megatron indexed datasets, as ``dmc data preprocess`` writes them."""

    data_path: list[str] = field(default_factory=list)
    """Prefixes of training data; or weight prefix weight prefix ... for a blend."""
    valid_data_path: list[str] = field(default_factory=list)
    """Prefixes of validation data. Default: none, and no evaluation."""
    tokenizer: Optional[str] = None
    """Sentencepiece model file or Hugging Face tokenizer directory that made the data, which is checked. Required."""
    seq_length: int = 4096
    """Tokens per sequence."""
    data_cache_path: Optional[str] = None
    """Directory for index files. Default: beside the data."""
    num_workers: int = 0
    """Number of loader processes per rank; 0 loads in the training process."""

    def check(self) -> None:
        positive(self, "seq_length")
        not_negative(self, "num_workers")


@dataclass
class TrainingConfig:
    """Batches, precision, distillation, checkpoints, logging."""

    micro_batch_size: int = 1
    """Sequences per forward pass and data-parallel rank."""
    global_batch_size: int = 1024
    """Sequences per optimizer step, over all ranks."""
    bf16: bool = False
    """Train in bf16, with fp32 main parameters. Otherwise everything is fp32."""
    seed: int = 1234
    """Seed of the initial weights, the order of the data and the decision noise."""
    transformer_impl: Literal["auto", "local", "transformer_engine"] = "auto"
    """Implementation of the layers. auto: Transformer Engine when it is installed and a GPU is there."""
    init_from: Optional[str] = None
    """Checkpoint whose weights the stage starts from. Default: random weights, which only pretrain takes."""
    freeze_base: bool = False
    """Train the decision adapters and nothing else (decision_source adapter). The frozen model is its own teacher, with
    compression off; gradients, optimizer state and checkpoints are the adapters' alone."""
    distill_from: Optional[str] = None
    """Checkpoint of the original model, a teacher whose logits become a part of the loss. Default: no teacher."""
    distill_weight: float = 1.0
    """Weight w in (0, 1] of the teacher: the loss is (1 - w) CE + w T^2 KL(teacher || student)."""
    distill_temperature: float = 1.0
    """Temperature T of both softmaxes in the divergence from the teacher."""
    save: Optional[str] = None
    """Directory of the stage's checkpoints, where it also resumes. Default: nothing is saved."""
    save_interval: Optional[int] = None
    """Steps between checkpoints; the last step is always saved. Default: only the last."""
    keep_checkpoints: Optional[int] = None
    """Number of newest checkpoints that stay under --save. Default: all."""
    save_retain_interval: Optional[int] = None
    """Checkpoints whose iteration is a multiple of this stay for good, besides those of keep_checkpoints. Default: no
    others stay."""
    async_save: bool = False
    """Write checkpoints in the background, while training goes on."""
    verify_checkpoints: bool = True
    """Compare a checkpoint's files with their checksums before it is loaded."""
    log_interval: int = 10
    """Steps between log lines."""
    eval_interval: Optional[int] = None
    """Steps between evaluations. Default: only at the end."""
    eval_iters: int = 10
    """Global batches per evaluation."""
    exit_interval: Optional[int] = None
    """Save and exit when the iteration is a multiple of this (a job's time slice), leaving the stage unfinished.
    Default: never."""
    exit_duration_in_mins: Optional[float] = None
    """Minutes after the job's start (SLURM_JOB_START_TIME; without SLURM, the process's) to save and exit. Default: no
    limit."""
    max_starts_without_step: int = 3
    """Starts in a row that may end before their first step is complete; the next one is refused."""
    tensorboard_dir: Optional[str] = None
    """Directory for TensorBoard logs. Default: no logs."""
    wandb_project: Optional[str] = None
    """Weights & Biases project to log to. Default: none."""

    def check(self) -> None:
        positive(self, "micro_batch_size", "global_batch_size", "log_interval", "eval_iters", "max_starts_without_step")
        positive(self, "save_interval", "keep_checkpoints", "save_retain_interval", "eval_interval", "exit_interval")
        positive(self, "exit_duration_in_mins", "distill_temperature")
        require(
            not (self.freeze_base and self.distill_from),
            f"distill_from is {self.distill_from}, and freeze_base is set: a frozen model is its own teacher; leave "
            "distill_from out",
        )
        require(0 < self.distill_weight <= 1, f"distill_weight is {self.distill_weight}; it must be in (0, 1]")
        require(
            self.save_interval is None or self.save is not None,
            f"save_interval is {self.save_interval}, but save is not set; name the directory for checkpoints",
        )
        require(
            self.save_retain_interval is None or self.keep_checkpoints is not None,
            f"save_retain_interval is {self.save_retain_interval}, but keep_checkpoints is not set: all stay as it is",
        )
