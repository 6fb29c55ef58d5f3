"""Faults while training from the command line: one line, the last good checkpoint kept, exit code 3."""

from collections.abc import Callable
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

RESULTS = {  # of a step: index and value
    "nan": (1, float("nan")),
    "shape": (0, np.ones(3, np.float32)),
    "axis": (0, np.ones((1, 2), np.float32)),
    "none": (0, None),
    "scalar": (0, 0.5),
    "text": (0, np.array(["a", "b"])),
    "no reward": (1, None),
    "no flag": (2, "no"),
    "no info": (4, None),
}

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
        result = [np.ones(2, np.float32), 1.0, self.t == 7, False, {}]
        if Faulty.total == 150:  # in the third update of 64 steps
            if self.fault == "raise":
                raise ZeroDivisionError("the simulator broke")
            if self.fault == "exit":
                raise SystemExit(0)
            if self.fault == "interrupt":
                raise KeyboardInterrupt
            if self.fault == "four values":
                return result[:4]
            index, value = RESULTS[self.fault]
            result[index] = value
        return tuple(result)

gymnasium.register("Faulty-v0", entry_point=Faulty)
"""


CORE = """
from pathlib import Path

import torch
from srwm_rl import Core

LOGS = Path(__file__).with_name("logs")

class Failing(Core):
    def __init__(self, input_size):
        super().__init__(input_size, 8, state_layers=1, state_size=8)
        self.project = torch.nn.Linear(input_size, 8)

    def forward(self, x, state, episode_starts):
        rows = sum(path.read_bytes().count(b"\\n") for path in LOGS.glob("*/*/metrics.jsonl"))
        if len(x) > 1 and rows == 3:  # while learning from the third rollout
            raise ZeroDivisionError("the core broke")
        memory, outputs = state[0], []
        for features, start in zip(self.project(x).tanh(), episode_starts):
            memory = memory.masked_fill(start[:, None] != 0, 0) / 2 + features
            outputs.append(memory)
        return torch.stack(outputs), memory[None]
"""


@pytest.fixture
def argv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[list[str]], list[str]]:
    """Return a function that puts an environment of a user's module into the options of a tiny run."""
    name = f"faulty_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    return lambda tiny: [f"{name}:Faulty-v0" if word == "recall" else word for word in tiny]


IN_STEP = "Faulty-v0 failed in step (environment 1, level 6, step 2): "
WRONG = "Faulty-v0 gave a wrong observation (environment 1, level 6, step 3): it is "
MESSAGES = {
    "raise": f"{IN_STEP}ZeroDivisionError: the simulator broke",
    "exit": f"{IN_STEP}SystemExit: 0",
    "four values": f"{IN_STEP}ValueError: not enough values to unpack (expected 5, got 4)",
    "no reward": f"{IN_STEP}TypeError: the reward is None",
    "no flag": f"{IN_STEP}TypeError: terminated is 'no', neither True nor False",
    "no info": f"{IN_STEP}TypeError: the info is None, no dict",
    "nan": "the reward is not finite (",
    "shape": f"{WRONG}an array of shape (3,) and float32, not of Box(-1.0, 1.0, (2,), float32)",
    "axis": f"{WRONG}an array of shape (1, 2) and float32, not of Box(",
    "none": f"{WRONG}None, not of Box(",
    "scalar": f"{WRONG}0.5, not of Box(",
    "text": f"{WRONG}an array of shape (2,) and <U1, not of Box(",
}


@pytest.mark.parametrize(
    ("algo", "fault"), [*(("ppo", fault) for fault in MESSAGES), *(("impala", fault) for fault in ("exit", "none"))]
)
def test_a_fault_keeps_the_last_good_checkpoint(
    algo: str, fault: str, argv: Any, call: Any, recall_argv: list[str], impala_argv: list[str], tmp_path: Path
) -> None:
    words = argv(recall_argv if algo == "ppo" else [*impala_argv, "--synchronous"])
    result = call("train", *words, "--env-kwargs", f"fault:{fault}", "-n", 640, "-f", tmp_path / "logs")
    assert result.code == 3
    assert result.err.count("\n") == 1
    assert MESSAGES[fault] in result.err
    assert "saved at 128 steps. Resume with: srwm-rl train --resume" in result.err
    (run,) = (tmp_path / "logs" / f"{algo}_srwm").iterdir()
    arrays, _ = read_file(Run.open(run).files("model")[-1])
    assert all(np.isfinite(array).all() for array in arrays.values())


def test_an_interrupt_of_the_environment_stops_the_run_as_a_signal_does(
    argv: Any, call: Any, recall_argv: list[str], tmp_path: Path
) -> None:
    words = [*argv(recall_argv), "--env-kwargs", "fault:interrupt", "-n", 640, "-f", tmp_path / "logs"]
    result = call("train", *words)
    assert result.code == 130
    assert result.err.startswith("srwm-rl: stopped by SIGINT; saved at 128 steps. Resume with: ")


def test_an_error_of_a_users_core_saves_the_run(
    call: Any,
    recall_argv: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    name = f"failing_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(CORE)
    monkeypatch.syspath_prepend(str(tmp_path))
    index = recall_argv.index("--core-kwargs")
    words = [*recall_argv[:index], *recall_argv[index + 3 :], "--core", f"{name}:Failing"]
    with pytest.raises(ZeroDivisionError, match="the core broke"):
        call("train", *words, "-n", 640, "-f", tmp_path / "logs")
    assert "stopped: ZeroDivisionError: the core broke. The weights" in capfd.readouterr().err
    (run,) = (tmp_path / "logs").glob("*/*")
    assert Run.open(run).files("checkpoint")[-1].name == "checkpoint-000000000128.safetensors"


@pytest.mark.parametrize("fault", ["none", "exit"])
def test_a_fault_in_an_evaluation_is_one_line(
    fault: str, argv: Any, call: Any, recall_argv: list[str], tmp_path: Path
) -> None:
    words = argv(recall_argv)
    assert call("train", *words, "--env-kwargs", "fault:raise", "-n", 64, "-f", tmp_path / "logs").code == 0
    (run,) = (tmp_path / "logs" / "ppo_srwm").iterdir()
    options = ["--env", words[words.index("--env") + 1], "--env-kwargs", f"fault:{fault}", "--no-progress"]
    result = call("eval", run, *options)
    assert result.code == 3, result
    assert result.err.count("\n") == 1
    assert ("SystemExit: 0" if fault == "exit" else "it is None") in result.err


@pytest.mark.parametrize("error", ["RuntimeError('no display')", "SystemExit(0)"])
def test_an_environment_that_cannot_be_made_is_one_line(
    error: str, call: Any, recall_argv: list[str], untouched: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"broken_{tmp_path.name.replace('-', '_')}"
    code = "import gymnasium\nclass Broken(gymnasium.Env):\n    def __init__(self):\n"
    code += f"        raise {error}\ngymnasium.register('{name}-v0', entry_point=Broken)\n"
    (tmp_path / f"{name}.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    words = [f"{name}:{name}-v0" if word == "recall" else word for word in recall_argv]
    line = call("train", *words, "-f", untouched).error()
    assert f"Gymnasium cannot make '{name}:{name}-v0': {error.partition('(')[0]}: " in line


def test_a_reward_that_is_not_finite_can_be_skipped(
    argv: Any, call: Any, recall_argv: list[str], tmp_path: Path
) -> None:
    options = ["--env-kwargs", "fault:nan", "--on-nan", "skip", "-n", 640, "-f", tmp_path / "logs"]
    with pytest.warns(UserWarning, match="the reward is not finite and counts as 0"):
        assert call("train", *argv(recall_argv), *options).code == 0


def test_a_state_that_is_not_finite_is_never_saved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Run.create(tmp_path / "run", {"train": {}})
    nan = np.array([1.0, np.nan], np.float32)
    state = {"environments": {"may be": nan}, "counters": {"num_timesteps": 7}, "policy": {"w": nan}}
    model: Any = SimpleNamespace(processes=SINGLE, policy=None, set_logger=lambda logger: None)
    Session(TrainConfig(), model, run, tmp_path / "log").save(state)
    assert run.files("checkpoint") == run.files("model") == []
    assert "at 7 steps: not saved: policy/w is not finite; the older files stay" in capsys.readouterr().err
