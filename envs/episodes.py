"""What the adapters to Stable-Baselines3 and Gymnasium report of episodes."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from srwm_rl.envs.batch import FloatArray, Observation
from srwm_rl.envs.levels import BoolArray, IntArray


class EpisodeStats:
    """Returns and lengths of the running episodes, `[n]`."""

    def __init__(self, n_envs: int) -> None:
        self.returns = np.zeros(n_envs, np.float64)
        self.lengths: IntArray = np.zeros(n_envs, np.int64)
        self._started = time.perf_counter()

    def restart(self, mask: Any) -> None:
        """Begin new episodes in the masked or listed environments (an array or a slice)."""
        self.returns[mask] = 0.0
        self.lengths[mask] = 0

    def add(self, rewards: FloatArray, dones: BoolArray) -> dict[int, dict[str, Any]]:
        """Count a step; return for each environment whose episode ended `r` return, `l` length, `t` seconds so far."""
        self.returns += rewards
        self.lengths += 1
        ended = dones.nonzero()[0]
        if not len(ended):
            return {}
        now = round(time.perf_counter() - self._started, 6)
        episodes = {i: {"r": float(self.returns[i]), "l": int(self.lengths[i]), "t": now} for i in ended.tolist()}
        self.restart(ended)
        return episodes


def obs_row(obs: Observation, i: int) -> Any:
    """Return the observation of environment `i`."""
    return {key: value[i] for key, value in obs.items()} if isinstance(obs, dict) else obs[i]
