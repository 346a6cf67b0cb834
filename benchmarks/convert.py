"""Import and export of a model of 8 GB and more: memory, and speed against copying the same files.

A random Llama 3 model (bf16, vocabulary 128256) is written in shards. Then, in rounds: its files are copied and it is
imported; the checkpoint's files are copied and it is exported. Each runs in a process of its own and is synced to disk,
with what it reads in the page cache and nothing else (the rest is dropped from it). Memory is the process' peak of
resident memory above what it has after its imports. Needs three times the model's size on disk, and twice in memory for
the page cache.

Targets (--check): import and export peak below 2 GB; both are at least 0.6 times as fast as the copy beside them
(median of the rounds); the exported files are those of the model, byte for byte.
"""

import filecmp
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from _common import ROOT, arguments, finish, ratio, run_script, spread, table

MEMORY_TARGET, SPEED_TARGET = 2e9, 0.6

_CHILD = """
import json, os, resource, shutil, sys, time
sys.path.insert(0, {root!r})
import torch, safetensors
from megatron.dmc.checkpoint import convert, staging
import megatron.dmc.checkpoint.pickled
what, source, target = sys.argv[1:]
def resident():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before, began = resident(), time.perf_counter()
quiet = convert.Progress(say=lambda text: None)
if what == "import":
    convert.import_hf(source, target, overwrite=True, progress=quiet)
elif what == "export":
    convert.export(source, target, overwrite=True, progress=quiet)
else:
    from pathlib import Path
    with staging.staged(Path(target), True) as temporary:
        for path in sorted(p for p in Path(source).iterdir() if p.is_file()):
            shutil.copyfile(path, temporary / path.name)
print(json.dumps({{"seconds": time.perf_counter() - began, "bytes": resident() - before}}))
"""


def write_model(directory: Path, layers: int, seed: int = 0) -> int:
    """A Hugging Face directory of random weights; returns its bytes."""
    from megatron.dmc.checkpoint import mapping
    from megatron.dmc.checkpoint.formats import hf
    from megatron.dmc.checkpoint.tensors import Lazy
    from megatron.dmc.config import ModelConfig

    class Random(Lazy):
        noise = (torch.randn(1 << 22, generator=torch.Generator().manual_seed(seed)) * 0.02).bfloat16()

        def __init__(self, name: str, shape: tuple[int, ...]) -> None:
            self.name, self.shape, self.dtype = name, shape, torch.bfloat16

        def read_into(self, out: torch.Tensor, start: int) -> None:
            # Pieces of one sample, from a place that depends on the tensor: sampling gigabytes would take minutes.
            flat, at = out.view(-1), (hash_of(self.name) + start) % self.noise.numel()
            while flat.numel():
                n = min(flat.numel(), self.noise.numel() - at)
                flat[:n] = self.noise[at : at + n]
                flat, at = flat[n:], 0

    def hash_of(name: str) -> int:
        return sum((i + 1) * 7919 * c for i, c in enumerate(name.encode()))

    model = ModelConfig(
        num_layers=layers,
        hidden_size=4096,
        ffn_hidden_size=14336,
        num_attention_heads=32,
        num_query_groups=8,
        vocab_size=128256,
        max_position_embeddings=8192,
        rotary_base=5e5,
    )
    config = mapping.to_hf_config(model, "bfloat16")
    tensors = {name: Random(name, shape) for name, shape in mapping.hf_shapes(mapping.family_of(config), model).items()}
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    hf.write_weights(directory, tensors, hf.shard_layout(tensors))
    return sum(path.stat().st_size for path in directory.iterdir())


def measure(what: str, source: Path, target: Path) -> dict[str, float]:
    """Seconds and peak bytes of one conversion, in a process of its own."""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", _CHILD.format(root=str(ROOT)), what, str(source), str(target)]
    return json.loads(subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout)


def warm_only(place: Path, wanted: Path) -> None:
    """Bring the files of ``wanted`` into the page cache, and the others below ``place`` out of it."""
    os.sync()  # dirty pages cannot be dropped
    for path in sorted(place.rglob("*"), key=lambda p: wanted in p.parents):
        if path.is_file():
            with path.open("rb", buffering=0) as file:
                if wanted in path.parents:
                    while file.read(64 << 20):
                        pass
                elif hasattr(os, "posix_fadvise"):
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main() -> None:
    start = time.perf_counter()
    parser = arguments(__doc__)
    parser.add_argument("--layers", type=int, default=14, help="14: 8.2 GB; a layer of Llama 3 8B has 0.44 GB")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--directory", type=Path, help="for the files; default: a temporary directory")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.directory) as name:
        place = Path(name)
        source, checkpoint, back, copy = (place / part for part in ("hf", "checkpoint", "back", "copy"))
        nbytes = write_model(source, args.layers)
        found: dict[str, list[dict[str, float]]] = {what: [] for what in ("copy", "import", "copy back", "export")}
        same = True
        for _ in range(args.rounds):
            for what, a, b in (
                ("copy", source, copy),
                ("import", source, checkpoint),
                ("copy back", checkpoint, copy),
                ("export", checkpoint, back),
            ):
                warm_only(place, a)
                found[what].append(measure(what.split()[0], a, b))
                if b == copy:
                    shutil.rmtree(copy)
            shards = [path.name for path in source.glob("*.safetensors")]
            same = same and not any(filecmp.cmpfiles(source, back, shards, shallow=False)[1:])
            shutil.rmtree(checkpoint)
            shutil.rmtree(back)
    seconds = {what: [run["seconds"] for run in runs] for what, runs in found.items()}
    figures, rows, missed = {"model_bytes": nbytes, "identical": same, "seconds": seconds}, [], []
    for what, beside in (("copy", "copy"), ("import", "copy"), ("copy back", "copy back"), ("export", "copy back")):
        speed, peak = ratio(seconds[beside], seconds[what]), max(run["bytes"] for run in found[what])
        median = spread(seconds[what])["median"]
        figures[what] = {"speed_against_copy": speed, "peak_bytes": peak}
        rows.append(
            [
                what,
                f"{median:.1f}",
                f"{nbytes / median / 1e9:.2f}",
                f"{speed['median']:.2f}",
                f"{speed['min']:.2f}-{speed['max']:.2f}",
                f"{peak / 1e9:.2f}",
            ]
        )
        if what != beside and speed["median"] < SPEED_TARGET:
            missed.append(f"{what}: {speed['median']:.2f} times the speed of the copy, target {SPEED_TARGET}")
        if what != beside and peak > MEMORY_TARGET:
            missed.append(f"{what}: {peak / 1e9:.2f} GB of memory, target {MEMORY_TARGET / 1e9:g}")
    if not same:
        missed.append("the exported files differ from the model's")
    print(f"{nbytes / 1e9:.2f} GB in {len(shards)} files")
    print(table(("", "s", "GB/s", "x copy", "range", "peak GB"), rows))
    finish(args, "convert", figures, missed, start)


if __name__ == "__main__":
    run_script(main)
