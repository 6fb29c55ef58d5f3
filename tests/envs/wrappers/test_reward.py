"""Normalised and clipped rewards: SB3's numbers, without copying observations."""

import numpy as np
import pytest
from stable_baselines3.common.vec_env import VecNormalize, VecTransposeImage

from srwm_rl.envs import make_vec_env
from srwm_rl.envs.wrappers.reward import VecClipReward, VecNormalizeReward
from srwm_rl.errors import UserError


def bandits(seed: int = 0, n_envs: int = 4) -> VecNormalizeReward:
    return VecNormalizeReward(make_vec_env("bandit", n_envs, "0:100", seed), gamma=0.9)


def test_rewards_equal_those_of_vec_normalize() -> None:
    env = bandits()
    sb3_env = VecNormalize(make_vec_env("bandit", 4, "0:100", 0), norm_obs=False, gamma=0.9)
    env.reset()
    sb3_env.reset()
    rng = np.random.default_rng(0)
    for _ in range(30):
        actions = rng.integers(5, size=4)
        rewards, sb3_rewards = env.step(actions)[1], sb3_env.step(actions)[1]
        np.testing.assert_array_equal(rewards, sb3_rewards)
        np.testing.assert_array_equal(env.get_original_reward(), sb3_env.get_original_reward())
    assert set(np.unique(rewards)) != {0.0, 1.0}


def test_frames_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    env = VecNormalizeReward(make_vec_env("bigfish", 2, "0:10", 0))
    env.reset()
    simulator = env.unwrapped.batch_env  # type: ignore[attr-defined]
    step, steps = simulator.step, []
    monkeypatch.setattr(simulator, "step", lambda actions: steps.append(step(actions)) or steps[-1])
    obs = env.step(np.zeros(2, int))[0]
    assert obs["observation"] is steps[0].obs
    env.close()


def test_a_restored_state_continues_exactly() -> None:
    env, restored = bandits(), bandits(seed=9)
    env.reset()
    restored.reset()
    rng = np.random.default_rng(0)
    for _ in range(13):
        env.step(rng.integers(5, size=4))
    restored.set_state(env.get_state())
    for _ in range(25):
        actions = rng.integers(5, size=4)
        np.testing.assert_equal(restored.step(actions)[:3], env.step(actions)[:3])


def test_a_state_of_other_environments_is_refused() -> None:
    env = bandits(n_envs=8)
    env.reset()
    with pytest.raises(UserError, match="n_envs"):
        bandits().set_state(env.get_state())


def test_states_are_supported_where_the_wrapped_environments_support_them() -> None:
    assert bandits().supports_state
    assert not VecNormalizeReward(make_vec_env("CartPole-v1", 2, "0:10", 0)).supports_state


def test_states_can_be_saved_and_restored_through_outer_wrappers() -> None:
    env = VecTransposeImage(VecNormalizeReward(make_vec_env("maze", 2, "0:10", 0)))
    env.reset()
    env.step(np.zeros(2, int))
    assert env.supports_state
    state = env.get_state()
    assert set(state) == {"venv", "returns", "moments"}
    env.set_state(state)
    env.close()


def test_rewards_are_clipped_and_infos_keep_the_unclipped_return() -> None:
    env = VecClipReward(make_vec_env("bandit", 4, "0:100", 0), 0.25)
    env.reset()
    rng = np.random.default_rng(0)
    rewards, returns = [], []
    for _ in range(30):
        _, reward, _, infos = env.step(rng.integers(5, size=4))
        rewards.append(reward)
        returns += [info["episode"]["r"] for info in infos if "episode" in info]
    assert set(np.unique(rewards)) == {0.0, 0.25}
    assert max(returns) >= 1
    assert env.supports_state
    env.set_state(env.get_state())
    with pytest.raises(UserError, match="bound above 0"):
        VecClipReward(env, 0.0)
