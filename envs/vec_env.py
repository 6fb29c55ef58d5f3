"""Stable-Baselines3's `VecEnv` over any `BatchEnv`."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import VecEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnvIndices

from srwm_rl.envs.batch import Array, BatchEnv, BatchStep, Observation, State, check_array
from srwm_rl.envs.levels import MAX_LEVEL, LevelRange
from srwm_rl.envs.procgen.batch import ProcgenBatch
from srwm_rl.errors import FaultError, UserError

OnNan = Literal["stop", "skip"]
Step = tuple[Observation, npt.NDArray[np.float32], npt.NDArray[np.bool_], list[dict[str, Any]]]


class BatchVecEnv(VecEnv):
    """Give a `BatchEnv` the interface that Stable-Baselines3 trains on.

    The info of an environment whose episode just ended holds `episode` (`r` return, `l` length in steps, `t` seconds
    since construction), `level_seed` (of the new episode), `prev_level_seed` (of the ended one), `game`,
    `TimeLimit.truncated`, and where they exist `is_success` and `terminal_observation`. Other infos are empty.

    `set_options({"levels": [...]})` fixes the level of every environment at the next `reset`.

    Args:
        batch_env: The simulator.
        on_nan: What to do when it gives a reward or an observation that is not finite, which would destroy whatever is
            trained on it: "stop" raises; "skip" puts 0 in its place and says so once per game.

    Raises:
        FaultError: With "stop", from `step_wait` and `reset`; the quantity, game, level and step are named.
    """

    reset_infos: list[dict[str, Any]]

    def __init__(self, batch_env: BatchEnv, on_nan: OnNan = "stop") -> None:
        self.batch_env = batch_env
        self.on_nan = on_nan
        self.level_range = batch_env.levels
        self._games = batch_env.game_names
        self._returns = np.zeros(batch_env.n_envs, np.float64)
        self._lengths = np.zeros(batch_env.n_envs, np.int64)
        self._started = time.perf_counter()
        self._actions: Any = None
        self._warned: set[tuple[str, str]] = set()  # quantity and game
        super().__init__(batch_env.n_envs, batch_env.observation_space, batch_env.action_space)

    def reset(self) -> Observation:
        """Start new episodes everywhere and return their first observations."""
        if self._seeds[0] is not None:
            self.batch_env.reseed(int(self._seeds[0]) % MAX_LEVEL)
        obs = self._begin(self._options[0])
        self._reset_seeds()
        self._reset_options()
        self._returns[:] = 0.0
        self._lengths[:] = 0
        obs = self._finite("observation", obs)
        self.reset_infos = [{"level_seed": level} for level in self.batch_env.level_seed().tolist()]
        return obs

    def _begin(self, options: dict[str, Any]) -> Observation:
        if set(options) - {"levels"}:
            raise UserError(f"reset options {sorted(options)} are not known; the one option is 'levels'")
        return self.batch_env.reset(levels=options.get("levels"))

    def step_async(self, actions: Array) -> None:
        """Keep the actions for `step_wait`."""
        self._actions = actions

    def step_wait(self) -> Step:
        """Act, and return observations, rewards, dones and infos."""
        step = self._checked(self.batch_env.step(self._actions))
        self._returns += step.rewards
        self._lengths += 1
        dones = step.terminated | step.truncated
        infos: list[dict[str, Any]] = [{} for _ in range(self.num_envs)]
        ended = dones.nonzero()[0]
        if len(ended):
            now = round(time.perf_counter() - self._started, 6)
            for i in ended.tolist():
                infos[i] = self._episode_info(step, i, now)
            self._returns[ended] = 0.0
            self._lengths[ended] = 0
        return step.obs, step.rewards, dones, infos

    def _checked(self, step: BatchStep) -> BatchStep:
        played = step.info["prev_level_seed"]  # where an episode ended, the level is the next one's already
        rewards = self._finite("reward", step.rewards, played)
        obs = self._finite("observation", step.obs)
        last = None if step.final_obs is None else self._finite("last observation", step.final_obs, played)
        if rewards is step.rewards and obs is step.obs and last is step.final_obs:
            return step
        return step._replace(rewards=rewards, obs=obs, final_obs=last)  # type: ignore[arg-type]

    def _finite(self, what: str, values: Observation, levels: Array | None = None) -> Observation:
        """Return arrays `[n, ...]` as they are where they are finite; else do what `on_nan` says."""
        if isinstance(values, dict):
            if all(map(all_finite, values.values())):
                return values
            return {key: self._finite(f"{what} {key!r}", part, levels) for key, part in values.items()}  # type: ignore[misc]
        if all_finite(values):
            return values
        bad = int(np.flatnonzero(~np.isfinite(values.reshape(self.num_envs, -1)).all(axis=1))[0])
        level = int((self.batch_env.level_seed() if levels is None else levels)[bad])
        place = f"{self._games[bad]}, environment {bad}, level {level}, step {self._lengths[bad]}"
        if self.on_nan == "stop":
            raise FaultError(f"the {what} is not finite ({place})")
        if (what, self._games[bad]) not in self._warned:
            self._warned.add((what, self._games[bad]))
            warnings.warn(
                f"the {what} is not finite and counts as 0 ({place}); further ones are not reported", stacklevel=2
            )
        return np.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0)

    def _episode_info(self, step: BatchStep, i: int, now: float) -> dict[str, Any]:
        info: dict[str, Any] = {
            "episode": {"r": float(self._returns[i]), "l": int(self._lengths[i]), "t": now},
            "level_seed": int(step.info["level_seed"][i]),
            "prev_level_seed": int(step.info["prev_level_seed"][i]),
            "game": self._games[i],
            "TimeLimit.truncated": bool(step.truncated[i] and not step.terminated[i]),
        }
        if "is_success" in step.info:
            info["is_success"] = bool(step.info["is_success"][i])
        if isinstance(step.final_obs, dict):
            info["terminal_observation"] = {key: value[i] for key, value in step.final_obs.items()}
        elif step.final_obs is not None:
            info["terminal_observation"] = step.final_obs[i]
        return info

    @property
    def supports_state(self) -> bool:
        """Whether `get_state` and `set_state` work with this simulator."""
        return self.batch_env.supports_state

    def observe(self) -> Observation:
        """Return the current observations without stepping, as after `set_state`."""
        return self.batch_env.observe()

    def get_state(self) -> State:
        """Return everything that decides what happens next, running returns and lengths included, without pickles."""
        return {
            "batch_env": self.batch_env.get_state(),
            "returns": self._returns.copy(),
            "lengths": self._lengths.copy(),
        }

    def set_state(self, state: State) -> None:
        """Continue exactly where `get_state` was called.

        Raises:
            UserError: If the state is not one of such environments.
        """
        check_arrays(state, {"returns": self._returns, "lengths": self._lengths}, "batch_env")
        self.batch_env.set_state(state["batch_env"])
        self._returns = state["returns"].copy()
        self._lengths = state["lengths"].copy()

    def close(self) -> None:
        """Free what the simulator holds."""
        self.batch_env.close()

    def get_images(self) -> Sequence[npt.NDArray[np.uint8] | None]:
        """Return a picture of every environment."""
        return list(self.batch_env.render())

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        """Return an attribute of the simulator, once per environment asked for."""
        return [getattr(self.batch_env, attr_name)] * self._count(indices)

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        """Set an attribute of the simulator, which all environments share.

        Raises:
            UserError: If only some of the environments are meant.
        """
        if self._count(indices) != self.num_envs:
            raise UserError("one simulator holds all environments; set attributes for all of them (indices=None)")
        setattr(self.batch_env, attr_name, value)

    def env_method(
        self, method_name: str, *method_args: Any, indices: VecEnvIndices = None, **method_kwargs: Any
    ) -> list[Any]:
        """Call a method of the simulator once and return its result for every environment asked for."""
        return [getattr(self.batch_env, method_name)(*method_args, **method_kwargs)] * self._count(indices)

    def env_is_wrapped(self, wrapper_class: type[Any], indices: VecEnvIndices = None) -> list[bool]:
        """Return True for SB3's `Monitor` alone, whose infos are here already."""
        return [issubclass(wrapper_class, Monitor)] * self._count(indices)

    def _count(self, indices: VecEnvIndices) -> int:
        return len(list(self._get_indices(indices)))


class ProcgenVecEnv(BatchVecEnv):
    """Play ProcGen games in Stable-Baselines3; see `ProcgenBatch` for the arguments and `BatchVecEnv` for the infos."""

    def __init__(
        self,
        games: str | Sequence[str],
        n_envs: int,
        levels: str | LevelRange = "0:200",
        mode: str = "easy",
        seed: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(ProcgenBatch(games, n_envs, levels, mode, seed, **options))


def all_finite(values: Array) -> bool:
    """Return whether all numbers of an array are finite."""
    # The sum of squares takes a third of the time of isfinite; it may overflow, though.
    return values.dtype.kind != "f" or math.isfinite(np.vdot(values, values)) or bool(np.isfinite(values).all())


def check_arrays(state: Any, arrays: dict[str, Array], inner: str) -> None:
    """Raise a UserError unless `state` holds these arrays, in type and shape, and the key `inner`, and no more."""
    if not isinstance(state, dict) or set(state) != {inner, *arrays}:
        raise UserError("this is not a saved state of these environments; give what their get_state returned")
    for key, array in arrays.items():
        check_array(key, state[key], array)
