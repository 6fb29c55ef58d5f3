"""Statistics: intervals cover what they claim to cover; comparisons equal literal computations."""

import itertools

import numpy as np
import pytest
from scipy.stats import ttest_ind

from srwm_rl.agents.evaluation import statistics
from srwm_rl.agents.evaluation.statistics import (
    common_thresholds,
    difference_interval,
    interquartile_mean,
    mean_interval,
    outcomes,
    paired_difference,
    performance_profile,
    rliable_version,
    run_improvement,
    welch_interval,
)

RNG = np.random.default_rng(5)
SCORES = RNG.normal(size=(5, 3))
OTHERS = RNG.normal(0.5, size=(4, 3))


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


@pytest.fixture(params=["ours", "rliable"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return the library that computes interquartile means and profiles."""
    if request.param == "ours":
        monkeypatch.setattr(statistics, "rliable_version", lambda: None)
    elif rliable_version() is None:
        pytest.skip("rliable is not installed")
    return str(request.param)


def test_outcomes() -> None:
    first = np.array([1.0, 2.0, 3.0, 0.1 + 0.2, 5.0])
    second = np.array([2.0, 1.0, 3.0, 0.3, 1.0])
    assert outcomes([first, first[:1]], [second, second[:1]])[0].tolist() == [0, 1, 0.5, 0.5, 1]
    assert outcomes([second], [first])[0].tolist() == [1, 0, 0.5, 0.5, 0]


def test_paired_difference_is_the_mean_over_games_of_mean_differences() -> None:
    first, second = [np.array([3.0, 1.0]), np.array([10.0, 10.0, 40.0])], [np.zeros(2), np.array([0.0, 0.0, 10.0])]
    difference = paired_difference(first, second)
    assert difference.mean == pytest.approx((2.0 + 50 / 3) / 2)
    assert difference.low < difference.mean < difference.high
    assert paired_difference(second, first).mean == -difference.mean


def test_paired_interval_holds_the_bootstrap_of_all_resamples() -> None:
    values = np.array([0.0, 1.0, 5.0, 9.0])
    everything = [np.mean(resample) for resample in itertools.product(values, repeat=4)]
    low, high = np.percentile(everything, [2.5, 97.5])
    interval = paired_difference([values + 7.0], [np.full(4, 7.0)])
    assert interval.low == pytest.approx(low, abs=0.3)
    assert interval.high == pytest.approx(high, abs=0.3)


def test_pairing_removes_the_variance_between_levels() -> None:
    hard = RNG.normal(scale=100.0, size=200)
    difference = paired_difference([hard + 1.0 + RNG.normal(scale=0.1, size=200)], [hard])
    assert 0.9 < difference.low < difference.high < 1.1


def test_each_game_weighs_the_same_in_every_resample() -> None:
    first = [np.full(2, 1.0), np.full(1000, 0.0)]
    assert paired_difference(first, [np.zeros(2), np.zeros(1000)]) == (0.5, 0.5, 0.5)


def test_the_mean_outcome_counts_ties_as_half() -> None:
    first, second = [np.array([1.0, 1.0, 0.0, 2.0])], [np.array([0.0, 1.0, 1.0, 0.0])]
    assert mean_interval(*outcomes(first, second)).mean == pytest.approx((1 + 0.5 + 0 + 1) / 4)


def test_run_improvement_is_the_fraction_of_pairs_of_runs() -> None:
    tied = OTHERS.copy()
    tied[0] = SCORES[0]  # ties
    per_game = []
    for game in range(3):
        pairs = [(a > b) + 0.5 * (a == b) for a in SCORES[:, game] for b in tied[:, game]]
        per_game.append(sum(pairs) / len(pairs))
    interval = run_improvement(SCORES, tied)
    assert interval.mean == pytest.approx(sum(per_game) / 3)
    assert 0 <= interval.low <= interval.mean <= interval.high <= 1


def test_means_that_differ_by_rounding_are_ties_of_runs_too() -> None:
    mean = np.array([[0.1 + 0.2]])
    assert mean > 0.3
    assert run_improvement(mean, np.array([[0.3]])).mean == 0.5


def literal_interquartile_mean(scores: np.ndarray) -> float:
    values = sorted(scores.ravel())
    cut = len(values) // 4
    middle = values[cut : len(values) - cut]
    return float(sum(middle) / len(middle))


def test_interquartile_mean(backend: str) -> None:
    interval = interquartile_mean(SCORES)
    assert interval.mean == pytest.approx(literal_interquartile_mean(SCORES))
    rng = np.random.default_rng(1)
    resampled = []
    for _ in range(3000):
        drawn = [[SCORES[rng.integers(5), game] for game in range(3)] for _ in range(5)]
        resampled.append(literal_interquartile_mean(np.array(drawn)))
    low, high = np.percentile(resampled, [2.5, 97.5])
    assert interval.low == pytest.approx(low, abs=0.1)
    assert interval.high == pytest.approx(high, abs=0.1)
    assert interquartile_mean(SCORES) == interval  # the same seed, the same interval


def test_an_outlier_hardly_moves_the_interquartile_mean(backend: str) -> None:
    wild = SCORES.copy()
    wild[np.unravel_index(wild.argmax(), wild.shape)] = 1e6
    assert interquartile_mean(wild).mean == pytest.approx(interquartile_mean(SCORES).mean)


def test_performance_profile(backend: str) -> None:
    thresholds = common_thresholds(SCORES, OTHERS)
    fractions, low, high = performance_profile(SCORES, thresholds)
    literal = [sum(score > t for score in SCORES.ravel()) / SCORES.size for t in thresholds]
    assert fractions == pytest.approx(literal)
    assert (low <= fractions + 1e-9).all()
    assert (high >= fractions - 1e-9).all()
    assert (low < high).any()
    assert fractions[-1] == 0
    assert performance_profile(OTHERS, thresholds)[0][0] == 1
    assert (performance_profile(SCORES, thresholds)[1] == low).all()


def test_the_interval_of_a_single_run_or_level_is_infinite() -> None:
    assert interquartile_mean(SCORES[:1])[1:] == (-np.inf, np.inf)
    assert run_improvement(SCORES, OTHERS[:1])[1:] == (-np.inf, np.inf)
    assert paired_difference([np.ones(1)], [np.zeros(1)]) == (1.0, -np.inf, np.inf)


def test_numpys_global_generator_is_unchanged(backend: str) -> None:
    np.random.seed(3)
    before = np.random.get_state()[1].copy()  # type: ignore[index, union-attr]
    interquartile_mean(SCORES)
    assert (np.random.get_state()[1] == before).all()  # type: ignore[index]


@pytest.mark.parametrize("second", [np.zeros(3), np.zeros((2, 1))])
def test_arrays_that_are_not_pairs_are_refused(second: np.ndarray) -> None:
    with pytest.raises(ValueError, match="needs pairs"):
        paired_difference([np.zeros(2)], [second])
    with pytest.raises(ValueError, match="needs pairs"):
        outcomes([np.zeros(2)], [second])
    with pytest.raises(ValueError, match="needs pairs"):
        outcomes([], [])


def test_the_difference_over_seeds_is_welchs() -> None:
    first, second = np.array([1.0, 2.0, 3.0, 4.0]), np.array([0.0, 5.0, 1.0])
    ends = ttest_ind(first, second, equal_var=False).confidence_interval(0.95)
    assert welch_interval(first, second) == pytest.approx((0.5, *ends))
    assert welch_interval(np.ones(3), np.ones(2)) == (0, 0, 0)
