"""Initial weights that can look back: an induction circuit in the first two layers, random weights everywhere else.

A transformer learns to look things up when a head that finds the token before (layer 1) meets one that finds where the
same token stood (layer 2): an induction circuit (Elhage et al. 2021, "A Mathematical Framework for Transformer
Circuits"; Olsson et al. 2022, arXiv 2209.11895). A small model on two CPU cores has no time to learn that, and a model
that does not look back cannot tell one cache policy from another (docs/experiments.md). So training starts from weights
that have the circuit; nothing is frozen.

The residual stream is divided: a code of random signs for the token, a constant, and places that the two heads write
to. Head 0 of layer 1 scores by distance alone: queries and keys read the constant, the query turned by one position, so
that the rotation makes distance 1 the best; it copies a part of that token's code. Head 0 of layer 2 compares the
token's own code with that copy, in the channels that rotary embeddings hardly turn within the window; it copies the
code of where it looks, which the output layer reads.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from megatron.dmc.checkpoint import mapping
from megatron.dmc.config import ModelConfig
from megatron.dmc.ops import rotary_frequencies

STILL = 0.6
"""Radians that a channel pair may turn over the whole window to count as hardly turned."""
NEAR, SAME, SURE = 6.0, 1.0, 0.35
"""Amplitude of the distance scores per channel pair; score per matching sign; logit per sign of a copied code."""


def _split(model: ModelConfig) -> tuple[int, int, list[int]]:
    """Channels of a copy, channels of the code, and the channel pairs that hardly turn.

    The last pair is left out: it has the decision neuron.
    """
    d = model.head_dim
    copy = min(d, model.hidden_size // 4)
    turned = rotary_frequencies(d, model.rotary_base, model.rope_scaling) * model.max_position_embeddings
    still = [i for i in range(min(d // 2 - 1, copy)) if float(turned[i]) < STILL]
    if model.num_layers < 2 or len(still) < 5 or model.add_qkv_bias or model.qk_layernorm:
        raise ValueError(
            f"no room for an induction circuit: {model.num_layers} layers, {len(still)} of {d // 2 - 1} channel pairs "
            f"that turn by less than {STILL} over {model.max_position_embeddings} tokens; it takes 2 layers, 5 such "
            "pairs (raise rotary_base), no biases and no norms of q and k"
        )
    return copy, model.hidden_size - 2 * copy - 1, still


def weights(model: ModelConfig, seed: int) -> dict[str, Tensor]:
    """Tensors of a Llama of these sizes: fp32, by Hugging Face's names.

    Raises:
        ValueError: the circuit does not fit into the model.
    """
    copy, coded, still = _split(model)
    generator = torch.Generator().manual_seed(seed)
    d, std, half = model.head_dim, model.init_method_std, model.head_dim // 2
    found = {}
    for name, shape in mapping.hf_shapes(mapping.FAMILIES["llama"], model).items():
        scale = std / math.sqrt(2 * model.num_layers) if name.endswith(("o_proj.weight", "down_proj.weight")) else std
        found[name] = torch.ones(shape) if "norm" in name else torch.randn(shape, generator=generator) * scale
    code = torch.randint(0, 2, (model.vocab_size, coded), generator=generator) * 2.0 - 1
    constant, before, after = coded, slice(coded + 1, coded + 1 + copy), slice(coded + 1 + copy, None)
    sign, level, n = 0.5, 2.0, torch.arange(copy)
    embedding = found["model.embed_tokens.weight"].zero_()
    embedding[:, :coded], embedding[:, constant] = sign * code, level

    def head(layer: int, squares: float) -> tuple[list[Tensor], float]:
        """Head 0's parts of the four projections, set to zero, and the factor by which the norm scales its input."""
        names = [f"model.layers.{layer}.self_attn.{x}_proj.weight" for x in "qkvo"]
        parts = [found[name][:d] for name in names[:3]] + [found[names[3]][:, :d]]
        for part in parts:
            part.zero_()
        return parts, 1 / math.sqrt(squares / model.hidden_size + model.norm_epsilon)

    # Layer 1: the token before. A query turned by -1 position meets the key best at distance 1.
    squares = coded * sign**2 + level**2
    (q, k, v, o), norm = head(0, squares)
    angle = -rotary_frequencies(d, model.rotary_base, model.rope_scaling)
    near = torch.full((half,), NEAR)
    near[-1] = 0  # the decision neuron's pair
    q[:half, constant], q[half:, constant] = near * angle.cos() / (level * norm), near * angle.sin() / (level * norm)
    k[:half, constant] = near / (level * norm)
    v[n, n], o[n + before.start, n] = 1 / (sign * norm), sign
    # Layer 2: where the token before was this token. The copy's channels count too from here on.
    (q, k, v, o), norm = head(1, squares + copy * sign**2)
    strength = math.sqrt(SAME * math.sqrt(d)) / (sign * norm)
    for i, channel in enumerate([*still, *(pair + half for pair in still)][:copy]):
        q[channel, i], k[channel, before.start + i] = strength, strength
    v[n, n], o[n + after.start, n] = 1 / (sign * norm), sign
    output = found.get("lm_head.weight")
    if output is not None:
        output.mul_(0.25)[:, after] = SURE * code[:, :copy]
    return found


def write(directory: str | Path, model: ModelConfig, seed: int) -> None:
    """Write a Hugging Face directory with :func:`weights`: import it, then train it on.

    Raises:
        ValueError: the circuit does not fit into the model (see the message), or its embeddings are tied.
    """
    if not model.untie_embeddings_and_output_weights:
        raise ValueError("the circuit's output layer reads other channels than the embedding writes; untie them")
    tensors, path = weights(model, seed), Path(directory)
    path.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text(json.dumps(mapping.to_hf_config(model, "float32"), indent=2) + "\n")


if __name__ == "__main__":
    from megatron.dmc.cli.eval import main

    sys.exit(main(["induction", *sys.argv[1:]]))
