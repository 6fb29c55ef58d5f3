"""Policies that learn a finite MDP while they act, for many MDPs at once: planning with what has been seen.

Each keeps the posterior of the task's own prior (rewards normal with variance 1 around means from N(1, 1), flat
Dirichlet transitions) and, when an attempt begins, plans it by value iteration in one MDP made from the posterior.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from srwm_rl.envs.batch import Array
from srwm_rl.envs.levels import IntArray

Doubles = npt.NDArray[np.float64]
BONUS = 0.4
"""Factor of the exploration bonus: of .1, .2, .3, .4, .5, .7 and 1 the best on levels 20000:22000 of the task."""
_NOISE = 2**32  # second part of the generators' seeds


@dataclass
class Seen:
    """What has been seen in `n` MDPs of S states and A actions."""

    tries: Doubles
    """How often an action was taken in a state, `[n, S, A]`."""
    rewards: Doubles
    """The sum of rewards by state and action, `[n, S, A]`."""
    moves: Doubles
    """How often which state was seen to follow, `[n, S, A, S]`."""

    @classmethod
    def nothing(cls, n: int, n_states: int, n_actions: int) -> Seen:
        """Return that nothing has been seen."""
        shape = (n, n_states, n_actions)
        return cls(np.zeros(shape), np.zeros(shape), np.zeros((*shape, n_states)))

    def add(self, states: IntArray, actions: Array, rewards: Array, following: IntArray | None) -> None:
        """Add a step of each MDP, all `[n]`; `following`: None where attempts end, and the next states are not seen."""
        rows = np.arange(len(self.tries))
        self.tries[rows, states, actions] += 1
        self.rewards[rows, states, actions] += rewards
        if following is not None:
            self.moves[rows, states, actions, following] += 1

    @property
    def mean_rewards(self) -> Doubles:
        """The posterior means of the mean rewards, `[n, S, A]`; their variances are 1 / (1 + tries)."""
        means: Doubles = (1.0 + self.rewards) / (1.0 + self.tries)
        return means

    @property
    def mean_transitions(self) -> Doubles:
        """The posterior means of the transition probabilities, `[n, S, A, S]`."""
        weights = 1.0 + self.moves
        means: Doubles = weights / weights.sum(axis=-1, keepdims=True)
        return means


Believe = Callable[[Seen], tuple[Doubles, Doubles]]
"""Returns the MDPs to plan in: mean rewards `[n, S, A]` and transition probabilities `[n, S, A, S]`."""


def greedy(seen: Seen) -> tuple[Doubles, Doubles]:
    """Plan in the posterior's mean MDP."""
    return seen.mean_rewards, seen.mean_transitions


def exploration_bonus(seen: Seen) -> tuple[Doubles, Doubles]:
    """Plan in the posterior's mean MDP with `BONUS` / (1 + tries) added to rewards (BEB: Kolter and Ng, 2009)."""
    return seen.mean_rewards + BONUS / (1.0 + seen.tries), seen.mean_transitions


def posterior_sampling(levels: IntArray) -> Believe:
    """Return the policy that plans in an MDP drawn from the posterior (PSRL: Osband, Russo and Van Roy, 2013).

    Each MDP has a random generator of its own, seeded with its level, of `levels` `[n]`.
    """
    generators = [np.random.default_rng([_NOISE, level]) for level in levels.tolist()]

    def draw(seen: Seen) -> tuple[Doubles, Doubles]:
        noise = np.stack([rng.standard_normal(seen.rewards.shape[1:]) for rng in generators])
        weights = np.stack([rng.standard_gamma(1.0 + moves) for rng, moves in zip(generators, seen.moves, strict=True)])
        rewards = seen.mean_rewards + noise / np.sqrt(1.0 + seen.tries)
        return rewards, weights / weights.sum(axis=-1, keepdims=True)

    return draw
