"""Gymnasium spaces to JSON and back, so that a model file can say what it was trained on."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from gymnasium import spaces

from srwm_rl.errors import UserError

# Of all observations of a space together; a colour picture of 1200 x 1100 has as many. Bounds are as large.
MAX_NUMBERS = 2**22
MAX_CHOICES = 2**31
MAX_AXES = 8
MAX_PARTS = 64
INTEGERS = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
DTYPES = (*INTEGERS, "float16", "float32", "float64", "bool")
ENTRIES = {
    "Dict": {"spaces"},
    "Box": {"shape", "dtype", "low", "high"},
    "Discrete": {"n", "start", "dtype"},
    "MultiDiscrete": {"nvec", "dtype"},
    "MultiBinary": {"n"},
}


def space_to_json(space: spaces.Space[Any]) -> dict[str, Any]:
    """Describe a Box, Discrete, MultiDiscrete, MultiBinary or flat Dict space in JSON's own types.

    Raises:
        UserError: a space of another kind, or one that `space_from_json` would refuse.
    """
    described = _to_json(space)
    space_from_json(described)
    return described


def _to_json(space: spaces.Space[Any]) -> dict[str, Any]:
    if isinstance(space, spaces.Dict):
        return {"type": "Dict", "spaces": [[key, _to_json(each)] for key, each in space.spaces.items()]}
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


def space_from_json(data: Any) -> spaces.Space[Any]:
    """Rebuild what `space_to_json` described; sizes and types are checked before anything is made of them.

    Raises:
        UserError: a description of no known kind, or of a space that cannot be.
    """
    if isinstance(data, dict) and data.get("type") == "Dict":
        pairs = data.get("spaces")
        if data.keys() != {"type", "spaces"} or not isinstance(pairs, list) or not 0 < len(pairs) <= MAX_PARTS:
            raise _odd(data)
        if not all(isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str) for pair in pairs):
            raise _odd(data)
        parts = {key: _plain_space(each) for key, each in pairs}
        if len(parts) != len(pairs) or sum(_n_numbers(each) for _, each in pairs) > MAX_NUMBERS:
            raise _odd(data)
        return spaces.Dict(list(parts.items()))
    return _plain_space(data)


def _plain_space(data: Any) -> spaces.Space[Any]:
    kind = data.get("type") if isinstance(data, dict) else None
    if not isinstance(kind, str) or kind not in ENTRIES or kind == "Dict":
        raise UserError(f"the file describes a space of unknown kind {kind!r:.60}")
    if data.keys() != {"type", *ENTRIES[kind]} or _n_numbers(data) > MAX_NUMBERS:
        raise _odd(data)
    if kind == "Box":
        return _box(data)
    if kind == "MultiBinary":
        return spaces.MultiBinary(data["n"])
    if data["dtype"] not in INTEGERS:
        raise _odd(data)
    dtype: Any = np.dtype(data["dtype"]).type
    largest = int(np.iinfo(dtype).max)
    if kind == "MultiDiscrete":
        if not isinstance(data["nvec"], list) or np.max(data["nvec"]) > largest:
            raise _odd(data)
        return spaces.MultiDiscrete(np.array(data["nvec"]), dtype=dtype)
    if not _is_count(data["n"]) or type(data["start"]) is not int or not -largest <= data["start"] <= largest:
        raise _odd(data)
    if data["start"] + data["n"] - 1 > largest:
        raise _odd(data)
    return spaces.Discrete(data["n"], start=data["start"], dtype=dtype)


def _n_numbers(data: dict[str, Any]) -> int:
    """Return how many numbers an observation has, or more than any may have where its shape cannot be."""
    kind = data["type"]
    if kind == "MultiDiscrete":
        choices = np.array(data["nvec"], dtype=object)
        flat = choices.ravel().tolist()  # of ragged lists, lists
        return len(flat) if flat and all(_is_count(each) for each in flat) else MAX_NUMBERS + 1
    shape: Any = {"Box": data.get("shape"), "MultiBinary": data.get("n")}.get(kind, [])
    shape = [shape] if kind == "MultiBinary" and type(shape) is int else shape
    fits = isinstance(shape, list) and len(shape) <= MAX_AXES and all(_is_count(each) for each in shape)
    return math.prod(shape) if fits else MAX_NUMBERS + 1


def _is_count(value: Any) -> bool:
    return type(value) is int and 1 <= value <= MAX_CHOICES


def _odd(data: dict[str, Any]) -> UserError:
    return UserError(f"the file describes a {data['type']} space that cannot be, or is too large")


def _box(data: dict[str, Any]) -> spaces.Box:
    shape = tuple(data["shape"])
    if data["dtype"] not in DTYPES:
        raise _odd(data)
    dtype = np.dtype(data["dtype"])
    low, high = (_bounds_from_json(data, side, shape, dtype) for side in ("low", "high"))
    if (low > high).any():
        raise _odd(data)
    kind: Any = dtype.type
    return spaces.Box(low, high, shape, kind)


def _bounds_to_json(bounds: np.ndarray) -> Any:
    # JSON has no infinity; and a float cannot tell the largest integers apart.
    numbers = bounds.ravel().tolist()
    values = [each if isinstance(each, int) or math.isfinite(each) else str(each) for each in numbers]
    return values[0] if len(set(values)) == 1 else values


def _bounds_from_json(data: dict[str, Any], side: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
    given = data[side] if isinstance(data[side], list) else [data[side]]
    if len(given) not in (1, math.prod(shape)):
        raise _odd(data)
    values = np.array([_bound(data, each, dtype) for each in given], dtype)
    return np.broadcast_to(values.reshape(shape if len(given) > 1 else ()), shape)


def _bound(data: dict[str, Any], value: Any, dtype: np.dtype[Any]) -> float | int | bool:
    if dtype.kind == "b" and type(value) in (bool, int, float) and value in (0, 1):
        return bool(value)
    if dtype.kind in "iu" and type(value) in (int, float):
        # Files of earlier versions have the largest integers as floats, rounded up.
        limits = np.iinfo(dtype)
        return min(max(int(value), int(limits.min)), int(limits.max))
    if dtype.kind == "f" and isinstance(value, str) and value in ("inf", "-inf"):
        return float(value)
    if dtype.kind == "f" and type(value) in (int, float) and abs(value) <= float(np.finfo(dtype).max):
        return float(value)
    raise _odd(data)
