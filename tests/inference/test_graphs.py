"""Decode steps by graphs of fixed sizes: the same tokens, padding touches nothing, results may be overwritten by the
next.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.engines import GREEDY, Model, drain, ids_of
from torch import Tensor

from megatron.dmc.inference import Engine, graphs
from megatron.dmc.inference.graphs import DecodeGraphs, capture_sizes


class Recorder:
    """What a CUDA graph promises and no more: the function runs as captured, and its result lies in the same place
    every time.
    """

    def __init__(self, device: torch.device) -> None:
        self.replayed: list[int] = []

    def __call__(self, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        out = run()

        def replay() -> Tensor:
            self.replayed.append(len(out))
            return out.copy_(run())

        return replay


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Engines take graphs on the CPU; the batch sizes of all replays."""
    recorder = Recorder(torch.device("cpu"))
    monkeypatch.setattr(graphs, "CudaGraphRecorder", lambda device: recorder)
    monkeypatch.setattr(Engine, "_takes_graphs", lambda self: True)
    return recorder.replayed


def test_sizes() -> None:
    assert capture_sizes(1) == [1] and capture_sizes(3) == [1, 2, 3] and capture_sizes(20) == [1, 2, 4, 8, 16, 20]
    sizes = capture_sizes(300)
    assert sizes[-4:] == [256, 272, 288, 300] and sizes == sorted(set(sizes))


@pytest.mark.parametrize("case", ["half", "unbounded", "qwen 2", "query"])
@pytest.mark.parametrize("seqs", [1, 3, 8])
@pytest.mark.parametrize("ahead", [False, True])
def test_the_same_tokens(case: str, seqs: int, ahead: bool, recorded: list[int], tmp_path: Path) -> None:
    model = Model(tmp_path / "model", case)
    engine = model.engine(max_num_seqs=seqs, max_num_batched_tokens=16, async_scheduling=ahead)
    engine.cache.check_integrity()  # capturing has changed nothing
    assert engine.cache.state.free_count() == engine.cache.num_pages
    prompts = [model.prompt(n, seed=n) for n in (1, 2, 17, 33, 40, 5, 16)]
    for i, prompt in enumerate(prompts):
        engine.add_request(str(i), prompt, GREEDY)
    found = drain(engine)
    assert [ids_of(found[str(i), 0]) for i in range(len(prompts))] == [model.answer(prompt) for prompt in prompts]
    assert len(recorded) >= 23 and set(recorded) <= set(capture_sizes(seqs)) and (seqs < 8 or len(set(recorded)) > 1)


def test_what_is_no_step_for_a_graph(tmp_path: Path) -> None:
    seen: list[int] = []

    def forward(batch) -> Tensor:
        seen.append(len(batch.tokens))
        assert batch.decoding == len(batch.tokens) == len(batch.rows)
        assert batch.cu_seqlens.tolist() == list(range(seen[-1] + 1)) and batch.logits_at.tolist() == list(
            range(seen[-1])
        )
        return torch.stack([batch.tokens, batch.positions, batch.rows]).t().float()

    decode = DecodeGraphs(forward, 4, torch.device("cpu"), Recorder(torch.device("cpu")))
    assert seen == [4, 2, 1]
    assert decode([5] * 5, [0] * 5, list(range(5))) is None
    assert decode([5, 6, 7, 8], [10, 11, 12, 13], [0, 1, 2, 3]).tolist() == [
        [5, 10, 0],
        [6, 11, 1],
        [7, 12, 2],
        [8, 13, 3],
    ]
    # Fewer than before: what the batch before left in the buffers is not there any more.
    assert decode([9, 4, 3], [20, 2, 7], [3, 1, 2]).tolist() == [[9, 20, 3], [4, 2, 1], [3, 7, 2]]
    assert decode._inputs.tolist() == [[9, 4, 3, 0], [20, 2, 7, 0], [3, 1, 2, -1]]


def test_a_failure_comes_out(recorded: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model(tmp_path / "model", "half")
    engine = model.engine(max_num_seqs=2)
    engine.add_request("a", model.prompt(9), GREEDY)
    engine.step()
    with monkeypatch.context() as patched:
        patched.setattr(DecodeGraphs, "__call__", lambda self, *inputs: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            engine.step()
    assert ids_of(drain(engine)["a", 0]) == model.answer(model.prompt(9))[1:]


@pytest.mark.gpu
def test_captured_on_the_gpu(tmp_path: Path) -> None:
    model = Model(tmp_path / "model", "half")
    prompts = [model.prompt(n, seed=n) for n in (1, 17, 33, 40, 5)]
    answers = []
    for eager in (False, True):
        engine = model.engine(max_num_seqs=4, device="cuda", enforce_eager=eager)
        assert (engine.runner.graphs is None) == eager
        for i, prompt in enumerate(prompts):
            engine.add_request(str(i), prompt, GREEDY)
        found = drain(engine)
        answers.append([ids_of(found[str(i), 0]) for i in range(len(prompts))])
    assert answers[0] == answers[1] == [model.answer(prompt) for prompt in prompts]
