"""The recall task: see a symbol once, sit through distractors, say which symbol it was."""

from __future__ import annotations

import numpy as np
from gymnasium import spaces

from srwm_rl.envs.batch import check_count
from srwm_rl.envs.hashing import hash_integers
from srwm_rl.envs.levels import BoolArray, IntArray, LevelRange
from srwm_rl.envs.tasks.base import FloatArray, TaskBatch
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

    name = "recall"
    solvable = True

    def __init__(
        self, n_envs: int, levels: str | LevelRange = "all", seed: int = 0, n_symbols: int = 4, delay: int = 10
    ) -> None:
        if check_count("n_symbols", n_symbols) < 2:
            raise UserError("n_symbols must be 2 or more: with one symbol there is nothing to recall")
        self.n_symbols = int(n_symbols)
        self.delay = check_count("delay", delay)
        box = spaces.Box(0.0, 1.0, (2 * self.n_symbols + 1,), np.float32)
        super().__init__(n_envs, box, spaces.Discrete(self.n_symbols), levels, seed)

    @classmethod
    def score_range(cls, **settings: int) -> tuple[float, float]:
        """Return the mean returns of a random and of the best possible agent."""
        return 1.0 / settings.get("n_symbols", 4), 1.0

    def _task_settings(self) -> tuple[int, ...]:
        return (self.delay,)

    def _read_levels(self) -> None:
        shortest = self.delay // 2
        delay = shortest + (hash_integers(self._level, 1) % np.uint64(self.delay - shortest + 1)).astype(np.int64)
        self._cue = (hash_integers(self._level, 0) % np.uint64(self.n_symbols)).astype(np.int64)
        self._query_clock = delay + 1

    def _observe(self) -> FloatArray:
        obs = np.zeros((self.n_envs, 2 * self.n_symbols + 1), np.float32)
        cued = np.flatnonzero(self._clock == 0)
        obs[cued, self._cue[cued]] = 1.0
        waiting = np.flatnonzero((self._clock > 0) & (self._clock < self._query_clock))
        symbols = hash_integers(self._level[waiting], 1 + self._clock[waiting]) % np.uint64(self.n_symbols)
        obs[waiting, self.n_symbols + symbols.astype(np.int64)] = 1.0
        obs[:, -1] = self._clock == self._query_clock
        return obs

    def _play(self, actions: IntArray) -> tuple[FloatArray, BoolArray, BoolArray]:
        done = self._clock == self._query_clock
        right = done & (actions == self._cue)
        return right.astype(np.float32), done, right
