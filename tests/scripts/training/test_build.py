"""From settings to a trainer: how many threads it gets."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from gymnasium import spaces

from srwm_rl.scripts.training.build import use_threads

FRAMES = spaces.Box(0, 255, (64, 64, 3), np.uint8)
VECTORS = spaces.Box(-1, 1, (3,), np.float32)


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("asked", "space", "given"),
    [
        (None, FRAMES, 3),
        (None, spaces.Dict({"observation": FRAMES, "previous_reward": VECTORS}), 3),
        (None, VECTORS, 1),
        (None, spaces.Dict({"observation": VECTORS, "episode_step": VECTORS}), 1),
        (None, spaces.Discrete(4), 1),
        (2, FRAMES, 2),
        (2, VECTORS, 2),
    ],
)
def test_threads(asked: int | None, space: spaces.Space[object], given: int) -> None:
    use_threads(asked, space)
    assert torch.get_num_threads() == given
