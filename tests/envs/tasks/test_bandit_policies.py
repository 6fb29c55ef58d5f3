"""The classical bandit policies: their choices by their definitions, and their returns."""

import math

import numpy as np
import pytest

from srwm_rl.envs.tasks import BanditBatch
from srwm_rl.envs.tasks.bandit import LONGEST_PLAYED, bayes_optimal_return
from srwm_rl.envs.tasks.bandit_policies import (
    EPSILON,
    RATES,
    BayesOptimal,
    Policy,
    Results,
    epsilon_greedy,
    gittins_table,
    thompson_sampling,
    ucb1,
)


def results(wins: list[float], tries: list[float], n: int = 1) -> Results:
    """Return equal results of `n` bandits."""
    return Results(np.arange(n), int(sum(tries)), np.tile(wins, (n, 1)), np.tile(tries, (n, 1)))


def test_ucb1_pulls_unknown_arms_first_and_then_the_highest_bound() -> None:
    arms = ucb1(results([1, 0, 0], [1, 0, 0], 3000))
    assert set(arms.tolist()) == {1, 2}
    assert np.mean(arms == 1) == pytest.approx(0.5, abs=0.05)
    rng = np.random.default_rng(0)
    for _ in range(50):
        tries = rng.integers(1, 9, 4).astype(float)
        wins = np.floor(tries * rng.random(4))
        bounds = [w / m + math.sqrt(2 * math.log(tries.sum()) / m) for w, m in zip(wins, tries, strict=True)]
        assert bounds[int(ucb1(results(wins.tolist(), tries.tolist()))[0])] == pytest.approx(max(bounds))


def test_epsilon_greedy_pulls_the_best_mean_or_a_random_arm() -> None:
    arms = epsilon_greedy(results([1, 3, 2], [4, 5, 4], 20_000))
    shares = np.bincount(arms, minlength=3) / 20_000
    assert shares == pytest.approx([EPSILON / 3, 1 - EPSILON * 2 / 3, EPSILON / 3], abs=0.008)


def test_thompson_sampling_pulls_an_arm_as_often_as_its_posterior_is_the_highest() -> None:
    arms = thompson_sampling()(results([2, 0], [2, 1], 20_000))
    # P(Beta(3, 1) > Beta(1, 2)) = integral of 3 x^2 (1 - (1 - x)^2) = 9/10.
    assert np.mean(arms == 0) == pytest.approx(0.9, abs=0.01)


def test_the_bayes_optimal_policy_chooses_the_arm_of_the_highest_value() -> None:
    policy = BayesOptimal(6)
    assert policy(results([1, 0], [1, 0]))[0] == 0
    assert policy(results([0, 0], [1, 0]))[0] == 1
    # With one pull left the highest posterior mean counts alone, (1 + 1) / (1 + 2) against (3 + 1) / (4 + 2): equal.
    last = Results(np.array([0]), 5, np.array([[3.0, 0.0]]), np.array([[4.0, 1.0]]))
    assert policy(last)[0] == 0


def gain(rate: float, left: int, wins: int, losses: int) -> float:
    """Return what pulling an arm earns until the best time to stop, at a price of `rate` per pull."""
    if left == 0:
        return 0.0
    p = (wins + 1) / (wins + losses + 2)
    later = p * gain(rate, left - 1, wins + 1, losses) + (1 - p) * gain(rate, left - 1, wins, losses + 1)
    return max(0.0, p - rate + later)


def test_gittins_indices_are_the_rates_at_which_pulling_on_earns_nothing() -> None:
    table = gittins_table(8)
    for left, wins, losses in [(8, 0, 0), (5, 2, 1), (4, 0, 3), (1, 3, 4), (3, 0, 0)]:
        low, high = 0.0, 1.0
        for _ in range(30):
            rate = (low + high) / 2
            low, high = (rate, high) if gain(rate, left, wins, losses) > 1e-12 else (low, rate)
        assert table[left, wins, losses] == pytest.approx(low, abs=1 / RATES)
    assert table[1, 3, 4] == pytest.approx(4 / 9, abs=1 / RATES)  # the mean, with one pull left
    assert table[8, 0, 0] > table[3, 0, 0] > 0.5  # knowledge is worth more with more pulls left


def test_reference_returns_depend_on_each_level_alone() -> None:
    returns = BanditBatch.reference_returns(range(60), n_pulls=12, n_arms=3)
    assert set(returns) == {"Thompson sampling", "UCB1", "epsilon-greedy", "Gittins index", "Bayes-optimal"}
    some = BanditBatch.reference_returns([41, 7], n_pulls=12, n_arms=3)
    for name, values in returns.items():
        assert values.dtype == np.float32
        assert some[name].tolist() == values[[41, 7]].tolist()
    assert "Bayes-optimal" not in BanditBatch.reference_returns([0], n_pulls=LONGEST_PLAYED + 1)


def test_reference_returns_are_near_the_published_ones() -> None:
    returns = {name: r.mean() for name, r in BanditBatch.reference_returns(range(3000)).items()}
    # Duan et al. 2016, table 1 (5 arms, 10 pulls): Gittins index 6.6, Thompson sampling 5.7.
    assert returns["Gittins index"] == pytest.approx(6.6, abs=0.12)
    assert returns["Bayes-optimal"] == pytest.approx(bayes_optimal_return(5, 10), abs=0.15)  # standard error 0.04
    assert returns["Thompson sampling"] == pytest.approx(5.75, abs=0.2)
    assert all(5.4 < value <= returns["Bayes-optimal"] for value in returns.values())


@pytest.mark.parametrize("policy", [ucb1, epsilon_greedy])
def test_policies_break_ties_by_level(policy: Policy) -> None:
    first = policy(results([0, 0, 0], [0, 0, 0], 50))
    assert set(first.tolist()) == {0, 1, 2}
    assert first.tolist() == policy(results([0, 0, 0], [0, 0, 0], 50)).tolist()
