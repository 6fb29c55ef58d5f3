"""What `SRWMPolicy.predict` is given: observations, states, flags and masks, checked and as batches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from gymnasium import spaces

from srwm_rl.errors import UserError
from srwm_rl.nn.spaces import ACTION_MASK, check_masks, mask_size, off_space


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


def mask_of(observation: Any) -> np.ndarray:
    """Return the action mask in an observation.

    Raises:
        UserError: there is none.
    """
    if not isinstance(observation, Mapping) or ACTION_MASK not in observation:
        raise UserError(
            "this policy was trained with action masks: give action_masks=..., or observations with an entry "
            "'action_mask', such as of srwm_rl.agents.VecActionMasks"
        )
    mask: np.ndarray = observation[ACTION_MASK]
    return mask


def batched_masks(action_masks: Any, action_space: spaces.Space[Any], batch: int) -> np.ndarray:
    """Return action masks `[B, k]` (of one environment also `[k]`) as booleans `[B, k]`.

    Raises:
        UserError: another shape, or nothing is allowed; such actions have no masks.
    """
    size, masks = mask_size(action_space), np.asarray(action_masks)
    if size is None or masks.shape not in ((batch, size), *([(size,)] if batch == 1 else ())):
        wanted = "none for such actions" if size is None else f"of shape {(batch, size)}"
        raise UserError(f"action_masks must be {wanted}, not {masks.shape}")
    allowed: np.ndarray = masks.reshape(batch, size) != 0
    check_masks(allowed, action_space)
    return allowed


def batched_starts(episode_start: np.ndarray | bool | None, batch: int) -> np.ndarray:
    """Return flags `[B]`, or one flag for all, as booleans `[B]`; None: no episode begins.

    Raises:
        UserError: another shape.
    """
    starts = np.asarray(False if episode_start is None else episode_start)
    if starts.shape not in ((), (1,), (batch,)):
        raise UserError(f"episode_start must be one flag or {batch}, not of shape {starts.shape}")
    return np.broadcast_to(starts != 0, (batch,)).copy()


def check_state(state: Any, shape: tuple[int, int, int], core: str) -> None:
    """Raise a `UserError` for a core state of another shape, or one that is not finite."""
    if np.shape(state) != shape:
        raise UserError(f"core {core!r} needs a state of shape {shape}, not {np.shape(state)}")
    if not np.isfinite(state).all():
        raise UserError("the state is not finite; begin new episodes with state=None")
