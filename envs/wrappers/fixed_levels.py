"""Every level of a list a fixed number of times: evaluation without sampling noise between levels."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np

from srwm_rl.envs.batch import Array, BatchEnv, BatchStep, Observation, check_count
from srwm_rl.envs.levels import BoolArray, LevelRange, check_levels
from srwm_rl.envs.vec_env import BatchVecEnv, Step
from srwm_rl.errors import UserError


class LevelsVecEnv(BatchVecEnv):
    """Play every (game, level) pair exactly `repeats` times, whatever the lengths of the episodes.

    Each environment takes the next pair of its game from a queue when its episode ends, so that short episodes do not
    count more often than long ones. An environment without work steps on, and its infos stay empty. Infos of finished
    episodes are those of `BatchVecEnv` with `level`, the level that was played. Go on until `remaining` is 0.

    Args:
        batch_env: The environments; their own level range is not used.
        levels: The levels, a list or a range.
        repeats: Episodes per game and level.

    Raises:
        UserError: If levels or repeats are not valid, or (in `reset`) other levels are asked for.
    """

    supports_state = False  # an evaluation is run again, not resumed

    def __init__(self, batch_env: BatchEnv, levels: Sequence[int] | LevelRange, repeats: int = 1) -> None:
        self._todo = np.tile(check_levels(levels), check_count("repeats", repeats)).tolist()
        self._total = len(self._todo) * len(set(batch_env.game_names))
        self._finished = 0
        self._queues: dict[str, deque[int]] = {}
        self._playing = np.full(batch_env.n_envs, -1, np.int64)
        super().__init__(batch_env)

    @property
    def remaining(self) -> int:
        """Count the episodes that are not finished yet."""
        return self._total - self._finished

    @property
    def busy(self) -> BoolArray:
        """Environments that play a level of the evaluation, `[n]`."""
        return self._playing >= 0

    def _begin(self, options: dict[str, Any]) -> Observation:
        if options:
            raise UserError("the levels of this evaluation are set by its constructor; reset takes no options")
        self._finished = 0
        self._queues = {game: deque(self._todo) for game in self._games}
        return self._assign_levels(np.ones(self.num_envs, np.bool_), self.batch_env.reset())

    def _assign_levels(self, free: BoolArray, obs: Observation) -> Observation:
        """Start the free environments on their next levels; return the observations."""
        for i in np.flatnonzero(free):
            queue = self._queues[self._games[i]]
            self._playing[i] = queue.popleft() if queue else -1
        busy = free & (self._playing >= 0)
        return self.batch_env.reset(busy, np.maximum(self._playing, 0)) if busy.any() else obs

    def step_wait(self) -> Step:
        """Act, and return observations, rewards, dones and infos."""
        if not self._queues:
            raise UserError("call reset before the first step")
        obs, rewards, dones, infos = super().step_wait()
        if dones.any():
            obs = self._assign_levels(dones, obs)
            for i, level in zip(np.flatnonzero(dones), self.batch_env.level_seed()[dones].tolist(), strict=True):
                if "level_seed" in infos[i]:
                    infos[i]["level_seed"] = level
        return obs, rewards, dones, infos

    def _episode_info(self, step: BatchStep, i: int, episode: dict[str, Any]) -> dict[str, Any]:
        if self._playing[i] < 0:
            return {}
        self._finished += 1
        return {**super()._episode_info(step, i, episode), "level": int(self._playing[i])}

    def _attempt_info(self, step: BatchStep, i: int) -> dict[str, Any]:
        return {} if self._playing[i] < 0 else super()._attempt_info(step, i)

    def _arrays(self) -> dict[str, Array]:
        raise UserError("an evaluation on chosen levels cannot be saved or restored half-way; start it again")
