"""Settings of the engine. Names are vLLM's where a concept is the same."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Optional

import torch

from megatron.dmc.checkpoint.formats import adapter, hf
from megatron.dmc.checkpoint.formats.base import Given
from megatron.dmc.config import ModelConfig
from megatron.dmc.inference import dummy
from megatron.dmc.inference.cache import page_bytes, row_bytes
from megatron.dmc.inference.methods import method_of
from megatron.dmc.inference.quantization import Method, Quantization
from megatron.dmc.inference.weights import ModelInfo

KV_CACHE_DTYPES: dict[str, Optional[torch.dtype]] = {"auto": None, "int8": torch.int8, "fp8_e4m3": torch.float8_e4m3fn}
"""Data type of the pages by the name of ``kv_cache_dtype``; None: the model's."""


@dataclass(frozen=True)
class EngineConfig:
    """Settings of an engine. ``None`` is chosen from the model and the machine."""

    dtype: str | torch.dtype = "auto"
    """Data type of weights and activations: auto (that of the files), float32, bfloat16 or float16."""
    quantization: Optional[Method] = None
    """Type that the weights of the linear layers are rounded to at load, on a CPU: int8, or int4 with the output layer
    in int8. dtype auto is bfloat16 then. Default: none; weights that are quantized in their files stay as they are."""
    quantization_group_size: int = 32
    """Inputs that share a scale under quantization int4: 32, 64 or 128. More take less memory and lose more."""
    load_format: str = "auto"
    """Source of the weights. auto: the model's directory; dummy: random weights, for which config.json is enough."""
    adapter: Optional[str] = field(default=None, metadata={"metavar": "DIR"})
    """Directory of a DMS model's adapters (dmc convert export --adapter-only) to put on the model, which must be their
    base."""
    decision_about: Optional[Literal["previous", "self"]] = None
    """Token that the decisions of another program's DMS model are about. Default: the one before for NVIDIA's models,
    the token itself for FastDMS's."""
    kv_cache_dtype: Literal["auto", "int8", "fp8_e4m3"] = "auto"
    """Data type of the KV cache: auto (that of the model), or 8 bits with a scale for each key and value of every head:
    int8 or fp8_e4m3."""
    device: str = "auto"
    """Device to run on: auto (a GPU where there is one), cpu or cuda."""
    tensor_parallel_size: int = 1
    """Tensor parallel size: ranks that share every layer, by KV heads."""
    max_model_len: Optional[int] = None
    """Context length, prompt and completion together, in tokens. Default: the model's."""
    max_num_seqs: Optional[int] = None
    """Largest number of sequences that run at a time. Default: 256 on a GPU, 32 on a CPU, fewer where memory is
    short."""
    max_num_batched_tokens: Optional[int] = None
    """Largest number of tokens in one step. Default: 2048; fewer let sequences that decode wait less for prompts."""
    block_size: int = 16
    """Slots per page of the KV cache: 16, 32 or 64."""
    num_pages: Optional[int] = None
    """Pages in the pool of each rank; a page belongs to one KV head. Default: as many as fit kv_cache_memory_bytes."""
    kv_cache_memory_bytes: Optional[int] = None
    """Bytes of the KV cache on each rank, with its tables. Default: on a GPU what gpu_memory_utilization leaves, on a
    CPU at most 4 GiB and half of what is free; never more than max_num_seqs of the longest sequences need."""
    gpu_memory_utilization: float = 0.9
    """Fraction of a GPU's memory that the engine may use."""
    enforce_eager: bool = False
    """Run without CUDA graphs, which take seconds at the start and some memory, and make every decode step faster."""
    async_scheduling: Optional[bool] = None
    """Schedule and launch the next step while the results of the one before are on their way. Default: on a GPU."""
    enable_prefix_caching: bool = True
    """Keep the cache of prompts and completions, for requests that begin like them; completions of one request share
    its prompt."""
    max_prefix_snapshots: Optional[int] = None
    """Rows of the prefix cache besides those of max_num_seqs, which serve it too while they are idle. Default: as many
    as max_num_seqs, but at least 32, in at most a thirty-second of the memory."""
    prefix_cache_min_tokens: int = 32
    """Tokens of the shortest prefix that is kept."""
    max_logprobs: int = 100
    """Most likely tokens whose log-probabilities a request may ask for at each position; -1: no bound."""
    seed: int = 0
    """Seed of sampling, for requests that have none."""

    def __post_init__(self) -> None:
        for name in ("tensor_parallel_size", "max_model_len", "max_num_seqs", "max_num_batched_tokens", "num_pages"):
            self._check_integer(name, 1)
        for name in ("block_size", "kv_cache_memory_bytes", "prefix_cache_min_tokens"):
            self._check_integer(name, 1)
        self._check_integer("max_prefix_snapshots", 0)
        self._check_integer("max_logprobs", -1)
        self.weight_quantization()
        if self.load_format not in dummy.LOAD_FORMATS:
            raise ValueError(f"load_format is {self.load_format!r}; use {' or '.join(dummy.LOAD_FORMATS)}")
        if self.kv_cache_dtype not in KV_CACHE_DTYPES:
            raise ValueError(f"kv_cache_dtype is {self.kv_cache_dtype!r}; use {', '.join(KV_CACHE_DTYPES)}")
        if self.load_format == "dummy" and self.adapter is not None:
            raise ValueError(f"adapter is {self.adapter!r} with load_format dummy; adapters need their base's weights")
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ValueError(
                f"gpu_memory_utilization is {self.gpu_memory_utilization!r}; it must be above 0 and at most 1"
            )

    def _check_integer(self, name: str, low: int) -> None:
        value = getattr(self, name)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < low):
            raise ValueError(f"{name} is {value!r}; it must be an integer, at least {low}")

    def kv_dtype(self) -> Optional[torch.dtype]:
        """Data type of a quantized cache's pages; None for the model's."""
        return KV_CACHE_DTYPES[self.kv_cache_dtype]

    def weight_quantization(self) -> Optional[Quantization]:
        """How the weights are quantized; None for not at all. Raises ``ValueError`` for an unknown way."""
        if self.quantization is None:
            return None
        return Quantization(self.quantization, self.quantization_group_size)

    def open_directory(self, path: str | Path) -> hf.HFDirectory:
        """Open the model to run: with its adapters, or with random weights.

        Raises:
            ValueError: a model directory that is wrong, by file or key.
        """
        if self.load_format == "dummy":
            return dummy.open_directory(path)
        return adapter.open_directory(path, self.adapter, Given(decision_about=self.decision_about))

    def torch_device(self) -> torch.device:
        """Device of this rank. Raises ``ValueError`` when there is none of the kind."""
        if self.device == "auto":
            return self._of_this_rank(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        try:
            device = torch.device(self.device)
        except RuntimeError as error:
            raise ValueError(f"device is {self.device!r}; use auto, cpu or cuda") from error
        if device.type == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"device is {self.device!r}, and no GPU can be used here; use cpu")
        return self._of_this_rank(device)

    def _of_this_rank(self, device: torch.device) -> torch.device:
        """The GPU of this process among those that torchrun has started."""
        if device.type == "cuda" and device.index is None and self.tensor_parallel_size > 1:
            return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        return device


@dataclass(frozen=True)
class Sizes:
    """Sizes of a running engine, chosen where its settings were None."""

    max_model_len: int
    max_num_seqs: int
    max_prefix_snapshots: int
    max_num_batched_tokens: int
    num_pages: int
    page_bytes: int
    row_bytes: int


def _available_bytes(config: EngineConfig, device: torch.device) -> int:
    if config.kv_cache_memory_bytes is not None:
        return config.kv_cache_memory_bytes
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return max(0, free - int((1 - config.gpu_memory_utilization) * total))
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min(4 << 30, free // 2)


def _rows(config: EngineConfig, device: torch.device, each: int, available: int, tokens: int) -> int:
    """Rows of the cache: ``max_num_seqs``, or as many as have tables and rings in an eighth of the memory."""
    if config.max_num_seqs is not None:
        return config.max_num_seqs
    most = 256 if device.type == "cuda" else 32
    return max(1, min(most, tokens, available // 8 // each)) if config.num_pages is None else min(most, tokens)


def _snapshots(config: EngineConfig, rows: int, each: int, available: int) -> int:
    """Rows of the cache for the prefix cache alone."""
    if not config.enable_prefix_caching:
        return 0
    if config.max_prefix_snapshots is not None:
        return config.max_prefix_snapshots
    wanted = max(rows, 32)
    return wanted if config.num_pages is not None else min(wanted, available // 32 // each)


def resolve(config: EngineConfig, info: ModelInfo, dtype: torch.dtype, device: torch.device) -> Sizes:
    """Choose sizes for a model on this machine.

    Raises:
        ValueError: a context longer than the model's, or a memory without room for one page per head.
    """
    model: ModelConfig = info.model
    longest = config.max_model_len or model.max_position_embeddings
    if longest > model.max_position_embeddings:
        raise ValueError(f"max_model_len is {longest}; the model has {model.max_position_embeddings} positions")
    tokens = config.max_num_batched_tokens or 2048
    heads = model.num_layers * model.kv_heads // config.tensor_parallel_size
    method = method_of(info)
    own = method.head_bytes(model.head_dim, config.block_size, dtype)
    per_row = row_bytes(heads, longest, config.block_size, own)
    if config.enable_prefix_caching:
        per_row += 4 * model.vocab_size  # the logits of a snapshot
    per_page = page_bytes(config.block_size, model.head_dim, dtype, config.kv_dtype())
    available = _available_bytes(config, device)
    rows = _rows(config, device, per_row, available, tokens)
    if tokens < rows:
        raise ValueError(
            f"max_num_batched_tokens is {tokens}, less than max_num_seqs {rows}; every sequence needs one per step"
        )
    snapshots = _snapshots(config, rows, per_row, available)
    tables = (rows + snapshots) * per_row
    pages = config.num_pages or (available - tables) // (per_page + 8)
    if pages < heads:
        needed = heads * (per_page + 8) + tables
        raise ValueError(
            f"the cache would have {max(0, pages)} pages, and the {heads} heads of all layers take one each for a "
            f"first token; give kv_cache_memory_bytes {needed} or more"
        )
    most = rows * heads * method.most_pages(longest, config.block_size)
    return Sizes(longest, rows, snapshots, tokens, min(pages, most), per_page, per_row)
