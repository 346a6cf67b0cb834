"""``torch_dist`` checkpoints that Megatron-LM, Megatron-Bridge or NeMo wrote: no manifest, any layout.

    DIR/latest_checkpointed_iteration.txt, DIR/iter_0000100/{.metadata,metadata.json,common.pt,__0_0.distcp,...}

What is not sharded lies in ``common.pt``, or since 2026 in the checkpoint itself as the object ``common_state``: the
run's ``args`` (an ``argparse.Namespace``), ``checkpoint_version``, ``iteration``. Parameters have the names of
Transformer Engine's layers (norms within the projection behind them); megatron-core writes its local layers under the
same ones. The layers of a parameter are stacked in a first dimension
(``decoder.layers.mlp.linear_fc2.weight``), or stand one by one (``decoder.layers.0.mlp...``), as megatron-core writes
non-homogeneous models and, with ``singleton_local_shards``, all; gate and up are then apart (``linear_fc1.weight_w``,
``_v``). NeMo puts ``module.`` or ``model.`` before every name.

Sources: ``megatron/training/checkpointing.py`` (generate_state_dict, load_args_from_checkpoint),
``megatron/core/dist_checkpointing/serialization.py``, ``megatron/core/transformer/{transformer_block,mlp}.py`` of
github.com/NVIDIA/Megatron-LM, commit d98e8a6 (August 2026) and megatron-core 0.16.1.
"""

import re
from collections import defaultdict
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Optional

from torch.distributed.checkpoint.metadata import BytesStorageMetadata, TensorStorageMetadata

from megatron.dmc.checkpoint import foreign, mapping
from megatron.dmc.checkpoint.fields import read_json
from megatron.dmc.checkpoint.formats import hf
from megatron.dmc.checkpoint.formats.base import Given, Row, Source
from megatron.dmc.checkpoint.formats.megatron.arguments import (
    LOCAL_NAMES,
    Recorded,
    check_zeroed,
    current_iteration,
    describe_source,
    int_arg,
    megatron_objects,
    padded,
    source_of,
    wrong,
)
from megatron.dmc.checkpoint.formats.megatron.run_config import find_run_config, read_run_config
from megatron.dmc.checkpoint.formats.torch_dist.reader import DistReader
from megatron.dmc.checkpoint.manifest import LATEST
from megatron.dmc.checkpoint.mapping import TensorRule
from megatron.dmc.checkpoint.mapping.transforms import Vocabulary
from megatron.dmc.checkpoint.mapping.views import Key
from megatron.dmc.checkpoint.pickled import StandIn, load_lazily
from megatron.dmc.checkpoint.tensors import Concat, Lazy
from megatron.dmc.config import ModelConfig

EMBEDDING = "embedding.word_embeddings.weight"
QKV = "decoder.layers.self_attention.linear_qkv.weight"
COMMON = "common_state/shard_0_1"
"""Object in the checkpoint that newer versions keep in place of ``common.pt``."""
_NOT_THE_MODEL = re.compile(r"(chained_\d+\.)?optimizer|rng_state|rerun_state|.*_extra_state|.*\.inv_freq$")
"""Beginnings of names that are no parameters of the model."""
_HALVES = ("_w", "_v")
"""Endings of gate and up where they are apart."""


def matches(path: Path) -> bool:
    """True for such a checkpoint, a directory of iterations, or NeMo's directory around the weights."""
    found = foreign.foreign_format(path)
    return found is not None and found.option == "--megatron"


def open_model(path: Path, given: Given = Given()) -> Source:
    """The model in a checkpoint of any layout.

    Args:
        path: what --save was, one of its iterations, or a NeMo checkpoint.
    """
    checkpoint = find_directory(path)
    reader = DistReader(checkpoint)
    stored = _stored_names(reader)
    recorded = _recorded(checkpoint, reader, stored)
    tp, pp = (int_arg(recorded.args, f"{x}_model_parallel_size", 1) for x in ("tensor", "pipeline"))
    parameters = partial(_parameters, reader, stored, recorded.rows)
    source = source_of(recorded, given, parameters, f"written by TP {tp} x PP {pp}")
    if source.manifest.stage == "zero_out":
        check_zeroed(source.parameters, source.run.model)
    return source


def describe(path: Path) -> list[Row]:
    """Layout and sizes, and what an import would assume."""
    what = "torch_dist checkpoint of Megatron-LM, Megatron-Bridge or NeMo; needs `import --megatron`"
    return describe_source(open_model(path), what)


# ------------------------------------------------------------------------------------------------- what lies where


def find_directory(path: Path) -> Path:
    """The directory that holds ``.metadata``: ``path``, the iteration in it that is current, or NeMo's weights.

    Raises:
        ValueError: there is none, it cannot be told which one, or it is of another format.
    """
    if not path.is_dir():
        raise ValueError(f"{path} is not a directory; name a Megatron checkpoint directory")
    found = _newest(path)
    if (found / "manifest.json").is_file():
        raise ValueError(f"{found} needs no import: give it to --init-from, or export it with dmc convert export")
    if not (found / foreign.METADATA).is_file():
        other = foreign.import_command(path)
        raise ValueError(other or f"{found} is no torch_dist checkpoint: it has no {foreign.METADATA}")
    _check_backend(found)
    return found


def _newest(path: Path) -> Path:
    if (path / foreign.METADATA).is_file():
        return path
    inside = [path / name for name in foreign.INSIDE if (path / name / foreign.METADATA).is_file()]
    if inside:
        return inside[0]
    if (current := current_iteration(path)) is not None:
        return current
    found = foreign.iterations(path)
    if len(found) > 1:
        raise wrong(path, f"holds {', '.join(p.name for p in found[:5])} and no {LATEST}", "one of them to be named")
    return found[0] if found else path


def _check_backend(checkpoint: Path) -> None:
    path = checkpoint / "metadata.json"
    if not path.is_file():
        raise ValueError(
            f"{checkpoint} has no metadata.json: it was saved as torch_dcp or fsdp_dtensor, which is not supported; "
            "save it as torch_dist (Megatron-LM: --ckpt-convert-format torch_dist)"
        )
    backend = read_json(path).get("sharded_backend")
    if backend != "torch_dist":
        raise wrong(f"{path}: sharded_backend", f"is {backend!r}", "torch_dist")


def _common(checkpoint: Path, reader: DistReader) -> tuple[dict, Path]:
    """What is not sharded, and the file that it lies in."""
    path = checkpoint / "common.pt"
    if path.is_file():
        content = load_lazily(path, allow=megatron_objects)
    elif isinstance(reader.metadata.state_dict_metadata.get(COMMON), BytesStorageMetadata):
        path, offset, length = reader.place(COMMON)
        content = load_lazily(path, offset=offset, length=length, allow=megatron_objects)
        content = content[0] if isinstance(content, list) and content else content
    else:
        return {}, path
    if not isinstance(content, dict):
        raise wrong(path, f"holds a {type(content).__name__}", "a dict")
    return content, path


def _recorded(checkpoint: Path, reader: DistReader, stored: Mapping[str, str]) -> Recorded:
    common, path = _common(checkpoint, reader)
    found, where = common.get("args"), str(path)
    args = found.state if isinstance(found, StandIn) else found
    if not isinstance(args, dict):
        config = find_run_config(checkpoint)
        if config is None:
            raise ValueError(
                f"{checkpoint} does not say which model it holds: {path.name} has no args (Megatron-LM), and there is "
                "no run_config.yaml (Megatron-Bridge) or context/model.yaml (NeMo 2)"
            )
        args, where = read_run_config(config), str(config)
    if common.get("checkpoint_version", 3.0) != 3.0:
        raise wrong(f"{path}: checkpoint_version", f"is {common['checkpoint_version']!r}", "3.0")
    if EMBEDDING not in stored:
        names = ", ".join(sorted(stored)[:3])
        raise wrong(checkpoint, f"holds {names or 'no tensors of a model'}", f"a GPT model, with {EMBEDDING}")
    embedding = reader.get(stored[EMBEDDING])
    iteration = common.get("iteration")
    if not isinstance(iteration, int):
        match = re.fullmatch(r"iter_(\d+)", checkpoint.name)
        iteration = int(match[1]) if match else 0
    return Recorded(
        args=args,
        where=where,
        directory=checkpoint,
        iteration=iteration,
        rows=embedding.shape[0],
        embedding=embedding.name,
        tensor_parallel_size=int_arg(args, "tensor_model_parallel_size", 1),
        dtype=embedding.dtype,
    )


# ------------------------------------------------------------------------------------------------------ parameters


def _stored_names(reader: DistReader) -> dict[str, str]:
    """Name as megatron-core gives it -> name in the checkpoint, of the model's tensors."""
    stored: dict[str, str] = {}
    for name, entry in reader.metadata.state_dict_metadata.items():
        plain = re.sub(r"^((module|model)\.)+", "", name)
        if isinstance(entry, TensorStorageMetadata) and not _NOT_THE_MODEL.match(plain):
            if plain in stored:
                raise wrong(f"{name} in {reader.directory}", f"is {stored[plain]} once more", "one of them")
            stored[plain] = name
    return stored


def _parameters(
    reader: DistReader, stored: Mapping[str, str], rows: int, family: mapping.Family, model: ModelConfig
) -> dict[Key, Lazy]:
    """Parameters in the order of a forward pass, each from wherever it lies.

    Raises:
        ValueError: a parameter is missing, one too many, or of the wrong shape or type; naming it.
    """
    found = _by_layer(reader, stored, model.num_layers)
    _check_sizes(reader, found, model)
    wanted = {(rule.megatron, layer): rule for rule, layer in mapping.in_order(family, model)}
    if missing := [key for key in wanted if key not in found]:
        raise ValueError(f"{reader.directory} lacks {_said(missing)}, which its configuration asks for")
    if extra := [key for key in found if key not in wanted]:
        raise ValueError(
            f"{reader.directory} holds {_said(extra)}, which a model of its configuration has not: it is another "
            "architecture, which is not supported"
        )
    return {key: _checked(found[key], rule, model, rows) for key, rule in wanted.items()}


def _check_sizes(reader: DistReader, found: Mapping[Key, Lazy], model: ModelConfig) -> None:
    """Compare the numbers of layers and heads, before anything is done for each of them."""
    layers = len({layer for _, layer in found if layer is not None})
    if layers != model.num_layers:
        raise wrong(reader.directory, f"holds {layers} layers", f"{model.num_layers} (num_layers)")
    rows = (model.num_attention_heads + 2 * model.kv_heads) * model.head_dim
    qkv = found.get((QKV, 0))
    if qkv is not None and qkv.shape[0] != rows:
        sizes = f"{model.num_attention_heads} query and {model.kv_heads} KV heads of {model.head_dim}"
        raise wrong(qkv.name, f"has {qkv.shape[0]} rows", f"{rows}: {sizes}")


def _said(keys: list[Key]) -> str:
    names = sorted({name for name, _ in keys})
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if names[5:] else "")


def _by_layer(reader: DistReader, stored: Mapping[str, str], num_layers: int) -> dict[Key, Lazy]:
    """(name with stacked layers, layer) -> tensor."""
    found: dict[Key, Lazy] = {}
    halves: dict[Key, dict[str, Lazy]] = defaultdict(dict)
    for plain, name in stored.items():
        match = re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", plain)
        plain = f"decoder.layers.{match[2]}" if match else plain
        half = plain[-2:] if plain.endswith(tuple(f".weight{end}" for end in _HALVES)) else None
        key_name = LOCAL_NAMES.get(plain, plain.removesuffix(half) if half else plain)
        for layer in _layers(reader, name, match, key_name, num_layers):
            tensor = reader.get(name, None if match else layer)
            key: Key = (key_name, layer)
            if half:
                halves[key][half] = tensor
            elif key in found:
                raise wrong(tensor.name, f"in {reader.directory} stands there a second time", "each parameter once")
            else:
                found[key] = tensor
    for (key_name, layer), parts in halves.items():
        if len(parts) == len(_HALVES):
            found[key_name, layer] = Concat([parts[end] for end in _HALVES], key_name)
    return found


def _layers(
    reader: DistReader, name: str, match: Optional[re.Match], key_name: str, num_layers: int
) -> list[Optional[int]]:
    """Layers that a tensor of the checkpoint holds; [None] for one outside the layers."""
    if match:
        return [int(match[1])]
    if not key_name.startswith("decoder.layers."):
        return [None]
    size = reader.metadata.state_dict_metadata[name].size
    if not size or size[0] != num_layers:
        raise wrong(
            f"{name} in {reader.directory}", f"has shape {list(size)}", f"{num_layers} layers in its first dimension"
        )
    return list(range(num_layers))


def _checked(tensor: Lazy, rule: TensorRule, model: ModelConfig, rows: int) -> Lazy:
    """The tensor, with the padding of the vocabulary for any layout. Raises ``ValueError`` for a wrong shape or type"""
    shape, is_vocabulary = list(rule.megatron_shape(model)), isinstance(rule.transform, Vocabulary)
    if is_vocabulary:
        shape[0] = rows
    if list(tensor.shape) != shape:
        raise wrong(tensor.name, f"has shape {list(tensor.shape)}", f"{shape} from its configuration")
    if tensor.dtype not in hf.DTYPES.values():
        raise wrong(tensor.name, f"is of type {tensor.dtype}", f"one of {', '.join(map(str, hf.DTYPES.values()))}")
    return padded(tensor, model) if is_vocabulary else tensor
