"""Zips of `srwm-rl export --format sb3`: the run's trainer, with an agent that acts the same."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import srwm_rl
from srwm_rl.agents import IMPALA, PPO
from srwm_rl.envs.make import make_vec_env
from srwm_rl.storage.model_file import load, save_model

GOLDEN = Path(__file__).parents[2] / "golden" / "full_srwm_model.tar"


def with_heads(argv: list[str]) -> list[str]:
    """Return a tiny run's arguments with heads of size 2: heads of size 1 never edit themselves."""
    cut = argv.index("n_layers:1") + 1
    return [*argv[:cut], "n_heads:4", *argv[cut:]]


def rollout(agent: Any, deterministic: bool) -> list[np.ndarray]:
    """Play and return the actions and states."""
    env = make_vec_env("recall", 4, "0:12", 0)
    torch.manual_seed(0)
    obs, state, starts, results = env.reset(), None, np.ones(4, bool), []
    for _ in range(12):
        actions, state = agent.predict(obs, state, starts, deterministic)
        results += [actions, *state]
        obs, _, starts, _ = env.step(actions)
    return results


@pytest.mark.parametrize("algo", [PPO, IMPALA])
def test_a_zip_gives_the_trainer_with_the_same_agent(
    algo: Any, call: Any, recall_argv: list[str], impala_argv: list[str], tmp_path: Path
) -> None:
    argv = with_heads(recall_argv if algo is PPO else impala_argv)
    assert call("train", *argv, "-n", 64, "-f", tmp_path / "logs", "--verbose", 0).code == 0
    run, file = next((tmp_path / "logs").glob("*/*")), tmp_path / "model.zip"
    result = call("export", run, "--format", "sb3", "-o", file)
    assert (result.code, result.err) == (0, ""), result
    assert f"srwm_rl.agents.{algo.__name__}.load(" in result.out
    assert "warning   such a zip runs code when it is loaded" in result.out
    model, agent = algo.load(file, device="cpu"), srwm_rl.load(run)
    for deterministic in (True, False):
        for ours, theirs in zip(rollout(model, deterministic), rollout(agent, deterministic), strict=True):
            np.testing.assert_array_equal(ours, theirs)
    assert model.observation_space == agent.policy.observation_space
    assert model.action_space == agent.policy.action_space
    assert (model.num_timesteps, model.n_envs, model.n_steps) == (agent.num_timesteps, 4, 16)
    model.set_env(make_vec_env("recall", 4, "0:12", 0))
    model.learn(64)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["logs", "model.zip"]


def test_a_zip_loads_in_a_process_of_its_own(recall: Path, call: Any, tmp_path: Path) -> None:
    file = tmp_path / "model.zip"
    assert call("export", recall, "--format", "sb3", "-o", file).code == 0
    code = f"from srwm_rl.agents import PPO\nprint(PPO.load({str(file)!r}).policy.core_name)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, "srwm\n", "")


def test_a_run_whose_settings_build_another_policy_makes_no_zip(recall: Path, call: Any, untouched: Path) -> None:
    agent = load(recall)
    config = {**agent.config, "core_kwargs": ["hidden_size:24", "n_layers:1"]}
    odd = untouched.parent / "odd.safetensors"
    save_model(odd, agent.policy, config, 256)
    message = call("export", odd, "--format", "sb3", "-o", untouched / "model.zip").error()
    assert "the settings of its run build another policy than it holds" in message


def test_an_imported_run_becomes_a_zip_too(call: Any, tmp_path: Path) -> None:
    run, file = tmp_path / "run", tmp_path / "model.zip"
    assert call("import-official", GOLDEN, "-o", run).code == 0
    result = call("export", run, "--format", "sb3", "-o", file)
    assert result.code == 0, result
    assert IMPALA.load(file, device="cpu").policy.core_name == "srwm"
