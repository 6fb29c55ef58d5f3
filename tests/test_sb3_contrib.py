"""Unmodified `sb3_contrib.RecurrentPPO` on our policy: every core, SB3's wrappers and callbacks, the same numbers."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sb3_contrib import RecurrentPPO
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecEnv, VecNormalize

from srwm_rl import SRWMPolicy, core_names
from srwm_rl.agents import PPO
from srwm_rl.envs import VecMemoryInputs

POLICY: dict[str, Any] = {"core_kwargs": {"hidden_size": 16, "n_layers": 2}}


def cartpoles(training: bool = True) -> VecNormalize:
    return VecNormalize(make_vec_env("CartPole-v1", 3, seed=0), training=training)


def contrib(env: VecEnv, core: str, **settings: Any) -> RecurrentPPO:
    settings = {"n_steps": 16, "batch_size": 48, "n_epochs": 1, "seed": 0, "device": "cpu", **settings}
    return RecurrentPPO(SRWMPolicy, env, policy_kwargs={"core": core, **POLICY}, **settings)


@pytest.mark.parametrize("core", core_names())
def test_it_trains_evaluates_saves_and_loads(core: str, tmp_path: Path) -> None:
    env, held_out = cartpoles(), cartpoles(training=False)
    model = contrib(env, core)
    before = {name: parameter.detach().clone() for name, parameter in model.policy.named_parameters()}
    callback = EvalCallback(held_out, eval_freq=16, n_eval_episodes=2, best_model_save_path=str(tmp_path), verbose=0)
    model.learn(192, callback)
    assert (tmp_path / "best_model.zip").exists()
    for name, parameter in model.policy.named_parameters():
        assert not torch.equal(parameter, before[name]), name
    model.save(tmp_path / "model")
    loaded = RecurrentPPO.load(tmp_path / "model", env=env, device="cpu")
    obs: Any = env.reset()
    states: list[Any] = [None, None]
    starts = np.ones(3, bool)
    for _ in range(12):
        (mine, states[0]), (theirs, states[1]) = (
            parameter.predict(obs, state, starts, deterministic=True)
            for parameter, state in zip((model, loaded), states, strict=True)
        )
        np.testing.assert_array_equal(mine, theirs)
        np.testing.assert_array_equal(states[0][0], states[1][0])
        obs, _, starts, _ = env.step(mine)
    mean, _ = evaluate_policy(loaded, held_out, 3, warn=False)
    assert mean >= 8  # CartPole's shortest episodes have that many steps
    loaded.learn(48)


@pytest.mark.parametrize("core", core_names())
def test_the_rollout_holds_the_values_and_log_probs_computed_while_acting(core: str) -> None:
    model = contrib(make_vec_env("CartPole-v1", 3, seed=0), core, learning_rate=0.0)
    model.learn(96)
    agent: Any = model.policy
    data = next(model.rollout_buffer.get(48))  # the whole rollout, padded, batch-major, as RecurrentPPO has it
    values, log_probs, _ = agent.evaluate_actions(
        data.observations, data.actions.long().flatten(), data.lstm_states, data.episode_starts
    )
    mask = data.mask > 1e-8
    assert mask.sum() == 48
    # The weights have not moved (learning rate 0), and the buffer holds what was computed step by step.
    torch.testing.assert_close(values.flatten()[mask], data.old_values[mask], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(log_probs[mask], data.old_log_prob[mask], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("core", core_names())
def test_it_acts_and_values_as_our_ppo_does_from_the_same_weights(core: str) -> None:
    env = VecMemoryInputs(make_vec_env("CartPole-v1", 3, seed=0))
    ours = PPO("SRWMPolicy", env, n_steps=16, policy_kwargs={"core": core, **POLICY}, seed=1, device="cpu")
    ours.learn(96)  # weights that differ from a fresh model's
    theirs = contrib(env, core)
    theirs.policy.load_state_dict(ours.policy.state_dict())
    obs: Any = env.reset()
    state, lstm_states = ours.policy.initial_state(3), theirs._last_lstm_states
    starts = np.ones(3, np.float32)
    for _ in range(40):
        tensors = {key: torch.as_tensor(value) for key, value in obs.items()}
        with torch.no_grad():
            step = ours.policy.act(tensors, state, torch.as_tensor(starts), deterministic=True)
            actions, values, log_probs, lstm_states = theirs.policy.forward(
                tensors, lstm_states, torch.as_tensor(starts), deterministic=True
            )
        assert torch.equal(actions, step.actions)
        assert torch.equal(values.flatten(), step.values)
        assert torch.equal(log_probs, step.log_probs)
        state = step.core_state
        obs, _, dones, _ = env.step(actions.numpy())
        starts = dones.astype(np.float32)
