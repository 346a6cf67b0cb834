"""Time to the first token with and without a cached prefix, and what prefix caching costs prompts that share nothing.

The random models of ``engine.py``, heads that merge three tokens of four (CR 4) and the same weights plain (CR 1). In
every round

- miss: a prefix of ``--prefix`` tokens that the engine has not seen, and a question of ``--question`` tokens;
- second: the same prefix before another question: it is read once more, and a snapshot taken where the questions begin;
- hit: a third question. same: the third prompt again, of which nothing is read.

Then ``--requests`` requests with one new prefix come together, and as many with nothing in common, in an engine with
prefix caching and in one without. Ratios are of interleaved rounds in one run.

Targets (--check): a hit's first token comes at least 10 times sooner than a miss's; requests that come together are
    answered at
least 3 times sooner; those with nothing in common at least 0.95 times as soon.
"""

import argparse
import itertools
import tempfile
import time
from pathlib import Path

import torch
from _common import add_device, arguments, finish, interleave, ratio, resolve_device, run_script, spread, table
from engine import prompts, write_model

from megatron.dmc.inference import LLM, SamplingParams
from megatron.dmc.kernels import active_backend

HIT_TARGET, TOGETHER_TARGET, APART_TARGET = 10.0, 3.0, 0.95
ONE = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)


def first_token(path: Path, args: argparse.Namespace, device: torch.device) -> dict[str, list[float]]:
    """Milliseconds of requests with one new token each."""
    llm = LLM(path, device=device.type, max_num_seqs=4, max_num_batched_tokens=args.step_tokens)
    seeds, prefix, prompt = itertools.count(), [], []

    def ask(new_prefix: bool = False, same: bool = False, cached: int = 0):
        def run() -> None:
            if new_prefix:
                prefix[:] = prompts(1, args.prefix, next(seeds))[0]
            if not same:
                prompt[:] = prefix + prompts(1, args.question, next(seeds))[0]
            found = llm.generate(list(prompt), ONE)[0].num_cached_tokens
            assert found == cached, (found, cached)

        return run

    whole = args.prefix + args.question
    functions = {"miss": ask(new_prefix=True), "second": ask(), "hit": ask(cached=args.prefix)}
    functions["same"] = ask(same=True, cached=whole)
    return interleave(functions, device, seconds=args.seconds, rounds=(3, 15))


def together(path: Path, args: argparse.Namespace, device: torch.device) -> dict[str, list[float]]:
    """Milliseconds until all of several requests are answered, with prefix caching and without."""
    settings = dict(device=device.type, max_num_seqs=args.requests, max_num_batched_tokens=args.step_tokens)
    engines = {"on": LLM(path, **settings), "off": LLM(path, enable_prefix_caching=False, **settings)}
    answer = SamplingParams(temperature=0, max_tokens=args.new_tokens, ignore_eos=True)
    seeds = itertools.count(10**6)

    def ask(llm: LLM, shared: bool):
        def run() -> None:
            prefix = prompts(1 if shared else args.requests, args.prefix, next(seeds)) * (
                args.requests if shared else 1
            )
            questions = prompts(args.requests, args.question, next(seeds))
            llm.generate([a + b for a, b in zip(prefix, questions)], answer)

        return run

    functions = {
        f"{kind}, {name}": ask(llm, kind == "shared") for kind in ("shared", "apart") for name, llm in engines.items()
    }
    return interleave(functions, device, seconds=args.seconds, rounds=(3, 9))


def main() -> None:
    parser = arguments(__doc__)
    add_device(parser)
    for name, value, text in (
        ("layers", 4, ""),
        ("hidden", 512, ""),
        ("heads", 8, "query and KV heads"),
        ("head-dim", 64, ""),
        ("prefix", 2048, "tokens"),
        ("question", 64, "tokens"),
        ("requests", 8, "that come together"),
        ("new-tokens", 8, "of each of these"),
        ("step-tokens", 512, "of a step"),
    ):
        parser.add_argument(f"--{name}", type=int, default=value, help=text)
    parser.add_argument("--seconds", type=float, default=15, help="of each comparison")
    args = parser.parse_args()
    args.contexts, args.method = [args.prefix], "dmc"
    began, figures, missed, rows = time.perf_counter(), {}, [], []
    device, dtype = resolve_device(args)
    print(
        f"{args.layers} layers of {args.hidden}, {args.heads} heads of {args.head_dim}, {dtype}, kernels: "
        f"{active_backend(device.type)}; prefix {args.prefix}, question {args.question}\n"
    )
    with tempfile.TemporaryDirectory() as name:
        for cr in (4, 1):
            label, path = f"CR {cr}", write_model(Path(name), args, dtype, cr)
            first, many = first_token(path, args, device), together(path, args, device)
            gains = {
                "hit": ratio(first["miss"], first["hit"]),
                "together": ratio(many["shared, off"], many["shared, on"]),
                "apart": ratio(many["apart, off"], many["apart, on"]),
            }
            figures[label] = {**{k: spread(v) for k, v in (first | many).items()}, "ratios": gains}
            rows += [
                (label, what, spread(series)["median"], spread(series)["q1"], spread(series)["q3"])
                for what, series in (first | many).items()
            ]
            for what, target in (("hit", HIT_TARGET), ("together", TOGETHER_TARGET), ("apart", APART_TARGET)):
                if gains[what]["median"] < target:
                    missed.append(f"{label}: {what} {gains[what]['median']:.2f} times as fast, not {target}")
    print(table(("", "", "ms", "quartile", "quartile"), rows))
    for label, each in figures.items():
        gains = (f"{what} {g['median']:.2f} [{g['q1']:.2f}, {g['q3']:.2f}]" for what, g in each["ratios"].items())
        print(f"{label}, times as fast: {', '.join(gains)}")
    finish(args, "prefix_caching", figures, missed, began)


if __name__ == "__main__":
    run_script(main)
