#!/usr/bin/env python3
"""The scripts of examples/dmc/slurm on a real SLURM of two nodes (see cluster.py). Needs root; not among the other
tests.

    tests/slurm/run.py [--keep DIRECTORY] [retrofit | fault | batch ...]

retrofit: the three stages of a tiny model through retrofit.sh with two tasks, tensor parallel 2 and pipeline parallel
    2, once
undisturbed and once with a signal in the first stage, a requeue in the second and the time limit in the third: the same
checkpoints, bit for bit.
fault: what must stop: a stage whose predecessor is unfinished, and one that fails.
batch: an array of two elements with two engines each; an element is killed and queued again in the middle: each line
    has one
answer, the same as in one run without an array.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
for folder in (ROOT, ROOT / "tests", ROOT / "tests" / "slurm"):
    sys.path.insert(0, str(folder))

from cluster import Cluster, wait_for  # noqa: E402

SCRIPTS = ROOT / "examples" / "dmc" / "slurm"
STAGES = {"zero_out": 60, "retrofit": 80, "finetune": 60}  # steps


def say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)


class Retrofit:
    """Inputs in ``work``, and runs of retrofit.sh on them."""

    def __init__(self, cluster: Cluster, work: Path) -> None:
        from helpers import tiny

        self.cluster, self.work = cluster, work
        work.mkdir()
        tiny.make_data(work)
        (work / "config.json").write_text(
            json.dumps(
                {
                    "training": {
                        "micro_batch_size": 1,
                        "global_batch_size": 4,
                        "log_interval": 1,
                        "save_interval": 20,
                        "async_save": True,
                        "keep_checkpoints": 3,
                    },
                    "data": {"seq_length": tiny.SEQ},
                    "optimizer": {"lr": 1e-3},
                }
            )
        )
        self.env = {
            **cluster.env,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "PYTHON": sys.executable,
            "PYTHONWARNINGS": "ignore",
            "MASTER_ADDR": "127.0.0.1",
            "NPROC": "1",
            "CONFIG": str(work / "config.json"),
            "DATA": str(work / "train"),
            "TOKENIZER": str(work / "tokenizer.model"),
            "CHECKPOINT": str(work / "original"),
            "TARGET_CR": "2",
            "SBATCH_ARGS": "--nodes=2 --time=50 --mem=0",
        }
        subprocess.run(
            [
                sys.executable,
                "-m",
                "megatron.dmc.training.retrofit",
                *tiny.command(work / "", "pretrain", train_iters=4, save=work / "original"),
            ],
            env=self.env,
            check=True,
            stdout=subprocess.DEVNULL,
        )

    def submit(self, name: str, *flags: str) -> dict[str, str]:
        """Stage -> job."""
        env = {**self.env, "OUT": str(self.work / name)}
        for stage, steps in STAGES.items():
            env[f"{stage.upper()}_ARGS"] = f"--train-iters {steps}"
        result = subprocess.run([SCRIPTS / "retrofit.sh", *flags], env=env, text=True, capture_output=True)
        assert result.returncode == 0, result.stderr
        jobs = dict(re.findall(r"(\w+): job (\d+)", result.stdout))
        assert list(jobs) == list(STAGES), result.stdout
        return jobs

    def log(self, name: str, stage: str, job: str) -> str:
        file = self.work / name / f"{stage}-{job}.log"
        return file.read_text() if file.exists() else ""

    def wait_for_step(self, name: str, stage: str, job: str, step: int) -> None:
        def there() -> bool:
            assert self.cluster.state(job) in ("PENDING", "RUNNING", "CONFIGURING", "COMPLETING"), self.log(
                name, stage, job
            )
            return f"iteration {step:8d}/" in self.log(name, stage, job)

        wait_for(there, f"{stage}, step {step}", 400)

    def wait_for_end(self, name: str, stage: str, job: str, expected: str = "COMPLETED") -> None:
        queued: list[float] = []

        def ended() -> bool:
            state = self.cluster.state(job)
            if state == "PENDING" and self.cluster.field(job, "Restarts") not in ("", "0"):
                queued.append(time.monotonic())
                if (
                    queued[-1] - queued[0] > 15
                ):  # not at once: nodes refuse what looks like the start that was just ended
                    self.cluster.start_now(job)
            return state not in ("PENDING", "RUNNING", "CONFIGURING", "COMPLETING", "SUSPENDED", "REQUEUED")

        wait_for(ended, f"{stage}, job {job}", 500)
        assert self.cluster.state(job) == expected, (self.cluster.state(job), self.log(name, stage, job)[-4000:])

    def disturb(self, name: str, stage: str, job: str, how: str) -> None:
        """In the middle of a stage."""
        self.wait_for_step(name, stage, job, 11)
        if how == "signal":
            self.cluster.run("scancel", "--signal=USR1", job, check=True)
            expected = "signal 10"
        elif how == "requeue":
            self.cluster.run("scontrol", "requeue", job, check=True)
            expected = ""
        # Less than five minutes of --signal are left: SLURM, which looks every 30 s, sends it; the tiny stage waits.
        else:
            self.cluster.run("scancel", "--signal=STOP", job, check=True)
            self.cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=4", check=True)
            end = time.monotonic() + 50
            while time.monotonic() < end and self.cluster.field(job, "Restarts") != "1":
                time.sleep(1)
            if self.cluster.field(job, "Restarts") != "1":  # else SLURM has let it go on, for the signal
                self.cluster.run("scancel", "--signal=CONT", job)
            expected = "signal 10"
        wait_for(lambda: self.cluster.field(job, "Restarts") == "1", f"{stage}: {how}", 240)
        log = self.log(name, stage, job)
        steps = [int(n) for n in re.findall(r"iteration +(\d+)/", log)]
        assert steps[-1] < STAGES[stage], f"{stage} was through before {how} came"
        left = re.findall(r"leaving at iteration (\d+) of \d+: (.*); saved", log)
        assert left[-1][1] == expected if expected else True, left
        if how == "time":  # the next start shall have enough of it
            self.cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=50", check=True)
        say(f"  {stage}: {how} after step {steps[-1]}: {left[-1] if left else 'killed and queued again'}")


def retrofit(cluster: Cluster, work: Path) -> None:
    from helpers import tiny

    runs = Retrofit(cluster, work / "retrofit")
    for layout in ("tensor", "pipeline"):
        flags = [f"--{layout}-model-parallel-size", "2"]
        began = time.monotonic()
        for name in (f"{layout}-whole", f"{layout}-disturbed"):
            jobs = runs.submit(name, *flags)
            for (stage, job), how in zip(jobs.items(), ("signal", "requeue", "time")):
                if name.endswith("disturbed"):
                    runs.disturb(name, stage, job, how)
                runs.wait_for_end(name, stage, job)
                assert "finished" in runs.log(name, stage, job).splitlines()[-1]
            say(f"{name}: {', '.join(f'{stage} job {job}' for stage, job in jobs.items())}")
        for stage, steps in STAGES.items():
            last = f"iter_{steps:07d}"
            tiny.assert_same_checkpoint(
                *(runs.work / f"{layout}-{name}" / stage / last for name in ("whole", "disturbed"))
            )
        say(
            f"{layout} parallel 2: the disturbed run's checkpoints of all three stages equal the whole one's bit for "
            f"bit ({time.monotonic() - began:.0f} s)"
        )


def fault(cluster: Cluster, work: Path) -> None:
    runs = Retrofit(cluster, work / "fault")
    jobs = runs.submit("wrong", "--global-batch-size", "3", "--micro-batch-size", "2")
    runs.wait_for_end("wrong", "zero_out", jobs["zero_out"], "FAILED")
    assert "error: global_batch_size 3 is not divisible" in runs.log("wrong", "zero_out", jobs["zero_out"])
    for stage in ("retrofit", "finetune"):
        runs.wait_for_end("wrong", stage, jobs[stage], "CANCELLED")
    say("a stage that fails takes the rest with it")

    env = {**runs.env, "SAVE": str(runs.work / "half")}
    arguments = [
        "sbatch",
        "--parsable",
        "--nodes=1",
        "--mem=0",
        f"--output={runs.work}/%j.log",
        str(SCRIPTS / "retrofit.sbatch"),
        "--stage",
    ]

    def submit(*more: str, **variables: str) -> tuple[str, str]:
        result = subprocess.run(
            [*arguments, *more], env={**env, **variables}, text=True, capture_output=True, check=True
        )
        job = result.stdout.strip()
        wait_for(
            lambda: cluster.state(job) not in ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING"), f"job {job}", 200
        )
        return cluster.state(job), (runs.work / f"{job}.log").read_text()

    # --no-requeue: the unfinished stage says so in its status
    arguments.insert(1, "--no-requeue")
    state, log = submit("zero_out", "--train-iters", "6", "--exit-interval", "3", INIT_FROM=env["CHECKPOINT"])
    assert state == "FAILED" and "unfinished, and not queued again" in log, (state, log)
    state, log = submit(
        "retrofit", "--target-cr", "2", "--train-iters", "4", INIT_FROM=env["SAVE"], SAVE=env["SAVE"] + "-2"
    )
    assert state == "FAILED" and "refused: INIT_FROM" in log and "iteration 3 of 6" in log, (state, log)
    assert not Path(env["SAVE"] + "-2").exists()
    say("a stage whose predecessor is unfinished is refused")


def batch(cluster: Cluster, work: Path) -> None:
    from helpers.serving import make_model

    directory, lines = work / "batch", 300
    (directory / "bin").mkdir(parents=True)
    make_model(directory / "model")
    shim = directory / "bin" / "dmc"  # the package is not installed here
    shim.write_text(f'#!/bin/sh\nexec {sys.executable} -m megatron.dmc.cli "$@"\n')
    shim.chmod(0o755)
    body = {"prompt": "abc", "max_tokens": 20, "temperature": 1.0, "ignore_eos": True}
    requests = [{"custom_id": f"r{i}", "method": "POST", "url": "/v1/completions", "body": body} for i in range(lines)]
    (directory / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in requests))
    env = {
        **cluster.env,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "PATH": f"{shim.parent}:{os.environ['PATH']}",
        "MODEL": str(directory / "model"),
        "INPUT": str(directory / "in.jsonl"),
        "GPUS": "2",
    }
    options = ["--max-num-seqs", "2"]

    def answers(file: Path) -> dict[str, str]:
        found = [json.loads(line) for line in file.read_text().splitlines()]
        texts = {line["custom_id"]: line["response"]["body"]["choices"][0]["text"] for line in found}
        assert len(found) == len(texts) == lines, (len(found), len(texts))
        return texts

    output = directory / "out.jsonl"
    command = ["sbatch", "--parsable", "--array=0-1", "--mem=0", "--time=30", f"--output={directory}/%A_%a.log"]
    job = subprocess.run(
        [*command, str(SCRIPTS / "batch.sbatch"), *options],
        env={**env, "OUTPUT": str(output)},
        check=True,
        text=True,
        capture_output=True,
    ).stdout.strip()
    part = Path(f"{output}.part-00000-of-00004")
    wait_for(lambda: part.exists() and part.read_text().count("\n") >= 10, "ten answers", 500)
    cluster.run("scontrol", "requeue", f"{job}_0", check=True)
    before = part.read_text().count("\n")
    assert before < lines / 4, "the element was through before it was killed"
    time.sleep(20)  # nodes refuse what looks like the start that was just ended
    cluster.start_now(f"{job}_0")
    logs = lambda: "".join(file.read_text() for file in sorted(directory.glob("*.log")))  # noqa: E731
    try:
        wait_for(output.exists, "all answers", 400)
    except TimeoutError:
        raise AssertionError(logs()[-4000:]) from None
    kept = [int(count) for count in re.findall(r"(\d+) were there before", logs())]
    assert max(kept) >= before, (kept, before)
    alone = ["dmc", "batch", "--model", env["MODEL"], "-i", env["INPUT"], "-o", str(directory / "one.jsonl"), *options]
    subprocess.run(alone, env=env, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    assert answers(output) == answers(directory / "one.jsonl")
    say(
        f"batch: element 0 was killed with {before} answers and queued again; {lines} lines, each answered once, as in "
        "one run"
    )
    command[2] = "--array=0-0"
    subprocess.run(
        [*command, str(SCRIPTS / "batch.sbatch"), *options],
        check=True,
        stdout=subprocess.DEVNULL,
        env={**env, "TP": "2", "OUTPUT": str(directory / "tp.jsonl")},
    )
    try:
        wait_for((directory / "tp.jsonl").exists, "the answers of one engine on two ranks", 400)
    except TimeoutError:
        raise AssertionError(logs()[-4000:]) from None
    answers(directory / "tp.jsonl")
    say(f"batch: an engine of two ranks; {lines} lines, each answered once")


PARTS = {"fault": fault, "batch": batch, "retrofit": retrofit}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=Path, metavar="DIRECTORY", help="for all files; it must not exist")
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="default: all")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        directory = (args.keep or Path(temporary) / "work").absolute()
        directory.mkdir(parents=True)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # through Cluster's end
        with Cluster(directory / "cluster") as cluster:
            say(cluster.run("sinfo", "--version"))
            for part in args.parts or PARTS:
                PARTS[part](cluster, directory)
    say("all as it should be")
    return 0


if __name__ == "__main__":
    sys.exit(main())
