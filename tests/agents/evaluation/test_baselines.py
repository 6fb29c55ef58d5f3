"""Constant actions: what is tried for each kind of space, and the choice, against playing everything."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from gymnasium import spaces

from srwm_rl.agents.evaluation.baselines import (
    MAX_ACTIONS,
    ConstantAgent,
    best_constant_action,
    constant_actions,
)
from srwm_rl.agents.evaluation.play_levels import Episode, Episodes, Predictor, play_levels
from srwm_rl.envs import make_levels_env

SPACES = [
    spaces.Discrete(15),
    spaces.Discrete(3, start=-1),
    spaces.Discrete(500),
    spaces.MultiDiscrete([3, 2, 4]),
    spaces.MultiDiscrete(np.array([[2, 3], [4, 2]])),
    spaces.MultiBinary(4),
    spaces.MultiBinary([2, 3]),
    spaces.Box(-2.0, 2.0, (1,)),
    spaces.Box(np.array([-1.0, 0.0], np.float32), np.array([3.0, np.inf], np.float32)),
    spaces.Box(-np.inf, np.inf, (2, 2), np.float64),
    spaces.Box(-1.0, 1.0, (200,)),
]


@pytest.mark.parametrize("space", SPACES, ids=str)
def test_constant_actions_lie_in_the_space_and_differ(space: spaces.Space[Any]) -> None:
    tried = constant_actions(space)
    assert 1 < len(tried.actions) <= MAX_ACTIONS
    for action in tried.actions.values():
        assert space.contains(action if action.shape else action[()])
    assert len({action.tobytes() for action in tried.actions.values()}) == len(tried.actions)


def test_the_actions_that_are_tried() -> None:
    assert list(constant_actions(spaces.Discrete(3, start=2)).actions) == ["2", "3", "4"]
    tried = constant_actions(spaces.MultiDiscrete([3, 2]))
    assert [action.tolist() for action in tried.actions.values()] == [[0, 0], [2, 1], [1, 0], [2, 0], [0, 1]]
    assert tried.which == "zeros, the highest, each single choice (5)"
    tried = constant_actions(spaces.Box(0.0, 2.0, (2,)))
    expected = [[1, 1], [0, 0], [2, 2], [0, 1], [2, 1], [1, 0], [1, 2]]
    assert [action.tolist() for action in tried.actions.values()] == expected
    assert list(tried.actions)[:4] == ["centre", "lowest", "highest", "component 0 at lowest"]
    assert constant_actions(spaces.Discrete(500)).which == "64 of 500: each action"
    with pytest.raises(TypeError, match="no constant actions"):
        constant_actions(spaces.Text(3))


@pytest.mark.parametrize("obs", [np.zeros((5, 3)), {"a": np.zeros((5, 3)), "b": np.zeros(5)}])
def test_a_constant_agent_repeats_its_action(obs: Any) -> None:
    actions, state = ConstantAgent(np.array([1, 2])).predict(obs, None, np.ones(5, bool), deterministic=True)
    assert actions.tolist() == [[1, 2]] * 5
    assert state is None


def play(player: Predictor, levels: Sequence[int]) -> Episodes:
    env = make_levels_env("bandit", 8, levels, 1, seed=0)
    try:
        return play_levels(player, env)
    finally:
        env.close()


def test_the_best_constant_action_is_the_one_that_playing_all_levels_finds() -> None:
    tried, levels = constant_actions(play_space()), list(range(100))
    means = {name: play(ConstantAgent(action), levels).level_means().mean() for name, action in tried.actions.items()}
    best = best_constant_action(play, tried.actions, levels)
    assert best.name == max(means, key=lambda name: means[name])
    assert best.mean_return == means[best.name]
    assert best.action == tried.actions[best.name]


def play_space() -> spaces.Space[Any]:
    env = make_levels_env("bandit", 1, [0], 1, seed=0)
    env.close()
    return env.action_space


@pytest.mark.parametrize("n_levels", [1, 24, 25, 100])
def test_every_action_plays_the_first_round_and_the_finalists_all_levels(n_levels: int) -> None:
    played: dict[int, list[int]] = {}

    def fake(player: Any, levels: Sequence[int]) -> Episodes:
        action = int(player.action)
        played.setdefault(action, []).append(len(levels))
        return Episodes(Episode("game", level, float(action % 7), 1, None) for level in levels)

    best = best_constant_action(fake, constant_actions(spaces.Discrete(10)).actions, list(range(n_levels)))
    first = -(-n_levels // 4) if n_levels >= 25 else n_levels
    assert best.name == "6"
    assert {action: rounds for action, rounds in played.items() if len(rounds) > 1} == {
        action: [first, n_levels] for action in (4, 5, 6)
    }
    assert all(rounds[0] == first for rounds in played.values())
    assert len(played) == 10
