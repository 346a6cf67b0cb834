"""Leaving in time, checkpoints written in the background, checksums, what is kept, and starts that come to nothing."""

import os
import queue
import signal
import subprocess
import sys
import time

import pytest
import torch
from helpers import tiny
from helpers.processes import subprocess_env

from megatron.dmc.checkpoint import checksums, manifest
from megatron.dmc.checkpoint.manifest import Manifest
from megatron.dmc.training import mcore_compat, save_lock

LAST = "iter_0000006"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny.make_data(tmp_path_factory.mktemp("data"))


def command(data, save, **more):
    return tiny.command(data, "pretrain", **{**dict(train_iters=6, save_interval=2, save=save), **more})


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """(--save directory, run) of an undisturbed run with synchronous writes."""
    save = tmp_path_factory.mktemp("whole")
    return save, tiny.run(command(data, save), save.parent / "whole_run")


def names(save):
    return sorted(path.name for path in save.iterdir())


# Writing in the background


@pytest.mark.slow
@pytest.mark.parametrize(
    "world, options",
    [
        (1, {}),
        (2, dict(use_distributed_optimizer=True, bf16=True, micro_batch_size=1)),
        (2, dict(pipeline_model_parallel_size=2)),
    ],
    ids=["one", "dp2-distributed-optimizer", "pp2"],
)
def test_background_writes_are_the_same_checkpoints(data, tmp_path, world, options):
    for name, more in (("sync", {}), ("async", dict(async_save=True))):
        run = tiny.run(command(data, tmp_path / name, **options, **more), tmp_path / f"{name}_run", world)
        assert names(tmp_path / name) == ["iter_0000002", "iter_0000004", LAST, manifest.LATEST], run.output()
        assert run.output().count("saved ") == 3
    for iteration in (2, 4, 6):  # training has changed the weights since, while they were written
        tiny.assert_same_checkpoint(*(tmp_path / name / f"iter_{iteration:07d}" for name in ("sync", "async")))
        read = [manifest.read_manifest(tmp_path / name / f"iter_{iteration:07d}") for name in ("sync", "async")]
        assert read[0].files.keys() == read[1].files.keys() == read[0].crc32.keys() == read[1].crc32.keys()


@pytest.mark.slow
@pytest.mark.parametrize("place", ["shards:2", "manifest:2", "rename:2"])
def test_killed_while_writing_in_the_background(data, whole, tmp_path, place):
    """Nothing is lost but the checkpoint that was being written: the run goes on from the one before."""
    save = tmp_path / "save"
    argv = command(data, save, async_save=True)
    run = tiny.Run(argv, tmp_path / "run", hang=place)
    run.wait_for_hang()
    run.kill()
    assert [n for n in names(save) if not n.startswith((".tmp_", save_lock.FILE))] == ["iter_0000002", manifest.LATEST]
    assert any(n.startswith(".tmp_iter_0000004") for n in names(save))
    resumed = tiny.run(argv, tmp_path / "run")
    assert f"resumed {save / 'iter_0000002'} at iteration 2" in resumed.output()
    assert names(save) == ["iter_0000002", "iter_0000004", LAST, manifest.LATEST]
    tiny.assert_same_checkpoint(whole[0] / LAST, save / LAST)


@pytest.mark.slow
def test_a_signal_waits_for_what_is_being_written(data, whole, tmp_path):
    run = tiny.Run(command(data, tmp_path / "save", async_save=True), tmp_path / "a", hang="pause:9")
    run.wait_for_hang()  # in step 5, with the checkpoint of step 4 in the background
    run.signal(signal.SIGUSR1)
    run.join(0)
    assert names(tmp_path / "save") == ["iter_0000002", "iter_0000004", "iter_0000005", manifest.LATEST]
    tiny.run(command(data, tmp_path / "save"), tmp_path / "b")
    tiny.assert_same_checkpoint(whole[0] / LAST, tmp_path / "save" / LAST)


def test_no_tensor_is_copied_before_the_fork():
    """A parameter is a view into a large buffer, and what a factory makes of it is one too."""
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

    def halves(key, data, *_):
        return [ShardedTensor.from_rank_offsets(f"{key}{i}", part) for i, part in enumerate(data.chunk(2))]

    for dtype in (torch.float32, torch.bfloat16, torch.int64):
        buffer = torch.arange(200).to(dtype)
        state = {
            "a": ShardedTensor.from_rank_offsets("a", buffer[8:32].view(4, 6)),
            "b": [{"c": 1}],
            "f": ShardedTensorFactory("f", buffer[40:80].view(4, 10), halves, lambda parts: torch.cat(parts)),
        }
        leaves = [mcore_compat.give_own_storages(state)["a"].data, *(part.data for part in state["f"])]
        assert [leaf.shape for leaf in leaves] == [(4, 6), (2, 10), (2, 10)]
        for leaf, start in zip(leaves, (8, 40, 60)):
            assert leaf.data_ptr() == buffer[start:].data_ptr() and leaf.untyped_storage().nbytes() == leaf.nbytes
            assert leaf.dtype == dtype and torch.equal(leaf.flatten(), buffer[start : start + leaf.numel()])


def test_the_save_is_megatron_cores_own(monkeypatch):
    """From 0.17 on the default is another package's."""
    monkeypatch.setattr(mcore_compat.dist_checkpointing, "save", lambda state, directory, async_strategy="nvrx": None)
    assert mcore_compat.async_save_options() == {"async_strategy": "mcore"}
    monkeypatch.setattr(mcore_compat.dist_checkpointing, "save", lambda state, directory: None)
    assert mcore_compat.async_save_options() == {}


def test_results_come_through_a_fork_whatever_their_size():
    results = mcore_compat.ResultsFile()
    with pytest.raises(queue.Empty):
        results.get_nowait()
    if (child := os.fork()) == 0:
        results.put(b"x" * (1 << 20))
        results.put({"file": "crc"})
        os._exit(0)
    os.waitpid(child, 0)
    assert len(results.get_nowait()) == 1 << 20 and results.get_nowait() == {"file": "crc"}
    with pytest.raises(queue.Empty):
        results.get_nowait()


# Checksums


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
def test_a_flipped_byte_is_found_by_name(data, tmp_path, world):
    save = tmp_path / "save"
    options = dict(micro_batch_size=1) if world == 2 else {}
    argv = command(data, save, save_interval=None, **options)
    tiny.run([*argv, "--exit-interval", "2"], tmp_path / "a")
    checkpoint = save / "iter_0000002"
    known = manifest.read_manifest(checkpoint)
    assert set(known.crc32) == set(known.files) and any(name.endswith(".distcp") for name in known.files)
    for name in known.files:
        file = checkpoint / name
        content = file.read_bytes()
        middle = len(content) // 2
        file.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
        assert [text.split(" ")[0] for text in checksums.damaged(checkpoint, known.crc32, known.files)] == [name]
        if name.endswith("_0.distcp") or name == "common.pt":
            run = tiny.run(argv, tmp_path / "b", world, status=2)
            assert f"error: checkpoint {checkpoint} is damaged, its checksums differ: {name} (" in run.output()
        file.write_bytes(content)
    run = tiny.run([*argv, "--no-verify-checkpoints"], tmp_path / "c", world)
    assert (
        f"WARNING: {checkpoint} was loaded without a look at its checksums: verify_checkpoints is off" in run.output()
    )


def test_checksums(tmp_path):
    import zlib

    content = os.urandom(9 << 20)  # more than two blocks
    (tmp_path / "a").write_bytes(content)
    (tmp_path / "b").write_bytes(b"")
    found = checksums.checksums(tmp_path, ["a", "b"])
    assert found == {"a": f"{zlib.crc32(content):08x}", "b": "00000000"}
    assert checksums.damaged(tmp_path, found, ["a", "b"]) == []
    (tmp_path / "b").unlink()
    assert checksums.damaged(tmp_path, found, ["a", "b"]) == ["b (cannot be read, should be 00000000)"]
    files = {f"f{i}": i for i in range(7)}
    shares = [checksums.share(files, rank, 3) for rank in range(3)]
    assert sorted(sum(shares, [])) == sorted(files) and shares[0][0] == "f6" and max(map(len, shares)) == 3


# What stays


@pytest.mark.slow
@pytest.mark.parametrize("background", [False, True], ids=["sync", "async"])
def test_retained_checkpoints_stay(data, tmp_path, background):
    save = tmp_path / "save"
    options = dict(train_iters=7, save_interval=1, keep_checkpoints=2, save_retain_interval=3, async_save=background)
    tiny.run(command(data, save, **options), tmp_path / "a")
    assert names(save) == ["iter_0000003", "iter_0000006", "iter_0000007", manifest.LATEST]


# Time and signals


@pytest.mark.slow
@pytest.mark.parametrize(
    "variables, options, expected",
    [
        ({"SLURM_JOB_START_TIME": -7200}, dict(exit_duration_in_mins=119.5), 1),
        ({"SLURM_JOB_END_TIME": 50}, {}, 1),  # less than the minute before the end
        ({"SLURM_JOB_END_TIME": 7200}, {}, None),
        ({"SLURM_JOB_END_TIME": -50}, {}, None),  # of a job that is over
        ({}, dict(exit_duration_in_mins=60), None),
    ],
    ids=["duration", "end", "far-end", "stale-end", "long-duration"],
)
def test_leaves_when_the_jobs_time_is_up(data, tmp_path, variables, options, expected):
    env = {name: str(int(time.time()) + seconds) for name, seconds in variables.items()}
    run = tiny.run(command(data, tmp_path / "save", **options), tmp_path / "a", env=env)
    assert "armed: SIGTERM, SIGUSR1 and SIGINT save and leave" in run.output()
    if expected is None:
        assert names(tmp_path / "save")[-2] == LAST
    else:
        assert (
            f"leaving at iteration {expected} of 6: the job's time is up; saved at iteration {expected}" in run.output()
        )


@pytest.mark.slow
def test_a_signal_ends_an_evaluation(data, whole, tmp_path):
    more = dict(valid_data_path=[data / "valid"], eval_interval=3, eval_iters=500)
    run = tiny.Run(
        command(data, tmp_path / "save", **more), tmp_path / "a", hang="pause:9"
    )  # the 2nd batch of the evaluation
    run.wait_for_hang()
    run.signal(signal.SIGTERM)
    run.join(0)
    assert "validation at iteration 3 was left before its end" in run.output()
    assert "leaving at iteration 3 of 6: signal 15; saved at iteration 3" in run.output()
    tiny.run(command(data, tmp_path / "save"), tmp_path / "b")
    tiny.assert_same_checkpoint(whole[0] / LAST, tmp_path / "save" / LAST)


# Starts that come to nothing


@pytest.mark.slow
def test_a_crash_loop_stops_itself(data, tmp_path):
    save, argv = tmp_path / "save", command(data, tmp_path / "save", max_starts_without_step=2)
    note = save / "starts_without_a_step"
    for count in (1, 2):
        run = tiny.Run(argv, tmp_path / "a", hang="step:1")
        run.wait_for_hang()
        run.kill()
        assert note.read_text() == f"{count}\n"
    refused = tiny.run(argv, tmp_path / "a", status=2).output()
    assert (
        "error: the last 2 starts of this stage ended before their first step was complete; look for the cause"
        in refused
    )
    assert f"then remove {note}" in refused
    job = {"SLURM_JOB_ID": "7"}
    tiny.run(argv, tmp_path / "a", status=2, env={**job, "SLURM_RESTART_COUNT": "1"})  # requeued: no new submission
    tiny.run(argv, tmp_path / "a", env=job)
    assert names(save) == ["iter_0000002", "iter_0000004", LAST, manifest.LATEST]


@pytest.mark.slow
def test_a_refused_start_does_not_count(data, tmp_path):
    (tmp_path / "other").mkdir()
    tiny.run(command(data, tmp_path / "other", train_iters=1, save_interval=None), tmp_path / "a")
    checkpoint = tmp_path / "other" / "iter_0000001"
    manifest.read_manifest(checkpoint).write(checkpoint, crc32={"common.pt": "00000000"})
    run = tiny.run(command(data, tmp_path / "other", train_iters=1, save_interval=None), tmp_path / "a", status=2)
    assert "is damaged" in run.output()
    assert names(tmp_path / "other") == ["iter_0000001", manifest.LATEST]


# For scripts


def test_how_far_a_stage_is(tmp_path):
    def ask(expected):
        result = subprocess.run(
            [sys.executable, "-m", "megatron.dmc.checkpoint.manifest", str(tmp_path)],
            text=True,
            capture_output=True,
            env=subprocess_env(),
        )
        assert result.returncode == expected, result
        return result.stdout + result.stderr

    assert "no checkpoint yet" in ask(1)
    for iteration, expected in ((4, 1), (6, 0)):
        directory = tmp_path / f"iter_{iteration:07d}"
        directory.mkdir()
        (directory / "metadata.json").write_text("{}")
        Manifest(
            stage="retrofit", iteration=iteration, train_iters=6, consumed_samples=0, consumed_tokens=0, target_cr=2.0
        ).write(directory, {})
        assert f"retrofit, iteration {iteration} of 6" in ask(expected)
    (tmp_path / LAST / "metadata.json").write_text("damaged")
    assert "error:" in ask(2)
