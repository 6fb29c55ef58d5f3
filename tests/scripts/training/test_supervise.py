"""Processes that abort, are killed, stopped, hang, cannot write or make no progress, under `train --supervise`."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from srwm_rl.scripts.training.resume import FREE
from srwm_rl.scripts.training.supervise import OF_THE_FIRST, AwakeTimer, _resume_arguments
from srwm_rl.storage.run_folder import Run


def test_a_restart_keeps_the_options_that_no_run_stores(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "recall", {"train": {"core": "srwm", "env": "recall", "wrapper": []}})
    given = ["--on-nan", "skip", "--eval-freq=100", "--track", "wandb", "--save_freq", "7", "--no-progress"]
    others = ["--resume", "x", "-n", "512", "--supervise", "--profile", "--override", "--learning-rate", "0.5"]
    assert _resume_arguments([*others, *given], run) == ["--resume", str(run.path), *given]
    assert OF_THE_FIRST <= FREE


MODULE = """
import os
import resource
import signal
import time
from pathlib import Path

import gymnasium
import numpy as np

MARK = Path(__file__).with_name("mark")

class Fragile(gymnasium.Env):
    observation_space = gymnasium.spaces.Box(-1, 1, (2,), np.float32)
    action_space = gymnasium.spaces.Discrete(2)
    total = 0

    def __init__(self, fault, always=False):
        self.fault, self.always = fault, always

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return np.zeros(2, np.float32), {}

    def step(self, action):
        self.t += 1
        Fragile.total += 1
        if Fragile.total == 150 and (self.always or not MARK.exists()):  # in the third update of 64 steps
            MARK.touch()
            if self.fault == "abort":
                os.abort()
            elif self.fault == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            elif self.fault == "hang":
                time.sleep(1000)
            elif self.fault == "full":  # until the process ends
                resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
        elif self.always and self.fault == "start":
            os.abort()
        return np.ones(2, np.float32), 1.0, self.t == 7, False, {}

gymnasium.register("Fragile-v0", entry_point=Fragile)
"""

Outcome = tuple[int, str, str]


@pytest.fixture
def supervised(tmp_path: Path, recall_argv: list[str]) -> Callable[..., Outcome]:
    """Return a function that trains under supervision, in a process whose environment has a fault."""
    (tmp_path / "fragile.py").write_text(MODULE)
    argv = ["fragile:Fragile-v0" if word == "recall" else word for word in recall_argv]

    def run(fault: str, *more: str) -> Outcome:
        command = [sys.executable, "-m", "srwm_rl", "train", *argv, "--supervise", "--save-freq", "64", "-n", "640"]
        command += ["-f", str(tmp_path / "logs"), *more, "--env-kwargs", f"fault:{fault}"]
        environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600, check=False)
        return done.returncode, done.stdout, done.stderr

    return run


def wait_for_rows(metrics: Path, n: int, process: "subprocess.Popen[str]") -> None:
    deadline = time.monotonic() + 600  # a hang, not a loaded machine
    while not (metrics.exists() and metrics.read_bytes().count(b"\n") >= n):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def only_run(tmp_path: Path) -> Run:
    (path,) = (tmp_path / "logs" / "ppo_srwm").iterdir()
    return Run.open(path)


@pytest.mark.parametrize(
    ("fault", "why"), [("abort", "was ended by SIGABRT"), ("kill", "was ended by SIGKILL"), ("hang", "hung")]
)
def test_it_resumes_from_the_last_checkpoint(
    fault: str, why: str, supervised: Callable[..., Outcome], tmp_path: Path
) -> None:
    # A slow start is no hang: where none is tested there is no limit, and else one that a loaded machine keeps.
    code, _, err = supervised(fault, "--hang-seconds", "20" if fault == "hang" else "0")
    assert code == 0, err
    assert f"the trainer {why} at 128 saved steps; restarting it" in err
    if fault == "hang":
        assert "no step has ended for" in err
        assert "Fragile-v0 is busy in environment 1, level " in err
        assert "in step" in err  # the stack of the thread that hangs
    assert only_run(tmp_path).files("model")[-1].name == "model-000000000640.safetensors"


def test_it_starts_again_once_files_can_be_written(supervised: Callable[..., Outcome], tmp_path: Path) -> None:
    code, out, err = supervised("full")
    assert code == 0, err
    assert "checkpoint-000000000192.safetensors (File too large); the older files stay, and it is tried again" in err
    assert "trained, but the end could not be saved (see above): the run is saved at 128 steps" in err
    assert "the trainer could not write its files at 128 saved steps; restarting it" in err
    assert out.count("done: 640 steps") == 1
    run = only_run(tmp_path)
    assert run.files("checkpoint")[-1].name == "checkpoint-000000000640.safetensors"
    rows = [json.loads(line) for line in (run.path / "metrics.jsonl").read_bytes().splitlines()]
    assert [row["step"] for row in rows] == list(range(64, 704, 64))


@pytest.mark.parametrize("stopped", ["both", "trainer"])
def test_time_in_which_it_is_stopped_is_no_hang(stopped: str, recall_argv: list[str], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "srwm_rl", "train", *recall_argv, "--supervise", "--hang-seconds", "2"]
    process = subprocess.Popen(
        [*command, "-n", str(10**8), "-f", str(tmp_path / "logs")], stderr=subprocess.PIPE, text=True
    )
    try:
        metrics = tmp_path / "logs" / "ppo_srwm" / "recall_1" / "metrics.jsonl"
        wait_for_rows(metrics, 3, process)
        (trainer,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        for pid in [int(trainer), *([process.pid] if stopped == "both" else [])]:
            os.kill(pid, signal.SIGSTOP)
        time.sleep(6)  # three times what a hang may take
        for pid in (process.pid, int(trainer)):
            os.kill(pid, signal.SIGCONT)
        wait_for_rows(metrics, metrics.read_bytes().count(b"\n") + 50, process)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=600)
    finally:
        process.kill()
    assert process.returncode == 130
    assert [line for line in err.splitlines() if line.startswith("srwm-rl: ")] == err.splitlines()[-1:]
    assert "stopped by SIGTERM; saved at" in err


@pytest.mark.parametrize(("number", "name"), [(signal.SIGTERM, "SIGTERM"), (signal.SIGINT, "SIGINT")])
def test_a_signal_while_the_trainer_starts_is_no_crash(
    number: int, name: str, recall_argv: list[str], tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "srwm_rl", "train", *recall_argv, "--supervise", "-n", str(10**8)]
    process = subprocess.Popen(
        [*command, "-f", str(tmp_path / "logs")], stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    children, deadline = Path(f"/proc/{process.pid}/task/{process.pid}/children"), time.monotonic() + 600
    try:
        while not children.read_text():
            assert time.monotonic() < deadline
        if number == signal.SIGINT:
            os.killpg(process.pid, number)  # as a terminal does
        else:
            process.send_signal(number)
        _, err = process.communicate(timeout=600)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "restarting" not in err
    assert "Traceback" not in err


def test_only_time_awake_counts() -> None:
    times = iter([0.0, 1.0, 2.0, 102.0, 103.0, 104.0])
    timer = AwakeTimer(longest_tick=2.0, clock=lambda: next(times))
    assert [timer.tick() for _ in range(4)] == [1.0, 2.0, 4.0, 5.0]
    timer.restart()
    assert timer.tick() == 1.0


def test_it_stops_after_restarts_without_progress(tmp_path: Path, recall_argv: list[str]) -> None:
    (tmp_path / "fragile.py").write_text(MODULE)
    argv = ["fragile:Fragile-v0" if word == "recall" else word for word in recall_argv]
    command = [sys.executable, "-m", "srwm_rl", "train", *argv, "--supervise", "-n", "640", "-f", str(tmp_path / "l")]
    command += ["--env-kwargs", "fault:start", "always:true"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600, check=False)
    assert done.returncode == 1
    assert "3 starts in a row made no progress, stopping at 0 steps" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])  # a terminal sends a SIGINT to both
def test_a_signal_to_the_supervisor_stops_and_saves(
    number: signal.Signals, tmp_path: Path, recall_argv: list[str]
) -> None:
    command = [sys.executable, "-m", "srwm_rl", "train", *recall_argv, "--supervise", "-n", str(10**8)]
    process = subprocess.Popen([*command, "-f", str(tmp_path / "logs")], stderr=subprocess.PIPE, text=True)
    try:
        metrics = tmp_path / "logs" / "ppo_srwm" / "recall_1" / "metrics.jsonl"
        wait_for_rows(metrics, 3, process)
        process.send_signal(number)
        _, err = process.communicate(timeout=600)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "stopped by SIGTERM; saved at" in err


def test_nohup_holds_for_the_trainer_too(tmp_path: Path, recall_argv: list[str]) -> None:
    command = ["nohup", sys.executable, "-m", "srwm_rl", "train", *recall_argv, "--supervise", "-n", "6400"]
    process = subprocess.Popen(
        [*command, "-f", str(tmp_path / "logs")], stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        wait_for_rows(tmp_path / "logs" / "ppo_srwm" / "recall_1" / "metrics.jsonl", 3, process)
        os.killpg(process.pid, signal.SIGHUP)  # as a terminal that is closed does
        _, err = process.communicate(timeout=600)
    finally:
        process.kill()
    assert process.returncode == 0, err
    assert only_run(tmp_path).files("model")[-1].name == "model-000000006400.safetensors"


def test_wrong_input_is_not_retried(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "srwm_rl", "train", "--env", "coinrum", "--supervise", "-f", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "did you mean 'coinrun'" in done.stderr
    assert "restarting it" not in done.stderr
