"""Generate text from a training checkpoint with the compressed cache, and show what the cache did.

python -m megatron.dmc.evaluation.generate --load CHECKPOINT --tokenizer MODEL --prompt "def main("
"""

from __future__ import annotations

import argparse
import sys
import warnings
from typing import Optional


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--load", required=True, metavar="DIR", help="checkpoint of stage retrofit or finetune")
    parser.add_argument("--tokenizer", required=True, metavar="PATH")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.0, help="0: greedy")
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    return parser


def main(argv: Optional[list[str]] = None) -> int:
    """Print the prompt, the text as it is generated, and a table of tokens, slots and CR by layer and head."""
    args = build_parser().parse_args(argv)
    warnings.filterwarnings("ignore")
    from megatron.dmc.evaluation.load import load_checkpoint
    from megatron.dmc.evaluation.reference import ReferenceDecoder
    from megatron.dmc.training import initialize
    from megatron.dmc.training.tokenizer import load_tokenizer

    try:
        tokenizer = load_tokenizer(args.tokenizer)
        decoder = ReferenceDecoder(load_checkpoint(args.load))
        prompt = tokenizer.encode(args.prompt)
        ids, shown = list(prompt), args.prompt
        print(shown, end="", flush=True)
        for token in decoder.generate(
            prompt, args.max_tokens, args.temperature, args.top_p, args.seed, tokenizer.eod_id
        ):
            if token == tokenizer.eod_id:
                break
            ids.append(token)
            # Whole text again: a piece may be half a character. Text that ends in one is held back.
            text = tokenizer.decode(ids)
            if text.startswith(shown) and not text.endswith("\ufffd"):
                print(text[len(shown) :], end="", flush=True)
                shown = text
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        initialize.shutdown()
    lengths = decoder.lengths()
    print(f"\n\n--- cache: {decoder.tokens} tokens ({len(prompt)} prompt), slots and CR by layer and KV head")
    heads = range(lengths.size(1))
    print("layer " + "".join(f"{f'head {h}':>16}" for h in heads))
    for layer, row in enumerate(lengths.tolist(), start=1):
        print(f"{layer:5d} " + "".join(f"{f'{n} ({decoder.tokens / n:.2f}x)':>16}" for n in row))
    total = decoder.tokens * lengths.numel()
    print(f"all   {total} token states in {int(lengths.sum())} slots: CR {total / float(lengths.sum()):.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
