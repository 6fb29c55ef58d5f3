"""Collecting steps for any trainer: groups of environments, some of which step while the policy acts for another."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper
from torch import Tensor

from srwm_rl.agents.base import RecurrentAlgorithm
from srwm_rl.agents.check_obs import check_obs
from srwm_rl.agents.collecting.rollout_buffer import RolloutWriter
from srwm_rl.agents.engine.engine import Actor
from srwm_rl.agents.engine.transfer import map_obs
from srwm_rl.nn.policy import ActStep
from srwm_rl.nn.spaces import env_actions

EnvStep = tuple[Any, np.ndarray, np.ndarray, list[dict[str, Any]]]  # what `VecEnv.step` returns
StartStep = Callable[[VecEnv, np.ndarray], Callable[[], EnvStep]]  # starts a step, returns a function that awaits it


class StepResult(NamedTuple):
    """Result of a step of a group."""

    rewards: np.ndarray  # [B]
    dones: np.ndarray  # [B]
    infos: list[dict[str, Any]]
    acted: ActStep  # the policy's step that chose the actions; only its core state is on the device
    clipped_actions: np.ndarray  # these as the environments got them, [B, ...]


class EnvGroup:
    """Environments that step together, and their present observations and core states."""

    obs: Any  # arrays [B, ...]
    starts: np.ndarray  # [B], episode starts
    core_state: Tensor  # [L, B, S], with which the next step begins
    acted: ActStep  # the policy's last step
    clipped_actions: np.ndarray  # its actions as the environments get them, [B, ...]
    actor: Actor
    writer: RolloutWriter

    def __init__(self, env: VecEnv, first: int) -> None:
        self.env = env
        self.env_indices = range(first, first + env.num_envs)  # among all environments
        self.rows = slice(first, first + env.num_envs)
        self.wait: Callable[[], EnvStep] | None = None  # awaits the step that is under way
        self.failed = False  # whether a step raised, so that the environments' state is unknown

    def begin(self, obs: Any, starts: np.ndarray, core_state: Tensor, writer: RolloutWriter) -> None:
        """Begin a rollout with this group's rows of `obs` `[B, ...]`, `starts` `[B]` and `core_state` `[L, B, S]`."""
        self.obs = map_obs(lambda part: part[self.rows], obs)
        self.starts, self.core_state = starts[self.rows], core_state[:, self.rows].contiguous()
        self.writer = writer


def groups_of(env: VecEnv) -> list[EnvGroup]:
    """Return the groups of a `srwm_rl.envs.GroupedVecEnv`, or any other environments as one."""
    # A wrapper around groups forwards their attributes; stepping the groups directly would bypass the wrapper.
    envs = [env] if isinstance(env, VecEnvWrapper) else getattr(env, "groups", [env])
    stops = np.cumsum([group.num_envs for group in envs]).tolist()
    return [EnvGroup(group, stop - group.num_envs) for group, stop in zip(envs, stops, strict=True)]


@contextmanager
def step_starter(n_groups: int) -> Iterator[StartStep]:
    """Yield what starts a step: in a thread per group, so that steps overlap; a single group steps when awaited."""
    if n_groups == 1:  # waking a thread for every step would only cost time
        yield lambda env, actions: partial(env.step, actions)
        return
    with ThreadPoolExecutor(n_groups, "srwm-step") as pool:
        yield lambda env, actions: pool.submit(env.step, actions).result


class CollectingAlgorithm(RecurrentAlgorithm):
    """A recurrent algorithm that collects T steps in groups of environments; a subclass learns from them."""

    def collect_rollouts(self, env: VecEnv, callback: BaseCallback, rollout_buffer: Any, n_rollout_steps: int) -> bool:
        """Collect `n_rollout_steps` steps in every environment and store them for the learner.

        Returns:
            False if a callback asked to stop.
        """
        assert self._last_obs is not None, "no observation to start from; call learn()"
        assert self._last_episode_starts is not None
        self.acting_policy.set_training_mode(False)
        if self._core_state is None or self._core_state.shape[1] != env.num_envs:
            self._core_state = self.policy.initial_state(env.num_envs)
        core_state = self.nan_guard.check_state(self._core_state, self.num_timesteps, range(env.num_envs))
        with self.weights_lock:
            callback.on_rollout_start()
        groups = groups_of(env)
        for group, writer in zip(groups, self._writers(groups, core_state, n_rollout_steps), strict=True):
            group.begin(self._last_obs, self._last_episode_starts, core_state, writer)
            first_step = group.obs, group.core_state, group.starts
            group.actor = self.engine.actor(
                self.acting_policy, group.rows.start, writer.observations, n_rollout_steps + 1, *first_step
            )
        if not self._collect(env, groups, callback, rollout_buffer, n_rollout_steps):
            return False
        self._gather_episodes()
        for group in groups:
            group.writer.finish(group.actor.observations)
        self._store(groups)
        with self.weights_lock:
            callback.on_rollout_end()
        return True

    def _writers(self, groups: list[EnvGroup], core_state: Tensor, n_steps: int) -> Iterator[RolloutWriter]:
        """Yield the writer of each group's rollout, which begins with `core_state` `[L, B, S]`."""
        raise NotImplementedError

    def _finish_group(self, group: EnvGroup, t: int) -> None:
        """Complete the rollout of a group that has made all `t` steps."""
        raise NotImplementedError

    def _store(self, groups: list[EnvGroup]) -> None:
        """Give complete rollouts to the learner."""
        raise NotImplementedError

    def _collect(
        self, env: VecEnv, groups: list[EnvGroup], callback: BaseCallback, rollout_buffer: Any, n_rollout_steps: int
    ) -> bool:
        """Collect T steps in every environment; act for one group while the others step.

        Callbacks are called after a step of all groups. Beside this method's arguments their `locals` hold, under SB3's
        names, `actions`, `clipped_actions`, `values`, `log_probs`, `rewards`, `dones` and `infos` of all environments,
        all of them on the host, and `obs_tensor` and `new_obs` where there is one group. However this ends, the next
        rollout goes on from the environments' present state; if a step raised, `learn` resets them all.
        """
        constant = {"self": self, "env": env, "callback": callback, "rollout_buffer": rollout_buffer}
        callback.update_locals({**constant, "n_rollout_steps": n_rollout_steps})
        if len(groups) > 1:
            env.settle = partial(settle, groups)  # type: ignore[attr-defined]
        try:
            with step_starter(len(groups)) as start_step:
                for t in range(n_rollout_steps + 1):
                    results = []
                    for group in groups:
                        if group.wait is not None:
                            results.append(self._finish_step(group))
                        # All groups have made step t - 1 and the last one awaits its actions: a single group stops
                        # exactly where SB3's loop does.
                        if len(results) == len(groups) and not self._after_step(t - 1, groups, results, callback):
                            return False
                        if t < n_rollout_steps:
                            self._start_step(group, t, start_step)
                        else:
                            self._finish_group(group, t)
        finally:
            known = self._finish_started_steps(groups)
            vars(env).pop("settle", None)
            self._last_obs = map_obs(join_arrays, *[group.obs for group in groups]) if known else None
            self._last_episode_starts = join_arrays(*[group.starts for group in groups])
            states = [group.core_state for group in groups]
            self._core_state = states[0] if len(states) == 1 else torch.cat(states, dim=1)
        return True

    def _act(self, group: EnvGroup, t: int) -> None:
        """Act for a group in step t of the rollout."""
        act = partial(group.actor, t)
        args = self.acting_policy, group.obs, group.core_state, group.starts, self.num_timesteps, act
        group.acted, group.core_state = self.nan_guard.act(*args, group.env_indices)

    def _start_step(self, group: EnvGroup, t: int, start_step: StartStep) -> None:
        self._act(group, t)
        group.writer.observe(t, group.obs, group.starts)
        group.writer.act(t, group.acted, group.core_state)
        # The buffer keeps the sample.
        group.clipped_actions = env_actions(group.acted.actions.numpy(), self.action_space)
        group.wait = start_step(group.env, group.clipped_actions)

    def _finish_step(self, group: EnvGroup) -> StepResult:
        assert group.wait is not None
        wait, group.wait = group.wait, None
        group.failed = True  # unless all of this succeeds
        obs, rewards, dones, infos = wait()
        check_obs(obs, self.observation_space, self.num_timesteps, group.env_indices)
        # Copies: an environment may write the next step over its arrays before the last group has made this one.
        rewards, dones = rewards.copy(), dones.copy()
        group.obs = self.nan_guard.check_arrays("observation", obs, self.num_timesteps, group.env_indices)
        group.starts, group.core_state = dones, group.acted.core_state
        rewards = self.nan_guard.check_arrays("reward", rewards, self.num_timesteps, group.env_indices)
        group.failed = False
        return StepResult(rewards, dones, infos, group.acted, group.clipped_actions)

    def _after_step(self, t: int, groups: list[EnvGroup], results: list[StepResult], callback: BaseCallback) -> bool:
        """Count step t of all groups, call the callbacks, and store its rewards."""
        rewards = join_arrays(*[result.rewards for result in results])
        dones = join_arrays(*[result.dones for result in results])
        infos = results[0].infos if len(results) == 1 else [info for result in results for info in result.infos]
        self.num_timesteps += len(dones) * self.processes.size
        step_locals = {"rewards": rewards, "dones": dones, "infos": infos, **_policy_locals(groups, results)}
        with self.weights_lock:
            callback.update_locals(step_locals)
            continue_training = callback.on_step()
        self._update_info_buffer(infos, dones)
        if not continue_training:
            return False
        for group, result in zip(groups, results, strict=True):
            final = self._bootstrap_truncated(
                rewards[group.rows], result.dones, result.infos, result.acted, group.env_indices
            )
            group.writer.reward(t, final)
        return True

    def _finish_started_steps(self, groups: list[EnvGroup]) -> bool:
        """Await the steps under way, so that the next rollout goes on from there; return False if one failed."""
        for group in groups:
            if group.wait is not None:
                with suppress(Exception):  # what ended the rollout is raised, or the next rollout meets it again
                    result = self._finish_step(group)
                    self.num_timesteps += group.env.num_envs * self.processes.size
                    self._update_info_buffer(result.infos, result.dones)
        return not any(group.failed for group in groups)


def settle(groups: list[EnvGroup]) -> None:
    """Wait until no group is within a step, so that its environments can be called otherwise."""
    for group in groups:
        if group.wait is not None:
            with suppress(Exception):  # raised again where the step is finished
                group.wait()


def _policy_locals(groups: list[EnvGroup], results: list[StepResult]) -> dict[str, Any]:
    """Return what callbacks may read of the policy's step, under SB3's names."""
    if len(groups) == 1:
        (group,), acted = groups, results[0].acted
        return {
            "actions": acted.actions.numpy(),
            "clipped_actions": group.clipped_actions,
            "values": acted.values.unsqueeze(1),
            "log_probs": acted.log_probs,
            "obs_tensor": group.actor.obs_tensor,
            "new_obs": group.obs,
        }
    # Without observations: joining those of several groups would take as long as some environments' steps.
    actions, values, log_probs = (torch.cat([result.acted[i] for result in results]) for i in range(3))
    return {
        "actions": actions.numpy(),
        "clipped_actions": np.concatenate([result.clipped_actions for result in results]),
        "values": values.unsqueeze(1),
        "log_probs": log_probs,
    }


def join_arrays(*parts: np.ndarray) -> np.ndarray:
    """Concatenate the groups' arrays `[B_i, ...]` to `[B, ...]`; a single one is returned as it is."""
    return parts[0] if len(parts) == 1 else np.concatenate(parts)
