"""The last observations, one behind the other, as one."""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium import spaces

from srwm_rl.envs.batch import Array, BatchEnv, BatchStep, Observation, Space, check_count
from srwm_rl.envs.levels import BoolArray, IntArray
from srwm_rl.envs.wrappers.wrapped_batch import WrappedBatch
from srwm_rl.errors import UserError
from srwm_rl.image_layout import is_channels_first


class FrameStackBatch(WrappedBatch):
    """Stack the last `n_stack` observations of the episode, as SB3's `VecFrameStack` does.

    Images `[n, h, w, C]` become `[n, h, w, n_stack * C]`, `[n, C, h, w]` become `[n, n_stack * C, h, w]`, and vectors
    `[n, k]` become `[n, n_stack * k]`, the newest last; before an episode's first observation there are zeros. Of a
    Dict, the entries that are Boxes are stacked, and the others (such as an action mask) are left as they are.

    Args:
        batch_env: The environments, which start over.
        n_stack: Number of observations.

    Raises:
        UserError: If `n_stack` is no whole number above 0, or an observation has no part that is a Box with an axis.
    """

    def __init__(self, batch_env: BatchEnv, n_stack: int) -> None:
        self.n_stack = check_count("frame_stack", n_stack)
        space = batch_env.observation_space
        self._is_dict = isinstance(space, spaces.Dict)
        parts: dict[str, Space] = dict(space.spaces) if isinstance(space, spaces.Dict) else {"observation": space}
        boxes = {key: part for key, part in parts.items() if isinstance(part, spaces.Box) and part.shape}
        if not boxes:
            raise UserError(
                f"only Box observations with an axis can be stacked; {batch_env.games[0]} has {space!s:.80}, leave "
                "--frame-stack out"
            )
        self._axes = {key: _stacked_axis(part) for key, part in boxes.items()}
        stacks = {key: _stacked_space(part, n_stack, self._axes[key]) for key, part in boxes.items()}
        self._stacks: dict[str, Array] = {
            key: np.zeros((batch_env.n_envs, *part.shape), part.dtype) for key, part in stacks.items()
        }
        stacked = {**parts, **stacks}
        super().__init__(batch_env, spaces.Dict(stacked) if self._is_dict else stacked["observation"])

    def _start(self) -> None:
        self.batch_env.reseed(self.seed)
        self._restart_stacks(np.ones(self.n_envs, np.bool_), self.batch_env.reset())

    def _restart(self, mask: BoolArray, levels: IntArray | None) -> None:
        self._restart_stacks(mask, self.batch_env.reset(mask, levels))

    def step(self, actions: Array) -> BatchStep:
        """Act in every environment; see `BatchEnv.step`."""
        step = self.batch_env.step(actions)
        self._fresh = False
        self._clock += 1
        ended, final_obs = step.terminated | step.truncated, None
        if step.final_obs is None:
            self._push(step.obs)
        else:  # of the environments that go on it means nothing
            last, new = self._parts(step.final_obs), self._parts(step.obs)
            self._push({key: np.where(_column(ended, new[key]), last[key], new[key]) for key in self._stacks})
            final_obs = self._observation(step.final_obs)
        if ended.any():
            self._clock[ended] = 0
            self._restart_stacks(ended, step.obs)
        return step._replace(obs=self._observation(step.obs), final_obs=final_obs)

    def observe(self) -> Observation:
        """Return the current observations without stepping."""
        return self._observation(self.batch_env.observe())

    def _push(self, obs: Observation) -> None:
        """Move the stacks by one and add an observation."""
        for key, part in self._parts(obs).items():
            if key in self._stacks:
                stack, newest = (np.moveaxis(array, self._axes[key], -1) for array in (self._stacks[key], part))
                width = newest.shape[-1]
                stack[..., :-width] = stack[..., width:].copy()
                stack[..., -width:] = newest

    def _restart_stacks(self, mask: BoolArray, obs: Observation) -> None:
        """Fill the masked environments' stacks with zeros and an episode's first observation."""
        for key, part in self._parts(obs).items():
            if key in self._stacks:
                self._stacks[key][mask] = 0
                stack, first = (np.moveaxis(array, self._axes[key], -1) for array in (self._stacks[key], part))
                stack[mask, ..., -first.shape[-1] :] = first[mask]

    def _observation(self, obs: Observation) -> Observation:
        """Return an observation with copies of the stacks in the place of its Boxes."""
        stacks = {key: stack.copy() for key, stack in self._stacks.items()}
        return {**self._parts(obs), **stacks} if self._is_dict else stacks["observation"]

    @staticmethod
    def _parts(obs: Observation) -> dict[str, Array]:
        return obs if isinstance(obs, dict) else {"observation": obs}

    def _settings(self) -> dict[str, Any]:
        return {**super()._settings(), "n_stack": self.n_stack}

    def _arrays(self) -> dict[str, Array]:
        return {**super()._arrays(), **{f"stack {key}": stack for key, stack in self._stacks.items()}}


def _stacked_axis(space: spaces.Box) -> int:
    """Return the axis on which observations are stacked: the channels of images, else the last."""
    is_image = (
        len(space.shape) == 3 and space.dtype == np.uint8 and (space.low == 0).all() and (space.high == 255).all()
    )
    return -3 if is_image and is_channels_first(space.shape) else -1


def _stacked_space(space: spaces.Box, n_stack: int, axis: int) -> spaces.Box:
    """Return the space of `n_stack` observations, wide enough for the zeros that stand for none yet."""
    low, high = (np.concatenate([end] * n_stack, axis) for end in (np.minimum(space.low, 0), np.maximum(space.high, 0)))
    return spaces.Box(low.astype(space.dtype), high.astype(space.dtype), dtype=space.dtype)


def _column(mask: BoolArray, like: Array) -> BoolArray:
    """Return a mask `[n]` as `[n, 1, ...]`, with as many axes as an array."""
    return mask.reshape(-1, *[1] * (like.ndim - 1))
