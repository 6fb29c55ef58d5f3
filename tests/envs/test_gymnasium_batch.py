"""`GymnasiumBatch`: any Gymnasium environments as a batch with levels."""

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces

from srwm_rl.envs import GymnasiumBatch
from srwm_rl.errors import UserError


class FailingEnv(gymnasium.Env):
    """An environment of the given spaces that raises at step `fail_at`; 0: in reset; -1: never."""

    def __init__(self, observation_space=None, action_space=None, fail_at=3):
        self.observation_space = observation_space or spaces.Discrete(5)
        self.action_space = action_space or spaces.Discrete(2)
        self.fail_at = fail_at

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.observation_space.seed(seed)
        self.clock = 0
        if self.fail_at == 0:
            raise KeyError("broken")
        return self.observation_space.sample(), {}

    def step(self, action):
        assert self.action_space.contains(action)
        self.clock += 1
        if self.clock == self.fail_at:
            raise ZeroDivisionError("by design")
        return self.observation_space.sample(), 1.0, self.clock >= 5, False, {"is_success": True}


gymnasium.register("tests/Failing-v0", entry_point=FailingEnv, disable_env_checker=True)


def test_a_level_equals_a_single_environment_with_that_seed():
    env = GymnasiumBatch("CartPole-v1", 3, "0:50", seed=1)
    obs = env.reset(levels=[7, 8, 9])
    singles = [gymnasium.make("CartPole-v1") for _ in range(3)]
    assert np.array_equal(obs, [single.reset(seed=seed)[0] for single, seed in zip(singles, (7, 8, 9), strict=True)])
    running = np.ones(3, bool)
    for _ in range(60):
        step = env.step(np.ones(3, int))
        for i in np.flatnonzero(running):
            obs, reward, terminated, _, _ = singles[i].step(1)
            assert reward == step.rewards[i]
            assert terminated == step.terminated[i]
            assert np.array_equal(obs, step.final_obs[i] if terminated else step.obs[i])
            running[i] = not terminated
    assert not running.any()
    env.reset()
    assert all(level < 50 for level in env.level_seed())


def test_the_seed_determines_the_levels_and_a_masked_reset_leaves_other_environments_alone():
    masked, unmasked, other_seed = (GymnasiumBatch("CartPole-v1", 4, "0:1000", seed=seed) for seed in (1, 1, 2))
    assert np.array_equal(masked.reset(), unmasked.reset())
    assert not np.array_equal(masked.observe(), other_seed.reset())
    mask = np.array([True, False, True, False])
    before = masked.observe()
    obs = masked.reset(mask)
    assert np.array_equal(obs[~mask], before[~mask])
    assert not np.array_equal(obs[mask], before[mask])
    for _ in range(80):
        masked_step, unmasked_step = masked.step(np.zeros(4, int)), unmasked.step(np.zeros(4, int))
        assert np.array_equal(masked_step.obs[~mask], unmasked_step.obs[~mask])
        assert not np.array_equal(masked_step.obs[mask], unmasked_step.obs[mask])


@pytest.mark.parametrize(
    "space",
    [
        spaces.Discrete(4),
        spaces.MultiDiscrete([3, 2]),
        spaces.MultiBinary(4),
        spaces.Box(-1, 1, (2, 3), np.float32),
        spaces.Dict({"image": spaces.Box(0, 255, (4, 4, 3), np.uint8), "number": spaces.Discrete(3)}),
    ],
)
def test_observations_of_every_space_are_stacked(space):
    env = GymnasiumBatch("tests/Failing-v0", 2, env_kwargs={"observation_space": space, "fail_at": -1})
    obs = env.reset()
    for k in range(6):
        rows = [{key: value[i] for key, value in obs.items()} if isinstance(obs, dict) else obs[i] for i in range(2)]
        assert all(space.contains(row) for row in rows)
        step = env.step(np.array([0, 1]))
        obs = step.obs
        assert step.terminated.all() == (k == 4)
        assert ("is_success" in step.info) == (k == 4)


@pytest.mark.parametrize(
    ("space", "valid", "invalid"),
    [
        (spaces.MultiDiscrete([3, 2], start=[1, 0]), [3, 1], [0, 1]),
        (spaces.MultiBinary(2), [1, 0], [2, 0]),
        (spaces.Box(-1, 1, (2,), np.float32), [0.5, -1.0], [np.nan, 0]),
        (spaces.Discrete(2, start=3), 4, 2),
    ],
)
def test_actions_of_every_space_are_checked_and_passed_on(space, valid, invalid):
    env = GymnasiumBatch("tests/Failing-v0", 2, env_kwargs={"action_space": space, "fail_at": -1})
    env.reset()
    env.step(np.array([valid, valid], space.dtype))
    with pytest.raises(UserError):
        env.step(np.array([invalid, valid], np.float32 if isinstance(space, spaces.Box) else np.int64))


def test_bits_may_be_floats_as_sb3_samples_them():
    space = spaces.MultiBinary(2)
    env = GymnasiumBatch("tests/Failing-v0", 2, env_kwargs={"action_space": space, "fail_at": -1})
    env.reset()
    env.step(np.array([[1, 0], [0, 0]], np.float32))
    assert env.check_actions(np.ones((2, 2), np.float32)).dtype == space.dtype
    with pytest.raises(UserError, match="whole numbers"):
        env.step(np.array([[0.5, 0], [0, 0]], np.float32))


def test_a_failing_environment_is_named():
    env = GymnasiumBatch("tests/Failing-v0", 2, "41:42")
    env.reset()
    env.step(np.array([0, 0]))
    env.step(np.array([0, 0]))
    with pytest.raises(RuntimeError, match=r"tests/Failing-v0 .*level 41, step 2.*by design") as error:
        env.step(np.array([0, 0]))
    assert isinstance(error.value.__cause__, ZeroDivisionError)
    with pytest.raises(RuntimeError, match="reset"):
        GymnasiumBatch("tests/Failing-v0", 1, env_kwargs={"fail_at": 0})


@pytest.mark.parametrize(
    "kwargs",
    [
        {"env_id": "CartPole-v1", "n_envs": 0},
        {"env_id": "NoSuchThing-v0"},
        {"env_id": "CartPole-v1", "env_kwargs": {"wheels": 4}},
        {"env_id": "tests/Failing-v0", "env_kwargs": {"observation_space": spaces.Text(3)}},
        {"env_id": "tests/Failing-v0", "env_kwargs": {"observation_space": spaces.Sequence(spaces.Discrete(2))}},
        {"env_id": "tests/Failing-v0", "env_kwargs": {"action_space": spaces.Dict({"a": spaces.Discrete(2)})}},
        {"env_id": "tests/Failing-v0", "env_kwargs": {"observation_space": spaces.Dict({"a": spaces.Dict({})})}},
    ],
)
def test_invalid_arguments_are_refused_in_one_line(kwargs):
    with pytest.raises(UserError) as error:
        GymnasiumBatch(**{"n_envs": 1, **kwargs})
    assert "\n" not in str(error.value)


def test_rendering_needs_a_render_mode():
    env = GymnasiumBatch("CartPole-v1", 1)
    with pytest.raises(UserError):
        env.render()
    env.close()
