"""Play every level of a list equally often."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.vec_env import VecEnv

from srwm_rl.agents.evaluation.statistics import FloatArray

State = tuple[np.ndarray, ...] | None


class Predictor(Protocol):
    """Acts as SB3 models do: an `Agent`, a model, a policy, `RandomAgent`."""

    def predict(
        self, observation: Any, state: State = None, episode_start: Any = None, deterministic: bool = False
    ) -> tuple[np.ndarray, State]:
        """Return actions and the next state."""


class RandomAgent:
    """Uniformly random actions."""

    def __init__(self, action_space: spaces.Space[Any], seed: int = 0) -> None:
        self.action_space = action_space
        action_space.seed(seed)

    def predict(
        self, observation: Any, state: State = None, episode_start: Any = None, deterministic: bool = False
    ) -> tuple[np.ndarray, State]:
        """Return a random action for every environment."""
        return np.stack([self.action_space.sample() for _ in range(batch_size(observation))]), None


def batch_size(observation: Any) -> int:
    """Return B of observations `[B, ...]` or of a dict of such."""
    return len(next(iter(observation.values())) if isinstance(observation, dict) else observation)


class Episode(NamedTuple):
    """One finished episode."""

    game: str
    level: int
    episode_return: float
    length: int  # steps
    solved: bool | None  # None where the game cannot be solved


class Episodes(list[Episode]):
    """The episodes of one split."""

    def games(self) -> list[str]:
        """Return the games, in order of their names."""
        return sorted({episode.game for episode in self})

    def of(self, game: str) -> Episodes:
        """Return one game's episodes."""
        return Episodes(episode for episode in self if episode.game == game)

    def level_means(self, value: Callable[[Episode], float] = lambda episode: episode.episode_return) -> FloatArray:
        """Return one number per game and level, `[n_levels]`: the mean of `value` over its repeats."""
        by_level: dict[tuple[str, int], list[float]] = {}
        for episode in self:
            by_level.setdefault((episode.game, episode.level), []).append(value(episode))
        return np.array([np.mean(by_level[key]) for key in sorted(by_level)], np.float64)

    def solved(self) -> FloatArray | None:
        """Return the solved fraction per game and level, `[n_levels]`, or None where some game cannot be solved."""
        if any(episode.solved is None for episode in self):
            return None
        return self.level_means(lambda episode: float(bool(episode.solved)))


def play_levels(
    agent: Predictor, env: VecEnv, deterministic: bool = False, on_progress: Callable[[int], None] = lambda _: None
) -> Episodes:
    """Play a `srwm_rl.envs.LevelsVecEnv` (with or without memory inputs) until its `remaining` is 0.

    `on_progress` is called at every step with the number of episodes that it finished.
    """
    obs, episodes = env.reset(), Episodes()
    state: State = None
    starts = np.ones(env.num_envs, bool)
    actions = np.stack([env.action_space.sample() for _ in starts])  # environments without a level act, too
    rows = np.arange(env.num_envs)  # environments whose states `state` holds
    while env.remaining:  # type: ignore[attr-defined]
        busy = np.flatnonzero(env.busy)  # type: ignore[attr-defined]
        if len(busy) < len(rows) and state is not None:
            state = tuple(array[:, np.isin(rows, busy)] for array in state)
        rows = busy
        actions[rows], state = agent.predict(_rows(obs, rows), state, starts[rows], deterministic)
        obs, _, starts, infos = env.step(actions)
        finished = [infos[i] for i in np.flatnonzero(starts) if "level" in infos[i]]
        for info in finished:
            episode = info["episode"]
            episodes.append(Episode(info["game"], info["level"], episode["r"], episode["l"], info.get("is_success")))
        on_progress(len(finished))
    return episodes


def _rows(obs: Any, rows: np.ndarray) -> Any:
    return {key: value[rows] for key, value in obs.items()} if isinstance(obs, dict) else obs[rows]
