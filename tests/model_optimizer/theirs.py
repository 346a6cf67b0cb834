#!/usr/bin/env python3
"""Model-Optimizer's side of run.py: tiny DMS models that its classes save, and what they generate on a CPU.

theirs.py experimental/dms DIRECTORY
"""

from __future__ import annotations

import json
import sys
import types
from importlib.machinery import ModuleSpec
from pathlib import Path

import torch

SIZES = dict(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    vocab_size=131,
    max_position_embeddings=256,
    tie_word_embeddings=False,
)
CASES = {
    "query": {},
    "adapter per head": {"dms_separate_alpha": True},
    "adapter per layer": {"dms_separate_alpha": True, "dms_alpha_per": "layer"},
}
PROMPT, NEW = 60, 60


def attention_over_pages(q, k_cache, v_cache, *, cache_seqlens, softmax_scale, block_table, **_):
    """FlashAttention's ``flash_attn_with_kvcache`` for one query token, [rows, 1, heads, D], and one KV head."""
    out = torch.empty_like(q)
    for row, length in enumerate(cache_seqlens.reshape(-1).tolist()):
        pages = block_table[row].long()
        keys, values = (cache[pages].flatten(0, 1)[:length, 0] for cache in (k_cache, v_cache))
        out[row, 0] = torch.softmax(q[row, 0] @ keys.T * softmax_scale, -1) @ values
    return out


def main(code: str, directory: Path) -> None:
    # Nothing is compiled: flex_attention then computes the whole matrix of scores, on any CPU.
    torch.compile = lambda function=None, **_: function if function is not None else (lambda f: f)
    sys.modules["flash_attn"] = module = types.ModuleType("flash_attn")
    module.__spec__, module.flash_attn_with_kvcache = ModuleSpec("flash_attn", None), attention_over_pages
    sys.path.insert(0, code)
    from models.qwen3.configuration_qwen3_dms import Qwen3ConfigDMS
    from models.qwen3.modeling_qwen3_dms import Qwen3ForCausalLMDMS

    for name, settings in CASES.items():
        torch.manual_seed(len(name))
        config = Qwen3ConfigDMS(dms_window_size=8, dms_paged_attention_block_size=4, **settings, **SIZES)
        model = Qwen3ForCausalLMDMS(config).eval()
        with torch.no_grad():
            for parameter, value in model.named_parameters():
                value.copy_(torch.randn_like(value) * 0.1 + (1.0 if "norm" in parameter else 0.0))
        path = directory / name
        model.save_pretrained(path)
        # As extract_student_model of models/qwen3/train.py leaves it.
        saved = json.loads((path / "config.json").read_text())
        saved.pop("architectures", None)
        saved["auto_map"] = {"AutoConfig": "configuration_qwen3_dms.Qwen3ConfigDMS"}
        (path / "config.json").write_text(json.dumps(saved))
        prompt = torch.randint(SIZES["vocab_size"], (1, PROMPT))
        with torch.no_grad():
            result = model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=NEW,
                do_sample=False,
                eos_token_id=None,
                past_key_values=model.get_cache(PROMPT + NEW),
                output_logits=True,
                return_dict_in_generate=True,
            )
        tokens = result.sequences[0, PROMPT:]
        chosen = torch.log_softmax(torch.cat(result.logits), -1).gather(-1, tokens[:, None])[:, 0]
        said = {"prompt": prompt[0].tolist(), "tokens": tokens.tolist(), "logprobs": chosen.tolist()}
        (path / "expected.json").write_text(json.dumps(said))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
