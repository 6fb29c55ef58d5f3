"""V-trace: off-policy corrected value targets and advantages, as pure functions of `[T, B]` tensors."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from srwm_rl.agents.losses.gae import decayed_sums


class VTrace(NamedTuple):
    """V-trace targets of an unroll, without gradient."""

    vs: Tensor  # [T, B], the value targets
    pg_advantages: Tensor  # [T, B], weights of the policy gradient


def vtrace(
    log_rhos: Tensor,
    discounts: Tensor,
    rewards: Tensor,
    values: Tensor,
    bootstrap_value: Tensor,
    *,
    vtrace_lambda: float = 1.0,
    rho_clip: float | None = 1.0,
    pg_rho_clip: float | None = 1.0,
    c_clip: float | None = 1.0,
) -> VTrace:
    """Correct for the lag between the policy that acted and the one that learns.

    Espeholt et al., 2018, eq. 1 and section 4.1 (https://arxiv.org/abs/1802.01561):

        rho_t = min(rho_clip, pi/mu);   c_t = lambda min(c_clip, pi/mu)
        delta_t = rho_t (r_t + gamma_t V_{t+1} - V_t)
        vs_t = V_t + delta_t + gamma_t c_t (vs_{t+1} - V_{t+1})
        pg_advantage_t = min(pg_rho_clip, pi/mu) (r_t + gamma_t vs_{t+1} - V_t)

    Args:
        log_rhos: `[T, B]`, `log pi - log mu` of the actions taken: learner minus actor.
        discounts: `[T, B]`, gamma, or 0 where the episode ended with step t.
        rewards: `[T, B]`.
        values: `[T, B]`, the learner's.
        bootstrap_value: `[B]`, the learner's value of the state after the unroll.
        vtrace_lambda: 1 as in the paper; less trades variance for bias, as in GAE.
        rho_clip: bounds the bias of what is learned; None: no clipping.
        pg_rho_clip: the same for the policy gradient's weight.
        c_clip: bounds how far a correction travels back, hence the variance.

    Raises:
        ValueError: shapes that do not fit.
    """
    same = log_rhos.shape == discounts.shape == rewards.shape == values.shape
    if not same or bootstrap_value.shape != values.shape[1:]:
        raise ValueError(
            f"log_rhos {list(log_rhos.shape)}, discounts {list(discounts.shape)}, rewards {list(rewards.shape)} and "
            f"values {list(values.shape)} must be [T, B], bootstrap_value {list(bootstrap_value.shape)} must be [B]"
        )
    with torch.no_grad():
        rhos = log_rhos.exp()  # [T, B]
        cs = vtrace_lambda * _clipped(rhos, c_clip)
        next_values = torch.cat((values[1:], bootstrap_value[None]))
        deltas = _clipped(rhos, rho_clip) * (rewards + discounts * next_values - values)
        vs = values + decayed_sums(deltas, discounts * cs)
        next_vs = torch.cat((vs[1:], bootstrap_value[None]))
        pg_advantages = _clipped(rhos, pg_rho_clip) * (rewards + discounts * next_vs - values)
    return VTrace(vs, pg_advantages)


def _clipped(ratios: Tensor, at: float | None) -> Tensor:
    return ratios if at is None else ratios.clamp(max=at)
