"""Spaces survive JSON."""

import json
from typing import Any

import numpy as np
import pytest
from gymnasium import spaces

from srwm_rl import UserError
from srwm_rl.storage.space_json import space_from_json, space_to_json


@pytest.mark.parametrize(
    "space",
    [
        spaces.Box(0, 255, (8, 8, 3), np.uint8),
        spaces.Box(-np.inf, np.inf, (2, 3), np.float32),
        spaces.Box(np.array([-1.0, 0.0], np.float32), np.array([1.0, np.inf], np.float32)),
        spaces.Discrete(4),
        spaces.Discrete(4, start=-1),
        spaces.MultiDiscrete([2, 5]),
        spaces.MultiBinary(3),
        spaces.MultiBinary((2, 3)),
        spaces.MultiDiscrete(np.array([[2, 3], [4, 5]])),
        spaces.Box(np.iinfo(np.int64).min, np.iinfo(np.int64).max, (2,), np.int64),
        spaces.Box(0, 1, (2,), np.bool_),
        spaces.Dict([("z", spaces.Discrete(2)), ("a", spaces.Discrete(3))]),
        spaces.Dict(b=spaces.Discrete(2), a=spaces.Box(0, 1, (1,), np.float32)),
    ],
    ids=str,
)
def test_round_trip(space: Any) -> None:
    again = space_from_json(json.loads(json.dumps(space_to_json(space), allow_nan=False)))
    assert again == space
    assert again.dtype == space.dtype
    if isinstance(space, spaces.Dict):
        assert list(again.spaces) == list(space.spaces)  # the encoder joins the parts in this order


def test_other_spaces_are_refused() -> None:
    with pytest.raises(UserError, match="Text"):
        space_to_json(spaces.Text(3))
    with pytest.raises(UserError, match="Invalid value 'Tuple'"):
        space_from_json({"type": "Tuple"})


BOX = {"type": "Box", "shape": [2], "dtype": "float32", "low": 0.0, "high": 1.0}
DISCRETE = {"type": "Discrete", "n": 4, "start": 0, "dtype": "int64"}


@pytest.mark.parametrize(
    "data",
    [
        None,
        [],
        "Box",
        {},
        {"type": ["Box"]},
        {"type": "Box"},
        {**BOX, "colour": "red"},
        {**BOX, "shape": 3},
        {**BOX, "shape": [10**9]},
        {**BOX, "shape": [2**11] * 4},
        {**BOX, "shape": [1] * 9},
        {**BOX, "shape": [-1]},
        {**BOX, "shape": [0]},
        {**BOX, "shape": [2.0]},
        {**BOX, "shape": [True]},
        {**BOX, "dtype": "O"},
        {**BOX, "dtype": "V1000000000"},
        {**BOX, "dtype": ["float32"]},
        {**BOX, "low": "nan"},
        {**BOX, "low": "1"},
        {**BOX, "low": [0.0] * 3},
        {**BOX, "low": {}},
        {**BOX, "low": 2.0},
        {**BOX, "dtype": "float16", "high": 1e9},
        {**BOX, "dtype": "uint8", "high": "inf"},
        {**DISCRETE, "n": 0},
        {**DISCRETE, "n": 10**12},
        {**DISCRETE, "n": True},
        {**DISCRETE, "n": "4"},
        {**DISCRETE, "start": 0.5},
        {**DISCRETE, "start": 10**20},
        {**DISCRETE, "dtype": "float32"},
        {**DISCRETE, "n": 200, "dtype": "int8"},
        {"type": "MultiDiscrete", "nvec": 5, "dtype": "int64"},
        {"type": "MultiDiscrete", "nvec": [200], "dtype": "int8"},
        {"type": "MultiDiscrete", "nvec": [], "dtype": "int64"},
        {"type": "MultiDiscrete", "nvec": [2, -1], "dtype": "int64"},
        {"type": "MultiDiscrete", "nvec": [[2], [2, 3]], "dtype": "int64"},
        {"type": "MultiDiscrete", "nvec": {"a": 2}, "dtype": "int64"},
        {"type": "MultiBinary", "n": 10**9},
        {"type": "MultiBinary", "n": [2**20, 2**20]},
        {"type": "MultiBinary", "n": "3"},
        {"type": "Dict", "spaces": []},
        {"type": "Dict", "spaces": {"a": BOX}},
        {"type": "Dict", "spaces": [["a"]]},
        {"type": "Dict", "spaces": [[1, BOX]]},
        {"type": "Dict", "spaces": [["a", BOX], ["a", BOX]]},
        {"type": "Dict", "spaces": [["a", {"type": "Dict", "spaces": [["b", BOX]]}]]},
        {"type": "Dict", "spaces": [[str(i), {**BOX, "shape": [2**20]}] for i in range(5)]},
        {"type": "Dict", "spaces": [[str(i), BOX] for i in range(1025)]},
    ],
    ids=lambda data: str(data)[:60],
)
def test_invalid_space_descriptions_are_refused_in_one_line(data: Any) -> None:
    with pytest.raises(UserError, match="the file describes") as error:
        space_from_json(data)
    assert "\n" not in str(error.value)


def test_bounds_of_earlier_versions_are_read() -> None:
    described = space_to_json(spaces.Box(0, np.iinfo(np.int64).max, (1,), np.int64))
    assert space_from_json({**described, "high": float(described["high"])}).high[0] == np.iinfo(np.int64).max


def test_a_space_that_a_file_cannot_hold_is_named() -> None:
    parts = {str(i): spaces.Box(-1, 1, (2,)) for i in range(1025)}
    with pytest.raises(UserError, match="a Dict space of 1,025 parts, memory inputs included, cannot be saved"):
        space_to_json(spaces.Dict(parts))
    with pytest.raises(UserError, match=r"the space Box\(.*\) cannot be saved: an observation of more than 4,194,304"):
        space_to_json(spaces.Box(-1, 1, (2**23,)))
    parts.pop("1024")
    assert space_from_json(space_to_json(spaces.Dict(parts))) == spaces.Dict(parts)
