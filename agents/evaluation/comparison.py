"""Statistics of two agents on the same levels, and of several training seeds.

Those over seeds are of Agarwal et al., "Deep Reinforcement Learning at the Edge of the Statistical Precipice" (NeurIPS
2021, https://arxiv.org/abs/2108.13264). Where their library `rliable` is installed, it computes the interquartile means
and the performance profiles.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.stats import rankdata, trim_mean

from srwm_rl.agents.evaluation.statistics import FloatArray, Interval

RESAMPLES = 9999
SLOW_RESAMPLES = 2000
"""For statistics that are not vectorised over resamples."""
N_THRESHOLDS = 101


class Outcomes(NamedTuple):
    """Number of levels where the first agent's return is higher than, equal to or lower than the second's."""

    wins: int
    ties: int
    losses: int


class Profiles(NamedTuple):
    """Performance profiles: for each threshold, the fraction of runs and games with a higher score."""

    thresholds: FloatArray
    """`[n]`"""
    fractions: FloatArray
    """`[n]`"""
    low: FloatArray
    """`[n]`, of the pointwise 95% bootstrap interval"""
    high: FloatArray
    """`[n]`"""


def outcomes(first: FloatArray, second: FloatArray) -> Outcomes:
    """Count wins, ties and losses of paired returns `[n]`.

    Raises:
        ValueError: the two are not pairs.
    """
    _check_pairs([first], [second])
    ties = _tied(first, second)
    wins = (first > second) & ~ties
    return Outcomes(int(wins.sum()), int(ties.sum()), int((~wins & ~ties).sum()))


def paired_difference(first: Sequence[FloatArray], second: Sequence[FloatArray], seed: int = 0) -> Interval:
    """Return the mean over games of `mean(first - second)` with its 95% paired bootstrap interval.

    Pairs are resampled within their game, so that each game keeps its weight.

    Args:
        first: one array of returns per game, `[n_levels]` each.
        second: the same games and levels.
        seed: of the bootstrap.

    Raises:
        ValueError: the two are not pairs, or there are none.
    """
    _check_pairs(first, second)
    return _stratified_mean([a - b for a, b in zip(first, second, strict=True)], seed)


def level_improvement(first: Sequence[FloatArray], second: Sequence[FloatArray], seed: int = 0) -> Interval:
    """Return the probability that the first agent beats the second on a random level of a random game.

    A tie counts as half. Arguments, interval and errors are those of `paired_difference`.
    """
    _check_pairs(first, second)
    chances = [np.where(_tied(a, b), 0.5, (a > b).astype(np.float64)) for a, b in zip(first, second, strict=True)]
    return _stratified_mean(chances, seed)


def _tied(first: FloatArray, second: FloatArray) -> npt.NDArray[np.bool_]:
    """Compare means over repeats, which may differ by rounding."""
    return np.isclose(first, second, rtol=1e-9, atol=1e-12)


def run_improvement(first: FloatArray, second: FloatArray, seed: int = 0) -> Interval:
    """Return the probability that a random run of `first` scores higher than one of `second` on a random game.

    Args:
        first: scores `[n_runs, n_games]`.
        second: scores `[n_other_runs, n_games]`.
        seed: of the stratified bootstrap over runs.
    """

    def statistic(a: FloatArray, b: FloatArray) -> float:
        # Per game Mann and Whitney's U over its largest value; U from ranks, in which ties count as half.
        ranks = rankdata(np.concatenate([a, b]), axis=0)[: len(a)].sum(0)
        return float(((ranks - len(a) * (len(a) + 1) / 2) / (len(a) * len(b))).mean())

    return _bootstrap_runs(statistic, [first, second], seed)


def interquartile_mean(scores: FloatArray, seed: int = 0) -> Interval:
    """Return the mean of the middle half of `scores` `[n_runs, n_games]` with its stratified bootstrap interval.

    The interval of a single run is infinite.
    """
    if rliable_version() is not None and len(scores) > 1:
        from rliable import library, metrics

        with _global_seed(seed):
            points, ends = library.get_interval_estimates(
                {"runs": scores}, lambda runs: np.array([metrics.aggregate_iqm(runs)]), reps=SLOW_RESAMPLES
            )
        (point,), ((low,), (high,)) = points["runs"], ends["runs"]
        return Interval(float(point), float(low), float(high))
    return _bootstrap_runs(lambda runs: float(trim_mean(runs, 0.25, axis=None)), [scores], seed)


def performance_profile(scores: FloatArray, thresholds: FloatArray, seed: int = 0) -> Profiles:
    """Return the fraction of `scores` `[n_runs, n_games]` above each threshold with stratified bootstrap intervals."""

    def fractions(runs: FloatArray) -> FloatArray:
        above: FloatArray = (runs[:, :, None] > thresholds).mean((0, 1))
        return above

    if rliable_version() is not None and len(scores) > 1:
        from rliable import library

        with _global_seed(seed):
            points, ends = library.create_performance_profile({"runs": scores}, thresholds, reps=SLOW_RESAMPLES)
        return Profiles(thresholds, points["runs"], *ends["runs"])
    rng = np.random.default_rng(seed)
    resampled = np.stack([fractions(_resample_runs(scores, rng)) for _ in range(SLOW_RESAMPLES)])
    low, high = np.percentile(resampled, [2.5, 97.5], axis=0)
    return Profiles(thresholds, fractions(scores), low, high)


def common_thresholds(*scores: FloatArray) -> FloatArray:
    """Return `[N_THRESHOLDS]` values from just below the lowest score to the highest."""
    low, high = min(float(array.min()) for array in scores), max(float(array.max()) for array in scores)
    margin = 0.02 * max(high - low, 1e-3)
    thresholds: FloatArray = np.linspace(low - margin, high, N_THRESHOLDS)
    return thresholds


def rliable_version() -> str | None:
    """Return the version of `rliable`, or None where it is not installed or cannot be imported."""
    try:
        from rliable import library, metrics  # noqa: F401

        return version("rliable")
    except Exception:  # its dependency arch raises other errors than ImportError with some releases of pandas
        return None


@contextmanager
def _global_seed(seed: int) -> Iterator[None]:
    """Seed numpy's global generator, from which rliable 1.2 resamples whatever generator it is passed."""
    state = np.random.get_state()
    np.random.seed(seed)
    try:
        yield
    finally:
        np.random.set_state(state)


def _stratified_mean(strata: Sequence[FloatArray], seed: int) -> Interval:
    """Return the mean of the strata's means with its 95% bootstrap interval, resampling within each stratum."""
    estimate = float(np.mean([stratum.mean() for stratum in strata]))
    if min(map(len, strata)) < 2:
        return Interval(estimate, float("-inf"), float("inf"))
    rng = np.random.default_rng(seed)
    means = np.mean([_resampled_means(stratum, rng) for stratum in strata], axis=0)  # [RESAMPLES]
    low, high = np.percentile(means, [2.5, 97.5])
    return Interval(estimate, float(low), float(high))


def _resampled_means(values: FloatArray, rng: np.random.Generator) -> FloatArray:
    # In parts, as 9,999 resamples of 10,000 levels take 800 MB.
    rows = max(1, 1_000_000 // len(values))
    starts = range(0, RESAMPLES, rows)
    parts = [values[rng.integers(len(values), size=(min(rows, RESAMPLES - i), len(values)))].mean(1) for i in starts]
    return np.concatenate(parts)


def _bootstrap_runs(statistic: Callable[..., float], samples: Sequence[FloatArray], seed: int) -> Interval:
    """Return `statistic(*samples)`, resampling the runs `[n_runs, n_games]` of each sample game by game."""
    estimate = statistic(*samples)
    if min(map(len, samples)) < 2:
        return Interval(estimate, float("-inf"), float("inf"))
    rng = np.random.default_rng(seed)
    resampled = [statistic(*(_resample_runs(runs, rng) for runs in samples)) for _ in range(SLOW_RESAMPLES)]
    low, high = np.percentile(resampled, [2.5, 97.5])
    return Interval(estimate, float(low), float(high))


def _resample_runs(scores: FloatArray, rng: np.random.Generator) -> FloatArray:
    return np.take_along_axis(scores, rng.integers(len(scores), size=scores.shape), axis=0)


def _check_pairs(first: Sequence[FloatArray], second: Sequence[FloatArray]) -> None:
    shapes = [[returns.shape for returns in side] for side in (first, second)]
    if shapes[0] != shapes[1] or not first or any(returns.ndim != 1 or not returns.size for returns in first):
        raise ValueError(f"a comparison needs pairs: arrays [n_levels] of the same levels, not {shapes}")
