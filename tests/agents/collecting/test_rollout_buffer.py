"""The rollout buffer: gathered sequences and minibatches equal the stored steps."""

from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces

from srwm_rl import UserError
from srwm_rl.agents.collecting.rollout_buffer import SequenceRolloutBuffer

T, B, LENGTH = 6, 4, 3
VECTORS = spaces.Box(-1, 1, (2, 3), np.float32)
FRAMES = spaces.Dict({"frame": spaces.Box(0, 255, (4, 4, 3), np.uint8), "bit": spaces.Discrete(2)})
INDICES = [np.array([5, 0, 7]), np.array([2]), np.array([1, 6])]


def random_buffer(space: Any) -> SequenceRolloutBuffer:
    buffer = SequenceRolloutBuffer(T, space, spaces.MultiDiscrete([9, 9]), n_envs=B, sequence_length=LENGTH)
    buffer.reset(torch.zeros(2, B, 5))
    fields = (
        buffer.tensors.observations.values()
        if isinstance(buffer.tensors.observations, dict)
        else [buffer.tensors.observations]
    )
    for tensor in (*fields, buffer.tensors.actions, buffer._numbers, buffer.core_states):
        tensor.copy_(torch.randint(0, 100, tensor.shape))
    return buffer


@pytest.mark.parametrize("space", [VECTORS, FRAMES])
def test_gathered_sequences_equal_the_stored_steps(space: Any) -> None:
    buffer = random_buffer(space)
    for indices in INDICES:
        (batch,) = buffer.gather(indices)
        for i, index in enumerate(indices):
            chunk, env = divmod(int(index), B)
            steps = slice(chunk * LENGTH, (chunk + 1) * LENGTH)
            if isinstance(buffer.tensors.observations, dict):
                assert isinstance(batch.observations, dict)
                pairs = [(batch.observations[key], tensor) for key, tensor in buffer.tensors.observations.items()]
            else:
                assert isinstance(batch.observations, torch.Tensor)
                pairs = [(batch.observations, buffer.tensors.observations)]
            pairs += [
                (batch.actions, buffer.tensors.actions), (batch.episode_starts, buffer.tensors.episode_starts),
                (batch.old_values, buffer.tensors.values), (batch.old_log_probs, buffer.tensors.log_probs),
                (batch.advantages, buffer.tensors.advantages), (batch.returns, buffer.tensors.returns),
            ]  # fmt: skip
            for gathered, stored in pairs:
                assert gathered.shape == (LENGTH, len(indices), *stored.shape[2:])
                assert gathered.dtype == stored.dtype
                torch.testing.assert_close(gathered[:, i], stored[steps, env], rtol=0, atol=0)
            torch.testing.assert_close(batch.core_state[:, i], buffer.core_states[:, chunk * B + env], rtol=0, atol=0)


def test_micro_batches_hold_whole_sequences() -> None:
    buffer = random_buffer(VECTORS)
    (whole,) = buffer.gather(INDICES[0])
    parts = list(buffer.gather(INDICES[0], max_sequences=2))
    assert [part.actions.shape[1] for part in parts] == [2, 1]
    for name in ("observations", "actions", "returns", "core_state"):
        torch.testing.assert_close(torch.cat([getattr(part, name) for part in parts], dim=1), getattr(whole, name))


def test_advantages_of_equals_the_gathered_advantages() -> None:
    buffer = random_buffer(VECTORS)
    for indices in INDICES:
        torch.testing.assert_close(buffer.advantages_of(indices), next(buffer.gather(indices)).advantages)


def test_gathered_sequences_are_copies() -> None:
    buffer = random_buffer(VECTORS)
    (batch,) = buffer.gather(np.arange(buffer.n_sequences))
    before = batch.advantages.clone()
    buffer._numbers.zero_()
    torch.testing.assert_close(batch.advantages, before, rtol=0, atol=0)


@pytest.mark.parametrize(("n_sequences", "sizes"), [(3, [3, 3, 2]), (8, [8]), (1, [1] * 8)])
def test_minibatches_hold_each_sequence_once(n_sequences: int, sizes: list[int]) -> None:
    np.random.seed(0)
    buffer = random_buffer(VECTORS)
    buffer.tensors.values.copy_(torch.arange(T * B).view(T, B))
    batches = [next(parts) for parts, _ in buffer.get(n_sequences * LENGTH)]
    assert [batch.actions.shape[1] for batch in batches] == sizes
    steps = torch.cat([batch.old_values.flatten() for batch in batches])
    assert sorted(steps.tolist()) == list(range(T * B))


def test_sequences_must_divide_the_rollout() -> None:
    with pytest.raises(UserError, match="must divide"):
        SequenceRolloutBuffer(T, VECTORS, spaces.Discrete(2), sequence_length=4)
