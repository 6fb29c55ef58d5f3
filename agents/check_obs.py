"""Checks that the environments' observations are those of their space, before they are stored or read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from gymnasium import spaces

from srwm_rl.errors import FaultError
from srwm_rl.nn.spaces import off_space


def check_obs(obs: Any, space: spaces.Space[Any], step: int, env_indices: Sequence[int]) -> None:
    """Check observations `[B, ...]`, whose arrays NumPy would stretch to another shape, and their discrete values.

    Args:
        obs: an array, or arrays by name.
        space: of one observation.
        step: environment steps so far.
        env_indices: of the environments, `[B]`.

    Raises:
        FaultError: an array has another shape, or a value is none of its space; the environment is named.
    """
    if isinstance(space, spaces.Dict):
        if not isinstance(obs, dict) or space.spaces.keys() - obs.keys():
            raise FaultError(f"the observation at step {step:,} is {_named(obs)}, not a dict of {', '.join(space)}")
        for key, part in space.spaces.items():
            _check(f"observation {key!r}", obs[key], part, step, env_indices)
    else:
        _check("observation", obs, space, step, env_indices)


def _named(obs: Any) -> str:
    return f"a dict of {', '.join(map(str, obs))}" if isinstance(obs, dict) else type(obs).__name__


def _check(name: str, obs: Any, space: spaces.Space[Any], step: int, env_indices: Sequence[int]) -> None:
    shape = (len(env_indices), *(space.shape or ()))
    if not isinstance(obs, np.ndarray) or obs.shape != shape:
        got = list(obs.shape) if isinstance(obs, np.ndarray) else type(obs).__name__
        raise FaultError(f"the {name} of {shape[0]} environment(s) at step {step:,} has shape {got}, not {list(shape)}")
    off = off_space(obs, space)
    if off is not None and off.any():
        bad = int(np.flatnonzero(off.reshape(len(obs), -1).any(axis=1))[0])
        raise FaultError(f"the {name} of environment {env_indices[bad]} at step {step:,} is {obs[bad]}, not of {space}")
