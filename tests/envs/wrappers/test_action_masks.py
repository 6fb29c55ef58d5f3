"""Action masks of Gymnasium environments on the command line's path."""

from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces

from srwm_rl.envs.gymnasium_batch import GymnasiumBatch
from srwm_rl.envs.make import make_vec_env
from srwm_rl.envs.wrappers.action_masks import ActionMaskObservation, has_action_masks
from srwm_rl.envs.wrappers.shuffled_actions import ShuffledActionsBatch
from srwm_rl.errors import FaultError, UserError


class Allowed(gymnasium.Env[Any, Any]):
    """Allows one action per step, drawn anew, and raises at any other; 5 steps."""

    def __init__(self, by: str = "method", pairs: bool = False, broken: Any = None) -> None:
        self.observation_space = spaces.Box(-1, 1, (2,))
        self.action_space = spaces.MultiDiscrete([2, 3]) if pairs else spaces.Discrete(4)
        self.by, self.broken = by, broken
        if by == "method":
            self.action_masks = lambda: self.mask

    def _draw(self) -> dict[str, Any]:
        sizes = self.action_space.nvec if isinstance(self.action_space, spaces.MultiDiscrete) else [4]
        self.allowed = [int(self.np_random.integers(n)) for n in sizes]
        self.mask: Any = np.concatenate([np.eye(n)[c] for n, c in zip(sizes, self.allowed, strict=True)])
        if self.broken is not None:
            self.mask = self.broken
        return {"action_mask": self.mask} if self.by == "info" else {}

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.t = 0
        return np.zeros(2, np.float32), self._draw()

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        assert np.atleast_1d(action).tolist() == self.allowed, "an action that is not allowed"
        self.t += 1
        return np.zeros(2, np.float32), 1.0, self.t == 5, False, self._draw()


gymnasium.register("test/Allowed-v0", Allowed)


def choose(mask: Any, sizes: list[int]) -> Any:
    parts = np.split(mask, np.cumsum(sizes)[:-1], axis=1)
    return np.stack([part.argmax(1) for part in parts], 1) if len(sizes) > 1 else mask.argmax(1)


@pytest.mark.parametrize("by", ["method", "info"])
@pytest.mark.parametrize("pairs", [False, True])
def test_masks_are_of_the_step_that_follows(by: str, pairs: bool) -> None:
    batch = GymnasiumBatch("test/Allowed-v0", 3, env_kwargs={"by": by, "pairs": pairs})
    sizes = [2, 3] if pairs else [4]
    assert batch.observation_space["action_mask"] == spaces.MultiBinary(sum(sizes))  # type: ignore[index]
    obs: Any = batch.reset()
    for _ in range(12):  # over two episode ends
        step = batch.step(choose(obs["action_mask"], sizes))
        obs = step.obs
        if step.final_obs is not None:
            assert step.final_obs["action_mask"].all()  # type: ignore[call-overload]


def test_environments_without_masks_stay_as_they_are() -> None:
    assert not has_action_masks(gymnasium.make("CartPole-v1"))
    assert not has_action_masks(gymnasium.make("Pendulum-v1"))
    assert not has_action_masks(ActionMaskObservation(Allowed()))
    assert GymnasiumBatch("CartPole-v1", 1).observation_space.shape == (4,)


def test_memory_inputs_keep_the_mask() -> None:
    env = make_vec_env("test/Allowed-v0", 2, "all", 0)
    obs: Any = env.reset()
    for _ in range(7):
        obs, *_ = env.step(obs["action_mask"].argmax(1))
        assert obs.keys() == {"observation", "action_mask", "previous_action", "previous_reward", "episode_step"}
    assert obs["action_mask"].sum(1).tolist() == [1, 1]


@pytest.mark.parametrize(("broken", "words"), [([0, 0, 0, 0], "allows no action"), ([1, 1], "must have 4 entries")])
def test_a_mask_that_does_not_fit_is_a_fault(broken: Any, words: str) -> None:
    with pytest.raises(FaultError, match=words):
        GymnasiumBatch("test/Allowed-v0", 1, env_kwargs={"broken": broken}).reset()


def test_masked_actions_cannot_be_shuffled() -> None:
    with pytest.raises(UserError, match="leave --shuffle-actions out"):
        ShuffledActionsBatch(GymnasiumBatch("test/Allowed-v0", 1))
