"""The modelling files of an exported directory, loaded by transformers, against the step-by-step oracle."""

from __future__ import annotations

import ast
import copy
import json
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from helpers.exported import (
    CASES,
    EPSILON,
    GROUPS,
    HIDDEN,
    LAYERS,
    REMOTE_CODE,
    VOCABULARY,
    D,
    Exported,
    Oracle,
    tokens,
)
from torch import Tensor

from megatron.dmc.ops import OracleCache

pytestmark = pytest.mark.usefixtures("transformers_state")


def test_files_need_nothing_but_torch_and_transformers() -> None:
    """The files need each other only, and no package megatron.dmc."""
    for file in REMOTE_CODE.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0 or node.module in ("configuration_dmc", "cache_dmc", "cache_dms")
                names = [node.module] if node.level == 0 else []
            assert {name.split(".")[0] for name in names} <= {"math", "torch", "transformers"}


def close(a: Tensor, b: Tensor) -> None:
    """1e-4 of fp32 logits that are of the order of 1 to 10."""
    assert a.shape == b.shape and (a - b).abs().max() <= 1e-4, f"{(a - b).abs().max():.1e}"


def longest_segment(model, ids: list[int]) -> int:
    """Tokens per slot at most, told by a cache that is fed token by token."""
    cache, best, run, last = None, 0, None, None
    for token in ids:
        cache = model(torch.tensor([[token]]), past_key_values=cache, use_cache=True).past_key_values
        now = cache.lengths()
        run = torch.ones_like(now) if last is None else torch.where(now > last, 1, run + 1)
        best, last = max(best, int(run.max())), now
    return best


@pytest.mark.parametrize("case", CASES)
def test_logits_lengths_and_generation_equal_the_oracle(case: str, tmp_path: Path) -> None:
    exported = Exported(tmp_path / "model", **CASES[case])
    model = exported.load()
    assert not model.training and type(model).__name__ == "DMCForCausalLM"
    ids = tokens(90)

    # Teacher forcing in one piece: with a cache and without.
    oracle = exported.oracle()
    wanted = oracle.run(ids)
    out = model(torch.tensor([ids]), use_cache=True)
    close(out.logits[0], wanted)
    close(model(torch.tensor([ids]), use_cache=False).logits[0], wanted)
    cache = out.past_key_values
    assert torch.equal(cache.lengths()[:, 0], oracle.lengths())
    slots = int(oracle.lengths().sum())
    assert cache.compression_ratio() == len(ids) * LAYERS * GROUPS / slots
    # The tensors really are of that size: that of the longest head, in steps of 16.
    for layer, lengths in zip(cache.layers, cache.lengths()):
        assert int(lengths.max()) < layer.keys.size(2) <= int(lengths.max()) + 16
        for slot_keys, want in zip(layer.keys[0], exported_keys(oracle, cache.layers.index(layer))):
            assert (slot_keys[: len(want)] - want).abs().max() <= 1e-5 * want.abs().max()

    # The case is what it says.
    kept, all_of_them = slots, len(ids) * LAYERS * GROUPS
    if case in ("no merging", "zero_out"):
        assert kept == all_of_them
    elif case == "one slot":
        assert kept == LAYERS * GROUPS
    else:
        assert 1.2 * kept < all_of_them and oracle.lengths().flatten().unique().numel() > 1
    if case in ("window", "unbounded"):
        assert longest_segment(model, ids) > 2 * 12

    # Greedy generation from a prompt: token for token, and the same slots.
    prompt, oracle = ids[:11], exported.oracle()
    result = model.generate(torch.tensor([prompt]), max_new_tokens=40, do_sample=False, return_dict_in_generate=True)
    assert result.sequences[0].tolist() == prompt + oracle.generate(prompt, 40)
    oracle = exported.oracle()
    oracle.run(result.sequences[0, :-1].tolist())
    cache = result.past_key_values
    assert torch.equal(cache.lengths()[:, 0], oracle.lengths())
    assert cache.get_seq_length() == 50 and cache.tokens.tolist() == [50]
    assert cache.compression_ratio() == 50 * LAYERS * GROUPS / int(oracle.lengths().sum())


def exported_keys(oracle: Oracle, layer: int) -> list[Tensor]:
    return [torch.stack(head.keys) for head in oracle.caches[layer].heads[0]]


@pytest.mark.parametrize("window", [12, None])
def test_every_length_from_one_on(window, tmp_path: Path) -> None:
    """A prompt of any length is its prefix's logits, and leaves a cache from which one more token is right."""
    exported = Exported(tmp_path / "model", bias=-1.6, window=window)
    model = exported.load()
    ids, oracle = tokens(200), exported.oracle()
    wanted, lengths = [], []
    for token in ids:
        wanted.append(oracle.step(token))
        lengths.append(oracle.lengths())
    for n in (1, 2, 11, 12, 13, 63, 127, 128, 129, 199):
        out = model(torch.tensor([ids[:n]]), use_cache=True, logits_to_keep=1)
        assert out.logits.shape == (1, 1, VOCABULARY)
        close(out.logits[0, 0], wanted[n - 1])
        assert torch.equal(out.past_key_values.lengths()[:, 0], lengths[n - 1])
        close(model(torch.tensor([[ids[n]]]), past_key_values=out.past_key_values).logits[0, 0], wanted[n])
        assert torch.equal(out.past_key_values.lengths()[:, 0], lengths[n])


@pytest.mark.parametrize("window", [12, 3, 1, None])
def test_chunked_prefill_equals_the_whole(window, tmp_path: Path) -> None:
    exported = Exported(tmp_path / "model", bias=-1.2, window=window)
    model = exported.load()
    ids = torch.tensor([tokens(180, 1), tokens(180, 2)])
    whole = model(ids, use_cache=True)
    cache, logits = None, []
    for chunk in ids.split([1, 5, 1, 20, 130, 2, 21], dim=1):
        out = model(chunk, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        logits.append(out.logits)
    close(torch.cat(logits, dim=1), whole.logits)
    assert torch.equal(cache.lengths(), whole.past_key_values.lengths())
    result = {}
    for size in (None, 7):
        result[size] = model.generate(ids[:, :50], max_new_tokens=20, do_sample=False, prefill_chunk_size=size)
    assert torch.equal(result[None], result[7])


def cache_module(model):
    """The model's ``cache_dmc.py``."""
    return sys.modules[sys.modules[type(model).__module__].DMCCache.__module__]


def test_queries_in_blocks(tmp_path: Path) -> None:
    """The prompt attends in blocks of queries, of any size."""
    model = Exported(tmp_path / "model", bias=-0.5).load()
    ids = torch.tensor([tokens(150, 1), tokens(150, 2)])
    wanted = model(ids).logits
    modeling = sys.modules[type(model).__module__]
    for name, value in (("QUERY_ROWS", 7), ("QUERY_ROWS", 1), ("QUERY_SCORES", 1), ("POOL_ROWS", 9), ("POOL_ROWS", 1)):
        module = cache_module(model) if name == "POOL_ROWS" else modeling
        before = getattr(module, name)
        setattr(module, name, value)
        close(model(ids).logits, wanted)
        setattr(module, name, before)


@pytest.mark.parametrize("window", [12, None])
def test_padding(window, tmp_path: Path) -> None:
    """Left, right and inner padding: each sequence as if it were alone, and no padding in the cache. On the right,
    where a causal model cannot see it, padding needs no mask (lm-eval gives none).
    """
    exported = Exported(tmp_path / "model", bias=-0.8, window=window)
    model = exported.load()
    lengths = [3, 40, 17, 1]
    prompts = [tokens(n, seed) for seed, n in enumerate(lengths)]
    alone = [model(torch.tensor([p]), use_cache=True) for p in prompts]
    inner = torch.rand(4, 40, generator=torch.Generator().manual_seed(5)).argsort(dim=-1)
    for side in ("left", "right", "inner"):
        mask = torch.zeros(4, 40, dtype=torch.long)
        for row, n in zip(mask, lengths):
            if side == "left":
                row[40 - n :] = 1
            elif side == "right":
                row[:n] = 1
            else:
                row[inner[lengths.index(n)][:n]] = 1
        ids = torch.zeros_like(mask)
        ids[mask.bool()] = torch.tensor(sum(prompts, []))
        for use_cache in (True, False):
            out = model(ids, attention_mask=mask if side != "right" or use_cache else None, use_cache=use_cache)
            assert out.logits.isfinite().all()
            for row, one, real in zip(out.logits, alone, mask.bool()):
                close(row[real], one.logits[0])
        cache = model(ids, attention_mask=mask, use_cache=True).past_key_values
        assert cache.tokens.tolist() == lengths and cache.get_seq_length() == 40
        assert torch.equal(cache.lengths(), torch.cat([one.past_key_values.lengths() for one in alone], dim=1))
        # Chunks, some of which are all padding for some sequences, and tokens after them.
        cache, logits = None, []
        for columns in torch.arange(40).split([4, 1, 15, 20]):
            out = model(ids[:, columns], attention_mask=mask[:, : int(columns[-1]) + 1], past_key_values=cache)
            cache = out.past_key_values
            logits.append(out.logits)
        for row, one, real in zip(torch.cat(logits, dim=1), alone, mask.bool()):
            close(row[real], one.logits[0])
        more = model(torch.full((4, 1), 7), attention_mask=F.pad(mask, (0, 1), value=1), past_key_values=cache)
        for row, one in zip(more.logits, alone):
            close(row, model(torch.tensor([[7]]), past_key_values=copy.deepcopy(one.past_key_values)).logits[0])


def test_generation_of_a_left_padded_batch(tmp_path: Path) -> None:
    exported = Exported(tmp_path / "model", bias=-0.8)
    model = exported.load()
    prompts = [tokens(n, seed) for seed, n in enumerate((3, 30, 12))]
    ids = torch.tensor([[0] * (30 - len(p)) + p for p in prompts])
    result = model.generate(
        ids,
        attention_mask=(ids != 0).long(),
        max_new_tokens=25,
        do_sample=False,
        pad_token_id=0,
        return_dict_in_generate=True,
    )
    for i, prompt in enumerate(prompts):
        oracle = exported.oracle()
        assert result.sequences[i, 30:].tolist() == oracle.generate(prompt, 24) + [int(result.sequences[i, -1])]
        assert torch.equal(result.past_key_values.lengths()[:, i], oracle.lengths())
    # Without a cache every step is a whole prompt: the same tokens.
    again = model.generate(
        ids, attention_mask=(ids != 0).long(), max_new_tokens=25, do_sample=False, pad_token_id=0, use_cache=False
    )
    assert torch.equal(again, result.sequences)


def test_beam_search_reorders_the_cache(tmp_path: Path) -> None:
    exported = Exported(tmp_path / "model", bias=-0.8)
    model = exported.load()
    ids = torch.tensor([[0] * 5 + tokens(9, 1), tokens(14, 2)])
    named = dict(
        attention_mask=(ids != 0).long(),
        max_new_tokens=20,
        do_sample=False,
        num_beams=4,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_scores=True,
    )
    with_cache, without = model.generate(ids, **named), model.generate(ids, use_cache=False, **named)
    assert torch.equal(with_cache.sequences, without.sequences)
    close(with_cache.sequences_scores, without.sequences_scores)
    # Beams differ from greedy here, so that there was something to reorder.
    assert not torch.equal(with_cache.sequences, model.generate(ids, **{**named, "num_beams": 1}).sequences)
    # Several completions of one prompt.
    both = model.generate(ids[1:], max_new_tokens=4, num_return_sequences=3, do_sample=True)
    assert both.shape == (3, 18)


@pytest.mark.parametrize("window", [12, None])
def test_cache_methods(window, tmp_path: Path) -> None:
    model = Exported(tmp_path / "model", bias=-0.8, window=window).load()
    ids = torch.tensor([tokens(30, 1), tokens(30, 2), tokens(30, 3)])
    token = torch.tensor([[3], [4], [5]])
    cache = model(ids, use_cache=True).past_key_values
    assert len(cache) == LAYERS and cache.is_initialized and cache.nbytes() > 0
    wanted = model(token, past_key_values=copy.deepcopy(cache)).logits

    picked = copy.deepcopy(cache)
    picked.reorder_cache(torch.tensor([2, 2, 0]))
    close(model(token[[2, 2, 0]], past_key_values=picked).logits, wanted[[2, 2, 0]])
    for indices in (torch.tensor([True, False, True]), torch.tensor([0, 2])):
        picked = copy.deepcopy(cache)
        picked.batch_select_indices(indices)
        close(model(token[[0, 2]], past_key_values=picked).logits, wanted[[0, 2]])
    repeated = copy.deepcopy(cache)
    repeated.batch_repeat_interleave(2)
    close(model(token.repeat_interleave(2, 0), past_key_values=repeated).logits, wanted.repeat_interleave(2, 0))

    with pytest.raises(ValueError, match="cannot be cropped"):
        cache.crop(10)
    with pytest.raises(ValueError, match="3 sequences and the input 1"):
        model(token[:1], past_key_values=cache)
    with pytest.raises(ValueError, match="attention_mask has shape"):
        model(token, past_key_values=cache, attention_mask=torch.ones(3, 1))
    # A continued conversation: generate goes on from the cache it is given.
    cache = model(ids[:, :20], use_cache=True).past_key_values
    assert torch.equal(
        model.generate(ids, past_key_values=cache, max_new_tokens=9, do_sample=False),
        model.generate(ids, max_new_tokens=9, do_sample=False),
    )
    cache.reset()
    assert not cache.is_initialized and cache.nbytes() == 0 and cache.get_seq_length() == 0
    close(model(ids, past_key_values=cache).logits, model(ids).logits)


def test_loss_and_outputs(tmp_path: Path) -> None:
    model = Exported(tmp_path / "model", bias=-0.8).load()
    ids = torch.tensor([tokens(30, 1), tokens(30, 2)])
    labels = ids.clone()
    labels[0, :10] = -100
    out = model(ids, labels=labels, output_hidden_states=True)
    assert len(out.hidden_states) == LAYERS + 1 and not out.logits.requires_grad
    close(model.lm_head(out.hidden_states[-1]), out.logits)
    picked = out.logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    close(out.loss, -torch.cat((picked[0, 9:], picked[1])).mean())
    close(model(ids, logits_to_keep=torch.tensor([3, 5])).logits, out.logits[:, [3, 5]])
    close(model(inputs_embeds=model.get_input_embeddings()(ids)).logits, out.logits)
    assert len(model(ids, return_dict=False, use_cache=False)) == 1
    positions = torch.arange(30)[None] + 100  # distances count, not positions: rotary embeddings are relative
    close(model(ids, position_ids=positions).logits, out.logits)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 2}, "format_version 2.*up to 1"),
        ({"format_version": None}, "format_version None"),
        ({"stage": "pretrain"}, "stage 'pretrain', which does not compress"),
        ({"window": 0}, "window 0"),
        (None, "no dmc block"),
    ],
)
def test_a_block_that_is_not_understood_is_refused(change, message, tmp_path: Path) -> None:
    exported = Exported(tmp_path / "model", bias=0.0)
    dmc = {**exported.dmc, **change} if change else None
    (exported.directory / "config.json").write_text(json.dumps({**exported.config, "dmc": dmc}))
    with pytest.raises(ValueError, match=message):
        exported.load()


def test_unknown_rotary_embeddings_are_refused(tmp_path: Path) -> None:
    exported = Exported(tmp_path / "model", bias=0.0)
    for scaling, message in (
        ({"rope_type": "longrope", "factor": 2.0}, "'longrope'"),
        ({"type": "llama3", "factor": 8.0}, "lack"),
        ({"type": "yarn"}, "lack factor"),
    ):
        (exported.directory / "config.json").write_text(json.dumps({**exported.config, "rope_scaling": scaling}))
        with pytest.raises(ValueError, match=message):
            exported.load()


def test_what_cannot_work_is_refused(tmp_path: Path) -> None:
    exported = Exported(tmp_path / "model", bias=-0.8)
    with pytest.raises((ValueError, OSError), match="trust_remote_code"):
        transformers.AutoModelForCausalLM.from_pretrained(exported.directory, trust_remote_code=False)
    model, ids = exported.load(), torch.tensor([tokens(20)])
    with pytest.raises(ValueError, match="cache_implementation is 'static'"):
        model.generate(ids, max_new_tokens=3, cache_implementation="static")
    with pytest.raises(ValueError):  # assisted decoding rolls back
        model.generate(ids, max_new_tokens=3, prompt_lookup_num_tokens=2)
    with pytest.raises(ValueError, match="give the DMCCache"):
        model(ids, past_key_values=transformers.DynamicCache())
    with pytest.raises(ValueError, match="packed sequences"):
        model(ids, position_ids=torch.arange(10).repeat(2)[None])
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        model()
    with pytest.raises(ValueError, match="output_attentions"):
        model(ids, output_attentions=True)
    with pytest.raises(ValueError, match="without gradients"):
        model.train()(ids)


def test_saved_and_loaded_again(tmp_path: Path) -> None:
    for case in ("every head", "rope_parameters", "llama 3"):
        exported = Exported(tmp_path / case / "model", **CASES[case])
        model = exported.load()
        model.save_pretrained(tmp_path / case / "again")
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / case / "again", trust_remote_code=True)
        ids = torch.tensor([tokens(30)])
        assert torch.equal(again(ids).logits, model(ids).logits)
        assert again.config.dmc == exported.dmc


@pytest.mark.parametrize("window", [12, None])
def test_bf16_slots(window, tmp_path: Path) -> None:
    """Slots are fp32 averages that are rounded once, however long the segment and however it came in."""
    exported = Exported(tmp_path / "model", bias=-0.8, window=window)
    model = exported.load(dtype=torch.bfloat16)
    module, s = sys.modules[type(model).__module__], 150
    q, k, v = (torch.randn(1, h, s, D, generator=torch.Generator().manual_seed(h)).bfloat16() for h in (4, 2, 2))
    k[..., -1] += 1.2  # long segments
    oracle = OracleCache(1, GROUPS, exported.inv_freq, decision_bias=-0.8, epsilon=EPSILON, window=window)
    for t in range(s):
        oracle.step(q[:, :, t].float(), k[:, :, t].float(), v[:, :, t].float())
    merge = k[..., -1].float() + 0.8 > 0
    omega = torch.sigmoid(q[..., -1].float().view(1, 2, 2, s).mean(2) - 0.8) + EPSILON
    for sizes in ([1] * s, [40, 110], [s]):
        cache, start = cache_module(model).DMCCacheLayer(window), 0
        for n in sizes:
            at = torch.arange(start, start + n)
            tables = module.rotary_tables(model.config, at[None])
            valid = torch.ones(1, n, dtype=torch.bool)
            cache.append(k[:, :, at], v[:, :, at], merge[:, :, at], omega[:, :, at], valid, *tables)
            start += n
        assert torch.equal(cache.lengths, oracle.lengths()) and s > 3 * int(cache.lengths.max())
        for held, wanted in ((cache.keys, "keys"), (cache.values, "values")):
            for row, head in zip(held[0].float(), oracle.heads[0]):
                wanted_row = torch.stack(getattr(head, wanted))
                error = (row[: len(wanted_row)] - wanted_row).abs()
                assert (error <= 2**-8 * wanted_row.abs() + 1e-5).all()


def test_bf16_generation(tmp_path: Path) -> None:
    exported = Exported(tmp_path / "model", bias=-0.8)
    model, exact = exported.load(dtype=torch.bfloat16), exported.load()
    assert model.dtype == torch.bfloat16
    ids = torch.tensor([tokens(60, 1), tokens(60, 2)])
    out = model(ids, use_cache=True)
    cache = out.past_key_values
    assert out.logits.dtype == torch.bfloat16 and cache.layers[0].keys.dtype == torch.bfloat16
    # The first layer sees the same input up to rounding: nearly every decision is the same.
    lengths, wanted = cache.lengths()[0], exact(ids, use_cache=True).past_key_values.lengths()[0]
    assert (lengths - wanted).abs().max() <= 2
    result = model.generate(ids, max_new_tokens=10, do_sample=False, return_dict_in_generate=True)
    assert result.past_key_values.compression_ratio() > 1.2 and out.logits.isfinite().all()


@pytest.fixture
def megatron():
    """Megatron in this process for one test, and no trace of it afterwards."""
    from helpers.in_process import megatron_in_process, run_config

    run = run_config(
        dict(decision_bias=-0.8),
        hidden_size=HIDDEN,
        ffn_hidden_size=48,
        num_attention_heads=GROUPS * 2,
        num_query_groups=GROUPS,
        kv_channels=D,
        vocab_size=VOCABULARY,
        rotary_base=5e4,
        add_qkv_bias=True,
        qk_layernorm=True,
    )
    with megatron_in_process(run):
        yield run


@torch.no_grad()
def test_the_same_as_the_model_that_was_trained(megatron, tmp_path: Path) -> None:
    """Bias and norms of the heads in one: Megatron's teacher forcing, its step-by-step decoder, and transformers."""
    from helpers.in_process import build

    from megatron.dmc.evaluation.load import Loaded
    from megatron.dmc.evaluation.reference import ReferenceDecoder
    from megatron.dmc.model import DMCStep

    exported = Exported(tmp_path / "model", bias=-0.8, qkv_bias=True, qk_norm=True)
    trained, w, g = build(megatron), exported.weights, 2
    device = next(trained.parameters()).device
    trained.embedding.word_embeddings.weight[:VOCABULARY] = w["model.embed_tokens.weight"].to(device)
    trained.output_layer.weight[:VOCABULARY] = w["lm_head.weight"].to(device)
    trained.decoder.final_layernorm.weight.copy_(w["model.norm.weight"])
    for n, layer in enumerate(trained.decoder.layers):
        name, attention = f"model.layers.{n}.", layer.self_attention
        for part in ("weight", "bias"):
            q, k, v = (
                w[f"{name}self_attn.{p}_proj.{part}"].view(GROUPS, h, D, -1) for p, h in (("q", g), ("k", 1), ("v", 1))
            )
            mixed = getattr(attention.linear_qkv, part)
            mixed.copy_(torch.cat((q, k, v), dim=1).view(mixed.shape))
        for ours, theirs in (
            (attention.q_layernorm, "self_attn.q_norm"),
            (attention.k_layernorm, "self_attn.k_norm"),
            (attention.linear_proj, "self_attn.o_proj"),
            (layer.input_layernorm, "input_layernorm"),
            (layer.pre_mlp_layernorm, "post_attention_layernorm"),
            (layer.mlp.linear_fc2, "mlp.down_proj"),
        ):
            ours.weight.copy_(w[f"{name}{theirs}.weight"])
        layer.mlp.linear_fc1.weight.copy_(torch.cat((w[name + "mlp.gate_proj.weight"], w[name + "mlp.up_proj.weight"])))

    model, ids = exported.load().to(device), torch.tensor([tokens(120, 1), tokens(120, 2)], device=device)
    step = DMCStep()
    forced = trained(ids, torch.arange(120, device=device).expand(2, -1), step=step)[..., :VOCABULARY]
    out = model(ids, use_cache=True)
    close(out.logits, forced)
    assert torch.equal(out.past_key_values.lengths(), torch.stack([step.kept[n + 1].cpu() for n in range(LAYERS)]))

    decoder = ReferenceDecoder(Loaded(trained, megatron, manifest=None, path=tmp_path))
    prompt = ids[0, :20].tolist()
    result = model.generate(ids[:1, :20], max_new_tokens=40, do_sample=False, return_dict_in_generate=True)
    assert result.sequences[0, 20:].tolist() == list(decoder.generate(prompt, 40))
    decoder = ReferenceDecoder(Loaded(trained, megatron, manifest=None, path=tmp_path))
    for token in result.sequences[0, :-1].tolist():
        decoder.step(token)
    cache = result.past_key_values
    assert torch.equal(cache.lengths()[:, 0], decoder.lengths().cpu())
    assert cache.compression_ratio() == decoder.tokens * LAYERS * GROUPS / int(decoder.lengths().sum()) > 1.2
