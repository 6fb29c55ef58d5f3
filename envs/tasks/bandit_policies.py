"""Classical policies for Bernoulli bandits, for many bandits at once."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import numpy as np

from srwm_rl.envs.batch import Array, FloatArray
from srwm_rl.envs.levels import IntArray, hash_uniform

EPSILON = 0.1
"""Share of random pulls of the epsilon-greedy policy."""
RATES = 200
"""Resolution of the Gittins indices."""
_NOISE = 2**32  # second key of the hashes: no pull of an episode has this number


class Results(NamedTuple):
    """What a policy knows after `pull` pulls of each bandit."""

    levels: IntArray
    """The bandits, `[n]`."""
    pull: int
    wins: Array
    """Pulls that paid, float64 `[n, n_arms]`."""
    tries: Array
    """Pulls, float64 `[n, n_arms]`."""


Policy = Callable[[Results], Array]
"""Maps results to the arms to pull, `[n]`."""


def ucb1(results: Results) -> Array:
    """Pull the arm with the highest mean + sqrt(2 ln t / pulls) (Auer et al. 2002, figure 1), unknown arms first."""
    bonus = np.sqrt(2 * np.log(max(results.pull, 1)) / np.maximum(results.tries, 1))
    return _argmax(np.where(results.tries > 0, _means(results) + bonus, np.inf), results)


def epsilon_greedy(results: Results) -> Array:
    """Pull a random arm with probability `EPSILON`, else the one with the highest mean, unknown arms first."""
    best = _argmax(np.where(results.tries > 0, _means(results), np.inf), results)
    random = _noise(results, results.wins.shape[1])[:, 0] < EPSILON
    arms: Array = np.where(random, _noise(results).argmax(axis=1), best)
    return arms


def thompson_sampling() -> Policy:
    """Return the policy that draws each arm's chance from its posterior, Beta(1, 1) at first, and pulls the highest.

    Each bandit has a random generator of its own, seeded with its level.
    """
    generators: list[np.random.Generator] = []

    def pull(results: Results) -> Array:
        if not generators:
            generators.extend(np.random.default_rng([_NOISE, level]) for level in results.levels.tolist())
        wins, losses = results.wins + 1, results.tries - results.wins + 1
        drawn = [rng.beta(*counts) for rng, *counts in zip(generators, wins, losses, strict=True)]
        arms: Array = np.array(drawn).argmax(axis=1)
        return arms

    return pull


def gittins_index(n_pulls: int) -> Policy:
    """Return the policy that pulls the arm with the highest finite-horizon Gittins index; see `gittins_table`."""
    table = gittins_table(n_pulls)

    def pull(results: Results) -> Array:
        wins, losses = results.wins.astype(int), (results.tries - results.wins).astype(int)
        return _argmax(table[n_pulls - results.pull, wins, losses], results)

    return pull


@cache
def gittins_table(n_pulls: int) -> FloatArray:
    """Return the Gittins indices of an arm with a chance drawn from U[0, 1], `[pulls left, wins, losses]`.

    The index is the highest mean reward per pull that the arm can earn until the best time to stop (Gittins 1979;
    Niño-Mora 2011 for finite horizons), to within 1 / `RATES`: the rate at which pulling on, at that price, earns 0.

    Args:
        n_pulls: The longest horizon; time grows with its third power.
    """
    rates = (np.arange(RATES) + 0.5) / RATES
    counts = np.arange(n_pulls)
    p = ((counts[:, None] + 1) / (counts[:, None] + counts + 2))[..., None]  # chance that the next pull pays
    gain = np.zeros((n_pulls + 1, n_pulls + 1, RATES))  # [wins, losses, rate]: of pulling on until the best time
    table = np.zeros((n_pulls + 1, n_pulls, n_pulls), np.float32)
    for left in range(1, n_pulls + 1):
        n = n_pulls - left + 1
        now = p[:n, :n]
        pulling = now - rates + now * gain[1 : n + 1, :n] + (1 - now) * gain[:n, 1 : n + 1]
        table[left, :n, :n] = (pulling > 0).mean(axis=-1)
        gain[:n, :n] = np.maximum(pulling, 0.0)
    return table


Arms = tuple[tuple[int, int], ...]
"""The sorted (wins, tries) of a bandit's arms: arms are exchangeable, so their order does not matter."""


class BayesOptimal:
    """The policy with the highest mean return for arms drawn from U[0, 1], by dynamic programming over the posterior.

    An arm that paid `w` times in `m` pulls pays next with probability (w + 1) / (m + 2).

    Args:
        n_pulls: Pulls per bandit; time and memory grow with its fourth power and more.
    """

    def __init__(self, n_pulls: int) -> None:
        self.n_pulls = n_pulls
        self.value = cache(self._value)

    def _value(self, arms: Arms, pulls: int) -> float:
        """Return the mean return of the best play with `pulls` pulls left."""
        return max(self.arm_value(arms, arm, pulls) for arm in set(arms)) if pulls else 0.0

    def arm_value(self, arms: Arms, arm: tuple[int, int], pulls: int) -> float:
        """Return the mean return of pulling one arm and playing best afterwards."""
        i = arms.index(arm)
        rest, (wins, tries) = arms[:i] + arms[i + 1 :], arm
        p = (wins + 1) / (tries + 2)
        paid = 1.0 + self.value(tuple(sorted((*rest, (wins + 1, tries + 1)))), pulls - 1)
        return p * paid + (1 - p) * self.value(tuple(sorted((*rest, (wins, tries + 1)))), pulls - 1)

    def __call__(self, results: Results) -> Array:
        """Return the best arms, `[n]`; of equal ones the first."""
        left = self.n_pulls - results.pull
        counts = np.stack((results.wins, results.tries), axis=-1).astype(int).tolist()
        chosen: dict[Arms, tuple[int, int]] = {}
        arms = []
        for bandit in counts:
            pairs = [(wins, tries) for wins, tries in bandit]
            key = tuple(sorted(pairs))
            if key not in chosen:
                chosen[key] = max(sorted(set(key)), key=lambda arm: self.arm_value(key, arm, left))
            arms.append(pairs.index(chosen[key]))
        return np.array(arms)


def _means(results: Results) -> Array:
    means: Array = results.wins / np.maximum(results.tries, 1)
    return means


def _noise(results: Results, *keys: int) -> Array:
    """Return numbers uniform in [0, 1), `[n, n_arms]`, a function of (level, pull, keys)."""
    arms = np.arange(results.wins.shape[1])
    return hash_uniform(results.levels[:, None], _NOISE + results.pull, *keys, arms)


def _argmax(scores: Array, results: Results) -> Array:
    """Return the arms with the highest scores, a random one of several."""
    best = scores == scores.max(axis=1, keepdims=True)
    arms: Array = np.where(best, _noise(results), -1.0).argmax(axis=1)
    return arms
