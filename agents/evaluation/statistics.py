"""Bootstrap intervals of means."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.stats import bootstrap

FloatArray = npt.NDArray[np.float64]
Statistic = Callable[..., Any]
"""Maps samples `[..., n]`, and their `axis` -1, to `[...]`."""


class Interval(NamedTuple):
    """An estimate and the ends of its 95% bootstrap interval, in the unit of the values."""

    mean: float
    low: float
    high: float

    def to_json(self) -> dict[str, float | None]:
        """Return it in JSON's types; infinite ends, those of an unknown spread, become None."""
        return {name: value if math.isfinite(value) else None for name, value in self._asdict().items()}


def mean_interval(*samples: FloatArray, seed: int = 0) -> Interval:
    """Return the mean of the means of `samples`, `[n]` each, with its 95% bootstrap interval.

    Pass one value per level (the mean over its repeats): the sample is one of levels. Each sample is resampled by
    itself, so that all keep their weight.
    """
    return bootstrap_interval(lambda *parts, axis: np.mean([part.mean(axis) for part in parts], 0), samples, seed)


def difference_interval(first: FloatArray, second: FloatArray, seed: int = 0) -> Interval:
    """Return `mean(first) - mean(second)` of independent samples with its 95% bootstrap interval."""
    return bootstrap_interval(lambda a, b, axis: a.mean(axis) - b.mean(axis), (first, second), seed)


def bootstrap_interval(
    statistic: Statistic, samples: Sequence[FloatArray], seed: int, n_resamples: int = 9999
) -> Interval:
    """Return a statistic of samples `[n]` with its 95% interval, which is infinite if a sample is of one value.

    Raises:
        ValueError: a sample is empty.
    """
    if not all(map(len, samples)):
        raise ValueError("an interval needs at least one value")
    estimate = float(statistic(*samples, axis=-1))
    if min(map(len, samples)) < 2:
        return Interval(estimate, float("-inf"), float("inf"))
    return Interval(estimate, *map(float, bootstrap_ends(statistic, samples, seed, n_resamples)))


def bootstrap_ends(statistic: Statistic, samples: Sequence[FloatArray], seed: int, n_resamples: int) -> Any:
    """Return the ends `(low, high)` of the 95% percentile bootstrap interval of a number, or of each of several."""
    return bootstrap(
        samples,
        statistic,
        method="percentile",
        n_resamples=n_resamples,
        vectorized=True,
        batch=1000,
        rng=np.random.default_rng(seed),
    ).confidence_interval
