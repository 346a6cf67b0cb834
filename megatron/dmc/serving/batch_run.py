"""A run of ``dmc batch``: files, engine, signals and progress around the :class:`BatchRunner`."""

import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, Optional

from tqdm import tqdm

from megatron.dmc import flags
from megatron.dmc.inference import Engine, EngineConfig
from megatron.dmc.inference.text import load_tokenizer
from megatron.dmc.serving.batch import DRAIN, LEAVE, RUN, BatchRunner, Options, Summary, check_same_input
from megatron.dmc.serving.batch_files import Input, Output
from megatron.dmc.serving.config import BatchConfig
from megatron.dmc.serving.prompts import Prompts, PromptSettings

UNFINISHED = 75
"""Exit status (EX_TEMPFAIL of sysexits.h) of a run that was asked to stop: run it again for the rest."""


class Stop:
    """Handler of SIGTERM, SIGUSR1 (a SLURM job's time is nearly over) and the first SIGINT: what runs may finish within
    ``timeout`` seconds."""

    def __init__(self, timeout: float) -> None:
        self._timeout, self._deadline = timeout, float("inf")
        self._old = {s: signal.signal(s, self._handle) for s in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}

    def _handle(self, number: int, frame: Optional[FrameType]) -> None:
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)  # the second one ends it at once
        self._deadline = min(self._deadline, time.monotonic() + self._timeout)

    def phase(self) -> int:
        """Phase of the run: see :class:`~megatron.dmc.serving.batch.BatchRunner`."""
        if self._deadline == float("inf"):
            return RUN
        return LEAVE if time.monotonic() >= self._deadline else DRAIN

    def restore(self) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)


def run(config: BatchConfig, engine_config: EngineConfig, defaults: Mapping[str, Any]) -> int:
    """Complete the lines of a file. Returns the exit status.

    Args:
        defaults: sampling parameters of lines that do not give them.

    Raises:
        ValueError: files, a model or settings that are wrong.
    """
    stop = Stop(config.shutdown_timeout)  # from here on, so that nothing is lost while the model is loaded
    try:
        return _run(config, engine_config, defaults, stop)
    finally:
        stop.restore()


def _run(config: BatchConfig, engine_config: EngineConfig, defaults: Mapping[str, Any], stop: Stop) -> int:
    first = int(os.environ.get("RANK", 0)) == 0 or engine_config.tensor_parallel_size == 1
    prompt_settings = PromptSettings.read(
        config.model,
        config.chat_template,
        config.generation_config,
        config.override_generation_config,
        tool_call_parser=config.auto_tool_call_parser(),
    )
    if (defaults_of_model := prompt_settings.default_sampling_params) and first:
        flags.say(f"sampling parameters of lines without their own: {json.dumps(defaults_of_model)}", "stderr")
    with contextlib.ExitStack() as files:
        source = files.enter_context(contextlib.closing(Input(config.input_file)))
        if os.path.exists(config.output_file) and os.path.samefile(config.input_file, config.output_file):
            raise ValueError(f"{config.output_file} is the input; name another output file")
        output = None
        if first:  # before the weights are loaded: it may be in use, or another input's
            output = files.enter_context(contextlib.closing(Output(config.output_file, True)))
            check_same_input(config.input_file, output, config.shard)
        summary = _complete(config, engine_config, defaults, stop, prompt_settings, source, output)
    if first and not summary.complete:
        flags.say("stopped before the end: run the same command again for the rest", "stderr")
    return 0 if summary.complete else UNFINISHED


def _complete(
    config: BatchConfig,
    engine_config: EngineConfig,
    defaults: Mapping[str, Any],
    stop: Stop,
    prompt_settings: PromptSettings,
    source: Input,
    output: Optional[Output],
) -> Summary:
    """Load the model and complete the lines. ``output``: None on ranks other than the first."""
    first = output is not None
    tokenizer = load_tokenizer(config.tokenizer or config.model)
    engine = Engine(config.model, engine_config, tokenizer)
    output = _same_on_all_ranks(engine, output, config.output_file)
    name = config.served_model_name or config.model
    names = frozenset({name, config.model, Path(config.model).name})
    options = Options(name, names, defaults, config.seed, config.shard)
    batch = BatchRunner(engine, Prompts(engine.input_processor, prompt_settings), output, options, stop.phase)
    progress, done = _progress(source, output, config.disable_tqdm or not first)
    try:
        summary = batch.run(source, progress)
    finally:
        done()
    if first:
        output.close()
        flags.say(describe(summary, engine))
    return summary


def _same_on_all_ranks(engine: Engine, output: Optional[Output], path: str) -> Output:
    """Output of this rank: the first rank has mended the file, the others read it before anything is written."""
    engine.barrier()
    output = output if output is not None else Output(path, False)
    engine.barrier()
    return output


class _Unbreakable:
    """Stderr for a progress bar: one that nobody reads any more ends no run."""

    def write(self, text: str) -> None:
        with contextlib.suppress(OSError):
            sys.stderr.write(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            sys.stderr.flush()

    def fileno(self) -> int:
        return sys.stderr.fileno()  # for the width of the terminal


def _progress(source: Any, output: Any, disable: bool) -> tuple[Callable[[Any], None], Callable[[], None]]:
    """Progress bar: a function to call after every step, and one to call at the end.

    It counts bytes read, since the number of lines is not known before the end.
    """
    quiet = sys.stderr is None or not sys.stderr.isatty()
    bar = tqdm(
        total=source.nbytes,
        unit="B",
        unit_scale=True,
        disable=disable or sys.stderr is None,
        mininterval=60 if quiet else 0.5,
        miniters=1,
        file=_Unbreakable(),
    )
    earlier, began = output.done.errors, time.monotonic()

    def update(summary: Any) -> None:
        usage, seconds = summary.usage, max(1e-9, time.monotonic() - began)
        bar.set_postfix(
            lines=summary.skipped + summary.completed + summary.errors,
            errors=earlier + summary.errors,
            tok_s=f"{usage.completion_tokens / seconds:.0f}",
            CR=f"{usage.body()['dmc']['compression_ratio']:.2f}",
            refresh=False,
        )
        bar.update(source.tell() - bar.n)

    return (update if not disable else lambda summary: None), bar.close


def describe(summary: Any, engine: Any) -> str:
    """Summary of a run in a few lines."""
    usage, seconds = summary.usage, max(1e-9, summary.seconds)
    total, stats = usage.prompt_tokens + usage.completion_tokens, engine.stats()
    ratio = usage.body()["dmc"]["compression_ratio"]
    left = f"; {summary.unfinished} begun and left" if summary.unfinished else ""
    lines = [
        f"{summary.completed} lines completed, {summary.errors} with an error; {summary.skipped} were there "
        f"before{left}",
        f"{usage.prompt_tokens} prompt + {usage.completion_tokens} new tokens in {summary.seconds:.1f} s: "
        f"{usage.completion_tokens / seconds:.1f} new tokens/s, {total / seconds:.1f} tokens/s",
        f"CR {ratio:.2f}; at most {summary.peak_pages} of {stats.pages} pages in use; {stats.preemptions} preemptions",
    ]
    if summary.strangers:
        lines.append(f"{summary.strangers} lines of the output belong to no line of this input")
    return "\n".join(lines)
