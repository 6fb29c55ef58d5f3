"""Stacked observations: equal to those of SB3's `VecFrameStack`, and exact when restored."""

from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces
from stable_baselines3.common.vec_env import VecFrameStack

from srwm_rl.envs import FrameStackBatch, GymnasiumBatch, make_batch_env, make_vec_env
from srwm_rl.envs.batch import BatchEnv
from srwm_rl.errors import UserError


class Masked(gymnasium.Env[Any, Any]):
    """An environment with a Dict of Boxes, a Discrete part and an action mask."""

    observation_space = spaces.Dict({
        "image": spaces.Box(0, 255, (3, 4, 2), np.uint8),
        "vector": spaces.Box(1.0, 2.0, (2,), np.float32),
        "kind": spaces.Discrete(3),
    })  # fmt: skip
    action_space = spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.t = 0
        return self._obs(), {"action_mask": np.array([1, 0])}

    def step(self, action: Any) -> Any:
        self.t += 1
        return self._obs(), 0.0, self.t == 4, False, {"action_mask": np.array([0, 1])}

    def _obs(self) -> Any:
        observation_space: spaces.Dict = self.observation_space
        observation_space.seed(int(self.np_random.integers(1000)))
        return observation_space.sample()


class ChannelsFirst(Masked):
    """An environment with images of two channels, which come first."""

    observation_space = spaces.Box(0, 255, (2, 5, 5), np.uint8)  # type: ignore[assignment]

    def reset(self, **kwargs: Any) -> Any:
        return super().reset(**kwargs)[0], {}

    def step(self, action: Any) -> Any:
        return *super().step(action)[:4], {}


class Scalar(ChannelsFirst):
    """An environment with observations of one number."""

    observation_space = spaces.Box(0, 1, ())  # type: ignore[assignment]


gymnasium.register("Masked-v0", Masked)
gymnasium.register("ChannelsFirst-v0", ChannelsFirst)
gymnasium.register("Scalar-v0", Scalar)


def walk(env: BatchEnv, n_steps: int, seed: int = 0) -> list[Any]:
    """Return the observations of random play, which begins without a reset."""
    rng, seen = np.random.default_rng(seed), [env.observe()]
    for _ in range(n_steps):
        step = env.step(rng.integers(env.action_space.n, size=env.n_envs))
        seen += [step.obs, step.rewards]
    return seen


def assert_equal(first: Any, second: Any) -> None:
    parts = (first, second) if isinstance(first, dict) else ({"": first}, {"": second})
    assert parts[0].keys() == parts[1].keys()
    for key in parts[0]:
        np.testing.assert_array_equal(parts[0][key], parts[1][key])


@pytest.mark.parametrize("name", ["CartPole-v1", "coinrun", "repeat_previous", "ChannelsFirst-v0"])
def test_stacks_are_those_of_sb3(name: str) -> None:
    ours = make_vec_env(name, 3, "0:50", 0, inputs=(), frame_stack=4)
    sb3 = VecFrameStack(make_vec_env(name, 3, "0:50", 0, inputs=()), 4)
    assert ours.observation_space.shape == sb3.observation_space.shape
    assert_equal(ours.reset(), sb3.reset())
    rng, ends = np.random.default_rng(0), 0
    for _ in range(120):
        actions = rng.integers(ours.action_space.n, size=3)  # type: ignore[attr-defined]
        (obs, _, dones, infos), (their_obs, _, _, their_infos) = ours.step(actions), sb3.step(actions)
        assert_equal(obs, their_obs)
        for info, theirs in zip(infos, their_infos, strict=True):
            assert ("terminal_observation" in info) == ("terminal_observation" in theirs)
            if "terminal_observation" in theirs:
                assert_equal(info["terminal_observation"], theirs["terminal_observation"])
        ends += dones.sum()
    assert name == "coinrun" or ends > 5


@pytest.mark.parametrize(("shape", "stacked"), [((7, 7, 20), (7, 7, 40)), ((20, 7, 7), (40, 7, 7)), ((6, 5), (6, 10))])
def test_images_are_stacked_on_their_channels(shape: Any, stacked: Any) -> None:
    class Picture(ChannelsFirst):
        observation_space = spaces.Box(0, 255, shape, np.uint8)  # type: ignore[assignment]

    batch = GymnasiumBatch("ChannelsFirst-v0", 2, "0:9", 0, wrappers=(lambda _: Picture(),))
    assert FrameStackBatch(batch, 2).observation_space.shape == stacked


def test_of_a_dict_the_boxes_are_stacked() -> None:
    env = make_batch_env("Masked-v0", 2, "0:9", 0, frame_stack=3)
    shapes = {key: space.shape for key, space in env.observation_space.spaces.items()}
    assert shapes == {"image": (3, 4, 6), "vector": (6,), "kind": (), "action_mask": (2,)}
    assert env.observation_space["vector"].low.tolist() == [0.0] * 6, "zeros stand for no observation yet"
    first = env.reset()
    assert (first["vector"][:, :4] == 0).all()
    assert (first["vector"][:, 4:] >= 1).all()
    assert first["action_mask"].tolist() == [[1, 0]] * 2
    second = env.step(np.zeros(2, int)).obs
    np.testing.assert_array_equal(second["vector"][:, 2:4], first["vector"][:, 4:])
    np.testing.assert_array_equal(second["image"][..., 2:4], first["image"][..., 4:])
    for _ in range(3):
        step = env.step(np.zeros(2, int))
    assert step.terminated.all()
    assert step.final_obs is not None
    assert (step.final_obs["vector"] >= 1).all()  # type: ignore[call-overload]
    assert (step.obs["vector"][:, :4] == 0).all()  # type: ignore[call-overload]
    assert env.observation_space.contains({key: part[0] for key, part in step.obs.items()})  # type: ignore[union-attr]


@pytest.mark.parametrize("options", [{}, {"attempts": 2}, {"attempts": 2, "shuffle_actions": True}])
def test_a_restored_state_goes_on_exactly(options: dict[str, Any]) -> None:
    env = make_batch_env("repeat_previous", 3, "0:50", 0, frame_stack=3, **options)
    env.reset()
    walk(env, 70)
    state = env.get_state()
    after = walk(env, 60, seed=1)
    other = make_batch_env("repeat_previous", 3, "0:50", 5, frame_stack=3, **options)
    other.reset()
    walk(other, 11)
    other.set_state(state)
    for first, second in zip(walk(other, 60, seed=1), after, strict=True):
        assert_equal(first, second)
    with pytest.raises(UserError, match="n_stack 3, this environment 2"):
        make_batch_env("repeat_previous", 3, "0:50", 0, frame_stack=2).set_state(
            make_batch_env("repeat_previous", 3, "0:50", 0, frame_stack=3).get_state()
        )


def test_observations_that_were_given_do_not_change() -> None:
    env = make_batch_env("CartPole-v1", 2, "0:9", 0, frame_stack=2)
    first = env.reset()
    kept = np.array(first)
    env.step(np.zeros(2, int))
    np.testing.assert_array_equal(first, kept)


def test_an_attempt_begins_with_a_new_stack() -> None:
    env = make_batch_env("CartPole-v1", 1, "0:9", 0, attempts=2, frame_stack=2)
    obs = env.reset()
    assert obs["attempt_begins"].shape == (1, 1)
    while True:
        step = env.step(np.zeros(1, int))
        if step.info["attempt_ended"][0]:
            break
    np.testing.assert_array_equal(step.obs["observation"], obs["observation"])  # type: ignore[call-overload]
    assert (step.obs["observation"][:, :4] == 0).all()  # type: ignore[call-overload]


@pytest.mark.parametrize(("name", "n_stack", "message"), [
    ("FrozenLake-v1", 2, "only Box observations with an axis can be stacked; FrozenLake-v1 has Discrete"),
    ("Scalar-v0", 2, r"only Box observations with an axis .* Scalar-v0 has Box\(0.0, 1.0, \(\), float32\)"),
    ("CartPole-v1", 0, "frame_stack must be a whole number above 0"),
])  # fmt: skip
def test_what_cannot_be_stacked_is_refused(name: str, n_stack: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        FrameStackBatch(GymnasiumBatch(name, 1), n_stack)
