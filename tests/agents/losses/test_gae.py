"""GAE equals its definition, written as a sum."""

import pytest
import torch

from srwm_rl.agents.losses.gae import generalized_advantages


def gae_by_definition(
    rewards: torch.Tensor, values: torch.Tensor, ends: torch.Tensor, last: torch.Tensor, gamma: float, lam: float
) -> torch.Tensor:
    """Return Schulman et al., 2016, eq. 16, term by term."""
    n_steps, batch = rewards.shape
    following = torch.cat((values, last[None]))
    result = torch.zeros_like(rewards)
    for b in range(batch):
        for t in range(n_steps):
            weight = 1.0
            for k in range(t, n_steps):
                alive = 0.0 if ends[k, b] else 1.0
                delta = rewards[k, b] + gamma * alive * following[k + 1, b] - values[k, b]
                result[t, b] += weight * delta
                weight *= gamma * lam * alive
    return result


@pytest.mark.parametrize(("gamma", "lam"), [(0.99, 0.95), (1.0, 1.0), (0.9, 0.0)])
def test_gae_equals_its_definition(gamma: float, lam: float) -> None:
    generator = torch.Generator().manual_seed(0)
    rewards, values = (torch.randn(12, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    ends = torch.rand(12, 4, generator=generator) < 0.2
    last = torch.randn(4, generator=generator, dtype=torch.float64)
    result = generalized_advantages(rewards, values, ends, last, gamma, lam)
    expected = gae_by_definition(rewards, values, ends, last, gamma, lam)
    torch.testing.assert_close(result.advantages, expected)
    torch.testing.assert_close(result.returns, expected + values)


def test_advantages_do_not_cross_an_episodes_end() -> None:
    rewards, values = torch.zeros(4, 1), torch.zeros(4, 1)
    ends = torch.tensor([[0.0], [1.0], [0.0], [0.0]])
    rewards[2] = 7.0
    result = generalized_advantages(rewards, values, ends, torch.tensor([5.0]), 0.9, 0.9)
    assert not result.advantages[:2].any()
    assert result.advantages[2] > 7


def test_wrong_shapes_are_refused_by_name() -> None:
    square = torch.zeros(3, 2)
    with pytest.raises(ValueError, match="bootstrap_value"):
        generalized_advantages(square, square, square, torch.zeros(3), 0.9, 0.9)
    with pytest.raises(ValueError, match="rewards"):
        generalized_advantages(square[:2], square, square, torch.zeros(2), 0.9, 0.9)
