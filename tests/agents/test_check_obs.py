"""Observations of another shape, or out of their space, are named before anything is learned from them."""

from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnvWrapper

from srwm_rl.agents import IMPALA, PPO
from srwm_rl.agents.check_obs import check_obs
from srwm_rl.errors import FaultError
from tests.agents.probe import Probe

PARTS = spaces.Dict(a=spaces.Box(-1, 1, (2,)), b=spaces.Discrete(3, start=1))


@pytest.mark.parametrize(
    "space",
    [
        spaces.Box(-1, 1, (2,)),
        spaces.Box(-1, 1, ()),
        spaces.Discrete(3, start=1),
        spaces.MultiDiscrete([2, 3]),
        spaces.MultiBinary(4),
        PARTS,
    ],
)
def test_samples_of_a_space_pass(space: spaces.Space[Any]) -> None:
    for seed in range(20):
        space.seed(seed)
        samples = [space.sample() for _ in range(4)]
        obs: Any = np.stack(samples) if not isinstance(space, spaces.Dict) else None
        if obs is None:
            obs = {key: np.stack([sample[key] for sample in samples]) for key in samples[0]}
        check_obs(obs, space, 7, range(4))


@pytest.mark.parametrize(
    ("space", "obs", "message"),
    [
        (spaces.Box(-1, 1, (2,)), np.zeros((3, 1)), "the observation of 3 environment(s) at step 7 has shape [3, 1]"),
        (spaces.Box(-1, 1, (2,)), np.zeros(2), "has shape [2], not [3, 2]"),
        (spaces.Box(-1, 1, (2,)), None, "has shape NoneType, not [3, 2]"),
        (spaces.Discrete(3), np.array([0, 3, 1]), "observation of environment 11 at step 7 is 3, not of Discrete(3)"),
        (spaces.Discrete(3, start=1), np.array([1, 2, 0]), "of environment 12 at step 7 is 0, not of"),
        (spaces.MultiDiscrete([2, 3]), np.array([[0, 2], [1, 0], [2, 0]]), "of environment 12 at step 7 is [2 0]"),
        (spaces.MultiBinary(2), np.array([[0, 1], [2, 0], [1, 1]]), "of environment 11 at step 7 is [2 0], not of"),
        (PARTS, {"a": np.zeros((3, 2))}, "is a dict of a, not a dict of a, b"),
        (PARTS, np.zeros((3, 2)), "is ndarray, not a dict of a, b"),
        (PARTS, {"a": np.zeros((3, 1)), "b": np.ones(3)}, "the observation 'a' of 3 environment(s)"),
    ],
)
def test_others_are_named(space: spaces.Space[Any], obs: Any, message: str) -> None:
    with pytest.raises(FaultError) as caught:
        check_obs(obs, space, 7, range(10, 13))
    assert message in str(caught.value)


class Stretched(VecEnvWrapper):
    """Environments whose observations lose their last axis after some steps."""

    steps = 0

    def reset(self) -> Any:
        return self.venv.reset()

    def step_wait(self) -> Any:
        obs, *others = self.venv.step_wait()
        self.steps += 1
        return obs[:, :1] if self.steps == 20 else obs, *others


def test_the_first_observation_is_checked_too() -> None:
    class Outside(Probe):
        def reset(self, **_: Any) -> Any:
            return 4, {}

    with pytest.raises(FaultError, match="the observation of environment 0 at step 0 is 4, not of Discrete"):
        PPO("SRWMPolicy", Outside(spaces.Discrete(4)), n_steps=8).learn(8)


@pytest.mark.parametrize("algorithm", [PPO, IMPALA])
def test_a_vec_env_that_changes_its_shape_is_a_fault_of_the_run(algorithm: Any) -> None:
    env = Stretched(DummyVecEnv([lambda: gymnasium.make("CartPole-v1")] * 2))
    model = algorithm("SRWMPolicy", env, n_steps=16, policy_kwargs={"core_kwargs": {"hidden_size": 16}})
    with pytest.raises(FaultError, match=r"the observation of 2 environment\(s\) at step 38 has shape \[2, 1\]"):
        model.learn(128)
