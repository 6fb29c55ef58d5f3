"""What an IMPALA batch adds up: the loss's terms, with V-trace's targets."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from srwm_rl.agents.collecting.unroll_queue import Unrolls
from srwm_rl.agents.losses.vtrace import vtrace
from srwm_rl.nn.policy import SequenceEvaluation


class IMPALALossSums(NamedTuple):
    """Sums over steps of what an IMPALA batch adds up."""

    policy_loss: Tensor
    value_loss: Tensor  # sum of half the squared distances, as in the paper
    entropy: Tensor
    rho: Tensor  # learner's over actor's probability of the action taken
    rho_clipped: Tensor  # how often that ratio was above 1


class VTraceSettings(NamedTuple):
    """How V-trace corrects; see `srwm_rl.agents.losses.vtrace.vtrace`."""

    vtrace_lambda: float
    rho_clip: float | None
    pg_rho_clip: float | None
    c_clip: float | None


def impala_loss_sums(
    new: SequenceEvaluation, unrolls: Unrolls, gamma: float, correction: VTraceSettings
) -> IMPALALossSums:
    """Add up the loss of N unrolls of T steps.

    Args:
        new: what the learner's policy says of their steps and of the one that follows, `[T + 1, N]`.
        unrolls: what was played.
        gamma: discount.
        correction: of the lag between the policy that acted and the learner's.
    """
    values, log_probs = new.values[:-1], new.log_probs[:-1]
    log_rhos = (log_probs - unrolls.log_probs).detach()
    targets = vtrace(
        log_rhos,
        gamma * (unrolls.episode_starts[1:] == 0),  # step t ended an episode where t + 1 starts one
        unrolls.rewards,
        values.detach(),
        new.values[-1].detach(),
        **correction._asdict(),
    )
    return IMPALALossSums(
        policy_loss=-(log_probs * targets.pg_advantages).sum(),
        value_loss=0.5 * (targets.vs - values).square().sum(),
        entropy=new.entropy[:-1].sum(),
        rho=log_rhos.exp().sum(),
        rho_clipped=(log_rhos > 0).float().sum(),
    )
