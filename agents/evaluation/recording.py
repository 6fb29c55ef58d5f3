"""Record one agent in one environment: its steps, and diagnostics of its network."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from gymnasium import spaces
from stable_baselines3.common.vec_env import VecEnv
from torch import Tensor

from srwm_rl.nn.diagnostics import StepDiagnostics, introspect
from srwm_rl.nn.policy import SRWMPolicy

Array = npt.NDArray[Any]
Arrays = dict[str, Array]
Choose = Callable[[Any, bool], tuple[Array, StepDiagnostics | None]]
"""Maps an observation `[1, ...]` and "an episode starts here" to an action `[1, ...]`."""


class Played(NamedTuple):
    """One step."""

    obs: Any  # [1, ...]
    start: bool  # the first step of an episode
    level: int
    action: Array  # [*action_shape]
    reward: float
    done: bool  # the last step of an episode
    solved: bool | None  # None: the episode continues, or the game cannot be solved
    diagnostics: StepDiagnostics | None


def play(
    env: VecEnv, choose: Choose, levels: Iterable[int], see: Callable[[Any], None] | None = None
) -> Iterator[Played]:
    """Step a `srwm_rl.envs.LevelsVecEnv` of one environment, which has these `levels`, until no episode is left.

    `see` is called with each observation, before the step.
    """
    upcoming = iter(levels)
    obs, start, level = env.reset(), True, next(upcoming)
    while env.remaining:  # type: ignore[attr-defined]
        if see is not None:
            see(obs)
        action, diagnostics = choose(obs, start)
        new_obs, rewards, dones, infos = env.step(action)
        done = bool(dones[0])
        solved = infos[0].get("is_success") if done else None
        yield Played(obs, start, level, np.asarray(action[0]), float(rewards[0]), done, solved, diagnostics)
        obs, start, level = new_obs, done, next(upcoming, level) if done else level


class Introspector:
    """Acts as the policy does and returns its diagnostics; equal torch seeds give equal actions."""

    def __init__(self, policy: SRWMPolicy, deterministic: bool = False) -> None:
        self.policy, self.deterministic = policy, deterministic
        policy.set_training_mode(False)
        self._state: Tensor = policy.initial_state(1)

    def __call__(self, obs: Any, start: bool) -> tuple[Array, StepDiagnostics]:
        """See `Choose`."""
        tensors, _ = self.policy.obs_to_tensor(obs)
        starts = torch.tensor([start], device=self.policy.device)
        diagnostics = introspect(self.policy, tensors, self._state, starts, self.deterministic)
        self._state = diagnostics.core_state
        action = diagnostics.actions.cpu().numpy()
        if isinstance(self.policy.action_space, spaces.Box):
            action = np.clip(action, self.policy.action_space.low, self.policy.action_space.high)
        return action, diagnostics


class Observer:
    """Keeps a running sha256 of the observations, by which a replay finds the first step that differs."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()
        self.links: list[int] = []  # the first 64 bits of the digest, step by step

    def see(self, obs: Any) -> None:
        """Add an observation `[1, ...]` or a dict of such."""
        for key, value in sorted(obs.items()) if isinstance(obs, dict) else [("", obs)]:
            array = np.ascontiguousarray(value)
            self._hash.update(f"{key}\0{array.dtype.str}\0{array.shape}\0".encode())
            self._hash.update(array.tobytes())
        self.links.append(int.from_bytes(self._hash.digest()[:8], "little"))

    def digest(self) -> str:
        """Return the sha256 over all observations so far."""
        return self._hash.hexdigest()


def collect(steps: Iterable[Played]) -> Arrays:
    """Stack T steps and the diagnostics that they have.

    Returns:
        `actions` `[T, *action_shape]`, `rewards` `[T]`, `starts` `[T]`, `dones` `[T]`, `solved` `[T]` (-1: unknown),
        `levels` `[T]`; with diagnostics also `values` `[T]`, `entropy` `[T]`, `choices` `[T, N]`, `std` `[T, N]`,
        `edit` `[T, L, H]`, `drift` `[T, L, H]`, `rates` `[T, L, H, 4]`.
    """
    played = list(steps)
    arrays: Arrays = {
        "actions": np.stack([step.action for step in played]),
        "rewards": np.array([step.reward for step in played], np.float32),
        "starts": np.array([step.start for step in played]),
        "dones": np.array([step.done for step in played]),
        "solved": np.array([-1 if step.solved is None else int(step.solved) for step in played], np.int8),
        "levels": np.array([step.level for step in played], np.int64),
    }
    diagnostics = [step.diagnostics for step in played if step.diagnostics is not None]
    for name in ("values", "entropy", "choices", "std", "edit", "drift", "rates"):
        tensors = [getattr(step, name) for step in diagnostics]
        if tensors and tensors[0] is not None:
            batch_axis = 1 if name in ("edit", "drift", "rates") else 0
            arrays[name] = np.stack([tensor.select(batch_axis, 0).cpu().numpy() for tensor in tensors])
    return arrays
