"""Record one agent in one environment: its steps, and diagnostics of its network."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from gymnasium import spaces
from stable_baselines3.common.vec_env import VecEnv
from torch import Tensor

from srwm_rl.nn.diagnostics import head_norms, introspect
from srwm_rl.nn.policy import SRWMPolicy

Array = npt.NDArray[Any]
Arrays = dict[str, Array]
Choose = Callable[[Any, bool], tuple[Array, Arrays]]
"""Maps an observation `[1, ...]` and "an episode starts here" to an action `[1, ...]` and diagnostics of the step."""
DIAGNOSTICS = {"values": 0, "entropy": 0, "choices": 0, "std": 0, "edit": 1, "drift": 1, "rates": 1}
"""Those that are recorded, with the axis of their batch."""


def play(
    env: VecEnv, choose: Choose, levels: Iterable[int], digest: Any, see: Callable[[Any], None] | None = None
) -> Iterator[Arrays]:
    """Step a `srwm_rl.envs.LevelsVecEnv` of one environment, which has these `levels`, until no episode is left.

    Yields each step's entries of the arrays of `collect`. Each observation is added to the running `digest`, a
    `hashlib.sha256()`, and passed to `see` before the step.
    """
    upcoming = iter(levels)
    obs, start, level, attempt = env.reset(), True, next(upcoming), 0
    while env.remaining:  # type: ignore[attr-defined]
        update(digest, obs)
        if see is not None:
            see(obs)
        notes = {name: np.asarray(values[0], np.int64) for name, values in getattr(env, "step_notes", dict)().items()}
        action, diagnostics = choose(obs, start)
        obs, rewards, dones, infos = env.step(action)
        done = bool(dones[0])
        solved = infos[0].get("is_success") if done else None
        yield {
            "links": np.asarray(int.from_bytes(digest.digest()[:8], "little"), np.uint64),
            "actions": np.asarray(action[0]),
            "rewards": np.asarray(rewards[0], np.float32),
            "starts": np.asarray(start),
            "dones": np.asarray(done),
            "solved": np.asarray(-1 if solved is None else solved, np.int8),
            "levels": np.asarray(level, np.int64),
            "attempts": np.asarray(attempt, np.int64),
            **notes,
            **diagnostics,
        }
        start, level = done, next(upcoming, level) if done else level
        attempt = 0 if done else infos[0].get("attempt", attempt - 1) + 1


def update(digest: Any, obs: Any) -> None:
    """Add an observation `[1, ...]` or a dict of such to a digest, by which a replay finds the first that differs."""
    for key, value in sorted(obs.items()) if isinstance(obs, dict) else [("", obs)]:
        array = np.ascontiguousarray(value)
        digest.update(f"{key}\0{array.dtype.str}\0{array.shape}\0".encode())
        digest.update(array.tobytes())


class Introspector:
    """Acts as the policy does and returns its diagnostics; equal torch seeds give equal actions.

    `frozen` is a mask `[L, S]` of elements of the state that stay 0, as of `interventions.column_part`; recorded are
    the edits that are kept.
    """

    def __init__(
        self, policy: SRWMPolicy, deterministic: bool = False, frozen: npt.NDArray[np.bool_] | None = None
    ) -> None:
        self.policy, self.deterministic = policy, deterministic
        policy.set_training_mode(False)
        self._state: Tensor = policy.initial_state(1)
        self._frozen = None if frozen is None else torch.from_numpy(frozen).to(self._state.device)[:, None]  # [L, 1, S]

    def __call__(self, obs: Any, start: bool) -> tuple[Array, Arrays]:
        """See `Choose`."""
        tensors, _ = self.policy.obs_to_tensor(obs)
        starts = torch.tensor([start], device=self.policy.device)
        step = introspect(self.policy, tensors, self._state, starts, self.deterministic)
        if self._frozen is not None:
            kept = step.core_state.masked_fill(self._frozen, 0)
            change = kept - self._state.masked_fill(starts[:, None] != 0, 0)
            step = step._replace(core_state=kept, edit=head_norms(self.policy.core, change))
        self._state = step.core_state
        action = step.actions.cpu().numpy()
        if isinstance(self.policy.action_space, spaces.Box):
            action = np.clip(action, self.policy.action_space.low, self.policy.action_space.high)
        recorded = {name: (getattr(step, name), axis) for name, axis in DIAGNOSTICS.items()}
        arrays = {name: tensor.select(axis, 0) for name, (tensor, axis) in recorded.items() if tensor is not None}
        return action, {name: tensor.cpu().numpy() for name, tensor in arrays.items()}


def collect(steps: Iterable[Arrays]) -> Arrays:
    """Stack T steps.

    Returns:
        `links` `[T]`, the digest's first 64 bits; `actions` `[T, *action_shape]`, `rewards` `[T]`, `starts` `[T]`,
        `dones` `[T]`, `solved` `[T]` (-1: unknown), `levels` `[T]`, `attempts` `[T]` (from 0); with diagnostics also
        `values` `[T]`, `entropy` `[T]`, `choices` `[T, N]`, `std` `[T, N]`, `edit` `[T, L, H]`, `drift` `[T, L, H]`,
        `rates` `[T, L, H, 4]`. The environment's `step_notes` are `[T]`.
    """
    played = list(steps)
    return {name: np.stack([step[name] for step in played]) for name in played[0]}
