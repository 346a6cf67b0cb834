"""Benchmarks for a GPU, as far as they run without one."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from helpers.forked import run
from helpers.processes import ROOT
from test_kernels import filled

from megatron.dmc.kernels import decode_attention

sys.path.insert(0, str(ROOT / "benchmarks"))
import _flashinfer


def test_throughput_of_a_tiny_shape(tmp_path: Path) -> None:
    """Every part, with what it counts: CR as asked for, nothing preempted in the cache that was filled to the last
    pages.
    """
    out = tmp_path / "out.json"
    options = "--device cpu --shapes tiny --memory-gib 0.012 --reserve-gib 0.001 --input-len 48 --output-lens 48"
    options += (
        " --compression-ratios 1 4 --prefill-lens 64 --prefill-rounds 1 --protocol-batch 2 --protocol-output-len 40"
    )
    script = ROOT / "benchmarks" / "throughput.py"
    run([sys.executable, script, *options.split(), "--json", out], tmp_path / "log")
    figures = json.loads(out.read_text())["figures"]
    plain, dmc = figures["throughput"]
    assert plain["compression_ratio"] == 1
    assert dmc["compression_ratio"] == pytest.approx(4, rel=0.1)
    assert dmc["batch"] > 1.8 * plain["batch"]  # short sequences: rings and half-empty pages take their part
    for row in (plain, dmc):
        assert row["preemptions"] == 0
        assert row["decode_step_ms"]["n"] > 20
        assert 0 < row["of_floor"]["median"] < 2
        assert row["tokens_per_second"] * row["seconds"] == pytest.approx(48 * row["batch"])
    assert [(f["asked"], f["last_ms"]["n"]) for f in figures["protocol"]] == [(1, 32), (4, 32)]
    assert [(f["asked"], f["tokens"]) for f in figures["prefill"]] == [(1, 64), (4, 64)]


class StandIn:
    """FlashInfer's wrapper by its documentation, in PyTorch:
    layout NHD, pages of a sequence in a row of ``indices``.
    """

    def __init__(self, workspace: torch.Tensor, kv_layout: str, use_tensor_cores: bool) -> None:
        assert kv_layout == "NHD"
        assert workspace.dtype == torch.uint8

    def plan(
        self,
        indptr,
        indices,
        last_page_len,
        num_qo_heads,
        num_kv_heads,
        head_dim,
        page_size,
        *,
        q_data_type,
        kv_data_type,
        sm_scale,
    ) -> None:
        assert num_kv_heads == 1
        assert all(x.dtype == torch.int32 for x in (indptr, indices, last_page_len))
        self.indptr, self.indices, self.last, self.page_size, self.scale = (
            indptr,
            indices,
            last_page_len,
            page_size,
            sm_scale,
        )

    def run(self, q: torch.Tensor, cache: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        out = torch.empty_like(q)
        for i in range(q.size(0)):
            pages = self.indices[self.indptr[i] : self.indptr[i + 1]].long()
            length = (pages.numel() - 1) * self.page_size + int(self.last[i])
            k, v = (x[pages].flatten(0, 1)[:length, 0] for x in cache)  # [pages, page size, 1, D] -> [length, D]
            out[i] = torch.softmax(q[i] @ k.T * self.scale, dim=-1) @ v
        return out


def test_flashinfer_is_given_the_same_cache(monkeypatch) -> None:
    module = ModuleType("flashinfer")
    module.BatchDecodeWithPagedKVCacheWrapper = StandIn  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flashinfer", module)
    state, _ = filled([[1, 40, 16], [100, 17, 33]], 32, 16, torch.float32, "cpu")
    q, rows = torch.randn(2, 12, 32), torch.arange(2, dtype=torch.int32)
    want = decode_attention(state, 1, q, rows, 0.3).view(2, 3, 4, 32)
    functions = _flashinfer.decode_functions(state, 1, q, 0.3)
    assert list(functions) == ["flashinfer", "flashinfer tc"]
    for function in functions.values():
        torch.testing.assert_close(function(), want, atol=1e-5, rtol=1e-5)
