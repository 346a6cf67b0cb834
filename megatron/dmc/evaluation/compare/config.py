"""Configuration of a comparison: the model and its text, how each method is trained, and the tasks."""

from dataclasses import dataclass, field
from typing import Optional

from megatron.dmc.config import RunConfig
from megatron.dmc.config.checks import positive, require
from megatron.dmc.config.files import FileConfig

EVICTION = ("H2O", "TOVA", "StreamingLLM")
"""Eviction policies, which need no training: they are measured on the control."""
SOURCES = {"DMS": "key", "DMS query": "query", "DMS adapter": "adapter"}
"""DMS by the source of its decisions (``DMCConfig.decision_source``). Adapters are trained alone, with the original as
their frozen base and teacher."""
_DISTILLED = " + distillation"
TRAINED = ("DMC", "DMC + distillation", *SOURCES, "DMS + distillation", "DMS query + distillation", "GQA")
"""Methods that train the original on."""


def decision_source(method: str) -> Optional[str]:
    """Source of the decisions of a method of :data:`TRAINED`; None if it is not DMS."""
    return SOURCES.get(method.removesuffix(_DISTILLED))


@dataclass
class CorpusConfig:
    """Training and validation text; without files of your own, the Python standard library's sources."""

    train: Optional[str] = None
    """Training text: JSONL, ``{"text": ...}`` a line. Give ``valid`` and ``tokenizer`` too."""
    valid: Optional[str] = None
    """Validation text, in the same form as ``train``."""
    tokenizer: Optional[str] = None
    """Sentencepiece model file or Hugging Face directory."""
    vocab_size: int = 2048
    """Size of the tokenizer that is trained when the text is the standard library's sources."""
    recall_share: float = 0.5
    """Share of training tokens that are documents which teach looking back (``megatron.dmc.evaluation.recall_data``); 0
    for none. A small model does not learn it from a few million tokens of text.
    """
    recall_tokens: int = 4_000_000
    """Size of the dataset of such documents, in tokens."""

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
    """Plain Hugging Face directory; with as many KV heads as query heads, if GQA is compared. None: train a model."""
    induction: bool = True
    """Start from weights with a circuit that looks back (``megatron.dmc.evaluation.induction``), which a small model
    does not learn in hours on two CPU cores. False: random weights.
    """
    iters: int = 600
    """Optimizer steps of pre-training."""
    global_batch_size: int = 8
    """Sequences of an optimizer step of pre-training."""
    lr: float = 2e-3
    """Learning rate at the start of the cosine decay."""
    min_lr: float = 3e-4
    """Learning rate at the end of the cosine decay."""
    warmup_iters: int = 40
    """Optimizer steps in which the learning rate rises from 0."""

    def check(self) -> None:
        positive(self, "iters", "global_batch_size", "lr")


@dataclass
class RecipeConfig:
    """Training after the original. At equal compression every method has as many tokens and the same learning rates."""

    zero_out_iters: int = 40
    """Optimizer steps of ``zero_out``."""
    iters_per_cr: int = 200
    """Optimizer steps of ``retrofit`` per unit of compression ratio; GQA and the control take as many."""
    finetune_iters: int = 200
    """Optimizer steps of ``finetune``."""
    lr: float = 5e-4
    """Learning rate, constant up to ``finetune``."""
    min_lr: float = 5e-5
    """Learning rate at the end of the cosine decay of ``finetune``."""
    loss_weight: float = 1.0
    """Weight of the compression loss in ``retrofit``, while the target rises."""
    finetune_loss_weight: float = 0.5
    """Weight of the compression loss in ``finetune``."""
    dms_window: int = 16
    """Tokens from the mark of a token to its eviction by DMS."""
    dms_scale: float = 100.0
    """Factor on the decisions of DMS query and DMS adapter (``DMCConfig.decision_scale``)."""

    def check(self) -> None:
        positive(self, "zero_out_iters", "iters_per_cr", "finetune_iters", "lr", "dms_window", "dms_scale")


@dataclass
class CompoundConfig:
    """DMC on top of an up-trained GQA model."""

    gqa_ratio: int = 2
    """KV heads of the original that are merged to one."""
    ratios: list[float] = field(default_factory=lambda: [2.0, 4.0])
    """Compression ratios of DMC on top of the merged heads, ascending."""


@dataclass
class EconomyConfig:
    """Quality at one ratio by the length of training, each length in a run straight to the ratio."""

    ratio: float = 4.0
    """Compression ratio of all runs."""
    shares: list[float] = field(default_factory=lambda: [0.125, 0.25, 0.5])
    """Lengths of the schedule, as shares of the full one."""
    methods: list[str] = field(default_factory=lambda: ["DMC", "DMC + distillation"])
    """Methods that are trained for these lengths."""


@dataclass
class MeasureConfig:
    """Tasks that every model is measured on, with text that was not trained on."""

    windows: int = 64
    """Sequences of validation text, of ``data.seq_length`` tokens each."""
    recall_lengths: list[int] = field(default_factory=lambda: [128, 256, 512])
    """Lengths of the recall samples, in tokens."""
    recall_depths: list[float] = field(default_factory=lambda: [0.0, 0.5, 0.9])
    """Places in a recall sample of what is asked for: 0 is the beginning of the haystack, 1 its end."""
    recall_samples: int = 16
    """Samples of each recall task at each length and depth."""
    batch: int = 32
    """Sequences that are evaluated at once."""
    lm_eval_tasks: list[str] = field(default_factory=list)
    """Tasks of lm-eval that score given text, run under every policy. Their data must be at hand."""
    lm_eval_add_bos_token: Optional[bool] = None
    """Put BOS before every text of these tasks; null: when the tokenizer does so by itself, as lm-eval's ``hf``."""
    lm_eval_include: Optional[str] = None
    """Folder with YAML files of further lm-eval tasks."""

    def check(self) -> None:
        positive(self, "windows", "recall_samples", "batch")


@dataclass
class CompareConfig(FileConfig):
    """Configuration of one comparison. The resolved one is written beside the results."""

    output: str = "build/evidence"
    """Directory for all results."""
    seeds: list[int] = field(default_factory=lambda: [1, 2])
    """Seeds of initial weights, order of the data, noise and recall samples. Each gives a model of its own."""
    jobs: int = 2
    """Jobs at once, with an equal share of the cores each. On one GPU: 1."""
    ratios: list[float] = field(default_factory=lambda: [2.0, 4.0])
    """Compression ratios, ascending."""
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
    """Model, batch and precision of every training (docs/training.md); the comparison fills in stages and paths."""

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
