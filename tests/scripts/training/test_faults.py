"""Faults while training from the command line: one line, the last good checkpoint kept, exit code 3."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from srwm_rl.agents.distributed import SINGLE
from srwm_rl.scripts.config.settings import TrainConfig
from srwm_rl.scripts.training.checkpoints import Session
from srwm_rl.storage.run_folder import Run
from srwm_rl.storage.safe_file import read_file

MODULE = """
import gymnasium
import numpy as np

class Faulty(gymnasium.Env):
    observation_space = gymnasium.spaces.Box(-1, 1, (2,), np.float32)
    action_space = gymnasium.spaces.Discrete(2)
    total = 0

    def __init__(self, fault):
        self.fault = fault

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return np.zeros(2, np.float32), {}

    def step(self, action):
        self.t += 1
        Faulty.total += 1
        reward = 1.0
        if Faulty.total == 150:  # in the third update of 64 steps
            if self.fault == "raise":
                raise ZeroDivisionError("the simulator broke")
            reward = float("nan")
        return np.ones(2, np.float32), reward, self.t == 7, False, {}

gymnasium.register("Faulty-v0", entry_point=Faulty)
"""


@pytest.fixture
def argv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recall_argv: list[str]) -> list[str]:
    """Return the options of a tiny run on an environment of a user's module."""
    name = f"faulty_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    return [f"{name}:Faulty-v0" if word == "recall" else word for word in recall_argv]


@pytest.mark.parametrize(
    ("fault", "message"),
    [("raise", "Faulty-v0 failed in step (environment 1, level"), ("nan", "the reward is not finite (")],
)
def test_a_fault_keeps_the_last_good_checkpoint(
    fault: str, message: str, argv: list[str], call: Any, tmp_path: Path
) -> None:
    result = call("train", *argv, "--env-kwargs", f"fault:{fault}", "-n", 640, "-f", tmp_path / "logs")
    assert result.code == 3
    assert result.err.count("\n") == 1
    assert message in result.err
    assert "saved at 128 steps. Resume with: srwm-rl train --resume" in result.err
    (run,) = (tmp_path / "logs" / "ppo_srwm").iterdir()
    arrays, _ = read_file(Run.open(run).files("model")[-1])
    assert all(np.isfinite(array).all() for array in arrays.values())


def test_a_reward_that_is_not_finite_can_be_skipped(argv: list[str], call: Any, tmp_path: Path) -> None:
    options = ["--env-kwargs", "fault:nan", "--on-nan", "skip", "-n", 640, "-f", tmp_path / "logs"]
    with pytest.warns(UserWarning, match="the reward is not finite and counts as 0"):
        assert call("train", *argv, *options).code == 0


def test_a_state_that_is_not_finite_is_never_saved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Run.create(tmp_path / "run", {"train": {}})
    nan = np.array([1.0, np.nan], np.float32)
    state = {"environments": {"may be": nan}, "counters": {"num_timesteps": 7}, "policy": {"w": nan}}
    model: Any = SimpleNamespace(processes=SINGLE, policy=None, set_logger=lambda logger: None)
    Session(TrainConfig(), model, run, tmp_path / "log").save(state)
    assert run.files("checkpoint") == run.files("model") == []
    assert "at 7 steps: not saved: policy/w is not finite; the older files stay" in capsys.readouterr().err
