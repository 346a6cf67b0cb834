"""examples/dmc/slurm with stand-ins for SLURM's commands, which write down how they were called. A real one:
tests/slurm/run.py.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.processes import PATIENCE

from megatron.dmc.training import host_monitor

SCRIPTS = Path(__file__).resolve().parent.parent.parent / "examples" / "dmc" / "slurm"
JOBS = sorted(SCRIPTS.glob("*.sbatch"))
REQUIRED = {
    "retrofit.sbatch": ("CONFIG", "DATA", "TOKENIZER", "SAVE"),
    "retrofit.sh": ("CONFIG", "DATA", "TOKENIZER", "CHECKPOINT", "OUT", "TARGET_CR"),
    "convert.sbatch": ("ACTION", "FROM", "TO"),
    "serve.sbatch": ("MODEL",),
    "batch.sbatch": ("MODEL", "INPUT", "OUTPUT"),
}
BASE = {
    "SLURM_JOB_ID": "77",
    "SLURM_NNODES": "2",
    "SLURM_JOB_NODELIST": "n[1-2]",
    "SLURM_SUBMIT_DIR": "/somewhere",
    "SLURM_ARRAY_JOB_ID": "70",
    "SLURM_ARRAY_TASK_ID": "1",
    "SLURM_ARRAY_TASK_COUNT": "3",
    "SLURM_ARRAY_TASK_MIN": "0",
    "SLURM_ARRAY_TASK_MAX": "2",
    "NPROC": "8",
}


class Stand:
    """A directory of stand-ins. ``statuses``: what srun returns, by a part of its command."""

    def __init__(self, directory: Path) -> None:
        self.calls_file, self.directory, self.statuses = directory / "calls", directory, {}
        (directory / "bin").mkdir()
        self.command("sbatch", 'n=$(($(cat number 2>/dev/null || echo 100) + 1)); echo $n >number; echo "$n;cluster"')
        self.command("scontrol", 'if [ "$1" = show ]; then printf "n1\\nn2\\n"; fi')
        self.command("squeue", "date -d '+1 hour' +%FT%T")
        self.command("sleep", "true")

    def command(self, name: str, text: str) -> None:
        file = self.directory / "bin" / name
        save = 'printf "SAVE=%s INIT_FROM=%s END=%s\\n" "$SAVE" "$INIT_FROM" "$SLURM_JOB_END_TIME" >>calls'
        record = f'cd {self.directory}\nprintf "%s|" {name} "$@" >>calls\n{save}\n'
        file.write_text(f"#!/bin/bash\n{record}{text}\n")
        file.chmod(0o755)

    def run(self, script: str, *args: str, **variables: str) -> subprocess.CompletedProcess:
        cases = "\n".join(f'*"{part}"*) {text};;' for part, text in self.statuses.items())
        self.command("srun", f'case "$*" in\n{cases}\nesac')
        self.calls_file.unlink(missing_ok=True)
        env = {"PATH": f"{self.directory / 'bin'}:{os.environ['PATH']}", **BASE, **variables}
        command = ["bash", SCRIPTS / script, *args]
        return subprocess.run(command, env=env, text=True, capture_output=True, timeout=PATIENCE)

    def calls(self, name: str) -> list[list[str]]:
        lines = self.calls_file.read_text().splitlines() if self.calls_file.exists() else []
        return [line.split("|") for line in lines if line.startswith(name + "|")]


@pytest.fixture
def stand(tmp_path):
    return Stand(tmp_path)


@pytest.fixture
def inputs(tmp_path):
    names = {"CONFIG": "c.yaml", "TOKENIZER": "t.model", "CHECKPOINT": "original"}
    for name in names.values():
        (tmp_path / name).touch()
    return {
        **{key: str(tmp_path / name) for key, name in names.items()},
        "DATA": "0.3 a 0.7 b",
        "OUT": str(tmp_path / "out"),
        "TARGET_CR": "4",
    }


@pytest.mark.parametrize("script, name", [(script, name) for script, names in REQUIRED.items() for name in names])
def test_a_missing_variable_is_named_before_anything_runs(stand, script, name):
    given = {other: "x" for other in REQUIRED[script] if other != name}
    result = stand.run(script, **given)
    assert result.returncode != 0 and re.search(rf"{name}: set it to ", result.stderr), result.stderr
    assert not stand.calls_file.exists()


@pytest.mark.parametrize("script", JOBS, ids=lambda path: path.name)
def test_jobs_can_be_queued_again_and_name_no_cluster(script):
    text = script.read_text()
    options = re.findall(r"^#SBATCH --([\w-]+)", text, re.MULTILINE)
    assert {"requeue", "open-mode", "output"} <= set(options)
    assert ("signal" in options) == (script.name != "convert.sbatch")
    assert not {"account", "partition", "qos", "constraint", "gres", "gpus", "gpus-per-node", "time", "mem"} & set(
        options
    )
    assert not re.search(r"(KEY|TOKEN|SECRET|PASSWORD)=\S*[A-Za-z0-9]{8}", text)


def test_stages_wait_for_one_another(stand, inputs):
    result = stand.run(
        "retrofit.sh", "--async-save", SBATCH_ARGS="--nodes=4 --time=60", RETROFIT_ARGS="--seed 2", **inputs
    )
    assert result.returncode == 0, result.stderr
    jobs, out = stand.calls("sbatch"), inputs["OUT"]
    assert [job[-1].split(" END")[0] for job in jobs] == [
        f"SAVE={out}/zero_out INIT_FROM={inputs['CHECKPOINT']}",
        f"SAVE={out}/retrofit INIT_FROM={out}/zero_out",
        f"SAVE={out}/finetune INIT_FROM={out}/retrofit",
    ]
    assert [[word for word in job if "depend" in word or "invalid" in word] for job in jobs] == [
        [],
        ["--dependency=afterok:101", "--kill-on-invalid-dep=yes"],
        ["--dependency=afterok:102", "--kill-on-invalid-dep=yes"],
    ]
    assert all({"--nodes=4", "--time=60", "--async-save"} <= set(job) for job in jobs)
    tails = [job[job.index("--stage") : -1] for job in jobs]
    assert tails == [
        ["--stage", "zero_out", "--async-save"],
        ["--stage", "retrofit", "--target-cr", "4", "--async-save", "--seed", "2"],
        ["--stage", "finetune", "--async-save", "--lr-decay-style", "cosine", "--min-lr", "3e-6"],
    ]
    assert re.findall(r"(\w+): job (\d+), log", result.stdout) == [
        ("zero_out", "101"),
        ("retrofit", "102"),
        ("finetune", "103"),
    ]


def test_an_input_that_is_not_there_submits_nothing(stand, inputs):
    Path(inputs["CHECKPOINT"]).unlink()
    result = stand.run("retrofit.sh", **inputs)
    assert result.returncode == 2 and "original does not exist" in result.stderr and not stand.calls("sbatch")


STAGE = {"CONFIG": "c", "DATA": "1 a", "TOKENIZER": "t", "SAVE": "here", "INIT_FROM": "before"}


@pytest.mark.parametrize(
    "statuses, status, says, requeued",
    [
        ({}, 0, "finished", False),
        ({"manifest here": "exit 1"}, 75, "unfinished: queued again", True),
        ({"manifest here": "exit 2"}, 75, "not queued again", False),
        ({"manifest before": "exit 1"}, 2, "refused: INIT_FROM before is not a finished stage", False),
        ({"torch.distributed.run": "exit 9"}, 9, "training ended with status 9", False),
    ],
    ids=["finished", "unfinished", "damaged", "predecessor-unfinished", "fault"],
)
def test_a_stage_is_queued_again_when_it_has_only_been_stopped(stand, statuses, status, says, requeued):
    stand.statuses = statuses
    result = stand.run(
        "retrofit.sbatch",
        "--stage",
        "retrofit",
        SRUN_ARGS="--container-image=i",
        CONTAINER="apptainer exec x.sif",
        **STAGE,
    )
    assert result.returncode == status and says in result.stdout + result.stderr, result
    assert ([c[1:3] for c in stand.calls("scontrol") if c[1] == "requeue"] == [["requeue", "77"]]) == requeued
    training = [call for call in stand.calls("srun") if any("torch.distributed.run" in word for word in call)]
    assert len(training) == (0 if status == 2 else 1)
    for call in stand.calls("srun"):
        assert "--container-image=i" in call and call[call.index("apptainer") :][:3] == ["apptainer", "exec", "x.sif"]
    for call in training:
        words = call[call.index("python") :]
        assert words[1:4] == ["--nproc-per-node=8", "--master-addr=n1", "--master-port=20077"]
        assert (
            words[words.index("--data-path") + 1 :][:2] == ["1", "a"]
            and words[words.index("--init-from") + 1] == "before"
        )
        assert re.search(r"END=\d{10}$", call[-1])  # asked of squeue where SLURM does not say


def test_all_processes_get_cpus_and_a_port_that_no_connection_has(stand):
    """task/affinity gives a task one CPU, and eight trainers would share it; Linux connects from 32768 on."""
    few = stand.run("retrofit.sbatch", "--stage", "retrofit", SLURM_CPUS_ON_NODE="1", **STAGE)
    assert few.returncode == 2 and "refused: 8 processes on 1 CPUs of a node; ask sbatch for --exclusive" in few.stderr
    for job in ("19999", "31999", "77777777"):
        variables = {**STAGE, "SLURM_JOB_ID": job, "SLURM_CPUS_ON_NODE": "8", "SLURM_CPUS_PER_TASK": "8"}
        result = stand.run("retrofit.sbatch", "--stage", "retrofit", **variables)
        (port,) = {int(n) for n in re.findall(r"n1:(\d+)", result.stdout)}
        assert 20000 <= port < 32768, result
    for script in JOBS:
        text = script.read_text()
        assert "export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK" in text and "% 20000" not in text, script
        (head,) = re.findall(r"#.*sbatch .*--gpus-per-node=\d+ .*" + re.escape(script.name), text)[:1] or [""]
        assert "--exclusive" in head or "--cpus-per-task" in head or script.name == "convert.sbatch"


def test_a_stage_that_lost_a_host_is_queued_again(stand, tmp_path):
    stand.statuses = {"torch.distributed.run": "exit 1"}
    for lost in (False, True):
        if lost:
            (tmp_path / host_monitor.LOST_HOST_FILE).touch()
        result = stand.run("retrofit.sbatch", "--stage", "retrofit", **{**STAGE, "SAVE": str(tmp_path)})
        assert result.returncode == 1 and ("a host was lost: queued again" in result.stdout) == lost, result
        assert any(call[1] == "requeue" for call in stand.calls("scontrol")) == lost


def test_the_last_element_of_a_batch_merges(stand, tmp_path):
    output = tmp_path / "answers.jsonl"
    given = {"MODEL": "m", "INPUT": "in", "OUTPUT": str(output)}
    for index in (1, 0, 2):
        part = Path(f"{output}.part-{index:05d}-of-00003")
        part.write_text(f"answer {index}\n")
        result = stand.run("batch.sbatch", **{**given, "SLURM_ARRAY_TASK_ID": str(index)})
        assert result.returncode == 0, result.stderr
        assert output.exists() == (index == 2)
    assert output.read_text() == "answer 0\nanswer 1\nanswer 2\n"
    stand.statuses = {"dmc batch": "exit 75"}
    result = stand.run("batch.sbatch", **given)
    assert result.returncode == 75 and [c[1:3] for c in stand.calls("scontrol")] == [["requeue", "70_1"]]
    stand.statuses = {"dmc batch": "exit 1"}
    assert stand.run("batch.sbatch", **given).returncode == 1 and not stand.calls("scontrol")
    assert stand.run("batch.sbatch", **given, SLURM_ARRAY_TASK_MIN="1").returncode == 2


def batch_of_engines(stand, tmp_path, **variables):
    """(script's result, dmc's calls by shard):
    the srun stand-in runs the launcher, dmc writes down how it was started.
    """
    stand.command(
        "dmc",
        f'echo "$CUDA_VISIBLE_DEVICES ${{RANK-}}/${{WORLD_SIZE-}} ${{MASTER_PORT-}} $*" >>started\n'
        f'for w; do case "$w" in *.part-*) o=$w;; [0-9]*/*) s=$w;; esac; done\n'
        f'{variables.pop("does", "true")}\necho "answer $s" >"$o"',
    )
    stand.statuses = {"dmc batch": 'exec "$@"'}
    (tmp_path / "started").unlink(missing_ok=True)
    result = stand.run(
        "batch.sbatch", "--max-num-seqs", "2", MODEL="m", INPUT="in", OUTPUT=str(tmp_path / "answers"), **variables
    )
    started = (tmp_path / "started").read_text().splitlines() if (tmp_path / "started").exists() else []
    return result, sorted((re.search(r"--shard (\S+)", line)[1], *line.split()[:3]) for line in started)


def test_an_element_uses_all_of_its_gpus(stand, tmp_path):
    given = dict(SLURM_GPUS_ON_NODE="4", CUDA_VISIBLE_DEVICES="4,5,6,7")
    result, started = batch_of_engines(stand, tmp_path, **given, SLURM_ARRAY_TASK_ID="1")
    assert result.returncode == 0, result.stderr
    assert [(shard, gpus) for shard, gpus, *_ in started] == [
        ("4/12", "4"),
        ("5/12", "5"),
        ("6/12", "6"),
        ("7/12", "7"),
    ]
    assert "element 0 is not done yet" in result.stdout and not (tmp_path / "answers").exists()
    for index in "20":
        result, _ = batch_of_engines(stand, tmp_path, **given, SLURM_ARRAY_TASK_ID=index)
        assert result.returncode == 0, result.stderr
    assert (tmp_path / "answers").read_text() == "".join(f"answer {i}/12\n" for i in range(12))


def test_engines_of_several_gpus(stand, tmp_path):
    result, started = batch_of_engines(stand, tmp_path, TP="2", SLURM_GPUS_ON_NODE="4", CUDA_VISIBLE_DEVICES="a,b,c,d")
    assert result.returncode == 0, result.stderr
    ports = [port for *_, port in started]
    assert [row[:3] for row in started] == [
        ("2/6", "a,b", "0/2"),
        ("2/6", "a,b", "1/2"),
        ("3/6", "c,d", "0/2"),
        ("3/6", "c,d", "1/2"),
    ]
    assert ports[0] == ports[1] != ports[2] == ports[3]
    result, started = batch_of_engines(stand, tmp_path, TP="3", SLURM_GPUS_ON_NODE="4")
    assert result.returncode == 2 and "an element has 4 GPUs" in result.stderr and not started


@pytest.mark.parametrize(
    "does, status",
    [
        ('[ "$s" != 3/6 ] || exit 75', 75),
        ('[ "$s" != 3/6 ] || exit 2; exit 75', 2),
        ('[ "$s $RANK" != "3/6 1" ] || exit 3; [ "$s" != 3/6 ] || exec /bin/sleep 20', 3),
    ],
    ids=["stopped", "fault", "a-rank-fails"],
)
def test_an_engine_that_does_not_end_well_decides(stand, tmp_path, does, status):
    """One that was stopped has the element queued again; a fault does not; the ranks of one that has failed do not wait
    for it.
    """
    result, _ = batch_of_engines(stand, tmp_path, TP="2", SLURM_GPUS_ON_NODE="4", does=does)
    assert result.returncode == status, result
    assert any(call[1] == "requeue" for call in stand.calls("scontrol")) == (status == 75)
    assert not list(tmp_path.glob("*.done"))


def test_the_launcher_outlives_the_signal_of_its_engines(stand, tmp_path):
    """SLURM signals all processes of a step."""
    (tmp_path / "all.py").write_text("""if True:
        import os, pathlib, signal
        signal.signal(signal.SIGUSR1, lambda *_: os._exit(75))
        shell = os.getppid()
        launcher = int(pathlib.Path(f"/proc/{shell}/stat").read_text().split()[3])
        for process in (launcher, shell, os.getpid()):
            os.kill(process, signal.SIGUSR1)
        signal.pause()
    """)
    does = f"exec {sys.executable} {tmp_path}/all.py"
    result, _ = batch_of_engines(stand, tmp_path, SLURM_GPUS_ON_NODE="1", does=does)
    assert result.returncode == 75, result


def test_the_server_wants_a_key(stand):
    assert "set DMC_API_KEY or KEYS" in stand.run("serve.sbatch", MODEL="m").stderr and not stand.calls("srun")
    assert stand.run("serve.sbatch", MODEL="m", DMC_API_KEY="secret").returncode == 0
    assert not any("secret" in word for call in stand.calls("srun") for word in call)


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck():
    subprocess.run(["shellcheck", "--severity=style", *JOBS, SCRIPTS / "retrofit.sh"], check=True)
