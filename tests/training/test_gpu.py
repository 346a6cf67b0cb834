"""What needs a GPU beyond the operators (those run on both devices in tests/ops): a DMC layer and a tiny retrofit."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent / "benchmarks"))
pytestmark = pytest.mark.gpu


def _config(prefix: Path, stage, bf16: bool):
    from megatron.dmc.config import DataConfig, DMCConfig, ModelConfig, RunConfig, TrainingConfig

    return RunConfig(
        # A low bias, so that a model of random weights merges.
        dmc=DMCConfig(decision_bias=0.1),
        model=ModelConfig(
            num_layers=2,
            hidden_size=256,
            ffn_hidden_size=512,
            num_attention_heads=4,
            num_query_groups=2,
            vocab_size=512,
            max_position_embeddings=256,
        ),
        stage=stage,
        data=DataConfig(data_path=[str(prefix)], tokenizer="random", seq_length=256),
        training=TrainingConfig(micro_batch_size=2, global_batch_size=4, bf16=bf16, transformer_impl="local"),
    )


@pytest.mark.parametrize("bf16", [False, True])
def test_retrofit_steps_on_a_gpu(tmp_path: Path, bf16: bool) -> None:
    """Six steps of retrofit: finite, learning, merging; the same run twice gives the same losses to rounding."""
    from _data import RandomIds, write_random_dataset

    from megatron.dmc.config import StageConfig
    from megatron.dmc.training import initialize

    write_random_dataset(tmp_path / "data", 256 * 64, 512)
    config = _config(tmp_path / "data", StageConfig(stage="retrofit", train_iters=6, target_cr=2.0), bf16)
    initialize.initialize(config)
    try:
        from megatron.dmc.training.loop import Trainer

        runs = []
        for _ in range(2):
            torch.manual_seed(0)
            initialize.shutdown()
            initialize.initialize(config)
            trainer = Trainer(config, RandomIds(512))
            iterators = trainer.iterators(trainer.train_data, 0)
            losses = []
            for _ in range(6):
                sums, norm = trainer.train_step(iterators)
                result = sums.reduce(config)
                losses.append(result.lm_loss)
                assert math.isfinite(losses[-1]) and math.isfinite(norm) and norm > 0
                assert result.cr > 1.0
            runs.append(losses)
        assert runs[0] == pytest.approx(runs[1], rel=2e-2 if bf16 else 1e-4)
        assert runs[0][0] == pytest.approx(math.log(512), rel=0.1)
    finally:
        initialize.shutdown()


def test_layer_on_a_gpu_equals_the_cpu() -> None:
    """One attention pass of the ops as the layer composes them, fp32: outputs and gradients of both devices agree."""
    from megatron.dmc.ops import (
        decision_logits,
        dmc_attention,
        importance,
        logistic_noise,
        make_decisions,
        pool,
        rotary_frequencies,
        rotate_and_split_neuron,
    )
    from megatron.dmc.ops.attention import mask_channel, mask_unit
    from megatron.dmc.ops.rotary import cos_sin

    torch.manual_seed(0)
    inputs = [torch.randn(2, heads, 200, 64) for heads in (8, 2, 2)]
    results = []
    for device in ("cpu", "cuda"):
        q, k, v = (x.detach().to(device).requires_grad_() for x in inputs)
        cos, sin = cos_sin(rotary_frequencies(64, 1e4, device=device), torch.arange(200, device=device))
        noise = logistic_noise(torch.arange(2, device=device), range(2), 200, seed=1, step=2, layer=3)
        decisions = make_decisions(decision_logits(k[..., -1], 0.2), 0.3, noise)
        rotated, neuron = rotate_and_split_neuron(q, cos, sin, mask_channel(64))
        pooled, values = pool(k, v, decisions.alpha, importance(neuron, 2, 0.2, 2**-7), 12)
        pooled, _ = rotate_and_split_neuron(pooled, cos, sin, decisions.log_keep * mask_unit(64))
        out = dmc_attention(rotated, pooled, values)
        out.square().sum().backward()
        results.append([x.cpu() for x in (out, q.grad, k.grad, v.grad)])
    for name, a, b in zip(("out", "dq", "dk", "dv"), *results, strict=True):
        assert float((a - b).abs().max() / a.abs().max()) < 2e-3, name
