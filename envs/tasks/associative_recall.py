"""Associative recall: see pairs of key and value, some overwritten, and name the values of keys."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from srwm_rl.envs.batch import Acted, Array, FloatArray, check_count, check_count_or_zero
from srwm_rl.envs.levels import BoolArray, IntArray, LevelRange, hash_integers
from srwm_rl.envs.tasks.base import TaskBatch
from srwm_rl.errors import UserError

KEYS, VALUES, KINDS, NEW_KEYS, NEW_VALUES, QUERIES = range(6)  # second keys of the hashes


class AssociativeRecallBatch(TaskBatch):
    """Remember the values of `n_pairs` keys, and answer with a key's newest value when asked.

    The first `n_pairs` steps show every key once, in random order, with a random value. Then `n_queries` queries and
    `n_overwrites` overwrites follow in random order (the last step is a query). An overwrite shows a random key with a
    value other than its present one; a query shows a random key alone, and the action is the answer: 1 / `n_queries`
    if it names the key's newest value, else 0. Other actions do nothing. The memory that perfect answers need grows
    with `n_pairs`: log2(`n_values`) bits per pair.

    Observations: float32 `[n, n_pairs + n_values + 1]`, key one-hot | value one-hot (zeros in a query) | query flag.
    Actions: one of `n_values` values.

    Args:
        n_envs: How many environments.
        levels: The levels that episodes are drawn from; a level fixes everything that is shown.
        seed: Start of the random level sequences.
        n_pairs: Pairs of key and value.
        n_values: Different values, 2 or more.
        n_overwrites: Overwrites; None: `n_pairs // 2`.
        n_queries: Queries; None: `n_pairs`.

    Raises:
        UserError: If a setting is out of range.
    """

    games = ("associative_recall",)
    has_answers = True
    memory_inputs: ClassVar[tuple[str, ...]] = ()  # a previous action could carry a value from step to step

    def __init__(
        self,
        n_envs: int,
        levels: str | LevelRange = "all",
        seed: int = 0,
        n_pairs: int = 8,
        n_values: int = 8,
        n_overwrites: int | None = None,
        n_queries: int | None = None,
    ) -> None:
        self.n_pairs, self.n_values = check_count("n_pairs", n_pairs), check_count("n_values", n_values)
        if self.n_values < 2:
            raise UserError("n_values must be 2 or more: with one value there is nothing to recall")
        self.n_queries = self.n_pairs if n_queries is None else check_count("n_queries", n_queries)
        if n_overwrites is None:
            n_overwrites = self.n_pairs // 2
        self.n_overwrites = check_count_or_zero("n_overwrites", n_overwrites)
        self.length = self.n_pairs + self.n_overwrites + self.n_queries
        sizes = self.n_pairs + self.n_values + 1, self.n_values
        super().__init__(n_envs, levels, seed, *sizes, self.n_pairs, self.n_overwrites, self.n_queries)

    @classmethod
    def score_range(cls, **settings: int) -> tuple[float, float]:
        """Return the mean returns of a random and of the best possible agent."""
        return 1.0 / settings.get("n_values", 8), 1.0

    @classmethod
    def feature_names(cls, **settings: Any) -> tuple[str, ...]:
        """Return the names of an observation's numbers."""
        keys, values = range(settings.get("n_pairs", 8)), range(settings.get("n_values", 8))
        return (*(f"key {i}" for i in keys), *(f"value {i}" for i in values), "query")

    @classmethod
    def action_names(cls, **settings: Any) -> tuple[str, ...]:
        """Return the names of the actions."""
        return tuple(f"value {i}" for i in range(settings.get("n_values", 8)))

    def _start(self) -> None:
        self._keys, self._values = np.zeros((2, self.n_envs, self.length), np.int64)
        self._asked = np.zeros((self.n_envs, self.length), np.bool_)
        super()._start()

    def _begin_episodes(self, mask: BoolArray) -> None:
        level, later = self._level[mask, None], np.arange(self.length - self.n_pairs)
        first = hash_integers(level, KEYS, np.arange(self.n_pairs)).argsort(axis=1)
        order = hash_integers(level, KINDS, later[:-1]).argsort(axis=1)
        asked = np.ones((len(level), len(later)), np.bool_)
        asked[:, :-1] = order >= self.n_overwrites
        queried, written = (_below(self.n_pairs, level, kind, later) for kind in (QUERIES, NEW_KEYS))
        self._asked[mask, self.n_pairs :] = asked
        self._keys[mask] = np.concatenate((first, np.where(asked, queried, written)), axis=1)
        self._values[mask] = self._newest(level, self._keys[mask], self._asked[mask])

    def _newest(self, level: IntArray, keys: IntArray, asked: BoolArray) -> IntArray:
        """Return the value of the present key after every step, `[n, length]`."""
        rows, memory = np.arange(len(level)), _below(self.n_values, level, VALUES, np.arange(self.n_pairs))
        change = 1 + _below(self.n_values - 1, level, NEW_VALUES, np.arange(self.length))
        change[:, : self.n_pairs] = 0
        values = np.zeros_like(keys)
        for t in range(self.length):
            changed = (memory[rows, keys[:, t]] + change[:, t]) % self.n_values
            values[:, t] = np.where(asked[:, t], memory[rows, keys[:, t]], changed)
            memory[rows, keys[:, t]] = values[:, t]
        return values

    def observe(self) -> FloatArray:
        """Return the present pairs and queries, `[n, n_pairs + n_values + 1]`; zeros after the last."""
        obs = np.zeros((self.n_envs, self.n_pairs + self.n_values + 1), np.float32)
        running = np.flatnonzero(self._clock < self.length)
        now = running, self._clock[running]
        obs[running, self._keys[now]] = 1.0
        obs[running, -1] = self._asked[now]
        shown = running[~self._asked[now]]
        obs[shown, self.n_pairs + self._values[shown, self._clock[shown]]] = 1.0
        return obs

    def answers(self) -> IntArray:
        """Return the newest value of the key in a query, else -1, `[n]`."""
        now = np.arange(self.n_envs), self._clock
        return np.where(self._asked[now], self._values[now], -1)

    def _act(self, actions: Array) -> Acted:
        rewards = ((actions == self.answers()) / self.n_queries).astype(np.float32)
        return rewards, self._clock == self.length - 1, np.zeros(self.n_envs, np.bool_), None


def _below(n: int, *keys: int | IntArray) -> IntArray:
    """Hash the broadcast `keys` to whole numbers in 0 .. n - 1."""
    return (hash_integers(*keys) % np.uint64(n)).astype(np.int64)
