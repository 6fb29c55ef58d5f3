"""Speeds measured in alternation, so that other load of the machine affects all sides alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

SECONDS = 1.0  # that a trainer or a component of it is timed for in each round, at least


class Rate(NamedTuple):
    """A speed or a ratio over the rounds."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        """Return the median and the range as text."""
        return f"{self.median:,.0f} [{self.low:,.0f}, {self.high:,.0f}]"


def alternate(sides: Mapping[str, Callable[[], int]], rounds: int) -> dict[str, list[float]]:
    """Run all sides in alternation.

    Args:
        sides: functions by name; each returns the number of steps or frames that it processed.
        rounds: how often each is timed; an untimed round comes first.

    Returns:
        By name, the number per second of wall time in each round.
    """
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name, work in sides.items():
            start = time.perf_counter()
            rate = work() / (time.perf_counter() - start)
            if number:
                rates[name].append(rate)
    return rates


def summary(rates: list[float]) -> Rate:
    """Return the median and the range of rates."""
    return Rate(statistics.median(rates), min(rates), max(rates))


def ratio(mine: list[float], theirs: list[float]) -> Rate:
    """Return the median and the range of the ratios of corresponding rounds."""
    return summary([a / b for a, b in zip(mine, theirs, strict=True)])


def format_ratio(value: Rate) -> str:
    """Return a ratio and its range as text."""
    return f"{value.median:.2f} [{value.low:.2f}, {value.high:.2f}]"


def long_enough(seconds: float) -> bool:
    """Return whether a round may end after this time."""
    return seconds >= SECONDS


def device_clock(device: torch.device) -> Callable[[], float]:
    """Return a clock, in seconds, that waits for the device first."""
    if device.type != "cuda":
        return time.perf_counter

    def synchronized() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return synchronized
