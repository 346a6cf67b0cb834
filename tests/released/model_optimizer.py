"""Tiny random Qwen3 models in NVIDIA Model-Optimizer's DMS code, on a CPU, and what they compute.

    python model_optimizer.py MODEL_OPTIMIZER FOLDER

Runs in an environment of its own (run.py beside this file), which has Model-Optimizer's version of transformers.
MODEL_OPTIMIZER is a checkout; nothing of it is copied. Each model is saved as its own code saves one, with
``expected.safetensors`` beside the weights.

Two parts of it do not run here and are replaced: ``torch.compile`` is off, so flex_attention takes its plain PyTorch
path; and flash-attn's ``flash_attn_with_kvcache``, a CUDA kernel, is the function below, which computes the same from
the same paged cache. Everything else, the two caches and the evictions in them included, is its own code.
"""

from __future__ import annotations

import functools
import json
import os
import sys
from pathlib import Path

os.environ["TORCHDYNAMO_DISABLE"] = "1"
sys.path.insert(0, str(Path(sys.argv[1]) / "experimental" / "dms"))

import torch  # noqa: E402
from dms import attention  # noqa: E402
from models.qwen3.configuration_qwen3_dms import Qwen3ConfigDMS  # noqa: E402
from models.qwen3.modeling_qwen3_dms import Qwen3ForCausalLMDMS  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from torch import Tensor  # noqa: E402

SIZES = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    vocab_size=61,
    max_position_embeddings=256,
    rope_theta=5e4,
    tie_word_embeddings=False,
    bos_token_id=None,
    eos_token_id=None,
)
RUN = dict(dms_compile_limit=None, dms_preallocate_for_tokens=32, dms_paged_attention_block_size=4)
ADAPTER = dict(dms_separate_alpha=True, dms_alpha_scale=4.0, dms_initial_alpha_offset=0.5)
CASES = {
    "query": dict(dms_alpha_scale=3.0, dms_initial_alpha_offset=0.5, dms_window_size=6),
    "adapter": dict(**ADAPTER, dms_window_size=6),
    "adapter of a layer": dict(**ADAPTER, dms_window_size=13, dms_alpha_per="layer"),
}
TOKENS, PROMPT, MORE, CHUNK = 60, 20, 30, 9


def paged_attention(
    q: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    k: None,
    v: None,
    cache_seqlens: Tensor,
    causal: bool,
    softmax_scale: float,
    block_table: Tensor,
    return_softmax_lse: bool = False,
    nothing: float = float("inf"),
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of queries [n, s, g, D] to n caches in pages [pages, size, 1, D], as flash_attn_with_kvcache has it.

    nothing: logarithm of the sum of an empty cache's weights; flash-attn returns inf.
    """
    n, s, g, _ = q.shape
    out, lse = torch.zeros_like(q), torch.full((n, g, s), nothing)
    for i, length in enumerate(cache_seqlens.tolist()):
        if length:
            pages = block_table[i, : -(-length // key_pages.size(1))].long()
            keys, values = (x[pages].flatten(0, 1)[:length, 0] for x in (key_pages, value_pages))
            scores = torch.einsum("sgd,ld->gsl", q[i], keys) * softmax_scale
            if causal:
                seen = torch.arange(length) <= torch.arange(length - s, length)[:, None]
                scores = scores.masked_fill(~seen, float("-inf"))
            lse[i] = scores.logsumexp(-1)
            out[i] = torch.einsum("gsl,ld->sgd", scores.softmax(-1), values)
    return (out, lse) if return_softmax_lse else out


EVALUATED = attention.dms_attn_eval_mode


def use(function) -> None:
    """Take ``function`` for flash_attn_with_kvcache."""
    attention.dms_attn_eval_mode = functools.partial(EVALUATED, flash_attn_fn=function)


def make(**settings) -> Qwen3ForCausalLMDMS:
    torch.manual_seed(0)
    model = Qwen3ForCausalLMDMS(Qwen3ConfigDMS(**SIZES, **RUN, **settings)).eval()
    for name, parameter in model.named_parameters():
        x = torch.randn_like(parameter)
        parameter.data = 1 + x / 9 if "norm" in name else x if "embed" in name else x * x.size(-1) ** -0.5
    return model


@torch.no_grad()
def compute(model: Qwen3ForCausalLMDMS) -> dict[str, Tensor]:
    """Logits of prompts as a whole, token by token and in chunks; tokens and logits of a generation; tokens that each
    head then holds.

    "mended": prefill adds e^0 for an empty paged cache, as if it held a token with a score of 0 and a value of 0. Where
    some heads of a layer have kept tokens beyond the window and others have not, the outputs of the latter shrink. With
    a finite logarithm that is next to nothing in place of flash-attn's inf, they do not.
    """
    ids = torch.randint(1, SIZES["vocab_size"], (2, TOKENS))
    found = {"ids": ids, "prefill": model(ids, use_cache=True).logits}
    for name, nothing in (("", float("inf")), (" mended", -1e4)):
        use(functools.partial(paged_attention, nothing=nothing))
        cache = model.get_cache()
        cache.prefill_mode()
        model.config.dms_manual_inference_mode = True
        steps = [model(column, past_key_values=cache, use_cache=True).logits for column in ids.split(1, dim=1)]
        found[f"by token{name}"] = torch.cat(steps, dim=1)
        model.config.dms_manual_inference_mode, model.config.dms_chunked_prefill = False, CHUNK
        found[f"by chunk{name}"] = model(ids, use_cache=True).logits
        model.config.dms_chunked_prefill = None
    cache = model.get_cache()
    token, logits = ids[:1, :PROMPT], []
    for _ in range(MORE):
        logits.append(model(token, past_key_values=cache, use_cache=True).logits[:, -1])
        token = logits[-1].argmax(-1, keepdim=True)
    assert cache.is_inference_mode()
    logits = torch.cat(logits)
    lengths = [layer.paged_cache.cache_seq_lengths.view(1, -1) for layer in cache.layers]
    return found | {"generated": logits.argmax(-1), "generated_logits": logits, "lengths": torch.cat(lengths)}


def main() -> None:
    use(paged_attention)
    for name, settings in CASES.items():
        model, folder = make(**settings), Path(sys.argv[2]) / name
        found = compute(model)
        model.save_pretrained(folder)
        # As its extract_student_model leaves config.json, whose code stays where it is.
        config = json.loads((folder / "config.json").read_text())
        config.pop("architectures")
        (folder / "config.json").write_text(json.dumps(config, indent=2))
        save_file({key: value.contiguous() for key, value in found.items()}, folder / "expected.safetensors")


if __name__ == "__main__":
    main()
