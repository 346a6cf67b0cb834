"""Tensors of a GGUF file under transformers' names: codes where the type has them, else dequantized row by row as they
are read.
"""

from collections import Counter
from typing import Any, Optional

import numpy as np
import torch
from torch import Tensor

from megatron.dmc.checkpoint import mapping
from megatron.dmc.checkpoint.codes import CodedTensor
from megatron.dmc.checkpoint.formats.base import compare_names
from megatron.dmc.checkpoint.formats.gguf.blocks import TYPES
from megatron.dmc.checkpoint.formats.gguf.metadata import Metadata
from megatron.dmc.checkpoint.tensors import Lazy

_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_COMPUTED = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
"""Tensors that repeat what the configuration says."""


class GGUFTensor(Lazy):
    """One tensor of a GGUF file, dequantized to ``dtype``.

    Args:
        heads: of a query or key projection in a file of architecture ``llama``. There the rows of a head are stored in
            another order: transformers rotates channel i with channel i + D / 2, llama.cpp rotates neighbours.
    """

    def __init__(self, metadata: Metadata, name: str, dtype: torch.dtype, heads: Optional[int] = None) -> None:
        tensor = metadata.tensors[name]
        self.name = f"{name} in {metadata.path}"
        self.shape = tuple(int(n) for n in reversed(tensor.shape.tolist()))
        self.dtype = dtype
        self._type = tensor.tensor_type
        self._rows = tensor.data  # [rows, bytes or elements of a row], a view of the file
        self._stored = stored_order(self.shape[0], heads) if heads else None

    def stored_rows(self, start: int, stop: int) -> np.ndarray:
        """Rows as they lie in the file."""
        return self._rows[start:stop] if self._stored is None else self._rows[self._stored[start:stop]]

    def read_into(self, out: Tensor, start: int) -> None:
        from gguf import dequantize

        numbers = dequantize(self.stored_rows(start, start + out.shape[0]), self._type)
        out.copy_(torch.from_numpy(np.require(numbers, requirements="CW")).view(out.shape))


class GGUFCodes(CodedTensor):
    """One matrix of a GGUF file whose type is among :data:`blocks.TYPES`. Arguments as :class:`GGUFTensor`."""

    def __init__(self, metadata: Metadata, name: str, dtype: torch.dtype, heads: Optional[int] = None) -> None:
        self._tensor = GGUFTensor(metadata, name, dtype, heads)
        self._type = TYPES[metadata.tensors[name].tensor_type.name]
        self.name, self.shape, self.dtype = self._tensor.name, self._tensor.shape, dtype
        self.layout = self._type.layout

    def _read(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        rows = torch.from_numpy(np.require(self._tensor.stored_rows(start, stop), requirements="CW"))
        codes, scales = self._type.read(rows.view(torch.uint8).unflatten(1, (-1, self._type.nbytes)))
        return codes.flatten(1), scales.flatten(1, 2)


def stored_order(rows: int, heads: int) -> np.ndarray:
    """Row of the file for every row of transformers' projection, [rows]: (head, half, i) stands at (head, i, half)."""
    return np.arange(rows).reshape(heads, rows // heads // 2, 2).swapaxes(1, 2).reshape(-1)


def hf_tensors(
    metadata: Metadata, config: dict[str, Any], dtype: Optional[torch.dtype] = None
) -> tuple[dict[str, Lazy], torch.dtype]:
    """Hugging Face name -> tensor, layer by layer, and the type that they are read as.

    Raises:
        ValueError: a tensor is missing, too much, or of a quantization that the library cannot read, by its name.
    """
    from gguf import MODEL_ARCH, get_tensor_name_map

    model, family = mapping.from_hf_config(config), mapping.family_of(config)
    names = get_tensor_name_map(MODEL_ARCH[metadata.architecture.upper()], model.num_layers)
    wanted = {name: names.get_name(name, (".weight", ".bias")) for name in mapping.hf_shapes(family, model)}
    found, extra = set(metadata.tensors) - set(_COMPUTED), f"that are not supported for {metadata.architecture}"
    compare_names(found, wanted.values(), str(metadata.path), extra)
    _check_types(metadata)
    dtype = dtype or _natural_type(metadata)
    tensors: dict[str, Lazy] = {}
    for name, stored in wanted.items():
        heads = None
        if metadata.architecture == "llama" and name.endswith((".q_proj.weight", ".k_proj.weight")):
            heads = model.num_attention_heads if ".q_proj." in name else model.kv_heads
        coded = metadata.tensors[stored].tensor_type.name in TYPES and len(metadata.tensors[stored].shape) == 2
        tensors[name] = (GGUFCodes if coded else GGUFTensor)(metadata, stored, dtype, heads)
    return tensors, dtype


def stored_types(metadata: Metadata) -> str:
    """Types of the weights in the file, most bytes first."""
    nbytes = Counter()
    for tensor in metadata.tensors.values():
        nbytes[tensor.tensor_type.name] += int(tensor.n_bytes)
    return ", ".join(name for name, _ in nbytes.most_common())


def _natural_type(metadata: Metadata) -> torch.dtype:
    """Type that holds the weights: the matrices' own, or bfloat16 where most bytes are quantized."""
    return _PLAIN.get(stored_types(metadata).split(", ")[0], torch.bfloat16)


def _check_types(metadata: Metadata) -> None:
    """Raise ``ValueError`` for a type of which the library cannot read a row."""
    from gguf import dequantize

    for kind, tensor in {tensor.tensor_type: tensor for tensor in metadata.tensors.values()}.items():
        try:
            dequantize(tensor.data.reshape(-1, tensor.data.shape[-1])[:1], kind)
        except NotImplementedError as error:
            raise ValueError(
                f"{tensor.name} in {metadata.path} is stored as {kind.name}, which the gguf library cannot dequantize"
            ) from error
