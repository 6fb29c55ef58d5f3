"""How a policy runs while it is trained: in PyTorch, in compiled C on a CPU, as captured graphs on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from contextlib import AbstractContextManager
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from srwm_rl.agents.engine.graphed_acting import GraphedActing
from srwm_rl.agents.engine.graphed_gradient import GraphedGradient
from srwm_rl.agents.engine.transfer import map_obs
from srwm_rl.native.fused_policy import FusedPolicy
from srwm_rl.nn.policy import ActStep, Obs, SequenceEvaluation, SRWMPolicy


class Actor(Protocol):
    """Acts for one group of environments during a rollout; see `GraphedActor`."""

    @property
    def observations(self) -> Obs | None:
        """The rollout's observations `[T + 1, B, ...]`, on the device; None: they are not stored."""

    @property
    def obs_tensor(self) -> Obs:
        """The observations of the last step `[B, ...]`, on the device."""

    def __call__(self, t: int, obs: Any, core_state: Tensor, episode_starts: np.ndarray) -> ActStep:
        """Sample the actions of step t for arrays `[B, ...]`; only the step's core state is on the device."""

    def store(self, t: int, obs: Any) -> None:
        """Store observations `[B, ...]` as those of step t, without acting."""


class HostActor:
    """Acts on a CPU, where a rollout's observations are written by the collector."""

    observations: Obs | None = None

    def __init__(self, act: Callable[[Obs, Tensor, Tensor], ActStep]) -> None:
        self._act = act

    def __call__(self, t: int, obs: Any, core_state: Tensor, episode_starts: np.ndarray) -> ActStep:
        """Sample actions for arrays `[B, ...]`, which are not copied."""
        self.obs_tensor: Obs = map_obs(torch.from_numpy, obs)
        return self._act(self.obs_tensor, core_state, torch.from_numpy(episode_starts))

    def store(self, t: int, obs: Any) -> None:
        """Do nothing."""


class Trainer(Protocol):
    """What the engine asks of a trainer."""

    policy: SRWMPolicy
    device: torch.device
    weights_lock: AbstractContextManager[Any]  # held while weights change, and while a CUDA graph is captured
    loss_settings: Hashable  # what the loss depends on beside the weights and its arguments

    def wait_for_learner(self) -> None:
        """Wait until no other thread is within an update, or begins one before this thread collects more."""

    def loss(self, batch: Any, *scalars: float | Tensor | None) -> tuple[Tensor, NamedTuple]:
        """Return the loss of a micro-batch, `[]`, and its terms summed over steps, a NamedTuple of scalars `[]`."""

    def native_gradient(self, batch: Any, *scalars: float | None) -> Tensor | None:
        """Add the gradient of `loss` without autograd and return its terms `[n]`; None: not possible, nothing done."""


class Engine:
    """Runs a trainer's policy: acting, sequences, and the gradient of the trainer's loss.

    On a CPU, what `FusedPolicy` can run runs in C; on a GPU, acting and gradients are captured as CUDA graphs; anything
    else is plain PyTorch. All give the same numbers up to rounding (`tests/agents/engine/test_engine.py`).

    Args:
        trainer: whose policy and loss they are. Both may be replaced at any time.

    Attributes:
        fused: returns the form of a policy that runs in C where it can (CPU only).
        listeners: called after every gradient of a minibatch, in the thread that learns.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self.fused = lru_cache(maxsize=2)(FusedPolicy)  # two: IMPALA's actors use a copy of the policy
        self.listeners: list[Callable[[], None]] = []
        self._graphed_acting = lru_cache(maxsize=1)(lambda policy: GraphedActing(policy, trainer.wait_for_learner))
        self._graphed_gradient: GraphedGradient | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Copy or pickle the trainer alone: the copy makes its own compiled forms, and has no listeners."""
        return {"_trainer": self._trainer}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["_trainer"])  # type: ignore[misc]

    def release(self) -> None:
        """Forget compiled forms of policies, which keep the policies alive; they are made again when needed."""
        self.fused.cache_clear()
        self._graphed_acting.cache_clear()

    def actor(
        self,
        policy: SRWMPolicy,
        first: int,
        observations: Obs,
        n_rows: int,
        obs: Any,
        core_state: Tensor,
        episode_starts: np.ndarray,
    ) -> Actor:
        """Return what acts for a group in a rollout as `policy.act` does, sampling actions, in the fastest way.

        The arguments are those of `GraphedActing.actor`.
        """
        if self._trainer.device.type == "cpu":
            return HostActor(self.fused(policy).act)
        acting = self._graphed_acting(policy)
        return acting.actor(first, observations, n_rows, obs, core_state, episode_starts)

    def evaluate_sequence(
        self, obs: Obs, actions: Tensor, core_state: Tensor, episode_starts: Tensor, bptt: int | None = None
    ) -> SequenceEvaluation:
        """Evaluate an unroll with the policy being trained; arguments as in `SRWMPolicy.evaluate_sequence`."""
        policy = self._trainer.policy
        runner = self.fused(policy) if self._trainer.device.type == "cpu" else policy
        return runner.evaluate_sequence(obs, actions, core_state, episode_starts, bptt)

    @property
    def parameters(self) -> list[Tensor]:
        """The parameters that the optimizer updates."""
        # From the optimizer's lists: walking the policy's modules takes longer than clipping their gradients.
        return [weight for group in self._trainer.policy.optimizer.param_groups for weight in group["params"]]

    def backward(self, batches: Iterable[Any], *scalars: float | None) -> Tensor:
        """Set the parameters' `.grad` to the gradient of the loss over all `batches`.

        Args:
            batches: micro-batches, (named) tuples of tensors; each goes through the network at once.
            scalars: the loss's further arguments.

        Returns:
            The loss's terms `[n]`, summed over steps.
        """
        graphed = self._graphed()
        if graphed is None:
            for parameter in self.parameters:  # as `optimizer.zero_grad()` does, without its 30 us
                parameter.grad = None
            sums = [self.add_gradient((batch, *scalars)) for batch in batches]
        else:
            graphed.zero()
            settings = self._trainer.loss_settings
            sums = [graphed((batch, *scalars), settings) for batch in batches]
        self.notify()
        return sum(sums[1:], sums[0])

    def notify(self) -> None:
        """Call the listeners: the gradient of a minibatch is made."""
        for listener in self.listeners:
            listener()

    def add_gradient(self, args: tuple[Any, ...]) -> Tensor:
        """Add the gradient of one micro-batch to the parameters' `.grad`, in C or by autograd.

        Args:
            args: of `Trainer.loss`.

        Returns:
            The loss's terms `[n]`.
        """
        if self._trainer.device.type == "cpu":
            native = self._trainer.native_gradient(*args)
            if native is not None:
                return native
        loss, sums = self._trainer.loss(*args)
        loss.backward()
        return torch.stack([*sums]).detach()

    def _graphed(self) -> GraphedGradient | None:
        """Return the captured form of `add_gradient`, on a GPU."""
        trainer, parameters = self._trainer, self.parameters
        if trainer.device.type != "cuda":
            return None
        if self._graphed_gradient is None or not self._graphed_gradient.fits(parameters):  # a new policy or weights
            gradient = GraphedGradient(self.add_gradient, parameters, trainer.policy, trainer.weights_lock)
            self._graphed_gradient = gradient
        return self._graphed_gradient
