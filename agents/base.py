"""What PPO and IMPALA share: SB3's border, acting with a memory, truncated episodes, the log."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv
from torch import Tensor

from srwm_rl.agents.distributed import SINGLE, ProcessGroup
from srwm_rl.agents.engine.cuda_graphs import GraphedActing
from srwm_rl.agents.engine.deferred_updates import means_of, supports_found_inf
from srwm_rl.agents.engine.grad_clip import clip_gradient, gradient_norm
from srwm_rl.agents.engine.graphed_gradient import GraphedGradient
from srwm_rl.agents.engine.nan_guard import ON_NAN, NanGuard, OnNan, first_sick_gradient
from srwm_rl.agents.engine.transfer import to_device, to_host
from srwm_rl.errors import UserError
from srwm_rl.native.fused_policy import FusedPolicy
from srwm_rl.nn.encoders import flatten_obs_space
from srwm_rl.nn.policy import ActStep, Obs, SequenceEvaluation, SRWMPolicy

SelfRecurrent = TypeVar("SelfRecurrent", bound="RecurrentAlgorithm")
Terms = TypeVar("Terms", bound=tuple[Tensor, ...])
# By whether there is a GPU. With the published CNN a frame's activations take about a megabyte; on a CPU fewer frames
# are not faster, on a GPU more of them are fewer launches.
FRAMES_AT_ONCE = {False: 256, True: 4096}
NOT_SAVED = (
    "_core_state",
    "_graph",
    "_fused_policies",
    "_gradient_graphs",
    "_nan_guard",
    "processes",
    "_ended",
    "_progress",
)
ACTION_SPACES = (spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary)


class RecurrentAlgorithm(OnPolicyAlgorithm):
    """An SB3 on-policy algorithm whose policy is an `SRWMPolicy`; a subclass collects and learns.

    Attributes:
        frames_at_once: the most image frames whose activations are held at once while learning; None: about
            `FRAMES_AT_ONCE`.
        on_nan: what to do with numbers that are not finite, "stop" or "skip"; see `srwm_rl.agents.engine.nan_guard.NanGuard`.
        processes: those that train this policy together, each with its own environments; see `join`.
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = dict.fromkeys(
        ("SRWMPolicy", "MlpPolicy", "CnnPolicy", "MultiInputPolicy"), SRWMPolicy
    )
    policy: SRWMPolicy
    frames_at_once: int | None
    on_nan: OnNan
    processes: ProcessGroup = SINGLE
    _core_state: Tensor | None = None  # [L, B, S], with which the next step begins
    _graph: GraphedActing | None = None
    _fused_policies: tuple[FusedPolicy, ...] = ()
    _gradient_graphs: GraphedGradient | None = None
    _ended: list[dict[str, Any]]  # episodes that ended here in this rollout, while there are other processes
    _progress: float | Tensor  # what is left of the run at the last update, 1 to 0: the same in all processes

    def join(self, processes: ProcessGroup) -> None:
        """Train together with other processes, from process 0's weights on; call it before `learn`.

        Every process builds its own model, with its own environments and another seed; `n_envs` and `batch_size` are
        each process's own, `num_timesteps` counts the steps of all. From here on all processes must do the same calls:
        each rollout and each update waits for all of them.
        """
        self.processes = processes
        self._ended = []
        processes.copy_from_first([*self.policy.parameters()])

    def extra_state(self) -> dict[str, Any]:
        """Return what a checkpoint must hold beyond weights, optimizer, counters, generators and environments."""
        return {}

    def restore_extra_state(self, state: dict[str, Any]) -> None:
        """Take up what `extra_state` returned."""

    def _setup_model(self) -> None:
        if self.on_nan not in ON_NAN:
            raise UserError(f"on_nan must be one of {', '.join(ON_NAN)}, not {self.on_nan!r}")
        super()._setup_model()
        self._nan_guard = NanGuard(self.on_nan)

    def _check_settings(self, counts: Iterable[str], fractions: Iterable[str]) -> None:
        for name in counts:
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1):
                raise UserError(f"{name} must be a whole number of at least 1, not {value!r}")
        for name in fractions:
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name} must lie in [0, 1], not {getattr(self, name)!r}")

    @staticmethod
    def _wrap_env(env: GymEnv, verbose: int = 0, monitor_wrapper: bool = True) -> VecEnv:
        # SB3's own version would also copy every image to channels-first; the encoder reads both layouts.
        flatten_obs_space(env.observation_space)  # raises for spaces the policy cannot read
        if isinstance(env, VecEnv):
            return env
        return DummyVecEnv([lambda: Monitor(env) if monitor_wrapper else env])

    def _state_of(self, env: VecEnv) -> Tensor:
        """Return the core state `[L, B, S]` with which the next step begins."""
        if self._core_state is None or self._core_state.shape[1] != env.num_envs:
            self._core_state = self.policy.initial_state(env.num_envs)
        return self._core_state

    def _obs_tensor(self, obs: Any) -> Obs:
        """Return observations `[B, ...]` on the device, in their own types; on a CPU in their own memory."""
        if isinstance(obs, dict):
            return {key: to_device(each, self.device) for key, each in obs.items()}
        return to_device(obs, self.device)

    def _acting_by(self, policy: SRWMPolicy) -> Callable[[Obs, Tensor, Tensor], ActStep]:
        """Return what acts for a policy: on a GPU a captured graph of it, on a CPU C where it can."""
        if self.device.type == "cpu":
            return self._fused(policy).act
        if self.device.type != "cuda":
            return policy.act
        if self._graph is None or self._graph.policy is not policy:
            self._graph = GraphedActing(policy)
        return self._graph

    def _fused(self, policy: SRWMPolicy) -> FusedPolicy:
        found = next((each for each in self._fused_policies if each.policy is policy), None)
        if found is None:
            found = FusedPolicy(policy)
            self._fused_policies = (*self._fused_policies[-1:], found)  # IMPALA's actors have one of their own
        return found

    def _evaluate_sequence(
        self, obs: Obs, actions: Tensor, core_state: Tensor, episode_starts: Tensor, bptt: int | None
    ) -> SequenceEvaluation:
        """Run the policy that learns over an unroll, as `SRWMPolicy.evaluate_sequence`; on a CPU in C where it can."""
        policy = self._fused(self.policy) if self.device.type == "cpu" else self.policy
        return policy.evaluate_sequence(obs, actions, core_state, episode_starts, bptt)

    def _env_actions(self, actions: np.ndarray) -> np.ndarray:
        if isinstance(self.action_space, spaces.Box):
            # A Gaussian is unbounded; the buffer keeps what was sampled, the environment gets what it can take.
            return np.clip(actions, self.action_space.low, self.action_space.high)
        return actions

    def _bootstrap_truncated(
        self,
        policy: SRWMPolicy,
        rewards: np.ndarray,
        dones: np.ndarray,
        infos: list[dict[str, Any]],
        acted: ActStep,
        numbers: Sequence[int],
    ) -> np.ndarray:
        """Add the discounted value of its last state to the reward of every episode that was cut short.

        The core state that saw it is the one after step t, not yet reset. An environment that cannot show its last
        observation (ProcGen) lends the value of the step before.

        Args:
            policy: that acted.
            rewards, dones, infos: of step t, each `[B]`.
            acted: what the policy had said.
            numbers: of the environments, `[B]`.
        """
        cut = [i for i in dones.nonzero()[0] if infos[i].get("TimeLimit.truncated", False)]
        if not cut:
            return rewards
        rewards = rewards.astype(np.float32, copy=True)
        shown = [i for i in cut if infos[i].get("terminal_observation") is not None]
        unseen = sorted(set(cut) - set(shown))
        if unseen:
            (values,) = to_host(acted.values)
            rewards[unseen] += self.gamma * values[unseen]
        if shown:
            obs = stack_obs([infos[i]["terminal_observation"] for i in shown])
            obs = self._nan_guard.arrays("last observation", obs, self.num_timesteps, [numbers[i] for i in shown])
            with torch.no_grad():
                no_starts = torch.zeros(len(shown), device=self.device)
                step = policy.act(self._obs_tensor(obs), acted.core_state[:, shown], no_starts, deterministic=True)
            rewards[shown] += self.gamma * step.values.cpu().numpy()
        return rewards

    def _update_info_buffer(self, infos: list[dict[str, Any]], dones: np.ndarray | None = None) -> None:
        for i, info in enumerate(infos):
            if not info:  # as most are
                continue
            over = dones is not None and bool(dones[i])
            episode, success = info.get("episode"), info.get("is_success") if over else None
            if episode is not None and "game" in info and (over or dones is None):
                episode["game"] = info["game"]
            if self.processes.size == 1:
                self._count_episode(episode, success)
            elif over or episode is not None:
                self._ended.append({"at": self.num_timesteps, "episode": episode, "success": success})

    def _count_episode(self, episode: dict[str, Any] | None, success: Any) -> None:
        if episode is not None:
            self.ep_info_buffer.append(episode)  # type: ignore[union-attr]
        if success is not None:
            self.ep_success_buffer.append(success)  # type: ignore[union-attr]

    def _share_episodes(self) -> None:
        """Let process 0 count the episodes of all processes, in the order in which they ended."""
        if self.processes.size == 1:
            return
        found, self._ended = self.processes.gather(self._ended), []
        for each in sorted((each for part in found for each in part), key=lambda each: int(each["at"])):
            self._count_episode(each["episode"], each["success"])

    def _sequences_at_once(self, sequence_length: int) -> int | None:
        """Return how many sequences go through the network at once; None: all, where there are no images."""
        if not self.policy.features_extractor.images:
            return None
        if self.frames_at_once is None:  # about so many: IMPALA's sequences are one step longer than what was played
            return max(1, round(FRAMES_AT_ONCE[self.device.type == "cuda"] / sequence_length))
        return max(1, self.frames_at_once // sequence_length)

    def _checked_gradient(
        self, gradient: Callable[[], tuple[Terms, Tensor]], kind: type[Terms], n_steps: int
    ) -> dict[str, float] | None:
        """Leave an update's gradient in the parameters, clipped, once it is known to be finite.

        To clip by a sick norm would spread it to all weights.

        Args:
            gradient: leaves the gradient there and returns the loss's terms, summed over steps, and the norm.
            kind: the terms' NamedTuple.
            n_steps: how many steps they are sums of.

        Returns:
            The terms' means, and `grad_norm` before clipping; None: the update is to be left out.
        """
        terms, norm = self._terms_and_norm(gradient, kind)
        numbers = dict(zip((*terms._fields, "grad_norm"), torch.stack((*terms, norm)).tolist(), strict=True))  # type: ignore[attr-defined]
        sick_gradient = partial(first_sick_gradient, self.policy.named_parameters())
        if not self._nan_guard.update(numbers, sick_gradient, self._n_updates):
            return None
        if numbers["grad_norm"] >= self.max_grad_norm:  # else it would multiply by one
            clip_gradient(self._weights_learned, self.max_grad_norm, norm)
        return means_of(numbers, n_steps)

    def _terms_and_norm(self, gradient: Callable[[], tuple[Terms, Tensor]], kind: type[Terms]) -> tuple[Terms, Tensor]:
        """Return what `gradient` gives; NaN where torch refuses logits that are not finite.

        The other processes wait for this one's part of the sum also then: they get NaN, and leave out the same update
        or stop.
        """
        try:
            return gradient()
        except ValueError as error:
            if "Expected parameter" not in str(error):  # of torch's distributions
                raise
        names: Any = kind
        sick = names(*(torch.full((), torch.nan, device=self.device) for _ in names._fields))
        return self._all_reduce(sick), torch.full((), torch.nan, device=self.device)

    def _reads_late(self) -> bool:
        """Say whether an update's numbers may stay on the device until many are read together; see `DeferredUpdates`."""
        return self.device.type == "cuda" and supports_found_inf(self.policy.optimizer)

    def _fresh_gradient(
        self, gradient: Callable[[Any], Tensor], settings: Hashable, quiet: AbstractContextManager[Any] | None = None
    ) -> Callable[[Any], Tensor]:
        """Let the gradient be zero, and return what adds a group's to it: on a GPU captured graphs.

        Args:
            gradient: see `GraphedGradient`.
            settings: what it depends on beside the weights and what it is given.
            quiet: held while a graph is captured.
        """
        weights = self._weights_learned
        graphs = self._gradient_graphs
        if graphs is not None and not graphs.fit(weights):  # another policy was put here, or weights were replaced
            graphs = None
        if graphs is None and self.device.type == "cuda":
            graphs = self._gradient_graphs = GraphedGradient(gradient, weights, quiet=quiet, network=self.policy)
        if graphs is None:
            for each in weights:  # as the optimizer's own zero_grad does, which takes 30 us
                each.grad = None
            return gradient
        graphs.zero()
        return partial(graphs, settings=settings)

    def _all_reduce(self, terms: Terms) -> Terms:
        """Sum terms and gradients over all processes, in place, and let process 0 say how far the run is."""
        self._progress = self._current_progress_remaining
        if self.processes.size > 1:
            progress = torch.full((), self._progress if self.processes.first else 0.0, device=self.device)
            parameters = self._weights_learned
            # All processes must send the same; what got no gradient here got none in the others.
            parts = [torch.zeros_like(each) if each.grad is None else each.grad for each in parameters]
            self.processes.sum_([progress, *terms, *parts])
            self._progress = progress
        return terms

    @property
    def _weights_learned(self) -> list[Tensor]:
        # The optimizer keeps the list; to walk through a network's modules takes longer than to clip its gradient.
        return [each for group in self.policy.optimizer.param_groups for each in group["params"]]

    def _gradient_norm(self) -> Tensor:
        # Processes must agree to the last bit, in whatever way each of them came by its part of the gradient.
        return gradient_norm(self._weights_learned, in_parts=self.processes.size > 1)

    def dump_logs(self, iteration: int = 0) -> None:
        """Write the log: SB3's tags, and where several games are played the mean return of each."""
        episodes = [each for each in self.ep_info_buffer or () if "game" in each]
        games = sorted({each["game"] for each in episodes})
        for game in games if len(games) > 1 else ():
            returns = [each["r"] for each in episodes if each["game"] == game]
            self.logger.record(f"rollout/{game}/ep_rew_mean", float(np.mean(returns)))
        super().dump_logs(iteration)

    def _record(self, values: dict[str, float | None]) -> None:
        """Log a training step's means under `train/`, with what SB3 logs beside them."""
        if hasattr(self.policy, "log_std"):
            values = {**values, "std": self.policy.log_std.exp().mean().item()}
        if self._nan_guard.skipped:
            values = {**values, "skipped": float(self._nan_guard.skipped)}
        for name, value in values.items():
            if value is not None:
                self.logger.record(f"train/{name}", value)
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")

    def learn(
        self: SelfRecurrent,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 1,
        tb_log_name: str | None = None,
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> SelfRecurrent:
        """Train for `total_timesteps` environment steps; arguments as in SB3."""
        name = tb_log_name or type(self).__name__
        return super().learn(total_timesteps, callback, log_interval, name, reset_num_timesteps, progress_bar)

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), *NOT_SAVED]


def stack_obs(observations: list[Any]) -> Any:
    """Join single observations into a batch `[B, ...]`; dicts key by key."""
    if isinstance(observations[0], dict):
        return {key: np.stack([each[key] for each in observations]) for key in observations[0]}
    return np.stack(observations)
