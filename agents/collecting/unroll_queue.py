"""Unrolls, and the queue that carries them from the actors to the learner."""

from __future__ import annotations

from collections import deque
from threading import Condition
from typing import Any, NamedTuple

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor
from torch.utils import _pytree as pytree

from srwm_rl.agents.collecting.rollout_buffer import action_storage, storage
from srwm_rl.agents.engine.streams import StreamEvent
from srwm_rl.agents.engine.transfer import map_obs
from srwm_rl.nn.policy import Obs


class Unrolls(NamedTuple):
    """N unrolls of T steps, time-major, with the observation that follows them."""

    observations: Obs  # [T + 1, N, ...]
    episode_starts: Tensor  # [T + 1, N]
    actions: Tensor  # [T, N, *action_shape]
    rewards: Tensor  # [T, N]
    log_probs: Tensor  # [T, N], of the policy that acted
    core_state: Tensor  # [L, N, S], with which they began
    versions: Tensor  # [N], number of updates behind the policy that began them

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
        """Allocate the unrolls of `n_envs` environments that begin with `core_state` `[L, B, S]`."""
        device = core_state.device
        shape = (n_steps, n_envs)
        return cls(
            observations=storage((n_steps + 1, n_envs), observation_space, device),
            episode_starts=torch.zeros(n_steps + 1, n_envs, device=device),
            actions=action_storage(shape, action_space, device),
            rewards=torch.zeros(shape, device=device),
            log_probs=torch.zeros(shape, device=device),
            core_state=core_state.clone(),
            versions=torch.full((n_envs,), version),
        )

    def part(self, start: int, stop: int) -> Unrolls:
        """Return unrolls `start` to `stop`, as views."""
        # Not by pytree, which takes twice as long: this runs at every update.
        obs, *others, versions = self
        parts = (map_obs(lambda x: x[:, start:stop], obs), *(field[:, start:stop] for field in others))
        return Unrolls._make((*parts, versions[start:stop]))

    def to_tree(self) -> dict[str, Any]:
        """Return copies of the unrolls as arrays by name, for a checkpoint."""
        tree: dict[str, Any] = pytree.tree_map(lambda x: x.detach().clone().cpu().numpy(), self._asdict())
        return tree

    @classmethod
    def from_tree(cls, tree: dict[str, Any], device: torch.device) -> Unrolls:
        """Rebuild what `to_tree` returned; `versions` stay on the CPU."""
        fields = pytree.tree_map(lambda array: torch.from_numpy(np.array(array)).to(device), tree)
        return cls(**{**fields, "versions": fields["versions"].cpu()})


def concatenate(parts: list[Unrolls]) -> Unrolls:
    """Concatenate unrolls to `[T, sum N_i, ...]`; a single one is returned as it is."""
    if len(parts) == 1:
        return parts[0]
    fields = pytree.tree_map(lambda *tensors: torch.cat(tensors, dim=1), *(part[:-1] for part in parts))
    return Unrolls(*fields, torch.cat([part.versions for part in parts]))  # type: ignore[call-arg]


class UnrollQueue:
    """A first-in-first-out queue between threads, with SB3's buffer constructor so that `OnPolicyAlgorithm` builds it.

    An error of the learner is raised in the actors' next call.
    """

    def __init__(self, buffer_size: int, *spaces_and_device: Any, **settings: Any) -> None:
        self._changed = Condition()
        self._blocks: deque[Unrolls] = deque()
        self._filled = StreamEvent(settings.get("device", "cpu"))
        self._taken: list[Unrolls] = []  # blocks of the last batch, kept alive
        self.open()

    def __len__(self) -> int:
        """Return the number of unrolls that wait."""
        return sum(block.n for block in self._blocks)

    def put(self, unrolls: Unrolls) -> None:
        """Add finished unrolls."""
        with self._changed:
            self.check()
            self._filled.record()
            self._blocks.append(unrolls)
            self._changed.notify_all()

    def wait_for_room(self, limit: int) -> None:
        """Wait until fewer than `limit` unrolls wait."""
        with self._changed:
            self._changed.wait_for(lambda: self._error is not None or self.closed or len(self) < limit)
            self.check()

    def wait_until_idle(self, n: int) -> None:
        """Wait until the learner waits for a batch of `n` unrolls."""
        with self._changed:
            self._changed.wait_for(lambda: self._error is not None or self.closed or (self._idle and len(self) < n))
            self.check()

    def take(self, n: int, wait: bool = False) -> Unrolls | None:
        """Remove and return the n oldest unrolls; None when there are fewer or, with `wait`, when the queue is closed.

        The work on a batch must be done, on the device too, before the next call: its memory is then freed.
        """
        with self._changed:
            self._taken = []
            if wait:
                self._idle = True
                self._changed.notify_all()
                self._changed.wait_for(lambda: self.closed or self._finishing or len(self) >= n)
                self._idle = False
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
            self._filled.wait()
            if self._filled.on_device:  # the device may still be copying them; freed memory could be written again
                self._taken = parts
            self._changed.notify_all()
        return concatenate(parts)

    def open(self) -> None:
        """Let a learner wait for unrolls (again)."""
        self._finishing = self.closed = False
        self._idle = False  # whether the learner waits
        self._error: BaseException | None = None

    def finish(self) -> None:
        """Announce that no unrolls follow: the learner takes the remaining whole batches, then ends."""
        with self._changed:
            self._finishing = True
            self._changed.notify_all()

    def close(self, error: BaseException | None = None) -> None:
        """End the learner's work, or say by which error it ended; queued unrolls stay."""
        with self._changed:
            self.closed, self._error = True, error or self._error
            self._changed.notify_all()

    def check(self) -> None:
        """Raise the learner's error, if it has failed."""
        if self._error is not None:
            raise self._error

    def to_tree(self) -> list[dict[str, Any]]:
        """Return the queued unrolls, for a checkpoint."""
        with self._changed:
            return [block.to_tree() for block in self._blocks]

    def from_tree(self, tree: list[dict[str, Any]], device: torch.device) -> None:
        """Restore the queued unrolls."""
        with self._changed:
            self._blocks = deque(Unrolls.from_tree(unrolls, device) for unrolls in tree)
