"""What `predict` is given: batches of observations, flags, states and masks."""

from typing import Any

import numpy as np
import pytest
from gymnasium import spaces

from srwm_rl import UserError
from srwm_rl.nn.predict_inputs import (
    batched,
    batched_masks,
    batched_observation,
    batched_starts,
    check_state,
    mask_of,
)
from srwm_rl.nn.spaces import ACTION_MASK

VECTOR = spaces.Box(-1, 1, (3,), np.float32)


def test_batches_and_single_observations_are_told_apart() -> None:
    single, vectorized = batched(np.zeros(3), VECTOR, "it")
    assert single.shape == (1, 3)
    assert not vectorized
    assert batched(np.zeros((5, 3)), VECTOR, "it")[1]
    assert batched(2, spaces.Discrete(3), "it")[0].tolist() == [2]
    assert batched([2, 1], spaces.Discrete(3), "it")[1]
    frame = np.arange(16 * 18 * 3, dtype=np.uint8).reshape(16, 18, 3)
    first, _ = batched(frame, spaces.Box(0, 255, (3, 16, 18), np.uint8), "it")
    assert np.array_equal(first[0], frame.transpose(2, 0, 1))
    last, _ = batched(frame.transpose(2, 0, 1)[None], spaces.Box(0, 255, (16, 18, 3), np.uint8), "it")
    assert np.array_equal(last[0], frame)


@pytest.mark.parametrize(
    ("observation", "space", "words"),
    [
        (np.zeros(4), VECTOR, r"\(3,\), or \(n, 3\), not \(4,\)"),
        (np.zeros((2, 2, 3)), VECTOR, "not "),
        ([0, np.nan, 0], VECTOR, "not finite"),
        ([[0, 0, 0], [0, 0, -np.inf]], VECTOR, "not finite: it holds -inf"),
        ("abc", VECTOR, "must hold numbers"),
        ([None] * 3, VECTOR, "must hold numbers"),
        ([1, 4], spaces.Discrete(3, start=1), r"must be of Discrete\(3, start=1\), and holds 4"),
        (0.5, spaces.Discrete(3), "holds 0.5"),
        ([[0, 2]], spaces.MultiDiscrete([2, 2]), "holds 2"),
        ([[0, 0.5]], spaces.MultiDiscrete([2, 2]), "holds 0.5"),
        ([0, 2], spaces.MultiBinary(2), "holds 2"),
        (np.full((12, 12, 3), 300.0), spaces.Box(0, 255, (12, 12, 3), np.uint8), "holds 300"),
        (np.full((12, 12, 3), -1), spaces.Box(0, 255, (12, 12, 3), np.uint8), "holds -1"),
    ],
)
def test_observations_that_do_not_fit_are_named(observation: Any, space: Any, words: str) -> None:
    with pytest.raises(UserError, match=words) as error:
        batched(observation, space, "observation 'x'")
    assert str(error.value).startswith("observation 'x' ")


def test_parts_of_an_observation_must_be_of_as_many_environments() -> None:
    parts = {"a": VECTOR, "b": spaces.Discrete(2)}
    arrays, n, vectorized = batched_observation({"a": np.zeros((2, 3)), "b": [0, 1], "c": "ignored"}, parts, "main")
    assert (arrays.keys(), n, vectorized) == ({"a", "b"}, 2, True)
    for b in ([0, 1, 1], 0):
        with pytest.raises(UserError, match="different numbers of environments: a \\(2, 3\\)"):
            batched_observation({"a": np.zeros((2, 3)), "b": b}, parts, "main")
    with pytest.raises(UserError, match="must be a dict of a, b: b is missing"):
        batched_observation({"a": np.zeros(3)}, parts, "main")


def test_masks_of_one_environment_may_leave_out_their_batch() -> None:
    assert batched_masks([1, 0], spaces.Discrete(2), 1).tolist() == [[True, False]]
    assert batched_masks([[1, 0], [0, 2]], spaces.Discrete(2), 2).tolist() == [[True, False], [False, True]]
    with pytest.raises(UserError, match="must be of shape \\(2, 2\\), not \\(2,\\)"):
        batched_masks([1, 0], spaces.Discrete(2), 2)
    with pytest.raises(UserError, match="must be none for such actions"):
        batched_masks([1, 0], VECTOR, 1)
    with pytest.raises(UserError, match="allows no action"):
        batched_masks([0, 0], spaces.Discrete(2), 1)


def test_a_mask_is_looked_for_in_the_observation() -> None:
    assert mask_of({ACTION_MASK: [1, 0]}) == [1, 0]
    for observation in (np.zeros(3), {"observation": np.zeros(3)}):
        with pytest.raises(UserError, match="trained with action masks"):
            mask_of(observation)


@pytest.mark.parametrize(
    ("flags", "starts"), [(None, [False, False]), (True, [True, True]), ([0, 1], [False, True]), ([1], [True, True])]
)
def test_flags_are_one_for_all_or_one_each(flags: Any, starts: list[bool]) -> None:
    assert batched_starts(flags, 2).tolist() == starts


def test_flags_and_states_of_another_shape_are_refused() -> None:
    with pytest.raises(UserError, match="one flag or 2, not of shape \\(3,\\)"):
        batched_starts(np.zeros(3), 2)
    check_state(np.zeros((1, 2, 3)), (1, 2, 3), "srwm")
    with pytest.raises(UserError, match="core 'srwm' needs a state of shape"):
        check_state(np.zeros((1, 2)), (1, 2, 3), "srwm")
    with pytest.raises(UserError, match="state is not finite"):
        check_state(np.full((1, 2, 3), np.nan), (1, 2, 3), "srwm")
