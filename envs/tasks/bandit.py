"""The Bernoulli bandit of RL^2 (Duan et al. 2016, https://arxiv.org/abs/1611.02779): learn within an episode."""

from __future__ import annotations

from functools import cache

import numpy as np

from srwm_rl.envs.batch import Acted, Array, FloatArray, check_count
from srwm_rl.envs.levels import BoolArray, LevelRange, hash_uniform
from srwm_rl.envs.tasks.base import TaskBatch

LONGEST_EXACT = 20
"""Pulls up to which the Bayes-optimal return is a matter of seconds."""


class BanditBatch(TaskBatch):
    """Pull one of `n_arms` arms, `n_pulls` times; arm i pays 1 with a probability p_i ~ U[0, 1] fixed by the level.

    Whether a pull pays is a function of (level, pull, arm): two agents that make the same choice get the same luck, so
    their returns on one level can be compared in pairs. The observation says nothing (float32 `[n, 1]`, always 1): the
    agent learns from its own previous action and reward, which `VecMemoryInputs` adds.

    Args:
        n_envs: How many environments.
        levels: The levels that episodes are drawn from; a level fixes the arms and their luck.
        seed: Start of the random level sequences.
        n_arms: How many arms.
        n_pulls: Steps per episode.
    """

    games = ("bandit",)

    def __init__(
        self, n_envs: int, levels: str | LevelRange = "all", seed: int = 0, n_arms: int = 5, n_pulls: int = 10
    ) -> None:
        self.n_arms = check_count("n_arms", n_arms)
        self.n_pulls = check_count("n_pulls", n_pulls)
        super().__init__(n_envs, levels, seed, 1, self.n_arms, self.n_pulls)

    @classmethod
    def score_range(cls, **settings: int) -> tuple[float, float] | None:
        """Return the mean returns of a random and of the Bayes-optimal agent, or None above `LONGEST_EXACT` pulls."""
        n_pulls = settings.get("n_pulls", 10)
        if n_pulls > LONGEST_EXACT:
            return None
        return n_pulls / 2, bayes_optimal_return(settings.get("n_arms", 5), n_pulls)  # the arms are uniform

    def _begin_episodes(self, mask: BoolArray) -> None:
        self._chances = hash_uniform(self._level[:, None], 0, np.arange(self.n_arms))  # [n, n_arms]

    def observe(self) -> FloatArray:
        """Return observations that say nothing, `[n, 1]`."""
        return np.ones((self.n_envs, 1), np.float32)

    def _act(self, actions: Array) -> Acted:
        chances = self._chances[np.arange(self.n_envs), actions]
        paid = hash_uniform(self._level, 1 + self._clock, actions) < chances
        return paid.astype(np.float32), self._clock == self.n_pulls - 1, np.zeros(self.n_envs, np.bool_), None


@cache
def bayes_optimal_return(n_arms: int, n_pulls: int) -> float:
    """Return the highest mean return that any agent can have, by dynamic programming over the posterior.

    An arm that paid `w` times in `m` pulls pays next with probability (w + 1) / (m + 2). Only the sorted (w, m) of the
    arms matter, because arms are exchangeable.
    """

    @cache
    def value(arms: tuple[tuple[int, int], ...], pulls: int) -> float:
        if pulls == 0:
            return 0.0
        best = 0.0
        for wins, tries in set(arms):
            i = arms.index((wins, tries))
            rest, p = arms[:i] + arms[i + 1 :], (wins + 1) / (tries + 2)
            paid = 1.0 + value(tuple(sorted((*rest, (wins + 1, tries + 1)))), pulls - 1)
            best = max(best, p * paid + (1 - p) * value(tuple(sorted((*rest, (wins, tries + 1)))), pulls - 1))
        return best

    return value(((0, 0),) * n_arms, n_pulls)
