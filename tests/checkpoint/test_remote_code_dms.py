"""The modelling files of an exported DMS directory, loaded by transformers, against the step-by-step oracle."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from helpers.exported import DMS_CASES, GROUPS, LAYERS, Exported, tokens
from torch import Tensor

pytestmark = pytest.mark.usefixtures("transformers_state")


def close(a: Tensor, b: Tensor) -> None:
    """1e-4 of fp32 logits that are of the order of 1 to 10."""
    assert a.shape == b.shape and (a - b).abs().max() <= 1e-4, f"{(a - b).abs().max():.1e}"


@pytest.mark.parametrize("case", DMS_CASES)
def test_logits_lengths_and_generation_equal_the_oracle(case: str, tmp_path: Path) -> None:
    exported = Exported(tmp_path / "model", **DMS_CASES[case])
    model, ids, oracle = exported.load(), tokens(50), exported.oracle()
    wanted = oracle.run(ids)
    out = model(torch.tensor([ids]), use_cache=True)
    close(out.logits[0], wanted)
    close(model(torch.tensor([ids]), use_cache=False).logits[0], wanted)
    cache, lengths = out.past_key_values, oracle.lengths()
    assert torch.equal(cache.lengths()[:, 0], lengths)
    assert cache.compression_ratio() == len(ids) * LAYERS * GROUPS / int(lengths.sum())
    most = {"no eviction": 50, "dms zero_out": 50, "all evicted": 8}.get(case)
    if most is None:
        assert lengths.max() < 50 and lengths.unique().numel() > 1
    else:
        assert lengths.unique().tolist() == [most]

    # In chunks, the decision at whose first token is about a token of the cache.
    cache, logits = None, []
    for chunk in torch.tensor([ids]).split([1, 2, 7, 1, 20, 1, 18], dim=1):
        out = model(chunk, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        logits.append(out.logits[0])
    close(torch.cat(logits), wanted)
    assert torch.equal(cache.lengths()[:, 0], lengths)

    # Greedy generation from a prompt: token for token, and the same slots.
    prompt, oracle = ids[:11], exported.oracle()
    result = model.generate(torch.tensor([prompt]), max_new_tokens=15, do_sample=False, return_dict_in_generate=True)
    assert result.sequences[0].tolist() == prompt + oracle.generate(prompt, 14) + [int(result.sequences[0, -1])]
    assert torch.equal(result.past_key_values.lengths()[:, 0], oracle.lengths())


@pytest.mark.parametrize("case", ["key", "query, self", "adapter"])
def test_padding_and_chunks_of_a_batch(case: str, tmp_path: Path) -> None:
    """Left and inner padding: each sequence as if it were alone, and no padding in the cache."""
    model = Exported(tmp_path / "model", **DMS_CASES[case]).load()
    lengths = [3, 40, 17, 1]
    prompts = [tokens(n, seed) for seed, n in enumerate(lengths)]
    alone = [model(torch.tensor([p]), use_cache=True) for p in prompts]
    slots = torch.cat([one.past_key_values.lengths() for one in alone], dim=1)
    inner = torch.rand(4, 40, generator=torch.Generator().manual_seed(5)).argsort(dim=-1)
    for columns in ([list(range(40 - n, 40)) for n in lengths], [row[:n].tolist() for row, n in zip(inner, lengths)]):
        mask = torch.zeros(4, 40, dtype=torch.long)
        for row, of_tokens in zip(mask, columns):
            row[of_tokens] = 1
        ids = torch.zeros_like(mask)
        ids[mask.bool()] = torch.tensor(sum(prompts, []))
        for sizes in ([40], [4, 1, 15, 20]):  # chunks some of which are all padding for some sequences
            cache, logits = None, []
            for at in torch.arange(40).split(sizes):
                out = model(ids[:, at], attention_mask=mask[:, : int(at[-1]) + 1], past_key_values=cache)
                cache = out.past_key_values
                logits.append(out.logits)
            logits = torch.cat(logits, dim=1)
            assert logits.isfinite().all()
            for row, one, real in zip(logits, alone, mask.bool()):
                close(row[real], one.logits[0])
            assert torch.equal(cache.lengths(), slots) and cache.tokens.tolist() == lengths
        more = model(torch.full((4, 1), 7), attention_mask=F.pad(mask, (0, 1), value=1), past_key_values=cache)
        for row, one in zip(more.logits, alone):
            close(row, model(torch.tensor([[7]]), past_key_values=copy.deepcopy(one.past_key_values)).logits[0])


def test_generation_of_a_padded_batch_and_beams(tmp_path: Path) -> None:
    exported = Exported(tmp_path / "model", **DMS_CASES["adapter"])
    model = exported.load()
    prompts = [tokens(n, seed) for seed, n in enumerate((3, 30, 12))]
    ids = torch.tensor([[0] * (30 - len(p)) + p for p in prompts])
    named = dict(attention_mask=(ids != 0).long(), do_sample=False, pad_token_id=0, return_dict_in_generate=True)
    result = model.generate(ids, max_new_tokens=25, **named)
    for i, prompt in enumerate(prompts):
        oracle = exported.oracle()
        assert result.sequences[i, 30:].tolist() == oracle.generate(prompt, 24) + [int(result.sequences[i, -1])]
        assert torch.equal(result.past_key_values.lengths()[:, i], oracle.lengths())
    again = model.generate(ids, max_new_tokens=25, prefill_chunk_size=7, **named)
    assert torch.equal(again.sequences, result.sequences)
    with_cache = model.generate(ids, max_new_tokens=12, num_beams=3, **named)
    without = model.generate(ids, max_new_tokens=12, num_beams=3, use_cache=False, **named)
    assert torch.equal(with_cache.sequences, without.sequences)
    assert not torch.equal(with_cache.sequences, result.sequences[:, : with_cache.sequences.size(1)])


def test_blocks_of_queries_and_room(tmp_path: Path) -> None:
    """Whatever the size of a block, and however seldom evicted tokens leave their columns. Room does not grow with
    tokens that are evicted.
    """
    model = Exported(tmp_path / "model", **DMS_CASES["all evicted"]).load()
    ids = torch.tensor([tokens(120, 1), tokens(120, 2)])
    wanted, modeling = model(ids, use_cache=True).logits, sys.modules[type(model).__module__]
    for name, value in (("QUERY_ROWS", 7), ("QUERY_ROWS", 1), ("QUERY_SCORES", 1)):
        before = getattr(modeling, name)
        setattr(modeling, name, value)
        close(model(ids).logits, wanted)
        setattr(modeling, name, before)
    cache = None
    for t in range(120):
        out = model(ids[:, t : t + 1], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        close(out.logits[:, 0], wanted[:, t])
        assert cache.layers[0].keys.size(2) <= 16
    cache.reset()
    assert cache.nbytes() == 0
    close(model(ids, past_key_values=cache).logits, wanted)


def test_saved_loaded_and_in_bf16(tmp_path: Path) -> None:
    exported = Exported(tmp_path / "model", **DMS_CASES["adapter, layer"])
    model, ids = exported.load(), torch.tensor([tokens(50)])
    model.save_pretrained(tmp_path / "again")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again", trust_remote_code=True)
    assert torch.equal(again(ids).logits, model(ids).logits) and again.config.dmc == exported.dmc
    half = exported.load(dtype=torch.bfloat16)
    out = half(ids, use_cache=True)
    assert out.logits.dtype == out.past_key_values.layers[0].keys.dtype == torch.bfloat16
    assert out.logits.isfinite().all() and out.past_key_values.compression_ratio() > 1.2
    with pytest.raises(ValueError, match="cannot be cropped"):
        out.past_key_values.crop(3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "dmx"}, "method 'dmx', which these files do not compute"),
        ({"window": None}, "window None"),
        ({"decision_source": "value"}, "decision_source 'value'; method dms knows key, query, adapter"),
        ({"decision_about": "next"}, "decision_about 'next'"),
        ({"decision_per": "layer"}, "only an adapter"),
        ({"decision_source": "adapter", "stage": "zero_out"}, "stage 'zero_out', which no model with decision_source"),
        ({"decision_source": "key", "stage": "calibrate"}, "stage 'calibrate', which no model with decision_source"),
        ({"method": "dmc", "decision_source": "query"}, "decision_source 'query'; method dmc knows key"),
        ({"method": "dmc", "decision_scale": 2.0}, "decision_scale 2.0"),
    ],
)
def test_a_decision_that_is_not_understood_is_refused(change, message, tmp_path: Path) -> None:
    exported = Exported(tmp_path / "model", bias=0.0, window=5, dms={})
    config = {**exported.config, "dmc": {**exported.dmc, **change}}
    (exported.directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        exported.load()
