"""IMPALA's loss with V-trace targets as a pure function of `[T, B]` tensors."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from srwm_rl.agents.losses.vtrace import vtrace


class IMPALALossSums(NamedTuple):
    """IMPALA's loss terms and diagnostics, scalars `[]` summed over steps."""

    policy_loss: Tensor
    value_loss: Tensor  # half the squared errors, as in the paper
    entropy: Tensor
    rho: Tensor  # learner's probability of the action taken over the actor's
    rho_clipped: Tensor  # number of ratios above 1


def impala_loss(
    values: Tensor,
    log_probs: Tensor,
    entropy: Tensor,
    actor_log_probs: Tensor,
    rewards: Tensor,
    episode_starts: Tensor,
    gamma: float,
    vtrace_lambda: float = 1.0,
    **clips: float | None,
) -> IMPALALossSums:
    """Sum IMPALA's loss terms (Espeholt et al., 2018, https://arxiv.org/abs/1802.01561) over unrolls of T steps.

    Args:
        values, log_probs, entropy: `[T + 1, B]`, the learner's; step T only bootstraps the value.
        actor_log_probs: `[T, B]`, of the policy that acted.
        rewards: `[T, B]`.
        episode_starts: `[T + 1, B]`; step t ended an episode where step t + 1 starts one.
        gamma: discount per step.
        vtrace_lambda, clips: see `srwm_rl.agents.losses.vtrace.vtrace`.

    Raises:
        ValueError: shapes that do not fit.
    """
    log_probs = log_probs[:-1]
    log_rhos = (log_probs - actor_log_probs).detach()
    discounts, old_values = gamma * (episode_starts[1:] == 0), values.detach()
    targets = vtrace(
        log_rhos, discounts, rewards, old_values[:-1], old_values[-1], vtrace_lambda=vtrace_lambda, **clips
    )
    return IMPALALossSums(
        policy_loss=-(log_probs * targets.pg_advantages).sum(),
        value_loss=0.5 * (targets.vs - values[:-1]).square().sum(),
        entropy=entropy[:-1].sum(),
        rho=log_rhos.exp().sum(),
        rho_clipped=(log_rhos > 0).float().sum(),
    )
