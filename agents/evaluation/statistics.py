"""Bootstrap statistics: of one agent, of two agents on the same levels, and of several training seeds.

Those over seeds are of Agarwal et al., "Deep Reinforcement Learning at the Edge of the Statistical Precipice" (NeurIPS
2021, https://arxiv.org/abs/2108.13264). Where their library `rliable` is installed, it computes the interquartile means
and the performance profiles. Scores are `[n_runs, n_games]`; runs are resampled game by game.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.stats import bootstrap, t, trim_mean

FloatArray = npt.NDArray[np.float64]
Statistic = Callable[..., Any]
"""Maps samples `[..., n]`, and their `axis` -1, to `[...]` or `[k, ...]`."""
Estimates = tuple[FloatArray, FloatArray, FloatArray]
"""Of k numbers: the values and the ends of their 95% percentile bootstrap intervals, `[k]` each."""

RESAMPLES = 2000  # of runs
N_THRESHOLDS = 101


class Interval(NamedTuple):
    """An estimate and the ends of its 95% bootstrap interval, in the unit of the values."""

    mean: float
    low: float
    high: float

    def to_json(self) -> dict[str, float | None]:
        """Return it in JSON's types; infinite ends, those of an unknown spread, become None."""
        return {name: value if math.isfinite(value) else None for name, value in self._asdict().items()}


def mean_interval(*samples: FloatArray, seed: int = 0) -> Interval:
    """Return the mean of the means of `samples`, `[n]` each, with its interval, infinite if a sample is of one value.

    Pass one value per level (the mean over its repeats): the sample is one of levels. Each sample is resampled by
    itself, so that all keep their weight.

    Raises:
        ValueError: a sample is empty.
    """
    return _interval(lambda *parts, axis: np.mean([part.mean(axis) for part in parts], 0), samples, seed)


def t_interval(values: FloatArray) -> Interval:
    """Return the mean of `values` `[n]`, one per training seed, with its 95% interval by Student's t distribution.

    Of a single value the interval is infinite. For few values it is more honest than the bootstrap, which is too short.
    """
    mean, n = float(values.mean()), len(values)
    half = float(t.ppf(0.975, n - 1) * values.std(ddof=1) / n**0.5) if n > 1 else math.inf
    return Interval(mean, mean - half, mean + half)


def normal_interval(values: FloatArray) -> Interval:
    """Return the mean of `values` `[n]` with its 95% interval, 1.96 standard errors either way: std / sqrt(n).

    Of a single value the interval is infinite.
    """
    mean, n = float(values.mean()), len(values)
    half = 1.96 * float(values.std(ddof=1)) / n**0.5 if n > 1 else math.inf
    return Interval(mean, mean - half, mean + half)


def welch_interval(first: FloatArray, second: FloatArray) -> Interval:
    """Return `mean(first) - mean(second)` of values per training seed, with its 95% interval by Welch's t-test.

    The samples, of two or more values each, are independent and may differ in their variances.
    """
    difference = float(first.mean() - second.mean())
    (a, n), (b, m) = ((float(values.var(ddof=1)) / len(values), len(values)) for values in (first, second))
    if not a + b:
        return Interval(difference, difference, difference)
    freedom = (a + b) ** 2 / (a**2 / (n - 1) + b**2 / (m - 1))  # Satterthwaite's degrees
    half = float(t.ppf(0.975, freedom)) * (a + b) ** 0.5
    return Interval(difference, difference - half, difference + half)


def difference_interval(first: FloatArray, second: FloatArray, seed: int = 0) -> Interval:
    """Return `mean(first) - mean(second)` of independent samples with its interval."""
    return _interval(lambda a, b, axis: a.mean(axis) - b.mean(axis), (first, second), seed)


def paired_difference(first: Sequence[FloatArray], second: Sequence[FloatArray], seed: int = 0) -> Interval:
    """Return the mean over games of `mean(first - second)` with its paired interval.

    Each side is one array of returns `[n_levels]` per game, of the same games and levels.

    Raises:
        ValueError: the two are not pairs, or there are none.
    """
    return mean_interval(*(a - b for a, b in _pairs(first, second)), seed=seed)


def outcomes(first: Sequence[FloatArray], second: Sequence[FloatArray]) -> list[FloatArray]:
    """Return, for each level, 1 where the first agent is better, 1/2 for a tie, and 0 where the second is.

    Arguments and errors are those of `paired_difference`.
    """
    return [_better(a, b) for a, b in _pairs(first, second)]


def _better(a: FloatArray, b: FloatArray) -> FloatArray:
    """Return 1 where a is greater, 1/2 where they are equal but for the rounding of means, else 0."""
    return np.where(np.isclose(a, b, rtol=1e-9, atol=1e-12), 0.5, a > b)


def _pairs(first: Sequence[FloatArray], second: Sequence[FloatArray]) -> list[tuple[FloatArray, FloatArray]]:
    shapes = [[returns.shape for returns in side] for side in (first, second)]
    if shapes[0] != shapes[1] or not first or any(returns.ndim != 1 or not returns.size for returns in first):
        raise ValueError(f"a comparison needs pairs: arrays [n_levels] of the same levels, not {shapes}")
    return list(zip(first, second, strict=True))


def run_improvement(first: FloatArray, second: FloatArray, seed: int = 0) -> Interval:
    """Return the probability that a random run of `first` scores higher than one of `second` on a random game."""

    def statistic(*columns: FloatArray, axis: int) -> Any:
        pairs = zip(columns[: first.shape[1]], columns[first.shape[1] :], strict=True)
        return np.mean([_better(a[..., None], b[..., None, :]).mean((-2, -1)) for a, b in pairs], 0)

    return _interval(statistic, (*first.T, *second.T), seed, RESAMPLES)


def interquartile_mean(scores: FloatArray, seed: int = 0) -> Interval:
    """Return the mean of the middle half of `scores` with its bootstrap interval, infinite for a single run."""
    estimates = _over_runs(lambda *columns, axis: trim_mean(np.concatenate(columns, axis), 0.25, axis), scores, seed)
    return Interval(*(values.item() for values in estimates))


def performance_profile(scores: FloatArray, thresholds: FloatArray, seed: int = 0) -> Estimates:
    """Return the fraction of `scores`, of two or more runs, above each threshold with pointwise intervals."""

    def fractions(*columns: FloatArray, axis: int) -> Any:
        return (np.concatenate(columns, axis) > thresholds[:, None, None]).mean(axis)  # [n, resamples]

    return _over_runs(fractions, scores, seed)


def common_thresholds(*scores: FloatArray) -> FloatArray:
    """Return `[N_THRESHOLDS]` values from just below the lowest score to the highest."""
    low, high = min(float(array.min()) for array in scores), max(float(array.max()) for array in scores)
    margin = 0.02 * max(high - low, 1e-3)
    thresholds: FloatArray = np.linspace(low - margin, high, N_THRESHOLDS)
    return thresholds


def rliable_version() -> str | None:
    """Return the version of `rliable`, or None where it is not installed or cannot be imported."""
    try:
        from rliable import library  # noqa: F401

        return version("rliable")
    except Exception:  # its dependency arch raises other errors than ImportError with some releases of pandas
        return None


def _over_runs(statistic: Statistic, scores: FloatArray, seed: int) -> Estimates:
    if rliable_version() is None or len(scores) < 2:
        return _bootstrap(statistic, tuple(scores.T), seed, RESAMPLES)
    from rliable import library

    state = np.random.get_state()
    np.random.seed(seed)  # rliable 1.2 resamples from numpy's global generator whatever generator it is passed
    try:
        points, ends = library.get_interval_estimates(
            {"runs": scores}, lambda runs: np.ravel(statistic(*runs.T, axis=-1)), reps=RESAMPLES
        )
    finally:
        np.random.set_state(state)
    return points["runs"], *ends["runs"]


def _interval(statistic: Statistic, samples: Sequence[FloatArray], seed: int, n_resamples: int = 9999) -> Interval:
    return Interval(*(values.item() for values in _bootstrap(statistic, samples, seed, n_resamples)))


def _bootstrap(statistic: Statistic, samples: Sequence[FloatArray], seed: int, n_resamples: int) -> Estimates:
    if not all(map(len, samples)):
        raise ValueError("an interval needs at least one value")
    ends: tuple[Any, Any] = (-math.inf, math.inf)
    if min(map(len, samples)) > 1:
        ends = bootstrap(
            samples,
            statistic,
            method="percentile",
            n_resamples=n_resamples,
            vectorized=True,
            batch=1000,
            rng=np.random.default_rng(seed),
        ).confidence_interval
    estimate, low, high = map(np.ravel, (statistic(*samples, axis=-1), *ends))
    return estimate, low, high
