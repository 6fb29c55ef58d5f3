"""Several vector environments as one, so that a trainer can act for some while others step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from stable_baselines3.common.vec_env import VecEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnvIndices

from srwm_rl.envs.batch import Array, Observation, State
from srwm_rl.envs.vec_env import Step
from srwm_rl.errors import UserError


class GroupedVecEnv(VecEnv):
    """Hold several `VecEnv`s and look like one; `groups` lets a trainer step each for itself.

    Environments are numbered through the groups in order. Every group steps in its own `step_wait`, so that what steps
    them may do so in one thread group.

    Args:
        groups: environments with equal spaces, whatever they are wrapped in.

    Attributes:
        settle: waits until no group is within a step; called before any other method of a group. Set by the trainer
            that steps the groups.

    Raises:
        UserError: there is none, or the spaces differ.
    """

    settle: Callable[[], None] = staticmethod(lambda: None)

    def __init__(self, groups: Sequence[VecEnv]) -> None:
        if not groups:
            raise UserError("a GroupedVecEnv needs at least one group of environments")
        first = groups[0]
        for group in groups[1:]:
            if group.observation_space != first.observation_space or group.action_space != first.action_space:
                raise UserError("all groups of a GroupedVecEnv must have the same observation and action spaces")
        self.groups = list(groups)
        self._starts = [0, *np.cumsum([group.num_envs for group in groups]).tolist()]
        n_envs = self._starts.pop()
        super().__init__(n_envs, first.observation_space, first.action_space)

    def seed(self, seed: int | None = None) -> Sequence[int | None]:
        """Seed every group at its next reset, each with the number its first environment would get."""
        seeds = super().seed(seed)
        for group, start in zip(self.groups, self._starts, strict=True):
            group.seed(seeds[start])
        return seeds

    def set_options(self, options: list[dict[str, Any]] | dict[str, Any] | None = None) -> None:
        """Pass reset options on; "levels" are one per environment and are divided among the groups.

        Raises:
            UserError: options of another kind.
        """
        options = options or {}
        if not isinstance(options, dict) or set(options) - {"levels"}:
            raise UserError("the one reset option is 'levels', for all environments")
        for group, start in zip(self.groups, self._starts, strict=True):
            levels = {"levels": options["levels"][start : start + group.num_envs]} if options else {}
            group.set_options(levels)

    def reset(self) -> Observation:
        """Start new episodes everywhere and return their first observations."""
        obs = [group.reset() for group in self.groups]
        # A wrapper's own list is never filled.
        self.reset_infos = [info for group in self.groups for info in group.unwrapped.reset_infos]
        self._reset_seeds()
        return join(obs)  # type: ignore[arg-type]

    def step_async(self, actions: Array) -> None:
        """Pass its actions to every group."""
        for group, part in zip(self.groups, np.split(actions, self._starts[1:]), strict=True):
            group.step_async(part)

    def step_wait(self) -> Step:
        """Step every group, one after the other."""
        steps = [group.step_wait() for group in self.groups]
        obs, rewards, dones, infos = zip(*steps, strict=True)
        return join(obs), np.concatenate(rewards), np.concatenate(dones), [i for part in infos for i in part]

    @property
    def supports_state(self) -> bool:
        """Whether every group can be saved."""
        return all(getattr(group, "supports_state", False) for group in self.groups)

    def observe(self) -> Observation:
        """Return the current observations without stepping, as after `set_state`."""
        self.settle()
        return join([group.observe() for group in self.groups])  # type: ignore[attr-defined]

    def get_state(self) -> State:
        """Return every group's state, without pickles."""
        self.settle()
        return {str(i): group.get_state() for i, group in enumerate(self.groups)}  # type: ignore[attr-defined]

    def set_state(self, state: State) -> None:
        """Continue exactly where `get_state` was called.

        Raises:
            UserError: the state is not one of such environments.
        """
        if not isinstance(state, dict) or set(state) != {str(i) for i in range(len(self.groups))}:
            raise UserError("this is not a saved state of these environments; give what their get_state returned")
        for i, group in enumerate(self.groups):
            group.set_state(state[str(i)])  # type: ignore[attr-defined]

    def close(self) -> None:
        """Close every group."""
        for group in self.groups:
            group.close()

    def get_images(self) -> list[Any]:
        """Return a picture of every environment."""
        self.settle()
        return [image for group in self.groups for image in group.get_images()]

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        """Return an attribute of every environment asked for."""
        return [value for group, local in self._parts(indices) for value in group.get_attr(attr_name, local)]

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        """Set an attribute of every environment asked for."""
        for group, local in self._parts(indices):
            group.set_attr(attr_name, value, local)

    def env_method(
        self, method_name: str, *method_args: Any, indices: VecEnvIndices = None, **method_kwargs: Any
    ) -> list[Any]:
        """Call a method of every environment asked for."""
        return [
            result
            for group, local in self._parts(indices)
            for result in group.env_method(method_name, *method_args, indices=local, **method_kwargs)
        ]

    def env_is_wrapped(self, wrapper_class: type[Any], indices: VecEnvIndices = None) -> list[bool]:
        """Return for every environment asked for whether it is wrapped in a class."""
        parts = self._parts(indices)
        return [wrapped for group, local in parts for wrapped in group.env_is_wrapped(wrapper_class, local)]

    def _parts(self, indices: VecEnvIndices) -> list[tuple[VecEnv, list[int]]]:
        """Wait for steps under way; return the groups of the environments asked for and their indices within."""
        self.settle()
        wanted = np.asarray(list(self._get_indices(indices)))
        parts = []
        for group, start in zip(self.groups, self._starts, strict=True):
            local = wanted[(wanted >= start) & (wanted < start + group.num_envs)] - start
            if len(local):
                parts.append((group, local.tolist()))
        return parts


def join(parts: Sequence[Observation]) -> Observation:
    """Concatenate observations `[n_i, ...]` to `[sum n_i, ...]`; dicts key by key."""
    first = parts[0]
    if isinstance(first, dict):
        return {key: np.concatenate([part[key] for part in parts]) for key in first}
    return np.concatenate(parts)  # type: ignore[arg-type]
