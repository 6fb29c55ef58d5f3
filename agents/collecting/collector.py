"""Collecting steps, alike for every trainer: groups of environments, of which some step while one is acted for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper
from torch import Tensor

from srwm_rl.agents.base import RecurrentAlgorithm
from srwm_rl.agents.collecting.rollout_buffer import RolloutWriter
from srwm_rl.nn.policy import ActStep, SRWMPolicy

Stepped = tuple[Any, np.ndarray, np.ndarray, list[dict[str, Any]]]  # what `VecEnv.step` returns
Begin = Callable[[VecEnv, np.ndarray], Callable[[], Stepped]]  # begins a step and returns what waits for its end


class StepResult(NamedTuple):
    """What a step of a group gave."""

    rewards: np.ndarray  # [B]
    dones: np.ndarray  # [B]
    infos: list[dict[str, Any]]
    acted: ActStep  # what the policy had said


class EnvGroup:
    """Environments that step together, and where they are."""

    obs: Any  # arrays [B, ...]
    starts: np.ndarray  # [B]
    core_state: Tensor  # [L, B, S], with which the next step begins
    acted: ActStep  # the last one
    actions: np.ndarray  # its actions [B, ...]
    steps: RolloutWriter  # where what is played is written

    def __init__(self, env: VecEnv, first: int) -> None:
        self.env = env
        self.numbers = range(first, first + env.num_envs)  # of its environments among all
        self.rows = slice(first, first + env.num_envs)
        self.stepping: Callable[[], Stepped] | None = None  # waits for the end of the step that has begun
        self.failed = False  # whether a step went wrong, so that nobody knows where the environments are

    def begin(self, obs: Any, starts: np.ndarray, core_state: Tensor, steps: RolloutWriter) -> None:
        """Begin a rollout with this group's rows of `obs` `[B, ...]`, `starts` `[B]` and `core_state` `[L, B, S]`."""
        self.obs = {key: each[self.rows] for key, each in obs.items()} if isinstance(obs, dict) else obs[self.rows]
        self.starts, self.core_state = starts[self.rows], core_state[:, self.rows].contiguous()
        self.steps = steps


def groups_of(env: VecEnv) -> list[EnvGroup]:
    """Return the groups of a `srwm_rl.envs.GroupedVecEnv`, or any other environments as one."""
    # A wrapper around groups shows their attributes too; stepping them past it would skip what it does.
    envs = [env] if isinstance(env, VecEnvWrapper) else getattr(env, "groups", [env])
    stops = np.cumsum([each.num_envs for each in envs]).tolist()
    return [EnvGroup(each, stop - each.num_envs) for each, stop in zip(envs, stops, strict=True)]


@contextmanager
def stepper(n_groups: int) -> Iterator[Begin]:
    """Give what begins a step: in a thread for each of several groups, so that they overlap.

    One group alone has nothing to overlap with. It steps in the thread that waits for it: to wake another for every
    step would only take time.
    """
    if n_groups == 1:
        yield lambda env, actions: partial(env.step, actions)
        return
    with ThreadPoolExecutor(n_groups, "srwm-step") as pool:
        yield lambda env, actions: pool.submit(env.step, actions).result


class CollectingAlgorithm(RecurrentAlgorithm):
    """A recurrent algorithm that plays rollouts of T steps in groups of environments; a subclass learns from them."""

    _acting: SRWMPolicy | None = None  # a copy of the policy that acts while the policy learns; None: it acts itself
    _weights: AbstractContextManager[Any] = nullcontext()  # held while a callback may look at the weights

    @property
    def _actor(self) -> SRWMPolicy:
        return self._acting or self.policy

    def _collect(
        self, env: VecEnv, groups: list[EnvGroup], callback: BaseCallback, rollout_buffer: Any, n_rollout_steps: int
    ) -> bool:
        """Play T steps in every environment of groups that have begun a rollout; act for one while the others step.

        Callbacks see a step once all groups have made it. What they find in `locals`, beside what stood there: this
        method's arguments, `rewards`, `dones` and `infos` of all environments, and `new_obs` where there is one group.

        Returns:
            False if a callback asked to stop. Whatever ends this, the next rollout goes on where the environments are;
            if one of them failed, `learn` resets them all.
        """
        constant = {"self": self, "env": env, "callback": callback, "rollout_buffer": rollout_buffer}
        callback.update_locals({**constant, "n_rollout_steps": n_rollout_steps})
        if len(groups) > 1:
            env.settle = partial(settle, groups)  # type: ignore[attr-defined]
        try:
            with stepper(len(groups)) as begin:
                for t in range(n_rollout_steps + 1):
                    outcomes = []
                    for group in groups:
                        if group.stepping is not None:
                            outcomes.append(self._finish_step(group))
                        # All groups have made step t - 1, and the last one waits for its actions: one group alone
                        # stops as exactly as SB3's loop does.
                        if len(outcomes) == len(groups) and not self._after_step(t - 1, groups, outcomes, callback):
                            return False
                        if t < n_rollout_steps:
                            self._start_step(group, t, begin)
                        else:
                            self._finish_group(group, t)
        finally:
            known = self._abandon(groups)
            vars(env).pop("settle", None)
            self._last_obs = joined_obs([group.obs for group in groups]) if known else None
            self._last_episode_starts = joined([group.starts for group in groups])
            states = [group.core_state for group in groups]
            self._core_state = states[0] if len(states) == 1 else torch.cat(states, dim=1)
        return True

    def _finish_group(self, group: EnvGroup, t: int) -> None:
        """Do what is left to do for a group that has made all `t` steps."""
        raise NotImplementedError

    def _act(self, group: EnvGroup) -> tuple[Any, Any]:
        """Act for a group and return what it saw and where episodes began, as `RolloutWriter.observe` takes them.

        Where its memory was sick, the step begins with an empty one.
        """
        policy, obs = self._actor, self._obs_tensor(group.obs)
        starts: Any = self._obs_tensor(group.starts)
        group.acted, group.core_state, group.actions = self._nan_guard.act(
            policy, obs, group.core_state, starts, self.num_timesteps, self._acting_by(policy), group.numbers
        )
        # On a CPU they are the same memory, and an array is written faster than a tensor.
        return (group.obs, group.starts) if self.device.type == "cpu" else (obs, starts)

    def _start_step(self, group: EnvGroup, t: int, begin: Begin) -> None:
        group.steps.observe(t, *self._act(group))
        group.steps.act(t, group.acted, group.core_state)
        group.stepping = begin(group.env, self._env_actions(group.actions))

    def _finish_step(self, group: EnvGroup) -> StepResult:
        assert group.stepping is not None
        wait, group.stepping = group.stepping, None
        group.failed = True  # unless all of this succeeds
        obs, rewards, dones, infos = wait()
        # Before the last group has made this step, an environment may write the next one over its own arrays.
        rewards, dones = rewards.copy(), dones.copy()
        group.obs = self._nan_guard.arrays("observation", obs, self.num_timesteps, group.numbers)
        group.starts, group.core_state = dones, group.acted.core_state
        rewards = self._nan_guard.arrays("reward", rewards, self.num_timesteps, group.numbers)
        group.failed = False
        return StepResult(rewards, dones, infos, group.acted)

    def _after_step(self, t: int, groups: list[EnvGroup], outcomes: list[StepResult], callback: BaseCallback) -> bool:
        """Count step t, which all groups have made, show it to the callbacks, and store its rewards."""
        rewards, dones = joined([each.rewards for each in outcomes]), joined([each.dones for each in outcomes])
        infos = outcomes[0].infos if len(outcomes) == 1 else [info for each in outcomes for info in each.infos]
        self.num_timesteps += len(dones) * self.processes.size
        # To join the observations of several groups for nobody would take as long as some environments do.
        new_obs = {"new_obs": groups[0].obs} if len(groups) == 1 else {}
        with self._weights:
            callback.update_locals({"rewards": rewards, "dones": dones, "infos": infos, **new_obs})
            goes_on = callback.on_step()
        self._update_info_buffer(infos, dones)
        if not goes_on:
            return False
        for group, each in zip(groups, outcomes, strict=True):
            final = self._bootstrap_truncated(
                self._actor, rewards[group.rows], each.dones, each.infos, each.acted, group.numbers
            )
            group.steps.reward(t, final)
        return True

    def _abandon(self, groups: list[EnvGroup]) -> bool:
        """Wait for the groups that step already, so that what comes next goes on from where they are.

        Returns:
            False if a step failed, now or before.
        """
        for group in groups:
            if group.stepping is not None:
                with suppress(Exception):  # whatever ended the rollout is told, or the next rollout meets it again
                    outcome = self._finish_step(group)
                    self.num_timesteps += group.env.num_envs * self.processes.size
                    self._update_info_buffer(outcome.infos, outcome.dones)
        return not any(group.failed for group in groups)


def settle(groups: list[EnvGroup]) -> None:
    """Wait until no group is within a step: then its environments may be asked for something else."""
    for group in groups:
        if group.stepping is not None:
            with suppress(Exception):  # told by whoever finishes the step
                group.stepping()


def joined(parts: list[np.ndarray]) -> np.ndarray:
    """Concatenate the groups' arrays `[B_i, ...]` to `[B, ...]`; one group's is returned as it is."""
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def joined_obs(parts: list[Any]) -> Any:
    """Concatenate observations `[B_i, ...]` of the groups to `[B, ...]`; dicts key by key."""
    if isinstance(parts[0], dict):
        return {key: joined([each[key] for each in parts]) for key in parts[0]}
    return joined(parts)
