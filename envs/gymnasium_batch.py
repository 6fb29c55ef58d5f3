"""Any registered Gymnasium environment as a `BatchEnv`: a list of single environments in this process."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from gymnasium.vector.utils import batch_space, concatenate, create_empty_array, iterate

from srwm_rl.envs.batch import Array, BatchStep, Observation, SampledLevelsEnv, check_count
from srwm_rl.envs.levels import BoolArray, LevelRange
from srwm_rl.errors import FaultError, UserError


class GymnasiumBatch(SampledLevelsEnv):
    """Step `n_envs` copies of a Gymnasium environment one after the other; level k is what `reset(seed=k)` makes.

    An environment whose randomness does not come from its seed alone cannot promise equal episodes on equal levels.

    Args:
        env_id: Any id that `gymnasium.make` accepts, "module:id" included.
        n_envs: How many copies.
        levels: The seeds that episodes are drawn from.
        seed: Start of the random level sequences.
        env_kwargs: Passed to `gymnasium.make`.

    Raises:
        UserError: If the environment cannot be made or has spaces that agents cannot use.
        RuntimeError: Later, if an environment raises: which one, on which level, at which step.
    """

    def __init__(
        self,
        env_id: str,
        n_envs: int,
        levels: str | LevelRange = "all",
        seed: int = 0,
        env_kwargs: dict[str, Any] | None = None,
    ) -> None:
        check_count("n_envs", n_envs)
        self.env_id = env_id
        self.envs = [_make(env_id, env_kwargs or {}) for _ in range(n_envs)]
        self.render_mode = self.envs[0].render_mode
        self._latest: list[Any] = [None] * n_envs
        self._busy = 0  # index of the environment that steps or resets
        super().__init__(n_envs, self.envs[0].observation_space, self.envs[0].action_space, levels, seed)
        self._batched_actions = batch_space(self.action_space, self.n_envs)

    @property
    def game_names(self) -> list[str]:
        """Name the game that each environment plays, `[n]`."""
        return [self.env_id] * self.n_envs

    def _begin_episodes(self, mask: BoolArray) -> None:
        for i in np.flatnonzero(mask).tolist():
            self._busy = i
            try:
                self._latest[i], _ = self.envs[i].reset(seed=int(self._level[i]))
            except Exception as error:
                raise self._failure(i, "reset", error) from error

    def step(self, actions: Array) -> BatchStep:
        """Act in every environment; see `BatchEnv.step`."""
        actions = self.check_actions(actions)
        rewards = np.zeros(self.n_envs, np.float32)
        terminated, truncated = np.zeros((2, self.n_envs), np.bool_)
        infos: list[dict[str, Any]] = [{}] * self.n_envs
        for i, action in enumerate(iterate(self._batched_actions, actions)):
            self._busy = i
            try:
                self._latest[i], rewards[i], terminated[i], truncated[i], infos[i] = self.envs[i].step(action)
            except Exception as error:
                raise self._failure(i, "step", error) from error
        self._fresh = False
        self._clock += 1
        done = terminated | truncated
        final_obs, info = None, {"prev_level_seed": self._level.copy()}
        if done.any():
            final_obs = self.observe()
            if all("is_success" in infos[i] for i in np.flatnonzero(done)):
                info["is_success"] = np.array([bool(env_info.get("is_success", False)) for env_info in infos])
            self._begin(done)
        info["level_seed"] = self._level.copy()
        return BatchStep(self.observe(), rewards, terminated, truncated, info, final_obs)

    def places(self) -> str:
        """Say which environment is stepping or being reset, with its level and step."""
        return f"{self.env_id} is busy in {self._place(self._busy)}"

    def _failure(self, i: int, what: str, error: Exception) -> FaultError:
        reason = " ".join(str(error).split())
        return FaultError(f"{self.env_id} failed in {what} ({self._place(i)}): {type(error).__name__}: {reason}")

    def _place(self, i: int) -> str:
        return f"environment {i}, level {self._level[i]}, step {self._clock[i]}"

    def observe(self) -> Observation:
        """Return the current observations without stepping."""
        empty: Any = create_empty_array(self.observation_space, self.n_envs)
        batch: Any = concatenate(self.observation_space, self._latest, empty)
        return dict(batch) if isinstance(batch, dict) else batch

    def render(self) -> Array:
        """Return a picture `[n, height, width, 3]` of every environment."""
        if self.render_mode != "rgb_array":
            return super().render()
        pictures: list[Any] = [env.render() for env in self.envs]
        return np.stack(pictures)

    def close(self) -> None:
        """Close the environments."""
        for env in self.envs:
            env.close()


def _make(env_id: str, env_kwargs: dict[str, Any]) -> gymnasium.Env[Any, Any]:
    try:
        return gymnasium.make(env_id, **env_kwargs)
    except (gymnasium.error.Error, TypeError, ImportError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"Gymnasium cannot make {env_id!r}: {reason}") from error
