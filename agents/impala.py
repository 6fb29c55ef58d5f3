"""IMPALA: actors that run ahead of the learner, corrected by V-trace, as a Stable-Baselines3 algorithm."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from concurrent.futures import CancelledError
from contextlib import contextmanager, nullcontext, suppress
from copy import deepcopy
from threading import Thread
from typing import Any

import torch
from stable_baselines3.common.callbacks import BaseCallback, ConvertCallback
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, Schedule
from stable_baselines3.common.utils import update_learning_rate
from torch import Tensor

from srwm_rl.agents.base import is_number, with_optimizer_kwargs
from srwm_rl.agents.collecting.collector import CollectingAlgorithm, EnvGroup
from srwm_rl.agents.collecting.rollout_buffer import RolloutWriter
from srwm_rl.agents.collecting.unroll_queue import UnrollQueue, Unrolls
from srwm_rl.agents.engine.nan_guard import OnNan
from srwm_rl.agents.engine.streams import StreamContext, StreamLock, short_switch_interval
from srwm_rl.agents.engine.updates import CheckedUpdates
from srwm_rl.agents.losses.impala_loss import IMPALALossSums, impala_loss
from srwm_rl.errors import UserError
from srwm_rl.nn.policy import SRWMPolicy


class IMPALA(CollectingAlgorithm):
    """IMPALA for policies with a memory (Espeholt et al., 2018, https://arxiv.org/abs/1802.01561).

    The actors collect unrolls of `n_steps` and queue them for the learner, which takes the oldest `batch_size` steps,
    back-propagates through whole unrolls and publishes its weights; V-trace corrects for the updates in between.
    The actors go on while it learns; acting for one group of environments overlaps stepping the others (give a
    `srwm_rl.envs.GroupedVecEnv` for more than one group). The loss is a *sum* over the batch's steps, as
    published: `max_grad_norm` and `rms_prop_eps` are in its units.

    Args:
        policy: `SRWMPolicy` or its name.
        env: a Gymnasium environment or id, or an SB3 `VecEnv`.
        n_steps: T, steps per unroll.
        batch_size: steps the learner takes at once, a multiple of `n_steps`; None: one unroll of every environment.
        vtrace_lambda: see `srwm_rl.agents.losses.vtrace.vtrace`.
        rho_clip: see `srwm_rl.agents.losses.vtrace.vtrace`.
        pg_rho_clip: see `srwm_rl.agents.losses.vtrace.vtrace`.
        c_clip: see `srwm_rl.agents.losses.vtrace.vtrace`.
        vf_coef: weight of half the squared value error.
        rms_prop_alpha: of `torch.optim.RMSprop`, the optimizer unless `policy_kwargs` names another.
        rms_prop_eps: of `torch.optim.RMSprop`.
        synchronous: collect, then learn, in one thread: the same seed gives the same run.
        waiting_batches: the actors begin no unroll while so many batches wait for the learner.
        bptt: as of `PPO`.
        frames_at_once: as of `PPO`.
        on_nan: as of `PPO`.

    The others are SB3's. Logged beside SB3's tags: `impala/policy_lag` (updates between the start of an unroll and its
    use, mean and max), `impala/rho_mean`, `impala/rho_clip_fraction`, `impala/waiting` (unrolls in the queue).

    Raises:
        UserError: counts or coefficients out of range, a batch that is no whole number of unrolls.
        FaultError: from `learn`; see `on_nan`.
    """

    rollout_buffer: UnrollQueue  # type: ignore[assignment]
    buffer_class = UnrollQueue
    fixed_by_zip = ("rms_prop_alpha", "rms_prop_eps")
    _thread: Thread | None = None  # the learner's

    def __init__(
        self,
        policy: str | type[SRWMPolicy],
        env: GymEnv | str,
        learning_rate: float | Schedule = 6e-4,
        n_steps: int = 50,
        batch_size: int | None = None,
        gamma: float = 0.99,
        vtrace_lambda: float = 1.0,
        rho_clip: float | None = 1.0,
        pg_rho_clip: float | None = 1.0,
        c_clip: float | None = 1.0,
        ent_coef: float = 0.01,
        vf_coef: float = 0.5,
        max_grad_norm: float = 40.0,
        rms_prop_alpha: float = 0.99,
        rms_prop_eps: float = 0.01,
        synchronous: bool = False,
        waiting_batches: int = 1,
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
            rms_prop = {"alpha": rms_prop_alpha, "eps": rms_prop_eps}
            policy_kwargs = with_optimizer_kwargs(policy_kwargs, rms_prop) | {"optimizer_class": torch.optim.RMSprop}
        super().__init__(locals(), gae_lambda=vtrace_lambda)
        self.batch_size, self.synchronous, self.waiting_batches = batch_size, synchronous, waiting_batches
        self.rho_clip, self.pg_rho_clip, self.c_clip = rho_clip, pg_rho_clip, c_clip
        self.bptt, self.frames_at_once, self.on_nan = bptt, frames_at_once, on_nan
        if _init_setup_model:
            self._setup_model()

    def _setup_model(self) -> None:
        self.gae_lambda = vars(self).pop("vtrace_lambda", self.gae_lambda)  # of `load`
        counts = ("n_steps", "batch_size", "waiting_batches", "bptt", "frames_at_once")
        self._check_settings(counts, {"gamma": self.gamma, "vtrace_lambda": self.gae_lambda})
        for name, value in self._clips.items():
            if value is not None and not (is_number(value) and value > 0):
                raise UserError(f"{name} must be above 0, or None for no clipping, not {value!r}")
        if self.batch_size is not None and self.batch_size % self.n_steps:
            raise UserError(
                f"batch_size {self.batch_size} counts steps and must be a multiple of the {self.n_steps} steps of an "
                f"unroll; {self.batch_size} unrolls are {self.batch_size * self.n_steps}"
            )
        super()._setup_model()
        self.weights_lock = StreamLock(self.device)
        self._learner_stream = StreamContext(self.device)
        self._actor_version = 0  # number of updates whose weights the actors have
        self._updates: list[dict[str, float]] = []  # means of the updates that are not logged yet

    @property
    def unrolls_per_batch(self) -> int:
        """Number of unrolls the learner takes at once."""
        return self.n_envs if self.batch_size is None else self.batch_size // self.n_steps

    @property
    def minibatches_per_update(self) -> int:
        """Number of gradients made of the unrolls that wait, where collecting waits for them; else 0."""
        return len(self.rollout_buffer) // self.unrolls_per_batch if self.synchronous else 0

    def extra_state(self) -> dict[str, Any]:
        """Return the unrolls that wait for the learner."""
        return {"unrolls": self.rollout_buffer.to_tree()}

    def restore_extra_state(self, state: dict[str, Any]) -> None:
        """Take up the unrolls that waited."""
        self.rollout_buffer.from_tree(state["unrolls"], self.device)

    def _writers(self, groups: list[EnvGroup], core_state: Tensor, n_steps: int) -> Iterator[RolloutWriter]:
        for group in groups:
            if not self.synchronous:  # where what an earlier call of `learn` left is learned after this rollout
                self.rollout_buffer.wait_for_room(self.waiting_batches * self.unrolls_per_batch)
            version, spaces = self._update_actor(), (self.observation_space, self.action_space)
            unrolls = Unrolls.empty(n_steps, group.env.num_envs, *spaces, core_state[:, group.rows], version)
            yield RolloutWriter(unrolls, unrolls.core_state)

    def _finish_group(self, group: EnvGroup, t: int) -> None:
        # For the value that the unroll is bootstrapped with.
        group.writer.observe(t, group.obs, group.starts)
        group.actor.store(t, group.obs)

    def _store(self, groups: list[EnvGroup]) -> None:
        for group in groups:
            self.rollout_buffer.put(group.writer.stored)

    def _update_actor(self) -> int:
        """Give the actors the newest weights; return the number of updates behind these."""
        with self.weights_lock:
            if self._actor is not None and self._actor_version != self._n_updates:
                copy_weights(self._actor, self.policy)
                self._actor_version = self._n_updates
            return self._n_updates

    def wait_for_learner(self) -> None:
        """Wait until the learner has used all batches that it can have before this thread collects more.

        That waits for no other process's collecting: all of them have collected as much.
        """
        if self._actor is not None:
            self.rollout_buffer.wait_until_idle(self.unrolls_per_batch)

    def train(self) -> None:
        """Learn from the batches that wait (synchronous mode), and log the updates since the last call."""
        if self.synchronous:
            while (batch := self.rollout_buffer.take(self.unrolls_per_batch)) is not None:
                self._update(batch)
        updates, self._updates = self._updates, []
        if updates:
            rate = self.lr_schedule(self._current_progress_remaining)
            max_lag = max(update["impala/policy_lag_max"] for update in updates)
            self._record(updates, {"learning_rate": rate, "impala/policy_lag_max": max_lag})

    def _update(self, batch: Unrolls) -> None:
        """Make one optimizer step with the gradient of a batch of whole unrolls."""
        version = self._n_updates
        self.policy.set_training_mode(True)
        n_steps = batch.rewards.numel() * self.processes.size
        sums = IMPALALossSums(*self.engine.backward(self._parts(batch)))
        grad_norm = self._all_reduce(sums)
        # The check waits for the gradient: an update's only wait for the device. Nothing reads the batch afterwards, so
        # that its memory may be freed. The lock is taken later: actors wait for the optimizer step alone.
        updates = CheckedUpdates(self.nan_guard, self.policy, self.engine.parameters, self.max_grad_norm)
        if not updates.check(sums, grad_norm, n_steps, version):
            return  # not finite: skipped
        with self.weights_lock:
            update_learning_rate(self.policy.optimizer, self.lr_schedule(float(self._progress)))
            updates.step()
            self._n_updates += 1
        (means,) = updates.flush()
        lag = (version - batch.versions).float()
        means |= {
            "impala/policy_lag": lag.mean().item(),
            "impala/policy_lag_max": lag.max().item(),
            "impala/rho_mean": means.pop("rho"),
            "impala/rho_clip_fraction": means.pop("rho_clipped"),
            "impala/waiting": float(len(self.rollout_buffer)),
        }
        self._updates.append(means)

    def _parts(self, batch: Unrolls) -> Iterator[Unrolls]:
        """Yield the parts of a batch that go through the network one after the other.

        Raises:
            CancelledError: the run was stopped, and does not wait for the rest of the batch.
        """
        at_once = self.sequences_at_once(len(batch.episode_starts)) or batch.n
        for start in range(0, batch.n, at_once):
            if self.rollout_buffer.closed:
                raise CancelledError
            yield batch.part(start, min(start + at_once, batch.n))

    def loss(self, batch: Unrolls) -> tuple[Tensor, IMPALALossSums]:
        """Return the loss of unrolls, `[]`, and its terms summed over steps."""
        # Step T only bootstraps the value: its action enters nothing.
        actions = torch.cat((batch.actions, batch.actions[-1:]))
        new = self.engine.evaluate_sequence(
            batch.observations, actions, batch.core_state, batch.episode_starts, self.bptt
        )
        sums = impala_loss(
            new.values, new.log_probs, new.entropy, batch.log_probs, batch.rewards, batch.episode_starts,
            self.gamma, self.gae_lambda, **self._clips,
        )  # fmt: skip
        return sums.policy_loss + self.vf_coef * sums.value_loss - self.ent_coef * sums.entropy, sums

    @property
    def _clips(self) -> dict[str, float | None]:
        return {"rho_clip": self.rho_clip, "pg_rho_clip": self.pg_rho_clip, "c_clip": self.c_clip}

    @property
    def loss_settings(self) -> Hashable:
        """What `loss` depends on beside the weights and its arguments."""
        return super().loss_settings, self.gamma, self.gae_lambda, *self._clips.values()

    @contextmanager
    def _learner(self) -> Iterator[None]:
        """Run the learner in a thread beside the actors, unless synchronous."""
        # Every batch takes part in an update of all processes. A run may stop between their updates: drop the surplus,
        # which would wait for the others for ever.
        waiting = len(self.rollout_buffer)
        if surplus := waiting - min(self.processes.all_gather(waiting)):
            self.rollout_buffer.take(surplus)
        self.rollout_buffer.open()
        if self.synchronous:
            yield
            return
        self._actor, self._actor_version = deepcopy(self.policy), self._n_updates
        for module in self._actor.modules():
            if isinstance(module, torch.nn.RNNBase):  # deepcopy scatters its weights; cuDNN would gather them each step
                module.flatten_parameters()
        self._learner_stream.record()
        self._thread = Thread(target=self._run_learner, name="srwm-learner", daemon=True)
        self._thread.start()
        try:
            with short_switch_interval() if self._learner_stream.on_device else nullcontext():
                yield
        except BaseException:
            self.processes.abandon()  # the learner may wait for processes that will not come
            raise
        finally:
            self.rollout_buffer.close()
            self._thread.join()
            self._actor = self._thread = None
            self.engine.release()  # it holds the actors' policy

    def finish_learning(self) -> None:
        """Wait until the learner has used all whole batches that were collected; it ends.

        Raises:
            Exception: the learner's, if it failed.
        """
        if self._thread is not None:
            self.rollout_buffer.finish()
            self._thread.join()
            self.rollout_buffer.check()

    def _init_callback(self, callback: MaybeCallback, progress_bar: bool = False) -> BaseCallback:
        if callback is not None and not isinstance(callback, list | BaseCallback):
            callback = ConvertCallback(callback)
        others = callback if isinstance(callback, list) else [] if callback is None else [callback]
        return super()._init_callback([_FinishLearning(), *others], progress_bar)

    def _run_learner(self) -> None:
        try:
            with suppress(CancelledError), self._learner_stream.entered():
                while (batch := self.rollout_buffer.take(self.unrolls_per_batch, wait=True)) is not None:
                    self._update(batch)
        except BaseException as error:
            self.rollout_buffer.close(error)

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "weights_lock", "_learner_stream", "_actor", "_thread", "_updates"]


class _FinishLearning(BaseCallback):
    """Wait for the learner at the end of training, so that other callbacks see the weights that `learn` ends with."""

    model: IMPALA

    def _on_step(self) -> bool:
        return True

    def _on_training_end(self) -> None:
        self.model.finish_learning()


@torch.no_grad()
def copy_weights(into: SRWMPolicy, policy: SRWMPolicy) -> None:
    """Copy a policy's weights into its copy; faster than `load_state_dict`, for which a learner would wait."""
    targets, sources = into.state_dict(), policy.state_dict()
    if targets.keys() == sources.keys() and all(map(torch.is_tensor, sources.values())):
        torch._foreach_copy_([*targets.values()], [*sources.values()])
    else:
        into.load_state_dict(sources)
