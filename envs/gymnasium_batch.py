"""Any registered Gymnasium environment as a `BatchEnv`: a list of single environments in this process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.vector.utils import batch_space, concatenate, create_empty_array, iterate

from srwm_rl.envs.batch import Acted, Array, Observation, check_count
from srwm_rl.envs.levels import BoolArray, LevelRange
from srwm_rl.envs.sampled_levels import SampledLevelsEnv
from srwm_rl.envs.wrappers.action_masks import ActionMaskObservation, has_action_masks
from srwm_rl.envs.wrappers.flat_observation import FlatDictObservation, needs_flattening
from srwm_rl.envs.wrappers.named_wrapper import Env, EnvWrapper, NamedWrapper, wrap
from srwm_rl.errors import FaultError, UserError

FAILURES = (Exception, SystemExit, GeneratorExit)
"""What an environment may raise that must not end the process."""
FLAGS = (np.bool_, int, np.integer, np.ndarray)


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
        with suppress(*FAILURES):  # of a reset: the first one that counts names it
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
        except FAILURES as error:
            raise self._failure("reset", error) from error

    def _act(self, actions: Array) -> Acted:
        rewards = np.zeros(self.n_envs, np.float32)
        terminated, truncated = np.zeros((2, self.n_envs), np.bool_)
        infos: list[dict[str, Any]] = [{}] * self.n_envs
        try:
            for i, action in enumerate(iterate(self._batched_actions, actions)):
                self._busy = i
                self._latest[i], reward, ends, is_cut, infos[i] = self.envs[i].step(action)
                _check_step(reward, ends, is_cut, infos[i])
                rewards[i], terminated[i], truncated[i] = reward, ends, is_cut
        except FAILURES as error:
            raise self._failure("step", error) from error
        ended = np.flatnonzero(terminated | truncated)
        if not len(ended) or any("is_success" not in infos[i] for i in ended):
            return rewards, terminated, truncated, None
        return rewards, terminated, truncated, np.array([bool(info.get("is_success")) for info in infos])

    def _failure(self, what: str, error: BaseException) -> FaultError:
        reason = " ".join(f"{type(error).__name__}: {str(error) or 'without a message'}".split())
        return FaultError(f"{self.env_id} failed in {what} ({self._place()}): {reason:.400}")

    def places(self) -> str:
        """Say which environment is stepping or being reset, with its level and step."""
        return f"{self.env_id} is busy in {self._place()}"

    def _place(self) -> str:
        return f"environment {self._busy}, level {self._level[self._busy]}, step {self._clock[self._busy]}"

    def observe(self) -> Observation:
        """Return the current observations without stepping.

        Raises:
            FaultError: If one of them is none of the observation space; the environment and the level are named.
        """
        empty: Any = create_empty_array(self.observation_space, self.n_envs)
        try:
            batch: Any = concatenate(self.observation_space, self._latest, empty)
        except Exception as error:
            raise self._wrong_observation() from error
        batch = dict(batch) if isinstance(batch, dict) else batch
        if not _in_range(self.observation_space, batch):
            raise self._wrong_observation()
        return batch  # type: ignore[no-any-return]

    def _wrong_observation(self) -> FaultError:
        for i, obs in enumerate(self._latest):
            if reason := _difference(self.observation_space, obs):
                self._busy = i
                return FaultError(f"{self.env_id} gave a wrong observation ({self._place()}): {reason}")
        return FaultError(f"{self.env_id} gave observations that are not of {self.observation_space}")

    def render(self) -> Array:
        """Return a picture `[n, height, width, 3]` of every environment."""
        if self.render_mode != "rgb_array":
            return super().render()
        try:
            frames = [np.asarray(env.render()) for env in self.envs]
            if any(frame.ndim != 3 or frame.shape != frames[0].shape for frame in frames):
                raise ValueError(f"pictures of shape {', '.join(str(frame.shape) for frame in frames)}")
            return np.stack(frames)
        except FAILURES as error:
            raise self._failure("render", error) from error

    def close(self) -> None:
        """Close the environments; what fails then costs nothing."""
        for env in self.envs:
            with suppress(*FAILURES):
                env.close()


def _check_step(reward: Any, terminated: Any, truncated: Any, info: Any) -> None:
    """Raise a `TypeError` for what Python would convert to a reward, a flag or an info that nobody meant."""
    if reward is None:
        raise TypeError("the reward is None")
    for name, flag in (("terminated", terminated), ("truncated", truncated)):
        if flag is not True and flag is not False and not isinstance(flag, FLAGS):
            raise TypeError(f"{name} is {flag!r:.40}, neither True nor False")
    if type(info) is not dict and not isinstance(info, Mapping):
        raise TypeError(f"the info is {info!r:.40}, no dict")


def _in_range(space: spaces.Space[Any], batch: Any) -> bool:
    """Return whether observations `[n, ...]` of Discrete and MultiDiscrete spaces are among their values."""
    if isinstance(space, spaces.Dict):
        return all(_in_range(part, batch[key]) for key, part in space.spaces.items())
    if isinstance(space, spaces.Discrete):
        return bool(space.start <= batch.min() and batch.max() < space.start + space.n)
    if isinstance(space, spaces.MultiDiscrete):
        return bool((space.start <= batch).all() and (batch < space.start + space.nvec).all())
    return True


def _difference(space: spaces.Space[Any], obs: Any) -> str:
    """Return in which way an observation is none of a space; "" if it is."""
    if isinstance(space, spaces.Dict) and isinstance(obs, Mapping):
        if space.spaces.keys() - obs.keys():
            return f"it has no {', '.join(sorted(space.spaces.keys() - obs.keys()))}"
        parts = ((key, _difference(part, obs[key])) for key, part in space.spaces.items())
        return next((f"{key}: {reason}" for key, reason in parts if reason), "")
    try:
        batch = concatenate(space, [obs], create_empty_array(space, 1))  # type: ignore[arg-type]  # None for Graphs alone
    except Exception:
        shape = np.shape(obs) if isinstance(obs, np.ndarray | list | tuple) else None
        shown = f"an array of shape {shape}" if shape else f"{obs!r:.40}"
        dtype = f" and {obs.dtype}" if isinstance(obs, np.ndarray) else ""
        return f"it is {shown}{dtype}, not of {space!s:.80}"
    return "" if _in_range(space, batch) else f"it is {obs}, not of {space!s:.80}"


def _make(env_id: str, env_kwargs: dict[str, Any], wrappers: Sequence[EnvWrapper]) -> Env:
    try:
        env: Env = gymnasium.make(env_id, **env_kwargs)
    except FAILURES as error:
        if isinstance(error, UserError):
            raise
        reason = " ".join(str(error).split())
        known = isinstance(error, gymnasium.error.Error | TypeError | ImportError | ValueError)
        reason = reason if known else f"{type(error).__name__}: {reason}"
        raise UserError(f"Gymnasium cannot make {env_id!r}: {reason}") from error
    for wrapper in wrappers:
        name = f"wrapper {getattr(wrapper, '__qualname__', type(wrapper).__name__)!r}"
        env = wrapper(env) if isinstance(wrapper, NamedWrapper) else wrap(name, wrapper, env)
    return FlatDictObservation(env) if needs_flattening(env.observation_space) else env
