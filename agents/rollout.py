"""A rollout: T steps of B environments in their own types, and the core state with which each sequence began."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from srwm_rl.agents.returns import generalized_advantages
from srwm_rl.errors import UserError
from srwm_rl.policy import Obs


class Sequences(NamedTuple):
    """N whole sequences of T steps, time-major."""

    observations: Obs  # [T, N, ...]
    actions: Tensor  # [T, N, *action_shape]
    episode_starts: Tensor  # [T, N]
    old_values: Tensor  # [T, N]
    old_log_probs: Tensor  # [T, N]
    advantages: Tensor  # [T, N]
    returns: Tensor  # [T, N]
    core_state: Tensor  # [L, N, S], with which each sequence began


class SequenceRolloutBuffer:
    """Rollout storage for recurrent training; SB3's constructor, so that `OnPolicyAlgorithm` can build it.

    Frames stay uint8. States are kept only where a sequence begins: for 2 x 8 heads x 16, 256 steps and 64 environments
    that is 3.4 MB, where a state per step (sb3-contrib keeps four) would be 0.9 GB each.

    Args:
        buffer_size: T, steps per environment.
        observation_space, action_space: the environment's.
        device: where the rollout lives.
        gae_lambda, gamma: for `generalized_advantages`.
        n_envs: B.
        sequence_length: length of the training sequences; must divide T; None: T.

    Raises:
        UserError: `sequence_length` does not divide T.
    """

    def __init__(
        self,
        buffer_size: int,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        device: torch.device | str = "cpu",
        gae_lambda: float = 1.0,
        gamma: float = 0.99,
        n_envs: int = 1,
        sequence_length: int | None = None,
    ) -> None:
        self.sequence_length = sequence_length or buffer_size
        if self.sequence_length < 1 or buffer_size % self.sequence_length:
            raise UserError(f"sequence_length {sequence_length} must divide n_steps {buffer_size}")
        self.buffer_size, self.n_envs = buffer_size, n_envs
        self.gamma, self.gae_lambda = gamma, gae_lambda
        self.device = torch.device(device)
        shape = (buffer_size, n_envs)
        self.observations = obs_storage(shape, observation_space, self.device)
        self.actions = storage(shape, action_space, self.device)
        # One number per step each, in one tensor, so that a minibatch takes them all at once.
        self._numbers = torch.zeros(6, *shape, device=self.device)
        self.episode_starts, self.values, self.log_probs, self.advantages, self.returns, self.rewards = self._numbers
        self.core_states: list[Tensor] = []  # [L, B, S] at the start of each sequence
        self.pos = 0

    def reset(self) -> None:
        """Forget the rollout; the memory is kept."""
        self.pos = 0
        self.core_states = []

    @property
    def full(self) -> bool:
        """Say whether T steps have been added."""
        return self.pos == self.buffer_size

    def size(self) -> int:
        """Return the number of steps added."""
        return self.pos

    def add(
        self,
        obs: Obs,
        actions: Tensor,
        rewards: np.ndarray,
        episode_starts: np.ndarray,
        values: Tensor,
        log_probs: Tensor,
        core_state: Tensor,
    ) -> None:
        """Store step t of all environments; `core_state` `[L, B, S]` is the one with which the step began."""
        t = self.pos
        if t % self.sequence_length == 0:
            self.core_states.append(core_state.clone())
        store(self.observations, t, obs)
        self.actions[t].copy_(actions.view_as(self.actions[t]))
        self.rewards[t].copy_(torch.from_numpy(rewards))
        self.episode_starts[t].copy_(torch.from_numpy(episode_starts))
        self.values[t].copy_(values)
        self.log_probs[t].copy_(log_probs)
        self.pos += 1

    def compute_returns_and_advantage(self, last_values: Tensor, dones: np.ndarray) -> None:
        """Fill `advantages` and `returns`.

        Args:
            last_values: `[B]`, of the state after the rollout.
            dones: `[B]`, whether the last step ended an episode.
        """
        last = torch.as_tensor(dones, dtype=torch.float32, device=self.device)[None]
        episode_ends = torch.cat((self.episode_starts[1:], last))  # step t ended an episode where t + 1 starts one
        result = generalized_advantages(
            self.rewards, self.values, episode_ends, last_values, self.gamma, self.gae_lambda
        )
        self.advantages.copy_(result.advantages)
        self.returns.copy_(result.returns)

    @property
    def n_sequences(self) -> int:
        """Number of sequences in a full rollout."""
        return self.n_envs * (self.buffer_size // self.sequence_length)

    def minibatches(self, sequences_each: int) -> Iterator[np.ndarray]:
        """Shuffle the sequences and yield their indices in minibatches of (nearly) equal size, each sequence once."""
        order = np.random.permutation(self.n_sequences)
        yield from np.array_split(order, -(-self.n_sequences // sequences_each))

    def sequences(self, indices: np.ndarray) -> Sequences:
        """Gather whole sequences; index i is environment `i % B`, chunk `i // B`."""
        rows, obs = self._rows(indices), self.observations
        starts, values, log_probs, advantages, returns, _ = self._take(self._numbers.flatten(1), 1, rows)
        return Sequences(
            observations={k: self._take(v.flatten(0, 1), 0, rows) for k, v in obs.items()}
            if isinstance(obs, dict)
            else self._take(obs.flatten(0, 1), 0, rows),
            actions=self._take(self.actions.flatten(0, 1), 0, rows),
            episode_starts=starts,
            old_values=values,
            old_log_probs=log_probs,
            advantages=advantages,
            returns=returns,
            core_state=self._states(indices),
        )

    def sequences_field(self, name: str, indices: np.ndarray) -> Tensor:
        """Gather one `[T, B]` field, `[T, N]`, without the observations."""
        return self._take(getattr(self, name).flatten(), 0, self._rows(indices))

    def _rows(self, indices: np.ndarray) -> Tensor:
        """Return where the sequences' steps stand among all `T * B`, `[T, N]`."""
        chunks, envs = np.divmod(indices, self.n_envs)
        steps = np.arange(self.sequence_length)[:, None] + chunks * self.sequence_length
        return self._on_device(steps * self.n_envs + envs)

    def _on_device(self, indices: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(indices)
        # From pinned memory it crosses without anybody waiting for it.
        return tensor.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else tensor

    @staticmethod
    def _take(stored: Tensor, dim: int, rows: Tensor) -> Tensor:
        # Not `stored[rows]`: for uint8 frames that is twenty times slower on a CPU.
        taken: Tensor = stored.index_select(dim, rows.flatten()).unflatten(dim, rows.shape)
        return taken

    def _states(self, indices: np.ndarray) -> Tensor:
        if len(self.core_states) == 1:
            return self.core_states[0].index_select(1, self._on_device(indices))
        pairs = zip(*np.divmod(indices, self.n_envs), strict=True)
        return torch.stack([self.core_states[chunk][:, env] for chunk, env in pairs], dim=1)


def storage(shape: tuple[int, int], space: spaces.Space[Any], device: torch.device) -> Tensor:
    """Return zeros `[T, B, *space.shape]` of the type in which the environment gives them."""
    dtype = torch.from_numpy(np.empty(0, space.dtype)).dtype
    return torch.zeros((*shape, *(space.shape or ())), dtype=dtype, device=device)


def obs_storage(shape: tuple[int, int], space: spaces.Space[Any], device: torch.device) -> Obs:
    """Return zeros for the observations of a rollout; a dict for a Dict space."""
    if isinstance(space, spaces.Dict):
        return {key: storage(shape, each, device) for key, each in space.spaces.items()}
    return storage(shape, space, device)


def store(stored: Obs, t: int, obs: Any) -> None:
    """Copy step t's observations `[B, ...]`, arrays or tensors, into `[T, B, ...]`."""
    if isinstance(stored, dict):
        for key, each in stored.items():
            each[t].copy_(torch.as_tensor(obs[key]))
    else:
        stored[t].copy_(torch.as_tensor(obs))
