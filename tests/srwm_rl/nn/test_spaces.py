"""Spaces: one-hots from any start, actions as an environment takes them, masks."""

from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces

from srwm_rl import UserError
from srwm_rl.nn.spaces import (
    ACTION_MASK,
    as_floats,
    check_masks,
    env_actions,
    has_action_mask,
)

VECTOR = spaces.Box(-1, 1, (3,), np.float32)


def test_one_hots_count_from_the_start_of_the_space() -> None:
    one_hots = as_floats(torch.tensor([1, 3]), spaces.Discrete(3, start=1))
    assert one_hots.tolist() == [[1, 0, 0], [0, 0, 1]]
    pairs = as_floats(torch.tensor([[5, 1], [6, 0]]), spaces.MultiDiscrete([2, 3], start=[5, -1]))
    assert pairs.tolist() == [[1, 0, 0, 0, 1], [0, 1, 0, 1, 0]]
    nested = as_floats(torch.tensor([[[0, 1], [1, 0]]]), spaces.MultiDiscrete([[2, 2], [2, 2]]))
    assert nested.tolist() == [[1, 0, 0, 1, 0, 1, 1, 0]]


@pytest.mark.parametrize("shape", [(), (1,), (2, 3)])
def test_boxes_of_any_shape_become_rows(shape: tuple[int, ...]) -> None:
    obs = torch.rand(4, *shape)
    assert torch.equal(as_floats(obs, spaces.Box(0, 1, shape)), obs.reshape(4, -1))


def test_whole_boxes_get_rounded_actions_and_others_clipped_ones() -> None:
    sampled = np.array([[-0.6, 1.6], [9.0, -9.0]], np.float32)
    whole = env_actions(sampled, spaces.Box(-2, 3, (2,), np.int32))
    assert whole.dtype == np.int32
    assert whole.tolist() == [[-1, 2], [3, -2]]
    assert env_actions(sampled, spaces.Box(-1, 1, (2,))).tolist() == [[pytest.approx(-0.6), 1], [1, -1]]
    assert env_actions(np.array([1]), spaces.Discrete(2)).tolist() == [1]


@pytest.mark.parametrize("action_space", [spaces.Discrete(4), spaces.MultiDiscrete([2, 2])])
@pytest.mark.parametrize("mask", [spaces.MultiBinary(4), spaces.Box(0, 1, (4,), np.int8)])
def test_masks_are_known_by_key_and_content(action_space: Any, mask: Any) -> None:
    assert has_action_mask(spaces.Dict({"a": VECTOR, ACTION_MASK: mask}), action_space)
    assert not has_action_mask(spaces.Dict({"a": VECTOR, "mask": mask}), action_space)
    assert not has_action_mask(VECTOR, action_space)
    assert not has_action_mask(spaces.Dict({ACTION_MASK: mask}), spaces.Box(-1, 1, (4,)))  # an ordinary entry


@pytest.mark.parametrize("mask", [spaces.MultiBinary(16), spaces.Box(-1, 1, (4,)), spaces.Discrete(4)])
def test_an_entry_that_is_no_mask_is_refused(mask: Any) -> None:
    with pytest.raises(UserError, match="'action_mask' must be MultiBinary\\(4\\)"):
        has_action_mask(spaces.Dict({ACTION_MASK: mask}), spaces.Discrete(4))


def test_each_choice_needs_an_allowed_value() -> None:
    check_masks(np.array([[1, 0, 0, 1]]), spaces.MultiDiscrete([2, 2]))
    with pytest.raises(UserError, match="environment 1 allows no action"):
        check_masks(np.array([[1, 0, 0, 1], [1, 1, 0, 0]]), spaces.MultiDiscrete([2, 2]))
    with pytest.raises(UserError, match="environment 0 allows no action"):
        check_masks(np.zeros((1, 4)), spaces.Discrete(4))
