"""Tokenization of JSONL text into a Megatron indexed dataset.

One line of input is one document. Documents keep their order, so the output is the same bytes for any number of
workers. The files get their names only when all is written: an interrupted run, or a bad line, leaves nothing behind.
"""

from __future__ import annotations

import dataclasses
import io
import json
import multiprocessing
import os
import signal
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Optional

from megatron.dmc.environment import usable_cores
from megatron.dmc.training.disk import naming_disk_errors
from megatron.dmc.training.jsonl import read_lines

if TYPE_CHECKING:
    from megatron.dmc.training.tokenizer import Tokenizer

_CHUNK_BYTES = 1 << 20  # text handed to a worker at once: far above the cost of handing it over, small in memory


class Chunk(NamedTuple):
    """Consecutive lines of one input file."""

    file: str
    first_line: int
    lines: list[bytes]
    read_bytes: int
    """Bytes read of the file on disk, up to the end of this chunk."""


class Encoded(NamedTuple):
    """Documents of a chunk: their token ids, concatenated as bytes, and the number of tokens of each."""

    ids: bytes
    lengths: list[int]
    empty: int


@dataclass
class PreprocessConfig:
    """Input, tokenizer and output of a tokenization."""

    input: list[str] = field(metadata={"nargs": "+", "metavar": "FILE"})
    """JSONL files to tokenize, plain or gzip, in this order."""
    tokenizer: str = field(metadata={"metavar": "PATH"})
    """Sentencepiece .model file or Hugging Face tokenizer directory."""
    output_prefix: str = field(metadata={"metavar": "P"})
    """Prefix of the dataset: P.bin and P.idx (Megatron's format), and P.json, which names tokenizer and sizes."""
    workers: int = field(default_factory=usable_cores, metadata={"metavar": "N"})
    """Number of tokenizing processes. Default: the number of cores of this job."""
    json_key: str = field(default="text", metadata={"metavar": "KEY"})
    """Key of the text in every JSON document."""
    append_eod: bool = True
    """End every document with the tokenizer's EOS token."""
    prepend_bos: Optional[bool] = None
    """Start every document with the tokenizer's BOS token. Default: as the tokenizer does by itself, and so will before
    every prompt at inference."""
    overwrite: bool = field(default=False, metadata={"action": "store_true"})
    """Replace an existing dataset."""

    def check(self) -> None:
        """Raise ``ValueError`` for a wrong value or a missing input file."""
        if self.workers < 1:
            raise ValueError(f"--workers is {self.workers}; use at least 1")
        for file in self.input:
            if not os.path.isfile(file):
                raise ValueError(f"--input {file} does not exist or is not a file")


def read_chunks(files: list[str]) -> Iterator[Chunk]:
    """Cut the files into chunks of about a megabyte of text. Raises ``ValueError`` as :func:`read_lines` does."""
    for file in files:
        first, size, read, lines = 1, 0, 0, []
        for number, line, read in read_lines(file):
            lines.append(line)
            size += len(line)
            if size >= _CHUNK_BYTES:
                yield Chunk(file, first, lines, read)
                first, size, lines = number + 1, 0, []
        yield Chunk(file, first, lines, read)


class Encoder:
    """Parser and tokenizer of chunks; one in every worker process."""

    def __init__(self, config: PreprocessConfig, tokenizer: Tokenizer, dtype: str) -> None:
        self.tokenizer, self.dtype, self.key = tokenizer, dtype, config.json_key
        self.before = [tokenizer.bos_id] if config.prepend_bos else []
        self.after = [tokenizer.eod_id] if config.append_eod else []

    def __call__(self, chunk: Chunk) -> Encoded:
        """Encode a chunk. Raises ``ValueError`` naming file and line for a line that is no JSON object with a text."""
        import numpy

        out, lengths, empty = io.BytesIO(), [], 0
        for number, line in enumerate(chunk.lines, start=chunk.first_line):
            if not line.strip():
                continue
            where = f"{chunk.file}:{number}"
            try:
                document = json.loads(line)
            except ValueError as error:  # bad JSON or bad UTF-8
                raise ValueError(f"{where}: not a JSON document: {error}") from None
            if not isinstance(document, dict) or self.key not in document:
                found = ", ".join(document) if isinstance(document, dict) else f"a {type(document).__name__}"
                raise ValueError(
                    f"{where}: no key {self.key!r} (found: {found or 'nothing'}); name the text's with --json-key"
                )
            text = document[self.key]
            if not isinstance(text, str):
                raise ValueError(f"{where}: {self.key!r} is a {type(text).__name__}, not a string")
            if not text:
                empty += 1
                continue
            try:
                ids = self.tokenizer.encode(text)
            except Exception as error:  # e.g. half a surrogate pair, which JSON can write and UTF-8 cannot
                raise ValueError(f"{where}: the text cannot be tokenized: {error}") from None
            ids = [*self.before, *ids, *self.after]
            out.write(numpy.array(ids, dtype=self.dtype).tobytes())
            lengths.append(len(ids))
        return Encoded(out.getvalue(), lengths, empty)


_encoder: Encoder  # of this worker process


def _start_worker(config: PreprocessConfig, dtype: str) -> None:
    from megatron.dmc.training.tokenizer import load_tokenizer

    global _encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent stops the workers
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread per worker
    _encoder = Encoder(config, load_tokenizer(config.tokenizer), dtype)


def _encode_in_worker(chunk: Chunk) -> Encoded:
    return _encoder(chunk)


def encode_chunks(config: PreprocessConfig, tokenizer: Tokenizer, dtype: str) -> Iterator[tuple[Chunk, Encoded]]:
    """Encode all input in order, with ``--workers`` processes and a bounded number of chunks in memory."""
    chunks = read_chunks(config.input)
    if config.workers == 1:
        encoder = Encoder(config, tokenizer, dtype)
        yield from ((chunk, encoder(chunk)) for chunk in chunks)
        return
    # An executor rather than multiprocessing.Pool: a Pool reads the whole input ahead, and hangs when a worker is
    # killed. Workers are spawned: forking is not safe once Megatron and torch have started threads.
    executor = ProcessPoolExecutor(config.workers, multiprocessing.get_context("spawn"), _start_worker, (config, dtype))
    pending: deque[tuple[Chunk, Future[Encoded]]] = deque()

    def oldest() -> tuple[Chunk, Encoded]:
        chunk, future = pending.popleft()
        return chunk, future.result()

    try:
        for chunk in chunks:
            pending.append((chunk._replace(lines=[]), executor.submit(_encode_in_worker, chunk)))
            if len(pending) >= 4 * config.workers:
                yield oldest()
        while pending:
            yield oldest()
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


def write_dataset(config: PreprocessConfig, tokenizer: Tokenizer, directory: Path) -> str:
    """Write ``data.bin``, ``data.idx``, ``data.json`` into ``directory``. Returns a line with the sizes."""
    import numpy
    from tqdm import tqdm

    from megatron.dmc.training.indexed_writer import IndexedWriter

    started = time.perf_counter()
    writer = IndexedWriter(directory, tokenizer, eod_appended=config.append_eod, bos_prepended=config.prepend_bos)
    empty = 0
    sizes = {file: os.path.getsize(file) for file in config.input}
    done, file = 0, config.input[0]
    with tqdm(
        total=sum(sizes[f] for f in config.input), unit="B", unit_scale=True, desc="tokenizing", mininterval=0.5
    ) as bar:
        for chunk, encoded in encode_chunks(config, tokenizer, writer.dtype.__name__):
            ends = numpy.cumsum(encoded.lengths)[:-1]
            for ids in numpy.split(numpy.frombuffer(encoded.ids, writer.dtype), ends) if encoded.lengths else ():
                writer.add(ids)
            empty += encoded.empty
            if chunk.file != file:
                done, file = done + sizes[file], chunk.file
            bar.update(done + chunk.read_bytes - bar.n)
            bar.set_postfix_str(f"{writer.documents:,} documents, {writer.tokens:,} tokens", refresh=False)
    if writer.documents == 0:
        raise ValueError(
            f"{', '.join(config.input)}: no documents; give JSONL files with texts under {config.json_key!r}"
        )
    writer.close()
    note = f" ({empty:,} empty ones left out)" if empty else ""
    rate = writer.tokens / (time.perf_counter() - started)
    begin = f"beginning with BOS (id {tokenizer.bos_id})" if config.prepend_bos else "without BOS"
    return f"{writer.documents:,} documents{note} {begin}, {writer.tokens:,} tokens, {rate:,.0f} tokens/s"


def preprocess(config: PreprocessConfig) -> str:
    """Tokenize, write and publish a dataset. Returns a line with the sizes.

    Raises:
        ValueError, OSError: what the user must mend, with the file and line.
    """
    from megatron.dmc.training.indexed_writer import SUFFIXES, publish
    from megatron.dmc.training.tokenizer import load_tokenizer

    config.check()
    prefix = os.path.abspath(config.output_prefix)
    existing = [prefix + suffix for suffix in SUFFIXES if os.path.exists(prefix + suffix)]
    if existing and not config.overwrite:
        raise ValueError(f"{existing[0]} exists already; choose another --output-prefix or add --overwrite")
    tokenizer = load_tokenizer(config.tokenizer)
    config = dataclasses.replace(config, prepend_bos=tokenizer.resolve_bos(config.prepend_bos))

    parent = Path(prefix).parent
    created = [path for path in (parent, *parent.parents) if not path.exists()]
    parent.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(prefix=f".{Path(prefix).name}.", dir=parent) as directory:
            with naming_disk_errors(parent, (OSError,)):
                report = write_dataset(config, tokenizer, Path(directory))
                publish(Path(directory), prefix)
    except BaseException:
        with suppress(OSError):
            for path in created:
                path.rmdir()
        raise
    return report
