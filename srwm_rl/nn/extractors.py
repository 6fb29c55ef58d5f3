"""Encoders of one's own, and their inputs as Stable-Baselines3 gives them to its encoders."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.preprocessing import is_image_space
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import Tensor

from srwm_rl.errors import UserError
from srwm_rl.image_layout import is_channels_first
from srwm_rl.nn.encoders import MAIN_KEY, flatten_obs_space
from srwm_rl.nn.spaces import as_floats


class ExtractorInputs:
    """Converts observations to what a `BaseFeaturesExtractor` of SB3 reads.

    Images get their channels first, as by SB3's `VecTransposeImage`, and are multiplied by 1/255; discrete values are
    one-hots; all else is floats of the same shape. An observation that is no Dict is given as a tensor.

    Args:
        observation_space: the environment's.
        normalize_images: whether to multiply images by 1/255.

    Attributes:
        space: the space to build the encoder for.
    """

    def __init__(self, observation_space: spaces.Space[Any], normalize_images: bool) -> None:
        self._spaces = flatten_obs_space(observation_space)
        self._single = not isinstance(observation_space, spaces.Dict)
        images = {key for key, space in self._spaces.items() if _is_image(space)}
        self._scaled = images if normalize_images else set()
        self._transposed = {key for key in images if not is_channels_first(self._spaces[key].shape)}  # type: ignore[arg-type]
        parts = {key: _transpose(part) if key in self._transposed else part for key, part in self._spaces.items()}
        self.space: spaces.Space[Any] = parts[MAIN_KEY] if self._single else spaces.Dict(parts)

    def __call__(self, observations: Mapping[str, Tensor], n: int) -> Any:
        """Map `{key: [..., *shape]}`, `n` over all leading axes, to the encoder's input `[n, ...]`."""
        inputs = {key: self._convert(key, observations[key], n) for key in self._spaces}
        return inputs[MAIN_KEY] if self._single else inputs

    def _convert(self, key: str, obs: Tensor, n: int) -> Tensor:
        space = self._spaces[key]
        if not isinstance(space, spaces.Box):
            return as_floats(obs.reshape(n, *(space.shape or ())), space)
        obs = obs.reshape(n, *space.shape).float()
        obs = obs.permute(0, 3, 1, 2) if key in self._transposed else obs
        return obs / 255 if key in self._scaled else obs


def make_extractor(
    extractor_class: type[BaseFeaturesExtractor], space: spaces.Space[Any], settings: Mapping[str, Any]
) -> BaseFeaturesExtractor:
    """Build an encoder of one's own for the observations of an `ExtractorInputs`.

    Raises:
        UserError: the class does not take the space and its settings, or refuses the space.
    """
    try:
        inspect.signature(extractor_class).bind(space, **settings)
    except TypeError as error:
        raise UserError(
            f"features_extractor_class {extractor_class!r} does not take the observation space and "
            f"features_extractor_kwargs: {error}"
        ) from error
    try:
        return extractor_class(space, **settings)
    except AssertionError as error:  # as SB3's encoders refuse a space
        raise UserError(f"{extractor_class.__name__}: {error}") from error


def _is_image(space: spaces.Space[Any]) -> bool:
    return isinstance(space, spaces.Box) and len(space.shape) == 3 and is_image_space(space)


def _transpose(space: spaces.Space[Any]) -> spaces.Box:
    assert isinstance(space, spaces.Box)
    low, high = (np.moveaxis(bound, -1, 0) for bound in (space.low, space.high))
    return spaces.Box(low, high, dtype=space.dtype)
