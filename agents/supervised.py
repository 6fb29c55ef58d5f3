"""Learning from right answers through a memory, as a Stable-Baselines3 algorithm."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.type_aliases import GymEnv, Schedule
from stable_baselines3.common.utils import update_learning_rate
from stable_baselines3.common.vec_env import VecEnv
from torch import Tensor, nn

from srwm_rl.agents.base import RecurrentAlgorithm, is_number, with_optimizer_kwargs
from srwm_rl.agents.check_obs import check_obs
from srwm_rl.agents.collecting.rollout_buffer import storage
from srwm_rl.agents.engine.nan_guard import OnNan
from srwm_rl.agents.engine.transfer import map_obs, to_device
from srwm_rl.agents.engine.updates import CheckedUpdates
from srwm_rl.agents.losses.supervised_loss import SupervisedLossSums, answer_loss, prototype_loss
from srwm_rl.errors import UserError
from srwm_rl.nn.cores.unroll import run_core
from srwm_rl.nn.encoders import PREVIOUS_ACTION, PREVIOUS_REWARD, Encoder
from srwm_rl.nn.policy import Obs, SRWMPolicy

LABEL = "label"
"""Key of an observation's label, a one-hot of the image's class, or zeros where it is not told."""


class AnsweredBatch(NamedTuple):
    """T steps of N environments, time-major, with the right answers."""

    observations: Obs  # [T, N, ...]
    answers: Tensor  # [T, N], int64; -1 where none is asked for
    episode_starts: Tensor  # [T, N]
    core_state: Tensor  # [L, N, S], before the first step


class AnswerBuffer:
    """Storage of one rollout, with SB3's constructor.

    Args:
        buffer_size: T, steps per environment.
        observation_space: the environment's.
        action_space: the environment's.
        device: where the rollout lives.
        n_envs: B.
    """

    def __init__(
        self,
        buffer_size: int,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        device: torch.device | str = "cpu",
        n_envs: int = 1,
        **_: Any,
    ) -> None:
        self.device = torch.device(device)
        self.observations: Obs = storage((buffer_size, n_envs), observation_space, self.device)
        self.answers = torch.zeros(buffer_size, n_envs, dtype=torch.int64, device=self.device)
        self.episode_starts = torch.zeros(buffer_size, n_envs, device=self.device)
        self.n_envs = n_envs

    def write(self, t: int, obs: Any, answers: np.ndarray, episode_starts: np.ndarray) -> None:
        """Store step t of all environments."""
        map_obs(lambda stored, array: stored[t].copy_(to_device(array, self.device)), self.observations, obs)
        self.answers[t] = to_device(answers, self.device)
        self.episode_starts[t] = to_device(episode_starts, self.device)

    def parts(self, core_state: Tensor, max_envs: int | None) -> Iterator[AnsweredBatch]:
        """Yield the rollout, at most `max_envs` environments at once; None: all."""
        for start in range(0, self.n_envs, max_envs or self.n_envs):
            rows = slice(start, start + (max_envs or self.n_envs))
            obs = map_obs(lambda stored, rows=rows: stored[:, rows], self.observations)
            yield AnsweredBatch(obs, self.answers[:, rows], self.episode_starts[:, rows], core_state[:, rows])


class Supervised(RecurrentAlgorithm):
    """Cross-entropy of right answers, with back-propagation through the core over whole rollouts.

    For environments that know the right action of some steps (`srwm_rl.envs.batch.BatchEnv.has_answers`). A rollout is
    made by the right answers, so that the policy need not act; one update follows it, whose gradient ends where the
    rollout begins. The state is carried from rollout to rollout.

    Args:
        policy: `SRWMPolicy` or its name.
        env: an SB3 `VecEnv` of `srwm_rl.envs` with right answers. Its observations must not contain the previous
            action or reward: in training these would be right answers.
        n_steps: T, steps per environment and update; best a whole number of episodes.
        aux_coef: weight of the prototype loss on the features of the image (Snell et al., 2017), for few-shot
            episodes: observations with one image and a `label`.
        warmup_updates: updates in which the learning rate rises linearly to its full value, after which it falls with
            the inverse square root of their number (Vaswani et al., 2017, https://arxiv.org/abs/1706.03762,
            section 5.3); 0: neither.
        beta2: Adam's decay rate of squared gradients.
        adam_eps: Adam's epsilon.
        bptt: as of `PPO`.
        frames_at_once: as of `PPO`.
        on_nan: as of `PPO`.

    The others are SB3's. Logged beside SB3's tags: `rollout/accuracy`, the fraction of answers that the policy gave the
    highest probability before the update.

    Raises:
        UserError: counts or coefficients out of range, or environments that cannot be learned from in this way.
        FaultError: from `learn`; see `on_nan`.
    """

    rollout_buffer: AnswerBuffer  # type: ignore[assignment]
    buffer_class = AnswerBuffer
    fixed_by_zip = ("beta2", "adam_eps")

    def __init__(
        self,
        policy: str | type[SRWMPolicy],
        env: GymEnv | str,
        learning_rate: float | Schedule = 3e-3,
        n_steps: int = 64,
        aux_coef: float = 0.0,
        warmup_updates: int = 0,
        beta2: float = 0.999,
        adam_eps: float = 1e-8,
        max_grad_norm: float = 1.0,
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
        if "optimizer_class" not in (policy_kwargs or {}):
            adam = {"betas": (0.9, beta2), "eps": adam_eps, "fused": True}
            policy_kwargs = with_optimizer_kwargs(policy_kwargs, adam)
        super().__init__(locals(), gamma=0.0, gae_lambda=0.0, ent_coef=0.0, vf_coef=0.0)
        self.aux_coef, self.warmup_updates = aux_coef, warmup_updates
        self.beta2, self.adam_eps = beta2, adam_eps
        self.bptt, self.frames_at_once, self.on_nan = bptt, frames_at_once, on_nan
        if _init_setup_model:
            self._setup_model()

    def _setup_model(self) -> None:
        self._check_settings(("n_steps", "bptt", "frames_at_once"), {"beta2": self.beta2})
        if not (is_number(self.aux_coef) and self.aux_coef >= 0):
            raise UserError(f"aux_coef must be at least 0, not {self.aux_coef!r}")
        if not isinstance(self.warmup_updates, int) or self.warmup_updates < 0:
            raise UserError(f"warmup_updates must be a whole number of at least 0, not {self.warmup_updates!r}")
        if self.env is not None and not getattr(self.env, "has_answers", False):
            raise UserError(
                "these environments have no right answers to learn from: use a task that has, such as recall, parity "
                "or fewshot, or train by reward, with ppo or impala"
            )
        if isinstance(self.observation_space, spaces.Dict):
            leaks = self.observation_space.spaces.keys() & {PREVIOUS_ACTION, PREVIOUS_REWARD}
            if leaks:
                raise UserError(
                    f"the observation contains {', '.join(sorted(leaks))}, which are right answers while learning: "
                    "leave these inputs out"
                )
        super()._setup_model()
        if self.aux_coef and (self._image is None or LABEL not in self.policy.obs_spaces):
            raise UserError("aux_coef is for few-shot episodes: observations with one image and a label")

    @property
    def _image(self) -> str | None:
        """The key of a Dict observation's image that our encoder reads, if it is the only one."""
        encoder = self.policy.features_extractor
        images = [*encoder.images] if isinstance(encoder, Encoder) else []
        return images[0] if len(images) == 1 else None

    def collect_rollouts(self, env: VecEnv, callback: BaseCallback, rollout_buffer: Any, n_rollout_steps: int) -> bool:
        """Take `n_rollout_steps` steps in every environment with the right answers as actions, and store both.

        Returns:
            False if a callback asked to stop.
        """
        assert self._last_obs is not None, "no observation to start from; call learn()"
        callback.on_rollout_start()
        obs, self._last_obs = self._last_obs, None  # if this rollout is not completed, `learn` resets the environments
        callback.update_locals({"self": self, "env": env, "n_rollout_steps": n_rollout_steps})
        for t in range(n_rollout_steps):
            answers = env.answers()  # type: ignore[attr-defined]
            rollout_buffer.write(t, obs, answers, self._last_episode_starts)
            obs, rewards, dones, infos = env.step(np.maximum(answers, 0))  # type: ignore[assignment]
            check_obs(obs, self.observation_space, self.num_timesteps, range(env.num_envs))
            obs = self.nan_guard.check_arrays("observation", obs, self.num_timesteps, range(env.num_envs))
            self._last_episode_starts = dones.copy()
            self.num_timesteps += env.num_envs * self.processes.size
            callback.update_locals({"rewards": rewards, "dones": dones, "infos": infos, "new_obs": obs})
            if not callback.on_step():
                return False
        self._last_obs = obs
        callback.on_rollout_end()
        return True

    def train(self) -> None:
        """Make one optimizer step with the gradient of the whole rollout."""
        self.policy.set_training_mode(True)
        self._update_learning_rate(self.policy.optimizer)
        rate = self.policy.optimizer.param_groups[0]["lr"] * warmup_factor(self._n_updates + 1, self.warmup_updates)
        update_learning_rate(self.policy.optimizer, rate)
        if self._core_state is None or self._core_state.shape[1] != self.n_envs:
            self._core_state = self.policy.initial_state(self.n_envs)
        core_state = self.nan_guard.check_state(self._core_state, self.num_timesteps, range(self.n_envs))
        n_answers = (self.rollout_buffer.answers >= 0).sum().float()
        self.processes.sum_([n_answers])
        n_answers.clamp_(min=1)
        self.policy.optimizer.zero_grad()
        results = []
        for batch in self.rollout_buffer.parts(core_state, self.sequences_at_once(self.n_steps)):
            loss, sums, state = self.loss(batch)
            (loss / n_answers).backward()
            results.append((torch.stack([*sums]).detach(), state.detach()))
        self.engine.notify()
        terms, states = zip(*results, strict=True)
        self._core_state = torch.cat(states, dim=1)
        sums = SupervisedLossSums(*torch.stack(terms).sum(0))
        grad_norm = self._all_reduce(sums)
        updates = CheckedUpdates(self.nan_guard, self.policy, self.engine.parameters, self.max_grad_norm)
        if updates.check(sums, grad_norm, int(n_answers), self._n_updates):
            updates.step()
        self._n_updates += 1
        self._log(updates.flush(), rate)

    def loss(self, batch: AnsweredBatch) -> tuple[Tensor, SupervisedLossSums, Tensor]:
        """Return the loss of an unroll, `[]`, its terms, summed over answers, and the core state after it."""
        policy, (n_steps, n_envs) = self.policy, batch.answers.shape
        obs, frame_index = self._distinct_frames(batch.observations)
        features = policy.encode(obs, n_steps * n_envs, frame_index).view(n_steps, n_envs, -1)
        y, core_state = run_core(policy.core, features, batch.core_state, batch.episode_starts, self.bptt)
        distribution, values = policy._heads(y.flatten(0, 1))
        categorical: Any = distribution.distribution
        logits = categorical.logits.view(n_steps, n_envs, -1)
        cross_entropy, right = answer_loss(logits, batch.answers)
        prototype = torch.zeros_like(cross_entropy)
        if self.aux_coef:
            prototype = self._prototype_loss(features, batch)
        # The value head has a gradient of zero, so that the optimizer keeps moments of every weight.
        loss = cross_entropy + self.aux_coef * prototype + 0.0 * values.sum()
        return loss, SupervisedLossSums(cross_entropy, right, prototype), core_state

    def _distinct_frames(self, obs: Obs) -> tuple[Obs, Tensor | None]:
        """Return observations `[T, N, ...]` with each frame that repeats the one before left out, `[M, ...]`, and the
        index `[T * N]` of each observation's frame: few-shot episodes show an image without, then with its label.
        """
        key = self._image
        if key is None or not isinstance(obs, dict):
            return obs, None
        frames = obs[key]
        is_new = torch.ones(frames.shape[:2], dtype=torch.bool, device=frames.device)
        is_new[1:] = (frames[1:] != frames[:-1]).flatten(2).any(-1)
        number = is_new.flatten().cumsum(0).view_as(is_new) - 1
        index = torch.where(is_new, number, -1).cummax(0).values  # a repeated frame has the number of the last new one
        return {**obs, key: frames[is_new]}, index.flatten()

    def sequences_at_once(self, sequence_length: int) -> int | None:
        """Return how many sequences go through the network at once; None: all, as batch normalisation needs."""
        if self.frames_at_once is None and any(isinstance(m, nn.BatchNorm2d) for m in self.policy.modules()):
            return None
        return super().sequences_at_once(sequence_length)

    def _prototype_loss(self, features: Tensor, batch: AnsweredBatch) -> Tensor:
        """Return the prototype loss `[]` on the CNN's part of the features `[T, N, I]`, which is their first."""
        assert self._image is not None
        network: Any = self.policy.features_extractor.images[self._image]
        label = batch.observations[LABEL]  # type: ignore[index]
        told = torch.where(label.any(-1), label.argmax(-1), -1)
        classes = torch.where(batch.answers >= 0, batch.answers, told)  # a query's label may be a dummy
        return prototype_loss(
            features[..., : network.n_features], classes, batch.answers, batch.episode_starts, label.shape[-1]
        )

    def _log(self, means: list[dict[str, float]], learning_rate: float) -> None:
        for update in means:
            self.logger.record_mean("rollout/accuracy", update["right"])
            self.logger.record_mean("train/loss", update["cross_entropy"] + self.aux_coef * update["prototype_loss"])
            self.logger.record_mean("train/cross_entropy", update["cross_entropy"])
            self.logger.record_mean("train/grad_norm", update["grad_norm"])
            if self.aux_coef:
                self.logger.record_mean("train/prototype_loss", update["prototype_loss"])
        self.logger.record("train/learning_rate", learning_rate)
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
        if self.nan_guard.skipped:
            self.logger.record("train/skipped", float(self.nan_guard.skipped))


def warmup_factor(update: int, warmup_updates: int) -> float:
    """Return the factor on the learning rate of update 1, 2, ...: up to 1 in `warmup_updates`, then down as 1/sqrt."""
    if not warmup_updates:
        return 1.0
    return min(update / warmup_updates, float((warmup_updates / update) ** 0.5))
