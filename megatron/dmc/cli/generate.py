"""``dmc generate``: text from prompts, with the compressed cache's figures."""

import argparse
import contextlib
import dataclasses
import io
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Optional

from megatron.dmc import flags
from megatron.dmc.cli import options
from megatron.dmc.inference import LLM, Completion, RequestOutput, SamplingParams


def _ids(text: str) -> list[int]:
    try:
        return [int(part) for part in text.replace(",", " ").split()]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of token ids") from None


@dataclass
class GenerateConfig:
    """Model, prompts and output of ``dmc generate``."""

    model: str = field(metadata={"flags": ("model",), "metavar": "MODEL"})
    """Hugging Face directory, plain, quantized or exported from a retrofit; or GGUF file."""
    prompts: Optional[list] = field(
        default=None, metadata={"flags": ("--prompt",), "action": "append", "dest": "prompts", "metavar": "TEXT"}
    )
    """Text to complete; may be given several times."""
    tokenizer: Optional[str] = field(default=None, metadata={"metavar": "DIR"})
    """Directory of the tokenizer. Default: the model's."""
    stream: bool = field(default=False, metadata={"action": "store_true"})
    """Print tokens as they are sampled, for one prompt and one completion."""
    stats: bool = field(default=False, metadata={"action": "store_true"})
    """Print slots and compression ratio by layer and KV head, and times, after the completions."""
    stop: list[str] = field(default_factory=list, metadata={"action": "append", "metavar": "TEXT"})
    """String that ends a completion, and is not part of it; may be given several times."""
    stop_token_ids: list[int] = field(default_factory=list, metadata={"nargs": None, "type": _ids, "metavar": "IDS"})
    """Token ids that end a completion, such as 2,13. Default: none."""
    ignore_eos: bool = field(default=False, metadata={"action": "store_true"})
    """Sample --max-tokens tokens, whatever the end-of-sequence token says."""


def build_parser() -> flags.Parser:
    parser = flags.Parser(
        prog="dmc generate",
        description="Generate text from prompts, with a plain model or one exported from a retrofit.",
        examples="""
            dmc generate Llama-2-7B-DMC-4x --prompt "def main(" --max-tokens 64 --stream --stats
            dmc generate Llama-2-7B-DMC-4x --prompt "The cache of" --prompt "Once upon" --temperature 0.8 --seed 1
            """,
    )
    flags.add_fields(parser, GenerateConfig)
    ids = "Token ids to complete, such as 1,2,3; may be given several times."
    parser.add_argument("--prompt-ids", action="append", type=_ids, dest="prompts", metavar="IDS", help=ids)
    options.add_sampling(parser, max_tokens=128, temperature=0.0)
    options.add_engine(parser)
    parser.set_defaults(run=_run)
    return parser


main = flags.entry(build_parser)


def _run(args: argparse.Namespace) -> int:
    if not args.prompts:
        raise ValueError("there is no prompt; give --prompt TEXT or --prompt-ids IDS")
    if args.stream and (len(args.prompts) > 1 or args.n > 1):
        raise ValueError(
            f"--stream shows one completion; here are {len(args.prompts)} prompts with {args.n} completions each"
        )
    own = {"stop": args.stop, "stop_token_ids": args.stop_token_ids, "ignore_eos": args.ignore_eos}
    sampling_params = flags.read(SamplingParams, args, options.SAMPLING, **own)
    llm = LLM(args.model, tokenizer=args.tokenizer, **dataclasses.asdict(options.engine_config(args)))
    # All tensor-parallel ranks have the same to print.
    with contextlib.redirect_stdout(io.StringIO()) if llm.engine.parallel.rank else contextlib.nullcontext():
        return _generate(llm, args, sampling_params)


def _generate(llm: Any, args: argparse.Namespace, sampling_params: SamplingParams) -> int:
    began = time.monotonic()
    if args.stream:
        results = [_stream(llm, args.prompts[0], sampling_params)]
    else:
        results = llm.generate(args.prompts, sampling_params)
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
        name = f"--- prompt {result.request_id}, completion {completion.index} ({completion.finish_reason})\n"
        has_text = bool(completion.text)
        print(f"{name if named else ''}{prompt}{'' if has_text else ' '}{_text(completion, has_text)}")


def _stream(llm: Any, prompt: str | list[int], sampling_params: SamplingParams) -> RequestOutput:
    result = RequestOutput("0", prompt if isinstance(prompt, str) else None, [], [Completion(0)])
    has_text = llm.engine.tokenizer is not None
    print(prompt if isinstance(prompt, str) else " ".join(map(str, prompt)), end="", flush=True)
    for output in llm.stream(prompt, sampling_params):
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
        f"{use.pages} pages of {use.page_size}, {use.waste:.1%} of them empty; "
        f"{use.bytes_per_token:.0f} bytes per token"
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
        f"{stats.prefix_cache_hits} prompt tokens found in the prefix cache; {stats.preemptions} preemptions; pool of "
        f"{stats.pages} pages"
    )
