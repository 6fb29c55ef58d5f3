"""A run restored from a captured state continues bit for bit as the uninterrupted run."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from stable_baselines3.common.callbacks import ConvertCallback

from srwm_rl import UserError, core_names
from srwm_rl.agents import IMPALA, PPO
from srwm_rl.agents.base import RecurrentAlgorithm
from srwm_rl.agents.run.callbacks import Checkpoints
from srwm_rl.agents.run.checkpoint_state import capture_state, restore_state
from srwm_rl.envs import GroupedVecEnv, make_vec_env
from srwm_rl.envs.wrappers.reward import VecNormalizeReward
from srwm_rl.storage.safe_file import pack, read_file, unpack, write_file

STEPS = 8 * 16  # per update


def build(env: str, core: str, seed: int = 0, algo: str = "ppo") -> RecurrentAlgorithm:
    policy_kwargs = {
        "core": core,
        "core_kwargs": {"hidden_size": 16, "n_layers": 1},
        "encoder_kwargs": {"cnn": {"channels": [4, 4]}},
    }
    if algo == "impala":
        # Batches that do not divide a rollout: some unrolls wait for the learner when the state is taken.
        groups = [VecNormalizeReward(make_vec_env(env, 4, "0:200", seed + 4 * g), 0.99) for g in range(2)]
        return IMPALA(
            "SRWMPolicy", GroupedVecEnv(groups), learning_rate=lambda left: 1e-3 * left, n_steps=16, batch_size=48,
            seed=seed, policy_kwargs=policy_kwargs, device="cpu", synchronous=True,
        )  # fmt: skip
    venv = VecNormalizeReward(make_vec_env(env, 8, "0:200", seed), 0.99)
    return PPO(
        "SRWMPolicy", venv, learning_rate=lambda left: 1e-3 * left, n_steps=16, n_epochs=2, seed=seed,
        policy_kwargs=policy_kwargs, device="cpu",
    )  # fmt: skip


def state_arrays(model: RecurrentAlgorithm) -> dict[str, np.ndarray]:
    arrays, tree = pack(capture_state(model))
    episodes = tree.pop("episodes")  # their times on the clock differ
    arrays["returns"] = np.array([episode["r"] for episode in episodes])
    arrays |= {f"tree/{name}": np.array(json.dumps(value, sort_keys=True)) for name, value in tree.items()}
    return arrays


def train(model: RecurrentAlgorithm, until: int, total: int) -> list[dict[str, Any]]:
    """Train towards `total` steps but stop after `until`, at a boundary between updates; return the states there."""
    states: list[dict[str, Any]] = []
    keeper = Checkpoints(lambda: capture_state(model), states.append, 10**9)

    def stop(local: dict[str, Any], _: Any) -> bool:
        return bool(local["self"].num_timesteps <= until)

    model.learn(total - model.num_timesteps, [keeper, ConvertCallback(stop)], reset_num_timesteps=False)
    if model.num_timesteps >= total:
        keeper.latest = capture_state(model)
    keeper.save_latest()
    return states


@pytest.mark.parametrize("algo", ["ppo", "impala"])
@pytest.mark.parametrize(("env", "core"), [*(("recall", core) for core in core_names()), ("coinrun,maze", "srwm")])
def test_a_run_restored_from_a_file_equals_an_uninterrupted_one(env: str, core: str, algo: str, tmp_path: Path) -> None:
    whole = build(env, core, algo=algo)
    train(whole, 10**9, 5 * STEPS)

    first = build(env, core, algo=algo)
    (state,) = train(first, 2 * STEPS, 5 * STEPS)
    assert state["counters"]["num_timesteps"] == 2 * STEPS
    assert algo == "ppo" or state["extra"]["unrolls"], "nothing waits for the learner"
    arrays, tree = pack(state)
    write_file(tmp_path / "state", arrays, {"state": tree})

    torch.manual_seed(123)  # steps after the captured state do not matter
    np.random.seed(123)
    second = build(env, core, seed=7, algo=algo)
    arrays, meta = read_file(tmp_path / "state")
    assert restore_state(second, unpack(arrays, meta["state"]), "state")
    train(second, 10**9, 5 * STEPS)

    expected, restored = state_arrays(whole), state_arrays(second)
    assert expected.keys() == restored.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(restored[name], array, err_msg=name)


def test_environments_without_state_access_start_new_episodes() -> None:
    def cartpole() -> PPO:
        return PPO("SRWMPolicy", make_vec_env("CartPole-v1", 4, "0:200", 0), n_steps=16, seed=0)

    model = cartpole()
    model.learn(64)
    state = capture_state(model)
    assert state["environments"] is None
    fresh = cartpole()
    assert restore_state(fresh, state, "state") is False
    fresh.learn(64, reset_num_timesteps=False)
    assert fresh.num_timesteps == 128


def test_a_captured_state_does_not_change_with_the_model() -> None:
    model = build("recall", "srwm")
    model.learn(STEPS)
    state = capture_state(model)
    before = {name: array.copy() for name, array in pack(state)[0].items()}
    model.learn(2 * STEPS, reset_num_timesteps=False)
    for name, array in pack(state)[0].items():
        np.testing.assert_array_equal(array, before[name], err_msg=name)


def test_a_state_of_another_architecture_is_refused_by_name() -> None:
    state = capture_state(build("recall", "srwm"))
    with pytest.raises(UserError, match="another architecture"):
        restore_state(build("recall", "lstm"), state, "that file")
