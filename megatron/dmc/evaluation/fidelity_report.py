"""Table of a compressed model beside its original: perplexity, KL divergence, agreement, cache. ``dmc eval fidelity``
runs it. Imports no Megatron.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Optional

from megatron.dmc.flags import new_file, number, numbers

if TYPE_CHECKING:  # flags and help need no torch
    from torch import Tensor

    from megatron.dmc.evaluation.fidelity import Fidelity
    from megatron.dmc.evaluation.teacher_forced import TeacherForced


@dataclass(frozen=True)
class FidelityConfig:
    """Settings of a comparison of a compressed model with its original."""

    model: str = field(metadata={"flags": ("model",), "metavar": "MODEL"})
    """Hugging Face directory of the compressed model; with --adapter that of the original."""
    data: list[str] = field(metadata={"nargs": "+", "metavar": "FILE"})
    """Text to measure on, with rows of its own for each file: JSONL files of {"text": ...} lines, whose names end in
    .jsonl or .jsonl.gz, and plain text."""
    adapter: Optional[str] = field(default=None, metadata={"metavar": "DIR"})
    """Directory of a DMS model's adapters (dmc convert export --adapter-only) to put on MODEL, which must be their
    base."""
    base: Optional[str] = field(default=None, metadata={"metavar": "DIR"})
    """Hugging Face directory of the original. Default: MODEL without its adapters; a model that decides by channels of
    its own has none inside."""
    lengths: list[int] = field(
        default_factory=lambda: [512, 2048], metadata={"nargs": None, "type": numbers(int, 2), "metavar": "N,N"}
    )
    """Tokens of the sequences that the text is cut into, such as 512,2048; each length has a row of its own."""
    sequences: int = field(default=4, metadata={"type": number(int, 1), "metavar": "N"})
    """Largest number of sequences of each length from each file."""
    dtype: str = field(default="float32", metadata={"choices": ["auto", "float32", "bfloat16", "float16"]})
    """Data type of weights and activations; auto: that of the files."""
    json: Optional[Path] = field(default=None, metadata={"metavar": "FILE", "type": new_file})
    """File to write with all figures, those of every KV head among them."""
    heat_map: Optional[Path] = field(default=None, metadata={"metavar": "FILE", "type": new_file})
    """PNG file to write: compression ratio by layer and KV head, over all text at the greatest length."""


@dataclass(frozen=True)
class Row:
    """Figures of one text at one length."""

    text: str
    length: int
    """Tokens of each sequence; its first one has no prediction."""
    sequences: int
    base_perplexity: float
    perplexity: float
    ratio: float
    """perplexity / base_perplexity"""
    kld: float
    """Mean Kullback-Leibler divergence of the model's predictions from the original's, KL(original || model), in nats
    per token."""
    kld_stderr: Optional[float]
    """Standard error of ``kld`` over sequences; None for one sequence."""
    agreement: float
    """Share of tokens for which both models find the same next token most likely."""
    cr: float
    """Tokens / slots at the sequences' ends, over all layers, heads and sequences; under DMS the window's tokens are
    among the slots."""
    cr_reads: float
    """Tokens / slots summed over positions: the memory traffic of decoding the sequences."""
    base_kv_bytes_per_token: float
    kv_bytes_per_token: float
    """Keys and values of all layers in bf16, at ``cr``."""
    cr_by_head: list[list[float]]
    """Tokens / slots of each head at the sequences' ends: [layers][KV heads]"""


class Text:
    """A model's tokenizer: token ids of the documents of a file, cut into sequences."""

    def __init__(self, path: str | Path) -> None:
        """Load the tokenizer of a model directory. Raises ``ValueError`` where there is none."""
        from megatron.dmc.inference.text import load_tokenizer

        self._tokenizer = load_tokenizer(path)
        if self._tokenizer is None:
            raise ValueError(f"{path} has no tokenizer files; copy those of the model that it was made from")
        bos = [self._tokenizer.bos_token_id]
        self._bos = bos if self._encode("a", True)[:1] == bos else []

    def _encode(self, text: str, special: bool = False) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=special, verbose=False)

    def sequences(self, path: str, length: int, most: int) -> Tensor:
        """The first sequences of a file, each from one document: int64 [n, length], n at most ``most``.

        Each begins with BOS where the tokenizer puts it before every text by itself, as in inference.

        Raises:
            ValueError: no document is long enough, or the file is no text.
        """
        import torch.nn.functional as F

        from megatron.dmc.evaluation.tasks import windows

        found = windows(map(self._encode, _documents(path)), length - len(self._bos), most, path)
        return F.pad(found, (1, 0), value=self._bos[0]) if self._bos else found


def _documents(path: str) -> Iterable[str]:
    """Texts of a file: of each line in a JSONL file, else of the whole file."""
    from megatron.dmc.training.jsonl import read_texts

    if path.endswith((".jsonl", ".jsonl.gz")):
        return read_texts(path)
    try:
        return [Path(path).read_text(encoding="utf-8")]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no UTF-8 text ({error}); JSONL files have names that end in .jsonl") from None


def row(text: str, found: Fidelity, base: TeacherForced, model: TeacherForced) -> Row:
    """Summarize what was found on one text."""
    from megatron.dmc.planning.estimates import kv_bytes_per_token

    compression, (n, predicted) = found.compression(), found.kld.shape
    loss, base_loss = (-float(x.double().mean()) for x in (found.log_prob, found.base_log_prob))
    kld = found.kld.double().mean(dim=1)
    return Row(
        text=text,
        length=predicted + 1,
        sequences=n,
        base_perplexity=math.exp(base_loss),
        perplexity=math.exp(loss),
        ratio=math.exp(loss - base_loss),
        kld=float(kld.mean()),
        kld_stderr=float(kld.std()) / math.sqrt(n) if n > 1 else None,
        agreement=float(found.agrees.double().mean()),
        cr=compression.at_end,
        cr_reads=compression.reads,
        base_kv_bytes_per_token=kv_bytes_per_token(base.info.model),
        kv_bytes_per_token=kv_bytes_per_token(model.info.model, compression.at_end),
        cr_by_head=compression.by_head.tolist(),
    )


def table(rows: Sequence[Row]) -> str:
    """Rows as a Markdown table, whose columns are aligned."""
    cells = [
        ["text", "tokens", "perplexity, original", "perplexity", "ratio", "KLD, nats", "same argmax", "CR measured"]
        + ["KV bytes/token (bf16)"]
    ]
    for r in rows:
        cells.append(
            [r.text, f"{r.sequences} x {r.length}", f"{r.base_perplexity:.2f}", f"{r.perplexity:.2f}", f"{r.ratio:.3f}"]
            + [f"{r.kld:.4f}", f"{r.agreement:.1%}", f"{r.cr:.2f}"]
            + [f"{r.base_kv_bytes_per_token:.0f} -> {r.kv_bytes_per_token:.0f}"]
        )
    widths = [max(map(len, column)) for column in zip(*cells)]
    cells.insert(1, ["-" * width for width in widths])
    return "\n".join("| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in cells)


def _load(config: FidelityConfig) -> tuple[TeacherForced, TeacherForced]:
    """The original and the compressed model; the same object where the original is in it."""
    import torch

    from megatron.dmc.evaluation.teacher_forced import TeacherForced

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = TeacherForced.load(config.model, config.dtype, device, config.adapter)
    if config.base is not None:
        return TeacherForced.load(config.base, config.dtype, device), model
    if model.info.dmc is None or model.info.dmc.neuron != "none":
        what = "is a plain model" if model.info.dmc is None else "has given up channels for its decisions"
        raise ValueError(f"{config.model} {what}; name its original with --base, or its adapters with --adapter")
    return model, model


def run(config: FidelityConfig) -> int:
    """Measure and print the table, and write what was asked for. Returns the exit status."""
    if config.heat_map is not None and config.heat_map.suffix.lower() != ".png":
        raise ValueError(f"--heat-map is {config.heat_map}; give a name that ends in .png")
    from megatron.dmc.checkpoint.formats import hf
    from megatron.dmc.evaluation.fidelity import Candidate, Fidelity, fidelity

    hf.open_directory(config.base or config.model)  # says what is no model, of which Text would miss a tokenizer
    text = Text(config.base or config.model)
    cut = {
        (path, length): text.sequences(path, length, config.sequences)
        for path in config.data
        for length in sorted(set(config.lengths))
    }
    base, model = _load(config)
    found = {}
    for (path, length), tokens in cut.items():
        found[path, length] = fidelity(base, [Candidate(model)], tokens)[0]
        print(f"  measured {Path(path).name} at {length} tokens", file=sys.stderr, flush=True)
    rows = [row(Path(path).name, part, base, model) for (path, _), part in found.items()]
    print(table(rows))
    if config.json is not None:
        settings = {name: getattr(config, name) for name in ("model", "adapter", "base", "dtype")}
        config.json.write_text(json.dumps({**settings, "rows": [asdict(r) for r in rows]}, indent=2) + "\n")
    if config.heat_map is not None:
        from megatron.dmc.evaluation.report import plot_heads

        longest = max(config.lengths)
        joined = Fidelity.cat([part for (_, length), part in found.items() if length == longest])
        whole = asdict(row(Path(config.model).name, joined, base, model))
        plot_heads([whole | {"name": f"{whole['text']}, {longest} tokens", "target_cr": whole["cr"]}], config.heat_map)
    return 0


if __name__ == "__main__":
    from megatron.dmc.cli.eval import main

    sys.exit(main(["fidelity", *sys.argv[1:]]))
