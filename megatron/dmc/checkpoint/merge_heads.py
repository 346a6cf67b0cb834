"""Multi-head to grouped-query attention: KV heads mean-pooled in groups (Ainslie et al. 2023, arXiv 2305.13245, section
2.1).

The result needs up-training; it is the baseline that DMC is compared with. Query heads stay as they are: head h of Hq
reads KV head h // (Hq / H), so neighbouring KV heads form a group.
"""

import json
from pathlib import Path
from typing import Optional

import torch
from torch import Tensor

from megatron.dmc.checkpoint import checksums
from megatron.dmc.checkpoint.convert import Progress, announce, writing
from megatron.dmc.checkpoint.formats import hf
from megatron.dmc.checkpoint.manifest import SHARDS_FILE, write_files
from megatron.dmc.checkpoint.staging import staged
from megatron.dmc.checkpoint.tensors import Lazy


class MeanHeads(Lazy):
    """Rows of ``heads`` heads of a key or value projection: each the mean of ``base``'s heads in its group, in fp32."""

    def __init__(self, base: Lazy, heads: int, head_dim: int) -> None:
        self.base, self.d = base, head_dim
        self.group = base.shape[0] // (heads * head_dim)
        assert base.shape[0] == heads * self.group * head_dim
        self.shape, self.dtype, self.name = (heads * head_dim, *base.shape[1:]), base.dtype, base.name

    def read_into(self, out: Tensor, start: int) -> None:
        stop, d = start + out.shape[0], self.d
        for head in range(start // d, -(-stop // d)):
            # Rows a...b of this head, from each head of its group.
            a, b = max(start - head * d, 0), min(stop - head * d, d)
            total = torch.zeros((b - a, *self.shape[1:]), dtype=torch.float32)
            for member in range(head * self.group, (head + 1) * self.group):
                total += self.base.read(member * d + a, member * d + b)
            out[head * d + a - start : head * d + b - start] = total.div_(self.group)


def merge_heads(
    source: str | Path, save: str | Path, kv_heads: int, *, overwrite: bool = False, progress: Optional[Progress] = None
) -> Path:
    """Write a Hugging Face directory with ``kv_heads`` KV heads, streaming.

    Args:
        source: a plain directory with more KV heads, a multiple of ``kv_heads``.
        save: where the result goes; import it, then train it on (``--stage pretrain``).

    Raises:
        ValueError: the number does not divide the model's KV heads, the model has been retrofitted, or anything in the
            source that is missing, damaged or not understood.
    """
    save, progress = Path(save), progress or Progress()
    found = hf.open_model(Path(source))
    model = found.run.model
    if found.is_dmc:
        raise ValueError(
            f"{source} has been retrofitted; heads that decide for themselves have no mean: merge the original"
        )
    if not 1 <= kv_heads < model.kv_heads or model.kv_heads % kv_heads:
        raise ValueError(
            f"kv-heads is {kv_heads}; {source} has {model.kv_heads} KV heads: use a smaller number that divides it"
        )
    ends = tuple(f".self_attn.{x}_proj.{kind}" for x in "kv" for kind in ("weight", "bias"))
    merged = {
        name: MeanHeads(tensor, kv_heads, model.head_dim) if name.endswith(ends) else tensor
        for name, tensor in found.tensors.items()
    }
    config = {**found.config, "num_key_value_heads": kv_heads}
    announce(f"merge {model.kv_heads} KV heads of {source} into {kv_heads} -> {save}", merged, save, progress)
    with writing(save), staged(save, overwrite) as directory:
        crc32 = hf.write_weights(directory, merged, found.weight_map, progress.block)
        (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        own = ("config.json", SHARDS_FILE)
        write_files(directory, {name: content for name, content in found.files.items() if name not in own})
        checksums.write_file(directory, crc32)
    progress.warn()
    return save
