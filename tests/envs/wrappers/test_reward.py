"""Reward normalisation: SB3's numbers, without SB3's copies."""

import numpy as np
import pytest
from stable_baselines3.common.vec_env import VecNormalize

from srwm_rl.envs import make_vec_env
from srwm_rl.envs.wrappers.reward import VecClipReward, VecNormalizeReward
from srwm_rl.errors import UserError


def bandits(seed: int = 0, n_envs: int = 4) -> VecNormalizeReward:
    return VecNormalizeReward(make_vec_env("bandit", n_envs, "0:100", seed), gamma=0.9)


def test_rewards_are_those_of_vec_normalize() -> None:
    ours = bandits()
    theirs = VecNormalize(make_vec_env("bandit", 4, "0:100", 0), norm_obs=False, gamma=0.9)
    ours.reset()
    theirs.reset()
    rng = np.random.default_rng(0)
    for _ in range(30):
        actions = rng.integers(5, size=4)
        mine, other = ours.step(actions), theirs.step(actions)
        np.testing.assert_array_equal(mine[1], other[1])
        np.testing.assert_array_equal(ours.get_original_reward(), theirs.get_original_reward())
    assert set(np.unique(mine[1])) != {0.0, 1.0}


def test_frames_pass_through_uncopied(monkeypatch: pytest.MonkeyPatch) -> None:
    env = VecNormalizeReward(make_vec_env("bigfish", 2, "0:10", 0))
    env.reset()
    simulator = env.unwrapped.batch_env  # type: ignore[attr-defined]
    step, seen = simulator.step, []
    monkeypatch.setattr(simulator, "step", lambda actions: seen.append(step(actions)) or seen[-1])
    obs = env.step(np.zeros(2, int))[0]
    assert obs["observation"] is seen[0].obs
    env.close()


def test_a_saved_state_goes_on_exactly() -> None:
    first, second = bandits(), bandits(seed=9)
    first.reset()
    second.reset()
    rng = np.random.default_rng(0)
    for _ in range(13):
        first.step(rng.integers(5, size=4))
    second.set_state(first.get_state())
    for _ in range(25):
        actions = rng.integers(5, size=4)
        a, b = first.step(actions), second.step(actions)
        np.testing.assert_array_equal(a[1], b[1])
        np.testing.assert_array_equal(a[2], b[2])
        for key in a[0]:
            np.testing.assert_array_equal(a[0][key], b[0][key])


def test_a_state_of_other_environments_is_refused() -> None:
    first = bandits(n_envs=8)
    first.reset()
    with pytest.raises(UserError, match="n_envs"):
        bandits().set_state(first.get_state())


def test_support_for_states_is_that_of_the_environments_inside() -> None:
    assert bandits().supports_state
    assert not VecNormalizeReward(make_vec_env("CartPole-v1", 2, "0:10", 0)).supports_state


def test_clipped_rewards_train_and_infos_keep_the_raw_return() -> None:
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
