"""Groups of environments that look like one."""

from typing import Any

import numpy as np
import pytest
from stable_baselines3.common.env_util import make_vec_env as sb3_make_vec_env

from srwm_rl import UserError
from srwm_rl.envs import GroupedVecEnv, ProcgenVecEnv, make_vec_env
from srwm_rl.envs.wrappers.reward import VecNormalizeReward


def grouped(sizes: tuple[int, ...] = (2, 3), env: str = "recall") -> GroupedVecEnv:
    return GroupedVecEnv([make_vec_env(env, n, "0:100", 10 * i) for i, n in enumerate(sizes)])


def same(one: Any, other: Any) -> None:
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            np.testing.assert_array_equal(one[key], other[key])
    else:
        np.testing.assert_array_equal(one, other)


def test_it_gives_what_its_groups_give_side_by_side() -> None:
    env, (first, second) = grouped(), grouped().groups
    assert env.num_envs == 5
    obs, parts = env.reset(), (first.reset(), second.reset())
    for key, each in obs.items():  # type: ignore[union-attr]
        same(each, np.concatenate([part[key] for part in parts]))  # type: ignore[call-overload,index]
    ended = 0
    for _ in range(30):
        actions = np.arange(5) % 4
        obs, rewards, dones, infos = env.step(actions)
        ones, others = first.step(actions[:2]), second.step(actions[2:])
        for key, each in obs.items():  # type: ignore[union-attr]
            same(each, np.concatenate([part[0][key] for part in (ones, others)]))  # type: ignore[call-overload,index]
        same(rewards, np.concatenate([ones[1], others[1]]))
        same(dones, np.concatenate([ones[2], others[2]]))
        levels = [info.get("prev_level_seed") for info in (*ones[3], *others[3])]
        assert [info.get("prev_level_seed") for info in infos] == levels
        ended += int(dones.sum())
    assert ended > 5


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


def test_it_goes_on_exactly_where_its_state_was_taken() -> None:
    env = GroupedVecEnv([VecNormalizeReward(each) for each in grouped().groups])
    env.reset()
    for _ in range(7):
        env.step(np.zeros(5, int))
    assert env.supports_state
    state, expected = env.get_state(), [env.step(np.ones(5, int)) for _ in range(9)]
    other = GroupedVecEnv([VecNormalizeReward(each) for each in grouped().groups])
    other.set_state(state)
    for step in expected:
        obs, rewards, dones, _ = other.step(np.ones(5, int))
        same(obs, step[0])
        same(rewards, step[1])
        same(dones, step[2])
    with pytest.raises(UserError, match="not a saved state"):
        env.set_state({"0": state["0"]})


def test_attributes_and_methods_go_to_the_environments_asked_for() -> None:
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


def test_pictures_of_all_environments() -> None:
    env = GroupedVecEnv([ProcgenVecEnv("coinrun", 1, seed=g, render_mode="rgb_array") for g in range(2)])
    env.reset()
    assert [image.shape for image in env.get_images() if image is not None] == [(512, 512, 3)] * 2
    env.close()


def test_different_spaces_are_refused() -> None:
    with pytest.raises(UserError, match="same observation and action spaces"):
        GroupedVecEnv([make_vec_env("recall", 2, "all", 0), make_vec_env("bandit", 2, "all", 0)])
    with pytest.raises(UserError, match="at least one group"):
        GroupedVecEnv([])
