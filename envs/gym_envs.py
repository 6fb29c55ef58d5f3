"""Gymnasium's single `Env` over any `BatchEnv`, and the classes that the registered ids name."""

from __future__ import annotations

from copy import deepcopy
from typing import Any, ClassVar

import gymnasium
import numpy as np
from gymnasium.vector import AutoresetMode

from srwm_rl.envs.batch import BatchEnv, Observation
from srwm_rl.envs.episodes import obs_row
from srwm_rl.envs.gym_vector_env import BatchGymVectorEnv, checked_options
from srwm_rl.envs.levels import MAX_LEVEL, LevelRange
from srwm_rl.envs.make import make_batch_env
from srwm_rl.envs.tasks import RENDERED_TASKS, TASKS
from srwm_rl.errors import UserError

_TASK_PICTURES = {"render_modes": ["rgb_array"], "render_fps": 4}  # slow enough to follow every step


class NoPicturesError(UserError, TypeError):
    """A `render_mode` for a task without pictures; a `TypeError`, at which SB3 makes the environment without one."""


class BatchGymEnv(gymnasium.Env[Any, Any]):
    """Play a batch of one through Gymnasium's interface.

    `reset(seed=s)` restarts the level sequence, `reset(options={"level": 1003})` plays that level. The info holds
    `level_seed` (the level of the episode that runs or comes next), `prev_level_seed` (the level that the step was
    played in) and at an episode's end `is_success` where the game defines it; where an attempt at a level ended,
    `attempt` (the index) and `attempt_return`.

    ProcGen never draws an episode's last frame: the observation that comes with `terminated` is the next episode's
    first one. After the end, `step` does nothing but return the same again, without reward.
    """

    metadata: ClassVar[dict[str, Any]] = {"render_modes": [], "render_fps": 15}  # type: ignore[misc]  # as ProcGen

    def __init__(self, batch_env: BatchEnv) -> None:
        if batch_env.n_envs != 1:
            raise UserError(f"a single Gymnasium environment needs a batch of one, not of {batch_env.n_envs}")
        self.batch_env = batch_env
        self.observation_space = batch_env.observation_space
        self.action_space = batch_env.action_space
        self.render_mode = batch_env.render_mode
        self._ended: tuple[Observation, bool, bool, dict[str, Any]] | None = None
        self._pinned = False

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Start an episode; see the class for `seed` and `options`."""
        super().reset(seed=seed)
        level = checked_options(options, {"level"}).get("level")
        if seed is not None:
            self.batch_env.reseed(seed % MAX_LEVEL)
        if level is None and seed is None and self._ended is not None and not self._pinned:
            obs = self.batch_env.observe()  # the simulator has begun this episode in the step that ended the last one
        else:
            obs = self.batch_env.reset(levels=None if level is None else [level])
        self._pinned = level is not None
        self._ended = None
        return obs_row(obs, 0), {"level_seed": int(self.batch_env.level_seed()[0])}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Act once."""
        if self._ended is not None:
            obs, terminated, truncated, info = deepcopy(self._ended)
            return obs, 0.0, terminated, truncated, info
        step = self.batch_env.step(np.asarray(action)[None])
        terminated, truncated = bool(step.terminated[0]), bool(step.truncated[0])
        info = {key: int(step.info[key][0]) for key in ("level_seed", "prev_level_seed")}
        if "attempt_ended" in step.info and step.info["attempt_ended"][0]:
            info["attempt"], info["attempt_return"] = (
                int(step.info["attempt"][0]),
                float(step.info["attempt_return"][0]),
            )
        obs = obs_row(step.obs if step.final_obs is None else step.final_obs, 0)
        if terminated or truncated:
            if "is_success" in step.info:
                info["is_success"] = bool(step.info["is_success"][0])
            self._ended = deepcopy((obs, terminated, truncated, info))
        return obs, float(step.rewards[0]), terminated, truncated, info

    def render(self) -> Any:
        """Return a picture `[height, width, 3]`, or None without a render mode."""
        return None if self.render_mode is None else self.batch_env.render()[0]

    def close(self) -> None:
        """Free what the simulator holds."""
        self.batch_env.close()


class ProcgenGymEnv(BatchGymEnv):
    """Play one ProcGen game: `gymnasium.make("srwm_rl:procgen-coinrun-v0", levels="0:200", mode="easy")`.

    `num_levels` and `start_level` (as in ProcGen, 0 levels meaning all) say the same as `levels`, and
    `distribution_mode` the same as `mode`. Without them all levels are played, in easy mode.
    `render_mode="rgb_array"` draws 512x512 frames.
    """

    metadata: ClassVar[dict[str, Any]] = {**BatchGymEnv.metadata, "render_modes": ["rgb_array"]}  # type: ignore[misc]

    def __init__(self, game: str, **settings: Any) -> None:
        super().__init__(_make(game, 1, **settings))


class ProcgenGymVectorEnv(BatchGymVectorEnv):
    """Play `num_envs` copies of one ProcGen game; the settings are those of `ProcgenGymEnv`, and `autoreset_mode`."""

    metadata: ClassVar[dict[str, Any]] = {**BatchGymVectorEnv.metadata, "render_modes": ["rgb_array"]}  # type: ignore[misc]

    def __init__(
        self,
        game: str,
        num_envs: int = 1,
        autoreset_mode: AutoresetMode | str = AutoresetMode.SAME_STEP,
        **settings: Any,
    ) -> None:
        super().__init__(_make(game, num_envs, **settings), autoreset_mode)


class TaskGymEnv(BatchGymEnv):
    """Play one of the built-in memory tasks: `gymnasium.make("srwm_rl:srwm_rl/Recall-v0", levels="0:1000")`."""

    def __init__(self, task: str, **settings: Any) -> None:
        super().__init__(_make(task, 1, **settings))


class TaskGymVectorEnv(BatchGymVectorEnv):
    """Play `num_envs` copies of a built-in memory task."""

    def __init__(
        self,
        task: str,
        num_envs: int = 1,
        autoreset_mode: AutoresetMode | str = AutoresetMode.SAME_STEP,
        **settings: Any,
    ) -> None:
        super().__init__(_make(task, num_envs, **settings), autoreset_mode)


class RenderedTaskGymEnv(TaskGymEnv):
    """Play a task with pictures: `gymnasium.make("srwm_rl:srwm_rl/HiddenControls-v0", render_mode="rgb_array")`."""

    metadata: ClassVar[dict[str, Any]] = {**BatchGymEnv.metadata, **_TASK_PICTURES}  # type: ignore[misc]


class RenderedTaskGymVectorEnv(TaskGymVectorEnv):
    """Play `num_envs` copies of a task with pictures."""

    metadata: ClassVar[dict[str, Any]] = {**BatchGymVectorEnv.metadata, **_TASK_PICTURES}  # type: ignore[misc]


def _make(
    name: str,
    n_envs: int,
    levels: str | LevelRange | None = None,
    mode: str | None = None,
    num_levels: int | None = None,
    start_level: int | None = None,
    distribution_mode: str | None = None,
    seed: int | None = None,
    **settings: Any,
) -> BatchEnv:
    if levels is not None and (num_levels is not None or start_level is not None):
        raise UserError("give either levels or num_levels and start_level, not both")
    if mode is not None and distribution_mode is not None:
        raise UserError("mode and distribution_mode are two names for one setting; give one of them")
    if name in TASKS and name not in RENDERED_TASKS and settings.pop("render_mode", None) is not None:
        raise NoPicturesError(f"{name} has no pictures; leave render_mode out")
    if levels is None:
        start = start_level or 0
        levels = f"{start}:{start + num_levels}" if num_levels else "all"
    if seed is None:  # drawn, as Gymnasium's environments do
        seed = int(np.random.default_rng().integers(MAX_LEVEL))
    return make_batch_env(name, n_envs, levels, seed, mode or distribution_mode or "easy", settings)
