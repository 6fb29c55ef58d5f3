"""Play every level of a list exactly as often as asked, and say what came of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.vec_env import VecEnv

from srwm_rl.agents.evaluation.statistics import FloatArray


class Predictor(Protocol):
    """Whatever acts as SB3 models do: an `Agent`, a model, a policy, `RandomAgent`."""

    def predict(
        self,
        observation: Any,
        state: tuple[np.ndarray, ...] | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
    ) -> tuple[np.ndarray, tuple[np.ndarray, ...] | None]:
        """Return actions and the next state."""


class RandomAgent:
    """Uniformly random actions: what a score has to be compared with."""

    def __init__(self, action_space: spaces.Space[Any], seed: int = 0) -> None:
        self.action_space = action_space
        action_space.seed(seed)

    def predict(
        self,
        observation: Any,
        state: tuple[np.ndarray, ...] | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
    ) -> tuple[np.ndarray, tuple[np.ndarray, ...] | None]:
        """Return a random action for every environment."""
        first = next(iter(observation.values())) if isinstance(observation, dict) else observation
        return np.stack([self.action_space.sample() for _ in range(len(first))]), None


class Episode(NamedTuple):
    """One finished episode."""

    game: str
    level: int
    episode_return: float
    length: int  # steps
    solved: bool | None  # None where the game has no such notion


class Episodes(list[Episode]):
    """The episodes of one split."""

    def games(self) -> list[str]:
        """Return the games, in order of their names."""
        return sorted({each.game for each in self})

    def of(self, game: str) -> Episodes:
        """Return one game's episodes."""
        return Episodes(each for each in self if each.game == game)

    def level_means(self, value: Callable[[Episode], float] = lambda e: e.episode_return) -> FloatArray:
        """Return one number per game and level, `[n_levels]`: the mean of `value` over its repeats."""
        by_level: dict[tuple[str, int], list[float]] = {}
        for each in self:
            by_level.setdefault((each.game, each.level), []).append(value(each))
        return np.array([np.mean(by_level[key]) for key in sorted(by_level)], np.float64)

    def solved(self) -> FloatArray | None:
        """Return the solved fraction per game and level, or None where some game has no such notion."""
        if any(each.solved is None for each in self):
            return None
        return self.level_means(lambda each: float(bool(each.solved)))


def play_levels(
    agent: Predictor, env: VecEnv, deterministic: bool = False, on_progress: Callable[[int], None] = lambda _: None
) -> Episodes:
    """Play a `srwm_rl.envs.LevelsVecEnv` (with or without memory inputs) to its end.

    Args:
        agent: what acts.
        env: hands out levels until its `remaining` is 0.
        deterministic: the most probable action instead of a sample.
        on_progress: called with the number of episodes finished since the last call.
    """
    return Episodes(_play(agent, env, deterministic, on_progress))


def _play(agent: Predictor, env: VecEnv, deterministic: bool, on_progress: Callable[[int], None]) -> Iterator[Episode]:
    obs = env.reset()
    state: tuple[np.ndarray, ...] | None = None
    starts = np.ones(env.num_envs, bool)
    idle = np.stack([env.action_space.sample() for _ in range(env.num_envs)])  # what environments without work do
    rows = np.arange(env.num_envs)  # of the environments in the present state
    while env.remaining:  # type: ignore[attr-defined]
        busy = np.flatnonzero(env.busy)  # type: ignore[attr-defined]
        if len(busy) < len(rows) and state is not None:
            state = tuple(each[:, np.isin(rows, busy)] for each in state)
        rows = busy
        actions, state = agent.predict(_rows(obs, rows), state, starts[rows], deterministic)
        idle[rows] = actions
        obs, _, starts, infos = env.step(idle)
        finished = [infos[i] for i in np.flatnonzero(starts) if "level" in infos[i]]
        for info in finished:
            episode = info["episode"]
            yield Episode(info["game"], info["level"], episode["r"], episode["l"], info.get("is_success"))
        on_progress(len(finished))


def _rows(obs: Any, rows: np.ndarray) -> Any:
    return {key: value[rows] for key, value in obs.items()} if isinstance(obs, dict) else obs[rows]
