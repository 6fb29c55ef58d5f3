"""Recurrent PPO over whole sequences, as a Stable-Baselines3 algorithm."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.type_aliases import GymEnv, Schedule
from stable_baselines3.common.utils import FloatSchedule, explained_variance
from stable_baselines3.common.vec_env import VecEnv
from torch import Tensor

from srwm_rl.agents.base import ACTION_SPACES
from srwm_rl.agents.collecting.collector import CollectingAlgorithm, EnvGroup, groups_of
from srwm_rl.agents.collecting.rollout_buffer import SequenceBatch, SequenceRolloutBuffer
from srwm_rl.agents.engine.deferred_updates import DeferredUpdates
from srwm_rl.agents.engine.nan_guard import OnNan
from srwm_rl.errors import FaultError, UserError
from srwm_rl.nn.policy import SRWMPolicy
from srwm_rl.ops.program import PPOLossParams

Gradient = Callable[[], "tuple[PPOLossSums, Tensor]"]
GATHERED_AT_ONCE = 2**25  # bytes, where there are no images


class PPOLossSums(NamedTuple):
    """Sums over steps of what a PPO minibatch adds up; divide by the number of steps for SB3's means."""

    policy_loss: Tensor
    value_loss: Tensor
    entropy: Tensor
    approx_kl: Tensor
    clip_fraction: Tensor


def ppo_loss_sums(
    values: Tensor,
    log_probs: Tensor,
    entropy: Tensor,
    old: SequenceBatch,
    advantages: Tensor,
    clip_range: float | Tensor,
    clip_range_vf: float | Tensor | None,
) -> PPOLossSums:
    """Add up PPO's clipped surrogate (Schulman et al., 2017, eq. 7, https://arxiv.org/abs/1707.06347) and the rest.

    Every tensor is `[T, N]`, apart from the clip ranges; `advantages` are those of `old`, normalised or not.
    """
    log_ratio = log_probs - old.old_log_probs
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)  # type: ignore[arg-type]  # both are of one kind
    surrogate = torch.min(advantages * ratio, advantages * clipped)
    if clip_range_vf is not None:
        change = (values - old.old_values).clamp(-clip_range_vf, clip_range_vf)  # type: ignore[arg-type]
        values = old.old_values + change
    with torch.no_grad():
        approx_kl = ((ratio - 1) - log_ratio).sum()  # http://joschu.net/blog/kl-approx.html
        clip_fraction = ((ratio - 1).abs() > clip_range).float().sum()
    return PPOLossSums(-surrogate.sum(), (old.returns - values).square().sum(), entropy.sum(), approx_kl, clip_fraction)


class MicroBatch(NamedTuple):
    """A part of a minibatch that goes through the network at once, and what its loss depends on besides."""

    old: SequenceBatch
    mean: Tensor | None  # [] of the minibatch's advantages; None: they are not normalised
    std: Tensor | None  # []
    n_steps: float | Tensor  # of the minibatch
    clip_range: float | Tensor
    clip_range_vf: float | Tensor | None


class PPO(CollectingAlgorithm):
    """PPO for policies with a memory, trained on whole unrolls with back-propagation through the core.

    Differences from `sb3_contrib.RecurrentPPO`: a rollout keeps only the core states with which its sequences begin;
    minibatches are whole environments' sequences (or equal chunks), never padded; the encoder runs over all their
    frames at once; images are not copied to channels-first.

    Args:
        policy: `SRWMPolicy` or its name; "MlpPolicy", "CnnPolicy" and "MultiInputPolicy" mean the same.
        env: a Gymnasium environment or id, or an SB3 `VecEnv`. Wrap it in `srwm_rl.envs.VecMemoryInputs` to show the
            core its previous action, previous reward and step within the episode. Of the groups of a
            `srwm_rl.envs.GroupedVecEnv`, some step while one is acted for, which pays where a GPU acts.
        batch_size: steps per minibatch, at least `sequence_length`; None: a quarter of the rollout.
        sequence_length: steps per training sequence, a divisor of `n_steps`; None: `n_steps`.
        bptt: cut the gradient through the core's state every so many steps; None: never.
        frames_at_once: image frames whose activations are held at once; a minibatch of more is split into groups of
            whole sequences whose gradients are added up, which changes memory and nothing else. None: about 256 on a
            CPU, 4,096 on a GPU.
        on_nan: "stop" raises at the first number that is not finite, before it reaches a weight; "skip" leaves out the
            step or the update and logs it (`train/skipped`).

    The others are SB3 PPO's, with its defaults.

    Raises:
        UserError: counts or coefficients out of range, a batch that holds no whole sequence.
        FaultError: from `learn`; see `on_nan`.
    """

    rollout_buffer: SequenceRolloutBuffer  # type: ignore[assignment]

    def __init__(
        self,
        policy: str | type[SRWMPolicy],
        env: GymEnv | str,
        learning_rate: float | Schedule = 3e-4,
        n_steps: int = 256,
        batch_size: int | None = None,
        n_epochs: int = 4,
        gamma: float = 0.99,
        gae_lambda: float = 0.95,
        clip_range: float | Schedule = 0.2,
        clip_range_vf: float | Schedule | None = None,
        normalize_advantage: bool = True,
        ent_coef: float = 0.0,
        vf_coef: float = 0.5,
        max_grad_norm: float = 0.5,
        target_kl: float | None = None,
        sequence_length: int | None = None,
        bptt: int | None = None,
        frames_at_once: int | None = None,
        on_nan: OnNan = "stop",
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: torch.device | str = "auto",
        _init_setup_model: bool = True,
    ) -> None:
        super().__init__(
            policy,
            env,
            learning_rate=learning_rate,
            n_steps=n_steps,
            gamma=gamma,
            gae_lambda=gae_lambda,
            ent_coef=ent_coef,
            vf_coef=vf_coef,
            max_grad_norm=max_grad_norm,
            use_sde=False,
            sde_sample_freq=-1,
            rollout_buffer_class=SequenceRolloutBuffer,  # type: ignore[arg-type]
            rollout_buffer_kwargs={"sequence_length": sequence_length},
            stats_window_size=stats_window_size,
            tensorboard_log=tensorboard_log,
            policy_kwargs=policy_kwargs,
            verbose=verbose,
            seed=seed,
            device=device,
            _init_setup_model=False,
            supported_action_spaces=ACTION_SPACES,
        )
        self.batch_size, self.n_epochs, self.target_kl = batch_size, n_epochs, target_kl
        self.clip_range, self.clip_range_vf = clip_range, clip_range_vf
        self.normalize_advantage = normalize_advantage
        self.sequence_length, self.bptt, self.frames_at_once = sequence_length, bptt, frames_at_once
        self.on_nan = on_nan
        if _init_setup_model:
            self._setup_model()

    def _setup_model(self) -> None:
        counts = ("n_steps", "n_epochs", "batch_size", "sequence_length", "bptt", "frames_at_once")
        self._check_settings(counts, ("gamma", "gae_lambda"))
        length = self.sequence_length or self.n_steps
        if self.batch_size is not None and self.batch_size < length:
            raise UserError(
                f"batch_size {self.batch_size} holds no whole sequence of {length} steps; "
                f"use a multiple of {length}, or a smaller sequence_length"
            )
        super()._setup_model()
        self.clip_range = FloatSchedule(self.clip_range)
        if self.clip_range_vf is not None:
            self.clip_range_vf = FloatSchedule(self.clip_range_vf)

    def collect_rollouts(  # type: ignore[override]
        self,
        env: VecEnv,
        callback: BaseCallback,
        rollout_buffer: SequenceRolloutBuffer,
        n_rollout_steps: int,
    ) -> bool:
        """Play `n_rollout_steps` steps in every environment and fill the buffer.

        Returns:
            False if a callback asked to stop.
        """
        assert self._last_obs is not None, "no observation to start from; call learn()"
        assert self._last_episode_starts is not None
        self.policy.set_training_mode(False)
        core_state = self._nan_guard.memory(self._state_of(env), self.num_timesteps, range(env.num_envs))
        rollout_buffer.reset(core_state)
        callback.on_rollout_start()
        groups = groups_of(env)
        for group in groups:
            group.begin(self._last_obs, self._last_episode_starts, core_state, rollout_buffer.steps(group.rows))
        if not self._collect(env, groups, callback, rollout_buffer, n_rollout_steps):
            return False
        last_values = torch.cat([group.acted.values for group in groups])
        rollout_buffer.compute_returns_and_advantage(last_values, self._last_episode_starts)
        self._share_episodes()
        callback.on_rollout_end()
        return True

    def _finish_group(self, group: EnvGroup, t: int) -> None:
        self._act(group)  # for the values of what the last step led to

    def train(self) -> None:
        """Update the policy with the present rollout: `n_epochs` passes over minibatches of whole sequences."""
        self.policy.set_training_mode(True)
        self._update_learning_rate(self.policy.optimizer)
        clip_range = self.clip_range(self._current_progress_remaining)  # type: ignore[operator]
        clip_range_vf = self.clip_range_vf and self.clip_range_vf(self._current_progress_remaining)  # type: ignore[operator]
        late = self._reads_late() and self.target_kl is None  # which decides by a minibatch's numbers
        learned = self._learn_reading_late if late else self._learn
        stats = learned(clip_range, clip_range_vf)
        if stats:
            means = {name: float(np.mean([each[name] for each in stats])) for name in stats[0]}
            self._log_training(means, clip_range, clip_range_vf)

    def _learn(self, clip_range: float, clip_range_vf: float | None) -> list[dict[str, float]]:
        """Pass over the rollout; return the means of every minibatch that was learned from."""
        stats = []
        for _ in range(self.n_epochs):
            for gradient, n_steps in self._gradients(self._minibatches(), clip_range, clip_range_vf):
                means = self._checked_gradient(gradient, PPOLossSums, n_steps)
                if means is None:
                    continue
                stats.append(means)
                if self.target_kl is not None and means["approx_kl"] > 1.5 * self.target_kl:
                    return stats
                self.policy.optimizer.step()
            self._n_updates += 1
        return stats

    def _learn_reading_late(self, clip_range: float, clip_range_vf: float | None) -> list[dict[str, float]]:
        """Do as `_learn` does, and wait for the device once, at the end."""
        ledger = DeferredUpdates(self._nan_guard, self.policy, self.max_grad_norm)
        for _ in range(self.n_epochs):
            for gradient, n_steps in self._gradients(self._minibatches(), clip_range, clip_range_vf):
                terms, norm = self._terms_and_norm(gradient, PPOLossSums)
                ledger.step(terms, norm, n_steps, self._n_updates)
            self._n_updates += 1
        try:
            return ledger.read()
        except FaultError:
            self._n_updates = ledger.number  # as if the run had stopped there
            raise

    def _minibatches(self) -> list[np.ndarray]:
        length = self.rollout_buffer.sequence_length
        batch_size = self.batch_size or max(length, self.n_steps * self.n_envs // 4)
        return self.rollout_buffer.minibatches(int(batch_size // length))

    def _gradients(
        self, minibatches: Sequence[np.ndarray], clip_range: float, clip_range_vf: float | None
    ) -> Iterator[tuple[Gradient, int]]:
        """Yield for each minibatch of sequences what makes its gradient, once, and the steps of all processes."""
        moments = self._advantage_stats(minibatches)
        for indices, groups, (mean, std) in zip(minibatches, self._gather(minibatches), moments, strict=True):
            n_steps = len(indices) * self.rollout_buffer.sequence_length * self.processes.size
            yield partial(self._gradient, groups, mean, std, float(n_steps), clip_range, clip_range_vf), n_steps

    def _gather(self, minibatches: Sequence[np.ndarray]) -> Iterator[Iterable[SequenceBatch]]:
        """Gather minibatches, one after the other, in groups that go through the network at once."""
        buffer = self.rollout_buffer
        at_once = self._sequences_at_once(buffer.sequence_length)
        # To gather several minibatches takes a fraction of the calls. What is large comes one by one.
        few = GATHERED_AT_ONCE // (len(minibatches[0]) * buffer.sequence_bytes)
        if at_once is None and few > 1:
            for start in range(0, len(minibatches), few):
                yield from ([each] for each in buffer.sequences(minibatches[start : start + few]))
        else:
            for each in minibatches:
                n_groups = 1 if at_once is None else -(-len(each) // at_once)
                yield (buffer.sequences([group])[0] for group in np.array_split(each, n_groups))

    def _advantage_stats(self, minibatches: Sequence[np.ndarray]) -> list[tuple[Tensor, Tensor] | tuple[None, None]]:
        """Return by what each minibatch's advantages are normalised: their mean and deviation in all processes."""
        steps_each = self.rollout_buffer.sequence_length * self.processes.size
        wide = [each for each in minibatches if len(each) * steps_each > 1] if self.normalize_advantage else []
        found = self.processes.means_and_stds(self.rollout_buffer.advantages_of(wide)) if wide else []
        return [*found, *[(None, None)] * (len(minibatches) - len(found))]  # the smallest ones come last

    def _gradient(self, groups: Iterable[SequenceBatch], *rest: Any) -> tuple[PPOLossSums, Tensor]:
        """Leave the gradient of all processes' minibatches in the parameters; return its summed terms and its norm.

        Args:
            groups: of this process's minibatch, one after the other.
            rest: what else a `MicroBatch` holds.
        """
        add = self._fresh_gradient(self._add_gradient, (self.vf_coef, self.ent_coef, self.bptt))
        total = torch.zeros(len(PPOLossSums._fields), device=self.device)
        for group in groups:
            total += add(MicroBatch(group, *rest))
        return self._all_reduce(PPOLossSums(*total)), self._gradient_norm()

    def _add_gradient(self, group: MicroBatch) -> Tensor:
        """Add a group's part of the minibatch's gradient to the parameters'; return its terms, `[n]`."""
        done = self._add_gradient_in_c(group)
        if done is not None:
            return done
        old, advantages = group.old, group.old.advantages
        new = self._evaluate_sequence(old.observations, old.actions, old.core_state, old.episode_starts, self.bptt)
        if group.mean is not None and group.std is not None:
            advantages = (advantages - group.mean) / (group.std + 1e-8)
        terms = ppo_loss_sums(
            new.values, new.log_probs, new.entropy, old, advantages, group.clip_range, group.clip_range_vf
        )
        loss = terms.policy_loss + self.vf_coef * terms.value_loss - self.ent_coef * terms.entropy
        (loss / group.n_steps).backward()
        return torch.stack(terms).detach()

    def _add_gradient_in_c(self, group: MicroBatch) -> Tensor | None:
        """Do as `_add_gradient`; None, and nothing is done, where that must do it."""
        if self.device.type != "cpu":
            return None
        old, clip_range_vf = group.old, group.clip_range_vf
        surrogate = PPOLossParams(
            mean=0.0 if group.mean is None else group.mean.item(),
            scale_advantage=1.0 if group.std is None else 1 / (group.std.item() + 1e-8),
            low=1 - group.clip_range,
            high=1 + group.clip_range,
            clip_range=group.clip_range,
            clip_range_vf=-1.0 if clip_range_vf is None else clip_range_vf,
            vf_coef=self.vf_coef,
            ent_coef=self.ent_coef,
            scale=1 / group.n_steps,
        )
        return self._fused(self.policy).add_surrogate_gradient(
            old.observations,
            old.actions,
            old.core_state,
            old.episode_starts,
            (old.old_log_probs, old.advantages, old.returns, old.old_values),
            surrogate,
            self.bptt,
        )

    def _log_training(self, means: dict[str, float], clip_range: float, clip_range_vf: float | None) -> None:
        loss = means["policy_loss"] + self.vf_coef * means["value_loss"] - self.ent_coef * means["entropy"]
        buffer = self.rollout_buffer
        parts = self.processes.gather([each.flatten().cpu().numpy() for each in (buffer.values, buffer.returns)])
        values, returns = (np.concatenate(each) for each in zip(*parts, strict=True))
        record: dict[str, float | None] = {
            "entropy_loss": -means["entropy"],
            "policy_gradient_loss": means["policy_loss"],
            "value_loss": means["value_loss"],
            "approx_kl": means["approx_kl"],
            "clip_fraction": means["clip_fraction"],
            "loss": loss,
            "grad_norm": means["grad_norm"],
            "explained_variance": explained_variance(values, returns),
            "clip_range": clip_range,
        }
        if clip_range_vf is not None:
            record["clip_range_vf"] = clip_range_vf
        self._record(record)
