"""Action distributions without torch's argument checks, which wait for the GPU at every step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.distributions import (
    BernoulliDistribution,
    CategoricalDistribution,
    DiagGaussianDistribution,
    MultiCategoricalDistribution,
)
from stable_baselines3.common.distributions import Distribution as SB3Distribution
from torch import Tensor
from torch.distributions import Bernoulli, Categorical, Distribution, Normal


class GumbelCategorical(Categorical):
    """torch's `Categorical` over `logits` `[..., n]`, unchecked and sampled with the Gumbel-max trick.

    NaN logits give NaN log-probabilities, which `srwm_rl.agents.engine.nan_guard.NanGuard` looks for. torch's check
    takes longer than the rest of a small policy's step and waits for the device; without it, NaN makes
    `torch.multinomial` end the process's use of the GPU.
    """

    def __init__(self, logits: Tensor) -> None:
        self.logits = self._param = logits.log_softmax(-1)
        self._num_events = logits.shape[-1]
        Distribution.__init__(self, logits.shape[:-1], validate_args=False)

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draw `[*sample_shape, ...]`."""
        logits = self.logits.expand(*sample_shape, *self.logits.shape)
        return (logits - torch.empty_like(logits).exponential_().log_()).argmax(-1)


class UniformBernoulli(Bernoulli):
    """torch's `Bernoulli` over `logits` `[..., n]`, unchecked and sampled by comparing with uniform numbers."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__(logits=logits, validate_args=False)

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draw `[*sample_shape, ..., n]`, 0 or 1."""
        probs = self.probs.detach().expand(*sample_shape, *self.probs.shape)
        return (torch.rand_like(probs) < probs).to(probs.dtype)


class UncheckedCategorical(CategoricalDistribution):
    """SB3's distribution for Discrete actions, over a `GumbelCategorical`."""

    def proba_distribution(self, action_logits: Tensor) -> UncheckedCategorical:
        """Set logits `[B, n]`."""
        self.distribution = GumbelCategorical(action_logits)
        return self

    def mode(self) -> Tensor:
        """Return the most probable actions, `[B]`."""
        return self.distribution.logits.argmax(dim=1)


class UncheckedMultiCategorical(MultiCategoricalDistribution):
    """SB3's distribution for MultiDiscrete actions, over one `GumbelCategorical` per part of the action."""

    def proba_distribution(self, action_logits: Tensor) -> UncheckedMultiCategorical:
        """Set logits `[B, sum n_i]`."""
        self.distribution = [GumbelCategorical(logits) for logits in action_logits.split([*self.action_dims], dim=1)]
        return self


class UncheckedBernoulli(BernoulliDistribution):
    """SB3's distribution for MultiBinary actions, over a `UniformBernoulli`."""

    def proba_distribution(self, action_logits: Tensor) -> UncheckedBernoulli:
        """Set logits `[B, n]`."""
        self.distribution = UniformBernoulli(action_logits)
        return self


class UncheckedDiagGaussian(DiagGaussianDistribution):
    """SB3's distribution for Box actions, over a `Normal` without argument checks."""

    def proba_distribution(self, mean_actions: Tensor, log_std: Tensor) -> UncheckedDiagGaussian:
        """Set means `[B, n]` and log standard deviations `[n]`."""
        self.distribution = Normal(mean_actions, log_std.exp().expand_as(mean_actions), validate_args=False)
        return self


def make_distribution(action_space: spaces.Space[Any]) -> SB3Distribution:
    """Return the distribution of an action space that `srwm_rl.nn.spaces.check_action_space` accepts."""
    if isinstance(action_space, spaces.Discrete):
        return UncheckedCategorical(int(action_space.n))
    if isinstance(action_space, spaces.MultiDiscrete):
        return UncheckedMultiCategorical(action_space.nvec.ravel().tolist())
    if isinstance(action_space, spaces.MultiBinary):
        return UncheckedBernoulli(*action_space.shape)
    assert isinstance(action_space, spaces.Box)
    return UncheckedDiagGaussian(int(np.prod(action_space.shape)))
