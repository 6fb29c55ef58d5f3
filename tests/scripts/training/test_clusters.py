"""docs/clusters.md: its commands parse, and its SLURM script trains on two machines and resumes when requeued."""

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from srwm_rl.scripts.cli import parse
from srwm_rl.scripts.config.settings import TrainConfig
from srwm_rl.storage.run_folder import Run
from srwm_rl.storage.safe_file import read_file
from tests.scripts.commands.test_train import updates, wait_until

PAGE = (Path(__file__).parents[3] / "docs" / "clusters.md").read_text()
TINY = "--env recall -n 10000000 --n-envs 8 --n-steps 16 --batch-size 64 --n-threads 1 --device cpu"
# SLURM's commands simulated: two machines that are both this one.
SCONTROL = "#!/bin/bash\nprintf 'localhost\\nlocalhost\\n'\n"
SRUN = f"""#!{sys.executable}
import os, pathlib, signal, subprocess, sys
words = [*sys.argv[1:]]
while words[0].startswith("--"):
    del words[0]
tasks = [subprocess.Popen(words) for _ in range(int(os.environ["SLURM_NNODES"]))]
signal.signal(signal.SIGTERM, lambda *_: [task.terminate() for task in tasks])
pathlib.Path(os.environ["SRUN_IS"]).write_text(str(os.getpid()))
sys.exit(max(abs(task.wait()) for task in tasks))
"""
Submit = Callable[[int], "subprocess.Popen[str]"]


def test_the_commands_parse() -> None:
    commands = re.findall(r"-m srwm_rl train (--env.*)", PAGE.replace("\\\n", ""))
    assert len(commands) == 3
    for command in commands:
        assert parse(TrainConfig, command.split(), "srwm-rl train").n_envs % 8 == 0


def script(folder: Path) -> str:
    """Return the page's script for a small agent on this machine's processor."""
    (text,) = re.findall(r"```sh\n(#!/bin/bash\n.*?)```", PAGE, re.DOTALL)
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    replaced = {
        "--env coinrun -n 200000000 --n-envs 512 --batch-size 16384": TINY,
        "coinrun_1": "recall_1",
        "/shared/logs": str(folder),
        "--nproc-per-node 4": "--nproc-per-node 1",
        ":29500": f":{port}",
    }
    for old, new in replaced.items():
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return str(text)


@pytest.fixture
def submit(tmp_path: Path) -> Iterator[Submit]:
    """Return a function that runs the script as SLURM would, in the same job after `restarts` restarts."""
    (tmp_path / "bin").mkdir()
    for name, text in {"scontrol": SCONTROL, "srun": SRUN, "job": script(tmp_path)}.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    path = os.pathsep.join((str(tmp_path / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]))
    slurm = {"SLURM_JOB_ID": "7", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "two", "SRUN_IS": str(tmp_path / "srun")}
    started = []

    def run(restarts: int) -> "subprocess.Popen[str]":
        (tmp_path / "srun").unlink(missing_ok=True)
        count = {"SLURM_RESTART_COUNT": str(restarts)} if restarts else {}  # which SLURM sets from the first restart on
        started.append(
            subprocess.Popen(
                [tmp_path / "bin" / "job"],
                env={**os.environ, **slurm, **count, "PATH": path},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
        )
        return started[-1]

    yield run
    for job in started:
        with suppress(ProcessLookupError):
            os.killpg(job.pid, signal.SIGTERM)  # the script, srun and torchrun, which ends its workers
        job.communicate(timeout=600)


def children(pid: int) -> list[int]:
    return [
        int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()
    ]


def machine_of(rank: int, folder: Path) -> list[int]:
    """Return the process ids of a task of srun and of its process, which has this rank."""
    for task in children(int((folder / "srun").read_text())):
        for process in children(task):
            if f"RANK={rank}" in Path(f"/proc/{process}/environ").read_text().split("\0"):
                return [task, process]
    raise AssertionError(f"no process has rank {rank}")


def warn(folder: Path) -> None:
    """Send SIGTERM to the tasks and not to the script, as SLURM does with `--signal=TERM@120`."""
    os.kill(int((folder / "srun").read_text()), signal.SIGTERM)


def test_the_slurm_script_trains_on_two_machines_and_resumes_when_requeued(submit: Submit, tmp_path: Path) -> None:
    run, steps = tmp_path / "7" / "ppo_srwm" / "recall_1", [0]
    for restarts in range(2):
        before = updates(run)
        job = submit(restarts)
        wait_until(lambda before=before: updates(run) >= before + 3, job)  # type: ignore[misc]
        warn(tmp_path)
        out, err = job.communicate(timeout=600)
        assert job.returncode != 0
        (line,) = [line for line in err.splitlines() if line.startswith("srwm-rl: ")]  # no warning that it is not exact
        steps.append(int(line.partition("saved at ")[2].split()[0]))
        assert line.endswith(
            "Resume with: torchrun --nnodes 2 --rdzv-backend c10d --rdzv-endpoint HOST:PORT --nproc-per-node 1 "
            f"-m srwm_rl train --resume {run}"
        )
        assert out.count("2 processes, 4 environments each") == 1
        state = read_file(Run.open(run).files("checkpoint")[-1])[1]["state"]
        assert state["counters"]["num_timesteps"] == steps[-1]
        assert len(state["processes"]) == 1  # process 1's part
    assert 0 < steps[1] < steps[2]
    assert [path.name for path in run.parent.iterdir()] == ["recall_1"]


def test_a_lost_machine_ends_the_job_and_the_run_is_saved(submit: Submit, tmp_path: Path) -> None:
    run = tmp_path / "7" / "ppo_srwm" / "recall_1"
    job = submit(0)
    wait_until(lambda: updates(run) >= 3, job)
    for pid in machine_of(1, tmp_path):
        os.kill(pid, signal.SIGKILL)
    _, err = job.communicate(timeout=600)
    assert job.returncode != 0
    (line,) = [line for line in err.splitlines() if line.startswith("srwm-rl: ")]
    assert "another process of this run has ended" in line
    state = read_file(Run.open(run).files("checkpoint")[-1])[1]["state"]
    assert f"saved at {state['counters']['num_timesteps']} steps" in line
