"""Rollouts: what is gathered from them is what stood there, sequence by sequence."""

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
PARTS = [np.array([5, 0, 7]), np.array([2]), np.array([1, 6])]


def filled(space: Any) -> SequenceRolloutBuffer:
    buffer = SequenceRolloutBuffer(T, space, spaces.MultiDiscrete([9, 9]), n_envs=B, sequence_length=LENGTH)
    buffer.reset(torch.zeros(2, B, 5))
    fields = buffer.observations.values() if isinstance(buffer.observations, dict) else [buffer.observations]
    for each in (*fields, buffer.actions, buffer._numbers, *buffer.core_states):
        each.copy_(torch.randint(0, 100, each.shape))
    return buffer


@pytest.mark.parametrize("space", [VECTORS, FRAMES])
def test_each_part_holds_its_sequences(space: Any) -> None:
    buffer = filled(space)
    for indices in PARTS:
        (found,) = buffer.gather(indices)
        for i, index in enumerate(indices):
            chunk, env = divmod(int(index), B)
            steps = slice(chunk * LENGTH, (chunk + 1) * LENGTH)
            if isinstance(buffer.observations, dict):
                assert isinstance(found.observations, dict)
                pairs = [(found.observations[key], each) for key, each in buffer.observations.items()]
            else:
                assert isinstance(found.observations, torch.Tensor)
                pairs = [(found.observations, buffer.observations)]
            pairs += [
                (found.actions, buffer.actions), (found.episode_starts, buffer.episode_starts),
                (found.old_values, buffer.values), (found.old_log_probs, buffer.log_probs),
                (found.advantages, buffer.advantages), (found.returns, buffer.returns),
            ]  # fmt: skip
            for one, stored in pairs:
                assert one.shape == (LENGTH, len(indices), *stored.shape[2:])
                assert one.dtype == stored.dtype
                torch.testing.assert_close(one[:, i], stored[steps, env], rtol=0, atol=0)
            torch.testing.assert_close(found.core_state[:, i], buffer.core_states[chunk][:, env], rtol=0, atol=0)


def test_a_minibatch_is_gathered_in_parts_of_whole_sequences() -> None:
    buffer = filled(VECTORS)
    (whole,) = buffer.gather(PARTS[0])
    parts = list(buffer.gather(PARTS[0], max_sequences=2))
    assert [part.actions.shape[1] for part in parts] == [2, 1]
    for name in ("observations", "actions", "returns", "core_state"):
        torch.testing.assert_close(torch.cat([getattr(part, name) for part in parts], dim=1), getattr(whole, name))


def test_advantages_can_be_gathered_alone() -> None:
    buffer = filled(VECTORS)
    for indices in PARTS:
        torch.testing.assert_close(buffer.advantages_of(indices), next(buffer.gather(indices)).advantages)


def test_what_was_gathered_stays_when_the_next_rollout_is_written() -> None:
    buffer = filled(VECTORS)
    (batch,) = buffer.gather(np.arange(buffer.n_sequences))
    before = batch.advantages.clone()
    buffer._numbers.zero_()
    torch.testing.assert_close(batch.advantages, before, rtol=0, atol=0)


@pytest.mark.parametrize(("n_sequences", "sizes"), [(3, [3, 3, 2]), (8, [8]), (1, [1] * 8)])
def test_minibatches_hold_each_sequence_once(n_sequences: int, sizes: list[int]) -> None:
    np.random.seed(0)
    buffer = filled(VECTORS)
    buffer.values.copy_(torch.arange(T * B).view(T, B))
    batches = [next(iter(batch.parts)) for batch in buffer.get(n_sequences * LENGTH)]
    assert [batch.actions.shape[1] for batch in batches] == sizes
    steps = torch.cat([batch.old_values.flatten() for batch in batches])
    assert sorted(steps.tolist()) == list(range(T * B))


def test_sequences_must_divide_the_rollout() -> None:
    with pytest.raises(UserError, match="must divide"):
        SequenceRolloutBuffer(T, VECTORS, spaces.Discrete(2), sequence_length=4)
