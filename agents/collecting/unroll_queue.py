"""Finished unrolls on their way from the actors to the learner."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from threading import Condition
from typing import Any, NamedTuple

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from srwm_rl.agents.collecting.rollout_buffer import RolloutWriter, obs_storage, storage
from srwm_rl.agents.engine.streams import StreamEvent
from srwm_rl.nn.policy import Obs

# Of `Unrolls`: the tensors whose second axis counts the unrolls.
FIELDS = ("episode_starts", "actions", "rewards", "log_probs", "core_state")


class Unrolls(NamedTuple):
    """N unrolls of T steps, time-major, with the observation that follows them."""

    observations: Obs  # [T + 1, N, ...]
    episode_starts: Tensor  # [T + 1, N]
    actions: Tensor  # [T, N, *action_shape]
    rewards: Tensor  # [T, N]
    log_probs: Tensor  # [T, N], of the policy that acted
    core_state: Tensor  # [L, N, S], with which they began
    versions: Tensor  # [N], updates the policy that began them had had

    @property
    def n(self) -> int:
        """Number of unrolls."""
        return len(self.versions)

    @classmethod
    def empty(
        cls,
        n_steps: int,
        n_envs: int,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        core_state: Tensor,
        version: int,
    ) -> Unrolls:
        """Make room for the unrolls of `n_envs` environments that begin with `core_state` `[L, B, S]`."""
        device = core_state.device
        shape = (n_steps, n_envs)
        return cls(
            observations=obs_storage((n_steps + 1, n_envs), observation_space, device),
            episode_starts=torch.zeros(n_steps + 1, n_envs, device=device),
            actions=storage(shape, action_space, device),
            rewards=torch.zeros(shape, device=device),
            log_probs=torch.zeros(shape, device=device),
            core_state=core_state.clone(),
            versions=torch.full((n_envs,), version),
        )

    def writer(self) -> RolloutWriter:
        """Return the writer of the unrolls' steps."""
        return RolloutWriter(
            self.observations, self.episode_starts, self.actions, self.log_probs, self.rewards,
            [self.core_state], sequence_length=len(self.actions),
        )  # fmt: skip

    def part(self, start: int, stop: int) -> Unrolls:
        """Return some of the unrolls, as views."""
        return self._each(lambda field, axis: field[start:stop] if axis == 0 else field[:, start:stop])

    def _each(self, change: Callable[[Tensor, int], Tensor]) -> Unrolls:
        obs = self.observations
        changed = {key: change(each, 1) for key, each in obs.items()} if isinstance(obs, dict) else change(obs, 1)
        fields = {name: change(getattr(self, name), 1) for name in FIELDS}
        return Unrolls(observations=changed, versions=change(self.versions, 0), **fields)

    def to_tree(self) -> dict[str, Any]:
        """Return the unrolls as arrays by name, for a checkpoint."""
        copied = self._each(lambda field, _: field.clone())._asdict()
        return {name: _numpy(value) for name, value in copied.items()}

    @classmethod
    def from_tree(cls, tree: dict[str, Any], device: torch.device) -> Unrolls:
        """Rebuild what `to_tree` gave; only the versions stay on the CPU."""
        fields = {name: _tensor(value, device) for name, value in tree.items()}
        return cls(**{**fields, "versions": fields["versions"].cpu()})


def joined(parts: list[Unrolls]) -> Unrolls:
    """Put unrolls side by side, `[T, sum N_i, ...]`."""
    if len(parts) == 1:
        return parts[0]
    first = parts[0].observations
    obs = (
        {key: torch.cat([each.observations[key] for each in parts], dim=1) for key in first}  # type: ignore[index]
        if isinstance(first, dict)
        else torch.cat([each.observations for each in parts], dim=1)  # type: ignore[misc]
    )
    fields = {name: torch.cat([getattr(each, name) for each in parts], dim=1) for name in FIELDS}
    return Unrolls(observations=obs, versions=torch.cat([each.versions for each in parts]), **fields)


class UnrollQueue:
    """First in, first out, between threads; SB3's buffer constructor, so that `OnPolicyAlgorithm` can build it.

    What goes wrong on either side is handed to the other: whoever waits is woken and gets the error.
    """

    def __init__(self, buffer_size: int, *spaces_and_device: Any, **settings: Any) -> None:
        self._changed = Condition()
        self._blocks: deque[Unrolls] = deque()
        self._filled = StreamEvent(settings.get("device", "cpu"))
        self._taken: list[Unrolls] = []  # what the last batch was made of
        self._error: BaseException | None = None
        self._finishing = self.closed = False

    def __len__(self) -> int:
        """Return the number of unrolls that wait."""
        return sum(block.n for block in self._blocks)

    def put(self, unrolls: Unrolls) -> None:
        """Add finished unrolls.

        Raises:
            BaseException: the learner's, if it has failed.
        """
        with self._changed:
            self.check()
            self._filled.send()
            self._blocks.append(unrolls)
            self._changed.notify_all()

    def wait_for_room(self, limit: int) -> None:
        """Wait until fewer than `limit` unrolls wait.

        Raises:
            BaseException: the learner's, if it has failed.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._error is not None or self.closed or len(self) < limit)
            self.check()

    def take(self, n: int, wait: bool = False) -> Unrolls | None:
        """Remove and return the n oldest unrolls; None when fewer are there, or, waiting, when the queue is closed.

        By the next call the work on a batch must be done, on the device too: its memory may then be let go.
        """
        with self._changed:
            self._taken = []
            if wait:
                self._changed.wait_for(lambda: self.closed or self._finishing or len(self) >= n)
                if self.closed:
                    return None
            if len(self) < n:
                return None
            parts = []
            while n:
                block = self._blocks.popleft()
                parts.append(block.part(0, min(n, block.n)))
                if block.n > n:
                    self._blocks.appendleft(block.part(n, block.n))
                n -= parts[-1].n
            self._filled.receive()
            if self._filled.on_device:  # it may still be copying them, and who wrote them could write there again
                self._taken = parts
            self._changed.notify_all()
        return joined(parts)

    def open(self) -> None:
        """Let a learner wait for unrolls (again)."""
        self._finishing = self.closed = False
        self._error = None

    def finish(self) -> None:
        """Say that nothing more comes: the learner takes the whole batches that are left, then ends."""
        with self._changed:
            self._finishing = True
            self._changed.notify_all()

    def close(self) -> None:
        """End the learner's work; what is in the queue stays there."""
        with self._changed:
            self.closed = True
            self._changed.notify_all()

    def fail(self, error: BaseException) -> None:
        """Hand the learner's error to whoever puts or waits next."""
        with self._changed:
            self._error = error
            self._changed.notify_all()

    def check(self) -> None:
        """Raise the learner's error, if it has failed."""
        if self._error is not None:
            raise self._error

    def to_tree(self) -> list[dict[str, Any]]:
        """Return what waits, for a checkpoint."""
        with self._changed:
            return [block.to_tree() for block in self._blocks]

    def from_tree(self, tree: list[dict[str, Any]], device: torch.device) -> None:
        """Put back what waited."""
        with self._changed:
            self._blocks = deque(Unrolls.from_tree(each, device) for each in tree)


def _numpy(value: Obs) -> Any:
    return {key: _numpy(each) for key, each in value.items()} if isinstance(value, dict) else value.cpu().numpy()


def _tensor(value: Any, device: torch.device) -> Any:
    if isinstance(value, dict):
        return {key: _tensor(each, device) for key, each in value.items()}
    return torch.from_numpy(np.array(value)).to(device)
