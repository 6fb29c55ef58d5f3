"""Gymnasium spaces to JSON and back."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
from gymnasium import spaces
from msgspec import UNSET, Meta, Struct, UnsetType

from srwm_rl.errors import UserError

# Of all observations of a space together; a colour picture of 1200 x 1100 has as many. Bounds are as large.
MAX_NUMBERS = 2**22
MAX_PARTS = 1024  # of a Dict
Count = Annotated[int, Meta(ge=1, le=2**31)]
Shape = Annotated[list[Count], Meta(max_length=8)]
IntegerType = Literal["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"]
NumberType = Literal[IntegerType, "float16", "float32", "float64", "bool"]
# JSON has no infinity; integers are no floats, which cannot tell the largest ones apart.
Bound = int | float | bool | Literal["inf", "-inf"]


class _Box(Struct, tag="Box", forbid_unknown_fields=True):
    shape: Shape
    dtype: NumberType
    low: Bound | list[Bound]  # one number for all, or one for each
    high: Bound | list[Bound]

    def build(self) -> spaces.Box:
        dtype: Any = np.dtype(self.dtype)
        low, high = (
            np.array([_bound(bound, dtype) for bound in bounds], dtype).reshape(self.shape)
            if isinstance(bounds, list)
            else np.full(self.shape, _bound(bounds, dtype), dtype)
            for bounds in (self.low, self.high)
        )
        if (low > high).any():
            raise ValueError("low exceeds high")
        return spaces.Box(low, high, tuple(self.shape), dtype.type)


class _Discrete(Struct, tag="Discrete", forbid_unknown_fields=True):
    n: Count
    start: int
    dtype: IntegerType

    def build(self) -> spaces.Discrete:
        dtype: Any = np.dtype(self.dtype).type
        largest = int(np.iinfo(dtype).max)
        if not -largest <= self.start <= largest - self.n + 1:
            raise ValueError(f"its values are no {self.dtype}")
        return spaces.Discrete(self.n, start=self.start, dtype=dtype)


class _MultiDiscrete(Struct, tag="MultiDiscrete", forbid_unknown_fields=True):
    nvec: list[Any]  # lists of lists of any depth
    dtype: IntegerType
    start: list[Any] | UnsetType = UNSET  # as nvec; unset: zeros

    def build(self) -> spaces.MultiDiscrete:
        dtype: Any = np.dtype(self.dtype).type
        nvec = np.array(self.nvec, dtype=object)
        numbers = msgspec.convert(nvec.ravel().tolist(), Annotated[list[Count], Meta(min_length=1)])
        start = np.zeros(nvec.shape, object) if self.start is UNSET else np.array(self.start, dtype=object)
        starts = msgspec.convert(start.ravel().tolist(), list[int])
        limits = np.iinfo(dtype)
        if start.shape != nvec.shape:
            raise ValueError("nvec and start have different shapes")
        if any(not limits.min <= s <= limits.max - n + 1 for n, s in zip(numbers, starts, strict=True)):
            raise ValueError(f"its values are no {self.dtype}")
        return spaces.MultiDiscrete(nvec.astype(np.int64), dtype=dtype, start=start.astype(dtype))


class _MultiBinary(Struct, tag="MultiBinary", forbid_unknown_fields=True, rename={"shape": "n"}):
    shape: Count | Shape

    def build(self) -> spaces.MultiBinary:
        return spaces.MultiBinary(self.shape)


_Flat = _Box | _Discrete | _MultiDiscrete | _MultiBinary


class _Dict(Struct, tag="Dict", forbid_unknown_fields=True, rename={"parts": "spaces"}):
    parts: Annotated[list[tuple[str, _Flat]], Meta(min_length=1, max_length=MAX_PARTS)]  # in their order

    def build(self) -> spaces.Dict:
        built = [(key, space.build()) for key, space in self.parts]
        if len(dict(built)) != len(built):
            raise ValueError("two spaces have the same key")
        return spaces.Dict(built)


def space_to_json(space: spaces.Space[Any]) -> dict[str, Any]:
    """Return a Box, Discrete, MultiDiscrete, MultiBinary or flat Dict space in JSON's types.

    Raises:
        UserError: a space of another kind, or one that `space_from_json` would refuse.
    """
    if isinstance(space, spaces.Dict) and len(space.spaces) > MAX_PARTS:
        raise UserError(
            f"a Dict space of {len(space.spaces):,} parts, memory inputs included, cannot be saved: a file takes "
            f"{MAX_PARTS:,}, join some of them"
        )
    data: dict[str, Any] = msgspec.to_builtins(_describe(space))
    try:
        space_from_json(data)
    except UserError as error:
        raise UserError(f"the space {space!s:.200} cannot be saved: {error.__cause__}") from error
    return data


def _describe(space: spaces.Space[Any]) -> Any:
    dtype: Any = str(space.dtype)
    if isinstance(space, spaces.Box):
        return _Box(list(space.shape), dtype, _bounds_to_json(space.low), _bounds_to_json(space.high))
    if isinstance(space, spaces.Discrete):
        return _Discrete(int(space.n), int(space.start), dtype)
    if isinstance(space, spaces.MultiDiscrete):
        return _MultiDiscrete(space.nvec.tolist(), dtype, space.start.tolist() if space.start.any() else UNSET)
    if isinstance(space, spaces.MultiBinary):
        return _MultiBinary(space.n if isinstance(space.n, int) else [int(n) for n in space.n])
    if isinstance(space, spaces.Dict):
        return _Dict([(key, _describe(part)) for key, part in space.spaces.items()])
    raise UserError(f"a {type(space).__name__} space is not supported; wrap the environment to Box, Discrete or Dict")


def _bounds_to_json(bounds: np.ndarray) -> Any:
    values = [value if math.isfinite(value) else str(value) for value in bounds.ravel().tolist()]
    return values[0] if len(set(values)) == 1 else values


def space_from_json(data: Any) -> spaces.Space[Any]:
    """Return the space that `space_to_json` described; sizes are checked before anything of that size is made.

    Raises:
        UserError: the description is damaged, or the space is too large.
    """
    try:
        described: _Flat | _Dict = msgspec.convert(data, _Flat | _Dict)
        parts = [part for _, part in described.parts] if isinstance(described, _Dict) else [described]
        sizes = [np.prod(part.shape, dtype=object) for part in parts if isinstance(part, _Box | _MultiBinary)]
        if sum(sizes) > MAX_NUMBERS:  # the others are not larger than their JSON
            raise ValueError(f"an observation of more than {MAX_NUMBERS:,} numbers")
        return described.build()
    except (msgspec.ValidationError, ValueError) as error:
        raise UserError(f"the file describes a space that is damaged or too large: {error}") from error


def _bound(value: Bound, dtype: np.dtype[Any]) -> float | int | bool:
    if dtype.kind == "b" and value in (0, 1):
        return bool(value)
    if dtype.kind in "iu" and type(value) in (int, float):
        # Files of earlier versions have the largest integers as floats, rounded up.
        limits = np.iinfo(dtype)
        return min(max(int(value), int(limits.min)), int(limits.max))
    if dtype.kind == "f" and type(value) is not bool:
        number = float(value)
        if math.isinf(number) or abs(number) <= float(np.finfo(dtype).max):
            return number
    raise ValueError(f"a bound {value!r:.60} of {dtype}")
