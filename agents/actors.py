"""The actors' side of IMPALA: groups of environments that step in turn."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

import numpy as np
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper
from torch import Tensor

from srwm_rl.agents.unrolls import Unrolls
from srwm_rl.policy import ActStep


class Group:
    """Environments that step together, and the unroll they are in."""

    unrolls: Unrolls
    core_state: Tensor  # [L, B, S], with which the next step begins
    obs: Any  # [B, ...]
    starts: np.ndarray  # [B]
    step: ActStep  # the last one

    def __init__(self, env: VecEnv, rows: slice) -> None:
        self.env, self.rows = env, rows
        self.stepping: Future[Any] | None = None

    def begin(self, unrolls: Unrolls, obs: Any, starts: np.ndarray, core_state: Tensor) -> None:
        """Start an unroll where the last one ended."""
        self.unrolls, self.core_state = unrolls, core_state
        self.obs = {key: each[self.rows] for key, each in obs.items()} if isinstance(obs, dict) else obs[self.rows]
        self.starts = starts[self.rows]


def groups_of(env: VecEnv) -> list[Group]:
    """Return the groups of a `srwm_rl.envs.GroupedVecEnv`, or any other environments as one."""
    # A wrapper around groups shows their attributes too; stepping them past it would skip what it does.
    envs = [env] if isinstance(env, VecEnvWrapper) else getattr(env, "groups", [env])
    stops = np.cumsum([each.num_envs for each in envs]).tolist()
    return [Group(each, slice(stop - each.num_envs, stop)) for each, stop in zip(envs, stops, strict=True)]


def joined_obs(parts: list[Any]) -> Any:
    """Concatenate observations `[B_i, ...]` of the groups to `[B, ...]`; dicts key by key."""
    if isinstance(parts[0], dict):
        return {key: np.concatenate([each[key] for each in parts]) for key in parts[0]}
    return np.concatenate(parts)
