"""The parity task: say after every bit whether the number of ones so far is odd."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from srwm_rl.envs.batch import Acted, Array, FloatArray, check_count
from srwm_rl.envs.levels import BoolArray, IntArray, LevelRange, hash_integers
from srwm_rl.envs.tasks.base import TaskBatch


class ParityBatch(TaskBatch):
    """Track the parity of a stream of random bits, one bit and one answer per step.

    Parity asks for a state that every 1 flips, however long ago the last one was, so a memory that only adds up what
    it sees cannot follow it (Irie, Csordás and Schmidhuber, 2023, https://arxiv.org/abs/2310.16076). Answers change
    nothing but their own reward: +1 for a right one, -1 for a wrong one, so that guessing is worth 0 at any length.

    Observations: float32 `[n, 2]`, the bit as a one-hot (zeros after the last). Action 1 says odd, 0 even.

    Args:
        n_envs: How many environments.
        levels: The levels that episodes are drawn from; a level fixes the bits. A shorter episode shows the first bits
            of a longer one.
        seed: Start of the random level sequences.
        length: Bits and steps per episode.
    """

    games = ("parity",)
    has_answers = True
    # The previous answer with its reward is the parity so far, and the step says how far a stream goes on: an agent
    # without memory solves the task with the first two, and one with memory is lost beyond its training with the last.
    memory_inputs: ClassVar[tuple[str, ...]] = ()

    def __init__(self, n_envs: int, levels: str | LevelRange = "all", seed: int = 0, length: int = 40) -> None:
        self.length = check_count("length", length)
        super().__init__(n_envs, levels, seed, 2, 2, self.length)

    @classmethod
    def score_range(cls, **settings: int) -> tuple[float, float]:
        """Return the mean returns of a random and of the best possible agent."""
        return 0.0, float(settings.get("length", 40))

    @classmethod
    def feature_names(cls, **settings: Any) -> tuple[str, ...]:
        """Return the names of an observation's numbers."""
        return ("bit 0", "bit 1")

    @classmethod
    def action_names(cls, **settings: Any) -> tuple[str, ...]:
        """Return the names of the actions."""
        return ("even", "odd")

    def _begin_episodes(self, mask: BoolArray) -> None:
        bits = hash_integers(self._level[:, None], np.arange(self.length)) & np.uint64(1)
        self._bits = bits.astype(np.int64)  # [n, length]
        self._parity = self._bits.cumsum(axis=1) % 2  # [n, length]

    def observe(self) -> FloatArray:
        """Return the present bits, `[n, 2]`."""
        obs = np.zeros((self.n_envs, 2), np.float32)
        running = np.flatnonzero(self._clock < self.length)
        obs[running, self._bits[running, self._clock[running]]] = 1.0
        return obs

    def answers(self) -> IntArray:
        """Return the parity of the bits so far, `[n]`."""
        parity: IntArray = self._parity[np.arange(self.n_envs), self._clock]
        return parity

    def _act(self, actions: Array) -> Acted:
        right = actions == self.answers()
        rewards = np.where(right, 1.0, -1.0).astype(np.float32)
        return rewards, self._clock == self.length - 1, np.zeros(self.n_envs, np.bool_), None
