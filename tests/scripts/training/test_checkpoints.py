"""Runs whose disk is full, or whose folder is moved, deleted or replaced while they train; what cannot be saved."""

import json
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from srwm_rl import load
from srwm_rl.storage.run_folder import Run, steps_of

MODULE = """
import os
import resource
import shutil
from pathlib import Path

import gymnasium
import numpy as np

MARK = Path(__file__).with_name("mark")

class Saboteur(gymnasium.Env):
    observation_space = gymnasium.spaces.Box(-1, 1, (2,), np.float32)
    action_space = gymnasium.spaces.Discrete(2)
    total = 0

    def __init__(self, fault, logs):
        self.fault, self.logs = fault, Path(logs)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return np.zeros(2, np.float32), {}

    def step(self, action):
        self.t += 1
        Saboteur.total += 1
        if Saboteur.total == 150 and not MARK.exists():  # in the third update of 64 steps
            MARK.touch()
            self.act()
        if Saboteur.total == 400 and self.fault == "full for a while":
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        return np.ones(2, np.float32), 1.0, self.t == 7, False, {}

    def act(self):
        (run,) = self.logs.glob("*/*_1")
        if self.fault == "checkpoints":
            shutil.rmtree(run / "checkpoints")
        elif self.fault == "run":
            shutil.rmtree(run)
        elif self.fault == "all":
            shutil.rmtree(self.logs)
        elif self.fault == "moved":
            run.rename(self.logs / "moved")
        elif self.fault == "log":
            (run / "metrics.jsonl").unlink()
        elif self.fault == "replaced":
            run.rename(self.logs / "moved")
            shutil.copytree(self.logs / "moved", run)
            config = (run / "config.json").read_text()
            (run / "config.json").write_text(config.replace('"seed": 0', '"seed": 1'))
        elif self.fault.startswith("full"):
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))

gymnasium.register("Saboteur-v0", entry_point=Saboteur)

class ManyParts(Saboteur):
    def __init__(self, n_parts):
        one = gymnasium.spaces.Box(-1, 1, (2,), np.float32)
        self.observation_space = gymnasium.spaces.Dict({f"part_{i}": one for i in range(n_parts)})

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.observation_space.sample(), {}

    def step(self, action):
        raise RuntimeError("it was played")

gymnasium.register("ManyParts-v0", entry_point=ManyParts)
"""


@pytest.fixture
def argv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Return a function that adds options to the words of a tiny run, on an environment with a fault."""
    name = f"saboteur_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    logs = tmp_path / "logs"

    def words(fault: str, tiny: list[str]) -> list[str]:
        argv = [f"{name}:Saboteur-v0" if word == "recall" else word for word in tiny]
        return ["train", *argv, "--env-kwargs", f"fault:{fault}", f"logs:{logs}", "-n", "640", "-f", str(logs)]

    return words


def rows(run: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_bytes().splitlines()]


def in_process(argv: list[str], **options: Any) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "srwm_rl", *argv]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, **options)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # of TensorBoard's thread
@pytest.mark.parametrize("fault", ["checkpoints", "run", "all", "moved", "log"])
@pytest.mark.parametrize("algo", ["ppo", "impala"])
def test_a_run_that_was_moved_or_deleted_is_made_again(
    algo: str,
    fault: str,
    argv: Callable[..., list[str]],
    call: Any,
    recall_argv: list[str],
    impala_argv: list[str],
    tmp_path: Path,
) -> None:
    tiny = recall_argv if algo == "ppo" else [*impala_argv, "--synchronous"]
    result = call(*argv(fault, tiny), "--save-freq", 64)
    assert result.code == 0, result
    again = "it is written again" if fault == "log" else "it is made again, and the run is saved there"
    assert result.err.count(again) == 1
    assert f"done: 640 steps. Now: srwm-rl eval {tmp_path / 'logs'}" in result.out
    (run,) = (tmp_path / "logs").glob("*/*_1")
    assert steps_of(Run.open(run).files("checkpoint")[-1]) == 640
    assert load(run).num_timesteps == 640
    assert rows(run) == list(range(64, 704, 64))
    assert call("train", "--resume", run, "-n", 704, "--no-progress", "--env", words_of(run)).code == 0
    if fault == "moved":
        assert steps_of(Run.open(tmp_path / "logs" / "moved").files("checkpoint")[-1]) == 128


def words_of(run: Path) -> str:
    return str(Run.open(run).config["train"]["env"])


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_run_never_writes_into_another_one_that_has_its_place(
    argv: Callable[..., list[str]], call: Any, recall_argv: list[str], tmp_path: Path, snapshot: Any
) -> None:
    result = call(*argv("replaced", recall_argv), "--save-freq", 64)
    assert result.code == 74
    assert "another run is in this folder now); the older files stay, and it is tried again" in result.err
    assert "done" not in result.out
    (run,) = (tmp_path / "logs").glob("*/*_1")
    other, moved = (snapshot(path / "checkpoints") for path in (run, tmp_path / "logs" / "moved"))
    assert other == moved
    assert json.loads((run / "config.json").read_text())["train"]["seed"] == 1


def test_a_disk_that_is_full_to_the_end(argv: Callable[..., list[str]], recall_argv: list[str], tmp_path: Path) -> None:
    result = in_process([*argv("full", recall_argv), "--save-freq", "64"])
    assert result.returncode == 74, result
    (run,) = (tmp_path / "logs").glob("*/*_1")
    lines = result.stderr.splitlines()
    *warnings, end = lines
    for file in (
        "tensorboard",
        "metrics.jsonl",
        "checkpoint-000000000192.safetensors",
        "model-000000000192.safetensors",
    ):
        assert sum(file in line and "File too large" in line for line in warnings) == 1, (file, lines)
    assert end == (
        "srwm-rl: trained, but the end could not be saved (see above): the run is saved at 128 steps; make room for "
        f"them, then: srwm-rl train --resume {run} --env {words_of(run)}"
    )
    assert "done" not in result.stdout
    assert "best model" not in result.stdout
    assert [steps_of(file) for file in Run.open(run).files("checkpoint")] == [64, 128]
    again = in_process(["train", "--resume", str(run), "--env", words_of(run), "--no-progress"])
    assert again.returncode == 0, again
    assert rows(run) == list(range(64, 704, 64))


def test_a_disk_that_is_full_for_a_while(
    argv: Callable[..., list[str]], recall_argv: list[str], tmp_path: Path
) -> None:
    result = in_process([*argv("full for a while", recall_argv), "--save-freq", "64"])
    assert result.returncode == 0, result
    assert "saved again, at 640 steps" in result.stderr
    assert "done: 640 steps" in result.stdout
    (run,) = (tmp_path / "logs").glob("*/*_1")
    assert rows(run) == list(range(64, 704, 64))  # those of the full disk too


def test_a_disk_with_too_little_room_is_noticed_before_the_first_step(recall_argv: list[str], tmp_path: Path) -> None:
    def limit() -> None:  # more than the first state needs, and less than those with the optimizer's moments
        resource.setrlimit(resource.RLIMIT_FSIZE, (100 * 1024, resource.RLIM_INFINITY))

    result = in_process(["train", *recall_argv, "-n", "640", "-f", str(tmp_path)], preexec_fn=limit)
    assert result.returncode == 74
    (line,) = result.stderr.splitlines()
    path = tmp_path / "ppo_srwm" / "recall_1" / "checkpoints" / "checkpoint-000000000000.safetensors"
    assert line == f"srwm-rl: stopped: {path}: File too large; nothing was learned yet, and nothing is kept"
    assert list((tmp_path / "ppo_srwm").iterdir()) == []


@pytest.mark.parametrize("algo", ["ppo", "impala"])
def test_what_a_file_cannot_hold_is_refused_before_the_first_step(
    algo: str,
    argv: Callable[..., list[str]],
    call: Any,
    recall_argv: list[str],
    impala_argv: list[str],
    tmp_path: Path,
) -> None:
    words = argv("none", recall_argv if algo == "ppo" else impala_argv)
    words = [word.replace("Saboteur", "ManyParts") for word in words if not word.startswith(("fault:", "logs:"))]
    index = words.index("--env-kwargs") + 1

    def play(n_parts: int) -> Any:
        return call(*words[:index], f"n_parts:{n_parts}", *words[index:])

    assert play(1100).error() == (
        "this run could not be saved: a Dict space of 1,103 parts, memory inputs included, cannot be saved: a file "
        "takes 1,024, join some of them"
    )
    assert not list((tmp_path / "logs").glob("*/*"))
    played = play(65)
    assert (played.code, "it was played" in played.err) == (3, True)


def test_an_environments_number_that_no_reader_accepts_is_refused_too(
    call: Any, recall_argv: list[str], tmp_path: Path
) -> None:
    line = call("train", *recall_argv, "--env-kwargs", "delay:2000000", "-f", tmp_path).error()
    assert "this run could not be saved" in line
    assert "its environment's delay is out of range" in line


def test_the_model_that_a_full_disk_cost_is_written_when_the_run_is_resumed(
    call: Any, recall: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(recall, tmp_path / "run"))
    (run / "checkpoints" / "model-000000000256.safetensors").unlink()
    assert "has its 256 steps already" in call("train", "--resume", run).error()
    agent, before = load(run), load(recall)
    assert agent.num_timesteps == 256
    for name, weights in before.policy.state_dict().items():
        assert weights.equal(agent.policy.state_dict()[name]), name
