"""Stable-Baselines3's `VecEnv` over any `BatchEnv`."""

from __future__ import annotations

import math
import warnings
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, Literal, get_args

import gymnasium
import numpy as np
import numpy.typing as npt
from stable_baselines3.common.env_util import is_wrapped
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import VecEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnvIndices

from srwm_rl.envs.batch import Array, BatchEnv, BatchStep, FloatArray, Observation, State, check_state
from srwm_rl.envs.episodes import EpisodeStats, obs_row
from srwm_rl.envs.levels import MAX_LEVEL, BoolArray, IntArray, LevelRange
from srwm_rl.envs.procgen.batch import ProcgenBatch
from srwm_rl.errors import FaultError, UserError

OnNan = Literal["stop", "skip"]
Step = tuple[Observation, FloatArray, BoolArray, list[dict[str, Any]]]


class StatefulVecEnv(VecEnv):
    """A `VecEnv` with an exact state: its own arrays, and the state of the environments that it holds."""

    _held = "venv"
    """The attribute with these environments, and their key in the state."""

    @property
    def supports_state(self) -> bool:
        """Whether `get_state` and `set_state` work with the environments inside."""
        return bool(getattr(getattr(self, self._held), "supports_state", False))

    def get_state(self) -> State:
        """Return everything that decides what happens next, without pickles."""
        arrays = {key: array.copy() for key, array in self._arrays().items()}
        return {self._held: getattr(self, self._held).get_state(), **arrays}

    def set_state(self, state: State) -> None:
        """Continue exactly where `get_state` was called.

        Raises:
            UserError: If the state is not one of such environments.
        """
        arrays = self._arrays()
        check_state(state, {self._held, *arrays}, arrays)
        getattr(self, self._held).set_state(state[self._held])
        self._set_arrays({key: state[key].copy() for key in arrays})

    @abstractmethod
    def _arrays(self) -> dict[str, Array]:
        """Return the arrays of the state, not copied."""

    @abstractmethod
    def _set_arrays(self, arrays: dict[str, Array]) -> None:
        """Take over arrays that `_arrays` returned, in this or another instance."""

    def getattr_depth_check(self, name: str, already_found: bool) -> str | None:
        """Let outer wrappers find what hides the inner environments' own on purpose."""
        if name in ("supports_state", "get_state", "set_state", "observe") and not already_found:
            return None
        return super().getattr_depth_check(name, already_found)


class BatchVecEnv(StatefulVecEnv):
    """Give a `BatchEnv` the interface that Stable-Baselines3 trains on.

    The info of an environment whose episode just ended holds `episode` (`r` return, `l` length in steps, `t` seconds
    since construction), `level_seed` (of the new episode), `prev_level_seed` (of the ended one), `game`,
    `TimeLimit.truncated`, and where they exist `is_success` and `terminal_observation`. Where an attempt at a level
    ended (`AttemptsBatch`, or a task with attempts), it holds `attempt` (the index) and `attempt_return`. Other infos
    are empty.

    `set_options({"levels": [...]})` fixes the level of every environment at the next `reset`.

    Attributes and methods are those of the simulator; names that it has not are looked up in the environments of a
    Gymnasium id, each with its own value.

    Args:
        batch_env: The simulator.
        on_nan: What to do when it gives a reward or an observation that is not finite, which would destroy whatever is
            trained on it: "stop" raises; "skip" puts 0 in its place and says so once per game.

    Raises:
        UserError: If `on_nan` is neither.
        FaultError: With "stop", from `step_wait` and `reset`; the quantity, game, level and step are named.
    """

    _held = "batch_env"

    def __init__(self, batch_env: BatchEnv, on_nan: OnNan = "stop") -> None:
        if on_nan not in get_args(OnNan):
            raise UserError(f"on_nan must be {' or '.join(get_args(OnNan))}, not {on_nan!r}")
        self.batch_env = batch_env
        self.on_nan = on_nan
        self._games = batch_env.game_names
        self._stats = EpisodeStats(batch_env.n_envs)
        self._actions: Any = None
        self._warned: set[tuple[str, str]] = set()  # quantity and game
        super().__init__(batch_env.n_envs, batch_env.observation_space, batch_env.action_space)

    def reset(self) -> Observation:
        """Start new episodes everywhere and return their first observations."""
        if self._seeds[0] is not None:
            self.batch_env.reseed(int(self._seeds[0]) % MAX_LEVEL)
        options = self._options[0]
        self._reset_options()
        begun = self._begin(options)
        self._reset_seeds()
        self._stats.restart(slice(None))
        self.reset_infos = [{"level_seed": level} for level in self.batch_env.level_seed().tolist()]
        obs: Observation = self._finite("observation", begun)
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
        step = self.batch_env.step(self._actions)
        played = step.info["prev_level_seed"]  # where an episode ended, the level is the next one's already
        rewards = self._finite("reward", step.rewards, played)
        obs = self._finite("observation", step.obs)
        final_obs = self._finite("last observation", step.final_obs, played)
        step = BatchStep(obs, rewards, step.terminated, step.truncated, step.info, final_obs)
        dones = step.terminated | step.truncated
        infos: list[dict[str, Any]] = [{} for _ in range(self.num_envs)]
        for i, episode in self._stats.add(rewards, dones).items():
            infos[i] = self._episode_info(step, i, episode)
        if "attempt_ended" in step.info:
            for i in step.info["attempt_ended"].nonzero()[0].tolist():
                infos[i] |= self._attempt_info(step, i)
        return obs, rewards, dones, infos

    def _finite(self, what: str, values: Any, levels: Array | None = None) -> Any:
        """Return arrays `[n, ...]` as they are where they are finite; else do what `on_nan` says."""
        if isinstance(values, dict):
            if all(map(all_finite, values.values())):
                return values
            return {key: self._finite(f"{what} {key!r}", part, levels) for key, part in values.items()}
        if values is None or all_finite(values):
            return values
        bad = int(np.flatnonzero(~np.isfinite(values.reshape(self.num_envs, -1)).all(axis=1))[0])
        level = int((self.batch_env.level_seed() if levels is None else levels)[bad])
        place = f"{self._games[bad]}, environment {bad}, level {level}, step {self._stats.lengths[bad]}"
        if self.on_nan == "stop":
            raise FaultError(f"the {what} is not finite ({place})")
        if (what, self._games[bad]) not in self._warned:
            self._warned.add((what, self._games[bad]))
            warnings.warn(
                f"the {what} is not finite and counts as 0 ({place}); further ones are not reported", stacklevel=2
            )
        return np.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0)

    def _episode_info(self, step: BatchStep, i: int, episode: dict[str, Any]) -> dict[str, Any]:
        info: dict[str, Any] = {
            "episode": episode,
            "level_seed": int(step.info["level_seed"][i]),
            "prev_level_seed": int(step.info["prev_level_seed"][i]),
            "game": self._games[i],
            "TimeLimit.truncated": bool(step.truncated[i] and not step.terminated[i]),
        }
        if "is_success" in step.info:
            info["is_success"] = bool(step.info["is_success"][i])
        if step.final_obs is not None:
            info["terminal_observation"] = obs_row(step.final_obs, i)
        return info

    def _attempt_info(self, step: BatchStep, i: int) -> dict[str, Any]:
        info = step.info
        return {"attempt": int(info["attempt"][i]), "attempt_return": float(info["attempt_return"][i])}

    def observe(self) -> Observation:
        """Return the current observations without stepping, as after `set_state`."""
        return self.batch_env.observe()

    @property
    def has_answers(self) -> bool:
        """Whether `answers` works; see `BatchEnv.has_answers`."""
        return self.batch_env.has_answers

    def answers(self) -> IntArray:
        """Return the right action for each current observation, `[n]`; see `BatchEnv.answers`."""
        return self.batch_env.answers()

    def step_notes(self) -> dict[str, IntArray]:
        """Return what a film says about the current observations, `[n]` per name; see `BatchEnv.step_notes`."""
        return self.batch_env.step_notes()

    def _arrays(self) -> dict[str, Array]:
        return {"returns": self._stats.returns, "lengths": self._stats.lengths}

    def _set_arrays(self, arrays: dict[str, Array]) -> None:
        self._stats.returns, self._stats.lengths = arrays["returns"], arrays["lengths"]

    def close(self) -> None:
        """Free what the simulator holds."""
        self.batch_env.close()

    def get_images(self) -> Sequence[npt.NDArray[np.uint8] | None]:
        """Return a picture of every environment."""
        return list(self.batch_env.render())

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        """Return an attribute of the simulator, once per environment asked for, or one of theirs."""
        if envs := self._owners(attr_name, indices):
            return [env.get_wrapper_attr(attr_name) for env in envs]
        return [getattr(self.batch_env, attr_name)] * self._count(indices)

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        """Set an attribute of the simulator, which all environments share, or one of theirs.

        Raises:
            UserError: If none has the attribute, or only some of the environments are meant and the simulator has it.
        """
        envs = self._owners(attr_name, indices)
        for env in envs:
            env.set_wrapper_attr(attr_name, value)
        if envs:
            return
        if not hasattr(self.batch_env, attr_name):
            raise UserError(f"{self._games[0]} has no attribute {attr_name!r}")
        if self._count(indices) != self.num_envs:
            raise UserError("one simulator holds all environments; set attributes for all of them (indices=None)")
        setattr(self.batch_env, attr_name, value)

    def env_method(
        self, method_name: str, *method_args: Any, indices: VecEnvIndices = None, **method_kwargs: Any
    ) -> list[Any]:
        """Call a method of the simulator once and return its result for every environment asked for, or call theirs."""
        if envs := self._owners(method_name, indices):
            return [env.get_wrapper_attr(method_name)(*method_args, **method_kwargs) for env in envs]
        return [getattr(self.batch_env, method_name)(*method_args, **method_kwargs)] * self._count(indices)

    def env_is_wrapped(self, wrapper_class: type[Any], indices: VecEnvIndices = None) -> list[bool]:
        """Return whether environments are wrapped in a class; SB3's `Monitor` counts, whose infos are here already."""
        if envs := [] if issubclass(wrapper_class, Monitor) else self._gymnasium_envs(indices):
            return [is_wrapped(env, wrapper_class) for env in envs]
        return [issubclass(wrapper_class, Monitor)] * self._count(indices)

    def _owners(self, name: str, indices: VecEnvIndices) -> list[gymnasium.Env[Any, Any]]:
        """Return the Gymnasium environments asked for if they have a name that the simulator has not; else none."""
        envs = [] if hasattr(self.batch_env, name) else self._gymnasium_envs(indices)
        return envs if all(env.has_wrapper_attr(name) for env in envs) else []

    def _gymnasium_envs(self, indices: VecEnvIndices) -> list[gymnasium.Env[Any, Any]]:
        return [self.batch_env.envs[i] for i in self._get_indices(indices)] if self.batch_env.envs else []

    def _count(self, indices: VecEnvIndices) -> int:
        return len(list(self._get_indices(indices)))


class ProcgenVecEnv(BatchVecEnv):
    """Play ProcGen games in Stable-Baselines3; see `ProcgenBatch` for the arguments and `BatchVecEnv` for the infos.

    By default `levels` are 0:200, in exploration mode its one level.
    """

    def __init__(
        self,
        games: str | Sequence[str],
        n_envs: int,
        levels: str | LevelRange | None = None,
        mode: str = "easy",
        seed: int = 0,
        **options: Any,
    ) -> None:
        if levels is None:
            levels = "all" if mode == "exploration" else "0:200"
        super().__init__(ProcgenBatch(games, n_envs, levels, mode, seed, **options))


def all_finite(values: Array) -> bool:
    """Return whether all numbers of an array are finite."""
    # The sum of squares takes a third of the time of isfinite; it may overflow, though.
    return values.dtype.kind != "f" or math.isfinite(np.vdot(values, values)) or bool(np.isfinite(values).all())
