"""Observations and actions of Gymnasium's spaces: checks, inputs of the network, masks, actions of an environment."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor
from torch.nn import functional as F

from srwm_rl.errors import UserError

ACTION_MASK = "action_mask"  # key of a Dict observation: which actions are allowed


def as_floats(obs: Tensor, space: spaces.Space[Any]) -> Tensor:
    """Return an observation `[n, ...]` of a space that is no image as floats `[n, k]`, discrete values as one-hots."""
    flat = obs.flatten(1) if obs.dim() > 1 else obs[:, None]
    if isinstance(space, spaces.Discrete):
        return F.one_hot(flat[:, 0].long() - int(space.start), int(space.n)).float()
    if isinstance(space, spaces.MultiDiscrete):
        sizes, starts = space.nvec.ravel().tolist(), space.start.ravel().tolist()
        columns = zip(flat.long().unbind(1), sizes, starts, strict=True)
        return torch.cat([F.one_hot(column - start, size) for column, size, start in columns], dim=1).float()
    return flat.float()


def check_action_space(space: spaces.Space[Any]) -> None:
    """Raise a `UserError` for an action space that the heads cannot sample from."""
    if not isinstance(space, spaces.Box | spaces.Discrete | spaces.MultiDiscrete | spaces.MultiBinary):
        raise UserError(
            f"actions of type {type(space).__name__} are not supported; wrap the environment to Box, Discrete, "
            "MultiDiscrete or MultiBinary"
        )
    if spaces.flatdim(space) == 0:
        raise UserError(f"there is no action in {space}: give the environment at least one")
    if isinstance(space, spaces.Box) and not (np.isfinite(space.low).all() and np.isfinite(space.high).all()):
        raise UserError(
            f"Box actions need finite bounds, not {space}: give the environment some, such as by "
            f"gymnasium.wrappers.TransformAction(env, lambda action: action, Box(-1, 1, {space.shape}))"
        )
    starts = space.start if isinstance(space, spaces.Discrete | spaces.MultiDiscrete) else 0
    if np.any(starts):
        raise UserError(f"actions must count from 0, not {starts}: wrap the environment to shift them")
    if isinstance(space, spaces.MultiBinary) and len(space.shape) != 1:
        raise UserError(f"MultiBinary actions must have one dimension, not shape {space.shape}: flatten them")


def env_actions(actions: np.ndarray, space: spaces.Space[Any]) -> np.ndarray:
    """Return sampled actions `[n, ...]` as the environment takes them.

    A Gaussian is unbounded and continuous: Box actions are clipped to their bounds, and rounded where they are whole.
    """
    if not isinstance(space, spaces.Box):
        return actions
    whole = np.dtype(space.dtype).kind in "iu"
    actions = np.clip(np.rint(actions) if whole else actions, space.low, space.high)
    return actions.astype(space.dtype, copy=False)


def mask_size(action_space: spaces.Space[Any]) -> int | None:
    """Return the number of entries of an action mask; None: such actions have no masks."""
    if isinstance(action_space, spaces.Discrete):
        return int(action_space.n)
    return int(action_space.nvec.sum()) if isinstance(action_space, spaces.MultiDiscrete) else None


def has_action_mask(observation_space: spaces.Space[Any], action_space: spaces.Space[Any]) -> bool:
    """Return whether a Dict observation has an entry "action_mask" with one bit per action (per choice, in a row).

    Raises:
        UserError: the entry is no mask of these actions.
    """
    size = mask_size(action_space)
    if not isinstance(observation_space, spaces.Dict) or ACTION_MASK not in observation_space.spaces or size is None:
        return False
    space = observation_space.spaces[ACTION_MASK]
    bits = isinstance(space, spaces.MultiBinary) or (
        isinstance(space, spaces.Box) and bool((space.low == 0).all() and (space.high == 1).all())
    )
    if not bits or spaces.flatdim(space) != size:
        raise UserError(
            f"the observation's entry {ACTION_MASK!r} must be MultiBinary({size}), one bit per action, not {space}: "
            "if it is stacked, wrap in the other order; if it is no mask, give it another key"
        )
    return True


def without_mask(space: spaces.Space[Any]) -> spaces.Space[Any]:
    """Return a Dict space without its action mask."""
    assert isinstance(space, spaces.Dict)
    return spaces.Dict({key: part for key, part in space.spaces.items() if key != ACTION_MASK})


def check_masks(masks: np.ndarray, action_space: spaces.Space[Any]) -> None:
    """Raise a `UserError` where a row of `masks` `[n, k]` allows no action, or no value of one of its choices."""
    sizes = action_space.nvec.ravel().tolist() if isinstance(action_space, spaces.MultiDiscrete) else [masks.shape[1]]
    for choice in np.split(masks, np.cumsum(sizes)[:-1], axis=1):
        if not choice.any(axis=1).all():
            row = int(np.flatnonzero(~choice.any(axis=1))[0])
            raise UserError(f"the action mask of environment {row} allows no action")


def batched(observation: Any, space: spaces.Space[Any], name: str) -> tuple[np.ndarray, bool]:
    """Return an observation of a space as an array `[n, ...]`, and whether it had that first dimension.

    Images may be in the other layout than the space's.

    Raises:
        UserError: another shape, not numeric, or not finite; `name` begins the message.
    """
    shape = tuple(space.shape or ())
    if isinstance(observation, tuple):
        raise UserError(f"{name} is a tuple: give the first of the two that Gymnasium's env.reset() returns")
    try:
        array = np.asarray(observation)
    except ValueError as error:
        raise UserError(f"{name} must be an array of shape {shape}: {error}") from error
    if array.dtype.kind not in "biuf":
        raise UserError(f"{name} must hold numbers of shape {shape}, not {array.dtype}")
    if array.shape not in (shape, (*array.shape[:1], *shape)) and len(shape) == 3:
        array = _other_layout(array, shape)
    if array.shape != shape and array.shape[1:] != shape:
        raise UserError(f"{name} must have shape {shape}, or (n, {', '.join(map(str, shape))}), not {array.shape}")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise UserError(f"{name} is not finite: it holds {_first_non_finite(array)}")
    vectorized = array.shape != shape
    array = array if vectorized else array[None]
    _check_values(array, space, name)
    return array, vectorized


def _other_layout(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Return images with channels first or last so that they fit `shape`, where that is possible."""
    for transposed in (np.moveaxis(array, -1, -3), np.moveaxis(array, -3, -1)) if array.ndim >= 3 else ():
        if transposed.shape[-3:] == shape:
            return transposed
    return array


def off_space(array: np.ndarray, space: spaces.Space[Any]) -> np.ndarray | None:
    """Return where observations `[n, ...]` hold no value of their space: no whole number of it, no pixel of 0 .. 255.

    None: a space of floats, whose bounds are not checked.
    """
    if isinstance(space, spaces.Box):
        return (array < 0) | (array > 255) if space.dtype == np.uint8 and array.dtype != np.uint8 else None
    if isinstance(space, spaces.MultiBinary):
        bits: np.ndarray = (array != 0) & (array != 1)
        return bits
    assert isinstance(space, spaces.Discrete | spaces.MultiDiscrete)
    numbers = space.n if isinstance(space, spaces.Discrete) else space.nvec
    off: np.ndarray = (array < space.start) | (array >= space.start + numbers) | (array != np.floor(array))
    return off


def _check_values(array: np.ndarray, space: spaces.Space[Any], name: str) -> None:
    off = off_space(array, space)
    if off is not None and off.any():
        raise UserError(f"{name} must be of {space}, and holds {array[off][0]}")


def _first_non_finite(array: np.ndarray) -> float:
    return float(array[~np.isfinite(array)][0])


def batched_observation(
    observation: Any, obs_spaces: Mapping[str, spaces.Space[Any]], main_key: str
) -> tuple[dict[str, np.ndarray], int, bool]:
    """Return an observation's parts as arrays `[n, ...]` by key, n, and whether it is one of several environments.

    Args:
        observation: of one environment or of n, a dict or the part `main_key` alone.
        obs_spaces: the spaces of the parts.
        main_key: key of an observation that is no dict.

    Raises:
        UserError: a part is missing or does not fit its space, or the parts are of different numbers of environments.
    """
    arrays = observation if isinstance(observation, Mapping) else {main_key: observation}
    missing = sorted(obs_spaces.keys() - arrays.keys())
    if missing:
        raise UserError(
            f"the observation must be a dict of {', '.join(obs_spaces)}: {', '.join(missing)} is missing; take "
            "observations from model.get_env(), or wrap your environment as in training (srwm_rl.envs.VecMemoryInputs "
            "adds the previous action, reward and step)"
        )
    single = not isinstance(observation, Mapping)
    parts = {
        key: batched(arrays[key], space, "the observation" if single else f"observation {key!r}")
        for key, space in obs_spaces.items()
    }
    sizes = {(len(array), vectorized) for array, vectorized in parts.values()}
    if len(sizes) > 1:
        shapes = ", ".join(f"{key} {np.shape(arrays[key])}" for key in parts)
        raise UserError(f"the observation's parts are of different numbers of environments: {shapes}")
    n, vectorized = sizes.pop()
    return {key: array for key, (array, _) in parts.items()}, n, vectorized
