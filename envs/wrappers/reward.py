"""Normalised or clipped rewards for the trainer."""

from __future__ import annotations

import numpy as np
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper, VecNormalize

from srwm_rl.envs.batch import Array, Observation
from srwm_rl.envs.vec_env import StatefulVecEnv, Step
from srwm_rl.errors import UserError


class VecNormalizeReward(StatefulVecEnv, VecNormalize):
    """Divide rewards by the running standard deviation of the discounted return, as SB3's `VecNormalize` does.

    Observations pass through uncopied (`VecNormalize` would deep-copy every frame), and the statistics can be saved
    without pickles. Infos keep the raw returns. Put it outside of `VecMemoryInputs`: the agent is to see raw rewards.

    Args:
        venv: The environments.
        gamma: Discount of the return whose deviation is measured.
        clip_reward: Normalised rewards are clipped to +- this.
    """

    def __init__(self, venv: VecEnv, gamma: float = 0.99, clip_reward: float = 10.0) -> None:
        super().__init__(venv, norm_obs=False, norm_reward=True, gamma=gamma, clip_reward=clip_reward)

    def normalize_obs(self, obs: Observation) -> Observation:
        """Return the observations as they are."""
        return obs

    def _arrays(self) -> dict[str, Array]:
        moments = np.array([self.ret_rms.mean, self.ret_rms.var, self.ret_rms.count], np.float64)
        return {"returns": self.returns, "moments": moments}

    def _set_arrays(self, arrays: dict[str, Array]) -> None:
        self.returns = arrays["returns"]
        mean, var, self.ret_rms.count = arrays["moments"].tolist()
        self.ret_rms.mean, self.ret_rms.var = np.array(mean), np.array(var)


class VecClipReward(VecEnvWrapper):
    """Clip the rewards that the trainer learns from to +- a bound, as the paper's RL code does with 1.

    Infos keep the raw returns. Put it outside of `VecMemoryInputs`, which clips what the agent sees for itself.

    Args:
        venv: The environments.
        bound: Above 0.

    Raises:
        UserError: If the bound is not above 0.
    """

    def __init__(self, venv: VecEnv, bound: float = 1.0) -> None:
        if not bound > 0:
            raise UserError(f"rewards can be clipped to a bound above 0, not to {bound!r}")
        super().__init__(venv)
        self.bound = bound

    def reset(self) -> Observation:
        """Start new episodes everywhere and return their first observations."""
        return self.venv.reset()  # type: ignore[return-value]

    def step_wait(self) -> Step:
        """Act, and return observations, clipped rewards, dones and infos."""
        obs, rewards, dones, infos = self.venv.step_wait()
        return obs, np.clip(rewards, -self.bound, self.bound), dones, infos  # type: ignore[return-value]
