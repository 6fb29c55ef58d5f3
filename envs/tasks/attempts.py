"""What the tasks share whose episode is a trial: several attempts at one level."""

from __future__ import annotations

from abc import abstractmethod

import numpy as np

from srwm_rl.envs.batch import Acted, Array, FloatArray, check_count
from srwm_rl.envs.levels import BoolArray, IntArray, LevelRange
from srwm_rl.envs.tasks.base import TaskBatch


class AttemptsTask(TaskBatch):
    """Run a task whose episode is one trial: `attempts` attempts at a level, of at most `attempt_steps` steps each.

    To the agent a trial is one episode, so its memory lasts from attempt to attempt. A subclass implements
    `_begin_attempts` and `_act_in_attempt`. Three entries of a step's info, `[n]` each, tell of attempts: `attempt`
    (int64, the index of the attempt that the step was made in), `attempt_ended` (bool) and `attempt_return` (float32,
    the sum of its rewards, valid where it ended).

    Args:
        n_envs: How many environments.
        levels: The levels that trials are drawn from.
        seed: Start of the random level sequences.
        n_features: Size of the observation.
        n_actions: Number of actions.
        attempts: Attempts per trial.
        attempt_steps: Steps after which an attempt ends in any case.
        settings: What else decides what a level contains.
    """

    def __init__(
        self,
        n_envs: int,
        levels: str | LevelRange,
        seed: int,
        n_features: int,
        n_actions: int,
        attempts: int,
        attempt_steps: int,
        *settings: int,
    ) -> None:
        self.attempts = check_count("attempts", attempts)
        self.attempt_steps = check_count("attempt_steps", attempt_steps)
        super().__init__(n_envs, levels, seed, n_features, n_actions, self.attempts, self.attempt_steps, *settings)

    def _start(self) -> None:
        self._attempt: IntArray = np.zeros(self.n_envs, np.int64)
        self._attempt_clock: IntArray = np.zeros(self.n_envs, np.int64)  # steps within the attempt
        self._attempt_return: FloatArray = np.zeros(self.n_envs, np.float32)
        super()._start()

    @abstractmethod
    def _begin_attempts(self, rows: IntArray) -> None:
        """Start the attempts `_attempt[rows]` in the environments `rows`."""

    @abstractmethod
    def _act_in_attempt(self, actions: Array) -> tuple[FloatArray, BoolArray]:
        """Act; return the rewards and whether an attempt ends early, `[n]` each."""

    def _begin_episodes(self, mask: BoolArray) -> None:
        self._begin_next(np.flatnonzero(mask), 0)

    def _act(self, actions: Array) -> Acted:
        rewards, ended = self._act_in_attempt(actions)
        self._attempt_return += rewards
        self._attempt_clock += 1
        ended = ended | (self._attempt_clock == self.attempt_steps)
        self._info = {
            "attempt": self._attempt.copy(),
            "attempt_ended": ended,
            "attempt_return": self._attempt_return.copy(),
        }
        last = ended & (self._attempt == self.attempts - 1)
        rows = np.flatnonzero(ended & ~last)
        if len(rows):
            self._begin_next(rows, self._attempt[rows] + 1)
        return rewards, last, np.zeros(self.n_envs, np.bool_), None

    def _begin_next(self, rows: IntArray, attempt: IntArray | int) -> None:
        self._attempt[rows], self._attempt_clock[rows], self._attempt_return[rows] = attempt, 0, 0.0
        self._begin_attempts(rows)

    def _step_info(self) -> dict[str, Array]:
        return self._info

    def _arrays(self) -> dict[str, Array]:
        attempts: dict[str, Array] = {
            "attempt": self._attempt,
            "attempt_clock": self._attempt_clock,
            "attempt_return": self._attempt_return,
        }
        return {**super()._arrays(), **attempts}
