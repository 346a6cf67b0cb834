"""Decoding with DMS adapters against the model without them, in the same cache memory, on real text.

    benchmarks/adapter.py --model SmolLM2-135M-Instruct --adapter adapter-4x --data valid_prose.jsonl --dtype bfloat16

The cache has room for --sequences sequences of the model without adapters, page tables included. Both engines read as
many texts of --contexts tokens as their caches hold, and then decode in turns. Ratios are within the rounds. Texts
come from --data, the first ones of each file in turn, and repeat when there are too few of the length; the prefix cache
is off.

Target (--check): at least 0.9 times as many tokens per second as there is compression measured.
"""

import argparse
import gc
import itertools
import math
import time
from pathlib import Path

import torch
from _common import add_device, arguments, finish, quartiles, ratio, resolve_device, run_script, table
from engine import budget, decode_in_turn, fill, room

from megatron.dmc import flags
from megatron.dmc.checkpoint.formats.adapter import open_directory
from megatron.dmc.evaluation.fidelity_report import Text
from megatron.dmc.inference import LLM
from megatron.dmc.inference.weights import read_info

READ = 2048  # tokens of a step while texts are read
MOST = 8  # times the plain model's sequences that are tried with adapters
TARGET = 0.9


def texts(args: argparse.Namespace, length: int, count: int) -> list[list[int]]:
    """``count`` texts of a length, the first ones of each file in turn."""
    source = Text(args.model)
    found = [source.sequences(str(path), length, count).tolist() for path in args.data]
    each = [text for several in itertools.zip_longest(*found) for text in several if text is not None]
    return list(itertools.islice(itertools.cycle(each), count))


def measure(context: int, args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> dict:
    """Figures at one length, of both engines."""
    model = read_info(open_directory(args.model, args.adapter)).model
    new = room(context, MOST * args.sequences, READ)
    heads = model.num_layers * model.kv_heads
    memory = budget(context + new, args.sequences, heads, model.head_dim, dtype)
    engines, many = {}, MOST * args.sequences
    for name, adapter, rows in (("plain", None, args.sequences), ("adapters", str(args.adapter), many)):
        llm = LLM(
            args.model,
            adapter=adapter,
            dtype=str(dtype).removeprefix("torch."),
            device=device.type,
            kv_cache_memory_bytes=memory,
            max_num_seqs=rows,
            max_model_len=context + new,
            max_num_batched_tokens=READ,
            enable_prefix_caching=False,
        )
        fill(llm, texts(args, context, rows), new)
        engines[name] = llm.engine
    figures, per_token = decode_in_turn(engines, device, args.seconds)
    times_more = ratio(per_token["plain"], per_token["adapters"])
    return {"cache_bytes": memory, "decoded_tokens": new, "tokens_ratio": times_more, **figures}


def main() -> None:
    parser = arguments(__doc__)
    add_device(parser)
    parser.add_argument(
        "--model", type=Path, required=True, metavar="DIR", help="Hugging Face directory of a plain model"
    )
    parser.add_argument("--adapter", type=Path, required=True, metavar="DIR", help="directory of its DMS adapters")
    parser.add_argument(
        "--data", required=True, nargs="+", type=Path, metavar="FILE", help="texts, as dmc eval fidelity"
    )
    parser.add_argument(
        "--contexts", type=flags.number(int, 2), nargs="+", default=[4096], help="tokens of each text (default: 4096)"
    )
    parser.add_argument(
        "--sequences",
        type=flags.number(int, 1),
        default=8,
        help="sequences of the plain model that the cache holds (default: 8)",
    )
    parser.add_argument("--seconds", type=flags.number(float, 0), default=60, help="of each comparison (default: 60)")
    args = parser.parse_args()
    start = time.perf_counter()
    device, dtype = resolve_device(args)
    figures, missed, rows = {}, [], []
    for context in args.contexts:
        found = figures[f"context {context}"] = measure(context, args, device, dtype)
        gc.collect()
        faster, cr = found["tokens_ratio"], found["adapters"]["compression_ratio"]
        for name in ("plain", "adapters"):
            x = found[name]
            cells = [context, name, x["sequences"], x["compression_ratio"], f"{x['waste']:.1%}"]
            cells += [x["step_ms"]["median"], x["tokens_per_second"]["median"]]
            rows.append([*cells, *(["", ""] if name == "plain" else [faster["median"], quartiles(faster)])])
        if not math.isfinite(cr) or faster["median"] < TARGET * cr:
            missed.append(f"{context} tokens: {faster['median']:.2f} times the tokens per second at CR {cr:.2f}")
    print(table(("context", "", "sequences", "CR", "empty", "ms/step", "tokens/s", "ratio", "quartiles"), rows))
    finish(args, "adapter", figures, missed, start)


if __name__ == "__main__":
    run_script(main)
