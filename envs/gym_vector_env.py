"""Gymnasium's `VectorEnv` over any `BatchEnv`, with both of Gymnasium's kinds of autoreset."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from srwm_rl.envs.batch import Array, BatchEnv, BatchStep, Observation
from srwm_rl.envs.episodes import EpisodeStats, obs_row
from srwm_rl.envs.levels import MAX_LEVEL, BoolArray
from srwm_rl.errors import UserError

MODES = (AutoresetMode.SAME_STEP, AutoresetMode.NEXT_STEP)


class BatchGymVectorEnv(VectorEnv[Any, Any, Any]):
    """Play a batch through Gymnasium's vector interface.

    `reset(options={"reset_mask": bool[n]})` resets some, `options={"levels": [...]}` chooses levels. Where an attempt
    at a level ended (`_attempt`), the infos hold its index `attempt` and its return `attempt_return`.

    With "SameStep" autoreset, the step that ends an episode returns the next one's first observation, and the infos
    hold `final_info`, with `episode` (`r` return, `l` length in steps, `t` seconds since construction) and where the
    game defines it `is_success`, and `final_obs` where the simulator has the last observation, which ProcGen has not;
    `_final_info` and `_final_obs` tell where. With "NextStep", which Gymnasium's observation wrappers ask for, it
    returns the last observation (of ProcGen, which has none, the next episode's first one) and `is_success`; the next
    step ignores that environment's action and begins an episode. The simulator has begun one already: every other
    level that it draws is skipped.

    Args:
        batch_env: The simulator.
        autoreset_mode: "SameStep" or "NextStep", or Gymnasium's constant.

    Raises:
        UserError: Another mode.
    """

    metadata: ClassVar[dict[str, Any]] = {  # type: ignore[misc]
        "render_modes": [],
        "render_fps": 15,  # as ProcGen
        "autoreset_mode": AutoresetMode.SAME_STEP,
    }

    def __init__(self, batch_env: BatchEnv, autoreset_mode: AutoresetMode | str = AutoresetMode.SAME_STEP) -> None:
        if autoreset_mode not in (*MODES, *(mode.value for mode in MODES)):
            raise UserError(f"autoreset_mode must be 'SameStep' or 'NextStep', not {autoreset_mode!r}")
        self.metadata = {**self.metadata, "autoreset_mode": AutoresetMode(autoreset_mode)}  # type: ignore[misc]
        self._next_step = self.metadata["autoreset_mode"] is AutoresetMode.NEXT_STEP
        self.batch_env = batch_env
        self.num_envs = batch_env.n_envs
        self.render_mode = batch_env.render_mode
        self.single_observation_space = batch_env.observation_space
        self.single_action_space = batch_env.action_space
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)
        self._stats = EpisodeStats(self.num_envs)
        self._ended: BoolArray = np.zeros(self.num_envs, np.bool_)  # whose next step begins an episode
        self._levels = np.full(self.num_envs, -1, np.int64)  # that were chosen

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Start episodes; see the class for `options`."""
        options = checked_options(options, {"reset_mask", "levels"})
        mask, levels = options.get("reset_mask"), options.get("levels")
        if seed is not None:
            if mask is not None or not isinstance(seed, (int, np.integer)):
                raise UserError("a seed restarts all environments together: give one whole number and no reset_mask")
            super().reset(seed=seed)
            self.batch_env.reseed(int(seed) % MAX_LEVEL)
        obs = self.batch_env.reset(mask, levels)
        masked = np.ones(self.num_envs, np.bool_) if mask is None else np.asarray(mask)
        self._levels[masked] = -1 if levels is None else np.asarray(levels)[masked]
        self._ended = self._ended & ~masked
        self._stats.restart(masked)
        return obs, {"level_seed": self.batch_env.level_seed(), "_level_seed": masked}

    def step(self, actions: Any) -> tuple[Any, Array, Array, Array, dict[str, Any]]:
        """Act in every environment."""
        step = self.batch_env.step(actions)
        if self._ended.any():
            step = self._begin_episodes(step)
        dones = step.terminated | step.truncated
        infos = self._level_infos(step)
        for i, episode in self._stats.add(step.rewards, dones).items():
            infos = self._add_info(infos, self._final_infos(step, i, episode), i)
        self._stats.restart(self._ended)
        obs = step.obs
        if self._next_step:
            self._ended = dones
            if step.final_obs is not None:
                obs = _rows(dones, step.final_obs, obs)
        return obs, step.rewards, step.terminated, step.truncated, infos

    def _begin_episodes(self, step: BatchStep) -> BatchStep:
        """Begin new episodes in the environments whose last one ended in the step before, in place of their step."""
        ended = self._ended
        for pinned in (False, True):
            mask = ended & ((self._levels >= 0) == pinned)
            if mask.any():
                obs = self.batch_env.reset(mask, self._levels if pinned else None)
        info = {key: array.copy() for key, array in step.info.items()}
        info["level_seed"] = self.batch_env.level_seed()
        info["prev_level_seed"] = np.where(ended, info["level_seed"], info["prev_level_seed"])
        if "attempt_ended" in info:
            info["attempt_ended"] &= ~ended
        rewards = np.where(ended, 0, step.rewards).astype(step.rewards.dtype)
        return BatchStep(obs, rewards, step.terminated & ~ended, step.truncated & ~ended, info, step.final_obs)

    def _level_infos(self, step: BatchStep) -> dict[str, Any]:
        infos: dict[str, Any] = {}
        for key in ("level_seed", "prev_level_seed"):
            infos |= {key: step.info[key], f"_{key}": np.ones(self.num_envs, np.bool_)}
        for key in ("attempt", "attempt_return") if "attempt_ended" in step.info else ():
            infos |= {key: step.info[key], f"_{key}": step.info["attempt_ended"]}
        return infos

    def _final_infos(self, step: BatchStep, i: int, episode: dict[str, Any]) -> dict[str, Any]:
        """Return the infos of the episode of environment i that ended."""
        solved = {"is_success": bool(step.info["is_success"][i])} if "is_success" in step.info else {}
        if self._next_step:
            return solved
        final = {"level_seed": step.info["prev_level_seed"][i], "episode": episode, **solved}
        last = {} if step.final_obs is None else {"final_obs": obs_row(step.final_obs, i)}
        return {"final_info": final, **last}

    def render(self) -> Any:
        """Return the environments' pictures, or None without a render mode."""
        return None if self.render_mode is None else tuple(self.batch_env.render())

    def close_extras(self, **kwargs: Any) -> None:
        """Free what the simulator holds."""
        self.batch_env.close()


def _rows(mask: BoolArray, chosen: Observation, others: Observation) -> Observation:
    """Return the masked rows of one observation and the other rows of another."""
    if isinstance(chosen, dict) and isinstance(others, dict):
        return {key: np.asarray(_rows(mask, chosen[key], others[key])) for key in others}
    rows = np.array(others)
    rows[mask] = np.asarray(chosen)[mask]
    return rows


def checked_options(options: dict[str, Any] | None, known: set[str]) -> dict[str, Any]:
    """Return the options of a reset.

    Raises:
        UserError: One is not known.
    """
    unknown = set(options or {}) - known
    if unknown:
        raise UserError(f"reset options {sorted(unknown)} are not known; there are {sorted(known)}")
    return dict(options or {})
