"""An engine in a process of its own for benchmarks/serving.py, which asks it for the times of requests that are run on
the engine itself, without HTTP.

    python _engine_process.py {alone | served} ARGUMENTS

ARGUMENTS are those of ``dmc serve``. ``served`` is that server, whose engine is measured in its own memory and on its
own thread while no client speaks to it; ``alone`` has the engine of the same arguments and nothing else. Every line of
stdin is a job, the keyword arguments of :func:`_streams.offline` as JSON; the answer is a line of stdout, its times.
"""

import asyncio
import dataclasses
import json
import sys
import threading
from collections.abc import Callable
from typing import Any

from _streams import Times, offline

from megatron.dmc.cli import options, serve
from megatron.dmc.inference import Engine
from megatron.dmc.inference.text import load_tokenizer
from megatron.dmc.serving import async_engine, server


def answer(run: Callable[[dict[str, Any]], Times]) -> None:
    """Answer the jobs of stdin until it ends."""
    for line in sys.stdin:
        print(json.dumps(dataclasses.asdict(run(json.loads(line)))), flush=True)


class MeasuredEngine(async_engine.AsyncEngine):
    """Engine of a server, which runs the jobs of stdin between two steps."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        threading.Thread(target=answer, args=(self._run_job,), daemon=True).start()

    def _run_job(self, job: dict[str, Any]) -> Times:
        return asyncio.run_coroutine_threadsafe(self.call(lambda engine: offline(engine, **job)), self.loop).result()


def main() -> int:
    kind, *argv = sys.argv[1:]
    if kind == "served":
        server.AsyncEngine = MeasuredEngine
        return serve.main(argv)
    args = serve.build_parser().parse_args(argv)
    engine = Engine(args.model, options.engine_config(args), load_tokenizer(args.model))
    server.warm_up(engine)
    answer(lambda job: offline(engine, **job))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
