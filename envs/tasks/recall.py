"""The recall task: see a symbol once, sit through distractors, say which symbol it was."""

from __future__ import annotations

from typing import Any

import numpy as np

from srwm_rl.envs.batch import Acted, Array, FloatArray, check_count
from srwm_rl.envs.levels import BoolArray, IntArray, LevelRange, hash_integers
from srwm_rl.envs.tasks.base import TaskBatch
from srwm_rl.errors import UserError


class RecallBatch(TaskBatch):
    """Recall a cue after a delay.

    The first observation shows a cue, one of `n_symbols`. Then follow `d` distractor steps, `d` uniform in
    `delay // 2 .. delay`, hence unknown to the agent, with random symbols in another block of channels. At last the
    query flag rises, and the action at that step is the answer: reward 1 if it names the cue, else 0, and the episode
    ends. Other actions do nothing. An agent without memory is right once in `n_symbols`.

    Observations: float32 `[n, 2 * n_symbols + 1]`, cue one-hot | distractor one-hot | query flag.

    Args:
        n_envs: How many environments.
        levels: The levels that episodes are drawn from; a level fixes cue, delay and distractors.
        seed: Start of the random level sequences.
        n_symbols: How many symbols, 2 or more.
        delay: The longest number of distractor steps.
    """

    games = ("recall",)
    solvable = True
    has_answers = True

    def __init__(
        self, n_envs: int, levels: str | LevelRange = "all", seed: int = 0, n_symbols: int = 4, delay: int = 10
    ) -> None:
        self.n_symbols, self.delay = check_count("n_symbols", n_symbols), check_count("delay", delay)
        if self.n_symbols < 2:
            raise UserError("n_symbols must be 2 or more: with one symbol there is nothing to recall")
        super().__init__(n_envs, levels, seed, 2 * self.n_symbols + 1, self.n_symbols, self.delay)

    @classmethod
    def score_range(cls, **settings: int) -> tuple[float, float]:
        """Return the mean returns of a random and of the best possible agent."""
        return 1.0 / settings.get("n_symbols", 4), 1.0

    @classmethod
    def feature_names(cls, **settings: Any) -> tuple[str, ...]:
        """Return the names of an observation's numbers."""
        symbols = range(settings.get("n_symbols", 4))
        return (*(f"cue {i}" for i in symbols), *(f"distractor {i}" for i in symbols), "query")

    @classmethod
    def action_names(cls, **settings: Any) -> tuple[str, ...]:
        """Return the names of the actions."""
        return tuple(f"cue {i}" for i in range(settings.get("n_symbols", 4)))

    def _begin_episodes(self, mask: BoolArray) -> None:
        shortest = self.delay // 2
        delay = shortest + (hash_integers(self._level, 1) % np.uint64(self.delay - shortest + 1)).astype(np.int64)
        self._cue = (hash_integers(self._level, 0) % np.uint64(self.n_symbols)).astype(np.int64)
        self._query_clock = delay + 1

    def observe(self) -> FloatArray:
        """Return the cues, distractors or queries of this step, `[n, 2 * n_symbols + 1]`."""
        obs = np.zeros((self.n_envs, 2 * self.n_symbols + 1), np.float32)
        cued = np.flatnonzero(self._clock == 0)
        obs[cued, self._cue[cued]] = 1.0
        waiting = np.flatnonzero((self._clock > 0) & (self._clock < self._query_clock))
        symbols = hash_integers(self._level[waiting], 1 + self._clock[waiting]) % np.uint64(self.n_symbols)
        obs[waiting, self.n_symbols + symbols.astype(np.int64)] = 1.0
        obs[:, -1] = self._clock == self._query_clock
        return obs

    def answers(self) -> IntArray:
        """Return the cues where the query flag is up, else -1, `[n]`."""
        return np.where(self._clock == self._query_clock, self._cue, -1)

    def _act(self, actions: Array) -> Acted:
        done = self._clock == self._query_clock
        right = done & (actions == self._cue)
        return right.astype(np.float32), done, np.zeros(self.n_envs, np.bool_), right
