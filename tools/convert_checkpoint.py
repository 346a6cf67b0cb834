#!/usr/bin/env python
"""Weights in and out: Hugging Face <-> Megatron ``torch_dist``, and Megatron's older ``mp_rank_*`` files.

    convert_checkpoint.py import  --hf DIR --save DIR          # to a checkpoint for --init-from, any TP x PP
    convert_checkpoint.py import  --legacy DIR --save DIR      # NVIDIA's released DMC checkpoints
    convert_checkpoint.py export  --load DIR --save DIR        # any stage; a DMC model gets its modelling file
    convert_checkpoint.py verify  --hf DIR --load DIR [--logits]
    convert_checkpoint.py merge-heads --hf DIR --kv-heads N --save DIR   # MHA -> GQA, for up-training
    convert_checkpoint.py inspect DIR                          # what is this?

Streams: memory does not grow with the model. Wrong input ends with one message and status 2, and leaves nothing.
"""

from __future__ import annotations

import argparse
import signal
import sys
from typing import NoReturn, Optional

from tqdm import tqdm

from megatron.dmc.checkpoint import convert
from megatron.dmc.checkpoint.convert import Progress


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="convert_checkpoint.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    load = commands.add_parser("import", help="to a torch_dist checkpoint", allow_abbrev=False)
    source = load.add_mutually_exclusive_group(required=True)
    source.add_argument("--hf", metavar="DIR", help="Hugging Face directory")
    source.add_argument("--legacy", metavar="DIR", help="Megatron directory with mp_rank_*/model_optim_rng.pt")
    load.add_argument(
        "--vocab-size", type=int, help="--legacy: rows of the vocabulary without padding, when the file does not say"
    )
    load.add_argument(
        "--target-cr", type=float, help="--legacy: compression ratio of a DMC model, when the file does not say"
    )
    save = commands.add_parser("export", help="to a Hugging Face directory", allow_abbrev=False)
    save.add_argument(
        "--load", metavar="DIR", required=True, help="checkpoint, or a --save directory (its newest checkpoint)"
    )
    save.add_argument("--tokenizer", metavar="PATH", help="for a model that did not come from Hugging Face")
    merge = commands.add_parser("merge-heads", help="mean-pool KV heads into fewer ones", allow_abbrev=False)
    merge.add_argument("--hf", metavar="DIR", required=True, help="Hugging Face directory")
    merge.add_argument(
        "--kv-heads", metavar="N", type=int, required=True, help="KV heads of the result; must divide the model's"
    )
    for command in (load, save, merge):
        command.add_argument("--save", metavar="DIR", required=True)
        command.add_argument("--overwrite", action="store_true", help="replace --save when it exists")
    verify = commands.add_parser("verify", help="are both the same model?", allow_abbrev=False)
    verify.add_argument("--hf", metavar="DIR", required=True)
    verify.add_argument("--load", metavar="DIR", required=True)
    verify.add_argument(
        "--logits", action="store_true", help="also compare logits with transformers' implementation (fp32)"
    )
    inspect = commands.add_parser("inspect", help="what a directory holds", allow_abbrev=False)
    inspect.add_argument("directory", metavar="DIR")
    return parser


def _progress() -> tuple[Progress, tqdm]:
    """A bar on a terminal, nothing where the output goes to a file."""
    bar = tqdm(unit="B", unit_scale=True, unit_divisor=1000, mininterval=1.0, leave=False, disable=None)

    def begin(total: int) -> None:
        if not bar.disable:
            bar.reset(total)

    return Progress(say=lambda text: bar.write(text, file=sys.stdout), begin=begin, advance=bar.update), bar


def run(args: argparse.Namespace) -> int:
    if args.command == "inspect":
        from megatron.dmc.checkpoint.formats.registry import describe

        print(describe(args.directory))
        return 0
    progress, bar = _progress()
    try:
        if args.command == "import" and args.hf:
            done = f"wrote {convert.import_hf(args.hf, args.save, overwrite=args.overwrite, progress=progress)}"
        elif args.command == "import":
            from megatron.dmc.checkpoint.convert import import_legacy

            done = "wrote " + str(
                import_legacy(
                    args.legacy,
                    args.save,
                    overwrite=args.overwrite,
                    progress=progress,
                    vocab_size=args.vocab_size,
                    target_cr=args.target_cr,
                )
            )
        elif args.command == "export":
            done = "wrote " + str(
                convert.export(
                    args.load, args.save, overwrite=args.overwrite, tokenizer=args.tokenizer, progress=progress
                )
            )
        elif args.command == "merge-heads":
            from megatron.dmc.checkpoint.merge_heads import merge_heads

            done = (
                f"wrote {merge_heads(args.hf, args.save, args.kv_heads, overwrite=args.overwrite, progress=progress)}"
            )
        else:
            from megatron.dmc.checkpoint.verify import verify

            done = verify(args.hf, args.load, progress)
    finally:
        bar.close()
    print(done, flush=True)
    if args.command == "verify" and args.logits:
        from megatron.dmc.evaluation.logits import compare_logits

        print(compare_logits(args.hf, args.load))
    return 0


def main(argv: Optional[list[str]] = None) -> int:
    args = build_parser().parse_args(argv)
    signal.signal(signal.SIGTERM, _stop)  # so that what is half-written is removed
    try:
        return run(args)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _stop(*_: object) -> NoReturn:
    sys.exit(143)


if __name__ == "__main__":
    sys.exit(main())
