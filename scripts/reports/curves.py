"""Logged values over training, from a run's metrics.jsonl."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import t

from srwm_rl.agents.evaluation.statistics import FloatArray
from srwm_rl.errors import UserError

N_POINTS = 160
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
        UserError: it was not written by `srwm-rl train`.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}; give a run folder that srwm-rl train made") from error
    points: dict[str, dict[float, float]] = {}
    for number, line in enumerate(lines):
        try:
            row = json.loads(line)
            step = float(row.pop("step"))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            if number == len(lines) - 1:  # the run is still training
                break
            raise UserError(f"{path} is damaged in line {number + 1}; give another run") from error
        for key, value in row.items():
            if isinstance(value, int | float) and math.isfinite(value) and math.isfinite(step):
                points.setdefault(key, {})[step] = float(value)
    return {key: Curve(*np.array(sorted(values.items()), np.float64).T) for key, values in points.items()}


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
