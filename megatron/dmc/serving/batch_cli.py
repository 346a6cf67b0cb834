"""``dmc batch``: a file of requests in, a file of answers out, whatever happens in between.

    dmc batch -i requests.jsonl.gz -o answers.jsonl --model Llama-2-7B-DMC-4x
    dmc batch -i requests.jsonl -o answers-$SLURM_ARRAY_TASK_ID.jsonl --model M --shard $SLURM_ARRAY_TASK_ID/8

The same command again goes on where it was interrupted.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, Optional

from megatron.dmc.inference.cli import ENGINE_OPTIONS, SAMPLING_OPTIONS, Command, take_options
from megatron.dmc.inference.cli import add_options as add_engine_options
from megatron.dmc.inference.config import EngineConfig

UNFINISHED = 75
"""Exit status (EX_TEMPFAIL of sysexits.h) of a run that was asked to stop: run it again for the rest."""


def shard(text: str) -> tuple[int, int]:
    """``i/n``: lines i, i + n, i + 2n, ... of the input, counted from 0."""
    index, slash, count = text.partition("/")
    if not slash or not index.isdecimal() or not count.isdecimal() or not int(index) < int(count):
        raise argparse.ArgumentTypeError(f"{text!r} is not one of 0/n, 1/n ... (n-1)/n")
    return int(index), int(count)


def _add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-i", "--input-file", required=True, metavar="FILE", help="JSONL, plain or gzip")
    parser.add_argument(
        "-o", "--output-file", required=True, metavar="FILE", help="JSONL; lines that it has are not asked again"
    )
    parser.add_argument(
        "--model", required=True, metavar="DIR", help="Hugging Face directory, plain or exported from a retrofit"
    )
    parser.add_argument(
        "--served-model-name", metavar="NAME", help="in requests and answers (default: --model as it is given)"
    )
    parser.add_argument("--tokenizer", metavar="DIR", help="default: the model's")
    parser.add_argument(
        "--shard",
        type=shard,
        default=(0, 1),
        metavar="I/N",
        help="every N-th line, from line I, counted from 0; each shard has an output file of its own",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of lines without one, with their custom_id (default: %(default)s)"
    )
    parser.add_argument(
        "--shutdown-timeout",
        type=float,
        default=0.0,
        metavar="SECONDS",
        help="for what runs when SIGTERM comes; the rest is the next run's (default: %(default)s)",
    )
    parser.add_argument("--disable-tqdm", action="store_true", help="no progress bar")
    sampling = parser.add_argument_group("sampling", "of lines that do not say")
    for name, (kind, text) in SAMPLING_OPTIONS.items():
        if name != "seed":
            sampling.add_argument("--" + name.replace("_", "-"), type=kind, help=text)
    add_engine_options(parser.add_argument_group("engine"), EngineConfig, ENGINE_OPTIONS)  # type: ignore[arg-type]


class Stop:
    """SIGTERM, SIGUSR1 (a SLURM job's time is nearly over) and the first SIGINT: finish what ends within ``timeout``
    seconds.
    """

    def __init__(self, timeout: float) -> None:
        self._timeout, self._deadline = timeout, float("inf")
        self._old = {s: signal.signal(s, self._handle) for s in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}

    def _handle(self, number: int, frame: Optional[FrameType]) -> None:
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)  # the second one ends it at once
        self._deadline = min(self._deadline, time.monotonic() + self._timeout)

    def phase(self) -> int:
        """See :class:`~megatron.dmc.serving.batch.Batch`."""
        from megatron.dmc.serving.batch import DRAIN, LEAVE, RUN

        if self._deadline == float("inf"):
            return RUN
        return LEAVE if time.monotonic() >= self._deadline else DRAIN

    def restore(self) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)


def _run(args: argparse.Namespace) -> int:
    stop = Stop(args.shutdown_timeout)  # from here on, so that nothing is lost while the model is read
    try:
        return _batch(args, stop)
    except ModuleNotFoundError as error:
        raise ValueError(f"dmc batch needs the package {error.name}: pip install 'megatron-dmc[serve]'") from error
    finally:
        stop.restore()


def _batch(args: argparse.Namespace, stop: Stop) -> int:
    from megatron.dmc.inference.engine import Engine
    from megatron.dmc.inference.text import load_tokenizer
    from megatron.dmc.serving.batch import Batch, Options
    from megatron.dmc.serving.batch_files import Input
    from megatron.dmc.serving.prompts import Prompts

    source = Input(args.input_file)
    if os.path.exists(args.output_file) and os.path.samefile(args.input_file, args.output_file):
        raise ValueError(f"{args.output_file} is the input; name another output file")
    first = int(os.environ.get("RANK", 0)) == 0 or args.tensor_parallel_size == 1
    output = _open(args) if first else None  # before the weights are read: it may be in use
    tokenizer = load_tokenizer(args.tokenizer or args.model)
    engine = Engine(args.model, EngineConfig(**take_options(args, ENGINE_OPTIONS)), tokenizer)
    output = _same_on_all_ranks(engine, output, args)
    name = args.served_model_name or args.model
    defaults = {n: value for n in SAMPLING_OPTIONS if n != "seed" and (value := getattr(args, n)) is not None}
    options = Options(name, frozenset({name, args.model, Path(args.model).name}), defaults, args.seed, args.shard)
    prompts = Prompts(tokenizer, engine.info.model.vocab_size, engine.sizes.max_model_len)
    batch = Batch(engine, prompts, output, options, stop.phase)
    progress, done = _progress(source, output, args.disable_tqdm or not first)
    try:
        summary = batch.run(source, progress)
    finally:
        done()
        output.close()
        source.close()
    if first:
        print(describe(summary, engine))
        if not summary.complete:
            print("stopped before the end: run the same command again for the rest", file=sys.stderr)
    return 0 if summary.complete else UNFINISHED


def _open(args: argparse.Namespace, write: bool = True) -> Any:
    from megatron.dmc.serving.batch_files import Output

    return Output(args.output_file, write)


def _same_on_all_ranks(engine: Any, output: Any, args: argparse.Namespace) -> Any:
    """The first rank has mended the file; the others read it before anything is written."""
    if engine.parallel.size == 1:
        return output
    import torch.distributed as dist

    dist.barrier(engine.parallel.group)
    output = output if output is not None else _open(args, write=False)
    dist.barrier(engine.parallel.group)
    return output


def _progress(source: Any, output: Any, disable: bool) -> tuple[Callable[[Any], None], Callable[[], None]]:
    """(called after every step, called at the end). The bar is of bytes read: the number of lines is not known before
    the end.
    """
    from tqdm import tqdm

    quiet = not sys.stderr.isatty()
    bar = tqdm(
        total=source.nbytes, unit="B", unit_scale=True, disable=disable, mininterval=60 if quiet else 0.5, miniters=1
    )
    earlier, began = output.done.errors, time.monotonic()

    def update(summary: Any) -> None:
        usage, seconds = summary.usage, max(1e-9, time.monotonic() - began)
        bar.set_postfix(
            lines=summary.skipped + summary.answered + summary.errors,
            errors=earlier + summary.errors,
            tok_s=f"{usage.completion_tokens / seconds:.0f}",
            CR=f"{usage.body()['dmc']['compression_ratio']:.2f}",
            refresh=False,
        )
        bar.update(source.tell() - bar.n)

    return (update if not disable else lambda summary: None), bar.close


def describe(summary: Any, engine: Any) -> str:
    """What a run did, in a few lines."""
    usage, seconds = summary.usage, max(1e-9, summary.seconds)
    total, pages = usage.prompt_tokens + usage.completion_tokens, engine.cache.num_pages * engine.parallel.size
    left = f"; {summary.unfinished} begun and left" if summary.unfinished else ""
    lines = [
        f"{summary.answered} lines answered, {summary.errors} with an error; {summary.skipped} were there before{left}",
        f"{usage.prompt_tokens} prompt + {usage.completion_tokens} new tokens in {summary.seconds:.1f} s: "
        f"{usage.completion_tokens / seconds:.1f} new tokens/s, {total / seconds:.1f} tokens/s",
        f"CR {usage.body()['dmc']['compression_ratio']:.2f}; at most {summary.peak_pages} of {pages} pages in use; "
        f"{engine.stats().preemptions} pre-emptions",
    ]
    if summary.strangers:
        lines.append(f"{summary.strangers} lines of the output answer no line of this input")
    return "\n".join(lines)


COMMAND = Command("batch", "answer a file of requests, each line once", _add, _run)
