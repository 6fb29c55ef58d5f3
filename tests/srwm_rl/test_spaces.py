"""Spaces survive JSON."""

import json
from typing import Any

import numpy as np
import pytest
from gymnasium import spaces

from srwm_rl import UserError
from srwm_rl.spaces import space_from_json, space_to_json


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
        spaces.Dict(b=spaces.Discrete(2), a=spaces.Box(0, 1, (1,), np.float32)),
    ],
    ids=str,
)
def test_round_trip(space: Any) -> None:
    again = space_from_json(json.loads(json.dumps(space_to_json(space), allow_nan=False)))
    assert again == space
    assert again.dtype == space.dtype


def test_other_spaces_are_refused() -> None:
    with pytest.raises(UserError, match="Text"):
        space_to_json(spaces.Text(3))
    with pytest.raises(UserError, match="unknown kind 'Tuple'"):
        space_from_json({"type": "Tuple"})
