"""`GroupedVecEnv`: several vectors of environments as one."""

import numpy as np
import pytest
from stable_baselines3.common.env_util import make_vec_env as sb3_make_vec_env

from srwm_rl import UserError
from srwm_rl.envs import GroupedVecEnv, ProcgenVecEnv, make_vec_env
from srwm_rl.envs.wrappers.reward import VecNormalizeReward


def grouped(sizes: tuple[int, ...] = (2, 3), env: str = "recall") -> GroupedVecEnv:
    return GroupedVecEnv([make_vec_env(env, n, "0:100", 10 * i) for i, n in enumerate(sizes)])


def test_steps_are_the_concatenated_steps_of_the_groups() -> None:
    env, (first, second) = grouped(), grouped().groups
    assert env.num_envs == 5
    obs, parts = env.reset(), (first.reset(), second.reset())
    for key, array in obs.items():  # type: ignore[union-attr]
        np.testing.assert_array_equal(array, np.concatenate([part[key] for part in parts]))  # type: ignore[call-overload,index]
    n_episodes = 0
    for _ in range(30):
        actions = np.arange(5) % 4
        obs, rewards, dones, infos = env.step(actions)
        steps = first.step(actions[:2]), second.step(actions[2:])
        for key, array in obs.items():  # type: ignore[union-attr]
            np.testing.assert_array_equal(array, np.concatenate([step[0][key] for step in steps]))  # type: ignore[call-overload,index]
        np.testing.assert_array_equal(rewards, np.concatenate([step[1] for step in steps]))
        np.testing.assert_array_equal(dones, np.concatenate([step[2] for step in steps]))
        levels = [info.get("prev_level_seed") for step in steps for info in step[3]]
        assert [info.get("prev_level_seed") for info in infos] == levels
        n_episodes += int(dones.sum())
    assert n_episodes > 5


def test_groups_are_seeded_differently_and_reproducibly() -> None:
    env = GroupedVecEnv([make_vec_env("recall", 8, "0:100000", 0) for _ in range(2)])
    env.seed(5)
    env.reset()
    levels = [info["level_seed"] for info in env.reset_infos]
    assert levels[:8] != levels[8:]
    env.seed(5)
    env.reset()
    assert [info["level_seed"] for info in env.reset_infos] == levels


def test_levels_as_a_reset_option_reach_the_right_environments() -> None:
    env = grouped()
    env.set_options({"levels": [11, 12, 13, 14, 15]})
    env.reset()
    assert [info["level_seed"] for info in env.reset_infos] == [11, 12, 13, 14, 15]
    with pytest.raises(UserError, match="the one reset option is 'levels'"):
        env.set_options({"speed": 3})


def test_a_restored_state_continues_exactly() -> None:
    env = GroupedVecEnv([VecNormalizeReward(group) for group in grouped().groups])
    env.reset()
    for _ in range(7):
        env.step(np.zeros(5, int))
    assert env.supports_state
    state, expected = env.get_state(), [env.step(np.ones(5, int)) for _ in range(9)]
    restored = GroupedVecEnv([VecNormalizeReward(group) for group in grouped().groups])
    restored.set_state(state)
    for step in expected:
        np.testing.assert_equal(restored.step(np.ones(5, int))[:3], step[:3])
    with pytest.raises(UserError, match="not a saved state"):
        env.set_state({"0": state["0"]})


def test_attributes_and_methods_are_those_of_the_indexed_environments() -> None:
    env = GroupedVecEnv([sb3_make_vec_env("CartPole-v1", 2), sb3_make_vec_env("CartPole-v1", 3)])
    env.set_attr("mark", 7, indices=[1, 3])
    assert env.get_attr("mark", [3, 1]) == [7, 7]
    with pytest.raises(AttributeError):
        env.get_attr("mark", [0])
    assert len(env.env_method("reset", indices=[0, 4])) == 2
    assert len(env.env_is_wrapped(object)) == 5
    env.reset()
    assert not env.supports_state
    env.close()


def test_get_images_returns_an_image_per_environment() -> None:
    env = GroupedVecEnv([ProcgenVecEnv("coinrun", 1, seed=seed, render_mode="rgb_array") for seed in range(2)])
    env.reset()
    assert [image.shape for image in env.get_images() if image is not None] == [(512, 512, 3)] * 2
    env.close()


def test_different_spaces_are_refused() -> None:
    with pytest.raises(UserError, match="same observation and action spaces"):
        GroupedVecEnv([make_vec_env("recall", 2, "all", 0), make_vec_env("bandit", 2, "all", 0)])
    with pytest.raises(UserError, match="at least one group"):
        GroupedVecEnv([])
