"""Action masks of a Gymnasium environment as an entry of its observations."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from srwm_rl.errors import FaultError

ACTION_MASK = "action_mask"


class ActionMaskObservation(gymnasium.Wrapper[Any, Any, Any, Any]):
    """Observations as a Dict with the entry `action_mask`, 1 where an action is allowed.

    The masks are those of the environment's method `action_masks()`, as of sb3-contrib's `MaskablePPO`, or of
    `info["action_mask"]`. An observation that is no Dict stands under "observation".

    Args:
        env: an environment for which `has_action_masks` is true.

    Raises:
        FaultError: later, a mask is missing, has another number of entries, or allows no action.
    """

    def __init__(self, env: gymnasium.Env[Any, Any]) -> None:
        super().__init__(env)
        self._sizes = _sizes(env.action_space)
        base = env.observation_space
        parts = dict(base.spaces) if isinstance(base, spaces.Dict) else {"observation": base}
        self.observation_space = spaces.Dict({**parts, ACTION_MASK: spaces.MultiBinary(sum(self._sizes))})

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Start an episode."""
        obs, info = self.env.reset(seed=seed, options=options)
        return self._join(obs, info, ended=False), info

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Act once."""
        obs, reward, terminated, truncated, info = self.env.step(action)
        return self._join(obs, info, terminated or truncated), reward, terminated, truncated, info

    def _join(self, obs: Any, info: dict[str, Any], ended: bool) -> dict[str, Any]:
        """Add the mask; after an episode's last step, where no action follows, all actions are allowed."""
        total = sum(self._sizes)
        if ended:
            mask = np.ones(total, np.int8)
        else:
            method = _method(self.env)
            raw = info.get(ACTION_MASK) if method is None else method()
            mask = (np.asarray(raw).reshape(-1) != 0).astype(np.int8)
            if raw is None or len(mask) != total:
                raise FaultError(f"the action mask must have {total} entries, not {None if raw is None else len(mask)}")
            if not all(part.any() for part in np.split(mask, np.cumsum(self._sizes)[:-1])):
                raise FaultError("the action mask allows no action")
        return {**(obs if isinstance(obs, dict) else {"observation": obs}), ACTION_MASK: mask}


def has_action_masks(env: gymnasium.Env[Any, Any]) -> bool:
    """Return whether an environment has masks for its Discrete or MultiDiscrete actions; it is reset to find out."""
    if not _sizes(env.action_space):
        return False
    if isinstance(env.observation_space, spaces.Dict) and ACTION_MASK in env.observation_space.spaces:
        return False
    return _method(env) is not None or ACTION_MASK in env.reset(seed=0)[1]


def _method(env: gymnasium.Env[Any, Any]) -> Any:
    return env.get_wrapper_attr("action_masks") if env.has_wrapper_attr("action_masks") else None


def _sizes(space: Any) -> list[int]:
    """Return the number of values of each choice."""
    if isinstance(space, spaces.MultiDiscrete):
        return [int(n) for n in space.nvec.ravel()]
    return [int(space.n)] if isinstance(space, spaces.Discrete) else []
