"""The Bernoulli bandit of RL^2 (Duan et al. 2016, https://arxiv.org/abs/1611.02779): learn within an episode."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np

from srwm_rl.envs.batch import Acted, Array, FloatArray, check_count
from srwm_rl.envs.levels import BoolArray, IntArray, LevelRange, check_levels, hash_uniform
from srwm_rl.envs.tasks.bandit_policies import (
    BayesOptimal,
    Policy,
    Results,
    epsilon_greedy,
    gittins_index,
    thompson_sampling,
    ucb1,
)
from srwm_rl.envs.tasks.base import TaskBatch

LONGEST_EXACT = 20
"""Pulls up to which the Bayes-optimal return is a matter of seconds."""

LONGEST_GITTINS = 100
"""Pulls up to which the table of Gittins indices takes a second."""

LONGEST_PLAYED = 15
"""Pulls up to which the Bayes-optimal policy can be played on hundreds of levels in a second."""


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
    best_averages_luck = True

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

    @classmethod
    def reference_returns(cls, levels: Sequence[int] | IntArray | LevelRange, **settings: Any) -> dict[str, FloatArray]:
        """Return the returns of classical policies; the Gittins index and the Bayes-optimal one where affordable."""
        levels = check_levels(levels)
        env = cls(len(levels), **settings)
        policies: dict[str, Policy] = {
            "Thompson sampling": thompson_sampling(),
            "UCB1": ucb1,
            "epsilon-greedy": epsilon_greedy,
        }
        if env.n_pulls <= LONGEST_GITTINS:
            policies["Gittins index"] = gittins_index(env.n_pulls)
        if env.n_pulls <= LONGEST_PLAYED:
            policies["Bayes-optimal"] = BayesOptimal(env.n_pulls)
        return {name: play_bandits(env, levels, policy) for name, policy in policies.items()}

    @classmethod
    def feature_names(cls, **settings: Any) -> tuple[str, ...]:
        """Return the names of an observation's numbers."""
        return ("always 1",)

    @classmethod
    def action_names(cls, **settings: Any) -> tuple[str, ...]:
        """Return the names of the actions."""
        return tuple(f"arm {i}" for i in range(settings.get("n_arms", 5)))

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
    """Return the highest mean return that any agent can have; see `BayesOptimal`."""
    return BayesOptimal(n_pulls).value(((0, 0),) * n_arms, n_pulls)


def play_bandits(env: BanditBatch, levels: IntArray, policy: Policy) -> FloatArray:
    """Return what a policy earns on each level, one level per environment, `[n]`."""
    rows, total = np.arange(env.n_envs), np.zeros(env.n_envs, np.float32)
    wins, tries = np.zeros((2, env.n_envs, env.n_arms))
    env.reset(levels=levels)
    for pull in range(env.n_pulls):
        arms = policy(Results(levels, pull, wins, tries))
        rewards = env.step(arms).rewards
        wins[rows, arms] += rewards
        tries[rows, arms] += 1
        total += rewards
    return total
