"""Statistics of two agents on the same levels, and of several training seeds.

Those over seeds are of Agarwal et al., "Deep Reinforcement Learning at the Edge of the Statistical Precipice" (NeurIPS
2021, https://arxiv.org/abs/2108.13264). Where their library `rliable` is installed, it computes the interquartile means
and the performance profiles. Scores are `[n_runs, n_games]`; runs are resampled game by game.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.stats import trim_mean

from srwm_rl.agents.evaluation.statistics import (
    FloatArray,
    Interval,
    bootstrap_ends,
    bootstrap_interval,
    mean_interval,
)

RESAMPLES = 2000  # of runs
N_THRESHOLDS = 101


class Profiles(NamedTuple):
    """Performance profiles, `[n]` each: for each threshold, the fraction of runs and games with a higher score."""

    thresholds: FloatArray
    fractions: FloatArray
    low: FloatArray  # of the pointwise 95% bootstrap interval
    high: FloatArray


def outcomes(first: FloatArray, second: FloatArray) -> tuple[int, int, int]:
    """Count the wins, ties and losses of the first of paired returns `[n]`.

    Raises:
        ValueError: the two are not pairs.
    """
    _check_pairs([first], [second])
    ties = _tied(first, second)
    wins = (first > second) & ~ties
    return int(wins.sum()), int(ties.sum()), int((~wins & ~ties).sum())


def paired_difference(first: Sequence[FloatArray], second: Sequence[FloatArray], seed: int = 0) -> Interval:
    """Return the mean over games of `mean(first - second)` with its 95% paired bootstrap interval.

    Each side is one array of returns `[n_levels]` per game, of the same games and levels.

    Raises:
        ValueError: the two are not pairs, or there are none.
    """
    _check_pairs(first, second)
    return mean_interval(*(a - b for a, b in zip(first, second, strict=True)), seed=seed)


def level_improvement(first: Sequence[FloatArray], second: Sequence[FloatArray], seed: int = 0) -> Interval:
    """Return the probability that the first agent beats the second on a random level of a random game.

    A tie counts as half. Arguments, interval and errors are those of `paired_difference`.
    """
    _check_pairs(first, second)
    pairs = zip(first, second, strict=True)
    return mean_interval(*(np.where(_tied(a, b), 0.5, (a > b).astype(np.float64)) for a, b in pairs), seed=seed)


def _tied(first: FloatArray, second: FloatArray) -> npt.NDArray[np.bool_]:
    """Compare means over repeats, which may differ by rounding."""
    return np.isclose(first, second, rtol=1e-9, atol=1e-12)


def run_improvement(first: FloatArray, second: FloatArray, seed: int = 0) -> Interval:
    """Return the probability that a random run of `first` scores higher than one of `second` on a random game."""

    def statistic(*columns: FloatArray, axis: int) -> Any:
        pairs = zip(columns[: first.shape[1]], columns[first.shape[1] :], strict=True)
        return np.mean([np.heaviside(a[..., None] - b[..., None, :], 0.5).mean((-2, -1)) for a, b in pairs], 0)

    return bootstrap_interval(statistic, (*first.T, *second.T), seed, RESAMPLES)


def interquartile_mean(scores: FloatArray, seed: int = 0) -> Interval:
    """Return the mean of the middle half of `scores` with its bootstrap interval, infinite for a single run."""
    if rliable_version() is not None and len(scores) > 1:
        from rliable import library, metrics

        with _global_seed(seed):
            points, ends = library.get_interval_estimates(
                {"runs": scores}, lambda runs: np.array([metrics.aggregate_iqm(runs)]), reps=RESAMPLES
            )
        (point,), ((low,), (high,)) = points["runs"], ends["runs"]
        return Interval(float(point), float(low), float(high))

    def statistic(*columns: FloatArray, axis: int) -> Any:
        return trim_mean(np.concatenate(columns, axis), 0.25, axis)

    return bootstrap_interval(statistic, tuple(scores.T), seed, RESAMPLES)


def performance_profile(scores: FloatArray, thresholds: FloatArray, seed: int = 0) -> Profiles:
    """Return the fraction of `scores`, of two or more runs, above each threshold with bootstrap intervals."""
    if rliable_version() is not None:
        from rliable import library

        with _global_seed(seed):
            points, ends = library.create_performance_profile({"runs": scores}, thresholds, reps=RESAMPLES)
        return Profiles(thresholds, points["runs"], *ends["runs"])

    def fractions(*columns: FloatArray, axis: int) -> Any:
        return (np.concatenate(columns, axis) > thresholds[:, None, None]).mean(axis)  # [n, resamples]

    ends = bootstrap_ends(fractions, tuple(scores.T), seed, RESAMPLES)
    return Profiles(thresholds, fractions(*scores.T, axis=-1)[:, 0], *ends)


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


def _check_pairs(first: Sequence[FloatArray], second: Sequence[FloatArray]) -> None:
    shapes = [[returns.shape for returns in side] for side in (first, second)]
    if shapes[0] != shapes[1] or not first or any(returns.ndim != 1 or not returns.size for returns in first):
        raise ValueError(f"a comparison needs pairs: arrays [n_levels] of the same levels, not {shapes}")
