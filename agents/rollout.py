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

Obs = Tensor | dict[str, Tensor]


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
        self.rewards, self.values, self.log_probs, self.episode_starts, self.advantages, self.returns = (
            torch.zeros(shape, device=self.device) for _ in range(6)
        )
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
        obs: np.ndarray | dict[str, np.ndarray],
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
        chunks, envs = np.divmod(indices, self.n_envs)
        obs = self.observations
        return Sequences(
            observations={k: self._gather(v, chunks, envs) for k, v in obs.items()}
            if isinstance(obs, dict)
            else self._gather(obs, chunks, envs),
            actions=self._gather(self.actions, chunks, envs),
            episode_starts=self._gather(self.episode_starts, chunks, envs),
            old_values=self._gather(self.values, chunks, envs),
            old_log_probs=self._gather(self.log_probs, chunks, envs),
            advantages=self._gather(self.advantages, chunks, envs),
            returns=self._gather(self.returns, chunks, envs),
            core_state=torch.stack([self.core_states[c][:, e] for c, e in zip(chunks, envs, strict=True)], dim=1),
        )

    def sequences_field(self, name: str, indices: np.ndarray) -> Tensor:
        """Gather one `[T, B]` field, `[T, N]`, without the observations."""
        chunks, envs = np.divmod(indices, self.n_envs)
        return self._gather(getattr(self, name), chunks, envs)

    def _gather(self, stored: Tensor, chunks: np.ndarray, envs: np.ndarray) -> Tensor:
        length = self.sequence_length
        if length == self.buffer_size:
            return stored[:, torch.as_tensor(envs, device=self.device)]
        parts = [stored[c * length : (c + 1) * length, e] for c, e in zip(chunks, envs, strict=True)]
        return torch.stack(parts, dim=1)


def storage(shape: tuple[int, int], space: spaces.Space[Any], device: torch.device) -> Tensor:
    """Return zeros `[T, B, *space.shape]` of the type in which the environment gives them."""
    dtype = torch.from_numpy(np.empty(0, space.dtype)).dtype
    return torch.zeros((*shape, *(space.shape or ())), dtype=dtype, device=device)


def obs_storage(shape: tuple[int, int], space: spaces.Space[Any], device: torch.device) -> Obs:
    """Return zeros for the observations of a rollout; a dict for a Dict space."""
    if isinstance(space, spaces.Dict):
        return {key: storage(shape, each, device) for key, each in space.spaces.items()}
    return storage(shape, space, device)


def store(stored: Obs, t: int, obs: np.ndarray | dict[str, np.ndarray]) -> None:
    """Copy step t's observations `[B, ...]` into `[T, B, ...]`."""
    if isinstance(stored, dict):
        assert isinstance(obs, dict)
        for key, each in stored.items():
            each[t].copy_(torch.from_numpy(obs[key]))
    else:
        stored[t].copy_(torch.as_tensor(obs))
