"""``dmc eval``: quality and compression of models and checkpoints, and data and models for the recall tasks."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Optional

from megatron.dmc import flags
from megatron.dmc.evaluation import fidelity_report
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
    rows = flags.subcommand(commands, "report", "Compare checkpoints in a table and two plots", EXAMPLES)
    flags.add_fields(rows, ReportConfig)
    rows.set_defaults(run=lambda args: report(flags.read(ReportConfig, args)))
    beside = flags.subcommand(commands, "fidelity", "Compare a compressed model with its original on text", EXAMPLES)
    flags.add_fields(beside, fidelity_report.FidelityConfig)
    beside.set_defaults(run=lambda args: fidelity_report.run(flags.read(fidelity_report.FidelityConfig, args)))
    text = flags.subcommand(
        commands, "generate", "Generate text from a training checkpoint and show what the cache did", EXAMPLES
    )
    flags.add_fields(text, GenerateConfig)
    text.set_defaults(run=lambda args: generate(flags.read(GenerateConfig, args)))
    _add_recall_data(
        flags.subcommand(commands, "recall-data", "Write training text that teaches a model to look back", EXAMPLES)
    )
    _add_induction(
        flags.subcommand(commands, "induction", "Write a model that starts with an induction circuit", EXAMPLES)
    )
    return parser


def main(argv: Optional[Sequence[str]] = None) -> int:
    return flags.run(build_parser(), argv, refused=(ValueError, OSError))


def _add_recall_data(parser: flags.Parser) -> None:
    parser.set_defaults(run=_recall_data)
    parser.add_argument(
        "--tokenizer", required=True, metavar="PATH", help="Sentencepiece model or Hugging Face directory."
    )
    parser.add_argument(
        "--corpus", required=True, metavar="FILE", help='JSONL file of {"text": ...} lines, for the haystack.'
    )
    parser.add_argument(
        "--output-prefix", required=True, metavar="P", help="Prefix of the dataset: P.bin, P.idx and P.json."
    )
    for flag, kind, default, metavar, text in (
        ("--tokens", int, 2_000_000, "N", "Least number of tokens to write"),
        ("--longest", int, 512, "N", "Tokens of the longest document"),
        ("--repeated", float, 0.5, "X", "Share of documents that are blocks of random ids which come again"),
        ("--seed", int, 0, "SEED", "Seed of the documents"),
    ):
        parser.add_argument(flag, type=kind, default=default, metavar=metavar, help=f"{text} (default: %(default)s).")


def _recall_data(args: argparse.Namespace) -> int:
    from megatron.dmc.evaluation import recall_data

    settings = {"longest": args.longest, "repeated": args.repeated, "seed": args.seed}
    tokens = recall_data.write(args.output_prefix, args.tokenizer, args.corpus, args.tokens, **settings)
    print(f"{tokens:,} tokens\n--data-path {args.output_prefix}")
    return 0


def _add_induction(parser: flags.Parser) -> None:
    parser.set_defaults(run=_induction)
    parser.add_argument(
        "--config", required=True, metavar="FILE", help="YAML or JSON file whose section model gives the sizes."
    )
    parser.add_argument("--seed", type=int, default=0, help="Seed of the other weights (default: %(default)s).")
    parser.add_argument("--save", required=True, metavar="DIR", help="Hugging Face directory to write.")


def _induction(args: argparse.Namespace) -> int:
    from megatron.dmc.config import RunConfig, load_file
    from megatron.dmc.evaluation import induction

    model = RunConfig.from_dict({"model": load_file(args.config).get("model", {})}).model
    induction.write(args.save, model, args.seed)
    return 0
