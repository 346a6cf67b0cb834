"""One rank's file in Megatron's older format, ``model_optim_rng.pt``: opened, checked, taken apart."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron.dmc.checkpoint.formats.megatron.arguments import int_arg, megatron_objects, wrong
from megatron.dmc.checkpoint.pickled import StandIn, load_lazily
from megatron.dmc.checkpoint.tensors import Lazy

FILE = "model_optim_rng.pt"


@dataclass
class RankFile:
    """One ``model_optim_rng.pt``: its model chunks, local name -> tensor, without extra state and
    ``module.`` prefixes.
    """

    path: Path
    args: dict[str, Any]
    iteration: int
    chunks: list[dict[str, Lazy]]

    @property
    def layout(self) -> tuple[int, int, int]:
        """Tensor, pipeline and virtual pipeline parallel size."""
        tensor, pipeline, virtual = (
            int_arg(self.args, f"{x}_model_parallel_size", 1) for x in ("tensor", "pipeline", "virtual_pipeline")
        )
        return tensor, pipeline, virtual


def read_rank_file(path: Path) -> RankFile:
    """Open one file of Megatron's. Raises ``ValueError``: see :func:`load_lazily`; or it is no such file, or of another
    version.
    """
    if not path.is_file():
        raise ValueError(f"{path} is missing; copy it again")
    content = load_lazily(path, allow=megatron_objects)
    found = content.get("args") if isinstance(content, dict) else None
    args = found.state if isinstance(found, StandIn) else found
    if not isinstance(args, dict):
        keys = f"a dict of {sorted(map(str, content))[:8]}" if isinstance(content, dict) else type(content).__name__
        raise wrong(path, f"holds {keys}", "a dict with args, the arguments of the run that saved it, and model")
    if odd := [name for name, value in args.items() if isinstance(value, Tensor) or not isinstance(name, str)]:
        raise wrong(path, f"args.{odd[0]} is a tensor", "plain values")
    if content.get("checkpoint_version") != 3.0:
        raise wrong(
            f"{path}: checkpoint_version",
            f"is {content.get('checkpoint_version')!r}",
            "3.0 (older ones order the attention heads differently)",
        )
    file = RankFile(path, args, int_arg(content, "iteration", 0), [])
    virtual = file.layout[2]
    keys = ["model"] if virtual == 1 else [f"model{i}" for i in range(virtual)]
    models = sorted(str(k) for k in content if re.fullmatch(r"model\d*", str(k)))
    if models != sorted(keys):
        raise wrong(
            path,
            f"holds {', '.join(models) or 'no model'}",
            f"{', '.join(keys)} (args.virtual_pipeline_model_parallel_size is {virtual})",
        )
    file.chunks = [_read_chunk(content[key], path, key) for key in keys]
    return file


def _read_chunk(state: Any, path: Path, key: str) -> dict[str, Lazy]:
    if not isinstance(state, dict) or any(isinstance(value, dict) for value in state.values()):
        raise wrong(
            f"{path}: {key}",
            "is no flat state dict",
            "Megatron Core's names (decoder.layers.0.mlp.linear_fc1.weight); "
            "older models must go through tools/checkpoint of Megatron-LM first",
        )
    result: dict[str, Lazy] = {}
    for full, tensor in state.items():
        name = re.sub(r"^(module\.)+", "", str(full))
        if "_extra_state" in name or name.endswith(".inv_freq"):
            continue
        if not isinstance(tensor, Lazy):
            raise wrong(f"{full} in {path}", f"is {tensor!r}", "a dense tensor")
        tensor.name = f"{name} in {path}"
        result[name] = tensor
    return result
