"""Any registered Gymnasium environment as a `BatchEnv`: a list of single environments in this process."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import gymnasium
import numpy as np
from gymnasium.vector.utils import batch_space, concatenate, create_empty_array, iterate

from srwm_rl.envs.batch import Acted, Array, Observation, check_count
from srwm_rl.envs.levels import BoolArray, LevelRange
from srwm_rl.envs.sampled_levels import SampledLevelsEnv
from srwm_rl.envs.wrappers.action_masks import ActionMaskObservation, has_action_masks
from srwm_rl.envs.wrappers.flat_observation import FlatDictObservation, needs_flattening
from srwm_rl.envs.wrappers.named_wrapper import Env, EnvWrapper
from srwm_rl.errors import FaultError, UserError


class GymnasiumBatch(SampledLevelsEnv):
    """Step `n_envs` copies of a Gymnasium environment one after the other; level k is what `reset(seed=k)` makes.

    Observations of nested spaces become a flat Dict; see `FlatDictObservation`. Action masks become an entry of the
    observation; see `ActionMaskObservation`.

    An environment whose randomness does not come from its seed alone cannot promise equal episodes on equal levels.

    Args:
        env_id: Any id that `gymnasium.make` accepts, "module:id" included.
        n_envs: How many copies.
        levels: The seeds that episodes are drawn from.
        seed: Start of the random level sequences.
        env_kwargs: Passed to `gymnasium.make`.
        wrappers: Functions that wrap each environment, such as wrapper classes; the first is innermost.

    Raises:
        UserError: If the environment cannot be made or wrapped, or has spaces that agents cannot use.
        RuntimeError: Later, if an environment raises: which one, on which level, at which step.
    """

    def __init__(
        self,
        env_id: str,
        n_envs: int,
        levels: str | LevelRange = "all",
        seed: int = 0,
        env_kwargs: dict[str, Any] | None = None,
        wrappers: Sequence[EnvWrapper] = (),
    ) -> None:
        check_count("n_envs", n_envs)
        self.env_id, self.games = env_id, (env_id,)
        self.envs = [_make(env_id, env_kwargs or {}, wrappers) for _ in range(n_envs)]
        with suppress(Exception):  # of a reset: the first one that counts names it
            if has_action_masks(self.envs[0]):
                self.envs = [ActionMaskObservation(env) for env in self.envs]
        self.render_mode = self.envs[0].render_mode
        self._latest: list[Any] = [None] * n_envs
        self._busy = 0  # index of the environment that steps or resets
        super().__init__(n_envs, self.envs[0].observation_space, self.envs[0].action_space, levels, seed)
        self._batched_actions = batch_space(self.action_space, self.n_envs)

    def _begin_episodes(self, mask: BoolArray) -> None:
        try:
            for i in np.flatnonzero(mask).tolist():
                self._busy = i
                self._latest[i], _ = self.envs[i].reset(seed=int(self._level[i]))
        except Exception as error:
            raise self._failure("reset", error) from error

    def _act(self, actions: Array) -> Acted:
        rewards = np.zeros(self.n_envs, np.float32)
        terminated, truncated = np.zeros((2, self.n_envs), np.bool_)
        infos: list[dict[str, Any]] = [{}] * self.n_envs
        try:
            for i, action in enumerate(iterate(self._batched_actions, actions)):
                self._busy = i
                self._latest[i], rewards[i], terminated[i], truncated[i], infos[i] = self.envs[i].step(action)
        except Exception as error:
            raise self._failure("step", error) from error
        ended = np.flatnonzero(terminated | truncated)
        if not len(ended) or any("is_success" not in infos[i] for i in ended):
            return rewards, terminated, truncated, None
        return rewards, terminated, truncated, np.array([bool(info.get("is_success")) for info in infos])

    def _failure(self, what: str, error: Exception) -> FaultError:
        reason = " ".join(str(error).split())
        return FaultError(f"{self.env_id} failed in {what} ({self._place()}): {type(error).__name__}: {reason}")

    def places(self) -> str:
        """Say which environment is stepping or being reset, with its level and step."""
        return f"{self.env_id} is busy in {self._place()}"

    def _place(self) -> str:
        return f"environment {self._busy}, level {self._level[self._busy]}, step {self._clock[self._busy]}"

    def observe(self) -> Observation:
        """Return the current observations without stepping."""
        empty: Any = create_empty_array(self.observation_space, self.n_envs)
        batch: Any = concatenate(self.observation_space, self._latest, empty)
        return dict(batch) if isinstance(batch, dict) else batch

    def render(self) -> Array:
        """Return a picture `[n, height, width, 3]` of every environment."""
        if self.render_mode != "rgb_array":
            return super().render()
        return np.stack([np.asarray(env.render()) for env in self.envs])

    def close(self) -> None:
        """Close the environments."""
        for env in self.envs:
            env.close()


def _make(env_id: str, env_kwargs: dict[str, Any], wrappers: Sequence[EnvWrapper]) -> Env:
    try:
        env: Env = gymnasium.make(env_id, **env_kwargs)
    except (gymnasium.error.Error, TypeError, ImportError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"Gymnasium cannot make {env_id!r}: {reason}") from error
    for wrapper in wrappers:
        env = wrapper(env)
    return FlatDictObservation(env) if needs_flattening(env.observation_space) else env
