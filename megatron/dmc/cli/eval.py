"""``dmc eval``: quality and compression of models and checkpoints, and data and models for the recall tasks."""

from dataclasses import dataclass, field

from megatron.dmc import flags
from megatron.dmc.evaluation.fidelity_report import FidelityConfig, run
from megatron.dmc.evaluation.generate import GenerateConfig, generate
from megatron.dmc.evaluation.report import ReportConfig, report

EXAMPLES = """
    dmc eval report --tokenizer t.model --data data/valid --output report --row original=base --row "4x=dmc-4x:original"
    dmc eval fidelity Qwen3-8B --adapter Qwen3-8B-DMS-adapter --data valid.jsonl --lengths 512,4096 --heat-map a.png
    dmc eval fidelity Llama-2-7b-DMC-4x --base Llama-2-7b-hf --data valid.jsonl book.txt --json fidelity.json
    dmc eval generate --load dmc-4x --tokenizer tokenizer.model --prompt "def main("
    dmc eval recall-data --tokenizer tokenizer.model --corpus train.jsonl --tokens 2000000 --output-prefix data/recall
    dmc eval induction --config model.yaml --save induction-hf
"""


def build_parser() -> flags.Parser:
    parser = flags.Parser(
        prog="dmc eval",
        description="Measure quality and compression of models and checkpoints, and make data for the recall tasks.",
        examples=EXAMPLES,
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, text, config, call in (
        ("report", "Compare checkpoints in a table and two plots", ReportConfig, report),
        ("fidelity", "Compare a compressed model with its original on text", FidelityConfig, run),
        ("generate", "Generate text from a training checkpoint and show what the cache did", GenerateConfig, generate),
        ("recall-data", "Write training text that teaches a model to look back", RecallDataConfig, _recall_data),
        ("induction", "Write a model that starts with an induction circuit", InductionConfig, _induction),
    ):
        flags.add_command(commands, name, text, EXAMPLES, config, call)
    return parser


main = flags.entry(build_parser)


@dataclass(frozen=True)
class RecallDataConfig:
    """Settings of training text that teaches a model to look back."""

    tokenizer: str = field(metadata={"metavar": "PATH"})
    """Sentencepiece model or Hugging Face directory."""
    corpus: str = field(metadata={"metavar": "FILE"})
    """JSONL file of {"text": ...} lines, for the haystack."""
    output_prefix: str = field(metadata={"metavar": "P"})
    """Prefix of the dataset: P.bin, P.idx and P.json."""
    tokens: int = field(default=2_000_000, metadata={"metavar": "N"})
    """Least number of tokens to write."""
    longest: int = field(default=512, metadata={"metavar": "N"})
    """Tokens of the longest document."""
    repeated: float = field(default=0.5, metadata={"metavar": "X"})
    """Share of documents that are blocks of random ids which come again."""
    seed: int = 0
    """Seed of the documents."""


def _recall_data(config: RecallDataConfig) -> int:
    from megatron.dmc.evaluation import recall_data

    settings = {"longest": config.longest, "repeated": config.repeated, "seed": config.seed}
    tokens = recall_data.write(config.output_prefix, config.tokenizer, config.corpus, config.tokens, **settings)
    print(f"{tokens:,} tokens\n--data-path {config.output_prefix}")
    return 0


@dataclass(frozen=True)
class InductionConfig:
    """Settings of a model that starts with an induction circuit."""

    config: str = field(metadata={"metavar": "FILE"})
    """YAML or JSON file whose section model gives the sizes."""
    save: str = field(metadata={"metavar": "DIR"})
    """Hugging Face directory to write."""
    seed: int = 0
    """Seed of the other weights."""


def _induction(config: InductionConfig) -> int:
    from megatron.dmc.config import RunConfig, load_file
    from megatron.dmc.evaluation import induction

    model = RunConfig.from_dict({"model": load_file(config.config).get("model", {})}).model
    induction.write(config.save, model, config.seed)
    return 0
