"""Batches: the same samples in every layout, resuming, and loader processes. No GPU, a few seconds."""

import multiprocessing
import signal
import subprocess

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.dmc.training.data import batch_iterator


class Numbers(torch.utils.data.Dataset):
    """A dataset whose sample i is recognizable."""

    def __init__(self, length):
        self.length = length

    def __len__(self):
        return self.length

    def __getitem__(self, i):
        tokens = torch.full((4,), i)
        return {
            "tokens": tokens,
            "labels": tokens + 1,
            "loss_mask": torch.ones(4),
            "position_ids": torch.arange(4),
            "dataset_id": 0,
        }


def ids_of(batches):
    return [batch["sample_ids"].tolist() for batch in batches]


@settings(deadline=None, max_examples=40)
@given(
    micro=st.integers(1, 4),
    ranks=st.integers(1, 4),
    accumulation=st.integers(1, 4),
    steps=st.integers(1, 3),
    start=st.integers(0, 50),
    rest=st.integers(0, 5),
)
def test_every_layout_takes_the_same_samples_per_step(micro, ranks, accumulation, steps, start, rest):
    batch = micro * ranks * accumulation
    dataset = Numbers(start + steps * batch + rest % batch)
    taken = [
        ids_of(
            batch_iterator(
                dataset,
                consumed_samples=start,
                micro_batch_size=micro,
                global_batch_size=batch,
                dp_rank=rank,
                dp_size=ranks,
            )
        )
        for rank in range(ranks)
    ]
    for rank in range(ranks):
        assert len(taken[rank]) == steps * accumulation
        for m, rows in enumerate(taken[rank]):  # the documented formula
            step, m = divmod(m, accumulation)
            assert rows == [start + step * batch + m * micro * ranks + rank * micro + j for j in range(micro)]
    for step in range(steps):
        rows = [i for rank in taken for rows in rank[step * accumulation : (step + 1) * accumulation] for i in rows]
        assert sorted(rows) == list(range(start + step * batch, start + (step + 1) * batch))


@pytest.mark.parametrize("workers", [0, 2])
def test_resumed_stream_equals_uninterrupted(workers):
    options = dict(micro_batch_size=2, global_batch_size=8, dp_rank=1, dp_size=2, num_workers=workers)
    state = torch.get_rng_state()
    whole = list(batch_iterator(Numbers(50), consumed_samples=0, **options))
    assert torch.equal(state, torch.get_rng_state())  # else the noise after a resume would differ
    resumed = list(batch_iterator(Numbers(50), consumed_samples=16, **options))
    assert len(whole) == 12 and len(resumed) == 8
    for a, b in zip(whole[4:], resumed):
        assert a.keys() == b.keys() == {"tokens", "labels", "loss_mask", "position_ids", "sample_ids"}
        assert all(torch.equal(a[name], b[name]) for name in a)
    assert whole[0]["tokens"].shape == (2, 4) and torch.equal(whole[0]["tokens"][:, 0], whole[0]["sample_ids"])
    assert [whole[0][name].dtype for name in ("tokens", "loss_mask", "sample_ids")] == [
        torch.int64,
        torch.float32,
        torch.int64,
    ]


def test_stages_without_tokens_get_the_sample_ids():
    options = dict(consumed_samples=4, micro_batch_size=2, global_batch_size=4, dp_rank=0, dp_size=1)
    without = batch_iterator(None, **options)
    for _ in batch_iterator(Numbers(12), **options):
        assert next(without).keys() == {"sample_ids"}
    without = batch_iterator(None, **options)
    assert ids_of(next(without) for _ in range(4)) == ids_of(batch_iterator(Numbers(12), **options))


@pytest.mark.parametrize(
    "wrong", [dict(micro_batch_size=3), dict(dp_rank=2), dict(consumed_samples=-1), dict(dp_size=0)]
)
def test_bad_layout_is_refused_at_once(wrong):
    options = dict(consumed_samples=0, micro_batch_size=2, global_batch_size=8, dp_rank=0, dp_size=2)
    with pytest.raises(ValueError):
        batch_iterator(Numbers(9), **{**options, **wrong})


def test_loader_processes_survive_a_job_signal():
    batches = batch_iterator(
        Numbers(400), consumed_samples=0, micro_batch_size=1, global_batch_size=1, dp_rank=0, dp_size=1, num_workers=1
    )
    assert ids_of([next(batches)]) == [[0]]
    (worker,) = multiprocessing.active_children()
    for number in (signal.SIGUSR1, signal.SIGTERM):  # from a process that is not its parent
        subprocess.run(["kill", f"-{number.name[3:]}", str(worker.pid)], check=True)
    assert ids_of(batches) == [[i] for i in range(1, 400)]
    worker.join(10)
    assert not worker.is_alive()
