"""What is played in a recording, so that it can be played again; and what the steps looked like."""

from __future__ import annotations

import warnings
import zlib
from tempfile import TemporaryFile
from typing import Annotated, Any

import msgspec
import numpy as np
import numpy.typing as npt
from gymnasium.envs.registration import load_env_creator
from stable_baselines3.common.vec_env import VecEnv

from srwm_rl.envs.levels import MAX_LEVEL
from srwm_rl.envs.make import make_levels_env, resolve
from srwm_rl.envs.origin import entry_point
from srwm_rl.envs.procgen.games import idle_actions
from srwm_rl.envs.tasks import TASKS
from srwm_rl.errors import UserError
from srwm_rl.scripts.cli import warn
from srwm_rl.scripts.config.settings import Wrappers, load_wrappers, pairs

# procgen/env.py, BaseProcgenEnv.get_combos: nine directions, then six keys whose meaning depends on the game.
PROCGEN_ACTIONS = "↙←↖↓·↑↘→↗DAWSQE"
PROCGEN_FPS, SLOW_FPS = 15, 4  # ProcGen's own rate; slow enough to read numbers


class Scene(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One environment and the levels that are played in it, one after the other."""

    env: str  # one game, task or Gymnasium id
    level: Annotated[int, msgspec.Meta(ge=0, le=MAX_LEVEL)]  # the first
    n_levels: Annotated[int, msgspec.Meta(ge=1)] = 1
    seed: Annotated[int, msgspec.Meta(ge=0, le=MAX_LEVEL)] = 0
    mode: str = "easy"
    env_kwargs: tuple[str, ...] = ()  # as name:value, without a render_mode
    inputs: tuple[str, ...] = ()
    reward_clip: float = 1.0  # as in training; 0: no clipping
    attempts: Annotated[int, msgspec.Meta(ge=1, le=1000)] = 1
    shuffle_actions: bool = False
    wrapper: Wrappers = ()
    atari: bool = False
    frame_stack: Annotated[int, msgspec.Meta(ge=1, le=64)] = 1

    def levels(self) -> range:
        """Return the levels, in the order of play."""
        return range(self.level, self.level + self.n_levels)

    def kind(self) -> str:
        """Return "procgen", "task" or "gymnasium"."""
        return resolve(self.env).kind

    def feature_names(self) -> tuple[str, ...]:
        """Return the names of the elements of a built-in task's observation; (): they have none."""
        if self.kind() != "task":
            return ()
        return TASKS[self.env].feature_names(**pairs(self.env_kwargs, "env_kwargs"))

    def action_names(self) -> tuple[str, ...]:
        """Return the names of the actions of a game or task, unless they depend on the level; (): they have none."""
        if self.shuffle_actions or self.kind() == "gymnasium":
            return ()
        if self.kind() == "procgen":
            return tuple(PROCGEN_ACTIONS)
        return TASKS[self.env].action_names(**pairs(self.env_kwargs, "env_kwargs"))

    def idle_actions(self) -> tuple[int, ...]:
        """Return the actions that do nothing in a ProcGen game, unless they depend on the level."""
        return idle_actions(self.env) if self.kind() == "procgen" and not self.shuffle_actions else ()

    def make(self, render: bool = False) -> VecEnv:
        """Make the environment; `render`: with pictures.

        Raises:
            UserError: there is no such environment, level or picture.
        """
        kwargs = pairs(self.env_kwargs, "env_kwargs") | ({"render_mode": "rgb_array"} if render else {})
        reward_clip, attempts = self.reward_clip or None, self.attempts
        return make_levels_env(
            *(self.env, 1, self.levels(), 1, self.seed, self.mode, kwargs, self.inputs, reward_clip, attempts),
            shuffle_actions=self.shuffle_actions,
            wrappers=load_wrappers(self.atari, self.wrapper),
            frame_stack=self.frame_stack,
        )

    def make_with_album(self) -> tuple[VecEnv, Album]:
        """Make the environment, rendering if it can, and the album for its pictures or observations.

        Raises:
            UserError: as `make`.
        """
        if self.kind() == "procgen":
            env = self.make(render=True)
            return env, Album(env)
        rendering = _make_rendering(self)
        return rendering or self.make(), Album(rendering)

    def fps(self, rendered: bool) -> int:
        """Return the frames per second of a film; `rendered`: with the environment's pictures."""
        if self.kind() == "procgen":
            return PROCGEN_FPS
        if not rendered or self.kind() == "task":
            return SLOW_FPS
        entry = entry_point(self.env)
        creator = load_env_creator(entry) if isinstance(entry, str) else entry
        fps = getattr(creator, "metadata", {}).get("render_fps", PROCGEN_FPS)
        return min(max(round(fps), 1), 60) if isinstance(fps, int | float) else PROCGEN_FPS


def _make_rendering(scene: Scene) -> VecEnv | None:
    """Return an environment with pictures, or None if it has none; a warning says why rendering fails."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about render modes that an environment lacks
        try:
            env = scene.make(render=True)
        except UserError:
            scene.make().close()  # raises unless only the render mode was wrong
            return None
        try:
            env.reset()
            _render(env)
        except Exception as error:  # renderers raise anything: no display, a missing package
            env.close()
            reason = " ".join(str(error).split())
            warn(f"{scene.env} cannot render itself ({reason}); its observations are drawn instead")
            return None
    return env


def _render(env: VecEnv) -> npt.NDArray[np.uint8]:
    picture = np.asarray(env.get_images()[0])
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[-1] != 3:
        raise ValueError(f"its picture is {picture.dtype} of shape {picture.shape}, not uint8 [height, width, 3]")
    return picture


class Album:
    """Stores what each step looked like: pictures, compressed in a temporary file, or else the observations.

    Args:
        env: renders the pictures; None: an observation may be a picture itself.
    """

    def __init__(self, env: VecEnv | None = None) -> None:
        self._env = env
        self._file = TemporaryFile()  # noqa: SIM115 (closed by `close`; long films do not fit into memory)
        self._index: list[tuple[int, int, tuple[int, ...]]] = []  # offset, size in bytes and shape of each picture
        self._observations: list[dict[str, npt.NDArray[Any]]] = []

    def close(self) -> None:
        """Delete the pictures."""
        self._file.close()

    @property
    def has_pictures(self) -> bool:
        """Whether the steps were stored as pictures."""
        return bool(self._index)

    def add(self, obs: Any) -> None:
        """Store what a step looks like, given its observation `[1, ...]` or dict of such."""
        parts = obs if isinstance(obs, dict) else {"observation": obs}
        picture = _picture_in(parts) if self._env is None else _render(self._env)
        if picture is not None:
            compressed = zlib.compress(picture.tobytes(), 1)
            self._index.append((self._file.tell(), len(compressed), picture.shape))
            self._file.write(compressed)
        else:
            self._observations.append({name: np.asarray(value[0]) for name, value in parts.items()})

    def picture(self, t: int) -> npt.NDArray[np.uint8]:
        """Return the picture of step t, `[height, width, 3]`."""
        offset, size, shape = self._index[t]
        self._file.seek(offset)
        return np.frombuffer(zlib.decompress(self._file.read(size)), np.uint8).reshape(shape)

    def observations(self) -> dict[str, npt.NDArray[np.float64]]:
        """Return the parts of the observations by name, `[T, n]`."""
        return {
            name: np.stack([parts[name].ravel() for parts in self._observations]).astype(np.float64)
            for name in self._observations[0]
        }


def _picture_in(parts: dict[str, npt.NDArray[Any]]) -> npt.NDArray[np.uint8] | None:
    """Return a part of an observation that is a picture, as `[height, width, 3]`."""
    for value in parts.values():
        if value.dtype == np.uint8 and value.ndim == 4 and value.shape[-1] in (1, 3):
            return np.ascontiguousarray(np.broadcast_to(value[0], (*value.shape[1:3], 3)))
    return None
