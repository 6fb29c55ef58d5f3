"""Observations and actions of Gymnasium's spaces: checks, inputs of the network, actions of an environment, masks."""

from __future__ import annotations

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
