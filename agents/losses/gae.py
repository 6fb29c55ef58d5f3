"""Generalised advantage estimation as pure functions of `[T, B]` tensors."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Advantages(NamedTuple):
    """Advantages and value targets of an unroll."""

    advantages: Tensor  # [T, B]
    returns: Tensor  # [T, B], the value targets


def generalized_advantages(
    rewards: Tensor,
    values: Tensor,
    episode_ends: Tensor,
    bootstrap_value: Tensor,
    gamma: float,
    gae_lambda: float,
) -> Advantages:
    """Estimate advantages by GAE (Schulman et al., 2016, eq. 16, https://arxiv.org/abs/1506.02438).

    Args:
        rewards: `[T, B]`; where an episode was truncated, the discounted value of its last state is already added.
        values: `[T, B]`, the critic's.
        episode_ends: `[T, B]`; where non-zero, the episode ended with step t and nothing after it counts.
        bootstrap_value: `[B]`, the value of the state after the unroll.
        gamma: discount per step.
        gae_lambda: 0 is one-step, 1 is Monte Carlo.

    Raises:
        ValueError: shapes that do not fit.
    """
    if not rewards.shape == values.shape == episode_ends.shape or bootstrap_value.shape != rewards.shape[1:]:
        raise ValueError(
            f"rewards {list(rewards.shape)}, values {list(values.shape)} and episode_ends {list(episode_ends.shape)} "
            f"must be [T, B], bootstrap_value {list(bootstrap_value.shape)} must be [B]"
        )
    discounts = gamma * (episode_ends == 0).to(values.dtype)  # [T, B]
    next_values = torch.cat((values[1:], bootstrap_value[None]))  # [T, B]
    deltas = rewards + discounts * next_values - values
    decays = gae_lambda * discounts  # [T, B]
    advantages = decayed_sums(deltas, decays)
    return Advantages(advantages, advantages + values)


def decayed_sums(deltas: Tensor, decays: Tensor) -> Tensor:
    """Return `s_t = delta_t + decay_t s_{t+1}` for `[T, B]` each, where nothing follows the last step."""
    last, sums = torch.zeros_like(deltas[0]), []
    for delta, decay in zip(reversed(deltas.unbind()), reversed(decays.unbind()), strict=True):
        last = delta + decay * last
        sums.append(last)
    return torch.stack(sums[::-1])
