"""Whether channels come first is seen by the height and width being equal, else by SB3's rule."""

from typing import Any

import numpy as np
import pytest
from gymnasium import spaces
from stable_baselines3.common.preprocessing import is_image_space_channels_first

from srwm_rl.image_layout import is_channels_first
from srwm_rl.nn.encoders import Encoder
from srwm_rl.nn.extractors import ExtractorInputs


@pytest.mark.parametrize(
    "shape", [(84, 84, 4), (4, 84, 84), (210, 160, 3), (3, 210, 160), (3, 4, 5), (5, 4, 3), (1, 8, 8)]
)
def test_usual_images_are_read_as_by_sb3(shape: tuple[int, int, int]) -> None:
    assert is_channels_first(shape) == is_image_space_channels_first(spaces.Box(0, 255, shape, np.uint8))


@pytest.mark.parametrize(("shape", "first"), [((7, 7, 20), False), ((20, 7, 7), True), ((7, 7, 7), False)])
def test_more_channels_than_pixels_in_a_row(shape: Any, first: bool) -> None:
    space = spaces.Box(0, 255, shape, np.uint8)
    assert is_channels_first(shape) is first
    depth = max(shape)
    assert Encoder(space, cnn={"channels": [4]}).images["observation"].depth == depth
    assert ExtractorInputs(space, True).space.shape == (depth, 7, 7)
