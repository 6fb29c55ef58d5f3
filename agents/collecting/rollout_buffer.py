"""The rollout buffer: T steps of B environments, and the core state at the start of each training sequence."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import repeat
from typing import Any, NamedTuple

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from srwm_rl.agents.engine.transfer import to_device
from srwm_rl.agents.losses.gae import generalized_advantages
from srwm_rl.errors import UserError
from srwm_rl.nn.policy import ActStep, Obs

AdvantageStats = Callable[[list[Tensor]], Sequence["tuple[Tensor, Tensor] | None"]]


class SequenceBatch(NamedTuple):
    """N whole sequences of T steps, time-major."""

    observations: Obs  # [T, N, ...]
    actions: Tensor  # [T, N, *action_shape]
    episode_starts: Tensor  # [T, N]
    old_values: Tensor  # [T, N]
    old_log_probs: Tensor  # [T, N]
    advantages: Tensor  # [T, N]
    returns: Tensor  # [T, N]
    core_state: Tensor  # [L, N, S], with which each sequence began


class Minibatch(NamedTuple):
    """A minibatch of whole sequences."""

    parts: Iterable[SequenceBatch]  # each goes through the network at once
    n_steps: int


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
        # One number per step each, in one tensor, so that a minibatch gathers them all at once.
        self._numbers = torch.zeros(6, *shape, device=self.device)
        self.episode_starts, self.values, self.log_probs, self.advantages, self.returns, self.rewards = self._numbers
        self.core_states: list[Tensor] = []  # [L, B, S] at the start of each sequence
        chunks, envs = np.divmod(np.arange(self.n_sequences), n_envs)
        self._first = chunks * (self.sequence_length * n_envs) + envs  # first step of each sequence, among all T * B
        self._steps = np.arange(self.sequence_length)[:, None] * n_envs  # offsets of a sequence's steps

    def reset(self, core_state: Tensor) -> None:
        """Begin a new rollout with core states like `core_state` `[L, B, S]`; all other storage is reused."""
        self.core_states = [torch.empty_like(core_state) for _ in range(self.buffer_size // self.sequence_length)]

    def writer(self, rows: slice = slice(None)) -> RolloutWriter:
        """Return the writer of some environments' steps."""
        return RolloutWriter(
            self.observations, self.episode_starts, self.actions, self.log_probs, self.rewards,
            self.core_states, self.sequence_length, self.values, rows,
        )  # fmt: skip

    def compute_returns_and_advantage(self, last_values: Tensor, dones: np.ndarray) -> None:
        """Fill `advantages` and `returns`.

        Args:
            last_values: `[B]`, of the state after the rollout.
            dones: `[B]`, whether the last step ended an episode.
        """
        last = to_device(dones, self.device).float()[None]
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

    def get(
        self, batch_size: int, max_sequences: int | None = None, advantage_stats: AdvantageStats | None = None
    ) -> Iterator[Minibatch]:
        """Shuffle the sequences and yield minibatches of (nearly) equal size, each sequence once.

        Args:
            batch_size: steps per minibatch, at least `sequence_length`.
            max_sequences: most sequences in a part of a minibatch; None: minibatches have one part.
            advantage_stats: maps the minibatches' advantages, `[T, N]` each, to the mean and standard deviation by
                which each is normalised, or None; None: advantages are not normalised.
        """
        order = np.random.permutation(self.n_sequences)
        minibatches = np.array_split(order, -(-self.n_sequences // (batch_size // self.sequence_length)))
        stats = advantage_stats(list(map(self.advantages_of, minibatches))) if advantage_stats else repeat(None)
        for indices, mean_and_std in zip(minibatches, stats, strict=False):
            parts = self.gather(indices, max_sequences)
            normalized = map(partial(normalize_advantages, mean_and_std=mean_and_std), parts)
            yield Minibatch(normalized, len(indices) * self.sequence_length)

    def gather(self, indices: np.ndarray, max_sequences: int | None = None) -> Iterator[SequenceBatch]:
        """Yield whole sequences, at most `max_sequences` at once, gathered when they are asked for.

        Args:
            indices: `[N]`; index i is environment `i % B`, chunk `i // B`.
            max_sequences: None: all of them.
        """
        n_parts = 1 if max_sequences is None else -(-len(indices) // max_sequences)
        for part in np.array_split(indices, n_parts):
            yield self._gather_sequences(part)

    def _gather_sequences(self, indices: np.ndarray) -> SequenceBatch:
        rows, obs = self._rows(indices), self.observations
        starts, values, log_probs, advantages, returns, _ = self._gather(self._numbers.flatten(1), rows)
        return SequenceBatch(
            observations={key: self._gather(stored.flatten(0, 1)[None], rows)[0] for key, stored in obs.items()}
            if isinstance(obs, dict)
            else self._gather(obs.flatten(0, 1)[None], rows)[0],
            actions=self._gather(self.actions.flatten(0, 1)[None], rows)[0],
            episode_starts=starts,
            old_values=values,
            old_log_probs=log_probs,
            advantages=advantages,
            returns=returns,
            core_state=self._states(indices),
        )

    def advantages_of(self, indices: np.ndarray) -> Tensor:
        """Return the advantages of sequences, `[T, N]`."""
        return self._gather(self.advantages.flatten()[None], self._rows(indices))[0]

    def _rows(self, indices: np.ndarray) -> Tensor:
        """Return the positions of the sequences' steps among all `T * B`, time-major."""
        return to_device((self._steps + self._first[indices]).ravel(), self.device)

    def _gather(self, stored: Tensor, rows: Tensor) -> Tensor:
        """Gather rows of `[k, T * B, ...]` into `[k, T, N, ...]`."""
        # Not `stored[:, rows]`: for uint8 frames that is twenty times slower on a CPU.
        gathered: Tensor = stored.index_select(1, rows).unflatten(1, (self.sequence_length, -1))
        return gathered

    def _states(self, indices: np.ndarray) -> Tensor:
        if len(self.core_states) == 1:
            return self.core_states[0].index_select(1, to_device(indices, self.device))
        pairs = zip(*np.divmod(indices, self.n_envs), strict=True)
        return torch.stack([self.core_states[chunk][:, env] for chunk, env in pairs], dim=1)


def normalize_advantages(batch: SequenceBatch, mean_and_std: tuple[Tensor, Tensor] | None) -> SequenceBatch:
    """Return a batch whose advantages have the mean `[]` subtracted and are divided by the standard deviation `[]`."""
    if mean_and_std is None:
        return batch
    mean, std = mean_and_std
    return batch._replace(advantages=(batch.advantages - mean) / (std + 1e-8))


def storage(shape: tuple[int, int], space: spaces.Space[Any], device: torch.device) -> Tensor:
    """Return zeros `[T, B, *space.shape]` of the space's dtype."""
    dtype = torch.from_numpy(np.empty(0, space.dtype)).dtype
    return torch.zeros((*shape, *(space.shape or ())), dtype=dtype, device=device)


def obs_storage(shape: tuple[int, int], space: spaces.Space[Any], device: torch.device) -> Obs:
    """Return zeros for the observations of a rollout; a dict for a Dict space."""
    if isinstance(space, spaces.Dict):
        return {key: storage(shape, part, device) for key, part in space.spaces.items()}
    return storage(shape, space, device)


class RolloutWriter:
    """Writes steps of some environments into `[T, B, ...]` storage.

    On a CPU through NumPy views: torch's `copy_` takes several times as long for a row of this size.

    Args:
        observations, episode_starts, actions, log_probs, rewards: the storage.
        core_states: `[L, B, S]`, of each sequence's first step.
        sequence_length: steps per sequence.
        values: the storage of values; None: they are not kept.
        rows: which of the B environments.
    """

    def __init__(
        self,
        observations: Obs,
        episode_starts: Tensor,
        actions: Tensor,
        log_probs: Tensor,
        rewards: Tensor,
        core_states: list[Tensor],
        sequence_length: int,
        values: Tensor | None = None,
        rows: slice = slice(None),
    ) -> None:
        def columns(stored: Tensor) -> Any:
            own = stored[:, rows]
            return own.numpy() if own.device.type == "cpu" else own

        self._observations = (
            {key: columns(stored) for key, stored in observations.items()}
            if isinstance(observations, dict)
            else columns(observations)
        )
        self._episode_starts, self._actions = columns(episode_starts), columns(actions)
        self._log_probs, self._rewards = columns(log_probs), columns(rewards)
        self._values = None if values is None else columns(values)
        self._core_states = [states[:, rows] for states in core_states]
        self._sequence_length = sequence_length

    def observe(self, t: int, obs: Any, episode_starts: np.ndarray) -> None:
        """Store the observations `[n, ...]` (arrays or tensors) and `episode_starts` `[n]` of step t."""
        if isinstance(self._observations, dict):
            for key, column in self._observations.items():
                _write(column, t, obs[key])
        else:
            _write(self._observations, t, obs)
        _write(self._episode_starts, t, episode_starts)

    def act(self, t: int, acted: ActStep, core_state: Tensor) -> None:
        """Store the policy's step t, and if a sequence begins there its `core_state` `[L, n, S]`."""
        if t % self._sequence_length == 0:
            self._core_states[t // self._sequence_length].copy_(core_state)
        _write(self._actions, t, acted.actions)
        _write(self._log_probs, t, acted.log_probs)
        if self._values is not None:
            _write(self._values, t, acted.values)

    def reward(self, t: int, rewards: np.ndarray) -> None:
        """Store the rewards `[n]` of step t."""
        _write(self._rewards, t, rewards)


def _write(columns: Any, t: int, values: Any) -> None:
    if isinstance(columns, np.ndarray):
        columns[t] = values.numpy() if isinstance(values, Tensor) else values
    else:
        columns[t].copy_(values if isinstance(values, Tensor) else to_device(values, columns.device))
