"""Generation from a training checkpoint, with the compressed cache's figures. ``dmc eval generate`` runs it."""

import sys
from dataclasses import dataclass, field


@dataclass(frozen=True)
class GenerateConfig:
    """Settings of a generation from a checkpoint."""

    load: str = field(metadata={"metavar": "DIR"})
    """Checkpoint of stage retrofit or finetune."""
    tokenizer: str = field(metadata={"metavar": "PATH"})
    """Sentencepiece model or Hugging Face directory that made the data."""
    prompt: str = field()
    """Text to complete."""
    max_tokens: int = 128
    """Largest number of tokens to sample."""
    temperature: float = 0.0
    """Sampling temperature; 0 means greedy decoding."""
    top_p: float = 1.0
    """Probability of the most likely tokens that are sampled from."""
    seed: int = 0
    """Seed of sampling."""


def generate(config: GenerateConfig) -> int:
    """Print the prompt, the tokens as they are sampled, and tokens, slots and CR by layer and head.

    Returns:
        The exit status.
    """
    from megatron.dmc.evaluation.load import load_checkpoint
    from megatron.dmc.evaluation.reference import ReferenceDecoder
    from megatron.dmc.training import initialize
    from megatron.dmc.training.tokenizer import load_tokenizer

    try:
        tokenizer = load_tokenizer(config.tokenizer)
        decoder = ReferenceDecoder(load_checkpoint(config.load))
        prompt = [*([tokenizer.bos_id] if tokenizer.adds_bos else []), *tokenizer.encode(config.prompt)]
        ids, shown = list(prompt), config.prompt
        print(shown, end="", flush=True)
        for token in decoder.generate(
            prompt, config.max_tokens, config.temperature, config.top_p, config.seed, tokenizer.eod_id
        ):
            if token == tokenizer.eod_id:
                break
            ids.append(token)
            # Whole text again: a piece may be half a character. Text that ends in one is held back.
            text = tokenizer.decode(ids)
            if text.startswith(shown) and not text.endswith("\ufffd"):
                print(text[len(shown) :], end="", flush=True)
                shown = text
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
    from megatron.dmc.cli.eval import main

    sys.exit(main(["generate", *sys.argv[1:]]))
