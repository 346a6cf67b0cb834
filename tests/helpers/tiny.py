"""A tiny data set and model for tests of whole training runs, and a way to start, watch and kill such runs cheaply.

Runs are forked from a server process that has torch and megatron-core loaded (multiprocessing's ``forkserver``), so
that one takes a second and not ten. They are real in all else: ``retrofit.main`` in a process of its own, SIGKILL and
all.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Optional

import torch
from helpers import forked
from helpers.processes import PATIENCE

ROOT = Path(__file__).resolve().parent.parent.parent
for folder in ("tools", "examples/dmc", "tests"):
    if str(ROOT / folder) not in sys.path:
        sys.path.insert(0, str(ROOT / folder))

VOCABULARY, SEQ = 512, 32
GO_ON = "goes_on"
"""Name of the file that ends a ``pause``."""
MODEL = dict(
    num_layers=2,
    hidden_size=32,
    ffn_hidden_size=64,
    num_attention_heads=4,
    num_query_groups=2,
    vocab_size=VOCABULARY,
    make_vocab_size_divisible_by=64,
    max_position_embeddings=64,
)
RUN = dict(seq_length=SEQ, micro_batch_size=2, global_batch_size=4, lr=1e-3, log_interval=1)


def make_data(directory: Path) -> Path:
    """``train`` and ``valid`` datasets with ``tokenizer.model``, and ``other.model``, a tokenizer that made neither."""
    import build_corpus

    from megatron.dmc import cli

    texts = [text for _, text in build_corpus.source_files(Path(os.__file__).parent / "json")]
    build_corpus.train_tokenizer(texts, VOCABULARY, directory / "tokenizer.model")
    build_corpus.train_tokenizer(texts, 600, directory / "other.model")
    for name, part in (("train", texts[:-1]), ("valid", texts[-1:])):
        source = directory / f"{name}.jsonl"
        source.write_text("".join(json.dumps({"text": text}) + "\n" for text in part))
        assert (
            cli.main(
                [
                    "data",
                    "preprocess",
                    "--input",
                    str(source),
                    "--tokenizer",
                    str(directory / "tokenizer.model"),
                    "--output-prefix",
                    str(directory / name),
                    "--workers",
                    "1",
                ]
            )
            == 0
        )
    return directory


def flags(**values: object) -> list[str]:
    """``lr=1e-3`` -> ``["--lr", "0.001"]``; True and False make switches, a list several values, None leaves it out."""
    result: list[str] = []
    for name, value in values.items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            result.append(flag if value else "--no-" + flag[2:])
        elif isinstance(value, (list, tuple)):
            result += [flag, *map(str, value)]
        elif value is not None:
            result += [flag, str(value)]
    return result


def command(data: Path, stage: str, **more: object) -> list[str]:
    """Arguments of a run. The model is described for pre-training only: later stages take it from their checkpoint."""
    values = {
        **(MODEL if stage == "pretrain" else {}),
        **RUN,
        "stage": stage,
        "data_path": [data / "train"],
        "tokenizer": data / "tokenizer.model",
        **more,
    }
    return flags(**values)


class Run:
    """One process per rank. ``hang``: see :func:`_hang`; ``wait_for_hang`` returns when a rank stands there. ``env``:
    more of their environment (they do not see this process's: it is the server's).
    """

    def __init__(
        self,
        argv: Sequence[str],
        directory: Path,
        world: int = 1,
        hang: Optional[str] = None,
        env: Optional[dict[str, str]] = None,
    ) -> None:
        self.log, self.spy, self.marker = directory / "log", directory / "spy", directory / "hangs"
        directory.mkdir(parents=True, exist_ok=True)
        for path in (self.log, self.spy, self.marker, self.marker.with_name(GO_ON)):
            path.unlink(missing_ok=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        group = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)} if world > 1 else {}
        self.ranks = []
        for rank in range(world):
            ranked = {**(env or {}), **({**group, "RANK": str(rank), "LOCAL_RANK": str(rank)} if group else {})}
            args = (list(map(str, argv)), ranked, str(self.log), str(self.spy), hang, str(self.marker))
            self.ranks.append(forked.start(_child, *args))

    def kill(self) -> None:
        """SIGKILL every rank and whatever it has forked."""
        for process in self.ranks:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        self.join(None)

    def signal(self, number: int, rank: int = 0) -> None:
        os.kill(self.ranks[rank].pid, number)
        self.go_on()

    def go_on(self) -> None:
        """End a ``pause``."""
        self.marker.with_name(GO_ON).touch()

    def join(self, status: Optional[int] = 0, timeout: float = PATIENCE) -> Run:
        """Wait for the end; ``status`` is what every rank must exit with (None: anything)."""
        end = time.monotonic() + timeout
        for process in self.ranks:
            process.join(max(0.1, end - time.monotonic()))
            if process.exitcode is None:
                for other in self.ranks:
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(other.pid, signal.SIGKILL)
                raise AssertionError(f"no end after {timeout} s:\n{self.output()}")
        codes = [process.exitcode for process in self.ranks]
        assert status is None or codes == [status] * len(codes), f"exit status {codes}:\n{self.output()}"
        return self

    def wait_for_hang(self, timeout: float = PATIENCE) -> None:
        self.wait_for(self.marker.exists, timeout)

    def wait_for(self, condition, timeout: float = PATIENCE) -> None:
        end = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < end and self.ranks[0].is_alive(), f"waited in vain:\n{self.output()}"
            time.sleep(0.02)

    def output(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def values(self) -> dict[int, dict[str, str]]:
        """Iteration -> what was logged for it, exactly (hexadecimal floats)."""
        lines = map(json.loads, self.spy.read_text().splitlines()) if self.spy.exists() else []
        return {line.pop("iteration"): line for line in lines}


def run(
    argv: Sequence[str], directory: Path, world: int = 1, status: int = 0, env: Optional[dict[str, str]] = None
) -> Run:
    """Run to the end."""
    return Run(argv, directory, world, env=env).join(status)


def _child(argv: list[str], env: dict[str, str], log: str, spy: str, hang: Optional[str], marker: str) -> None:
    os.setsid()
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        os.environ.pop(name, None)
    os.environ.update(env)
    torch.set_num_threads(1)  # forked: OpenMP must not start threads
    from megatron.dmc.training import metrics, retrofit

    def line(self, iteration, steps, values, *rest, inner=metrics.Logger.line):
        if self.active:
            with open(spy, "a") as file:
                exact = {name: float(value).hex() for name, value in values.items()}
                file.write(json.dumps({"iteration": iteration, **exact}) + "\n")
        return inner(self, iteration, steps, values, *rest)

    metrics.Logger.line = line
    if hang:
        _hang(hang, Path(marker))
    try:
        status = retrofit.main(argv)
    except SystemExit as error:
        status = error.code
    except BaseException:
        import traceback

        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    sys.exit(status or 0)


def _hang(where: str, marker: Path) -> None:
    """Make this process stop for good at ``name:count``, the count-th time that it comes by.

    step: between forward and backward of a training step. shards, metadata, manifest, rename: in the middle of a
    checkpoint's tensors, before its metadata.json, before its manifest, before it gets its name. pause: like step, but
    goes on when :meth:`Run.signal` has sent a signal, or :meth:`Run.go_on` says so.
    """
    import functools

    from megatron.core.dist_checkpointing import serialization

    from megatron.dmc.training import checkpointing
    from megatron.dmc.training.loop import Trainer

    name, wanted = where.split(":")
    if name == "shards":
        _hang_in_shards(int(wanted), marker)
        return
    owner, attribute = {
        "step": (Trainer, "_loss"),
        "pause": (Trainer, "_loss"),
        "metadata": (serialization, "save_config"),
        "manifest": (checkpointing.Manifest, "write"),
        "rename": (checkpointing, "sync_tree"),
    }[name]
    inner, count = getattr(owner, attribute), 0

    @functools.wraps(inner)
    def patched(*args, **named):
        nonlocal count
        count += 1
        if count == int(wanted):
            marker.touch()
            end = time.monotonic() + 600
            while time.monotonic() < end and not (name == "pause" and marker.with_name(GO_ON).exists()):
                time.sleep(0.01)
        return inner(*args, **named)

    setattr(owner, attribute, patched)


def _hang_in_shards(wanted: int, marker: Path) -> None:
    """In the ``wanted``-th save, in the forked process that writes the tensors, with some of them written."""
    import functools

    from megatron.core.dist_checkpointing.strategies import filesystem_async

    from megatron.dmc.training.checkpointing import CheckpointWriter

    save, write, count = CheckpointWriter.save, filesystem_async._write_item, {"saves": 0, "items": 0}

    def patched_save(*args, **named):
        count["saves"] += 1
        return save(*args, **named)

    @functools.wraps(write)
    def patched_write(*args, **named):
        count["items"] += 1
        if count["saves"] == wanted and count["items"] == 9:
            marker.touch()
            time.sleep(600)
        return write(*args, **named)

    CheckpointWriter.save, filesystem_async._write_item = patched_save, patched_write


def checkpoint_tensors(checkpoint: Path) -> dict[str, object]:
    """Everything in a checkpoint: weights, optimizer state, and what is not sharded, flat by name."""
    from megatron.core.dist_checkpointing import load_common_state_dict
    from torch.distributed import checkpoint as dcp
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    reader = dcp.FileSystemReader(str(checkpoint))
    names = reader.read_metadata().state_dict_metadata
    state = {
        name: torch.empty(m.size, dtype=m.properties.dtype)
        for name, m in names.items()
        if isinstance(m, TensorStorageMetadata)
    }
    dcp.load(state, storage_reader=reader, no_dist=True)
    return {**state, **_flat(load_common_state_dict(str(checkpoint)), "common")}


def _flat(value: object, name: str) -> dict[str, object]:
    if isinstance(value, dict):
        return {k: v for key, item in value.items() for k, v in _flat(item, f"{name}.{key}").items()}
    if isinstance(value, (list, tuple)):
        return {k: v for i, item in enumerate(value) for k, v in _flat(item, f"{name}.{i}").items()}
    return {name: value}


def assert_same_checkpoint(a: Path, b: Path) -> None:
    """Bit for bit: every weight, every moment, every step count."""
    left, right = checkpoint_tensors(a), checkpoint_tensors(b)
    assert left.keys() == right.keys()
    odd = [
        name
        for name in left
        if not (torch.equal(left[name], right[name]) if torch.is_tensor(left[name]) else left[name] == right[name])
    ]
    assert not odd, f"{odd} differ"
