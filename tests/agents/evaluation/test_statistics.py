"""Intervals: they cover what they claim to cover."""

import numpy as np
import pytest

from srwm_rl.agents.evaluation.statistics import difference_interval, mean_interval


def test_mean_interval_covers_the_mean_about_95_times_in_100() -> None:
    rng = np.random.default_rng(0)
    inside = 0
    for trial in range(100):
        interval = mean_interval(rng.normal(3.0, 2.0, 60), seed=trial)
        assert interval.low < interval.mean < interval.high
        inside += interval.low <= 3.0 <= interval.high
    assert 86 <= inside <= 100


def test_interval_width_is_that_of_the_normal_approximation() -> None:
    values = np.random.default_rng(1).normal(0, 1, 400)
    interval = mean_interval(values)
    assert interval.mean == pytest.approx(values.mean())
    assert (interval.high - interval.low) == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.1)


def test_difference_interval() -> None:
    rng = np.random.default_rng(2)
    apart = difference_interval(rng.normal(5, 1, 100), rng.normal(3, 1, 150))
    assert apart.low > 1.5
    assert apart.high < 2.5
    same = difference_interval(rng.normal(5, 1, 100), rng.normal(5, 1, 150))
    assert same.low < 0 < same.high


def test_same_seed_same_interval() -> None:
    values = np.random.default_rng(5).normal(size=20)
    assert mean_interval(values, seed=3) == mean_interval(values, seed=3) != mean_interval(values, seed=4)


def test_intervals_of_equal_values_of_one_value_and_of_none() -> None:
    assert mean_interval(np.full(10, 2.0)) == (2.0, 2.0, 2.0)
    assert mean_interval(np.array([2.0])) == (2.0, float("-inf"), float("inf"))
    with pytest.raises(ValueError, match="at least one"):
        mean_interval(np.array([]))
