"""Logged values over training, from a run's metrics.jsonl."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
from scipy.stats import t

from srwm_rl.agents.evaluation.statistics import FloatArray
from srwm_rl.errors import UserError
from srwm_rl.regular_file import read_lines

N_POINTS = 160
MAX_FILE_BYTES = 2**31
MAX_KEYS, MAX_VALUES = 10_000, 2**26
MAX_STEP, LARGEST = 1e15, 1e100  # of a value that is drawn
RESAMPLES = 2000


class Curve(NamedTuple):
    """A logged value over training."""

    steps: FloatArray  # [n], increasing
    values: FloatArray  # [n]


class Band(NamedTuple):
    """Several seeds' curves and their mean; `low` and `high` bound its 95% interval over seeds."""

    mean: Curve
    low: FloatArray
    high: FloatArray
    seeds: list[Curve]


def read_curves(path: Path) -> dict[str, Curve]:
    """Read a metrics.jsonl: every logged key with its finite values; {} if there is no such file.

    Raises:
        UserError: it was not written by `srwm-rl train`, or has more rows, keys or values than that writes.
    """
    if not path.exists():
        return {}
    row_type = msgspec.json.Decoder(dict[str, Any])
    points: dict[str, tuple[array[float], array[float]]] = {}
    damaged, n_values = 0, 0
    for number, line in enumerate(read_lines(path, MAX_FILE_BYTES), start=1):
        if damaged:
            raise UserError(f"{path} is damaged in line {damaged}; give another run")
        try:
            row = row_type.decode(line)
            step = row.pop("step")
        except (msgspec.MsgspecError, KeyError, RecursionError, UnicodeError):
            damaged = number  # unless it is the last line: the run is still training
            continue
        if not isinstance(step, int | float) or not 0 <= step <= MAX_STEP:
            damaged = number
            continue
        n_values += len(row)
        for key, value in row.items():
            if isinstance(value, int | float) and abs(value) <= LARGEST:
                steps, values = points.setdefault(key, (array("d"), array("d")))
                steps.append(step)
                values.append(value)
        if len(points) > MAX_KEYS or n_values > MAX_VALUES:
            raise UserError(f"{path} has more than {MAX_KEYS:,} keys or {MAX_VALUES:,} values, which no run writes")
    return {key: _in_order(np.array(steps), np.array(values)) for key, (steps, values) in points.items()}


def _in_order(steps: FloatArray, values: FloatArray) -> Curve:
    """Return a curve by its steps; of several values at a step the last one."""
    order = np.argsort(steps, kind="stable")
    steps, values = steps[order], values[order]
    last = np.append(steps[1:] != steps[:-1], True)
    return Curve(steps[last], values[last])


def thin(curve: Curve) -> Curve:
    """Return at most `N_POINTS` points: the means of equal parts; the last point is kept as it is."""
    if len(curve.steps) <= N_POINTS:
        return curve
    steps, values = ([*map(np.mean, np.array_split(array, N_POINTS)[:-1]), array[-1]] for array in curve)
    return Curve(np.array(steps), np.array(values))


def combine(curves: list[Curve], seed: int = 0, statistic: Callable[..., Any] | None = None) -> Band:
    """Return the mean of several seeds' curves over the steps that all of them have, with its t-interval.

    `statistic` is a function of an array and an axis, such as `np.median`, in the place of the mean; its interval is
    from a bootstrap over the seeds, `seed` that of its random numbers.
    """
    if len(curves) == 1:
        mean = thin(curves[0])
        return Band(mean, mean.values, mean.values, [])
    first, last = max(curve.steps[0] for curve in curves), min(curve.steps[-1] for curve in curves)
    steps = np.linspace(first, max(first, last), N_POINTS)
    values = np.stack([np.interp(steps, *thin(curve)) for curve in curves])  # [n_seeds, N_POINTS]
    if statistic is None:
        mean, half = values.mean(0), t.ppf(0.975, len(curves) - 1) * values.std(0, ddof=1) / len(curves) ** 0.5
        return Band(Curve(steps, mean), mean - half, mean + half, [Curve(steps, row) for row in values])
    drawn = np.random.default_rng(seed).integers(len(curves), size=(RESAMPLES, len(curves)))
    low, high = np.percentile(statistic(values[drawn], axis=1), [2.5, 97.5], axis=0)
    return Band(Curve(steps, statistic(values, axis=0)), low, high, [Curve(steps, row) for row in values])
