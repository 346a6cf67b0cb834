"""What a comparison is made of: the model and its text, how each method is trained, and what is measured."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

from megatron.dmc.config import RunConfig, build, load_file
from megatron.dmc.config.checks import positive, require

EVICTION = ("H2O", "TOVA", "StreamingLLM")
"""Policies that need no training: they are measured on the control."""
TRAINED = ("DMC", "DMC + distillation", "DMS", "DMS + distillation", "GQA")


@dataclass
class CorpusConfig:
    """Text. Without files of your own it is the Python standard library's sources."""

    train: Optional[str] = None
    """JSONL, ``{"text": ...}`` a line; with ``valid`` and ``tokenizer``."""
    valid: Optional[str] = None
    tokenizer: Optional[str] = None
    """Sentencepiece model file or Hugging Face directory."""
    vocab_size: int = 2048
    """Of the tokenizer that is made for the standard library's sources."""
    recall_share: float = 0.5
    """Of training tokens: documents that teach looking back (``megatron.dmc.evaluation.recall_data``), which a small
    model does not learn from a few million tokens of text. 0: none.
    """
    recall_tokens: int = 4_000_000

    def check(self) -> None:
        files = (self.train, self.valid, self.tokenizer)
        require(
            all(files) or not any(files),
            f"corpus has train {self.train}, valid {self.valid}, tokenizer {self.tokenizer}; "
            "give all three, or none for the standard library's sources",
        )
        require(0 <= self.recall_share < 1, f"recall_share is {self.recall_share}; it must be in [0, 1)")
        positive(self, "vocab_size", "recall_tokens")


@dataclass
class OriginalConfig:
    """The model that is compressed: a Hugging Face directory, or trained here from random weights."""

    hf: Optional[str] = None
    """A plain directory with as many KV heads as query heads, where GQA is compared. None: it is trained."""
    induction: bool = True
    """Begin with a circuit that looks back (``megatron.dmc.evaluation.induction``), which takes a small model more
    tokens to learn than two CPU cores go through in hours. False: random weights.
    """
    iters: int = 600
    global_batch_size: int = 8
    lr: float = 2e-3
    min_lr: float = 3e-4
    """Where the cosine ends."""
    warmup_iters: int = 40

    def check(self) -> None:
        positive(self, "iters", "global_batch_size", "lr")


@dataclass
class RecipeConfig:
    """Training after the original, the same for every method: as many tokens and the same learning rates at equal
    compression.
    """

    zero_out_iters: int = 40
    iters_per_cr: int = 200
    """Optimizer steps per unit of compression ratio; GQA and the control take as many."""
    finetune_iters: int = 200
    lr: float = 5e-4
    min_lr: float = 5e-5
    """Where the finetune's cosine ends."""
    loss_weight: float = 1.0
    """Of the compression loss while the target rises."""
    finetune_loss_weight: float = 0.5
    dms_window: int = 16
    """Tokens from a mark to the eviction."""

    def check(self) -> None:
        positive(self, "zero_out_iters", "iters_per_cr", "finetune_iters", "lr", "dms_window")


@dataclass
class CompoundConfig:
    """DMC on top of an up-trained GQA model."""

    gqa_ratio: int = 2
    ratios: list[float] = field(default_factory=lambda: [2.0, 4.0])


@dataclass
class EconomyConfig:
    """Quality at one ratio as a function of training: shares of the full schedule, each a run straight to the ratio."""

    ratio: float = 4.0
    shares: list[float] = field(default_factory=lambda: [0.125, 0.25, 0.5])
    methods: list[str] = field(default_factory=lambda: ["DMC", "DMC + distillation"])


@dataclass
class MeasureConfig:
    """Tasks, on text that was not trained on."""

    windows: int = 64
    """Windows of validation text of ``data.seq_length`` tokens."""
    recall_lengths: list[int] = field(default_factory=lambda: [128, 256, 512])
    recall_depths: list[float] = field(default_factory=lambda: [0.0, 0.5, 0.9])
    recall_samples: int = 16
    """Of each task at each length and depth."""
    batch: int = 32
    """Sequences at once."""
    lm_eval_tasks: list[str] = field(default_factory=list)
    """Tasks of lm-eval that score given text, under every policy; their data must be at hand."""
    lm_eval_include: Optional[str] = None
    """Folder with YAML files of further tasks."""

    def check(self) -> None:
        positive(self, "windows", "recall_samples", "batch")


@dataclass
class CompareConfig:
    """One comparison. The resolved one is written beside its results."""

    output: str = "build/evidence"
    seeds: list[int] = field(default_factory=lambda: [1, 2])
    """Each is a model of its own: initial weights, order of the data, noise, recall samples."""
    jobs: int = 2
    """Processes at once, with an equal share of the cores each. On one GPU: 1."""
    ratios: list[float] = field(default_factory=lambda: [2.0, 4.0])
    methods: list[str] = field(
        default_factory=lambda: ["DMC", "DMC + distillation", "DMS + distillation", "GQA", *EVICTION]
    )
    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    original: OriginalConfig = field(default_factory=OriginalConfig)
    recipe: RecipeConfig = field(default_factory=RecipeConfig)
    compound: Optional[CompoundConfig] = None
    economy: Optional[EconomyConfig] = None
    measure: MeasureConfig = field(default_factory=MeasureConfig)
    run: RunConfig = field(default_factory=RunConfig)
    """Model, batch, precision of every training run (docs/training.md); stage and paths are filled in."""

    def check(self) -> None:
        """Raise ``ValueError`` for a wrong value or combination, before anything is trained."""
        for part in (self.corpus, self.original, self.recipe, self.measure):
            part.check()
        positive(self, "jobs")
        require(
            bool(self.seeds) and len(set(self.seeds)) == len(self.seeds),
            f"seeds {self.seeds} must be different, and one at least",
        )
        require(
            self.ratios == sorted(set(self.ratios)) and all(r > 1 for r in self.ratios) and bool(self.ratios),
            f"ratios {self.ratios} must ascend and be above 1",
        )
        for name in [*self.methods, *(self.economy.methods if self.economy else ())]:
            require(
                name in (*TRAINED, *EVICTION),
                f"method {name!r} is unknown; there are {', '.join((*TRAINED, *EVICTION))}",
            )
        heads = self.run.model.kv_heads
        wanted = {
            "GQA": self.ratios if "GQA" in self.methods else [],
            "compound": [self.compound.gqa_ratio] if self.compound else [],
        }
        for what, ratios in wanted.items():
            for ratio in ratios:
                require(
                    heads % ratio == 0,
                    f"{what}: {heads} KV heads cannot be merged {ratio:g} to one; use ratios that divide them",
                )
        require(
            self.compound is None or "GQA" in self.methods and self.compound.gqa_ratio in self.ratios,
            "compound needs GQA among the methods, at a ratio that is among the ratios",
        )
        if self.economy is not None:
            economy = self.economy
            require(
                set(economy.methods) <= set(self.methods) and economy.ratio in self.ratios,
                f"economy: {economy.methods} at {economy.ratio:g}x must be among the methods and ratios",
            )
            require(all(0 < s < 1 for s in economy.shares), f"economy.shares {economy.shares} must lie between 0 and 1")
        require(
            max(self.measure.recall_lengths, default=0) <= self.run.model.max_position_embeddings,
            f"recall_lengths {self.measure.recall_lengths} exceed max_position_embeddings",
        )

    @classmethod
    def load(cls, path: str | Path) -> CompareConfig:
        """From a YAML or JSON file. Raises ``ValueError`` naming what is wrong."""
        config = build(cls, load_file(path))
        config.check()
        return config

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)
