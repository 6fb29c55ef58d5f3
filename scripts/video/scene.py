"""What is played in a recording, so that it can be played again: environment and levels, and what they look like."""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import metadata
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from srwm_rl.errors import UserError
from srwm_rl.scripts.cli import warn
from srwm_rl.scripts.config.settings import pairs

if TYPE_CHECKING:
    from stable_baselines3.common.vec_env import VecEnv

PROCGEN_FPS, SLOW_FPS = 15, 4  # what ProcGen was made for; what the eye can follow where nothing moves
TYPES = {"env": str, "level": int, "n_levels": int, "seed": int, "mode": str, "reward_clip": float}
PROCGEN_DISTRIBUTIONS = ("procgen", "procgen-mirror", "procgen-gym")  # all import as procgen


@dataclass(frozen=True)
class Scene:
    """One environment and the levels that it plays one after the other."""

    env: str
    """One game, task or Gymnasium id."""
    level: int
    """The first level."""
    n_levels: int = 1
    seed: int = 0
    mode: str = "easy"
    env_kwargs: tuple[str, ...] = ()
    """As name:value, without a render_mode."""
    inputs: tuple[str, ...] = ()
    reward_clip: float = 1.0
    """As in training; 0: no clipping."""

    def levels(self) -> range:
        """Return the levels, in the order of play."""
        return range(self.level, self.level + self.n_levels)

    def kind(self) -> str:
        """Return "procgen", "task" or "gymnasium"."""
        from srwm_rl.envs.make import resolve

        return resolve(self.env).kind

    def to_json(self) -> dict[str, Any]:
        """Return the fields in JSON's types."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Scene:
        """Rebuild what `to_json` gave; anything else raises a TypeError or a UserError."""
        scene = cls(**{**data, "inputs": tuple(data["inputs"]), "env_kwargs": tuple(data["env_kwargs"])})
        for name, kind in TYPES.items():
            if type(getattr(scene, name)) is not kind:
                raise TypeError(name)
        if not all(isinstance(each, str) for each in (*scene.inputs, *scene.env_kwargs)) or scene.n_levels < 1:
            raise TypeError("scene")
        return scene

    def make(self, pictures: bool = False) -> VecEnv:
        """Make the environment, with pictures if it has any and they are wanted.

        Raises:
            UserError: there is no such environment or level.
        """
        from srwm_rl.envs.make import make_levels_env

        kwargs = pairs(self.env_kwargs, "env_kwargs") | ({"render_mode": "rgb_array"} if pictures else {})
        return make_levels_env(
            self.env, 1, self.levels(), 1, self.seed, self.mode, kwargs, self.inputs, self.reward_clip or None
        )

    def stage(self) -> tuple[VecEnv, Album]:
        """Make the environment and what keeps its looks.

        Raises:
            UserError: as `make`.
        """
        kind = self.kind()
        if kind == "procgen":
            env = self.make(pictures=True)
            return env, Album(env)
        drawn = _drawn(self) if kind == "gymnasium" else None
        return (self.make(), Album(None)) if drawn is None else (drawn, Album(drawn))

    def versions(self) -> dict[str, str]:
        """Return the distribution that decides what the environment does, and its version."""
        kind = self.kind()
        if kind == "task":
            return {}  # ours: the digest of the observations tells a change
        for name in PROCGEN_DISTRIBUTIONS if kind == "procgen" else _distributions_of(self.env):
            try:
                return {name: metadata.version(name)}
            except metadata.PackageNotFoundError:
                continue
        return {}


def _distributions_of(env_id: str) -> tuple[str, ...]:
    import gymnasium

    entry = gymnasium.spec(env_id.rpartition(":")[2]).entry_point  # resolve() has imported the module
    module = entry.partition(":")[0] if isinstance(entry, str) else getattr(entry, "__module__", "")
    return tuple(metadata.packages_distributions().get(module.partition(".")[0], ()))


def _drawn(scene: Scene) -> VecEnv | None:
    """Return a Gymnasium environment that draws itself, or None, with a warning, where there is none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of render modes that an environment does not have
        try:
            env = scene.make(pictures=True)
        except UserError:
            scene.make().close()  # which says what is wrong if that is not the render mode
            return None
        try:
            env.reset()
            _picture(env)
        except Exception as error:  # whatever its drawing needs and has not got
            env.close()
            reason = " ".join(str(error).split())
            warn(f"{scene.env} cannot draw itself ({reason}); its observations are drawn instead")
            return None
    return env


def _picture(env: VecEnv) -> npt.NDArray[np.uint8]:
    picture = np.asarray(env.get_images()[0])
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[-1] != 3:
        raise ValueError(f"its picture is {picture.dtype} of shape {picture.shape}, not uint8 [height, width, 3]")
    return picture


class Album:
    """Keeps what the steps looked like: pictures, in a temporary file, and otherwise the observations.

    Args:
        env: draws the pictures; None: there are none.
    """

    def __init__(self, env: VecEnv | None) -> None:
        self._env = env
        self._file = TemporaryFile()  # noqa: SIM115 (open until `close`; long films do not fit into the memory)
        self._pictures: list[tuple[int, int, tuple[int, ...]]] = []  # where each begins in it, its bytes and its shape
        self._observed: list[dict[str, Any]] = []

    def close(self) -> None:
        """Delete the pictures."""
        self._file.close()

    def see(self, obs: Any) -> None:
        """Keep the look of a step."""
        parts = obs if isinstance(obs, dict) else {"observation": obs}
        picture = self._look(parts)
        if picture is not None:
            blob = zlib.compress(picture.tobytes(), 1)
            self._pictures.append((self._file.tell(), len(blob), picture.shape))
            self._file.write(blob)
        else:
            self._observed.append({name: np.asarray(value[0]) for name, value in parts.items()})

    def _look(self, parts: dict[str, Any]) -> npt.NDArray[np.uint8] | None:
        if self._env is not None:
            return _picture(self._env)
        for value in parts.values():  # an observation that is a picture itself
            if value.dtype == np.uint8 and value.ndim == 4 and value.shape[-1] in (1, 3):
                return np.ascontiguousarray(np.broadcast_to(value[0], (*value.shape[1:3], 3)))
        return None

    def picture(self) -> Callable[[int], npt.NDArray[np.uint8]] | None:
        """Return the function that gives the picture of step t, or None where there are none."""
        return self._picture_of if self._pictures else None

    def _picture_of(self, t: int) -> npt.NDArray[np.uint8]:
        begin, size, shape = self._pictures[t]
        self._file.seek(begin)
        return np.frombuffer(zlib.decompress(self._file.read(size)), np.uint8).reshape(shape)

    def observations(self) -> dict[str, npt.NDArray[Any]]:
        """Return the observations by part, `[T, n]` each, where there are no pictures."""
        if not self._observed:
            return {}
        return {
            name: np.stack([each[name].ravel() for each in self._observed]).astype(np.float64)
            for name in self._observed[0]
        }


def fps_of(scene: Scene, drawn: bool) -> int:
    """Return the frames per second to show a scene with."""
    if scene.kind() == "procgen":
        return PROCGEN_FPS
    if not drawn:
        return SLOW_FPS
    import gymnasium
    from gymnasium.envs.registration import load_env_creator

    creator: Any = gymnasium.spec(scene.env.rpartition(":")[2]).entry_point
    creator = load_env_creator(creator) if isinstance(creator, str) else creator
    fps = getattr(creator, "metadata", {}).get("render_fps", PROCGEN_FPS)
    return min(max(round(fps), 1), 60) if isinstance(fps, int | float) else PROCGEN_FPS
