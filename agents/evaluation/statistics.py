"""Bootstrap intervals of means."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.stats import bootstrap

FloatArray = npt.NDArray[np.float64]
RESAMPLES = 9999


class Interval(NamedTuple):
    """An estimate and the ends of its 95% bootstrap interval, in the unit of the values."""

    mean: float
    low: float
    high: float

    def to_json(self) -> dict[str, float | None]:
        """Return it in JSON's types; infinite ends, those of an unknown spread, become None."""
        return {name: value if math.isfinite(value) else None for name, value in self._asdict().items()}


def mean_interval(values: FloatArray, seed: int = 0) -> Interval:
    """Return the mean of `values` `[n]` with its 95% percentile bootstrap interval.

    Pass one value per level (the mean over its repeats): the sample is one of levels.

    Raises:
        ValueError: there are no values.
    """
    return _interval(lambda sample, axis: sample.mean(axis), (values,), seed)


def difference_interval(first: FloatArray, second: FloatArray, seed: int = 0) -> Interval:
    """Return `mean(first) - mean(second)` of independent samples with its 95% percentile bootstrap interval.

    Raises:
        ValueError: one of them is empty.
    """
    return _interval(lambda a, b, axis: a.mean(axis) - b.mean(axis), (first, second), seed)


def _interval(statistic: object, samples: tuple[FloatArray, ...], seed: int) -> Interval:
    if any(len(sample) == 0 for sample in samples):
        raise ValueError("an interval needs at least one value")
    estimate = float(statistic(*samples, axis=-1))  # type: ignore[operator]
    if any(len(sample) < 2 for sample in samples):
        return Interval(estimate, float("-inf"), float("inf"))  # the spread is unknown
    result = bootstrap(
        samples,
        statistic,
        method="percentile",
        n_resamples=RESAMPLES,
        vectorized=True,
        batch=1000,
        rng=np.random.default_rng(seed),
    )
    return Interval(estimate, float(result.confidence_interval.low), float(result.confidence_interval.high))
