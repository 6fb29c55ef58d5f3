"""Play every level of a list equally often."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import compress, groupby
from operator import attrgetter
from typing import Annotated, Any, NamedTuple, Protocol

import numpy as np
from gymnasium import spaces
from msgspec import Meta
from stable_baselines3.common.vec_env import VecEnv

from srwm_rl.agents.evaluation.statistics import FloatArray
from srwm_rl.nn.spaces import ACTION_MASK, mask_size

State = tuple[np.ndarray, ...] | None
# The bounds are those of files.
Level = Annotated[int, Meta(ge=0, lt=2**31)]
Return = Annotated[float, Meta(ge=-1e12, le=1e12)]
Count = Annotated[int, Meta(ge=0, le=10**12)]


class Predictor(Protocol):
    """Acts as SB3 models do: an `Agent`, a model, a policy, `RandomAgent`."""

    def predict(
        self, observation: Any, state: State = None, episode_start: Any = None, deterministic: bool = False
    ) -> tuple[np.ndarray, State]:
        """Return actions and the next state."""


class RandomAgent:
    """Uniformly random actions, of those that an action mask in the observation allows."""

    def __init__(self, action_space: spaces.Space[Any], seed: int = 0) -> None:
        self.action_space = action_space
        action_space.seed(seed)

    def predict(self, observation: Any, *_: Any, **__: Any) -> tuple[np.ndarray, State]:
        """Return a random action for every environment."""
        part = next(iter(observation.values())) if isinstance(observation, dict) else observation
        masks = observation.get(ACTION_MASK) if isinstance(observation, dict) else None
        if masks is None or mask_size(self.action_space) != masks.shape[-1]:
            return np.stack([self.action_space.sample() for _ in part]), None
        return np.stack([self.action_space.sample(self._split(mask.astype(np.int8))) for mask in masks]), None

    def _split(self, mask: np.ndarray) -> Any:
        """Return a mask `[k]` as Gymnasium's `sample` takes it."""
        if isinstance(self.action_space, spaces.MultiDiscrete):
            return tuple(np.split(mask, np.cumsum(self.action_space.nvec)[:-1]))
        return mask


class Episode(NamedTuple):
    """One finished episode."""

    game: str
    level: Level
    episode_return: Return
    length: Count  # steps
    solved: bool | None  # None where the game cannot be solved


class Trial(NamedTuple):
    """The returns of one finished episode's attempts at its level, in order."""

    game: str
    level: Level
    returns: tuple[Return, ...]


class Answered(NamedTuple):
    """Which questions of one finished episode, in order, were answered right."""

    game: str
    level: Level
    right: tuple[bool, ...]


class Episodes(list[Episode]):
    """The episodes of one split.

    `trials` are those that consisted of attempts, whose returns they hold; `answered` those of environments with right
    answers.
    """

    def __init__(
        self, episodes: Iterable[Episode] = (), trials: Iterable[Trial] = (), answered: Iterable[Answered] = ()
    ) -> None:
        super().__init__(episodes)
        self.trials, self.answered = list(trials), list(answered)

    def in_order(self) -> Episodes:
        """Return the episodes sorted by game, level and result."""
        return Episodes(sorted(self), sorted(self.trials), sorted(self.answered))

    def games(self) -> dict[str, Episodes]:
        """Return the episodes of each game, in order of the names."""
        games: dict[str, Episodes] = {}
        for episode in sorted(self, key=attrgetter("game")):
            games.setdefault(episode.game, Episodes()).append(episode)
        return games

    def by_game(self) -> dict[str, Episodes]:
        """Return the episodes of each game and, if there are several, before them those of all."""
        games = self.games()
        return games if len(games) == 1 else {"all games": self, **games}

    def levels(self) -> list[int]:
        """Return the levels, in order."""
        return sorted({episode.level for episode in self})

    def level_means(self, field: str = "episode_return") -> FloatArray:
        """Return one number per game and level, `[n_levels]`: the mean of `field` over its repeats."""
        level = attrgetter("game", "level")
        groups = groupby(sorted(self, key=level), level)
        return np.array([np.mean([getattr(episode, field) for episode in group]) for _, group in groups], np.float64)

    def solved(self) -> FloatArray | None:
        """Return the solved fraction per game and level, `[n_levels]`, or None where some game cannot be solved."""
        return None if any(episode.solved is None for episode in self) else self.level_means("solved")


def play_levels(
    agent: Predictor, env: VecEnv, deterministic: bool = False, on_progress: Callable[[int], object] = lambda _: None
) -> Episodes:
    """Play a `srwm_rl.envs.LevelsVecEnv` (with or without memory inputs) until its `remaining` is 0.

    `on_progress` is called at every step with the number of episodes that it finished.
    """
    obs, episodes = env.reset(), Episodes()
    attempts: list[list[float]] = [[] for _ in range(env.num_envs)]  # returns within the running episodes
    questions = _Questions(env) if getattr(env, "has_answers", False) else None
    state: State = None
    starts = np.ones(env.num_envs, bool)
    actions = np.stack([env.action_space.sample() for _ in starts])  # environments without a level act, too
    rows = np.arange(env.num_envs)  # environments whose states `state` holds
    while env.remaining:  # type: ignore[attr-defined]
        busy = np.flatnonzero(env.busy)  # type: ignore[attr-defined]
        if len(busy) < len(rows) and state is not None:
            state = tuple(array[:, np.isin(rows, busy)] for array in state)
        rows = busy
        seen = {key: value[rows] for key, value in obs.items()} if isinstance(obs, dict) else obs[rows]
        actions[rows], state = agent.predict(seen, state, starts[rows], deterministic)
        if isinstance(obs, dict) and ACTION_MASK in obs and len(rows) < env.num_envs:
            idle = np.setdiff1d(np.arange(env.num_envs), rows)
            actions[idle], _ = RandomAgent(env.action_space).predict({key: value[idle] for key, value in obs.items()})
        if questions is not None:
            questions.add(actions)
        obs, _, starts, infos = env.step(actions)
        if questions is not None:
            episodes.answered += questions.ended(starts, infos)
        episodes.trials += _ended_trials(attempts, starts, infos)
        finished = [
            Episode(info["game"], info["level"], info["episode"]["r"], info["episode"]["l"], info.get("is_success"))
            for info in compress(infos, starts)
            if "level" in info
        ]
        episodes += finished
        on_progress(len(finished))
    return episodes


class _Questions:
    """Compares the actions in running episodes with the right answers."""

    def __init__(self, env: Any) -> None:
        self.env = env
        self.right: list[list[bool]] = [[] for _ in range(env.num_envs)]

    def add(self, actions: np.ndarray) -> None:
        """Count the actions `[n]` on the current observations."""
        answers = self.env.answers()
        for i in np.flatnonzero(answers >= 0):
            self.right[i].append(bool(actions[i] == answers[i]))

    def ended(self, dones: np.ndarray, infos: list[dict[str, Any]]) -> list[Answered]:
        """Return the episodes that ended, and begin new ones."""
        ended = []
        for i in np.flatnonzero(dones):
            if "level" in infos[i]:
                ended.append(Answered(infos[i]["game"], infos[i]["level"], tuple(self.right[i])))
            self.right[i] = []
        return ended


def _ended_trials(attempts: list[list[float]], dones: np.ndarray, infos: list[dict[str, Any]]) -> list[Trial]:
    """Add the attempts that ended to the running ones' returns by environment; return the trials that ended."""
    trials = []
    for i, info in enumerate(infos):
        if "attempt_return" in info:
            attempts[i].append(info["attempt_return"])
            if dones[i]:
                trials.append(Trial(info["game"], info["level"], tuple(attempts[i])))
                attempts[i] = []
    return trials
