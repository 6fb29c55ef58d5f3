"""Observations of nested spaces (Tuple, Dict in Dict) as one flat Dict."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import gymnasium
from gymnasium import spaces

from srwm_rl.envs.batch import Space
from srwm_rl.errors import UserError

Path = tuple[str | int, ...]
"""The keys and indices that lead to a part of an observation."""


class FlatDictObservation(gymnasium.ObservationWrapper[Any, Any, Any]):
    """Observations of nested spaces as a flat Dict, without their texts.

    A part's key joins the keys and the indices that lead to it with dots: "0" and "1" of a Tuple of two, "arm.0". Parts
    that are text (the mission of MiniGrid) are left out with a warning.

    Args:
        env: A Gymnasium environment.

    Raises:
        UserError: If two parts have the same key, or there is none beside text.
    """

    def __init__(self, env: gymnasium.Env[Any, Any]) -> None:
        super().__init__(env)
        parts = list(_parts(env.observation_space))
        self._paths = {_key(path): path for path, space in parts if not _is_text(space)}
        if len(self._paths) < sum(not _is_text(space) for _, space in parts):
            raise UserError(f"two parts of the observation have the same key, of {', '.join(self._paths)}: rename one")
        if texts := [_key(path) for path, space in parts if _is_text(space)]:
            warnings.warn(
                f"observation {', '.join(texts)} is text, which the network does not read, and is left out; a wrapper "
                "can encode it as numbers",
                stacklevel=2,
            )
        if not self._paths:
            raise UserError(f"observations of {env.observation_space} have no part that the network reads")
        self.observation_space = spaces.Dict({_key(path): space for path, space in parts if not _is_text(space)})

    def observation(self, observation: Any) -> dict[str, Any]:
        """Return the parts of an observation by key."""
        return {key: _part(observation, path) for key, path in self._paths.items()}


def needs_flattening(space: Space) -> bool:
    """Return whether `FlatDictObservation` would change observations of this space."""
    if isinstance(space, spaces.Dict):
        return any(isinstance(part, spaces.Tuple | spaces.Dict) or _is_text(part) for part in space.values())
    return isinstance(space, spaces.Tuple)


def _parts(space: Space, path: Path = ()) -> Iterator[tuple[Path, Space]]:
    if isinstance(space, spaces.Dict | spaces.Tuple):
        parts = space.items() if isinstance(space, spaces.Dict) else enumerate(space.spaces)
        for name, part in parts:
            yield from _parts(part, (*path, name))
    else:
        yield path, space


def _part(observation: Any, path: Path) -> Any:
    for name in path:
        observation = observation[name]
    return observation


def _key(path: Path) -> str:
    return ".".join(map(str, path))


def _is_text(space: Space) -> bool:
    """Return whether values are text: those of `spaces.Text`, and of MiniGrid's own space of missions."""
    return isinstance(space, spaces.Text) or (space.dtype is not None and space.dtype.kind == "U")
