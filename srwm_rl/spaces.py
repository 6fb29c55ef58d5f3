"""Gymnasium spaces to JSON and back, so that a model file can say what it was trained on."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from gymnasium import spaces

from srwm_rl.errors import UserError


def space_to_json(space: spaces.Space[Any]) -> dict[str, Any]:
    """Describe a Box, Discrete, MultiDiscrete, MultiBinary or (flat or nested) Dict space in JSON's own types.

    Raises:
        UserError: a space of another kind.
    """
    if isinstance(space, spaces.Dict):
        return {"type": "Dict", "spaces": [[key, space_to_json(each)] for key, each in space.spaces.items()]}
    if isinstance(space, spaces.Box):
        bounds = {"low": _bounds_to_json(space.low), "high": _bounds_to_json(space.high)}
        return {"type": "Box", "shape": list(space.shape), "dtype": str(space.dtype), **bounds}
    if isinstance(space, spaces.Discrete):
        return {"type": "Discrete", "n": int(space.n), "start": int(space.start), "dtype": str(space.dtype)}
    if isinstance(space, spaces.MultiDiscrete):
        return {"type": "MultiDiscrete", "nvec": space.nvec.tolist(), "dtype": str(space.dtype)}
    if isinstance(space, spaces.MultiBinary):
        return {"type": "MultiBinary", "n": space.n if isinstance(space.n, int) else [int(n) for n in space.n]}
    raise UserError(f"a {type(space).__name__} space is not supported; wrap the environment to Box, Discrete or Dict")


def space_from_json(data: dict[str, Any]) -> spaces.Space[Any]:
    """Rebuild what `space_to_json` described.

    Raises:
        UserError: a description of no known kind.
    """
    kind = data.get("type")
    if kind == "Dict":
        return spaces.Dict({key: space_from_json(each) for key, each in data["spaces"]})
    if kind == "Box":
        shape, dtype = tuple(data["shape"]), np.dtype(data["dtype"])
        low, high = (_bounds_from_json(data[side], shape, dtype) for side in ("low", "high"))
        return spaces.Box(low, high, shape, dtype.type)
    if kind == "Discrete":
        return spaces.Discrete(data["n"], start=data["start"], dtype=np.dtype(data["dtype"]).type)
    if kind == "MultiDiscrete":
        return spaces.MultiDiscrete(np.array(data["nvec"]), dtype=np.dtype(data["dtype"]).type)
    if kind == "MultiBinary":
        return spaces.MultiBinary(data["n"])
    raise UserError(f"the file describes a space of unknown kind {kind!r}")


def _bounds_to_json(bounds: np.ndarray) -> Any:
    values = [float(v) if math.isfinite(v) else str(v) for v in bounds.ravel().tolist()]  # JSON has no infinity
    return values[0] if len(set(values)) == 1 else values


def _bounds_from_json(data: Any, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
    values = np.array([float(v) for v in data] if isinstance(data, list) else float(data))
    return np.broadcast_to(values.reshape(shape) if isinstance(data, list) else values, shape).astype(dtype)
