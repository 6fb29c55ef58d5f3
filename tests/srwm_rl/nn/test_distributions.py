"""The distributions of discrete actions against torch's own."""

import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3.common.distributions import BernoulliDistribution, Distribution, MultiCategoricalDistribution
from torch.distributions import Categorical

from srwm_rl.nn.distributions import (
    GumbelCategorical,
    UncheckedBernoulli,
    UncheckedCategorical,
    UncheckedMultiCategorical,
)
from srwm_rl.nn.policy import SRWMPolicy


@pytest.mark.parametrize("shape", [(1,), (5,), (7, 2), (3, 4, 6)])
def test_probabilities_entropy_and_gradients_are_torchs(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    logits = 5 * torch.randn(shape, dtype=torch.float64)
    actions = torch.randint(shape[-1], shape[:-1])
    results = []
    for make in (GumbelCategorical, lambda logits: Categorical(logits=logits)):
        leaf = logits.clone().requires_grad_()
        distribution = make(leaf)
        (distribution.log_prob(actions).sin().sum() + distribution.entropy().cos().sum()).backward()
        stats = (distribution.log_prob(actions), distribution.entropy(), distribution.probs, distribution.mode)
        results.append((*(stat.detach() for stat in stats), leaf.grad))
    for ours, torchs in zip(*results, strict=True):
        torch.testing.assert_close(ours, torchs)


def test_samples_are_as_frequent_as_they_are_probable() -> None:
    torch.manual_seed(0)
    logits = torch.tensor([[0.0, 1.0, -2.0, 3.0], [4.0, 4.0, -30.0, 0.0]])
    n = 100_000
    drawn = GumbelCategorical(logits).sample(torch.Size([n]))  # [n, 2]
    assert drawn.shape == (n, 2)
    for row, probs in enumerate(logits.double().softmax(-1)):
        counts = torch.bincount(drawn[:, row], minlength=4)
        # Five standard deviations of a binomial count, and one for what is expected less than once.
        assert ((counts - n * probs).abs() <= 5 * (n * probs * (1 - probs)).sqrt() + 1).all()


def test_samples_of_one_step_have_its_shape_and_repeat_with_the_seed() -> None:
    distribution = GumbelCategorical(torch.zeros(64, 5))
    torch.manual_seed(3)
    first = distribution.sample()
    torch.manual_seed(3)
    assert first.shape == (64,)
    assert torch.equal(first, distribution.sample())
    assert len(set(first.tolist())) == 5


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_logits_give_non_finite_log_probabilities_and_no_error(value: float) -> None:
    distribution = GumbelCategorical(torch.tensor([[0.0, value], [0.0, 1.0]]))
    assert distribution.log_prob(distribution.sample()).isfinite().tolist() == [False, True]


def test_a_policy_of_discrete_actions_uses_the_unchecked_distribution() -> None:
    policy = SRWMPolicy(spaces.Box(-1, 1, (3,), np.float32), spaces.Discrete(4), lambda _: 0.0)
    state = policy.initial_state(2)
    distribution, _ = policy.get_distribution(torch.ones(2, 3), (state,), torch.ones(2))
    assert isinstance(distribution, UncheckedCategorical)
    probs = distribution.distribution.probs
    torch.testing.assert_close(probs.sum(-1), torch.ones(2))
    assert torch.equal(distribution.mode(), probs.argmax(-1))
    assert torch.equal(distribution.get_actions(deterministic=True), probs.argmax(-1))


PAIRS = [
    (UncheckedMultiCategorical([3, 4]), MultiCategoricalDistribution([3, 4])),
    (UncheckedBernoulli(7), BernoulliDistribution(7)),
]


@pytest.mark.parametrize(("ours", "sb3s"), PAIRS)
def test_composite_actions_have_sb3s_probabilities(ours: Distribution, sb3s: Distribution) -> None:
    torch.manual_seed(0)
    logits = 3 * torch.randn(5, 7)
    actual, expected = ours.proba_distribution(logits), sb3s.proba_distribution(logits)
    actions = expected.sample()
    torch.testing.assert_close(actual.log_prob(actions), expected.log_prob(actions))
    torch.testing.assert_close(actual.entropy(), expected.entropy())
    assert torch.equal(actual.mode(), expected.mode())
    drawn = actual.sample()
    assert (drawn.shape, drawn.dtype) == (actions.shape, actions.dtype)


@pytest.mark.parametrize(("ours", "sb3s"), PAIRS)
def test_composite_actions_are_sampled_as_often_as_sb3s(ours: Distribution, sb3s: Distribution) -> None:
    torch.manual_seed(0)
    logits = torch.tensor([0.0, 2.0, -1.0, 1.0, 0.5, -3.0, 0.0]).expand(50_000, 7)
    means = [family.proba_distribution(logits).sample().double().mean(0) for family in (ours, sb3s)]
    assert (means[0] - means[1]).abs().max() < 0.03  # over four standard deviations of a difference of means


@pytest.mark.parametrize(("ours", "sb3s"), PAIRS)
def test_nan_logits_of_composite_actions_give_nan_log_probabilities_and_no_error(
    ours: Distribution, sb3s: Distribution
) -> None:
    logits = torch.zeros(2, 7)
    logits[0, 1] = torch.nan
    distribution = ours.proba_distribution(logits)
    assert distribution.log_prob(distribution.sample()).isfinite().tolist() == [False, True]
