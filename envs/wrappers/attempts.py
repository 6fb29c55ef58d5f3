"""Several attempts at every level: an episode becomes a trial of K episodes of one level."""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium import spaces

from srwm_rl.envs.batch import Acted, Array, BatchEnv, BatchStep, Observation, Space, check_count
from srwm_rl.envs.levels import BoolArray
from srwm_rl.envs.sampled_levels import SampledLevelsEnv
from srwm_rl.envs.wrappers.wrapped_batch import WrappedBatch
from srwm_rl.errors import UserError

ATTEMPT_BEGINS = "attempt_begins"
"""Key of the observation: 1 at an attempt's first observation, else 0; float32 `[n, 1]`."""


class AttemptsBatch(WrappedBatch, SampledLevelsEnv):
    """Play every level `attempts` times in a row as one episode, a trial.

    An attempt is an episode of the environments inside, always begun in the same way: ProcGen's level, a task's level,
    a Gymnasium environment's seed. Only the last attempt's end ends the trial (`terminated` or `truncated`); after the
    others the observation is the next attempt's first one, and an agent keeps its memory. Observations become a Dict
    with `ATTEMPT_BEGINS`; one that was none stands under "observation".

    `info` has three further arrays `[n]`: `attempt` (int64, from 0, the attempt that the step was played in),
    `attempt_ended` (bool) and `attempt_return` (float32, the attempt's sum of rewards up to this step). `is_success`
    is that of the attempt that ended, hence the last attempt's at a trial's end. Levels are drawn here.

    Args:
        batch_env: The environments, which start over.
        attempts: Episodes per trial, 1 or more.

    Raises:
        UserError: If `attempts` is out of range, the environments have attempts of their own or an observation of the
            name `attempt_begins`, or their levels cannot be chosen.
    """

    def __init__(self, batch_env: BatchEnv, attempts: int) -> None:
        inner = batch_env
        while isinstance(inner, WrappedBatch) and not hasattr(inner, "attempts"):
            inner = inner.batch_env
        if hasattr(inner, "attempts"):
            raise UserError(
                f"{batch_env.games[0]} has attempts of its own: set their number with --env-kwargs attempts:{attempts} "
                "and leave --attempts out"
            )
        self.attempts = check_count("attempts", attempts)
        super().__init__(batch_env, _with_begins(batch_env.observation_space))

    def _start(self) -> None:
        self.batch_env.reseed(self.seed)
        self._attempt = np.zeros(self.n_envs, np.int64)
        self._return = np.zeros(self.n_envs, np.float64)  # of the running attempts
        self._begins = np.zeros(self.n_envs, np.bool_)  # the current observation is an attempt's first
        super()._start()

    def _begin_episodes(self, mask: BoolArray) -> None:
        self.batch_env.reset(mask, self._level)
        self._attempt[mask], self._return[mask], self._begins[mask] = 0, 0.0, True

    def step(self, actions: Array) -> BatchStep:
        """Act in every environment; see `BatchEnv.step` and the class for the infos."""
        inner = self.batch_env.step(actions)
        self._fresh = False
        self._clock += 1
        self._return += np.where(np.isfinite(inner.rewards), inner.rewards, 0)  # as `BatchVecEnv` counts them
        ended = inner.terminated | inner.truncated
        over = ended & (self._attempt == self.attempts - 1)
        info = inner.info | {
            "prev_level_seed": self._level.copy(),
            "attempt": self._attempt.copy(),
            "attempt_ended": ended,
            "attempt_return": self._return.astype(np.float32),
        }
        self._attempt[ended] += 1
        self._return[ended] = 0.0
        self._begins[:] = ended
        obs, final_obs = inner.obs, None
        if over.any():
            if inner.final_obs is not None:
                final_obs = _join(inner.final_obs, np.zeros(self.n_envs, np.bool_))
            self._begin(over)
            obs = self.batch_env.observe()
        info["level_seed"] = self._level.copy()
        obs = _join(obs, self._begins)
        return BatchStep(obs, inner.rewards, over & inner.terminated, over & inner.truncated, info, final_obs)

    def _act(self, actions: Array) -> Acted:
        raise NotImplementedError("step does not use it")

    def observe(self) -> Observation:
        """Return the current observations without stepping."""
        return _join(super().observe(), self._begins)

    def _settings(self) -> dict[str, Any]:
        return {**super()._settings(), "attempts": self.attempts}

    def _arrays(self) -> dict[str, Array]:
        arrays = {"attempt": self._attempt, "attempt_return": self._return, "attempt_begins": self._begins}
        return {**super()._arrays(), **arrays}


def _with_begins(space: Space) -> spaces.Dict:
    parts: dict[str, Space] = dict(space.spaces) if isinstance(space, spaces.Dict) else {"observation": space}
    if ATTEMPT_BEGINS in parts:
        raise UserError(f"the observation has a key {ATTEMPT_BEGINS!r} already; leave --attempts out")
    return spaces.Dict({**parts, ATTEMPT_BEGINS: spaces.Box(0.0, 1.0, (1,), np.float32)})


def _join(obs: Observation, begins: BoolArray) -> Observation:
    parts = obs if isinstance(obs, dict) else {"observation": obs}
    return {**parts, ATTEMPT_BEGINS: begins.astype(np.float32)[:, None]}
