"""``dmc convert``: weights in and out, between Hugging Face, Megatron ``torch_dist`` and older ``mp_rank_*`` files.

Conversions stream: memory does not grow with the model. Wrong input ends with one message and status 2, and leaves
nothing half-written behind.
"""

import argparse
import sys
from collections.abc import Callable
from typing import Any

from megatron.dmc import flags

EXAMPLES = """
    dmc convert import --hf Llama-2-7b-hf --save llama2-7b            # for dmc train --init-from, any TP x PP
    dmc convert import --gguf SmolLM2-135M-Instruct.Q4_1.gguf --save smollm2
    dmc convert import --megatron checkpoints/llama --save llama      # torch_dist of Megatron-LM, Megatron-Bridge, NeMo
    dmc convert import --legacy megatron-dmc-release --save llama2-7b-dmc
    dmc convert verify --hf Llama-2-7b-hf --load llama2-7b --logits
    dmc convert verify --hf Llama-2-7b-DMC-4x                         # is a file damaged?
    dmc convert export --load dmc-4x --save Llama-2-7b-DMC-4x         # loads with trust_remote_code=True
    dmc convert export --load dms-8x --save Qwen3-8B-DMS-adapter --adapter-only --base-model Qwen/Qwen3-8B
    dmc convert merge-adapter --hf Qwen3-8B --adapter Qwen3-8B-DMS-adapter --save Qwen3-8B-DMS-8x
    dmc convert export --megatron --load dmc-4x --save for-megatron   # a plain GPTModel loads it; it compresses nothing
    dmc convert merge-heads --hf Llama-2-7b-hf --kv-heads 8 --save Llama-2-7b-GQA
    dmc convert inspect Llama-2-7b-DMC-4x
"""


def build_parser() -> flags.Parser:
    parser = flags.Parser(
        prog="dmc convert",
        description="Convert checkpoints between Hugging Face and Megatron, in bounded memory for any model size.",
        examples=EXAMPLES,
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(name: str, text: str, run: Callable[[argparse.Namespace], int]) -> flags.Parser:
        added = flags.subcommand(commands, name, text, EXAMPLES)
        added.set_defaults(run=run)
        return added

    load = command("import", "Write a torch_dist checkpoint from another format", _import)
    source = load.add_mutually_exclusive_group(required=True)
    source.add_argument("--hf", metavar="DIR", help="Hugging Face directory to import.")
    source.add_argument(
        "--megatron",
        metavar="DIR",
        help="Checkpoint of Megatron-LM, Megatron-Bridge or NeMo (torch_dist) to import: its --save directory, or one "
        "iteration.",
    )
    source.add_argument(
        "--legacy", metavar="DIR", help="Megatron directory with mp_rank_*/model_optim_rng.pt files to import."
    )
    source.add_argument("--gguf", metavar="FILE", help="GGUF file of llama.cpp to import, quantized or not.")
    load.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="Type of the imported weights of a --gguf file. Default: the type of its matrices, or bfloat16 where they "
        "are quantized.",
    )
    load.add_argument(
        "--vocab-size",
        type=int,
        help="Tokens in the vocabulary without padding, for a Megatron checkpoint that does not record it.",
    )
    load.add_argument(
        "--target-cr",
        type=float,
        help="Compression ratio (tokens / slots) of a DMC or DMS model, where a Megatron checkpoint or another "
        "program's DMS directory does not record it.",
    )
    save = command(
        "export", "Write a Hugging Face directory, or a checkpoint for Megatron-LM, from a checkpoint", _export
    )
    save.add_argument(
        "--load",
        metavar="DIR",
        required=True,
        help="Checkpoint, or a --save directory whose newest checkpoint is used.",
    )
    save.add_argument(
        "--adapter-only",
        action="store_true",
        help="Write the adapters of a DMS model alone, for its base: dmc serve BASE --adapter DIR.",
    )
    save.add_argument(
        "--base-model",
        metavar="NAME",
        help="Name of the base that --adapter-only writes, or its directory, whose weights are then compared.",
    )
    save.add_argument(
        "--decision-bias",
        type=float,
        metavar="B",
        help="Decision bias, in logits, that --adapter-only writes, not the trained one; a higher one evicts less.",
    )
    save.add_argument(
        "--tokenizer", metavar="PATH", help="Tokenizer to export with a model that did not come from Hugging Face."
    )
    save.add_argument(
        "--megatron",
        action="store_true",
        help="Write a torch_dist checkpoint that a plain Megatron-LM script loads, not a Hugging Face directory. "
        "The decision neuron is taken out of a retrofitted model, which then compresses nothing.",
    )
    save.add_argument(
        "--keep-decisions",
        action="store_true",
        help="Keep the decision neuron's weights with --megatron, for a model with layers from get_dmc_layer_spec.",
    )
    merge = command("merge-heads", "Mean-pool KV heads into fewer ones", _merge_heads)
    merge.add_argument("--hf", metavar="DIR", required=True, help="Hugging Face directory of the model to change.")
    merge.add_argument(
        "--kv-heads", metavar="N", type=int, required=True, help="KV heads of the result; must divide the model's."
    )
    join = command("merge-adapter", "Write a model and its DMS adapters as one Hugging Face directory", _merge_adapter)
    join.add_argument("--hf", metavar="DIR", required=True, help="Hugging Face directory of the base.")
    for writing in (load, save, merge, join):
        writing.add_argument("--save", metavar="DIR", required=True, help="Directory to write.")
        writing.add_argument("--overwrite", action="store_true", help="Replace the --save directory when it exists.")
    verify = command(
        "verify",
        "Check that a checkpoint and a Hugging Face directory hold the same model, or one of them by its checksums",
        _verify,
    )
    verify.add_argument(
        "--hf", metavar="DIR", help="Hugging Face directory to compare; alone, with its checksums.json."
    )
    verify.add_argument(
        "--load", metavar="DIR", help="Checkpoint to compare; alone, with the checksums in its manifest."
    )
    verify.add_argument(
        "--logits", action="store_true", help="Compare logits with transformers' implementation too, in fp32."
    )
    for reading in (load, verify, join):
        needed = reading is join
        reading.add_argument(
            "--adapter", metavar="DIR", required=needed, help="Adapters of a DMS model to put on the --hf directory."
        )
    for reading in (load, verify):
        reading.add_argument(
            "--decision-about",
            choices=("previous", "self"),
            help="Token that the decisions of another program's DMS model in --hf are about. Default: the one before "
            "for NVIDIA's models, the token itself for FastDMS's.",
        )
    inspect = command("inspect", "Describe what a directory or file holds", _inspect)
    inspect.add_argument(
        "directory", metavar="PATH", help="Directory, or GGUF file, of any format that dmc convert knows."
    )
    return parser


main = flags.entry(build_parser, unwinds=True)


def _with_progress(convert: Callable[..., Any], *args: Any, **settings: Any) -> Any:
    """Call a conversion with a progress bar on a terminal, and with none where the output goes to a file."""
    from tqdm import tqdm

    from megatron.dmc.checkpoint.convert import Progress

    with tqdm(unit="B", unit_scale=True, unit_divisor=1000, mininterval=1.0, leave=False, disable=None) as bar:

        def begin(total: int) -> None:
            if not bar.disable:
                bar.reset(total)

        say = Progress(say=lambda text: bar.write(text, file=sys.stdout), begin=begin, advance=bar.update)
        return convert(*args, **settings, progress=say)


def _wrote(path: object) -> int:
    print(f"wrote {path}", flush=True)
    return 0


def _import(args: argparse.Namespace) -> int:
    from megatron.dmc.checkpoint import convert

    name = next(name for name in ("hf", "megatron", "legacy", "gguf") if getattr(args, name))
    given: dict[str, Any] = {"vocab_size": args.vocab_size, "target_cr": args.target_cr}
    if name == "hf":
        given = {"adapters": args.adapter, "target_cr": args.target_cr, "decision_about": args.decision_about}
    else:
        _only_with_hf(args)
    if name == "gguf":
        import torch

        given = {"dtype": args.dtype and getattr(torch, args.dtype)}
    load = getattr(convert, f"import_{name}")
    return _wrote(_with_progress(load, getattr(args, name), args.save, overwrite=args.overwrite, **given))


def _only_with_hf(args: argparse.Namespace) -> None:
    for name in ("adapter", "decision_about"):
        if getattr(args, name) is not None:
            raise ValueError(f"--{name.replace('_', '-')} goes with --hf")


def _export(args: argparse.Namespace) -> int:
    if args.keep_decisions and not args.megatron:
        raise ValueError("--keep-decisions goes with --megatron; a Hugging Face directory always keeps them")
    if args.base_model and not args.adapter_only:
        raise ValueError("--base-model goes with --adapter-only")
    if args.decision_bias is not None and not args.adapter_only:
        raise ValueError("--decision-bias goes with --adapter-only")
    if args.adapter_only:
        from megatron.dmc.checkpoint.adapter_export import export_adapter

        if args.megatron or args.tokenizer:
            raise ValueError(
                "--adapter-only writes adapters for Hugging Face's names; leave --megatron and --tokenizer out"
            )
        settings = {"base_model": args.base_model, "decision_bias": args.decision_bias, "overwrite": args.overwrite}
        return _wrote(_with_progress(export_adapter, args.load, args.save, **settings))
    if args.megatron:
        from megatron.dmc.checkpoint.megatron_export import export_megatron

        if args.tokenizer:
            raise ValueError("--tokenizer is for a Hugging Face directory; give Megatron-LM its own --tokenizer-model")
        settings = {"keep_decisions": args.keep_decisions, "overwrite": args.overwrite}
        return _wrote(_with_progress(export_megatron, args.load, args.save, **settings))
    from megatron.dmc.checkpoint.convert import export

    return _wrote(_with_progress(export, args.load, args.save, overwrite=args.overwrite, tokenizer=args.tokenizer))


def _merge_heads(args: argparse.Namespace) -> int:
    from megatron.dmc.checkpoint.merge_heads import merge_heads

    return _wrote(_with_progress(merge_heads, args.hf, args.save, args.kv_heads, overwrite=args.overwrite))


def _merge_adapter(args: argparse.Namespace) -> int:
    from megatron.dmc.checkpoint.convert import merge_adapter

    return _wrote(_with_progress(merge_adapter, args.hf, args.adapter, args.save, overwrite=args.overwrite))


def _verify(args: argparse.Namespace) -> int:
    from megatron.dmc.checkpoint.verify import verify, verify_checksums

    if not args.hf:
        _only_with_hf(args)
    if not (args.hf and args.load):
        if not (args.hf or args.load) or args.logits:
            raise ValueError("dmc convert verify needs --hf and --load, or one of them without --logits")
        print(verify_checksums(args.load or args.hf, is_checkpoint=bool(args.load)), flush=True)
        return 0
    from megatron.dmc.checkpoint.formats.base import Given

    given = Given(decision_about=args.decision_about)
    print(_with_progress(verify, args.hf, args.load, adapters=args.adapter, given=given), flush=True)
    if args.logits:
        from megatron.dmc.evaluation.logits import compare_logits

        print(compare_logits(args.hf, args.load, args.adapter, given))
    return 0


def _inspect(args: argparse.Namespace) -> int:
    from megatron.dmc.checkpoint.formats.registry import describe

    print(describe(args.directory))
    return 0
