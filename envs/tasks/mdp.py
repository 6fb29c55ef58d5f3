"""RL^2's tabular MDPs (Duan et al. 2016, https://arxiv.org/abs/1611.02779): learn an MDP within a trial."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np

from srwm_rl.envs.batch import Array, FloatArray, check_count
from srwm_rl.envs.levels import BoolArray, IntArray, LevelRange, check_levels, hash_uniform
from srwm_rl.envs.tasks.attempts import AttemptsTask
from srwm_rl.envs.tasks.mdp_policies import Believe, Doubles, Seen, exploration_bonus, greedy, posterior_sampling

MEANS, TRANSITIONS, REWARD, MOVE = range(4)  # second keys of the hashes
RANGE_LEVELS = 4096
"""Levels over which the score range's upper end is averaged."""


class MDPBatch(AttemptsTask):
    """Act in a finite MDP that the level draws, `attempts` times for `attempt_steps` steps from state 0.

    The reward of (state, action) is normal with variance 1 around a mean drawn from N(1, 1); the next state's
    probabilities are drawn from a flat Dirichlet distribution (Duan et al. 2016, section 3.2).
    What happens is a function of (level, step, state, action): two agents that do the same have the same luck.

    Observations: float32 `[n, n_states + 1]`, the state as a one-hot | attempt begins.

    Args:
        n_envs: How many environments.
        levels: The levels that trials are drawn from; a level fixes the MDP and its luck.
        seed: Start of the random level sequences.
        n_states: Number of states.
        n_actions: Number of actions.
        attempts: Attempts (the paper's episodes) per trial, which is one episode to the agent.
        attempt_steps: Steps per attempt.
    """

    games = ("mdp",)
    best_averages_luck = True
    memory_inputs = ("action", "reward", "observation")  # a transition is (state, action, reward, next state)

    def __init__(
        self,
        n_envs: int,
        levels: str | LevelRange = "all",
        seed: int = 0,
        n_states: int = 10,
        n_actions: int = 5,
        attempts: int = 10,
        attempt_steps: int = 10,
    ) -> None:
        self.n_states, self.n_actions = check_count("n_states", n_states), check_count("n_actions", n_actions)
        super().__init__(n_envs, levels, seed, self.n_states + 1, self.n_actions, attempts, attempt_steps)

    @classmethod
    def score_range(cls, **settings: Any) -> tuple[float, float]:
        """Return the mean returns of a random agent (exact) and of one that knows the MDP (over `RANGE_LEVELS` levels).

        No agent that has to learn the MDP reaches the second.
        """
        env = cls(1, **settings)
        return float(env.attempts * env.attempt_steps), env.attempts * _mean_optimum(
            env.n_states, env.n_actions, env.attempt_steps
        )

    @classmethod
    def reference_returns(cls, levels: Sequence[int] | IntArray | LevelRange, **settings: Any) -> dict[str, FloatArray]:
        """Return the returns of the optimal policy, by value iteration, and of some that learn the MDP while they act.

        Returns:
            The policies' names and their returns on the levels, `[n]` each; see `mdp_policies`.
        """
        levels = check_levels(levels)
        env = cls(len(levels), **settings)
        learning: dict[str, Believe] = {
            "exploration bonus (BEB)": exploration_bonus,
            "posterior sampling (PSRL)": posterior_sampling(levels),
            "greedy, by posterior means": greedy,
        }
        mdps = draw_mdps(levels, env.n_states, env.n_actions)
        returns = {"optimal policy (knows the MDP)": env._play(levels, lambda _: mdps)}
        return returns | {name: env._play(levels, believe) for name, believe in learning.items()}

    def _play(self, levels: IntArray, believe: Believe) -> FloatArray:
        """Return the returns of a policy that plans each attempt in the MDPs that it believes in, `[n]`."""
        self.reset(levels=levels)
        rows, total = np.arange(self.n_envs), np.zeros(self.n_envs, np.float32)
        seen = Seen.nothing(self.n_envs, self.n_states, self.n_actions)
        for _ in range(self.attempts):
            for t, values in enumerate(optimal_action_values(*believe(seen), self.attempt_steps), 1):
                states = self._state.copy()
                actions = values[rows, states].argmax(axis=1)
                rewards = self.step(actions).rewards
                seen.add(states, actions, rewards, self._state if t < self.attempt_steps else None)
                total += rewards
        return total

    @classmethod
    def feature_names(cls, **settings: Any) -> tuple[str, ...]:
        """Return the names of an observation's numbers."""
        return (*(f"state {i}" for i in range(settings.get("n_states", 10))), "attempt begins")

    def _start(self) -> None:
        self._state: IntArray = np.zeros(self.n_envs, np.int64)
        self._means = np.zeros((self.n_envs, self.n_states, self.n_actions))
        self._cumulative = np.zeros((*self._means.shape, self.n_states))  # of the next state's probabilities
        super()._start()

    def _begin_episodes(self, mask: BoolArray) -> None:
        self._means[mask], chances = draw_mdps(self._level[mask], self.n_states, self.n_actions)
        self._cumulative[mask] = chances.cumsum(axis=-1)
        super()._begin_episodes(mask)

    def _begin_attempts(self, rows: IntArray) -> None:
        self._state[rows] = 0

    def observe(self) -> FloatArray:
        """Return states and whether attempts begin, `[n, n_states + 1]`."""
        obs = np.zeros((self.n_envs, self.n_states + 1), np.float32)
        obs[np.arange(self.n_envs), self._state] = 1.0
        obs[:, -1] = self._attempt_clock == 0
        return obs

    def _act_in_attempt(self, actions: Array) -> tuple[FloatArray, BoolArray]:
        at = np.arange(self.n_envs), self._state, actions
        luck = self._clock, self._state, actions
        rewards = self._means[at] + _normal(self._level, REWARD, *luck)
        passed = self._cumulative[at] <= hash_uniform(self._level, MOVE, *luck)[:, None]
        self._state[:] = np.minimum(passed.sum(axis=1), self.n_states - 1)  # the last sum may be a little below 1
        return rewards.astype(np.float32), np.zeros(self.n_envs, np.bool_)

    def _arrays(self) -> dict[str, Array]:
        return {**super()._arrays(), "state": self._state}


def draw_mdps(levels: IntArray, n_states: int, n_actions: int) -> tuple[Doubles, Doubles]:
    """Return the MDPs of levels `[n]`: mean rewards `[n, S, A]` and transition probabilities `[n, S, A, S]`."""
    states, actions = np.arange(n_states)[:, None], np.arange(n_actions)
    means = 1.0 + _normal(levels[:, None, None], MEANS, states, actions)
    uniform = hash_uniform(
        levels[:, None, None, None], TRANSITIONS, states[..., None], actions[:, None], np.arange(n_states)
    )
    chances = -np.log1p(-uniform)  # exponential; divided by their sum they are Dirichlet
    return means, chances / chances.sum(axis=-1, keepdims=True)


def optimal_action_values(rewards: Doubles, transitions: Doubles, n_steps: int) -> Doubles:
    """Return the optimal values of actions in finite MDPs without discount, by value iteration.

    Args:
        rewards: `[n, S, A]` mean rewards.
        transitions: `[n, S, A, S]` probabilities of the next state.
        n_steps: The horizon.

    Returns:
        `[n_steps, n, S, A]`: what is earned from step t on by taking an action there and the best ones afterwards.
    """
    values = np.zeros((n_steps, *rewards.shape))
    following = np.zeros(rewards.shape[:2])  # [n, S]
    for t in reversed(range(n_steps)):
        values[t] = rewards + np.einsum("nsaz,nz->nsa", transitions, following)
        following = values[t].max(axis=-1)
    return values


@cache
def _mean_optimum(n_states: int, n_actions: int, n_steps: int) -> float:
    """Return the mean optimal return of an attempt."""
    mdps = draw_mdps(np.arange(RANGE_LEVELS), n_states, n_actions)
    return float(optimal_action_values(*mdps, n_steps)[0, :, 0].max(axis=-1).mean())


def _normal(*keys: int | IntArray) -> Doubles:
    """Hash the broadcast `keys` to standard normal numbers (Box and Muller)."""
    first, second = hash_uniform(*keys, 0), hash_uniform(*keys, 1)
    normal: Doubles = np.sqrt(-2.0 * np.log1p(-first)) * np.cos(2 * np.pi * second)
    return normal
