"""Processes that abort, are killed, hang or make no progress, under `srwm-rl train --supervise`."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from srwm_rl.storage.run_folder import Run

MODULE = """
import os
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
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=250, check=False)
        return done.returncode, done.stdout, done.stderr

    return run


def only_run(tmp_path: Path) -> Run:
    (path,) = (tmp_path / "logs" / "ppo_srwm").iterdir()
    return Run.open(path)


@pytest.mark.parametrize(
    ("fault", "why"), [("abort", "was ended by SIGABRT"), ("kill", "was ended by SIGKILL"), ("hang", "hung")]
)
def test_it_resumes_from_the_last_checkpoint(
    fault: str, why: str, supervised: Callable[..., Outcome], tmp_path: Path
) -> None:
    code, _, err = supervised(fault, "--hang-seconds", "5")
    assert code == 0, err
    assert f"the trainer {why} at 128 saved steps; restarting it" in err
    if fault == "hang":
        assert "no step has ended for" in err
        assert "Fragile-v0 is busy in environment 1, level " in err
        assert "in step" in err  # the stack of the thread that hangs
    assert only_run(tmp_path).files("model")[-1].name == "model-000000000640.safetensors"


def test_it_stops_after_restarts_without_progress(tmp_path: Path, recall_argv: list[str]) -> None:
    (tmp_path / "fragile.py").write_text(MODULE)
    argv = ["fragile:Fragile-v0" if word == "recall" else word for word in recall_argv]
    command = [sys.executable, "-m", "srwm_rl", "train", *argv, "--supervise", "-n", "640", "-f", str(tmp_path / "l")]
    command += ["--env-kwargs", "fault:start", "always:true"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=250, check=False)
    assert done.returncode == 1
    assert "3 starts in a row made no progress, stopping at 0 steps" in done.stderr


def test_a_signal_to_the_supervisor_stops_and_saves(tmp_path: Path, recall_argv: list[str]) -> None:
    command = [sys.executable, "-m", "srwm_rl", "train", *recall_argv, "--supervise", "-n", str(10**8)]
    process = subprocess.Popen([*command, "-f", str(tmp_path / "logs")], stderr=subprocess.PIPE, text=True)
    try:
        metrics = tmp_path / "logs" / "ppo_srwm" / "recall_1" / "metrics.jsonl"
        deadline = time.monotonic() + 600  # a hang, not a loaded machine
        while not (metrics.exists() and metrics.read_bytes().count(b"\n") >= 3):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "stopped by SIGTERM; saved at" in err


def test_wrong_input_is_not_retried(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "srwm_rl", "train", "--env", "coinrum", "--supervise", "-f", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "did you mean 'coinrun'" in done.stderr
    assert "restarting it" not in done.stderr
