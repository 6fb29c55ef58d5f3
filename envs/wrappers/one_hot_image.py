"""Images of symbols, such as MiniGrid's, as one-hots."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from srwm_rl.errors import UserError

MOST = 256  # symbols that a byte holds
MINIGRID = (11, 6, 4)  # kinds of objects, colours, and states or directions: minigrid/core/constants.py


class OneHotImage(gymnasium.ObservationWrapper[Any, Any, Any]):
    """An image whose numbers name kinds of things, `(h, w, C)`, as one-hots of 0 and 255, `(h, w, sum(kinds))`.

    Divided by 255, as pixels are, the symbols themselves would hardly differ.

    Args:
        env: A Gymnasium environment.
        kinds: How many symbols there are in each channel; those of MiniGrid by default.
        key: The image in a Dict observation.

    Raises:
        UserError: If there is no such image, `kinds` do not fit it, or it holds a larger symbol.
    """

    def __init__(self, env: gymnasium.Env[Any, Any], kinds: Sequence[int] = MINIGRID, key: str = "image") -> None:
        super().__init__(env)
        whole = env.observation_space
        self._key = key if isinstance(whole, spaces.Dict) else None
        image = whole.spaces.get(key) if isinstance(whole, spaces.Dict) else whole
        if not isinstance(image, spaces.Box) or image.dtype != np.uint8 or len(image.shape) != 3:
            raise UserError(f"the observation has no uint8 image {key!r}: it is {whole}")
        if not all(isinstance(n, int) and 1 <= n <= MOST for n in kinds):
            raise UserError(f"kinds must be whole numbers from 1 to {MOST}, not {list(kinds)!r:.100}")
        if image.shape[-1] != len(kinds):
            raise UserError(f"the image has {image.shape[-1]} channels, kinds {len(kinds)}: give a number for each")
        self._kinds = np.asarray(kinds)
        self._offsets = np.cumsum(self._kinds) - self._kinds
        box = spaces.Box(0, 255, (*image.shape[:2], int(self._kinds.sum())), np.uint8)
        self.observation_space = spaces.Dict({**whole.spaces, key: box}) if isinstance(whole, spaces.Dict) else box

    def observation(self, observation: Any) -> Any:
        """Return an observation with its image as one-hots."""
        if self._key is None:
            return self._one_hots(observation)
        return {**observation, self._key: self._one_hots(observation[self._key])}

    def _one_hots(self, image: np.ndarray) -> np.ndarray:
        if (image >= self._kinds).any():
            highest = image.max(axis=(0, 1))
            raise UserError(f"the image holds symbols up to {highest.tolist()}: kinds must be larger than each")
        one_hots = np.zeros((*image.shape[:2], int(self._kinds.sum())), np.uint8)
        np.put_along_axis(one_hots, image + self._offsets, 255, axis=-1)
        return one_hots
