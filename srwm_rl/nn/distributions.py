"""The distributions of discrete actions, without what torch's do at every step besides: checks that wait for a GPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from stable_baselines3.common.distributions import (
    BernoulliDistribution,
    CategoricalDistribution,
    DiagGaussianDistribution,
    MultiCategoricalDistribution,
)
from torch import Tensor
from torch.distributions import Bernoulli, Categorical, Distribution, Normal


class CategoricalLogits(Categorical):
    """torch's `Categorical` over `logits` `[..., n]`, unchecked: from NaN logits come NaN log-probabilities.

    The check is the caller's (`srwm_rl.agents.engine.nan_guard.NanGuard` looks at the log-probabilities): torch's own costs more
    than the rest of a small policy's step and waits for the device; on a GPU, `torch.multinomial` ends the whole
    process's use of it when the check is off.
    """

    def __init__(self, logits: Tensor) -> None:
        self.logits = self._param = logits.log_softmax(-1)
        self._num_events = logits.shape[-1]
        Distribution.__init__(self, logits.shape[:-1], validate_args=False)

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draw `[*sample_shape, ...]` by an exponential sample_categorical: of exp_noise of rates p, number i rings first with p_i."""
        logits = self.logits.expand(*sample_shape, *self.logits.shape)
        return (logits - torch.empty_like(logits).exponential_().log_()).argmax(-1)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return log p of choices `[...]`."""
        return self.logits.gather(-1, value.long()[..., None])[..., 0]

    def entropy(self) -> Tensor:
        """Return the entropy in nats, `[...]`."""
        return -(self.logits.exp() * self.logits).sum(-1)


class Coins(Bernoulli):
    """torch's `Bernoulli` over `logits` `[..., n]`, unchecked, as a `CategoricalLogits` is."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__(logits=logits, validate_args=False)

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draw `[*sample_shape, ..., n]`, 0 or 1."""
        probs = self.probs.detach().expand(*sample_shape, *self.probs.shape)
        return (torch.rand_like(probs) < probs).to(probs.dtype)


class UncheckedCategorical(CategoricalDistribution):
    """SB3's distribution for Discrete actions, made of a `CategoricalLogits`."""

    def proba_distribution(self, action_logits: Tensor) -> UncheckedCategorical:
        """Take up logits `[B, n]`."""
        self.distribution = CategoricalLogits(action_logits)
        return self

    def mode(self) -> Tensor:
        """Return the most probable choices, `[B]`."""
        return self.distribution.logits.argmax(dim=1)


class UncheckedMultiCategorical(MultiCategoricalDistribution):
    """SB3's distribution for MultiDiscrete actions, made of `CategoricalLogits`s."""

    def proba_distribution(self, action_logits: Tensor) -> UncheckedMultiCategorical:
        """Take up logits `[B, sum n_i]`."""
        self.distribution = [CategoricalLogits(each) for each in action_logits.split([*self.action_dims], dim=1)]
        return self


class UncheckedBernoulli(BernoulliDistribution):
    """SB3's distribution for MultiBinary actions, made of `Coins`."""

    def proba_distribution(self, action_logits: Tensor) -> UncheckedBernoulli:
        """Take up logits `[B, n]`."""
        self.distribution = Coins(action_logits)
        return self


class UncheckedDiagGaussian(DiagGaussianDistribution):
    """SB3's distribution for Box actions over a `Normal` without argument checks: from NaN means come NaN actions."""

    def proba_distribution(self, mean_actions: Tensor, log_std: Tensor) -> UncheckedDiagGaussian:
        """Set means `[B, n]` and log standard deviations `[n]`."""
        self.distribution = Normal(mean_actions, log_std.exp().expand_as(mean_actions), validate_args=False)
        return self
