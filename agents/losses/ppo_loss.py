"""PPO's clipped loss as a pure function of `[T, B]` tensors."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

Scalar = float | Tensor


class PPOLossSums(NamedTuple):
    """PPO's loss terms and diagnostics, scalars `[]` summed over steps; divided by the steps they are SB3's means."""

    policy_loss: Tensor
    value_loss: Tensor
    entropy: Tensor
    approx_kl: Tensor
    clip_fraction: Tensor


def ppo_loss(
    values: Tensor,
    log_probs: Tensor,
    entropy: Tensor,
    old_values: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    returns: Tensor,
    clip_range: Scalar,
    clip_range_vf: Scalar | None = None,
) -> PPOLossSums:
    """Sum PPO's clipped surrogate (Schulman et al., 2017, eq. 7, https://arxiv.org/abs/1707.06347) and its other terms.

    Args:
        values, log_probs, entropy: `[T, B]`, of the policy being trained.
        old_values, old_log_probs: `[T, B]`, of the policy that acted.
        advantages, returns: `[T, B]`.
        clip_range: bounds the probability ratio to `1 +- clip_range`.
        clip_range_vf: bounds the change of a value; None: unbounded.

    Raises:
        ValueError: shapes that differ.
    """
    shapes = {tuple(x.shape) for x in (values, log_probs, entropy, old_values, old_log_probs, advantages, returns)}
    if len(shapes) > 1:
        raise ValueError(f"all tensors of ppo_loss must be [T, B]; they are {sorted(shapes)}")
    log_ratio = log_probs - old_log_probs
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)  # type: ignore[arg-type]  # both are of one kind
    surrogate = torch.min(advantages * ratio, advantages * clipped)
    if clip_range_vf is not None:
        values = old_values + (values - old_values).clamp(-clip_range_vf, clip_range_vf)  # type: ignore[arg-type]
    with torch.no_grad():
        approx_kl = ((ratio - 1) - log_ratio).sum()  # http://joschu.net/blog/kl-approx.html
        clip_fraction = ((ratio - 1).abs() > clip_range).float().sum()
    return PPOLossSums(-surrogate.sum(), (returns - values).square().sum(), entropy.sum(), approx_kl, clip_fraction)
