"""Evaluation: every level is played k times, with the same results for any number of environments."""

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces

from srwm_rl import SRWMPolicy
from srwm_rl.agents.evaluation.play_levels import Episode, Episodes, RandomAgent, play_levels
from srwm_rl.envs import make_levels_env


def policy(env: Any) -> SRWMPolicy:
    torch.manual_seed(0)
    kwargs = {"core_kwargs": {"hidden_size": 16, "n_layers": 1}, "encoder_kwargs": {"cnn": {"channels": [4]}}}
    return SRWMPolicy(env.observation_space, env.action_space, lambda _: 0.0, **kwargs)  # type: ignore[arg-type]


@pytest.mark.parametrize("n_envs", [1, 3, 16])
def test_every_level_is_played_k_times(n_envs: int) -> None:
    env = make_levels_env("recall", n_envs, "5:12", 2, 0)
    progress: list[int] = []
    episodes = play_levels(policy(env), env, on_progress=progress.append)
    assert Counter(episode.level for episode in episodes) == dict.fromkeys(range(5, 12), 2)
    assert sum(progress) == 14


def test_returns_do_not_depend_on_the_number_of_environments() -> None:
    """The memory of a running environment stays its own when others are finished."""
    results = []
    for n_envs in (1, 4, 7):
        env = make_levels_env("bandit", n_envs, "0:9", 1, 0)
        results.append(sorted(play_levels(policy(env), env, deterministic=True)))
    assert results[0] == results[1] == results[2]
    assert len({episode.episode_return for episode in results[0]}) > 1


class FrameHash:
    """Act by the frame alone: erratic, so that episodes end, and the same for the same frame."""

    def predict(
        self, observation: Any, state: Any = None, episode_start: Any = None, deterministic: bool = False
    ) -> Any:
        frames = observation["observation"].reshape(len(observation["observation"]), -1)
        return frames.astype(np.int64).sum(axis=1) % 15, state


def test_procgen_returns_do_not_depend_on_the_number_of_environments() -> None:
    results = []
    for n_envs in (2, 5):
        env = make_levels_env("dodgeball", n_envs, "0:5", 1, 0)
        results.append(sorted(play_levels(FrameHash(), env)))
        env.close()
    assert results[0] == results[1]
    assert len({episode.length for episode in results[0]}) > 1


def test_random_agent_is_uniform_and_repeatable() -> None:
    agents = [RandomAgent(spaces.Discrete(4), seed=1) for _ in range(2)]
    draws = [np.concatenate([agent.predict(np.zeros((50, 3)))[0] for _ in range(20)]) for agent in agents]
    np.testing.assert_array_equal(*draws)
    assert all(200 < count < 300 for count in Counter(draws[0].tolist()).values())


def test_level_means_average_repeats_first() -> None:
    first = [Episode("a", 0, 1.0, 5, True), Episode("a", 0, 3.0, 5, False)]
    episodes = Episodes([*first, Episode("a", 1, 8.0, 5, True), Episode("b", 0, 4.0, 5, True)])
    assert list(episodes.games()) == ["a", "b"]
    assert list(episodes.by_game()) == ["all games", "a", "b"]
    assert list(episodes.games()["a"].by_game()) == ["a"]
    assert episodes.levels() == [0, 1]
    assert episodes.level_means().tolist() == [2.0, 8.0, 4.0]
    assert episodes.games()["a"].level_means().tolist() == [2.0, 8.0]
    solved = episodes.solved()
    assert solved is not None
    assert solved.tolist() == [0.5, 1.0, 1.0]
    assert Episodes([Episode("a", 0, 1.0, 5, None)]).solved() is None
