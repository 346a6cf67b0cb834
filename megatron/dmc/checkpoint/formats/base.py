"""The interface of a format, the record that every format opens a model as, and what descriptions share."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional, Protocol

import torch

from megatron.dmc.checkpoint import mapping
from megatron.dmc.checkpoint.manifest import Manifest
from megatron.dmc.checkpoint.mapping.views import Key
from megatron.dmc.checkpoint.tensors import Lazy
from megatron.dmc.config import DMCConfig, ModelConfig, RunConfig

Row = tuple[str, Any]
"""One line of a description: (name, value); a line without a value is left out."""


@dataclass
class Source:
    """A model as conversion sees it, whatever its format is. None of its tensors has been read yet."""

    path: Path
    kind: str
    """Family and what is particular, for messages."""
    family: mapping.Family
    config: dict
    """``config.json``: of the plain family, or with a ``dmc`` block."""
    run: RunConfig
    manifest: Manifest
    tensors: dict[str, Lazy]
    """Hugging Face name -> tensor."""
    parameters: dict[Key, Lazy]
    """(Megatron name, layer) -> parameter, in the order of a forward pass."""
    weight_map: dict[str, str]
    """Hugging Face name -> file of an exported directory."""
    files: dict[str, bytes] = field(default_factory=dict)
    """Small files that a checkpoint carries in ``hf/``: tokenizer, configuration."""
    notes: list[str] = field(default_factory=list)
    """Remarks for the user: what was assumed or left out."""

    @property
    def is_dmc(self) -> bool:
        return "dmc" in self.config


@dataclass(frozen=True)
class Given:
    """Facts that the caller knows and that a format's files may leave out. None: take it from the files."""

    vocab_size: Optional[int] = None
    """Rows of the vocabulary without padding."""
    target_cr: Optional[float] = None
    """Compression ratio that a DMC or DMS model was trained to."""
    dtype: Optional[torch.dtype] = None
    """Type that the weights of a GGUF file are read as."""
    decision_about: Optional[str] = None
    """Token that the decisions of another program's DMS model are about: previous or self."""


class Format(Protocol):
    """A format: a module with these functions, entered in ``registry.FORMATS``."""

    def matches(self, path: Path) -> bool:
        """True for a directory of this format. Goes by names of files; reads none."""

    def open_model(self, path: Path, given: Given = Given()) -> Source:
        """The model in a directory.

        Raises:
            ValueError: anything that is missing, damaged, unsafe or not understood, by file and name.
        """

    def describe(self, path: Path) -> list[Row]:
        """Description of a directory. Raises ``ValueError`` as :meth:`open_model` does."""


def imported_run(model: ModelConfig, dmc: DMCConfig, manifest: Manifest) -> RunConfig:
    """Configuration that goes with imported weights; of training it says only what later stages ask for."""
    run = RunConfig(model=model, dmc=dmc)
    run.stage.stage, run.stage.train_iters = "pretrain", 1
    if manifest.stage in mapping.COMPRESSED_STAGES:
        run.stage.stage, run.stage.target_cr = manifest.stage, manifest.target_cr  # type: ignore[assignment]
    run.data.seq_length = min(run.data.seq_length, model.max_position_embeddings)
    return run


def compare_names(
    found: Iterable[str], expected: Iterable[str], where: str, extra: str = "that its configuration does not know"
) -> None:
    """Raise ``ValueError`` naming what is missing from ``where``, or too much in it, which ``extra`` says it is."""
    found, expected = set(found), set(expected)
    for names, verb, what in (
        (expected - found, "lacks", "that its configuration asks for"),
        (found - expected, "has", extra),
    ):
        if names:
            some = ", ".join(sorted(names)[:5]) + (", ..." if len(names) > 5 else "")
            raise ValueError(f"{where} {verb} {len(names)} tensors {what}: {some}")


# ------------------------------------------------------------------------------------------------------ descriptions


def lines(rows: Iterable[Row]) -> str:
    """Rows as aligned text; one without a name stands on a line of its own."""
    kept = [(name, value) for name, value in rows if value]
    width = max(len(name) for name, _ in kept)
    return "\n".join(f"{name:<{width}}  {value}" if name else str(value) for name, value in kept)


def model_rows(model: ModelConfig) -> list[Row]:
    """Sizes and switches of a model."""
    switches = [name for name in ("add_qkv_bias", "qk_layernorm") if getattr(model, name)]
    if not model.untie_embeddings_and_output_weights:
        switches.append("tied embeddings")
    scaling = model.rope_scaling
    positions = f"{model.max_position_embeddings}, rope base {model.rotary_base:g}"
    if scaling:
        positions += f", {scaling['rope_type']} scaling x{scaling['factor']:g}"
    sizes = (
        f"{model.num_layers} layers, hidden {model.hidden_size}, ffn {model.ffn_hidden_size}, "
        f"{model.num_attention_heads} query and {model.kv_heads} KV heads of {model.head_dim}, vocabulary "
        f"{model.vocab_size}"
    )
    return [("sizes", sizes), ("positions", positions), ("switches", ", ".join(switches))]


def weight_row(tensors: Iterable[Lazy]) -> Row:
    """Count, parameters, bytes and types of tensors."""
    tensors = list(tensors)
    nbytes = sum(t.nbytes for t in tensors)
    elements = sum(t.nbytes // t.dtype.itemsize for t in tensors)
    types = Counter(str(t.dtype).removeprefix("torch.") for t in tensors)
    return ("weights", f"{len(tensors)} tensors, {count(elements)} parameters, {nbytes:,} bytes, {', '.join(types)}")


def count(parameters: int) -> str:
    """Number of parameters for people."""
    return f"{parameters / 1e9:.2f} billion" if parameters >= 1e8 else f"{parameters:,}"


def decision_rows(dmc: DMCConfig) -> list[Row]:
    """How a retrofitted model decides, and what becomes of a marked token."""
    if not dmc.evicts:
        return [("decisions", f"bias {dmc.decision_bias:g}, window {dmc.window or 'unbounded'}")]
    method = f"dms: marked tokens are evicted {dmc.window} tokens later"
    return [("method", method), ("decisions", decision_text(dmc))]


def decision_text(dmc: DMCConfig) -> str:
    """Where the decisions of method dms come from, and about what."""
    about = "the token itself" if dmc.decision_about == "self" else "the token before"
    numbers = f"scale {dmc.decision_scale:g}, bias {dmc.decision_bias:g}"
    return f"{dmc.decision_source}, per {dmc.decision_per}, about {about}, {numbers}"


def cr_row(said: Mapping[str, Any]) -> Row:
    """Compression ratio from ``target_cr`` and ``measured_cr``; without a value for a model that does not compress."""
    target, measured = said.get("target_cr"), said.get("measured_cr")
    text = f"target {target:g}" + (f", measured {measured:.2f}" if measured else "") if target else ""
    return ("compression", None if target == 1.0 else text)
