"""Load weights of a Hugging Face directory, plain or exported, block by block into the serving model's tensors."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Optional

import torch
from torch import Tensor

from megatron.dmc.checkpoint import mapping
from megatron.dmc.checkpoint.codes import CodedTensor
from megatron.dmc.checkpoint.fields import Fields
from megatron.dmc.checkpoint.formats import hf
from megatron.dmc.checkpoint.tensors import has_only_finite
from megatron.dmc.config import DMCConfig, ModelConfig
from megatron.dmc.inference.parallel import TensorParallel
from megatron.dmc.kernels.cpu_tuning import empty_in_huge_pages
from megatron.dmc.kernels.state import MAX_EVICT_WINDOW

NEVER = 1e9
"""Decision bias above any logit: a model of stage zero_out marks no token, with the neuron out of attention."""


@dataclass(frozen=True)
class ModelInfo:
    """Configuration of a model directory."""

    path: Path
    model: ModelConfig
    dmc: Optional[DMCConfig]
    """DMC settings; None for a plain model."""
    stage: Optional[str]
    """Stage of the retrofit; None for a plain model."""
    expected_cr: float
    """Tokens per slot that the model was measured, or trained, to reach; 1 when it does not compress. Under method dms
    of tokens that are older than the window.
    """
    dtype: torch.dtype
    """Data type of the weights: the one that config.json names, or that most bytes in the files have."""
    eos: tuple[int, ...]
    """End-of-sequence token ids."""
    quantization: Optional[str] = None
    """How the files quantize the weights, by vLLM's name: gptq, awq, compressed-tensors or gguf; None: not at all."""

    def check_served(self) -> None:
        """Raise ``ValueError`` for a model that only ``megatron.dmc.evaluation`` can run."""
        if self.dmc is not None and self.dmc.evicts and (self.dmc.window or 0) > MAX_EVICT_WINDOW:
            raise ValueError(
                f"{self.path} evicts after {self.dmc.window} tokens (dmc.window in config.json); the engine takes "
                f"windows of method dms up to {MAX_EVICT_WINDOW}"
            )

    @property
    def compresses(self) -> bool:
        """Whether the model makes decisions. (One of stage zero_out never marks a token all the same.)"""
        return self.dmc is not None

    @property
    def decision_bias(self) -> float:
        if self.dmc is None:
            return NEVER
        return self.dmc.decision_bias if self.stage in mapping.COMPRESSED_STAGES else NEVER

    @property
    def window(self) -> Optional[int]:
        """Pooling window W; 1 where nothing is ever pooled, so that nothing is kept for it."""
        return self.dmc.window if self.dmc is not None and self.stage in mapping.COMPRESSED_STAGES else 1


def read_info(directory: hf.HFDirectory) -> ModelInfo:
    """Read a directory's configuration. Raises ``ValueError``, naming key and value, for what the model does not
    compute.
    """
    config = directory.config
    info = describe(directory.path, config, torch.float32)
    family, name = mapping.family_of(config), mapping.model_dtype(config)
    kept = [tensor for name, tensor in directory.tensors.items() if not name.endswith(family.dropped)]
    dtype = getattr(torch, name) if name else hf.main_dtype(kept)
    return replace(info, dtype=dtype, quantization=directory.quantization)


def describe(path: Path, config: dict, dtype: torch.dtype) -> ModelInfo:
    """Configuration of a model by its config.json alone. Raises like :func:`read_info`.

    Args:
        path: the model's directory, for messages and for generation_config.json, if it has one.
        dtype: of the weights.
    """
    block, model = mapping.dmc_block(config), mapping.from_hf_config(config)
    eos = _eos(path, config, model.vocab_size)
    if block is None:
        return ModelInfo(path, model, None, None, 1.0, dtype, eos)
    return ModelInfo(path, model, block.dmc, block.stage, block.expected_cr, dtype, eos)


def _eos(path: Path, config: dict, vocab_size: int) -> tuple[int, ...]:
    """End-of-sequence token ids of generation_config.json, then those of config.json."""
    file, found = path / "generation_config.json", []
    if file.is_file():
        found += Fields(hf.read_json(file), f"{file}: ").token_ids("eos_token_id", vocab_size)
    found += Fields(config, "config.json: ").token_ids("eos_token_id", vocab_size)
    return tuple(dict.fromkeys(found))


class Reader:
    """Reader of tensors, or of a rank's part of them, that checks names, shapes and values on the way."""

    def __init__(
        self,
        directory: hf.HFDirectory,
        info: ModelInfo,
        parallel: TensorParallel,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.parallel, self.dtype, self.device = parallel, dtype, device
        family = mapping.family_of(directory.config)
        self.tensors = hf.model_tensors(directory, family, info.model)
        self.shapes = mapping.hf_shapes(family, info.model)

    def _fill(self, out: Tensor, name: str, rows: slice, columns: slice) -> None:
        """Read part of a tensor block by block, converting each and moving it to the device."""
        lazy = self.tensors[name]
        step = max(1, (32 << 20) // max(1, lazy.row_bytes))
        for start in range(rows.start, rows.stop, step):
            stop = min(start + step, rows.stop)
            block = lazy.read(start, stop)
            if not has_only_finite(block):
                raise ValueError(
                    f"{lazy.name} holds NaN or infinite values (rows {start} to {stop - 1}); copy or export it again"
                )
            out[start - rows.start : stop - rows.start] = block[..., columns] if block.dim() > 1 else block

    def coded(self, name: str) -> Optional[CodedTensor]:
        """A tensor that consists of codes; None for one of numbers."""
        tensor = self.tensors[name]
        return tensor if isinstance(tensor, CodedTensor) else None

    def part(self, name: str, dim: int) -> slice:
        """This rank's part of a dimension of a tensor."""
        return slice(*self.parallel.part(self.shapes[name][dim]))

    def whole(self, name: str) -> Tensor:
        return self.rows([name], lambda n: (0, n))

    def rows(self, names: list[str], part: Optional[Callable[[int], tuple[int, int]]] = None) -> Tensor:
        """Read this rank's rows of each tensor, one below the other, in the model's dtype and on its device."""
        part = part or self.parallel.part
        slices = [slice(*part(self.shapes[name][0])) for name in names]
        total = sum(rows.stop - rows.start for rows in slices)
        out = empty_in_huge_pages((total, *self.shapes[names[0]][1:]), self.dtype, self.device)
        at = 0
        for name, rows in zip(names, slices, strict=True):
            self._fill(out[at : at + rows.stop - rows.start], name, rows, slice(None))
            at += rows.stop - rows.start
        return out

    def columns(self, name: str) -> Tensor:
        """Read this rank's columns of a matrix."""
        rows, total = self.shapes[name]
        start, stop = self.parallel.part(total)
        out = empty_in_huge_pages((rows, stop - start), self.dtype, self.device)
        self._fill(out, name, slice(0, rows), slice(start, stop))
        return out


def dtype_of(name: str | torch.dtype, info: ModelInfo, device: torch.device) -> torch.dtype:
    """Data type of a name. "auto" is the model's own, but fp32 in place of fp16 on CPUs: few compute in fp16."""
    if isinstance(name, torch.dtype):
        return name
    known: dict[str, Any] = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name == "auto":
        return torch.float32 if device.type == "cpu" and info.dtype == torch.float16 else info.dtype
    if name not in known:
        raise ValueError(f"dtype is {name!r}; use auto, {', '.join(known)}")
    return known[name]
