"""Acting for groups of environments on a GPU: a step is one copy to it, one captured CUDA graph and one copy back."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from srwm_rl.agents.engine.cuda_graphs import CAPTURING, CheckedGraphs
from srwm_rl.agents.engine.transfer import PackedTensors, map_obs, to_device
from srwm_rl.nn.module_fingerprint import ModuleFingerprint
from srwm_rl.nn.policy import ActStep, Obs, SRWMPolicy


class StepInputs(NamedTuple):
    """What a step needs from the host."""

    obs: Obs  # [B, ...]
    episode_starts: Tensor  # [B]
    t: Tensor  # [1], the step's number in the rollout


class StepOutputs(NamedTuple):
    """What the host needs of a step."""

    actions: Tensor  # [B, *action_shape]
    values: Tensor  # [B]
    log_probs: Tensor  # [B]


class GraphedActor:
    """Acts for one group of environments; all that a step reads and writes keeps its place in memory.

    The two core states take turns: a step reads one and writes the other, so that its result outlives the next step.

    Args:
        policy: that acts, sampling its actions.
        observations: examples `[T, B, ...]`, whose shapes and dtypes are taken.
        n_rows: T + 1, how many steps of a rollout may store their observations.
        obs: of the first step, arrays `[B, ...]`.
        core_state: `[L, B, S]`.
        episode_starts: `[B]`.

    Attributes:
        observations: `[T + 1, B, ...]`, those of the rollout, stored by the steps themselves.
        launch: for each core state, what computes the step that reads it: `step`, or its graph.
    """

    def __init__(
        self,
        policy: SRWMPolicy,
        observations: Obs,
        n_rows: int,
        obs: Any,
        core_state: Tensor,
        episode_starts: np.ndarray,
    ) -> None:
        self._policy = policy
        self.core_states = core_state.clone(), core_state.clone()
        self.observations = map_obs(lambda x: x.new_zeros((n_rows, *x.shape[1:])), observations)
        examples = map_obs(lambda x: x[0], observations), torch.empty(len(episode_starts)), torch.empty(1).long()
        self._inputs = PackedTensors(StepInputs(*examples), core_state.device)
        # What the steps copy: rows of the rollout, and the row of a step.
        self._words = map_obs(
            lambda rows, row: (as_words(rows), as_words(row[None])), self.observations, self.obs_tensor
        )
        self._put(0, obs, episode_starts)
        self._outputs = PackedTensors(StepOutputs(*self._act(0)[:3]), core_state.device)
        self.launch: list[Callable[[], Any]] = [partial(self.step, 0), partial(self.step, 1)]

    def fits(self, n_rows: int, core_state: Tensor) -> bool:
        """Return whether it can act for rollouts of `n_rows - 1` steps that begin with core states like this one."""
        rows = next(iter(self.observations.values())) if isinstance(self.observations, dict) else self.observations
        own = self.core_states[0]
        return len(rows) == n_rows and own.shape == core_state.shape and own.device == core_state.device

    @property
    def obs_tensor(self) -> Obs:
        """The observations of the last step `[B, ...]`, on the device; the next step writes over them."""
        return self._inputs.on_device.obs  # type: ignore[no-any-return]

    def __call__(self, t: int, obs: Any, core_state: Tensor, episode_starts: np.ndarray) -> ActStep:
        """Sample the actions of step t of a rollout, and store its observations.

        Args:
            t: at most T.
            obs: arrays `[B, ...]`.
            core_state: `[L, B, S]`; best the one that the step before returned, which is not copied.
            episode_starts: `[B]`.

        Returns:
            The step, its core state on the device and valid until the next call but one, the rest on the host.
        """
        number = int(core_state is self.core_states[1])
        if core_state is not self.core_states[number]:
            self.core_states[0].copy_(core_state)
        self._put(t, obs, episode_starts)
        with CAPTURING:
            self.launch[number]()
        self._outputs.to_host()
        # Cloned: the next step writes over these tensors, while callbacks may still hold them.
        results = [tensor.clone() for tensor in self._outputs.on_host]
        return ActStep._make([*results, self.core_states[1 - number]])

    def store(self, t: int, obs: Any) -> None:
        """Store observations `[B, ...]` as those of step t, without acting."""
        # Not through the pinned buffer, which the host may write again only after a wait.
        map_obs(lambda rows, array: rows[t].copy_(to_device(array, rows.device)), self.observations, obs)

    @torch.no_grad()
    def step(self, number: int) -> None:
        """Compute a step from the inputs on the device and core state `number`."""
        acted = self._act(number)
        self.core_states[1 - number].copy_(acted.core_state)
        map_obs(lambda pair: pair[0].index_copy_(0, self._inputs.on_device.t, pair[1]), self._words)
        for output, tensor in zip(self._outputs.on_device, acted, strict=False):
            output.copy_(tensor)

    @torch.no_grad()
    def difference(self, number: int, replay: Callable[[], Any]) -> str:
        """Name what differs between the results of a graph of `step` and the policy's own, apart from actions."""
        outputs = self._outputs.on_device
        results = {"values": outputs.values, "core_state": self.core_states[1 - number]}
        for result in results.values():  # so that a graph that writes nothing is noticed
            result.fill_(torch.nan)
        replay()
        expected = self._act(number)
        for name, result in results.items():
            if not torch.allclose(result, getattr(expected, name), rtol=1e-3, atol=1e-3, equal_nan=True):
                return f"its {name} differ from those of the policy"
        return ""

    def _put(self, t: int, obs: Any, episode_starts: np.ndarray) -> None:
        inputs: StepInputs = self._inputs.on_host
        map_obs(lambda tensor, array: tensor.copy_(torch.from_numpy(array)), inputs.obs, obs)
        inputs.episode_starts.copy_(torch.from_numpy(episode_starts))
        inputs.t.fill_(t)
        self._inputs.to_device()

    @torch.no_grad()
    def _act(self, number: int) -> ActStep:
        inputs: StepInputs = self._inputs.on_device
        return self._policy.act(inputs.obs, self.core_states[number], inputs.episode_starts)


def as_words(tensor: Tensor) -> Tensor:
    """Return the memory of a contiguous tensor of any dtype as rows of the largest integers: few elements to copy.

    Rows are those of the first dimension.
    """
    rows = tensor.flatten(1).view(torch.uint8)
    return rows.view(torch.int64) if rows.shape[1] % 8 == 0 else rows


class GraphedActing(CheckedGraphs):
    """A policy's actors, whose steps are CUDA graphs captured when a rollout begins; the results are the policy's.

    Weights are read in place, so the policy may learn between steps. Graphs are captured anew in the next rollout when
    weights or modules were replaced, moved, frozen or given hooks (`ModuleFingerprint`).

    Args:
        policy: that acts.
        wait_for_learner: called before a capture, which waits for all work on the device: a learner in another thread
            must be in no collective operation, which may wait for processes that wait for this thread.
    """

    what = "acting"
    priority = -1  # acting goes before a learner's kernels, each of which takes as long as a whole acting step
    draws = True

    def __init__(self, policy: SRWMPolicy, wait_for_learner: Callable[[], None]) -> None:
        super().__init__()
        self._policy, self._wait_for_learner = policy, wait_for_learner
        self._fingerprint: ModuleFingerprint | None = None
        self._actors: dict[int, GraphedActor] = {}

    def actor(
        self, first: int, observations: Obs, n_rows: int, obs: Any, core_state: Tensor, episode_starts: np.ndarray
    ) -> GraphedActor:
        """Return what acts for a group in a rollout; see `GraphedActor`.

        Args:
            first: index of the group's first environment among all.
        """
        if self._fingerprint is None or not self._fingerprint.matches():
            self._fingerprint, self._actors, self.disabled = ModuleFingerprint(self._policy), {}, False
        actor = self._actors.get(first)
        if actor is None or not actor.fits(n_rows, core_state):
            self._wait_for_learner()
            # A resumed run captures again, and must draw the same numbers as the run before.
            with CAPTURING, torch.random.fork_rng([core_state.device] if core_state.is_cuda else []):
                actor = GraphedActor(self._policy, observations, n_rows, obs, core_state, episode_starts)
                for number, step in enumerate(actor.launch):
                    if not self.disabled:
                        difference = partial(actor.difference, number)
                        actor.launch[number] = self._try_to_capture(step, core_state.device, difference) or step
            self._actors[first] = actor
        return actor
