"""Configuration of a comparison on a released model: the model, its adapters, the other methods, texts and tasks."""

from dataclasses import dataclass, field
from typing import Optional

from megatron.dmc.config.checks import positive, require
from megatron.dmc.config.files import FileConfig

POLICIES = ("H2O", "TOVA", "StreamingLLM")
"""Eviction policies of this package (``megatron.dmc.evaluation.policies``)."""
PRESSES = ("SnapKV", "ExpectedAttention", "KVzip", "TOVA", "StreamingLLM")
"""Presses of kvpress, run by its own code."""
SHORTEST = 128
"""Least context of a press, in tokens."""
ORIGINAL = "original"
"""Name of the model with its full cache, to which all others are compared."""
THEIRS = "kvpress "
"""Begins the names of rows that kvpress computes."""


@dataclass
class TextConfig:
    """Held-out texts, and how much of them is scored."""

    files: dict[str, str] = field(default_factory=dict)
    """JSONL files of ``{"text": ...}`` lines by the kind of text."""
    lengths: list[int] = field(default_factory=lambda: [512, 2048, 4096])
    """Lengths of the texts that are scored from their first token to their last, in tokens."""
    tokens: int = 32_768
    """Tokens of each kind that are scored at each length."""
    contexts: list[int] = field(default_factory=lambda: [512, 2048, 3840])
    """Lengths of the contexts that are compressed before what follows is scored, in tokens."""
    continuation: int = 256
    """Tokens that are scored after such a context."""
    samples: int = 16
    """Contexts of each kind and length."""

    def check(self) -> None:
        positive(self, "tokens", "continuation", "samples")
        least = {"lengths": (self.lengths, 2), "contexts": (self.contexts, 1)}
        for name, (found, low) in least.items():
            require(all(n >= low for n in found), f"text.{name} is {found}; each must be {low} at least")
        require(bool(self.files), "text.files names no text; give a JSONL file by the kind of its text")


@dataclass
class RecallConfig:
    """Facts in a text and a question about one of them (``megatron.dmc.evaluation.released.recall``)."""

    lengths: list[int] = field(default_factory=lambda: [512, 2048])
    """Lengths of the samples, in tokens."""
    keys: list[int] = field(default_factory=lambda: [1, 4])
    """Numbers of facts in a text: 1 is a needle, more are multi-key recall."""
    haystack: str = "prose"
    """Kind of the text that the facts stand in."""
    before: str = ""
    """Text before the haystack, such as the beginning of a chat."""
    question: str = (
        "\n\nQuestion: What is the access code of the {place} office?\n"
        "Answer: The access code of the {place} office is "
    )
    """Text after the haystack, which the digits of the code continue; ``{place}`` stands for the office's place."""
    samples: int = 24
    """Samples of each length and number of facts."""

    def check(self) -> None:
        positive(self, "samples")
        for name, found in (("keys", self.keys), ("lengths", self.lengths)):
            require(all(n >= 1 for n in found), f"recall.{name} is {found}; each must be 1 at least")
        try:
            asked = self.question.format(place="Lisbon")
        except (KeyError, IndexError, ValueError):
            asked = self.question
        require("Lisbon" in asked, f"recall.question is {self.question!r}; it must have {{place}}, and no other braces")


@dataclass
class HumanEvalConfig:
    """HumanEval, scored by the likelihood of the reference solutions: no program is run."""

    problems: int = 40
    """Problems whose solutions are scored: the last ones; 0 for none."""
    context: int = 1536
    """Tokens of solved problems, the first ones, before each problem."""

    def check(self) -> None:
        require(0 <= self.problems <= 120, f"humaneval.problems is {self.problems}; use 0 to 120, the rest is context")
        positive(self, "context")


@dataclass
class ReleasedConfig(FileConfig):
    """Configuration of one comparison on a released model."""

    model: str = ""
    """Plain Hugging Face directory. Relative paths are relative to the checkout."""
    prepare: list[str] = field(default_factory=list)
    """Commands of the checkout that make the model and the texts, each a script and its arguments; run once."""
    adapters: dict[str, str] = field(default_factory=dict)
    """Directories of ``dmc convert export --adapter-only`` by the names of their rows."""
    follow: Optional[str] = None
    """Adapter whose measured compression the methods without training get, position by position; None: ``ratio``."""
    ratio: float = 4.0
    """Compression ratio of the methods without training where there is no adapter to follow."""
    policies: list[str] = field(default_factory=lambda: list(POLICIES))
    presses: list[str] = field(default_factory=lambda: list(PRESSES))
    kvpress_python: Optional[str] = None
    """Python interpreter of an environment with kvpress; None: an environment is made in the output."""
    output: str = "build/evidence/released"
    """Directory for all results."""
    jobs: int = 1
    """Methods that are measured at once, with an equal share of the cores each."""
    seed: int = 1
    """Seed of the recall samples."""
    text: TextConfig = field(default_factory=TextConfig)
    recall: RecallConfig = field(default_factory=RecallConfig)
    humaneval: HumanEvalConfig = field(default_factory=HumanEvalConfig)
    batch_tokens: int = 4096
    """Tokens that are evaluated at once, in sequences of one length."""

    def check(self) -> None:
        """Raise ``ValueError`` for a wrong value or combination, before anything is measured."""
        for part in (self.text, self.recall, self.humaneval):
            part.check()
        positive(self, "jobs", "batch_tokens")
        require(bool(self.model), "model is not set; name a Hugging Face directory")
        for name in self.policies:
            require(name in POLICIES, f"policy {name!r} is unknown; there are {', '.join(POLICIES)}")
        for name in self.presses:
            require(name in PRESSES, f"press {name!r} is unknown; there are {', '.join(PRESSES)}")
        require(self.ratio > 1, f"ratio is {self.ratio}; it must be above 1")
        require(
            self.follow is None or self.follow in self.adapters,
            f"follow is {self.follow!r}, which is not among the adapters {list(self.adapters)}",
        )
        require(
            self.recall.haystack in self.text.files,
            f"recall.haystack is {self.recall.haystack!r}; text.files has {', '.join(self.text.files)}",
        )
        shortest = min([*self.text.contexts, *self.recall.lengths, self.humaneval.context])
        require(
            not self.presses or shortest >= SHORTEST,
            f"a context has {shortest} tokens; presses need {SHORTEST} at least (SnapKV looks at the last 64)",
        )
        names = [ORIGINAL, *self.adapters, *self.policies]
        require(len(set(names)) == len(names), f"names of methods are not different: {', '.join(names)}")
