"""Recurrent PPO over whole sequences, as a Stable-Baselines3 algorithm."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.type_aliases import GymEnv, Schedule
from stable_baselines3.common.utils import FloatSchedule, explained_variance
from torch import Tensor

from srwm_rl.agents.base import is_number
from srwm_rl.agents.collecting.collector import CollectingAlgorithm, EnvGroup, StepResult
from srwm_rl.agents.collecting.rollout_buffer import Minibatch, RolloutWriter, SequenceBatch, SequenceRolloutBuffer
from srwm_rl.agents.engine.nan_guard import OnNan
from srwm_rl.agents.engine.transfer import to_device
from srwm_rl.agents.engine.updates import make_updates
from srwm_rl.agents.losses.ppo_loss import PPOLossSums, Scalar, ppo_loss
from srwm_rl.errors import FaultError, UserError
from srwm_rl.nn.policy import SRWMPolicy


class PPO(CollectingAlgorithm):
    """PPO for policies with a memory, trained on whole unrolls with back-propagation through the core.

    Differences from `sb3_contrib.RecurrentPPO`: a rollout keeps only the core states with which its sequences begin;
    minibatches are whole environments' sequences (or equal chunks), never padded; the encoder runs over all their
    frames at once; images are not copied to channels-first.

    Args:
        policy: `SRWMPolicy` or its name, for any observations; or SB3's "MlpPolicy", "CnnPolicy" or
            "MultiInputPolicy", which refuse observations of another kind.
        env: a Gymnasium environment or id, or an SB3 `VecEnv`. Wrap it in `srwm_rl.envs.VecMemoryInputs` to show the
            core its previous action, previous reward and step within the episode. The groups of a
            `srwm_rl.envs.GroupedVecEnv` step while the policy acts for another group, which pays where a GPU acts.
        batch_size: steps per minibatch, at least `sequence_length`, of which those in whole sequences are used (with a
            warning where some are not); None: as many whole sequences as a quarter of the rollout holds, at least one.
        sequence_length: steps per training sequence, a divisor of `n_steps`; None: `n_steps`.
        bptt: cut the gradient through the core's state every so many steps; None: never.
        frames_at_once: image frames whose activations are held at once; the gradient of a larger minibatch is
            accumulated over parts of whole sequences, which changes memory use and nothing else. None: about 256 on a
            CPU, 4,096 to 16,384 on a GPU, by its memory.
        on_nan: "stop" raises at the first number that is not finite, before it reaches a weight; "skip" skips the
            step or the update and logs how many (`train/skipped`).

    The others are SB3 PPO's. Three defaults differ from SB3's: `n_steps` (2048 there), `batch_size` (64) and `n_epochs`
    (10).

    Raises:
        UserError: counts or coefficients out of range, a batch that holds no whole sequence.
        FaultError: from `learn`; see `on_nan`.
    """

    rollout_buffer: SequenceRolloutBuffer  # type: ignore[assignment]
    buffer_class = SequenceRolloutBuffer

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
        **unsupported: Any,
    ) -> None:
        super().__init__(locals())
        self.batch_size, self.n_epochs, self.target_kl = batch_size, n_epochs, target_kl
        self.clip_range, self.clip_range_vf = clip_range, clip_range_vf
        self.normalize_advantage = normalize_advantage
        self.sequence_length, self.bptt, self.frames_at_once = sequence_length, bptt, frames_at_once
        self.on_nan = on_nan
        if _init_setup_model:
            self._setup_model()

    def _setup_model(self) -> None:
        counts = ("n_steps", "n_epochs", "batch_size", "sequence_length", "bptt", "frames_at_once")
        self._check_settings(counts, {"gamma": self.gamma, "gae_lambda": self.gae_lambda})
        self.rollout_buffer_kwargs = {"sequence_length": self.sequence_length}  # `load` may change it
        length = self.sequence_length or self.n_steps
        if self.batch_size is not None and self.batch_size < length:
            raise UserError(
                f"batch_size {self.batch_size} holds no whole sequence of {length} steps; "
                f"use a multiple of {length}, or a smaller sequence_length"
            )
        if self.normalize_advantage and (self.batch_size or self.n_steps * self.n_envs) < 2:
            raise UserError(
                "one step's advantage cannot be normalised: collect more, or give normalize_advantage=False"
            )
        for name in ("clip_range", "clip_range_vf"):
            value = getattr(self, name)
            is_range = callable(value) or (is_number(value) and value > 0)
            if not is_range and (value is not None or name == "clip_range"):
                raise UserError(f"{name} must be a number above 0, or a schedule, not {value!r}")
        if self.target_kl is not None and not (is_number(self.target_kl) and self.target_kl > 0):
            raise UserError(f"target_kl must be above 0, or None for no limit, not {self.target_kl!r}")
        super()._setup_model()
        self.clip_range = FloatSchedule(self.clip_range)
        if self.clip_range_vf is not None:
            self.clip_range_vf = FloatSchedule(self.clip_range_vf)
        if self.batch_size is not None and (remainder := self.batch_size % length):
            warnings.warn(
                f"batch_size {self.batch_size} is no multiple of the sequences' {length} steps: minibatches have at "
                f"most {self.batch_size - remainder}",
                stacklevel=2,
            )

    def _writers(self, groups: list[EnvGroup], core_state: Tensor, n_steps: int) -> Iterator[RolloutWriter]:
        buffer = self.rollout_buffer
        buffer.reset(core_state)
        yield from (RolloutWriter(buffer.tensors, buffer.core_states, group.rows) for group in groups)

    def _finish_group(self, group: EnvGroup, t: int) -> None:
        self._act(group, t)  # for the values that the rollout is bootstrapped with

    def _after_step(self, t: int, groups: list[EnvGroup], results: list[StepResult], callback: BaseCallback) -> bool:
        continue_training = super()._after_step(t, groups, results, callback)
        if continue_training:
            self.rollout_buffer.pos = t + 1
        return continue_training

    def _store(self, groups: list[EnvGroup]) -> None:
        last_values = to_device(np.concatenate([group.acted.values.numpy() for group in groups]), self.device)
        assert self._last_episode_starts is not None
        self.rollout_buffer.compute_returns_and_advantage(last_values, self._last_episode_starts)

    def train(self) -> None:
        """Update the policy with the current rollout: `n_epochs` passes over minibatches of whole sequences."""
        self.policy.set_training_mode(True)
        self._update_learning_rate(self.policy.optimizer)
        left = self._current_progress_remaining
        clip_range: float = self.clip_range(left)  # type: ignore[operator]
        clip_range_vf: float | None = self.clip_range_vf and self.clip_range_vf(left)  # type: ignore[operator]
        # On a GPU the numbers of all updates are read at the end, unless target_kl needs them before each step.
        updates = make_updates(
            self.nan_guard, self.policy, self.engine.parameters, self.max_grad_norm, defer=self.target_kl is None
        )
        continue_training = True
        for _ in range(self.n_epochs):
            for parts, n_steps in self._minibatches():
                n_steps *= self.processes.size
                # By autograd, in C or as a CUDA graph: one interface, the same numbers.
                sums = PPOLossSums(*self.engine.backward(parts, float(n_steps), clip_range, clip_range_vf))
                grad_norm = self._all_reduce(sums)
                if not updates.check(sums, grad_norm, n_steps, self._n_updates):
                    continue  # not finite: skipped
                if self.target_kl is not None and updates.means[-1]["approx_kl"] > 1.5 * self.target_kl:
                    continue_training = False
                    break
                updates.step()
            self._n_updates += 1  # one that target_kl stopped, too, as in SB3
            if not continue_training:
                break
        try:
            means = updates.flush()
        except FaultError:
            self._n_updates = updates.number  # as if training had stopped there
            raise
        if means:
            explained = explained_variance(*self._gather_values_and_returns())
            scalars = {"explained_variance": explained, "clip_range": clip_range, "clip_range_vf": clip_range_vf}
            self._record(means, scalars)

    def loss(
        self, batch: SequenceBatch, n_steps: Scalar, clip_range: Scalar, clip_range_vf: Scalar | None
    ) -> tuple[Tensor, PPOLossSums]:
        """Return a micro-batch's part of the minibatch's loss, `[]`, and its terms summed over steps.

        Args:
            batch: sequences that go through the network at once.
            n_steps: of the whole minibatch.
            clip_range: see `ppo_loss`.
            clip_range_vf: see `ppo_loss`.
        """
        new = self.engine.evaluate_sequence(
            batch.observations, batch.actions, batch.core_state, batch.episode_starts, self.bptt
        )
        sums = ppo_loss(
            new.values, new.log_probs, new.entropy,
            batch.old_values, batch.old_log_probs, batch.advantages, batch.returns, clip_range, clip_range_vf,
        )  # fmt: skip
        loss = sums.policy_loss + self.vf_coef * sums.value_loss - self.ent_coef * sums.entropy
        return loss / n_steps, sums

    def native_gradient(  # type: ignore[override]
        self, batch: SequenceBatch, n_steps: float, clip_range: float, clip_range_vf: float | None
    ) -> Tensor | None:
        """Add the gradient of `loss` in C; None: not possible, and nothing was done. Arguments as for `loss`."""
        return self.engine.fused(self.policy).add_ppo_gradient(
            batch.observations,
            batch.actions,
            batch.core_state,
            batch.episode_starts,
            (batch.old_log_probs, batch.advantages, batch.returns, batch.old_values),
            clip_range=clip_range,
            clip_range_vf=clip_range_vf,
            vf_coef=self.vf_coef,
            ent_coef=self.ent_coef,
            scale=1 / n_steps,
            bptt=self.bptt,
        )

    @property
    def minibatches_per_update(self) -> int:
        """Number of gradients made of a rollout, in all epochs."""
        return self.n_epochs * self.rollout_buffer.n_minibatches(self._minibatch_size)

    @property
    def _minibatch_size(self) -> int:
        return self.batch_size or max(self.rollout_buffer.sequence_length, self.n_steps * self.n_envs // 4)

    def _minibatches(self) -> Iterator[Minibatch]:
        stats = self.processes.means_and_stds if self.normalize_advantage else None
        max_sequences = self.sequences_at_once(self.rollout_buffer.sequence_length)
        return self.rollout_buffer.get(self._minibatch_size, max_sequences, stats)

    def _gather_values_and_returns(self) -> list[np.ndarray]:
        """Return those of all processes to process 0, and their own to the others."""
        tensors = (self.rollout_buffer.tensors.values, self.rollout_buffer.tensors.returns)
        parts = self.processes.gather([tensor.flatten().cpu().numpy() for tensor in tensors])
        return [np.concatenate(arrays) for arrays in zip(*parts, strict=True)]
