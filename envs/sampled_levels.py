"""Environments whose levels are drawn here, for simulators that draw none themselves."""

from __future__ import annotations

from abc import abstractmethod

import numpy as np

from srwm_rl.envs.batch import Acted, Array, BatchEnv, BatchStep, State
from srwm_rl.envs.levels import BoolArray, IntArray, hash_integers


class SampledLevelsEnv(BatchEnv):
    """Play levels that are pinned, or the next of each environment's random sequence.

    The k-th level of environment i is a hash of (seed, i, k), so that resetting one environment never shifts what the
    others play. A subclass implements `_begin_episodes`, `_act` and `observe`; what actions change goes into `_arrays`.
    """

    @abstractmethod
    def _begin_episodes(self, mask: BoolArray) -> None:
        """Start the masked environments on their levels, `_level`."""

    @abstractmethod
    def _act(self, actions: Array) -> Acted:
        """Act at the current clocks."""

    def _step_info(self) -> dict[str, Array]:
        """Return further entries of the last step's info, one array `[n]` per key."""
        return {}

    def step(self, actions: Array) -> BatchStep:
        """Act in every environment; see `BatchEnv.step`."""
        rewards, terminated, truncated, solved = self._act(self.check_actions(actions))
        self._fresh = False
        self._clock += 1
        info: dict[str, Array] = {"prev_level_seed": self._level.copy()}
        if solved is not None:
            info["is_success"] = solved
        info |= self._step_info()
        done, final_obs = terminated | truncated, None
        if done.any():
            final_obs = self.observe()
            self._begin(done)
        info["level_seed"] = self._level.copy()
        return BatchStep(self.observe(), rewards, terminated, truncated, info, final_obs)

    def _start(self) -> None:
        self._level: IntArray = np.zeros(self.n_envs, np.int64)
        self._counts: IntArray = np.zeros(self.n_envs, np.int64)  # of levels drawn
        self._pins: IntArray = np.full(self.n_envs, -1, np.int64)
        self._begin(np.ones(self.n_envs, np.bool_))

    def _restart(self, mask: BoolArray, levels: IntArray | None) -> None:
        self._pins[mask] = -1 if levels is None else levels[mask]
        self._begin(mask)

    def _begin(self, mask: BoolArray) -> None:
        """Start the masked environments on their next levels."""
        indices = np.flatnonzero(mask)
        drawn, pins = self.sampled_levels(indices, self._counts[indices]), self._pins[indices]
        self._counts[indices] += pins < 0
        self._level[indices] = np.where(pins < 0, drawn, pins)
        self._clock[indices] = 0
        self._begin_episodes(mask)

    def sampled_levels(self, indices: IntArray, counts: IntArray) -> IntArray:
        """Return the `counts[j]`-th level of the random sequence of environment `indices[j]`, `[len(indices)]`."""
        drawn = hash_integers(self.seed, indices, counts) % np.uint64(len(self.levels))
        return drawn.astype(np.int64) + self.levels.start

    def level_seed(self) -> IntArray:
        """Return the levels being played, `[n]`."""
        return self._level.copy()

    def _arrays(self) -> dict[str, Array]:
        return {"level": self._level, **super()._arrays(), "counts": self._counts, "pins": self._pins}

    def set_state(self, state: State) -> None:
        """Continue exactly where `get_state` was called, in whichever instance; see `BatchEnv.set_state`."""
        super().set_state(state)
        self._begin_episodes(np.ones(self.n_envs, np.bool_))
        for key, array in self._arrays().items():  # again: a beginning undoes what actions have changed since
            array[:] = state[key]
