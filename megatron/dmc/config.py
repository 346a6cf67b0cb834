"""Configuration of a run, as dataclasses: what a YAML or JSON file holds and what the command line overrides.

Imports nothing but the standard library, so that a launcher, a scheduler or the serving side can read a configuration
without torch. Every section checks itself (:meth:`check`), :class:`RunConfig` checks what needs two sections to see;
a wrong value raises ``ValueError`` naming the value and the fix, before any memory is taken.
"""

from __future__ import annotations

import dataclasses
import json
import math
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Optional

STAGES = ("pretrain", "zero_out", "retrofit", "finetune")
"""``pretrain`` is plain language modelling (also the control run); the other three are DMC's, in their order."""

PREDECESSORS: dict[str, tuple[str, ...]] = {
    "pretrain": ("none", "import", "pretrain"),
    "zero_out": ("import", "pretrain"),
    "retrofit": ("zero_out", "retrofit"),
    "finetune": ("retrofit",),
}
"""Which stages a stage may be initialised from (``none``: random weights, ``import``: a converted checkpoint)."""


def _require(ok: bool, message: str) -> None:
    if not ok:
        raise ValueError(message)


def _positive(section: Any, *names: str) -> None:
    for name in names:
        value = getattr(section, name)
        _require(value > 0, f"{name} is {value}; it must be positive")


@dataclass
class DMCConfig:
    """Dynamic Memory Compression (arXiv 2403.09636): what is part of the model, at training and at inference."""

    method: Literal["dmc", "dms"] = "dmc"
    """dmc: a marked token is merged into the slot before it. dms: Dynamic Memory Sparsification (arXiv 2506.05345), to
    compare
    with: a marked token is evicted ``window`` tokens later. The engine serves dmc."""

    decision_bias: float = 5.0
    """b: a token merges when its decision logit, key[D-1] - b, is positive. Logits; must match the checkpoint."""

    window: Optional[int] = 12
    """W: tokens that the pooled slot averages over, the newest included. None: the whole segment. For dms: tokens from
    a mark to the eviction (its authors have 256).
    """

    temperature: float = 0.1
    """tau of the Gumbel-sigmoid relaxation in training."""

    importance_epsilon: float = 2.0**-7
    """Added to every importance weight, so that a pooled slot never divides by zero."""

    loss_weight: float = 1.0
    """Weight of the compression loss beside the token-mean language-model loss."""

    def check(self) -> None:
        _require(self.method in ("dmc", "dms"), f"method {self.method!r} is unknown; use dmc or dms")
        _require(
            self.method == "dmc" or self.window is not None,
            "method dms needs a window: tokens from a mark to the eviction",
        )
        _require(
            self.window is None or self.window >= 1, f"window is {self.window}; use at least 1, or null for no window"
        )
        _positive(self, "temperature", "importance_epsilon")
        _require(self.loss_weight >= 0, f"loss_weight is {self.loss_weight}; it must not be negative")


@dataclass
class ModelConfig:
    """A Llama-family decoder: RMSNorm, SwiGLU, RoPE, grouped-query attention. Names are Megatron's."""

    num_layers: int = 32
    hidden_size: int = 4096
    ffn_hidden_size: int = 11008
    num_attention_heads: int = 32
    num_query_groups: Optional[int] = None
    """KV heads. None: as many as attention heads (no GQA)."""
    kv_channels: Optional[int] = None
    """Head dimension D. None: hidden_size / num_attention_heads."""
    vocab_size: int = 32000
    """Rows of the embedding before padding for tensor parallelism."""
    make_vocab_size_divisible_by: int = 128
    """The embedding is padded to a multiple of this, whatever the layout, so that checkpoints fit every layout."""
    max_position_embeddings: int = 4096
    """Longest sequence, in tokens."""
    rotary_base: float = 10000.0
    rope_scaling: Optional[dict] = None
    """None, or Llama 3.1's {"rope_type": "llama3", "factor": ..., "low_freq_factor": ..., "high_freq_factor": ...,
    "original_max_position_embeddings": ...}."""
    norm_epsilon: float = 1e-5
    add_qkv_bias: bool = False
    """Bias on the QKV projection (Qwen 2)."""
    qk_layernorm: bool = False
    """RMSNorm on every query and key head (Qwen 3)."""
    untie_embeddings_and_output_weights: bool = True
    init_method_std: float = 0.02
    """Standard deviation of the initial weights (output projections: divided by sqrt(2 * num_layers))."""

    @property
    def head_dim(self) -> int:
        return self.kv_channels or self.hidden_size // self.num_attention_heads

    @property
    def kv_heads(self) -> int:
        return self.num_query_groups or self.num_attention_heads

    @property
    def padded_vocab_size(self) -> int:
        n = self.make_vocab_size_divisible_by
        return (self.vocab_size + n - 1) // n * n

    def check(self) -> None:
        _positive(
            self,
            "num_layers",
            "hidden_size",
            "ffn_hidden_size",
            "num_attention_heads",
            "vocab_size",
            "max_position_embeddings",
            "make_vocab_size_divisible_by",
            "rotary_base",
            "norm_epsilon",
        )
        _require(
            self.num_query_groups is None or self.num_query_groups > 0,
            f"num_query_groups is {self.num_query_groups}; it must be positive",
        )
        _require(
            self.kv_channels is not None or self.hidden_size % self.num_attention_heads == 0,
            f"hidden_size {self.hidden_size} is not divisible by num_attention_heads {self.num_attention_heads}; "
            "set kv_channels to the head dimension",
        )
        _require(
            self.num_attention_heads % self.kv_heads == 0,
            f"num_attention_heads {self.num_attention_heads} is not divisible by num_query_groups {self.kv_heads}",
        )
        _require(self.head_dim % 8 == 0, f"head dimension {self.head_dim} is not a multiple of 8; set kv_channels")
        if self.rope_scaling is not None:
            known = {"rope_type", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}
            _require(
                self.rope_scaling.get("rope_type") == "llama3",
                f"rope_scaling type {self.rope_scaling.get('rope_type')!r} is unknown; llama3 is supported",
            )
            odd = set(self.rope_scaling) ^ known
            _require(
                not odd, f"rope_scaling has unknown or missing keys {sorted(odd)}; it needs exactly {sorted(known)}"
            )


@dataclass
class ParallelConfig:
    """How the model is laid out over processes. Data parallelism takes what is left of the world size."""

    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    virtual_pipeline_model_parallel_size: Optional[int] = None
    """Model chunks per pipeline rank (interleaved schedule). None: one."""
    sequence_parallel: bool = False
    context_parallel_size: int = 1
    """Only 1: docs/training.md says why, and what to use for long sequences."""
    use_distributed_optimizer: bool = False
    """Shard optimizer state over data-parallel ranks."""
    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = False
    recompute_granularity: Optional[Literal["full", "selective"]] = None
    recompute_method: Literal["uniform", "block"] = "uniform"
    recompute_num_layers: int = 1
    recompute_modules: list[str] = field(default_factory=lambda: ["core_attn"])
    """For selective recomputation: core_attn (pooling and attention), mlp."""
    distributed_timeout_minutes: int = 30
    """A collective that takes longer ends the run. It covers what one rank does while the others wait: index files,
    checkpoints.
    """
    lost_host_seconds: int = 30
    """A host that has not answered for so long ends the run on all the others (host_monitor.py). 0: hosts are not
    watched.
    """

    def check(self) -> None:
        _positive(
            self,
            "tensor_model_parallel_size",
            "pipeline_model_parallel_size",
            "recompute_num_layers",
            "distributed_timeout_minutes",
        )
        _require(
            self.lost_host_seconds == 0 or self.lost_host_seconds >= 5,
            f"lost_host_seconds is {self.lost_host_seconds}; use "
            "at least 5, as networks pause for some seconds, or 0 to watch nothing",
        )
        v = self.virtual_pipeline_model_parallel_size
        _require(v is None or v >= 1, f"virtual_pipeline_model_parallel_size is {v}; use at least 1")
        _require(
            v in (None, 1) or self.pipeline_model_parallel_size > 1,
            f"virtual_pipeline_model_parallel_size {v} needs pipeline_model_parallel_size > 1",
        )
        _require(
            self.context_parallel_size == 1,
            f"context_parallel_size is {self.context_parallel_size}; DMC's attention "
            "cannot be split over the sequence (docs/training.md, Layouts): use sequence_parallel and "
            "recompute_granularity",
        )
        _require(
            not self.sequence_parallel or self.tensor_model_parallel_size > 1,
            "sequence_parallel needs tensor_model_parallel_size > 1",
        )
        _require(
            not self.overlap_param_gather or (self.use_distributed_optimizer and self.overlap_grad_reduce),
            "overlap_param_gather needs use_distributed_optimizer and overlap_grad_reduce",
        )
        odd = set(self.recompute_modules) - {"core_attn", "mlp"}
        _require(not odd, f"recompute_modules {sorted(odd)} are not supported; use core_attn, mlp")


@dataclass
class StageConfig:
    """One stage of the retrofit, or pre-training. Defaults are the authors' for ``retrofit`` to 2x on Llama 2 7B."""

    stage: Literal["pretrain", "zero_out", "retrofit", "finetune"] = "retrofit"
    train_iters: Optional[int] = None
    """Optimizer steps. None: zero_out 250, retrofit |target_cr - start_cr| * iters_per_cr, finetune 2000."""
    target_cr: Optional[float] = None
    """Compression ratio (tokens / slots) at the end. Required by retrofit; finetune keeps its checkpoint's."""
    start_cr: Optional[float] = None
    """Compression ratio at the start of retrofit. None: what the checkpoint was trained to (1 after zero_out)."""
    iters_per_cr: int = 6000
    """Steps per unit of compression ratio in retrofit, when train_iters is not given."""
    decay_fraction: float = 0.8
    """zero_out: the decision neuron reaches zero after this fraction of the stage."""

    def check(self) -> None:
        _require(self.stage in STAGES, f"stage {self.stage!r} is unknown; use one of {', '.join(STAGES)}")
        _positive(self, "iters_per_cr")
        _require(
            self.train_iters is None or self.train_iters > 0, f"train_iters is {self.train_iters}; it must be positive"
        )
        _require(self.stage != "pretrain" or self.train_iters is not None, "stage pretrain needs train_iters")
        for name in ("target_cr", "start_cr"):
            value = getattr(self, name)
            _require(value is None or value >= 1.0, f"{name} is {value}; a compression ratio is at least 1")
        _require(self.stage != "retrofit" or self.target_cr is not None, "stage retrofit needs target_cr, e.g. 4")
        _require(
            self.stage != "retrofit" or self.target_cr != (self.start_cr or 1.0) or self.train_iters is not None,
            f"target_cr {self.target_cr} is what the model has already been trained to; give another, or train_iters",
        )
        _require(
            self.stage in ("retrofit", "finetune") or self.target_cr is None,
            f"stage {self.stage} does not compress; remove target_cr {self.target_cr}",
        )
        _require(0 < self.decay_fraction <= 1, f"decay_fraction is {self.decay_fraction}; it must be in (0, 1]")


@dataclass
class OptimizerConfig:
    """Adam with decoupled weight decay (none on norms and biases), and the learning rate's schedule."""

    lr: float = 3e-5
    min_lr: float = 0.0
    """Where a decaying schedule ends."""
    lr_decay_style: Literal["constant", "cosine", "linear"] = "constant"
    lr_warmup_iters: int = 0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_eps: float = 1e-8
    weight_decay: float = 0.1
    clip_grad: float = 1.0
    """Global gradient norm; 0 turns clipping off."""

    def check(self) -> None:
        _positive(self, "lr", "adam_eps")
        _require(0 <= self.min_lr <= self.lr, f"min_lr {self.min_lr} must lie between 0 and lr {self.lr}")
        for name in ("adam_beta1", "adam_beta2"):
            value = getattr(self, name)
            _require(0 <= value < 1, f"{name} is {value}; it must be in [0, 1)")
        for name in ("weight_decay", "clip_grad"):
            value = getattr(self, name)
            _require(value >= 0, f"{name} is {value}; it must not be negative")
        _require(self.lr_warmup_iters >= 0, f"lr_warmup_iters is {self.lr_warmup_iters}; it must not be negative")
        _require(
            self.lr_decay_style in ("constant", "cosine", "linear"),
            f"lr_decay_style {self.lr_decay_style!r} is unknown; use constant, cosine or linear",
        )


@dataclass
class DataConfig:
    """Megatron indexed datasets, as ``tools/preprocess_data.py`` writes them."""

    data_path: list[str] = field(default_factory=list)
    """Prefixes of training data; or weight prefix weight prefix ... for a blend."""
    valid_data_path: list[str] = field(default_factory=list)
    """Prefixes of validation data; evaluation is off when empty."""
    tokenizer: Optional[str] = None
    """Sentencepiece model file or Hugging Face tokenizer directory. Checked against the data's sidecar."""
    seq_length: int = 4096
    """Tokens per sequence."""
    data_cache_path: Optional[str] = None
    """Where index files go. None: beside the data."""
    num_workers: int = 0
    """Loader processes per rank; 0 loads in the training process."""

    def check(self) -> None:
        _positive(self, "seq_length")
        _require(self.num_workers >= 0, f"num_workers is {self.num_workers}; it must not be negative")


@dataclass
class TrainingConfig:
    """Batches, precision, checkpoints, logging."""

    micro_batch_size: int = 1
    """Sequences per forward pass and data-parallel rank."""
    global_batch_size: int = 1024
    """Sequences per optimizer step, over all ranks."""
    bf16: bool = False
    """bf16 parameters and activations with fp32 main parameters. Otherwise fp32."""
    seed: int = 1234
    """Of the initial weights, the order of the data and the decision noise."""
    transformer_impl: Literal["auto", "local", "transformer_engine"] = "auto"
    """auto: Transformer Engine when it is installed and a GPU is there."""
    init_from: Optional[str] = None
    """Checkpoint that the stage starts from; weights only. --save is where a stage writes and where it resumes."""
    distill_from: Optional[str] = None
    """Checkpoint of the original model, a teacher that stays as it is: its logits become a part of the loss."""
    distill_weight: float = 1.0
    """w in (0, 1]: the language-model loss is (1 - w) CE + w T^2 KL(teacher || student)."""
    distill_temperature: float = 1.0
    """T of both softmaxes in the divergence."""
    save: Optional[str] = None
    save_interval: Optional[int] = None
    """Steps between checkpoints; the last step is always saved. None: only the last."""
    keep_checkpoints: Optional[int] = None
    """How many checkpoints stay under --save, the newest first. None: all."""
    save_retain_interval: Optional[int] = None
    """With keep_checkpoints: those whose iteration is a multiple of this stay too, for good."""
    async_save: bool = False
    """Write checkpoints in the background, while training goes on."""
    verify_checkpoints: bool = True
    """Compare a checkpoint's files with their checksums before it is loaded."""
    log_interval: int = 10
    eval_interval: Optional[int] = None
    """Steps between evaluations. None: only at the end."""
    eval_iters: int = 10
    """Global batches per evaluation."""
    exit_interval: Optional[int] = None
    """Save and exit when the iteration is a multiple of this (a job's time slice), leaving the stage unfinished."""
    exit_duration_in_mins: Optional[float] = None
    """Save and exit this long after the job's start (SLURM_JOB_START_TIME; without SLURM, the process's)."""
    max_starts_without_step: int = 3
    """Refuse to start again when so many starts in a row have ended before their first step was complete."""
    tensorboard_dir: Optional[str] = None
    wandb_project: Optional[str] = None
    """Log to Weights & Biases too, when given."""

    def check(self) -> None:
        _positive(
            self, "micro_batch_size", "global_batch_size", "log_interval", "eval_iters", "max_starts_without_step"
        )
        for name in (
            "save_interval",
            "keep_checkpoints",
            "save_retain_interval",
            "eval_interval",
            "exit_interval",
            "exit_duration_in_mins",
        ):
            value = getattr(self, name)
            _require(value is None or value > 0, f"{name} is {value}; it must be positive")
        _positive(self, "distill_temperature")
        _require(0 < self.distill_weight <= 1, f"distill_weight is {self.distill_weight}; it must be in (0, 1]")
        _require(
            self.save_interval is None or self.save is not None,
            f"save_interval is {self.save_interval}, but save is not set; name the directory for checkpoints",
        )
        _require(
            self.save_retain_interval is None or self.keep_checkpoints is not None,
            f"save_retain_interval is {self.save_retain_interval}, but keep_checkpoints is not set: all stay as it is",
        )


@dataclass
class RunConfig:
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
        m, p, t = self.model, self.parallel, self.training
        tp, pp = p.tensor_model_parallel_size, p.pipeline_model_parallel_size
        chunks = pp * (p.virtual_pipeline_model_parallel_size or 1)
        _require(
            tp <= m.kv_heads,
            f"tensor_model_parallel_size {tp} exceeds the {m.kv_heads} KV heads "
            f"(num_query_groups); a decision belongs to one KV head, so use at most {m.kv_heads}",
        )
        for name, value in (
            ("num_attention_heads", m.num_attention_heads),
            ("num_query_groups", m.kv_heads),
            ("ffn_hidden_size", m.ffn_hidden_size),
            ("padded vocabulary", m.padded_vocab_size),
        ):
            _require(value % tp == 0, f"{name} {value} is not divisible by tensor_model_parallel_size {tp}")
        _require(
            m.num_layers % chunks == 0,
            f"num_layers {m.num_layers} is not divisible by the {chunks} pipeline "
            "chunks (pipeline_model_parallel_size x virtual_pipeline_model_parallel_size)",
        )
        _require(
            self.data.seq_length <= m.max_position_embeddings,
            f"seq_length {self.data.seq_length} exceeds "
            f"max_position_embeddings {m.max_position_embeddings}; shorten the sequences",
        )
        _require(
            not p.sequence_parallel or self.data.seq_length % tp == 0,
            f"seq_length {self.data.seq_length} is "
            f"not divisible by tensor_model_parallel_size {tp}, which sequence_parallel needs",
        )
        if world_size is not None:
            _require(
                world_size % (tp * pp) == 0,
                f"world size {world_size} is not divisible by tensor x pipeline parallel size {tp} x {pp}",
            )
            per_step = t.micro_batch_size * (world_size // (tp * pp))
            _require(
                t.global_batch_size % per_step == 0,
                f"global_batch_size {t.global_batch_size} is not divisible by "
                f"micro_batch_size {t.micro_batch_size} x data parallel size {world_size // (tp * pp)}",
            )
            micro_batches = t.global_batch_size // per_step
            _require(
                chunks == pp or micro_batches % pp == 0,
                f"{micro_batches} micro-batches per step are not "
                f"divisible by pipeline_model_parallel_size {pp}, which the interleaved schedule needs",
            )

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: dict) -> RunConfig:
        """Build from nested dicts. Unknown sections and keys raise ``ValueError`` with their names."""
        return typing.cast(RunConfig, _build(cls, data, ""))


def _build(cls: type, data: dict, where: str) -> Any:
    _require(isinstance(data, dict), f"{where or 'the configuration'} must be a mapping, not {type(data).__name__}")
    hints = typing.get_type_hints(cls)
    unknown = sorted(set(data) - set(hints))
    _require(
        not unknown,
        f"unknown configuration key{'s' * (len(unknown) > 1)} "
        f"{', '.join(where + k for k in unknown)}; known here: {', '.join(sorted(hints))}",
    )
    values = {}
    for key, value in data.items():
        hint = hints[key]
        values[key] = (
            _build(hint, value, f"{where}{key}.")
            if dataclasses.is_dataclass(hint)
            else _coerce(hint, value, where + key)
        )
    return cls(**values)


def _coerce(hint: Any, value: Any, name: str) -> Any:
    """Check a plain value against its annotation; YAML's ``3e-5`` (a string) and ints for floats are taken."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Union:
        if value is None and type(None) in args:
            return None
        return _coerce(next(a for a in args if a is not type(None)), value, name)
    if origin is Literal:
        _require(value in args, f"{name} is {value!r}; use one of {', '.join(map(str, args))}")
        return value
    if origin is list:
        _require(isinstance(value, list), f"{name} is {value!r}; it must be a list")
        return [_coerce(args[0], v, name) for v in value]
    if hint is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        try:
            value = float(value)
        except ValueError:
            raise ValueError(f"{name} is {value!r}; it must be a number") from None
    if hint is float and isinstance(value, float):
        _require(math.isfinite(value), f"{name} is {value}; it must be a finite number")
    _require(
        isinstance(value, hint) and not (hint is int and isinstance(value, bool)),
        f"{name} is {value!r}; it must be of type {hint.__name__}",
    )
    return value


def load_file(path: str | Path) -> dict:
    """Read a YAML or JSON configuration file as nested dicts. Raises ``ValueError`` when it is neither."""
    path = Path(path)
    _require(path.is_file(), f"configuration file {path} does not exist")
    text = path.read_text()
    try:
        if path.suffix == ".json":
            data = json.loads(text)
        else:
            import yaml

            data = yaml.safe_load(text)
    except Exception as error:
        raise ValueError(f"configuration file {path} cannot be read: {' '.join(str(error).split())}") from error
    return data or {}
