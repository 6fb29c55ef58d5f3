"""Action masks of environments as an entry of their observations."""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper

from srwm_rl.errors import UserError
from srwm_rl.nn.encoders import MAIN_KEY
from srwm_rl.nn.spaces import ACTION_MASK, check_masks, mask_size


class VecActionMasks(VecEnvWrapper):
    """Observations as a Dict with the entry `action_mask` `[n, k]`: 1 where an action is allowed.

    The masks are those of the environments' method `action_masks()`, as sb3-contrib's `MaskablePPO` reads them, or of
    `info["action_mask"]` from `reset` and `step`, as of Gymnasium's Taxi. An observation that is no Dict stands under
    "observation". `PPO` and `IMPALA` wrap environments with `action_masks()` themselves.

    Args:
        venv: environments with Discrete or MultiDiscrete actions (k: n, or the sum of `nvec`).

    Raises:
        UserError: other actions; later, a mask of another size, one that allows no action, or none at all.
    """

    supports_state = False  # of the environments inside, whose state has no masks

    def __init__(self, venv: VecEnv) -> None:
        size = mask_size(venv.action_space)
        if size is None:
            raise UserError(f"action masks are for Discrete and MultiDiscrete actions, not for {venv.action_space}")
        self._size, self._has_method = size, venv.has_attr("action_masks")
        base = venv.observation_space
        parts = dict(base.spaces) if isinstance(base, spaces.Dict) else {MAIN_KEY: base}
        if ACTION_MASK in parts:
            raise UserError(f"the observation has an entry {ACTION_MASK!r} already; leave VecActionMasks out")
        super().__init__(venv, observation_space=spaces.Dict({**parts, ACTION_MASK: spaces.MultiBinary(size)}))

    def reset(self) -> Any:
        """Start new episodes everywhere and return their first observations."""
        obs = self.venv.reset()
        return self._join(obs, self._masks(self.venv.unwrapped.reset_infos))

    def step_wait(self) -> Any:
        """Act, and return observations, rewards, dones and infos."""
        obs, rewards, dones, infos = self.venv.step_wait()
        begun = self.venv.unwrapped.reset_infos
        for i in dones.nonzero()[0]:
            if infos[i].get("terminal_observation") is not None:  # only its value counts: its mask may be missing
                mask = np.asarray(infos[i].get(ACTION_MASK, np.ones(self._size)), np.int8)
                infos[i]["terminal_observation"] = self._join(infos[i]["terminal_observation"], mask)
        sources = [begun[i] if dones[i] else infos[i] for i in range(self.num_envs)]
        return self._join(obs, self._masks(sources)), rewards, dones, infos

    def _masks(self, infos: list[dict[str, Any]]) -> np.ndarray:
        """Return the present masks, `[n, k]`."""
        if self._has_method:
            rows = self.venv.env_method("action_masks")
        elif all(ACTION_MASK in info for info in infos):
            rows = [info[ACTION_MASK] for info in infos]
        else:
            raise UserError("an environment has neither action_masks() nor info['action_mask'] at each reset and step")
        masks = np.stack([np.asarray(row).reshape(-1) for row in rows])
        if masks.shape != (self.num_envs, self._size):
            raise UserError(f"action masks must have {self._size} entries, not {masks.shape[1]}")
        bits: np.ndarray = (masks != 0).astype(np.int8)
        check_masks(bits, self.action_space)
        return bits

    @staticmethod
    def _join(obs: Any, masks: np.ndarray) -> dict[str, Any]:
        return {**(obs if isinstance(obs, dict) else {MAIN_KEY: obs}), ACTION_MASK: masks}
