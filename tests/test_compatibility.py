"""Runs and zips written by an earlier version load, evaluate, predict and resume as they did there."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from srwm_rl import load
from srwm_rl.agents import IMPALA, PPO
from srwm_rl.scripts.main import main
from srwm_rl.storage.run_folder import Run

DATA = Path(__file__).parent / "data" / "before_rebuild"
ALGORITHMS = {"ppo": PPO, "impala": IMPALA}
N_STEPS, N_RESUMED = 256, 384


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_a_run_loads(algo: str) -> None:
    agent = load(DATA / f"run_{algo}")
    assert (agent.num_timesteps, agent.policy.core_name, agent.config["env"]) == (N_STEPS, "srwm", "recall")
    assert agent.levels_played is not None
    assert agent.levels_played.is_complete("recall")


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_a_run_evaluates_to_the_same_returns(algo: str, tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    levels = ("--eval-levels", "1000000:1000020", "--train-levels", "none")
    assert main(["eval", str(DATA / f"run_{algo}"), *levels, "--json", str(file), "--no-progress"]) == 0
    report, expected = (json.loads(path.read_text()) for path in (file, DATA / f"eval_{algo}.json"))
    assert {**report, "run": ""} == {**expected, "run": ""}  # the path that was given


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_a_run_resumes_to_the_end(algo: str, tmp_path: Path) -> None:
    folder = shutil.copytree(DATA / f"run_{algo}", tmp_path / "run")
    assert main(["train", "--resume", str(folder), "-n", str(N_RESUMED)]) == 0
    assert load(folder).num_timesteps == N_RESUMED
    assert Run.open(folder).files("checkpoint")[-1] == Run.open(folder).file("checkpoint", N_RESUMED)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    old = (DATA / f"run_{algo}" / "metrics.jsonl").read_text().splitlines()
    assert lines[: len(old)] == [json.loads(line) for line in old]
    assert len(lines) > len(old)


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_a_zip_predicts_the_same_actions(algo: str) -> None:
    model = ALGORITHMS[algo].load(DATA / f"zip_{algo}.zip")
    generator = np.random.default_rng(0)
    state: Any = None
    actions = []
    for step in range(20):
        obs = generator.normal(size=(2, 4)).astype(np.float32)
        action, state = model.predict(obs, state, np.array([step == 0] * 2), deterministic=True)
        actions.append(action.tolist())
    assert actions == json.loads((DATA / "predicted.json").read_text())[algo]
