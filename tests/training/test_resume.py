"""Nothing is lost: killed, signalled and re-laid-out runs continue where they stood; stages follow one another."""

import json
import random
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from damage import kills_and_bytes
from helpers import tiny
from helpers.processes import PATIENCE, kill_tree, subprocess_env

from megatron.dmc.training import initialize, retrofit

pytestmark = pytest.mark.slow

ITERATIONS, INTERVAL = 6, 2
STAGES = ("pretrain", "zero_out", "retrofit", "finetune")
BEFORE = {"zero_out": "pretrain", "retrofit": "zero_out", "finetune": "retrofit"}
LAST = f"iter_{ITERATIONS:07d}"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny.make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def chain(data, tmp_path_factory):
    """stage -> (its --save directory, the run), none of them disturbed, each started from the one before."""
    root, done = tmp_path_factory.mktemp("chain"), {}
    for stage in STAGES:
        run = tiny.run(command(data, stage, root / stage, root), root / f"{stage}_run")
        done[stage] = root / stage, run
    return done


def command(data, stage, save, chain_root, **more):
    extra = dict(train_iters=ITERATIONS, save_interval=INTERVAL, save=save)
    if stage in BEFORE:
        extra["init_from"] = chain_root / BEFORE[stage]
    if stage == "retrofit":
        extra["target_cr"] = 2
    return tiny.command(data, stage, **{**extra, **more})


def root_of(chain):
    return chain["pretrain"][0].parent


def names(save):
    return sorted(path.name for path in save.iterdir())


def assert_continues(whole, resumed, first):
    """The second run's iterations are ``first`` to the end, and equal the undisturbed run's bit for bit."""
    assert sorted(resumed.values()) == list(range(first, max(whole.values()) + 1)), resumed.output()
    for iteration, values in resumed.values().items():
        assert values == whole.values()[iteration], iteration


# Every stage starts from the checkpoint of the one before and is killed in each place where it may be


@pytest.mark.parametrize("stage", STAGES)
def test_killed_runs_continue_bit_for_bit(data, chain, tmp_path, stage):
    whole, save = chain[stage][1], tmp_path / "save"
    argv = command(data, stage, save, root_of(chain))
    # Two micro-batches per step: the 6th loss is in the middle of step 3, after the checkpoint of step 2.
    for place, stands_at in (("step:6", 2), ("shards:1", 2), ("metadata:1", 2), ("manifest:1", 2), ("rename:1", 2)):
        run = tiny.Run(argv, tmp_path / "run", hang=place)
        run.wait_for_hang()
        run.kill()
        done = [name for name in names(save) if name.startswith("iter_")]
        assert done == [f"iter_{stands_at:07d}"], (place, done)
        assert (save / "latest_checkpointed_iteration.txt").read_text() == f"{stands_at}\n"
        assert any(name.startswith(".tmp_") for name in names(save)) == (place != "step:6")
    run = tiny.run(argv, tmp_path / "run")
    assert f"resumed {save / 'iter_0000002'} at iteration 2" in run.output()
    assert_continues(whole, run, 3)
    assert names(save) == ["iter_0000002", "iter_0000004", LAST, "latest_checkpointed_iteration.txt"]
    assert (save / "latest_checkpointed_iteration.txt").read_text() == "6\n"
    tiny.assert_same_checkpoint(chain[stage][0] / LAST, save / LAST)
    assert "is finished; nothing to do" in tiny.run(argv, tmp_path / "run").output()


@pytest.mark.parametrize(
    "world, options",
    [
        (1, dict(bf16=True)),
        (2, dict(use_distributed_optimizer=True)),
        (2, dict(use_distributed_optimizer=True, bf16=True, overlap_grad_reduce=True, overlap_param_gather=True)),
        (2, dict(tensor_model_parallel_size=2, sequence_parallel=True)),
        (2, dict(pipeline_model_parallel_size=2)),
        (1, dict(distill_from="pretrain", bf16=True)),
        (2, dict(distill_from="pretrain", pipeline_model_parallel_size=2)),
    ],
    ids=["bf16", "distributed-optimizer", "bf16-overlap", "tp2-sp", "pp2", "bf16-distill", "pp2-distill"],
)
def test_every_optimizer_and_layout_resumes_bit_for_bit(data, chain, tmp_path, world, options):
    micro = dict(micro_batch_size=1) if world == 2 else {}
    if "distill_from" in options:
        options = options | dict(distill_from=root_of(chain) / options["distill_from"])
    whole = tiny.run(
        command(data, "retrofit", tmp_path / "whole", root_of(chain), **options, **micro), tmp_path / "a", world
    )
    argv = command(data, "retrofit", tmp_path / "save", root_of(chain), **options, **micro)
    tiny.run([*argv, "--exit-interval", "4"], tmp_path / "b", world)
    assert not (tmp_path / "save" / LAST).exists()
    resumed = tiny.run(argv, tmp_path / "b", world)
    assert_continues(whole, resumed, 5)
    tiny.assert_same_checkpoint(tmp_path / "whole" / LAST, tmp_path / "save" / LAST)


@pytest.mark.parametrize(
    "options",
    [
        dict(tensor_model_parallel_size=2),
        dict(use_distributed_optimizer=True, micro_batch_size=1),
        dict(pipeline_model_parallel_size=2),
    ],
    ids=["tp2", "dp2-distributed-optimizer", "pp2"],
)
def test_resumes_in_another_layout(data, chain, tmp_path, options):
    argv = command(data, "retrofit", tmp_path / "save", root_of(chain))
    shard = ["--use-distributed-optimizer"] if "use_distributed_optimizer" in options else []
    tiny.run([*argv, *shard, "--exit-interval", "2"], tmp_path / "a")
    resumed = tiny.run([*argv, *tiny.flags(**options)], tmp_path / "b", 2)
    whole = chain["retrofit"][1].values()
    assert sorted(resumed.values()) == [3, 4, 5, 6]
    for iteration, values in resumed.values().items():
        for name in ("lm loss", "dmc loss", "CR", "grad norm"):
            assert float.fromhex(values[name]) == pytest.approx(
                float.fromhex(whole[iteration][name]), rel=1e-5, abs=1e-7
            )


# Signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda n: n.name)  # SIGUSR1: below
def test_signal_saves_and_leaves(data, chain, tmp_path, number):
    argv = command(data, "retrofit", tmp_path / "save", root_of(chain), save_interval=None)
    run = tiny.Run(argv, tmp_path / "a", hang="pause:6")
    run.wait_for_hang()
    run.signal(number)
    run.join(0)
    assert f"leaving at iteration 3 of {ITERATIONS}: signal {int(number)}; saved at iteration 3" in run.output()
    resumed = tiny.run(argv, tmp_path / "a2")
    assert_continues(chain["retrofit"][1], resumed, 4)
    tiny.assert_same_checkpoint(chain["retrofit"][0] / LAST, tmp_path / "save" / LAST)


def test_a_signal_without_save_is_told(data, tmp_path):
    """The work is lost, so its status is not that of a run that has saved. An end that was asked for is none."""
    argv = tiny.command(data, "pretrain", train_iters=3)
    run = tiny.Run(argv, tmp_path / "a", hang="pause:4")
    run.wait_for_hang()
    run.signal(signal.SIGTERM)
    run.join(retrofit.LOST)
    assert "leaving at iteration 2 of 3: signal 15; nothing saved (no --save)" in run.output()
    assert "nothing saved" in tiny.run([*argv, "--exit-interval", "2"], tmp_path / "b").output()


def test_signal_to_one_rank_stops_all(data, chain, tmp_path):
    argv = command(data, "retrofit", tmp_path / "save", root_of(chain), micro_batch_size=1, save_interval=None)
    run = tiny.Run(argv, tmp_path / "a", 2, hang="pause:6")
    run.wait_for_hang()
    run.signal(signal.SIGUSR1, rank=1)
    run.join(0)
    assert "saved at iteration 3" in run.output()


def test_sigterm_through_the_launcher(data, chain, tmp_path):
    argv = command(
        data, "retrofit", tmp_path / "save", root_of(chain), micro_batch_size=1, train_iters=5000, save_interval=None
    )
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        "-m",
        "megatron.dmc.training.retrofit",
        *argv,
    ]
    log = tmp_path / "log"
    with log.open("w") as out:
        process = subprocess.Popen(launch, stdout=out, stderr=out, env=subprocess_env(), start_new_session=True)
        try:
            tiny_wait(lambda: "iteration        3/" in log.read_text(), process, log)
            process.terminate()
            process.wait(PATIENCE)
        finally:
            if process.returncode is None:
                kill_tree(process)
    text = log.read_text()
    (left,) = [line for line in text.splitlines() if line.startswith("leaving at iteration")]
    iteration = int(left.split()[3])
    assert f"saved at iteration {iteration}" in left
    manifest = json.loads((tmp_path / "save" / f"iter_{iteration:07d}" / "manifest.json").read_text())
    assert manifest["iteration"] == iteration


def tiny_wait(condition, process, log, timeout=PATIENCE):
    import time

    end = time.monotonic() + timeout
    while not condition():
        assert process.poll() is None and time.monotonic() < end, log.read_text()[-4000:]
        time.sleep(0.1)


# Checkpoints under --save


def test_old_checkpoints_are_pruned_and_leftovers_removed(data, chain, tmp_path):
    save = tmp_path / "save"
    (save / ".tmp_iter_0000002").mkdir(parents=True)
    (save / ".tmp_iter_0000002" / "manifest.json").write_text("{}")
    (save / ".tmp_old_iter_0000001").mkdir()
    run = tiny.run(command(data, "zero_out", save, root_of(chain), keep_checkpoints=1), tmp_path / "a")
    assert sorted(run.values())[0] == 1
    assert names(save) == [LAST, "latest_checkpointed_iteration.txt"]


def test_a_checkpoint_says_what_it_is(chain):
    manifest = json.loads((chain["finetune"][0] / LAST / "manifest.json").read_text())
    log = chain["retrofit"][1].output()  # six steps: nothing merges yet
    assert "WARNING: the stage ends at CR 1.00, its target is 2: no token merges before a decision logit has" in log
    assert "at --lr 0.001 that takes some 33 steps" in log and "WARNING: the stage" not in chain["zero_out"][1].output()
    assert manifest["lineage"] == ["pretrain", "zero_out", "retrofit"] and manifest["stage"] == "finetune"
    assert manifest["source"] == str(chain["retrofit"][0] / LAST) and manifest["target_cr"] == 2
    assert manifest["consumed_tokens"] == ITERATIONS * 4 * tiny.SEQ
    directory = chain["finetune"][0] / LAST
    assert manifest["files"] == {p.name: p.stat().st_size for p in directory.iterdir() if p.name != "manifest.json"}


def test_a_changed_byte_is_found_or_harmless(chain, tmp_path):
    """A sample of tests/damage/kills_and_bytes.py."""
    save = shutil.copytree(chain["finetune"][0], tmp_path / "save")
    for older in sorted(save.glob("iter_*"))[:-1]:
        shutil.rmtree(older)
    try:
        counts = kills_and_bytes.damage(random.Random(4), save, 10, lambda: kills_and_bytes.loaded_checkpoint(save))
    finally:
        initialize.shutdown()
    assert counts["found by name"] >= 5 and counts.total() == 10


@pytest.mark.parametrize("stage", STAGES[:2])
def test_zero_out_ends_with_exact_zeros(chain, stage):
    tensors = tiny.checkpoint_tensors(chain[stage][0] / LAST)
    weights = [
        v for k, v in tensors.items() if k.endswith("linear_qkv.weight") and not k.startswith(("optimizer", "chained"))
    ]
    assert weights
    rows = torch.cat([w.reshape(-1, tiny.MODEL["hidden_size"]) for w in weights]).view(-1, 8, tiny.MODEL["hidden_size"])
    heads = rows.view(-1, 4, 8, tiny.MODEL["hidden_size"])  # per group: 2 query heads, key, value, each of 8 channels
    assert (heads[:, :3, -1] == 0).all() == (stage == "zero_out")
    assert (heads[:, 3, -1] != 0).any() and (heads[:, :3, :-1] != 0).any()


# The stages' chain


def test_target_follows_from_stage_to_stage(data, chain, tmp_path):
    argv = tiny.command(
        data, "retrofit", train_iters=2, target_cr=4, init_from=chain["retrofit"][0], save=tmp_path / "r"
    )
    text = tiny.run(argv, tmp_path / "a").output()
    assert "CR 3.00 -> 4" in text and "(target 3.000)" in text and "(target 4.000)" in text
    argv = tiny.command(data, "finetune", train_iters=1, init_from=tmp_path / "r", save=tmp_path / "f")
    assert "(target 4.000)" in tiny.run(argv, tmp_path / "b").output()


def test_gathering_late_loses_no_step(data, chain, tmp_path):
    """A checkpoint has the last step's weights, which overlap_param_gather brings with the next forward pass."""
    for name, more in (("plain", {}), ("overlap", dict(overlap_grad_reduce=True, overlap_param_gather=True))):
        tiny.run(
            command(
                data,
                "zero_out",
                tmp_path / name,
                root_of(chain),
                use_distributed_optimizer=True,
                micro_batch_size=1,
                **more,
            ),
            tmp_path / "a",
            2,
        )
    for iteration in (INTERVAL, ITERATIONS):
        tiny.assert_same_checkpoint(*(tmp_path / name / f"iter_{iteration:07d}" for name in ("plain", "overlap")))


@pytest.mark.parametrize("before", [True, False], ids=["off", "on"])
def test_the_kind_of_optimizer_does_not_change(data, chain, tmp_path, before):
    """Megatron's two optimizers keep their state in different formats."""
    tiny.run(
        [
            *command(data, "zero_out", tmp_path / "s", root_of(chain), use_distributed_optimizer=before),
            "--exit-interval",
            "2",
        ],
        tmp_path / "a",
    )
    run = tiny.run(
        command(data, "zero_out", tmp_path / "s", root_of(chain), use_distributed_optimizer=not before),
        tmp_path / "b",
        status=2,
    )
    assert "error: parallel.use_distributed_optimizer is" in run.output() and names(tmp_path / "s")[0] == "iter_0000002"
