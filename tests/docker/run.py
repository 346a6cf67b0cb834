#!/usr/bin/env python3
"""What the Dockerfile's stages do, without Docker: every instruction's effect in a clean directory.

    tests/docker/run.py [--directory DIR] [--python PYTHON] [--system-site-packages]

COPY copies (what .dockerignore lets through), ENV and WORKDIR hold, RUN lines run, with the image's paths moved into
the directory (/opt/dmc -> DIR/serve/opt/dmc). apt-get only simulates, and useradd and install -o are left out: they
need the image. Then the entry point starts the server as it would there, on a tiny model with random weights, and the
health check must pass. Megatron must not be importable. In place of the base image of "train" there is an environment
with the packages of it that training needs, but for Transformer Engine. --system-site-packages takes installed packages
instead of downloading torch.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
MOVED = ("/opt/dmc", "/opt/megatron-dmc", "/src", "/cache")
# Of NVIDIA's PyTorch image: what training needs of it. constraints.txt says which versions are tested.
BASE_OF_TRAIN = ("torch", "numpy", "packaging", "pyyaml", "tqdm", "psutil", "tensorboard", "matplotlib")
ONLY_ON_GPUS = "transformer_engine, "
PORT = "8000"


def instructions() -> list[tuple[str, str]]:
    """(instruction, rest) with continued lines joined and comments removed."""
    lines, joined = (ROOT / "Dockerfile").read_text().splitlines(), ""
    found = []
    for line in lines:
        if line.lstrip().startswith("#") or not line.strip() and not joined:
            continue
        joined += line.rstrip("\\") if line.endswith("\\") else line
        if not line.endswith("\\"):
            name, _, rest = joined.strip().partition(" ")
            found.append((name.upper(), rest.strip()))
            joined = ""
    return found


def ignored(directory: str, names: list[str]) -> list[str]:
    """Of .dockerignore's patterns those for files below what it lets through."""
    return [name for name in names if name == "__pycache__" or name.endswith((".pyc", ".so"))]


class Image:
    """One stage's file system, of which only the paths in MOVED are real."""

    def __init__(self, directory: Path, args: argparse.Namespace) -> None:
        self.root, self.args = directory, args
        self.env = {
            name: value for name, value in os.environ.items() if name in ("HOME", "LANG") or name.startswith("PIP_")
        }
        self.env["PATH"] = "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"
        self.workdir, self.health, self.entry, self.command = "/", [], [], []
        directory.mkdir(parents=True)

    def stand_in(self) -> None:
        """What the base image of "train" has."""
        self.shell("python3 -m venv /opt/dmc")
        self.env["PATH"] = f"{self.moved('/opt/dmc')}/bin:{self.env['PATH']}"
        self.shell(f"pip install -q -c {ROOT}/constraints.txt {' '.join(BASE_OF_TRAIN)}")

    def moved(self, text: str) -> str:
        for path in MOVED:
            text = re.sub(rf"(?<![\w.}}/]){path}\b", f"{self.root}{path}", text)
        return text

    def path(self, name: str) -> Path:
        return Path(self.moved(name if name.startswith("/") else f"{self.workdir.rstrip('/')}/{name}"))

    def shell(self, line: str) -> None:
        packages = r"apt-get update && apt-get install -y (.*?) && rm -rf /var/lib/apt/lists/\*"
        line = re.sub(packages, r"apt-get install --simulate \1", line)
        line = line.replace(ONLY_ON_GPUS, "")
        line = re.sub(r"useradd .*? && install -d -o dmc -g dmc", "mkdir -p", line)
        if line.startswith("python3 -m venv"):
            line = line.replace("python3", str(self.args.python), 1)
            line += " --system-site-packages" if self.args.system_site_packages else ""
        where = self.path("") if self.workdir != "/" else self.root
        subprocess.run(["bash", "-euc", self.moved(line)], cwd=where, env=self.env, check=True)

    def do(self, name: str, rest: str, stages: dict[str, Image]) -> None:
        if name == "RUN":
            print(f"RUN {rest}", flush=True)
            self.shell(rest)
        elif name == "ENV":
            for word in shlex.split(rest):
                key, _, value = word.partition("=")
                self.env[key] = self.moved(value.replace("$PATH", self.env["PATH"]))
        elif name == "WORKDIR":
            self.workdir = rest
            self.path("").mkdir(parents=True, exist_ok=True)
        elif name == "COPY":
            words = rest.split()
            if words[0].startswith(
                "--from="
            ):  # scripts name the interpreter by its path: they stay where they were made
                source = stages[words[0].removeprefix("--from=")]
                self.path(words[2]).parent.mkdir(parents=True, exist_ok=True)
                os.symlink(source.path(words[1]), self.path(words[2]))
                return
            *sources, target = words
            for source in sources:
                to = self.path(target)
                to = to / Path(source).name if target.endswith("/") else to
                to.parent.mkdir(parents=True, exist_ok=True)
                if (ROOT / source).is_dir():
                    shutil.copytree(ROOT / source, to, ignore=ignored)
                else:
                    shutil.copy(ROOT / source, to)
        elif name == "HEALTHCHECK":
            self.health = json.loads(rest.partition("CMD ")[2])
        elif name == "ENTRYPOINT":
            self.entry = json.loads(rest)
        elif name == "CMD":
            self.command = json.loads(rest)
        elif name not in ("USER", "VOLUME", "EXPOSE", "STOPSIGNAL"):
            raise SystemExit(f"{name} {rest}: this script does not know that instruction")


def serve(image: Image, directory: Path) -> None:
    """The entry point with its default command, on another port and model."""
    model = directory / "model"
    model.mkdir()
    (model / "config.json").write_text(
        json.dumps(
            {
                "architectures": ["LlamaForCausalLM"],
                "model_type": "llama",
                "hidden_size": 64,
                "intermediate_size": 128,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "vocab_size": 256,
                "rms_norm_eps": 1e-5,
                "max_position_embeddings": 256,
                "tie_word_embeddings": False,
                "torch_dtype": "float32",
            }
        )
    )
    port = str(20000 + os.getpid() % 20000)
    command = [*image.entry, *image.command]
    assert command[:2] == ["dmc", "serve"] and PORT in command, command
    command = [{"/model": str(model), PORT: port, "0.0.0.0": "127.0.0.1"}.get(word, word) for word in command]
    command += ["--load-format", "dummy", "--kv-cache-memory-bytes", "50000000"]
    health = [word.replace(f":{PORT}/", f":{port}/") for word in image.health]
    process = subprocess.Popen(command, env=image.env, cwd=image.path(""))
    try:
        end = time.monotonic() + 240
        while subprocess.run(health, env=image.env, capture_output=True).returncode:
            if process.poll() is not None or time.monotonic() > end:
                raise SystemExit(f"the server is not healthy (exit status {process.poll()}): {shlex.join(command)}")
            time.sleep(1)
        print("healthy", flush=True)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0, process.returncode
    finally:
        if process.poll() is None:
            process.kill()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, help="a new one (default: a temporary one)")
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--system-site-packages", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        directory = (args.directory or Path(temporary) / "images").absolute()
        stages: dict[str, Image] = {}
        for name, rest in instructions():
            if name == "FROM":
                stage = rest.split(" AS ")[1]
                stages[stage] = Image(directory / stage, args)
                if stage == "train":
                    stages[stage].stand_in()
            elif stages:
                stages[stage].do(name, rest, stages)
        image = stages["serve"]
        if not args.system_site_packages:
            found = subprocess.run(
                ["python", "-c", "import megatron.core"], env=image.env, capture_output=True, cwd=directory
            )
            assert found.returncode, "the image has megatron-core"
        libraries = list((image.path("/opt/dmc")).rglob("megatron/dmc/kernels/lib/*.so"))
        assert libraries, "the kernels were not built ahead of time"
        print(f"kernels: {', '.join(sorted(path.name for path in libraries))}")
        serve(image, directory)
    print("all as it should be (the base images, Transformer Engine among them, were not at hand)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
