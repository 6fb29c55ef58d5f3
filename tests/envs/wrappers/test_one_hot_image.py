"""Images of symbols as one-hots."""

from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces

from srwm_rl.envs import OneHotImage
from srwm_rl.errors import UserError

SYMBOLS = spaces.Box(0, 255, (4, 5, 3), np.uint8)


class Shown(gymnasium.Env[Any, Any]):
    """Shows one observation."""

    action_space = spaces.Discrete(2)

    def __init__(self, observation_space: Any, observation: Any) -> None:
        self.observation_space, self.shown = observation_space, observation

    def reset(self, **_: Any) -> Any:
        return self.shown, {}


@pytest.mark.parametrize("in_dict", [True, False])
def test_each_channel_becomes_a_one_hot(in_dict: bool) -> None:
    image = np.random.default_rng(0).integers((11, 6, 4), size=(4, 5, 3), dtype=np.uint8)
    space, shown = (spaces.Dict(image=SYMBOLS, direction=spaces.Discrete(4)), {"image": image, "direction": 2})
    env = OneHotImage(Shown(space, shown) if in_dict else Shown(SYMBOLS, image))
    obs, _ = env.reset()
    assert env.observation_space.contains(obs)
    if in_dict:
        assert obs["direction"] == 2
        obs = obs["image"]
    assert obs.shape == (4, 5, 21)
    expected = [np.eye(n, dtype=np.uint8)[image[..., c]] * 255 for c, n in enumerate((11, 6, 4))]
    np.testing.assert_array_equal(obs, np.concatenate(expected, axis=-1))


def test_minigrids_own_wrapper_has_the_same_ones() -> None:
    pytest.importorskip("minigrid")
    from minigrid.wrappers import OneHotPartialObsWrapper

    ours = OneHotImage(gymnasium.make("MiniGrid-MemoryS7-v0"))
    theirs = OneHotPartialObsWrapper(gymnasium.make("MiniGrid-MemoryS7-v0"))
    for seed in range(5):
        np.testing.assert_array_equal(
            ours.reset(seed=seed)[0]["image"][..., :20] // 255, theirs.reset(seed=seed)[0]["image"]
        )


def test_what_is_no_image_of_symbols_is_refused() -> None:
    with pytest.raises(UserError, match="no uint8 image 'image'"):
        OneHotImage(Shown(spaces.Box(-1, 1, (4, 5, 3)), None))
    with pytest.raises(UserError, match="3 channels, kinds 1"):
        OneHotImage(Shown(SYMBOLS, None), kinds=[4])
    for kinds in ([10**9, 6, 4], [0, 6, 4], [1.5, 6, 4], "abc"):
        with pytest.raises(UserError, match="whole numbers from 1 to 256"):
            OneHotImage(Shown(SYMBOLS, None), kinds=kinds)  # type: ignore[arg-type]
    pixels = OneHotImage(Shown(SYMBOLS, np.full((4, 5, 3), 200, np.uint8)))
    with pytest.raises(UserError, match=r"symbols up to \[200, 200, 200\]"):
        pixels.reset()
