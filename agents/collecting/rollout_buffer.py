"""The rollout buffer: T steps of B environments, and the core state at the start of each training sequence."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import repeat
from typing import Any, NamedTuple

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from srwm_rl.agents.engine.transfer import map_obs, to_device
from srwm_rl.agents.losses.gae import generalized_advantages
from srwm_rl.errors import UserError
from srwm_rl.nn.policy import ActStep, Obs

MeanAndStd = tuple[Tensor, Tensor] | None
Minibatch = tuple[Iterator["SequenceBatch"], int]  # parts that go through the network one by one; steps in all


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


class RolloutTensors(NamedTuple):
    """A rollout of T steps of B environments."""

    observations: Obs  # [T, B, ...]
    actions: Tensor  # [T, B, *action_shape]
    episode_starts: Tensor  # [T, B]
    values: Tensor  # [T, B]
    log_probs: Tensor  # [T, B]
    advantages: Tensor  # [T, B]
    returns: Tensor  # [T, B]
    rewards: Tensor  # [T, B]


class SequenceRolloutBuffer:
    """Rollout storage for recurrent training; SB3's constructor, so that `OnPolicyAlgorithm` can build it.

    Frames stay uint8. States are kept only where a sequence begins: for 2 x 8 heads x 16, 256 steps and 64 environments
    that is 3.4 MB, where a state per step (sb3-contrib keeps four) would be 0.9 GB each.

    `observations`, `actions`, `rewards`, `values`, `log_probs`, `advantages`, `returns` and `episode_starts` are arrays
    `[T, B, ...]` as in SB3: views of `tensors` on the CPU, copies from a GPU, where they are complete
    when the rollout is.

    Args:
        buffer_size: T, steps per environment.
        observation_space, action_space: the environment's.
        device: where the rollout lives.
        gae_lambda, gamma: for `generalized_advantages`.
        n_envs: B.
        sequence_length: length of the training sequences; must divide T; None: T.

    Attributes:
        tensors: the rollout, on `device`.
        pos: number of steps per environment that are written.

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
        # One number per step each, in one tensor, so that a minibatch gathers them all at once.
        self._numbers = torch.zeros(6, *shape, device=self.device)
        observations = storage(shape, observation_space, self.device)
        actions = action_storage(shape, action_space, self.device)
        self.tensors = RolloutTensors(observations, actions, *self._numbers)
        self.pos = 0
        self.core_states = torch.empty(0)  # [L, n_sequences, S] at the start of each
        chunks, envs = np.divmod(np.arange(self.n_sequences), n_envs)
        self._first = chunks * (self.sequence_length * n_envs) + envs  # first step of each sequence, among all T * B
        self._steps = np.arange(self.sequence_length)[:, None] * n_envs  # offsets of a sequence's steps

    def reset(self, core_state: Tensor) -> None:
        """Begin a new rollout with core states like `core_state` `[L, B, S]`; all other storage is reused."""
        self.core_states = core_state.new_empty(len(core_state), self.n_sequences, core_state.shape[2])
        self.pos = 0

    def __getattr__(self, name: str) -> Any:
        # Only for names that are not found otherwise: SB3's arrays.
        if name not in RolloutTensors._fields:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return map_obs(lambda tensor: tensor.cpu().numpy(), getattr(self.tensors, name))

    @property
    def full(self) -> bool:
        """Whether all steps of the rollout are written."""
        return self.pos == self.buffer_size

    def size(self) -> int:
        """Return the number of steps per environment that are written."""
        return self.pos

    def compute_returns_and_advantage(self, last_values: Tensor, dones: np.ndarray) -> None:
        """Fill `advantages` and `returns`.

        Args:
            last_values: `[B]`, of the state after the rollout.
            dones: `[B]`, whether the last step ended an episode.
        """
        last = to_device(dones, self.device).float()[None]
        episode_ends = torch.cat(
            (self.tensors.episode_starts[1:], last)
        )  # step t ended an episode where t + 1 starts one
        tensors = self.tensors
        result = generalized_advantages(
            tensors.rewards, tensors.values, episode_ends, last_values, self.gamma, self.gae_lambda
        )
        tensors.advantages.copy_(result.advantages)
        tensors.returns.copy_(result.returns)

    @property
    def n_sequences(self) -> int:
        """Number of sequences in a full rollout."""
        return self.n_envs * (self.buffer_size // self.sequence_length)

    def n_minibatches(self, batch_size: int) -> int:
        """Return into how many minibatches of at most `batch_size` steps `get` divides a rollout."""
        return -(-self.n_sequences // (batch_size // self.sequence_length))

    def get(
        self,
        batch_size: int,
        max_sequences: int | None = None,
        advantage_stats: Callable[[list[Tensor]], Iterable[MeanAndStd]] | None = None,
    ) -> Iterator[Minibatch]:
        """Shuffle the sequences and yield minibatches of (nearly) equal size, each sequence once.

        Args:
            batch_size: steps per minibatch, at least `sequence_length`.
            max_sequences: most sequences in a part of a minibatch; None: minibatches have one part.
            advantage_stats: maps the minibatches' advantages, `[T, N]` each, to the mean and standard deviation by
                which each is normalised, or None; None: advantages are not normalised.
        """
        order = np.random.permutation(self.n_sequences)
        minibatches = np.array_split(order, self.n_minibatches(batch_size))
        stats = advantage_stats(list(map(self.advantages_of, minibatches))) if advantage_stats else repeat(None)
        for indices, mean_and_std in zip(minibatches, stats, strict=False):
            parts = self.gather(indices, max_sequences, mean_and_std)
            yield parts, len(indices) * self.sequence_length

    def gather(
        self, indices: np.ndarray, max_sequences: int | None = None, mean_and_std: MeanAndStd = None
    ) -> Iterator[SequenceBatch]:
        """Yield whole sequences, at most `max_sequences` at once, gathered when they are asked for.

        Args:
            indices: `[N]`; index i is environment `i % B`, chunk `i // B`.
            max_sequences: None: all of them.
            mean_and_std: `[]` each, by which advantages are normalised.
        """
        n_parts = 1 if max_sequences is None else -(-len(indices) // max_sequences)
        for part in np.array_split(indices, n_parts):
            batch = self._gather_sequences(part)
            if mean_and_std is not None:
                mean, std = mean_and_std
                batch = batch._replace(advantages=(batch.advantages - mean) / (std + 1e-8))
            yield batch

    def _gather_sequences(self, indices: np.ndarray) -> SequenceBatch:
        rows = self._rows(indices)
        starts, *others, _ = self._gather(self._numbers, rows, dim=1)
        observations = map_obs(partial(self._gather, rows=rows), self.tensors.observations)
        core_states = self.core_states.index_select(1, to_device(indices, self.device))
        return SequenceBatch._make(
            (observations, self._gather(self.tensors.actions, rows), starts, *others, core_states)
        )

    def advantages_of(self, indices: np.ndarray) -> Tensor:
        """Return the advantages of sequences, `[T, N]`."""
        return self._gather(self.tensors.advantages, self._rows(indices))

    def _rows(self, indices: np.ndarray) -> Tensor:
        """Return the positions of the sequences' steps among all `T * B`, time-major."""
        return to_device((self._steps + self._first[indices]).ravel(), self.device)

    def _gather(self, stored: Tensor, rows: Tensor, dim: int = 0) -> Tensor:
        """Gather rows of dimensions `[T, B]`, of which the first is `dim`, into `[T, N]`."""
        # Not `stored[rows]`: for uint8 frames that is twenty times slower on a CPU.
        gathered = stored.flatten(dim, dim + 1).index_select(dim, rows)
        return gathered.unflatten(dim, (self.sequence_length, -1))  # type: ignore[no-any-return]


def storage(shape: tuple[int, int], space: spaces.Space[Any], device: torch.device) -> Any:
    """Return zeros `[T, B, *space.shape]` of the space's dtype; a dict of them for a Dict space."""
    if isinstance(space, spaces.Dict):
        return {key: storage(shape, part, device) for key, part in space.spaces.items()}
    dtype = torch.from_numpy(np.empty(0, space.dtype)).dtype
    return torch.zeros((*shape, *(space.shape or ())), dtype=dtype, device=device)


def action_storage(shape: tuple[int, int], space: spaces.Space[Any], device: torch.device) -> Tensor:
    """Return zeros `[T, B, *space.shape]` for actions: a Gaussian's samples as float32, whatever the dtype of a Box."""
    if isinstance(space, spaces.Box):
        return torch.zeros((*shape, *space.shape), device=device)
    return storage(shape, space, device)  # type: ignore[no-any-return]


class RolloutWriter:
    """Writes steps of some environments into `[T, B, ...]` storage, as NumPy arrays.

    On a CPU these are views: torch's `copy_` takes several times as long for a row of this size. Storage elsewhere is
    filled at the end of the rollout, in one copy for each kind of number, and with observations that are there already.

    Args:
        stored: `RolloutTensors` or `Unrolls`, with `values` or without.
        core_states: `[L, sequences, S]`, of each one's first step, to be written.
        rows: which of the B environments.

    Attributes:
        observations: these environments' part of the storage, `[T, n, ...]`, or `[T + 1, n, ...]` of `Unrolls`.
    """

    def __init__(self, stored: Any, core_states: Tensor, rows: slice = slice(None)) -> None:
        self.stored = stored
        self.observations: Obs = map_obs(lambda tensor: tensor[:, rows], stored.observations)
        self._on_host = core_states.device.type == "cpu"
        self._obs_arrays = map_obs(lambda own: own.numpy(), self.observations) if self._on_host else None
        self._arrays: dict[str, np.ndarray] = {}
        self._not_filled: list[tuple[Tensor, np.ndarray]] = []  # storage on the device, and what is to be copied to it
        for name in ("episode_starts", "actions", "log_probs", "rewards", "values"):
            if hasattr(stored, name):
                own = getattr(stored, name)[:, rows]
                self._arrays[name] = own.numpy() if self._on_host else torch.zeros_like(own, device="cpu").numpy()
                if not self._on_host:
                    self._not_filled.append((own, self._arrays[name]))
        chunks = core_states.unflatten(1, (-1, stored.actions.shape[1])).unbind(1)
        self._core_states = [states[:, rows] for states in chunks]
        self._sequence_length = len(stored.actions) // len(chunks)

    def observe(self, t: int, obs: Any, episode_starts: np.ndarray) -> None:
        """Store the observations `[n, ...]` (on a CPU) and `episode_starts` `[n]` of step t."""
        if isinstance(self._obs_arrays, dict):
            for key, array in self._obs_arrays.items():
                array[t] = obs[key]
        elif self._obs_arrays is not None:
            self._obs_arrays[t] = obs
        self._arrays["episode_starts"][t] = episode_starts

    def act(self, t: int, acted: ActStep, core_state: Tensor) -> None:
        """Store the policy's step t, and if a sequence begins there its `core_state` `[L, n, S]`."""
        if t % self._sequence_length == 0:
            self._core_states[t // self._sequence_length].copy_(core_state)
        self._arrays["actions"][t] = acted.actions.numpy()
        self._arrays["log_probs"][t] = acted.log_probs.numpy()
        if "values" in self._arrays:
            self._arrays["values"][t] = acted.values.numpy()

    def reward(self, t: int, rewards: np.ndarray) -> None:
        """Store the rewards `[n]` of step t."""
        self._arrays["rewards"][t] = rewards

    def finish(self, observations: Obs | None) -> None:
        """Fill storage that is not on a CPU, with `observations` `[T + 1, n, ...]`."""
        for own, array in self._not_filled:
            own.copy_(to_device(array, own.device))
        if observations is not None:
            map_obs(lambda own, tensor: own.copy_(tensor[: len(own)]), self.observations, observations)
