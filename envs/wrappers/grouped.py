"""Several vector environments as one, so that a trainer can act for some while others step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from stable_baselines3.common.vec_env import VecEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnvIndices

from srwm_rl.envs.batch import Array, Observation, State, check_state
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
        stops = np.cumsum([group.num_envs for group in groups]).tolist()
        self._rows = [range(stop - group.num_envs, stop) for group, stop in zip(groups, stops, strict=True)]
        super().__init__(stops[-1], first.observation_space, first.action_space)

    def seed(self, seed: int | None = None) -> Sequence[int | None]:
        """Seed every group at its next reset, each with the number its first environment would get."""
        seeds = super().seed(seed)
        for group, rows in zip(self.groups, self._rows, strict=True):
            group.seed(seeds[rows.start])
        return seeds

    def set_options(self, options: list[dict[str, Any]] | dict[str, Any] | None = None) -> None:
        """Pass reset options on; "levels" are one per environment and are divided among the groups.

        Raises:
            UserError: options of another kind.
        """
        options = options or {}
        if not isinstance(options, dict) or set(options) - {"levels"}:
            raise UserError("the one reset option is 'levels', for all environments")
        for group, rows in zip(self.groups, self._rows, strict=True):
            group.set_options({key: levels[rows.start : rows.stop] for key, levels in options.items()})

    def reset(self) -> Observation:
        """Start new episodes everywhere and return their first observations."""
        obs = [group.reset() for group in self.groups]
        # A wrapper's own list is never filled.
        self.reset_infos = [info for group in self.groups for info in group.unwrapped.reset_infos]
        self._reset_seeds()
        return join(obs)  # type: ignore[arg-type]

    def step_async(self, actions: Array) -> None:
        """Pass its actions to every group."""
        for group, rows in zip(self.groups, self._rows, strict=True):
            group.step_async(actions[rows.start : rows.stop])

    def step_wait(self) -> Step:
        """Step every group, one after the other."""
        steps = [group.step_wait() for group in self.groups]
        obs, rewards, dones, infos = zip(*steps, strict=True)
        return join(obs), np.concatenate(rewards), np.concatenate(dones), [i for part in infos for i in part]

    @property
    def supports_state(self) -> bool:
        """Whether every group can be saved."""
        return all(getattr(group, "supports_state", False) for group in self.groups)

    @property
    def has_answers(self) -> bool:
        """Whether every group has right answers."""
        return all(getattr(group, "has_answers", False) for group in self.groups)

    def answers(self) -> Array:
        """Return the right action for each current observation, `[n]`; -1 where none is asked for."""
        self.settle()
        return np.concatenate([group.answers() for group in self.groups])  # type: ignore[attr-defined]

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
        check_state(state, map(str, range(len(self.groups))))
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
        return self._gather("get_attr", indices, attr_name)

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        """Set an attribute of every environment asked for."""
        for group, local in self._parts(indices):
            group.set_attr(attr_name, value, local)

    def env_method(
        self, method_name: str, *method_args: Any, indices: VecEnvIndices = None, **method_kwargs: Any
    ) -> list[Any]:
        """Call a method of every environment asked for."""
        return self._gather("env_method", indices, method_name, *method_args, **method_kwargs)

    def env_is_wrapped(self, wrapper_class: type[Any], indices: VecEnvIndices = None) -> list[bool]:
        """Return for every environment asked for whether it is wrapped in a class."""
        return self._gather("env_is_wrapped", indices, wrapper_class)

    def _gather(self, method: str, indices: VecEnvIndices, *args: Any, **kwargs: Any) -> list[Any]:
        parts = self._parts(indices)
        return [value for group, local in parts for value in getattr(group, method)(*args, indices=local, **kwargs)]

    def _parts(self, indices: VecEnvIndices) -> list[tuple[VecEnv, list[int]]]:
        """Wait for steps under way; return the groups of the environments asked for and their indices within."""
        self.settle()
        wanted = list(self._get_indices(indices))
        local = [[i - rows.start for i in wanted if i in rows] for rows in self._rows]
        return [(group, indices) for group, indices in zip(self.groups, local, strict=True) if indices]


def join(parts: Sequence[Observation]) -> Observation:
    """Concatenate observations `[n_i, ...]` to `[sum n_i, ...]`; dicts key by key."""
    first = parts[0]
    if isinstance(first, dict):
        return {key: np.concatenate([part[key] for part in parts]) for key in first}
    return np.concatenate(parts)  # type: ignore[arg-type]
