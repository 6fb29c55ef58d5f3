"""The columns of the policy: names of actions, and one column for the actions that do nothing."""

import numpy as np
import pytest
from gymnasium import spaces

from srwm_rl.scripts.video.panel import policy_columns
from srwm_rl.scripts.video.scene import PROCGEN_ACTIONS, Scene


def arrays(actions: list[int], n_actions: int) -> dict[str, np.ndarray]:
    choices = np.random.default_rng(0).dirichlet(np.ones(n_actions), len(actions)).astype(np.float32)
    return {"choices": choices, "actions": np.array(actions)}


def test_actions_that_do_nothing_share_a_column() -> None:
    scene, recorded = Scene("maze", 3), arrays([7, 9, 4], 15)
    names, values, taken = policy_columns(recorded, spaces.Discrete(15), scene.action_names(), scene.idle_actions())
    assert names == list(PROCGEN_ACTIONS[:9])
    np.testing.assert_allclose(values.sum(1), 1.0, rtol=1e-6)
    np.testing.assert_array_equal(values[:, 7], recorded["choices"][:, 7])
    np.testing.assert_allclose(values[:, 4], recorded["choices"][:, [4, *range(9, 15)]].sum(1), rtol=1e-6)
    assert taken.argmax(1).tolist() == [7, 4, 4]
    assert (taken.sum(1) == 1).all()


@pytest.mark.parametrize(
    ("scene", "names", "idle"),
    [
        (Scene("fruitbot", 0), PROCGEN_ACTIONS, (3, 4, 5, 10, 11, 12, 13, 14)),
        (Scene("starpilot", 0), PROCGEN_ACTIONS, (4,)),
        (Scene("maze", 0, shuffle_actions=True), (), ()),
        (Scene("bandit", 0, env_kwargs=("n_arms:3",)), ("arm 0", "arm 1", "arm 2"), ()),
        (Scene("parity", 0), ("even", "odd"), ()),
        (Scene("bandit", 0, shuffle_actions=True), (), ()),
        (Scene("CartPole-v1", 0), (), ()),
    ],
)
def test_names_are_those_of_the_game_or_task(scene: Scene, names: tuple[str, ...], idle: tuple[int, ...]) -> None:
    assert scene.action_names() == tuple(names)
    assert scene.idle_actions() == idle


def test_other_actions_are_numbered() -> None:
    assert policy_columns(arrays([1], 2), spaces.Discrete(2)).names == ["0", "1"]
    two = arrays([1], 5) | {"actions": np.array([[1, 2]])}
    names, values, taken = policy_columns(two, spaces.MultiDiscrete([2, 3]))
    assert names == ["0:0", "0:1", "1:0", "1:1", "1:2"]
    assert taken.tolist() == [[False, True, False, False, True]]
    assert values.shape == (1, 5)
