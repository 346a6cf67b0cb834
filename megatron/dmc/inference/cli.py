"""The ``dmc`` command. Here is ``dmc generate``; the serving side hands in its own commands beside it.

dmc generate MODEL --prompt "def main(" --max-tokens 64 --stream --stats
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Optional

from megatron.dmc.inference.config import EngineConfig
from megatron.dmc.inference.request import Completion, RequestOutput
from megatron.dmc.inference.sampling_params import SamplingParams


@dataclass(frozen=True)
class Command:
    """A subcommand: ``add`` puts its options into a parser, ``run`` takes them and returns the exit status."""

    name: str
    help: str
    add: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


Option = tuple[Callable[[str], Any], str]
ENGINE_OPTIONS: dict[str, Option] = {
    "dtype": (str, "auto (that of the files), float32, bfloat16 or float16"),
    "load_format": (str, "auto (the directory's weights), or dummy: random ones, config.json is enough"),
    "device": (str, "auto, cpu or cuda"),
    "tensor_parallel_size": (int, "ranks; start as many processes with torchrun"),
    "max_model_len": (int, "longest sequence, prompt and answer, in tokens (default: the model's)"),
    "max_num_seqs": (int, "sequences in the cache at a time"),
    "max_num_batched_tokens": (int, "tokens of one step"),
    "block_size": (int, "slots of a page: 16, 32 or 64"),
    "kv_cache_memory_bytes": (int, "of the cache, per rank"),
    "gpu_memory_utilization": (float, "share of a GPU's memory that may be used"),
    "enforce_eager": (bool, "no CUDA graphs"),
    "enable_prefix_caching": (bool, "keep states of prompts and answers, for requests that begin like them"),
}
SAMPLING_OPTIONS: dict[str, Option] = {
    "n": (int, "answers per prompt"),
    "max_tokens": (int, "longest answer"),
    "min_tokens": (int, "shortest answer"),
    "temperature": (float, "0: greedy"),
    "top_p": (float, "probability that is drawn from"),
    "top_k": (int, "most likely tokens that are drawn from; 0: all"),
    "min_p": (float, "share of the most likely token's probability that others need"),
    "repetition_penalty": (float, "on tokens of prompt and answer; 1: none"),
    "presence_penalty": (float, "on tokens of the answer"),
    "frequency_penalty": (float, "on tokens of the answer, as often as they are there"),
    "seed": (int, "the same seed draws the same tokens"),
}


def add_options(parser: argparse.ArgumentParser, cls: type, options: dict[str, Option], **defaults: object) -> None:
    """One flag for each option; defaults are the dataclass' own, or those given."""
    known = {field.name: field.default for field in dataclasses.fields(cls)} | defaults
    for name, (kind, text) in options.items():
        shown = "" if known[name] is None else f" (default: {known[name]})"
        how = {"action": argparse.BooleanOptionalAction} if kind is bool else {"type": kind}
        parser.add_argument("--" + name.replace("_", "-"), default=known[name], help=text + shown, **how)  # type: ignore[arg-type]


def take_options(args: argparse.Namespace, options: dict[str, Option]) -> dict[str, Any]:
    return {name: getattr(args, name) for name in options}


def _ids(text: str) -> list[int]:
    try:
        return [int(part) for part in text.replace(",", " ").split()]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of token ids") from None


def _add_generate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="Hugging Face directory, plain or exported from a retrofit")
    parser.add_argument("--prompt", action="append", dest="prompts", metavar="TEXT", help="may be given several times")
    parser.add_argument(
        "--prompt-ids", action="append", type=_ids, dest="prompts", metavar="IDS", help="token ids: 1,2,3"
    )
    parser.add_argument("--tokenizer", metavar="DIR", help="default: the model's")
    parser.add_argument("--stream", action="store_true", help="print the answer as it comes (one prompt)")
    parser.add_argument("--stats", action="store_true", help="what the cache did, by layer and head, and times")
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="ends the answer; may be given several times"
    )
    parser.add_argument("--stop-token-ids", type=_ids, default=[], metavar="IDS")
    parser.add_argument("--ignore-eos", action="store_true", help="go on to --max-tokens")
    add_options(
        parser.add_argument_group("sampling"), SamplingParams, SAMPLING_OPTIONS, max_tokens=128, temperature=0.0
    )  # type: ignore[arg-type]
    add_options(parser.add_argument_group("engine"), EngineConfig, ENGINE_OPTIONS)  # type: ignore[arg-type]


def _generate(args: argparse.Namespace) -> int:
    if not args.prompts:
        raise ValueError("there is no prompt; give --prompt TEXT or --prompt-ids IDS")
    if args.stream and (len(args.prompts) > 1 or args.n > 1):
        raise ValueError(f"--stream shows one answer; here are {len(args.prompts)} prompts with {args.n} answers each")
    params = SamplingParams(
        **take_options(args, SAMPLING_OPTIONS),
        stop=args.stop,
        stop_token_ids=args.stop_token_ids,
        ignore_eos=args.ignore_eos,
    )
    from megatron.dmc.inference.llm import LLM

    llm = LLM(args.model, tokenizer=args.tokenizer, **take_options(args, ENGINE_OPTIONS))
    # All tensor-parallel ranks have the same to say.
    with contextlib.redirect_stdout(io.StringIO()) if llm.engine.parallel.rank else contextlib.nullcontext():
        return _answer(llm, args, params)


def _answer(llm: Any, args: argparse.Namespace, params: SamplingParams) -> int:
    began = time.monotonic()
    results = [_stream(llm, args.prompts[0], params)] if args.stream else llm.generate(args.prompts, params)
    seconds = time.monotonic() - began
    status = 0
    for result in results:
        if not args.stream:
            _print_result(result, named=len(results) > 1 or args.n > 1)
        if result.error:
            print(f"error: {result.error}", file=sys.stderr)
            status = 2
        elif args.stats:
            for completion in result.outputs:
                print(_cache_table(completion))
    if args.stats and status == 0:
        print(_summary(llm.engine.stats(), results, seconds))
    return status


def _text(completion: Completion, has_text: bool) -> str:
    return completion.text if has_text else " ".join(map(str, completion.token_ids))


def _print_result(result: RequestOutput, named: bool) -> None:
    for completion in result.outputs:
        prompt = result.prompt if result.prompt is not None else " ".join(map(str, result.prompt_token_ids))
        head = (
            f"--- prompt {result.request_id}, answer {completion.index} ({completion.finish_reason})\n" if named else ""
        )
        has_text = bool(completion.text)
        print(f"{head}{prompt}{'' if has_text else ' '}{_text(completion, has_text)}")


def _stream(llm: Any, prompt: str | list[int], params: SamplingParams) -> RequestOutput:
    result = RequestOutput("0", prompt if isinstance(prompt, str) else None, [], [Completion(0)])
    has_text = llm.engine.tokenizer is not None
    print(prompt if isinstance(prompt, str) else " ".join(map(str, prompt)), end="", flush=True)
    for output in llm.stream(prompt, params):
        result.add(output)
        print(output.text if has_text else "".join(f" {token}" for token in output.tokens), end="", flush=True)
    print()
    return result


def _cache_table(completion: Completion) -> str:
    use = completion.cache
    if use is None:
        return ""
    lines = [f"\n--- cache: {use.tokens} tokens; slots and CR by layer and KV head"]
    lines.append("layer " + "".join(f"{f'head {h}':>16}" for h in range(len(use.slots[0]))))
    for layer, row in enumerate(use.slots, start=1):
        lines.append(f"{layer:5d} " + "".join(f"{f'{n} ({use.tokens / n:.2f}x)':>16}" for n in row))
    lines.append(
        f"all   {use.tokens * use.heads} token states in {use.total_slots} slots: CR {use.compression_ratio:.2f}; "
        f"{use.pages} pages of {use.page_size}, {use.waste:.1%} of them empty"
    )
    return "\n".join(lines)


def _summary(stats: Any, results: Sequence[RequestOutput], seconds: float) -> str:
    timings = [
        c.timing for r in results for c in r.outputs if c.timing is not None and c.timing.first_token is not None
    ]
    first = sum(t.first_token for t in timings) / max(1, len(timings))
    return (
        f"--- {stats.prompt_tokens} prompt + {stats.generation_tokens} new tokens in {seconds:.2f} s, {stats.steps} "
        f"steps: {stats.generation_tokens / max(seconds, 1e-9):.1f} new tokens/s; first token after {first:.3f} s; "
        f"{stats.prefix_cache_hits} prompt tokens found in the prefix cache; {stats.preemptions} pre-emptions; pool of "
        f"{stats.pages} pages"
    )


COMMANDS = (Command("generate", "generate text from prompts", _add_generate, _generate),)


def group(name: str, help: str, commands: Sequence[Command]) -> Command:
    """Commands below a command: ``dmc bench latency``."""
    return Command(name, help, lambda parser: _add_commands(parser, name, commands), lambda args: 2)


def _add_commands(parser: argparse.ArgumentParser, dest: str, commands: Sequence[Command]) -> None:
    subparsers = parser.add_subparsers(dest=dest, required=True, metavar="COMMAND")
    for command in commands:
        sub = subparsers.add_parser(command.name, help=command.help, description=command.help, allow_abbrev=False)
        sub.set_defaults(run=command.run)
        command.add(sub)


def build_parser(commands: Sequence[Command] = COMMANDS) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dmc", description="Language models with a compressed cache.", allow_abbrev=False
    )
    _add_commands(parser, "command", commands)
    return parser


def main(argv: Optional[Sequence[str]] = None, commands: Sequence[Command] = COMMANDS) -> int:
    """Exit status: 0; 2 with one line on stderr for what is wrong with the command or a request; 130 when
    interrupted.
    """
    args = build_parser(commands).parse_args(argv)
    warnings.filterwarnings("ignore")
    try:
        return args.run(args)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
