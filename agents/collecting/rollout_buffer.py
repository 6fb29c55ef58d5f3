"""A rollout: T steps of B environments in their own types, and the core state with which each sequence began."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from srwm_rl.agents.engine.transfer import to_device
from srwm_rl.agents.losses.gae import generalized_advantages
from srwm_rl.errors import UserError
from srwm_rl.nn.policy import ActStep, Obs


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
        chunks, envs = np.divmod(np.arange(self.n_sequences), n_envs)
        self._first = chunks * (self.sequence_length * n_envs) + envs  # where each sequence begins, among all T * B
        self._steps = np.arange(self.sequence_length)[:, None] * n_envs  # and how far from there its steps are

    def reset(self, core_state: Tensor) -> None:
        """Forget the rollout, and make room for states like `core_state` `[L, B, S]`; the other memory is kept."""
        self.core_states = [torch.empty_like(core_state) for _ in range(self.buffer_size // self.sequence_length)]

    def steps(self, rows: slice = slice(None)) -> RolloutWriter:
        """Return what writes the steps of some of the environments into this rollout."""
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

    @property
    def sequence_bytes(self) -> int:
        """Bytes of one sequence, its core state included."""
        obs = self.observations.values() if isinstance(self.observations, dict) else [self.observations]
        size: int = sum(each.nbytes for each in (*obs, self.actions, self._numbers, *self.core_states))
        return size // self.n_sequences

    def minibatches(self, sequences_each: int) -> list[np.ndarray]:
        """Shuffle the sequences; return their indices in minibatches of (nearly) equal size, each sequence once."""
        order = np.random.permutation(self.n_sequences)
        return np.array_split(order, -(-self.n_sequences // sequences_each))

    def sequences(self, parts: Sequence[np.ndarray]) -> list[SequenceBatch]:
        """Gather whole sequences, all parts at once; index i is environment `i % B`, chunk `i // B`.

        Args:
            parts: indices of the sequences of each part, `[N]`.

        Returns:
            The parts, in memory that only they share.
        """
        rows, obs = self._rows(parts), self.observations
        observations: Any = (
            {key: self._cut(each.flatten(0, 1)[None], parts, rows) for key, each in obs.items()}
            if isinstance(obs, dict)
            else self._cut(obs.flatten(0, 1)[None], parts, rows)
        )
        actions = self._cut(self.actions.flatten(0, 1)[None], parts, rows)
        numbers = self._cut(self._numbers.flatten(1), parts, rows)
        states = self._states(np.concatenate(parts)).split([len(each) for each in parts], dim=1)
        found = []
        for i, state in enumerate(states):
            starts, values, log_probs, advantages, returns, _ = numbers[i]
            found.append(
                SequenceBatch(
                    observations={key: each[i][0] for key, each in observations.items()}
                    if isinstance(observations, dict)
                    else observations[i][0],
                    actions=actions[i][0],
                    episode_starts=starts,
                    old_values=values,
                    old_log_probs=log_probs,
                    advantages=advantages,
                    returns=returns,
                    core_state=state,
                )
            )
        return found

    def advantages_of(self, parts: Sequence[np.ndarray]) -> list[Tensor]:
        """Gather the advantages of sequences alone, `[T, N]` for each part of `sequences`."""
        return [each for (each,) in self._cut(self.advantages.flatten()[None], parts, self._rows(parts))]

    def _rows(self, parts: Sequence[np.ndarray]) -> Tensor:
        """Return where the parts' steps stand among all `T * B`, part by part, each of them time-major."""
        return to_device(np.concatenate([(self._steps + self._first[each]).ravel() for each in parts]), self.device)

    def _cut(self, stored: Tensor, parts: Sequence[np.ndarray], rows: Tensor) -> list[Tensor]:
        """Take rows of `[k, T * B, ...]`, and return each part's, `[k, T, N, ...]`."""
        # Not `stored[:, rows]`: for uint8 frames that is twenty times slower on a CPU.
        taken = stored.index_select(1, rows)
        sizes = [self.sequence_length * len(each) for each in parts]
        return [each.unflatten(1, (self.sequence_length, -1)) for each in taken.split(sizes, dim=1)]

    def _states(self, indices: np.ndarray) -> Tensor:
        if len(self.core_states) == 1:
            return self.core_states[0].index_select(1, to_device(indices, self.device))
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


class RolloutWriter:
    """Write what some environments play, step by step, into `[T, B, ...]` storage.

    On a CPU through NumPy's views of it: torch's `copy_` takes several times as long for a row of this size.

    Args:
        observations, episode_starts, actions, log_probs, rewards: the storage.
        core_states: `[L, B, S]`, of each sequence's first step.
        sequence_length: steps per sequence.
        values: storage too; None: they are not kept.
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
            {key: columns(each) for key, each in observations.items()}
            if isinstance(observations, dict)
            else columns(observations)
        )
        self._episode_starts, self._actions = columns(episode_starts), columns(actions)
        self._log_probs, self._rewards = columns(log_probs), columns(rewards)
        self._values = None if values is None else columns(values)
        self._core_states = [each[:, rows] for each in core_states]
        self._sequence_length = sequence_length

    def observe(self, t: int, obs: Any, episode_starts: np.ndarray) -> None:
        """Store what step t begins with: `obs` `[n, ...]`, arrays or tensors, and `episode_starts` `[n]`."""
        if isinstance(self._observations, dict):
            for key, each in self._observations.items():
                _write(each, t, obs[key])
        else:
            _write(self._observations, t, obs)
        _write(self._episode_starts, t, episode_starts)

    def act(self, t: int, acted: ActStep, core_state: Tensor) -> None:
        """Store what was done at step t, and `core_state` `[L, n, S]`, with which it began, if a sequence does."""
        if t % self._sequence_length == 0:
            self._core_states[t // self._sequence_length].copy_(core_state)
        _write(self._actions, t, acted.actions)
        _write(self._log_probs, t, acted.log_probs)
        if self._values is not None:
            _write(self._values, t, acted.values)

    def reward(self, t: int, rewards: np.ndarray) -> None:
        """Store what step t gave, `[n]`."""
        _write(self._rewards, t, rewards)


def _write(columns: Any, t: int, values: Any) -> None:
    if isinstance(columns, np.ndarray):
        columns[t] = values.numpy() if isinstance(values, Tensor) else values
    else:
        columns[t].copy_(values if isinstance(values, Tensor) else to_device(values, columns.device))
